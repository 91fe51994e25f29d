"""Launching Triton kernels at a fraction of the host time of `kernel[grid](...)`, which looks at every argument anew."""

from functools import lru_cache

import torch
from torch import Tensor

_compiled: dict[tuple, object] = {}


def launch(kernel, programs: int, *args, num_warps: int = 4, num_stages: int = 1, **constants) -> None:
    """Run `programs` programs of a `triton.jit` function.

    Args:
        args: its parameters in order: tensors, numbers and None.
        constants: its `tl.constexpr` parameters, which come last in its signature.
        num_warps, num_stages: of the compiler.
    """
    lead = args[0]
    if lead.device.type == "cpu":  # interpreted
        kernel[(programs,)](*args, **constants)
        return
    if lead.device.index != torch.cuda.current_device():
        with torch.cuda.device(lead.device):
            launch(kernel, programs, *args, num_warps=num_warps, num_stages=num_stages, **constants)
        return
    # what Triton compiles differently for; numbers first, since most are
    kinds = [
        (x == 1) + 2 * (x & 15 == 0) + 4 * (x >> 31)
        if type(x) is int
        else (x.dtype, x.data_ptr() & 15)
        if isinstance(x, Tensor)
        else x is None
        for x in args
    ]
    key = (kernel, lead.device.index, num_warps, num_stages, *constants.values(), *kinds)
    compiled = _compiled.get(key)
    if compiled is None:
        _compiled[key] = kernel[(programs,)](*args, **constants, num_warps=num_warps, num_stages=num_stages)
    else:
        compiled[(programs, 1, 1)](*args, *(constants[name] for name in kernel.arg_names[len(args) :]))


def rows(x: Tensor) -> Tensor:
    """With channels side by side, as kernels read them."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def strides(x: Tensor | None) -> tuple[int, int, int]:
    return (0, 0, 0) if x is None else (x.stride(0), x.stride(1), x.stride(2))


@lru_cache(maxsize=8)
def zero(device: torch.device, dtype: torch.dtype) -> Tensor:
    """Read with strides of zero, the state that sequences start from unless they are given one."""
    return torch.zeros(1, device=device, dtype=dtype)
