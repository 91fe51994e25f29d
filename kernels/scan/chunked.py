"""The same by chunks, in plain torch, in time linear in T.

A scan over T tokens is cut into about sqrt(T / 2) chunks and walked in three passes: what each chunk would leave behind if
it started from nothing, and how much it keeps, all chunks at once; the states at the chunks' starts, one chunk after the
other; and the states inside the chunks from there, all chunks at once. Decays are only ever multiplied, so a decay that
forgets all is exact beside gentle ones, and the last pass is the recurrence itself. Where tokens are so wide that there is
nothing to gain from more of them at once, that last pass alone remains, over one chunk.

The gradient of a scan is a scan the other way: with g_t the gradient of h_t alone and G_t that of all that h_t reaches,

    G_t = g_t + conj(a_{t+1}) G_{t+1}        dx_t = G_t        da_t = G_t conj(h_{t-1})

so nothing but decays and states is kept for it.
"""

from math import isqrt

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from zoo.kernels.checks import accumulator
from zoo.kernels.chunking import chunk_size
from zoo.kernels.scan.reference import carried_dtype, real_part

CHUNK, LEAST, NUMBERS = 256, 16, 2**22  # a selective scan's chunk: most and least tokens; numbers its states may be in all
WIDE, WIDE_CPU = 2**20, 2**12  # numbers a token has from which a device is busy with one token, and one pass is best


def scan(x, log_decay, state, reverse: bool) -> tuple[Tensor, Tensor]:
    acc = carried_dtype(x.dtype, x, log_decay)
    out_dtype = acc if acc.is_complex else x.dtype
    x, decay = x.to(acc), log_decay.to(acc).exp().expand(x.shape)
    if state is None:
        state = x.new_zeros(x.shape[0], x.shape[2])
    h = Scan.apply(x, decay, state, reverse)
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
    chunk = min(max(NUMBERS // state.numel(), LEAST), CHUNK)
    outs = []
    for pieces in zip(*(t.split(chunk, dim=1) for t in (x, dt, B, C)), strict=True):
        if recompute:
            out, state = checkpoint(_selective_chunk, *pieces, rates, state, use_reentrant=False, preserve_rng_state=False)
        else:
            out, state = _selective_chunk(*pieces, rates, state)
        outs.append(out)
    out = torch.cat(outs, dim=1)
    if D is not None:
        out = out + (x * D.to(real).unflatten(0, (groups, 1, -1))).squeeze(3)
    return out.flatten(2).to(dtype), state.transpose(2, 3).flatten(1, 2)


def _selective_chunk(x, dt, B, C, rates, state) -> tuple[Tensor, Tensor]:
    """`[B, C, G, D / G]` outputs of one chunk and the state behind it, `[B, G, N, D / G]`."""
    h = Scan.apply((dt * x) * B, (dt * rates).exp_(), state, False)
    return real_part((C @ h).squeeze(3)), h[:, -1].clone()


class Scan(torch.autograd.Function):
    """All states of `h_t = decay_t h_{t-1} + x_t`: x and decay `[B, T, ...]`, state `[B, ...]`, of one dtype."""

    @staticmethod
    def forward(x: Tensor, decay: Tensor, state: Tensor, reverse: bool) -> Tensor:
        length = x.shape[1]
        wide = x[:, 0].numel() >= (WIDE_CPU if x.device.type == "cpu" else WIDE)
        chunk = length if wide else chunk_size(isqrt(max(length // 2, 1)), length)
        pad = -length % chunk
        if pad:  # behind the last token nothing is added and nothing forgotten
            x = torch.cat([x, x.new_zeros(x.shape[0], pad, *x.shape[2:])], dim=1)
            decay = torch.cat([decay, decay.new_ones(decay.shape[0], pad, *decay.shape[2:])], dim=1)
        xs, decays = (t.unflatten(1, (-1, chunk)).unbind(2) for t in (x, decay))
        order = range(chunk)[::-1] if reverse else range(chunk)
        states = x.new_empty(x.shape)
        into = states.unflatten(1, (-1, chunk)).unbind(2)
        now = state.unsqueeze(1) if wide else _starts([xs[i] for i in order], [decays[i] for i in order], state, reverse)
        for i in order:
            now = torch.addcmul(xs[i], decays[i], now, out=into[i])
        return states[:, :length].contiguous() if pad else states

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, decay, state, ctx.reverse = inputs
        ctx.save_for_backward(decay, state, output)

    @staticmethod
    def backward(ctx, grad):
        decay, state, states = ctx.saved_tensors
        if ctx.reverse:
            later = torch.cat([torch.ones_like(decay[:, :1]), decay[:, :-1]], dim=1)
            before = torch.cat([states[:, 1:], state.unsqueeze(1)], dim=1)
        else:
            later = torch.cat([decay[:, 1:], torch.ones_like(decay[:, :1])], dim=1)
            before = torch.cat([state.unsqueeze(1), states[:, :-1]], dim=1)
        reached = Scan.apply(grad, later.conj(), torch.zeros_like(state), not ctx.reverse)
        first = -1 if ctx.reverse else 0
        return reached, reached * before.conj(), reached[:, first] * decay[:, first].conj(), None


def _starts(xs: list[Tensor], decays: list[Tensor], state: Tensor, reverse: bool) -> Tensor:
    """States before every chunk, `[B, T / C, ...]`, from the chunks' tokens in the order in which they are walked."""
    left, kept = xs[0], decays[0]
    for x, decay in zip(xs[1:], decays[1:], strict=True):
        left = torch.addcmul(x, decay, left)
        kept = kept * decay
    starts = torch.empty_like(left, memory_format=torch.contiguous_format)
    chunks = range(left.shape[1])
    for n in chunks[::-1] if reverse else chunks:
        starts[:, n] = state
        state = torch.addcmul(left[:, n], kept[:, n], state)
    return starts
