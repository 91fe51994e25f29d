"""The weights with which a mixer mixes tokens, read off its operator: what that makes of the identity in the place of its values."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from zoo.ops import OPS, Op

READ = ("attention", "linear_attention", "delta_rule")  # operators that are linear in their values


@contextmanager
def operators_seen(see: Callable[[Op, dict, dict], None]) -> Iterator[None]:
    """Within the context `see` is told of every operator that runs: which, with what tensors and options."""

    def watch(op: Op) -> None:
        def execute(tensors: dict, options: dict, packing, backend: str):
            see(op, tensors, options)
            return type(op).execute(op, tensors, options, packing, backend)

        op.execute = execute  # before the method of its class

    try:
        for op in OPS.values():
            watch(op)
        yield
    finally:
        for op in OPS.values():
            op.__dict__.pop("execute", None)


def weights_of(mixer: nn.Module, run: Callable[[], object]) -> Tensor:
    """`[B, H, T, T]`: how much of each value every token takes up.

    What a mixer does with its values before (a gate) or afterwards (a norm, a skip connection) is not a part of it.

    Args: run: calls the mixer, on rows that continue nothing.

    Raises:
        ValueError: the mixer calls no operator of `READ`, or several.
    """
    found = []

    def see(op: Op, tensors: dict, options: dict) -> None:
        if op.name in READ:
            found.append((op, tensors, options))

    with operators_seen(see):
        run()
    if len(found) != 1 or found[0][1].get("value_log_decay") is not None:
        raise ValueError(
            f"{type(mixer).__name__} has no one set of weights to compare: it calls {len(found)} of the operators {', '.join(READ)}; "
            "compare its output instead (target: mixer_out)"
        )
    (op, tensors, options), v = found[0], found[0][1]["v"]
    length = v.shape[1]
    unit = torch.eye(length, dtype=v.dtype, device=v.device).view(1, length, 1, length).expand(*v.shape[:3], length)
    fresh = {"v": unit} | ({"state": None} if op.recurrent else {})
    mixed, _ = op.execute(tensors | fresh, options, None, "chunked")
    return mixed.transpose(1, 2)
