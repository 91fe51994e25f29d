"""The definitions, one token at a time. Slow on purpose."""

import torch
from torch import Tensor

from zoo.kernels.checks import accumulator
from zoo.kernels.linear_attention.reference import decay_at, every_head


def delta_rule(q, k, v, beta, log_decay, state, scale: float) -> tuple[Tensor, Tensor]:
    dtype, acc = v.dtype, accumulator(v.dtype)
    q, k, v = every_head(q, k, v)
    q, k, v, beta = q.to(acc) * scale, k.to(acc), v.to(acc), beta.to(acc)
    if state is None:
        state = q.new_zeros(*q.shape[:1], *q.shape[2:], v.shape[-1])
    log_decay = None if log_decay is None else log_decay.to(acc)
    outs = []
    for t in range(q.shape[1]):
        if log_decay is not None:
            state = state * decay_at(log_decay, t).exp()
        surprise = v[:, t] - read(k[:, t], state)
        state = state + outer(beta[:, t].unsqueeze(-1) * k[:, t], surprise)
        outs.append(read(q[:, t], state))
    return torch.stack(outs, dim=1).to(dtype), state


def general_delta_rule(q, k, v, a, b, log_decay, state, scale: float) -> tuple[Tensor, Tensor]:
    dtype, acc = v.dtype, accumulator(v.dtype)
    q, k, v, a, b, log_decay = q.to(acc) * scale, *(x.to(acc) for x in (k, v, a, b, log_decay))
    if state is None:
        state = q.new_zeros(*q.shape[:1], *q.shape[2:], v.shape[-1])
    outs = []
    for t in range(q.shape[1]):
        moved = outer(b[:, t], read(a[:, t], state))
        state = state * decay_at(log_decay, t).exp() + moved + outer(k[:, t], v[:, t])
        outs.append(read(q[:, t], state))
    return torch.stack(outs, dim=1).to(dtype), state


def read(key: Tensor, state: Tensor) -> Tensor:
    return torch.einsum("bhk,bhkv->bhv", key, state)


def outer(key: Tensor, value: Tensor) -> Tensor:
    return key.unsqueeze(-1) * value.unsqueeze(-2)
