"""What a conformance property is given: an architecture at its smallest size, with parameters that hide nothing."""

import copy

import torch
from torch import Tensor, nn

from zoo import registry
from zoo.auto import model_class
from zoo.config import ZooConfig
from zoo.mixer import Mixer, State, Traits
from zoo.ops import use_backend


class Subject:
    """An architecture under test, in its preset "tiny".

    Parameters get a random push, so that a zero-initialised projection or gate does not hide what lies behind it.
    """

    def __init__(self, name: str):
        self.name = name
        self.entry = registry.get(name)

    def config(self, **fields) -> ZooConfig:
        """The tiny config, causal where the architecture can be."""
        if "causal" not in fields and self.traits().causal:
            fields["causal"] = True
        return registry.build_config(f"{self.name}-tiny", **fields)

    def traits(self) -> Traits:
        """Traits of the mixer; of a hybrid, what all its layers can do."""
        layers = registry.build_config(f"{self.name}-tiny").layer_configs()
        mixers = [registry.get(layer.name).mixer for layer in layers if layer.name]
        return Traits(
            causal=all(m.traits.causal for m in mixers),
            bidirectional=all(m.traits.bidirectional for m in mixers),
        )

    def model(self, task: str | None = None, *, dtype=torch.float32, push: bool = True, seed: int = 0, **fields) -> nn.Module:
        """A model in evaluation mode; the same seed gives the same parameters in every dtype."""
        torch.manual_seed(seed)
        config = self.config(**fields)
        model = model_class(config, task)(config).eval()
        if push:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        return model.to(dtype)

    def mixer(self, dtype=torch.float32, **fields) -> Mixer:
        """The first layer's mixer."""
        return self.model("base", dtype=dtype, **fields).layers[0].mixer

    def inputs(self, batch: int, length: int, dtype=torch.float32, seed: int = 1) -> Tensor:
        """Random activations `[B, T, D]`."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(batch, length, self.config().hidden_size, generator=generator, dtype=torch.float64).to(dtype)

    def tokens(self, batch: int, length: int, seed: int = 1) -> Tensor:
        """Random token ids `[B, T]`, none of them a special one."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(3, self.config().vocab_size, (batch, length), generator=generator)


def by_definition():
    """Within this context operators run their definition: what results are compared with, in float64 and in the dtype under test."""
    return use_backend("reference")


def mix(mixer: Mixer, x: Tensor, state: State | None = None, packing=None) -> tuple[Tensor, State]:
    """Call a mixer, whether or not it carries something between layers; the state given is left alone."""
    arguments = (x, copy.copy(state) if state is None else {n: t.clone() for n, t in state.items()}, packing)
    return mixer(*arguments, None)[:2] if mixer.traits.carry else mixer(*arguments)


def pieces(mixer: Mixer, x: Tensor, cuts: list[int]) -> tuple[Tensor, State]:
    """Outputs and last state of `x` fed piece by piece, cut before each index."""
    outs, state = [], None
    for start, stop in zip([0, *cuts], [*cuts, x.shape[1]], strict=True):
        if stop > start:
            y, state = mix(mixer, x[:, start:stop], state)
            outs.append(y)
    return torch.cat(outs, dim=1), state
