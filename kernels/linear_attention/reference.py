"""The definition, one token at a time. Slow on purpose."""

import torch
from torch import Tensor

from zoo.kernels.checks import accumulator


def linear_attention(q, k, v, log_decay, bonus, value_log_decay, state, scale: float, normalize: bool) -> tuple[Tensor, Tensor]:
    dtype, acc = v.dtype, accumulator(v.dtype)
    q, k, v = (x.to(acc) for x in every_head(q, k, v))
    q = q * scale
    if normalize:
        v = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)
    if state is None:
        state = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3])
    outs = []
    for t in range(q.shape[1]):
        write = k[:, t].unsqueeze(-1) * v[:, t].unsqueeze(-2)
        if bonus is not None:
            outs.append(read(q[:, t], state + bonus.to(acc).unsqueeze(-1) * write, normalize))
        if log_decay is not None:
            state = state * decay_at(log_decay.to(acc), t).exp()
        if value_log_decay is not None:
            state = state * value_log_decay[:, t].to(acc).exp().unsqueeze(-2)
        state = state + write
        if bonus is None:
            outs.append(read(q[:, t], state, normalize))
    return torch.stack(outs, dim=1).to(dtype), state


def every_head(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Each `[B, T, groups, .]` with as many heads as the most of them: head h reads group `h // (H / groups)`."""
    heads = max(x.shape[2] for x in tensors)
    return tuple(x if x.shape[2] == heads else x.repeat_interleave(heads // x.shape[2], dim=2) for x in tensors)


def decay_at(log_decay: Tensor, t: int) -> Tensor:
    """The log-decay of token t, shaped to multiply `[B, H, K, V]`."""
    if log_decay.ndim == 1:
        return log_decay[:, None, None]
    return log_decay[:, t, :, None, None] if log_decay.ndim == 3 else log_decay[:, t, :, :, None]


def read(q: Tensor, state: Tensor, normalize: bool) -> Tensor:
    out = torch.einsum("bhk,bhkv->bhv", q, state)
    return normalized(out) if normalize else out


def normalized(out: Tensor) -> Tensor:
    """Weighted sums divided by the sum of weights, their last channel; zero where there is no weight at all."""
    total = out[..., -1:]
    return out[..., :-1] / total.masked_fill(total == 0, 1.0)
