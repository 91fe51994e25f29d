"""The delta rule in Triton: the host's side. Which kernel runs on what, and its gradient.

Tiles are fixed per head size, there is no tuning at run time. bf16 is multiplied as it is, fp16, and bf16 in few channels, as tf32,
fp32 as fp64, see `zoo.kernels.fused.numbers`; the inverse of a chunk as tf32 or wider.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from triton import language as tl

from zoo.kernels.delta_rule import fused_channel, fused_delta
from zoo.kernels.fused import numbers
from zoo.kernels.launch import launch, rows, strides, zero
from zoo.kernels.packing import Packing
from zoo.kernels.segments import Segments, cdiv, padded_size

FILLED = 128  # programs that occupy a GPU
FEW = 64  # channels of keys; a chunk overwrites fewer again and again, and roundings to bf16 add up where what was written does not


def delta_rule(q, k, v, beta, log_decay, state, scale: float, packing: Packing | None = None):
    """See `zoo.kernels.delta_rule.delta_rule`; q, k and v may have fewer heads than the most of them."""
    return _Delta.apply(q, k, v, beta, log_decay, state, scale, None if packing is None else packing.cu_seqlens)


def chunk_length(channels: int, dtype: torch.dtype) -> int:
    """Tokens of a chunk, for the most channels of a head."""
    return 64 if dtype == torch.bfloat16 and channels <= 128 else 32 if dtype != torch.float32 else 16


class Tile(NamedTuple):
    """A launch: values of a slice, warps, stages of the pipeline."""

    slice: int
    warps: int
    stages: int


def sweep_tile(keys: int, values: int, dtype: torch.dtype, heads: int) -> Tile:
    """Of `sweep` and `sweep_back`, for so many heads in all sequences together: as wide as leaves programs enough."""
    if dtype != torch.bfloat16 or keys > 128:
        return Tile(min(32, padded_size(values)), 4, 1)
    part = next((n for n in (64, 32) if heads * cdiv(values, n) >= FILLED), 16)
    return Tile(min(part, padded_size(values)), 8 if part == 64 else 4, 3)


def gradient_tile(keys: int, values: int, dtype: torch.dtype) -> Tile:
    """Of `gradients`."""
    part = min(32, padded_size(values))
    return Tile(part, 4, 3) if dtype == torch.bfloat16 and keys <= 128 else Tile(min(16, part) if keys > 128 else part, 8, 1)


class Made(NamedTuple):
    """What `prepare` makes, as `fused_delta` names it: Q', K', W, U, T and P."""

    q: Tensor | None
    k: Tensor | None
    w: Tensor
    u: Tensor
    t: Tensor
    p: Tensor


class Problem:
    """Sizes, chunks and numbers of one call, and its launches."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, scale: float, cu_seqlens: Tensor | None):
        self.batch, self.length = q.shape[:2]
        self.heads = max(q.shape[2], k.shape[2], v.shape[2])
        self.keys, self.values = q.shape[3], v.shape[3]
        self.sequences = self.batch if cu_seqlens is None else cu_seqlens.numel() - 1
        self.scale, self.device, self.dtype = scale, q.device, q.dtype
        self.kind = torch.float16 if q.dtype == torch.bfloat16 and self.keys < FEW else q.dtype  # whose numbers are multiplied
        self.type, self.precision = numbers(self.kind)
        self.inverse = "tf32" if self.kind == torch.bfloat16 else "tf32x3"  # how what makes T is multiplied
        self.exact = torch.float64 if q.dtype == torch.float32 else torch.float32  # what kernels sum up in
        self.wide = torch.bfloat16 if self.kind == torch.bfloat16 else self.exact  # what lies between kernels
        self.acc = tl.float64 if self.exact == torch.float64 else tl.float32
        self.chunk = chunk_length(max(padded_size(self.keys), padded_size(self.values)), self.kind)
        self.chunks = Segments.of(self.batch, self.length, self.chunk, cu_seqlens, q.device)
        self.log_decay = log_decay
        kind = fused_delta.NONE if log_decay is None else fused_delta.CHANNEL if log_decay.ndim == 4 else fused_delta.TOKEN
        self.decay, self.token = kind.value, kind is fused_delta.TOKEN
        self.sums = self.like(dtype=self.exact) if self.token else None
        self.edges = self.safes = self.between = None
        self.even = self.keys == padded_size(self.keys)
        self.padded = padded_size(self.keys)
        self.sizes = self.length, self.heads, self.keys, self.values
        self.numbers = {"TYPE": self.type, "ACC": self.acc, "PRECISION": self.precision}

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=self.device)

    def like(self, *channels: int, dtype: torch.dtype | None = None) -> Tensor:
        """Of every token and head."""
        return self.empty(self.batch, self.length, self.heads, *channels, dtype=dtype or self.wide)

    def state(self) -> Tensor:
        return self.empty(self.sequences, self.heads, self.keys, self.values, dtype=self.exact)

    def states(self) -> Tensor:
        """One beside every chunk."""
        return self.empty(self.chunks.count, self.heads, self.keys, self.values, dtype=self.wide)

    def groups(self, *tensors: Tensor) -> list[int]:
        """Heads that read one group of each."""
        return [self.heads // x.shape[2] for x in tensors]

    def constants(self, part: int, decay: bool = True) -> dict:
        """Of a kernel on slices of so many values."""
        sizes = {"DP": self.padded, "BW": part, "C": self.chunk, "EVEN": self.even and self.values % part == 0}
        return sizes | ({"DECAY": self.decay} if decay else {}) | self.numbers

    def prepare(self, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, ks: Tensor | None, p: Tensor) -> Made:
        """Sets `sums`. With one decay per channel q and k are scaled, and ks and p there."""
        g, by_head = self.log_decay, self.log_decay is not None and self.log_decay.ndim == 1
        qs = q if self.edges is not None else self.like(self.keys)
        ks = self.like(self.keys) if self.token else ks
        w, u, t = self.like(self.keys), self.like(self.values), self.like(self.chunk)
        launch(
            fused_delta.prepare, self.chunks.count * self.heads,
            q, k, v, beta, g, qs, ks, w, u, t, p, self.sums, self.safes, self.between, self.chunks.table,
            *strides(q), *strides(k), *strides(v), *strides(beta), *((0, 0, g.stride(0)) if by_head else strides(g)),
            *self.groups(q, k, v), self.scale if self.edges is None else 1.0, *self.sizes,
            **self.constants(min(64, padded_size(self.values))), INVERSE=self.inverse, num_warps=4,
        )  # fmt: skip
        return Made(qs, k if ks is None else ks, w, u, t, p)

    def start(self, state: Tensor | None) -> tuple[Tensor, int, int, int]:
        """A state to begin with, and its strides."""
        if state is None:
            return zero(self.device, self.exact), 0, 0, 0
        return state.contiguous(), self.values, 1, self.keys * self.values

    def sweep(self, made: Made, state: Tensor | None, keep: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """Output, last state and, if kept, the state before every chunk; `made.u` is then what every token wrote."""
        part, warps, stages = sweep_tile(self.keys, self.values, self.kind, self.sequences * self.heads)
        out, last, states = self.like(self.values, dtype=self.dtype), self.state(), self.states() if keep else None
        first, *at_first = self.start(state)
        launch(
            fused_delta.sweep, self.sequences * self.heads * cdiv(self.values, part),
            made.q, made.k, made.w, made.u, made.p, self.sums, self.edges, out, states, first, last, self.chunks.table, self.chunks.first,
            *strides(made.k), *self.groups(made.k), *at_first, *self.sizes,
            **self.constants(part), KEEP=keep, num_warps=warps, num_stages=stages,
        )  # fmt: skip
        return out, last, states

    def sweep_back(self, made: Made, do: Tensor, dlast: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """-dU, and the gradients of the states after every chunk and of the first state."""
        part, warps, stages = sweep_tile(self.keys, self.values, self.kind, self.sequences * self.heads)
        du, dstates, dfirst = self.like(self.values), self.states(), self.state()
        last, *at_last = self.start(dlast)
        launch(
            fused_delta.sweep_back, self.sequences * self.heads * cdiv(self.values, part),
            made.q, made.k, made.w, made.p, do, self.sums, self.edges, du, dstates, last, dfirst, self.chunks.table, self.chunks.first,
            *strides(made.k), *strides(do), *self.groups(made.k), *at_last, *self.sizes,
            **self.constants(part), num_warps=warps, num_stages=stages,
        )  # fmt: skip
        return du, dstates, dfirst

    def gradients(self, q, k, v, beta, made: Made, do, du, states, dstates) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Of q, k, beta and decays; du becomes that of v."""
        dq, dk, dbeta = self.like(self.keys, dtype=self.dtype), self.like(self.keys, dtype=self.dtype), self.like(dtype=beta.dtype)
        dg = self.like(dtype=self.log_decay.dtype) if self.token else None
        part, warps, stages = gradient_tile(self.keys, self.values, self.kind)
        launch(
            fused_delta.gradients, self.chunks.count * self.heads,
            q, k, v, made.u, made.t, do, du, beta, self.sums, states, dstates, self.like(self.chunk), self.like(self.chunk),
            dq, dk, dbeta, dg, self.chunks.table,
            *strides(q), *strides(k), *strides(v), *strides(do), *strides(beta), *self.groups(q, k, v), self.scale, *self.sizes,
            VP=cdiv(self.values, part) * part, **self.constants(part), num_warps=warps, num_stages=stages,
        )  # fmt: skip
        return dq, dk, dbeta, dg

    def shared(self, gradient: Tensor, like: Tensor) -> Tensor:
        """Summed over the heads that read the same group."""
        groups = like.shape[2]
        return (gradient if groups == self.heads else gradient.unflatten(2, (groups, -1)).sum(3)).to(like.dtype)


class ChannelProblem(Problem):
    """One decay per key channel. Scales queries and keys, as readers and as writers: `qs`, `kr`, `kw`."""

    def __init__(self, q, k, v, log_decay, scale, cu_seqlens):
        super().__init__(q, k, v, log_decay, scale, cu_seqlens)
        count = self.chunks.count
        self.qs, self.kr, self.kw = (self.like(self.keys) for _ in range(3))
        self.exact_sums = self.like(self.keys, dtype=self.exact)
        self.edges = self.empty(count, self.heads, 4, self.keys, dtype=self.exact)
        self.safes = self.empty(count, self.heads, dtype=torch.int32)
        self.between, self.scores = self.like(self.chunk), self.like(self.chunk)
        self.block = min(64, padded_size(self.keys))
        launch(
            fused_channel.scale, count * self.heads,
            q, k, log_decay, self.qs, self.kr, self.kw, self.edges, self.safes, self.exact_sums, self.chunks.table,
            *strides(q), *strides(k), *strides(log_decay), *self.groups(q, k), self.scale, *self.sizes[:3],
            DP=self.padded, C=self.chunk, EVEN=self.even, ACC=self.acc, num_warps=4,
        )  # fmt: skip
        launch(
            fused_channel.exact_scores, count * self.heads,
            q, k, self.exact_sums, self.scores, self.between, self.safes, self.chunks.table, *strides(q), *strides(k),
            *self.groups(q, k), self.scale, *self.sizes[:3], C=self.chunk, BD=min(32, self.block), **self.numbers, num_warps=4,
        )  # fmt: skip

    def gradients(self, q, k, v, beta, made: Made, do, du, states, dstates) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of q, k, beta and decays; du becomes that of v."""
        dq, dkr, dkw, dbeta = *(self.like(self.keys) for _ in range(3)), self.like(dtype=beta.dtype)
        dg = self.like(self.keys, dtype=self.log_decay.dtype)
        ends = self.empty(self.chunks.count, self.heads, self.keys, dtype=self.exact)
        (part, warps, stages), programs = gradient_tile(self.keys, self.values, self.kind), self.chunks.count * self.heads
        launch(
            fused_channel.gradients, programs,
            self.qs, self.kr, self.kw, v, made.u, made.t, do, du, beta, self.edges, self.safes, self.between, states, dstates,
            self.like(self.chunk), self.like(self.chunk), dq, dkr, dkw, dbeta, ends, self.chunks.table,
            *strides(v), *strides(do), *strides(beta), *self.groups(v), *self.sizes,
            VP=cdiv(self.values, part) * part, **self.constants(part, decay=False), num_warps=warps, num_stages=stages,
        )  # fmt: skip
        launch(
            fused_channel.exact_gradients, programs,
            q, k, made.u, do, du, self.exact_sums, dq, dkr, dkw, self.safes, self.chunks.table,
            *strides(q), *strides(k), *strides(do), *self.groups(q, k), self.scale, *self.sizes,
            C=self.chunk, BD=min(32, self.block), BW=min(32, part), **self.numbers, num_warps=8,
        )  # fmt: skip
        launch(
            fused_channel.finish, programs * cdiv(self.keys, self.block),
            q, k, self.log_decay, dq, dkr, dkw, dg, ends, self.safes, self.chunks.table,
            *strides(q), *strides(k), *strides(self.log_decay), *self.groups(q, k), self.scale, *self.sizes[:3],
            C=self.chunk, BD=self.block, EVEN=self.keys % self.block == 0, ACC=self.acc, num_warps=4,
        )  # fmt: skip
        return dq, dkr, dbeta, dg


def cotangent(do: Tensor | None, v: Tensor, heads: int) -> Tensor:
    """The output's gradient as kernels read it."""
    return rows(torch.zeros(1, dtype=v.dtype, device=v.device).expand(*v.shape[:2], heads, v.shape[3]) if do is None else do)


class _Delta(torch.autograd.Function):
    """Any decay. With one per key channel the backward scales queries and keys anew."""

    @staticmethod
    def forward(ctx, q, k, v, beta, log_decay, state, scale, cu_seqlens):
        q, k, v = rows(q), rows(k), rows(v)
        ctx.channel = log_decay is not None and log_decay.ndim == 4
        ctx.options = scale, cu_seqlens
        if ctx.channel:
            log_decay = rows(log_decay)
            p = ChannelProblem(q, k, v, log_decay, *ctx.options)
            made = p.prepare(p.qs, p.kr, v, beta, p.kw, p.scores)
        else:
            p = ctx.problem = Problem(q, k, v, log_decay, *ctx.options)
            made = p.prepare(q, k, v, beta, None, p.like(p.chunk))
        keep = any(ctx.needs_input_grad)
        out, last, states = p.sweep(made, state, keep)
        if keep:
            kept = made._replace(q=None, k=None) if ctx.channel else made
            ctx.save_for_backward(q, k, v, beta, log_decay, states, *kept)
        ctx.set_materialize_grads(False)
        return out, last.float()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do, dlast):
        q, k, v, beta, log_decay, states, *made = ctx.saved_tensors
        made = Made(*made)
        if ctx.channel:
            p = ChannelProblem(q, k, v, log_decay, *ctx.options)
            made = made._replace(q=p.qs, k=p.kw)
        else:
            p = ctx.problem
        do = cotangent(do, v, p.heads)
        du, dstates, dfirst = p.sweep_back(made, do, dlast)
        dq, dk, dbeta, dg = p.gradients(q, k, v, beta, made, do, du, states, dstates)
        dstate = dfirst.float() if ctx.needs_input_grad[5] else None
        return p.shared(dq, q), p.shared(dk, k), p.shared(du, v), dbeta, dg, dstate, None, None
