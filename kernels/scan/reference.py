"""The definitions, one token at a time. Slow on purpose."""

import torch
from torch import Tensor

from zoo.kernels.checks import accumulator


def carried_dtype(precision: torch.dtype, *tensors: Tensor) -> torch.dtype:
    """Dtype of a state: the accumulator of `precision`, complex if any of these tensors is."""
    real = accumulator(precision)
    if not any(t.is_complex() for t in tensors):
        return real
    return torch.complex128 if real == torch.float64 else torch.complex64


def scan(x, log_decay, state, reverse: bool) -> tuple[Tensor, Tensor]:
    acc = carried_dtype(x.dtype, x, log_decay)
    out_dtype = acc if acc.is_complex else x.dtype
    x, decay = x.to(acc), log_decay.to(acc).exp().expand(x.shape)
    if state is None:
        state = x.new_zeros(x.shape[0], x.shape[2])
    states = [state] * x.shape[1]
    for t in reversed(range(x.shape[1])) if reverse else range(x.shape[1]):
        state = decay[:, t] * state + x[:, t]
        states[t] = state
    return torch.stack(states, dim=1).to(out_dtype), state


def selective_scan(x, dt, A, B, C, D, state) -> tuple[Tensor, Tensor]:
    dtype, real, acc = x.dtype, accumulator(x.dtype), carried_dtype(x.dtype, A)
    x, dt, A, B, C = x.to(real), dt.to(real), A.to(acc), B.to(acc), C.to(acc)
    B, C = (g.repeat_interleave(x.shape[2] // g.shape[2], dim=2) for g in (B, C))
    if state is None:
        state = A.new_zeros(x.shape[0], *A.shape)
    outs = []
    for t in range(x.shape[1]):
        step = dt[:, t].unsqueeze(-1)
        state = (step * A).exp() * state + step * x[:, t].unsqueeze(-1) * B[:, t]
        outs.append(real_part((state * C[:, t]).sum(-1)))
    out = torch.stack(outs, dim=1)
    return (out if D is None else out + x * D.to(real)).to(dtype), state


def real_part(y: Tensor) -> Tensor:
    """Complex states stand for conjugate pairs, of which one is computed: the pair sums to twice the real part."""
    return 2 * y.real if y.is_complex() else y
