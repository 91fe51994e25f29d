"""Linear attention in Triton: the host's side. Which kernel runs on what, and its gradient.

Every kernel's work is cut into segments of sequences, so that few heads fill a GPU too: see `Segments`. Tiles are fixed per head
size, there is no tuning at run time. bf16 is multiplied as it is, fp16 as tf32 (whose range holds sums of scores), fp32 as fp64, which
is no slower than multiplying fp32 in full, and keeps differences of long sums exact.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from triton import language as tl

from zoo.kernels.fused import numbers
from zoo.kernels.launch import launch, rows, strides, zero
from zoo.kernels.linear_attention import fused_channel, fused_scalar
from zoo.kernels.linear_attention.reference import normalized
from zoo.kernels.packing import Packing
from zoo.kernels.segments import Segments, cdiv, padded_size, power_of_two

CHUNK = 64
FILLED = 128  # programs that occupy a GPU well enough to leave sequences whole
WIDEST = 256  # channels that a product within a chunk sums up at once
ANCHOR = 512  # tokens over which the gradient of a decay may be summed up from rounded products


def linear_attention(q, k, v, log_decay, bonus, value_log_decay, state, scale: float, normalize: bool, packing: Packing | None = None):
    """See `zoo.kernels.linear_attention.linear_attention`; q, k and v may have fewer heads than the most of them. No value decays."""
    heads = max(q.shape[2], k.shape[2], v.shape[2])
    if normalize:
        v = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)
    if bonus is not None and (log_decay is None or log_decay.ndim < 4):
        log_decay = _by_channel(q, k, log_decay, heads)
    cu_seqlens = None if packing is None else packing.cu_seqlens
    run = _Channel if log_decay is not None and log_decay.ndim == 4 else _Scalar
    given = (q, k, v, log_decay, bonus, state) if run is _Channel else (q, k, v, log_decay, state)
    out, state = run.apply(*given, scale, cu_seqlens)
    return normalized(out.float()).to(out.dtype) if normalize else out, state


def _by_channel(q: Tensor, k: Tensor, log_decay: Tensor | None, heads: int) -> Tensor:
    """The same decay, one number per channel."""
    shape = (*q.shape[:2], heads, q.shape[3])
    if log_decay is None:
        return torch.zeros((), device=q.device).expand(shape)
    return (log_decay if log_decay.ndim == 3 else log_decay[None, None]).unsqueeze(-1).expand(shape)


def segment_length(length: int, programs: int, anchored: bool, packed: bool) -> int:
    """How long segments are: whole sequences where these are programs enough, never so short that states outweigh tokens."""
    if not packed and programs >= FILLED and not anchored:
        return length
    pieces = cdiv(2 * FILLED, programs)
    size = max(ANCHOR, cdiv(cdiv(length, pieces), CHUNK) * CHUNK)
    return min(size, ANCHOR) if anchored else size


class Tile(NamedTuple):
    """A launch of `sweep`: channels of the slice, warps, stages of the pipeline."""

    slice: int
    warps: int
    stages: int


def tile(inner: int, width: int, dtype: torch.dtype, channels: int) -> Tile:
    """For an inner dimension and a width; `channels`: the width of all heads and segments together."""
    padded = padded_size(inner)
    if dtype != torch.bfloat16:
        return Tile(min(32 if padded <= 128 else 16, padded_size(width)), 8, 1)
    part = min(64, padded_size(width))
    if padded <= 128:  # two programs on a multiprocessor hide one another's waits; one alone has to read ahead
        return Tile(part, 4, 2 if channels >= 2 * FILLED * part else 3)
    return Tile(part, 8, 2) if padded <= 256 else Tile(min(32, part), 8, 1)


def chunk_length(channels: int, dtype: torch.dtype) -> int:
    """Tokens of a chunk, for the most channels of a product."""
    most = {torch.bfloat16: CHUNK, torch.float16: CHUNK, torch.float32: CHUNK // 2}[dtype]
    return most if channels <= (128 if dtype == torch.float32 else 256) else most // 2


class Problem:
    """Sizes, decays and segments of one call, and its launches."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, scale: float, cu_seqlens: Tensor | None, anchored: bool):
        self.batch, self.length = q.shape[:2]
        self.heads = max(q.shape[2], k.shape[2], v.shape[2])
        self.keys, self.values = q.shape[3], v.shape[3]
        self.sequences = self.batch if cu_seqlens is None else cu_seqlens.numel() - 1
        self.scale, (self.type, self.precision), self.device, self.dtype = scale, numbers(q.dtype), q.device, q.dtype
        self.exact = torch.float64 if q.dtype == torch.float32 else torch.float32  # what kernels sum up in
        self.wide = torch.bfloat16 if q.dtype == torch.bfloat16 else self.exact  # of scaled queries and keys
        self.acc = tl.float64 if self.exact == torch.float64 else tl.float32
        programs = self.batch * self.heads * cdiv(self.values, 64)
        size = min(segment_length(self.length, programs, anchored, cu_seqlens is not None), self.length)
        self.segments = Segments.of(self.batch, self.length, size, cu_seqlens, q.device)
        self.log_decay, self.channel = log_decay, log_decay is not None and log_decay.ndim == 4
        channels = max(self.keys, self.values)
        self.chunk = chunk_length(channels if self.channel else min(channels, WIDEST), q.dtype)
        self.chunks = cdiv(size, self.chunk)  # of a segment
        self.edges = self.safes = self.scores = self.diagonal = self.sums = self.totals = None
        self.per_token = self.heads * self.length, self.length  # strides of [B, H, T]
        if log_decay is not None and not self.channel:
            self._gates(log_decay)

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=self.device)

    def state(self, make=torch.empty) -> Tensor:
        return make(self.sequences, self.heads, self.keys, self.values, dtype=self.exact, device=self.device)

    def _gates(self, g: Tensor) -> None:
        """`sums` `[B, H, T]` within chunks, `totals` `[segments, H]`."""
        self.sums = self.empty(self.batch, self.heads, self.length, dtype=self.exact)
        totals = self.empty(self.segments.count, self.chunks, self.heads, dtype=self.exact)
        block = min(16, power_of_two(self.heads))
        launch(
            fused_scalar.gates, cdiv(self.heads, block) * self.chunks * self.segments.count,
            g, self.sums, totals, self.segments.table, *((0, 0, g.stride(0)) if g.ndim == 1 else strides(g)), *self.per_token,
            self.heads, self.chunks, C=self.chunk, BH=block, ACC=self.acc, num_warps=4,
        )  # fmt: skip
        self.totals = totals.sum(1) if self.segments.split else None

    def decay(self, transposed: bool) -> int:
        """As the kernels name it, for a state of keys by values or of values by keys."""
        if not self.channel:
            return (fused_scalar.NONE if self.sums is None else fused_scalar.TOKEN).value
        return (fused_scalar.COLUMNS if transposed else fused_scalar.ROWS).value

    def bounds(self, b: Tensor, y: Tensor, initial: Tensor | None, reverse: bool) -> Tensor:
        """States at every boundary of segments, `[places, H, K, V]`."""
        seg, size = self.segments, self.keys * self.values
        bounds = self.empty(seg.places, self.heads, self.keys, self.values, dtype=self.exact)
        keys, values = (min(32 if self.dtype == torch.float32 else 64, padded_size(n)) for n in (self.keys, self.values))
        tiles = cdiv(self.keys, keys) * cdiv(self.values, values)
        launch(
            fused_scalar.collect, tiles * self.heads * seg.count,
            b, y, bounds, self.sums, seg.table, self.edges, *strides(b), *strides(y), *self.per_token,
            self.heads // b.shape[2], self.heads // y.shape[2], self.heads, self.keys, self.values, self.chunks,
            BD=keys, BW=values, C=self.chunk, EVEN=self.keys % keys == 0 and self.values % values == 0, REVERSE=reverse,
            DECAY=self.decay(False), TYPE=self.type, ACC=self.acc, PRECISION=self.precision, num_warps=4, num_stages=3,
        )  # fmt: skip
        block = min(1024, padded_size(size))
        launch(
            fused_scalar.chain, cdiv(size, block) * self.heads * self.sequences,
            bounds, self.totals, seg.first, initial, self.heads, self.keys, self.values, BLOCK=block, REVERSE=reverse,
            DECAY=0 if self.totals is None else self.totals.ndim, HAS_INIT=initial is not None, num_warps=4,
        )  # fmt: skip
        return bounds

    def sweep(self, a, b, y, initial, final=None, *, reverse=False, transposed=False, z=None) -> Tensor | tuple[Tensor, Tensor]:
        """One of the four sums; with z also `z . out`, `[slices, B, H, T]`. All are linear in a and b's channels: many are cut up."""
        inner = a.shape[3]
        if inner <= WIDEST or self.channel:
            return self._sweep(a, b, y, initial, final, reverse, transposed, z)
        parts = []
        for first in range(0, inner, WIDEST):
            cut = slice(first, first + WIDEST)
            states = (None if x is None else x[..., cut] if transposed else x[..., cut, :] for x in (initial, final))
            parts.append(self._sweep(a[..., cut], b[..., cut], y, *states, reverse, transposed, z))
        if z is None:
            return torch.stack(parts).sum(0)
        return torch.stack([out for out, _ in parts]).sum(0), torch.cat([dots for _, dots in parts])

    def _sweep(self, a, b, y, initial, final, reverse: bool, transposed: bool, z) -> Tensor | tuple[Tensor, Tensor]:
        seg, inner, width = self.segments, a.shape[3], y.shape[3]
        part, warps, stages = tile(inner, width, self.dtype, seg.count * self.heads * width)
        at_first = (0, 0, 0) if initial is None else (*((1, self.values) if transposed else (self.values, 1)), self.keys * self.values)
        initial = zero(self.device, self.exact) if initial is None else initial
        out = self.empty(self.batch, self.length, self.heads, width, dtype=self.wide if transposed and self.channel else self.dtype)
        slices = cdiv(width, part)
        dots = None if z is None else self.empty(slices, self.batch, self.heads, self.length, dtype=self.exact)
        launch(
            fused_scalar.sweep, slices * self.heads * seg.count,
            a, b, y, out, initial, final, self.sums, seg.table, z, dots, self.edges, self.safes, self.scores, self.diagonal,
            *strides(a), *strides(b), *strides(y), *strides(out), *strides(z), 0 if z is None else dots.stride(0), *self.per_token,
            *(self.heads // t.shape[2] for t in (a, b, y)), 1 if z is None else self.heads // z.shape[2],
            *at_first, self.keys * self.values, self.scale, self.heads,
            inner, width, self.chunks, DP=padded_size(inner), BW=part, C=self.chunk,
            EVEN=inner == padded_size(inner) and width % part == 0, REVERSE=reverse, DECAY=self.decay(transposed),
            BONUS=self.diagonal is not None, HAS_FINAL=final is not None, HAS_R=z is not None,
            TYPE=self.type, ACC=self.acc, PRECISION=self.precision, num_warps=warps, num_stages=stages,
        )  # fmt: skip
        return out if z is None else (out, dots)

    def states(self, b: Tensor, y: Tensor, state: Tensor | None) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """Forward: states at boundaries if there are any, the one `sweep` starts from, and room for the last one if it makes that."""
        if self.segments.split:
            bounds = self.bounds(b, y, state, reverse=False)
            return bounds, bounds, None
        return None, state, self.state()

    def fates(self, b: Tensor, y: Tensor, dlast: Tensor | None) -> Tensor | None:
        """Backward: gradients of the states where `sweep` against time starts from."""
        if self.segments.split:
            return self.bounds(b, y, dlast, reverse=True)
        return dlast

    def gate_gradient(self, rq: Tensor, rk: Tensor, ends: Tensor, fates: Tensor | None) -> Tensor:
        """Of a decay per head or token, from what `sweep` returned beside dq and dk, and states and their gradients at segments' ends."""
        dg = self.empty(self.batch, self.length, self.heads, dtype=self.exact)
        fates = self.state(torch.zeros) if fates is None else fates
        size = self.keys * self.values
        launch(
            fused_scalar.gate_gradient, self.segments.count * self.heads,
            rq, rk, dg, ends, fates, self.segments.table, rq.stride(0), *self.per_token, *strides(dg), self.scale, self.heads,
            rq.shape[0], size, C=ANCHOR, BLOCK=min(1024, padded_size(size)), num_warps=4,
        )  # fmt: skip
        return (dg.sum((0, 1)) if self.log_decay.ndim == 1 else dg).to(self.log_decay.dtype)

    def shared(self, gradient: Tensor, like: Tensor) -> Tensor:
        """Summed over the heads that read the same group."""
        groups = like.shape[2]
        return (gradient if groups == self.heads else gradient.unflatten(2, (groups, -1)).sum(3)).to(like.dtype)


class ChannelProblem(Problem):
    """One decay per key channel, and perhaps a bonus. Makes scaled queries `qs` and keys `ks`."""

    def __init__(self, q, k, v, log_decay, bonus, scale, cu_seqlens, anchored):
        super().__init__(q, k, v, log_decay, scale, cu_seqlens, anchored)
        self.bonus, count = bonus, self.segments.count
        shape = self.batch, self.length, self.heads, self.keys
        self.qs, self.ks = self.empty(*shape, dtype=self.wide), self.empty(*shape, dtype=self.wide)
        self.exact_sums = self.empty(*shape, dtype=self.exact)
        self.edges = self.empty(count, self.chunks, self.heads, 4, self.keys, dtype=self.exact)
        self.safes = self.empty(count, self.chunks, self.heads, dtype=torch.int32)
        self.scores = self.empty(self.batch, self.heads, self.length, self.chunk, dtype=self.wide)
        self.diagonal = None if bonus is None else self.empty(self.batch, self.heads, self.length, dtype=self.exact)
        self.by_chunk = count * self.chunks * self.heads
        groups = self.heads // q.shape[2], self.heads // k.shape[2]
        launch(
            fused_channel.prepare, self.by_chunk,
            q, k, log_decay, bonus, self.qs, self.ks, self.edges, self.safes, self.exact_sums, self.diagonal, self.segments.table,
            *strides(q), *strides(k), *strides(log_decay), *strides(self.qs), *self.per_token, *groups, self.heads, self.keys, self.chunks,
            C=self.chunk, BD=min(64, padded_size(self.keys)), BONUS=bonus is not None, ACC=self.acc, num_warps=4, num_stages=1,
        )  # fmt: skip
        launch(
            fused_channel.exact_scores, self.by_chunk,
            q, k, self.exact_sums, self.scores, self.safes, self.segments.table, *strides(q), *strides(k), *strides(self.qs),
            *(self.chunk * n for n in self.per_token), *groups, self.heads, self.keys, self.chunks, C=self.chunk,
            BD=min(32, padded_size(self.keys)), BONUS=bonus is not None, TYPE=self.type, ACC=self.acc, PRECISION=self.precision,
            num_warps=4, num_stages=1,
        )  # fmt: skip
        self.totals = self.edges[:, :, :, 1:3].sum((1, 3))

    def exact_gradients(self, q, k, v, do, dq, dk) -> None:
        """Make dq and dk final where a chunk is not safe."""
        launch(
            fused_channel.exact_gradients, self.by_chunk,
            q, k, v, do, self.exact_sums, dq, dk, self.safes, self.segments.table,
            *strides(q), *strides(k), *strides(v), *strides(do), *strides(dq), *(self.heads // x.shape[2] for x in (q, k, v)),
            self.scale, self.heads, self.keys, self.values, self.chunks, C=self.chunk, BD=min(32, padded_size(self.keys)),
            BW=min(32, padded_size(self.values)), BONUS=self.bonus is not None, TYPE=self.type, ACC=self.acc, PRECISION=self.precision,
            num_warps=8, num_stages=1,
        )  # fmt: skip

    def finish(self, q, k, v, do, dq, dk, ends, fates) -> tuple[Tensor, Tensor | None]:
        """Gradients of decay and bonus; makes dq and dk final."""
        self.exact_gradients(q, k, v, do, dq, dk)
        fates = self.state(torch.zeros) if fates is None else fates
        dg, du, own = torch.empty(self.log_decay.shape, dtype=self.log_decay.dtype, device=self.device), None, None
        if self.bonus is not None:
            du, own = self.empty(self.segments.count, self.heads, self.keys), torch.empty_like(self.diagonal)
            launch(
            fused_channel.own_gradient, self.batch * self.heads * cdiv(self.length, CHUNK),
                v, do, own, *strides(v), *strides(do), *self.per_token, self.heads // v.shape[2], self.scale, self.heads, self.length,
                self.values, C=CHUNK, BW=min(64, padded_size(self.values)), num_warps=4,
            )  # fmt: skip
        block = min(64, padded_size(self.keys))
        launch(
            fused_channel.finish, self.segments.count * self.heads * cdiv(self.keys, block),
            q, k, self.log_decay, dq, dk, dg, self.edges, self.safes, own, self.bonus, du, ends, fates, self.segments.table,
            *strides(q), *strides(k), *strides(self.log_decay), *strides(dq), *strides(dg), *self.per_token,
            self.heads // q.shape[2], self.heads // k.shape[2], self.scale, self.heads, self.keys, self.values, self.chunks,
            C=self.chunk, BD=block, BLOCK=min(64, padded_size(self.values)), BONUS=du is not None, ACC=self.acc, num_warps=4, num_stages=1,
        )  # fmt: skip
        return dg, None if du is None else du.sum(0).to(self.bonus.dtype)


def cotangent(do: Tensor | None, v: Tensor, heads: int) -> Tensor:
    """The output's gradient as kernels read it."""
    return rows(torch.zeros(1, dtype=v.dtype, device=v.device).expand(*v.shape[:2], heads, v.shape[3]) if do is None else do)


class _Scalar(torch.autograd.Function):
    """No decay, or one per head, or one per token and head."""

    @staticmethod
    def forward(ctx, q, k, v, log_decay, state, scale, cu_seqlens):
        q, k, v = rows(q), rows(k), rows(v)
        p = Problem(q, k, v, log_decay, scale, cu_seqlens, ctx.needs_input_grad[3])
        bounds, start, last = p.states(k, v, None if state is None else state.contiguous())
        out = p.sweep(q, k, v, start, last)
        last = bounds[p.segments.last] if last is None else last
        ctx.save_for_backward(q, k, v, start, bounds, last if ctx.needs_input_grad[3] and bounds is None else None)
        ctx.problem = p
        ctx.set_materialize_grads(False)
        return out, last.float()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do, dlast):
        q, k, v, start, bounds, last = ctx.saved_tensors
        p, gated = ctx.problem, ctx.needs_input_grad[3]
        do, dlast = cotangent(do, v, p.heads), None if dlast is None else dlast.to(p.exact) / p.scale
        fates = p.fates(q, do, dlast)
        first = p.state() if ctx.needs_input_grad[4] and not p.segments.split else None
        dq = p.sweep(do, v, k, start, transposed=True, z=q if gated else None)
        dk = p.sweep(v, do, q, fates, reverse=True, transposed=True, z=k if gated else None)
        dv = p.sweep(k, q, do, fates, first, reverse=True)
        dg = None
        if gated:
            (dq, rq), (dk, rk) = dq, dk
            dg = p.gate_gradient(rq, rk, last if bounds is None else bounds, fates)
        dstate = (fates[p.segments.start] if first is None else first) * p.scale if ctx.needs_input_grad[4] else None
        return p.shared(dq, q), p.shared(dk, k), p.shared(dv, v), dg, None if dstate is None else dstate.float(), None, None


class _Channel(torch.autograd.Function):
    """One decay per key channel. The backward scales queries and keys anew."""

    @staticmethod
    def forward(ctx, q, k, v, log_decay, bonus, state, scale, cu_seqlens):
        q, k, v, log_decay = rows(q), rows(k), rows(v), rows(log_decay)
        bonus = None if bonus is None else bonus.contiguous()
        ctx.options = scale, cu_seqlens, any(ctx.needs_input_grad)
        p = ChannelProblem(q, k, v, log_decay, bonus, *ctx.options)
        bounds, start, last = p.states(p.ks, v, None if state is None else state.contiguous())
        out = p.sweep(p.qs, p.ks, v, start, last)
        last = bounds[p.segments.last] if last is None else last
        ctx.save_for_backward(q, k, v, log_decay, bonus, start, bounds, last if bounds is None else None)
        ctx.set_materialize_grads(False)
        return out, last.float()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do, dlast):
        q, k, v, log_decay, bonus, start, bounds, last = ctx.saved_tensors
        p = ChannelProblem(q, k, v, log_decay, bonus, *ctx.options)
        do, dlast = cotangent(do, v, p.heads), None if dlast is None else dlast.to(p.exact) / p.scale
        fates = p.fates(p.qs, do, dlast)
        first = p.state() if ctx.needs_input_grad[5] and not p.segments.split else None
        dq = p.sweep(do, v, p.ks, start, transposed=True)
        dk = p.sweep(v, do, p.qs, fates, reverse=True, transposed=True)
        dv = p.sweep(p.ks, p.qs, do, fates, first, reverse=True)
        dg, du = p.finish(q, k, v, do, dq, dk, last if bounds is None else bounds, fates)
        dstate = (fates[p.segments.start] if first is None else first) * p.scale if ctx.needs_input_grad[5] else None
        return p.shared(dq, q), p.shared(dk, k), p.shared(dv, v), dg, du, None if dstate is None else dstate.float(), None, None
