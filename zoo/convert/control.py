"""Students that begin worse on purpose: what copying, pairing heads rightly, or a teacher at all is worth."""

from collections.abc import Callable, Iterator

import torch
from torch import nn

from zoo.convert.student import converted_layers

CONTROLS: dict[str, Callable[[nn.Module, nn.Module], None]] = {}


def control(function: Callable[[nn.Module, nn.Module], None]) -> Callable[[nn.Module, nn.Module], None]:
    CONTROLS[function.__name__] = function
    return function


@control
def scratch(teacher: nn.Module, student: nn.Module) -> None:
    """Every weight as its architecture draws it: nothing is the teacher's but the sizes."""
    draw(student, student)


@control
def uncopied(teacher: nn.Module, student: nn.Module) -> None:
    """What replaces attention as its architecture draws it, the rest the teacher's."""
    for index in converted_layers(student):
        draw(student, student.model.layers[index].mixer)


@control
@torch.no_grad()
def mispaired(teacher: nn.Module, student: nn.Module) -> None:
    """Keys and values of head h from the teacher's group h % G instead of h // (H / G).

    Raises:
        ValueError: no replaced mixer has the teacher's groups repeated.
    """
    changed = 0
    for index in converted_layers(student):
        source = teacher.model.layers[index].mixer
        for mixer in branches(student.model.layers[index].mixer):
            for name in ("k_proj", "v_proj"):
                given, own = getattr(source, name), getattr(mixer, name, None)
                if own is None or type(mixer) is type(source):
                    continue
                groups = given.weight.unflatten(0, (-1, source.keys))
                heads = own.weight.shape[0] // source.keys
                if heads > len(groups) and own.weight.shape[0] == heads * source.keys:
                    own.weight.copy_(groups[torch.arange(heads, device=groups.device) % len(groups)].flatten(0, 1))
                    changed += 1
    if not changed:
        raise ValueError("no replaced mixer holds the teacher's groups of keys and values repeated, so none can be paired wrongly")


def branches(mixer: nn.Module) -> Iterator[nn.Module]:
    yield from getattr(mixer, "branches", [mixer])


def draw(student: nn.Module, part: nn.Module) -> None:
    """Give a part of a student the weights that its architecture begins with."""
    for module in part.modules():
        module._is_hf_initialized = False
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            tensor._is_hf_initialized = False
    for module in part.modules():
        student._init_weights(module)
