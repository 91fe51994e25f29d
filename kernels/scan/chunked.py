"""The same in parallel over time, in plain torch, in time linear in T.

Two tokens in a row are one: `h_{t+1} = (a_{t+1} a_t) h_{t-1} + (a_{t+1} x_t + x_{t+1})`. A scan over T tokens is so a scan over
T / 2, which finds every second state, and one step from each of those to the state behind the next token: log2(T) rounds,
`3 T` multiplications. Decays are only ever multiplied, so a decay that forgets all is exact beside gentle ones. Long rows are
cut into segments, the state passed on, which keeps the rounds' temporaries small.

The gradient of a scan is a scan the other way: with g_t the gradient of h_t alone and G_t that of all that h_t reaches,

    G_t = g_t + conj(a_{t+1}) G_{t+1}        dx_t = G_t        da_t = G_t conj(h_{t-1})

so nothing but log-decays and states is kept for it.
"""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from zoo.kernels.checks import accumulator
from zoo.kernels.chunking import Joined, segment_size
from zoo.kernels.scan.reference import carried_dtype, real_part

CHUNK, LEAST = 256, 16  # a selective scan's chunk: most and least tokens
FEW = 8  # tokens no longer worth pairing


def scan(x, log_decay, state, reverse: bool) -> tuple[Tensor, Tensor]:
    acc = carried_dtype(x.dtype, x, log_decay)
    out_dtype = acc if acc.is_complex else x.dtype
    log_decay = log_decay.to(acc).expand(x.shape)
    x = x.to(carried_dtype(x.dtype, x))
    if state is None:
        state = x.new_zeros(x.shape[0], x.shape[2], dtype=acc)
    h = Scan.apply(x, log_decay, state, reverse)
    return h.to(out_dtype), h[:, 0 if reverse else -1].clone()


def selective_scan(x, dt, A, B, C, D, state) -> tuple[Tensor, Tensor]:
    """Chunk after chunk; under autograd a chunk keeps only its start and is computed again in the backward pass."""
    dtype, real, acc = x.dtype, accumulator(x.dtype), carried_dtype(x.dtype, A)
    groups = B.shape[2]
    x, dt = (t.to(real).unflatten(2, (groups, 1, -1)) for t in (x, dt))  # [B, T, G, 1, D / G]
    rates = A.to(acc).unflatten(0, (groups, -1)).transpose(1, 2).contiguous()  # [G, N, D / G], long dimension last
    B, C = B.to(acc).unsqueeze(-1), C.to(acc).unsqueeze(-2)  # [B, T, G, N, 1] and [B, T, G, 1, N]
    if state is None:
        state = A.new_zeros(x.shape[0], *A.shape, dtype=acc)
    state = state.unflatten(1, (groups, -1)).transpose(2, 3)
    recompute = torch.is_grad_enabled() and any(t.requires_grad for t in (x, dt, rates, B, C, state))
    chunk = min(max(segment_size(state), LEAST), CHUNK)
    outs = Joined(x.shape[1])
    for pieces in zip(*(t.split(chunk, dim=1) for t in (x, dt, B, C)), strict=True):
        if recompute:
            out, state = checkpoint(_selective_chunk, *pieces, rates, state, use_reentrant=False, preserve_rng_state=False)
        else:
            out, state = _selective_chunk(*pieces, rates, state)
        outs.append(out)
    out = outs.whole()
    if D is not None:
        out = out + (x * D.to(real).unflatten(0, (groups, 1, -1))).squeeze(3)
    return out.flatten(2).to(dtype), state.transpose(2, 3).flatten(1, 2)


def _selective_chunk(x, dt, B, C, rates, state) -> tuple[Tensor, Tensor]:
    """`[B, C, G, D / G]` outputs of one chunk and the state behind it, `[B, G, N, D / G]`."""
    h = Scan.apply((dt * x) * B, dt * rates, state, False)
    return real_part((C @ h).squeeze(3)), h[:, -1].clone()


class Scan(torch.autograd.Function):
    """All states of `h_t = exp(log_decay_t) h_{t-1} + x_t`: x and log_decay `[B, T, ...]`, state `[B, ...]`, of one dtype, but x may
    be real where the others are complex. A decay expanded along T is read as the one it is."""

    @staticmethod
    def forward(x: Tensor, log_decay: Tensor, state: Tensor, reverse: bool) -> Tensor:
        states = torch.empty_like(x, dtype=log_decay.dtype, memory_format=torch.contiguous_format)
        alike = log_decay[:, :1].exp() if log_decay.stride(1) == 0 else None
        size = segment_size(state)
        starts = range(0, x.shape[1], size)
        for start in starts[::-1] if reverse else starts:
            piece = slice(start, start + size)
            into = states[:, piece]
            _walk(x[:, piece], log_decay[:, piece].exp() if alike is None else alike, state, into, reverse)
            state = into[:, 0 if reverse else -1]
        return states

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, log_decay, state, ctx.reverse = inputs
        ctx.real = not x.is_complex()
        ctx.save_for_backward(log_decay, state, output)

    @staticmethod
    def backward(ctx, grad):
        log_decay, state, states = ctx.saved_tensors
        if ctx.reverse:
            later = torch.cat([torch.zeros_like(log_decay[:, :1]), log_decay[:, :-1]], dim=1)
            before = torch.cat([states[:, 1:], state.unsqueeze(1)], dim=1)
        else:
            later = torch.cat([log_decay[:, 1:], torch.zeros_like(log_decay[:, :1])], dim=1)
            before = torch.cat([state.unsqueeze(1), states[:, :-1]], dim=1)
        reached = Scan.apply(grad, later.conj(), torch.zeros_like(state), not ctx.reverse)
        decay = (log_decay[:, :1] if log_decay.stride(1) == 0 else log_decay).exp()
        kept = reached * decay.conj()  # what reaches each token's past
        first = -1 if ctx.reverse else 0
        return reached.real if ctx.real else reached, kept * before.conj(), kept[:, first], None


def _walk(x: Tensor, decay: Tensor, state: Tensor, into: Tensor, reverse: bool) -> None:
    """Write all states into `into`; x, decay and it `[B, T, ...]`, decay also `[B, 1, ...]` for all tokens, and state `[B, ...]`."""
    length, alike = x.shape[1], decay.shape[1] == 1
    if length <= FEW:
        xs, decays, into = x.unbind(1), decay.expand(-1, length, *decay.shape[2:]).unbind(1), into.unbind(1)
        for t in reversed(range(length)) if reverse else range(length):
            state = _step(xs[t], decays[t], state, into[t])
        return
    last, rest = (slice(0, 1), slice(1, None)) if reverse else (slice(-1, None), slice(0, -1))
    if length % 2:  # the last token to be walked has no partner
        _walk(x[:, rest], decay if alike else decay[:, rest], state, into[:, rest], reverse)
        _step(x[:, last], decay if alike else decay[:, last], into[:, 1:2] if reverse else into[:, -2:-1], into[:, last])
        return
    first, second = (slice(1, None, 2), slice(0, None, 2)) if reverse else (slice(0, None, 2), slice(1, None, 2))
    decay_first, decay_second = (decay, decay) if alike else (decay[:, first], decay[:, second])
    joined = torch.addcmul(x[:, second].to(decay.dtype), decay_second, x[:, first].to(decay.dtype))
    _walk(joined, decay_first * decay_second, state, into[:, second], reverse)
    outer, inner = (slice(-1, None), slice(0, -1)) if reverse else (slice(0, 1), slice(1, None))
    x, into, before = x[:, first], into[:, first], into[:, second]
    _step(x[:, outer], decay if alike else decay_first[:, outer], state.unsqueeze(1), into[:, outer])
    _step(x[:, inner], decay if alike else decay_first[:, inner], before[:, rest], into[:, inner])


def _step(x: Tensor, decay: Tensor, before: Tensor, into: Tensor) -> Tensor:
    return torch.addcmul(x.to(decay.dtype), decay, before, out=into)
