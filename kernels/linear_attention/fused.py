"""Linear attention in Triton: the host's side. Which kernel runs on what, and its gradient.

Every kernel's work is cut into segments of sequences, so that few heads fill a GPU too: see `Segments`. Tiles are fixed per head
size, there is no tuning at run time. bf16 is multiplied as it is, fp16 as tf32 (whose range holds sums of scores), fp32 in full.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton import language as tl

from zoo.kernels.linear_attention import fused_channel, fused_scalar
from zoo.kernels.linear_attention.reference import normalized
from zoo.kernels.packing import Packing

INTERPRETED = triton.knobs.runtime.interpret  # whose bf16 products are wrong
CHUNK = 64
FILLED = 128  # programs that occupy a GPU well enough to leave sequences whole
ANCHOR = 512  # tokens over which the gradient of a decay may be summed up from rounded products


def linear_attention(q, k, v, log_decay, bonus, value_log_decay, state, scale: float, normalize: bool, packing: Packing | None = None):
    """See `zoo.kernels.linear_attention.linear_attention`; q, k and v may have fewer heads than the most of them. No value decays."""
    heads = max(q.shape[2], k.shape[2], v.shape[2])
    if normalize:
        v = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)
    if bonus is not None and (log_decay is None or log_decay.ndim < 4):
        log_decay = _by_channel(q, k, log_decay, heads)
    elif log_decay is not None and log_decay.ndim == 1 and log_decay.requires_grad and torch.is_grad_enabled():
        log_decay = log_decay.expand(q.shape[0], q.shape[1], heads)
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


class Segments(NamedTuple):
    """Pieces of sequences that programs work on side by side.

    table `[segments, 5]` int64: row, first token, end, and the places of the states before and after it. first `[sequences + 1]`: the
    first segment of each. With one segment a sequence, place n belongs to sequence n in the tensor of first or last states;
    otherwise `places` of boundaries exist, the last of sequence n at `last[n]`.
    """

    table: Tensor
    first: Tensor
    start: Tensor
    last: Tensor
    count: int
    places: int
    split: bool

    @classmethod
    def of(cls, batch: int, length: int, size: int, cu_seqlens: Tensor | None, device: torch.device) -> "Segments":
        if cu_seqlens is None:
            return _whole_rows(batch, length, size, device)
        return cls._packed(cu_seqlens, length, size)

    @classmethod
    def _packed(cls, cu: Tensor, length: int, size: int) -> "Segments":
        """Without waiting for the device: there are at most `length // size + sequences` segments, the rest are empty."""
        sequences, count = cu.numel() - 1, length // size + cu.numel() - 1
        first = torch.nn.functional.pad(((cu.diff() + size - 1) // size).cumsum(0), (1, 0))
        segment = torch.arange(count, device=cu.device)
        n = torch.searchsorted(first, segment, right=True) - 1  # `sequences` for the empty ones
        real = n.clamp(max=sequences - 1)
        start = cu[real] + (segment - first[real]) * size
        stop = torch.minimum(start + size, cu[real + 1])
        start, stop = (torch.where(n < sequences, x, 0) for x in (start, stop))
        return cls._laid(torch.zeros_like(n), start, stop, n, first, count)

    @classmethod
    def _laid(cls, row, start, stop, n, first, count) -> "Segments":
        place = torch.arange(count, device=n.device) + n
        own = torch.arange(first.numel() - 1, device=n.device)
        table = torch.stack([row, start, stop, place, place + 1], 1).contiguous()
        return cls(table, first, first[:-1] + own, first[1:] + own, count, count + first.numel(), True)


@lru_cache(maxsize=64)
def _whole_rows(batch: int, length: int, size: int, device: torch.device) -> Segments:
    pieces = triton.cdiv(length, size)
    first = torch.arange(batch + 1, device=device) * pieces
    n = torch.arange(batch, device=device).repeat_interleave(pieces)
    start = torch.arange(pieces, device=device).repeat(batch) * size
    stop = (start + size).clamp(max=length)
    if pieces > 1:
        return Segments._laid(n, start, stop, n, first, batch * pieces)
    return Segments(torch.stack([n, start, stop, n, n], 1).contiguous(), first, n, n, batch, batch, False)


def segment_length(length: int, programs: int, anchored: bool, packed: bool) -> int:
    """How long segments are: whole sequences where these are programs enough, never so short that states outweigh tokens."""
    if not packed and programs >= FILLED and not anchored:
        return length
    pieces = triton.cdiv(2 * FILLED, programs)
    size = max(ANCHOR, triton.cdiv(triton.cdiv(length, pieces), CHUNK) * CHUNK)
    return min(size, ANCHOR) if anchored else size


class Tile(NamedTuple):
    """A launch of `sweep`: channels of the slice, warps, stages of the pipeline."""

    slice: int
    warps: int
    stages: int


def tile(inner: int, width: int, dtype: torch.dtype) -> Tile:
    """For an inner dimension and a width."""
    padded = padded_size(inner)
    if dtype != torch.bfloat16:
        return Tile(min(32, padded_size(width)) if padded <= 256 else 16, 4 if padded <= 128 else 8, 1)
    part = min(64, padded_size(width))
    if padded <= 128:
        return Tile(part, 4, 2)
    return Tile(part, 8, 2) if padded <= 256 else Tile(min(32, part), 8, 1)


def chunk_length(channels: int, dtype: torch.dtype) -> int:
    """Tokens of a chunk, for the larger of K and V."""
    if channels <= (256 if dtype == torch.bfloat16 else 128):
        return CHUNK
    return CHUNK // 2 if dtype == torch.bfloat16 or channels <= 256 else CHUNK // 4


def padded_size(size: int) -> int:
    return max(16, triton.next_power_of_2(size))


def numbers(dtype: torch.dtype):
    """What operands are multiplied as, and how."""
    if dtype == torch.bfloat16 and not INTERPRETED:
        return tl.bfloat16, "tf32"
    return tl.float32, "ieee" if dtype == torch.float32 else "tf32"


def rows(x: Tensor) -> Tensor:
    """With channels side by side, as kernels read them."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def strides(x: Tensor | None) -> tuple[int, int, int]:
    return (0, 0, 0) if x is None else (x.stride(0), x.stride(1), x.stride(2))


class Problem:
    """Sizes, gates and segments of one call, and its launches."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, scale: float, cu_seqlens: Tensor | None, grad: bool):
        self.batch, self.length = q.shape[:2]
        self.heads = max(q.shape[2], k.shape[2], v.shape[2])
        self.keys, self.values = q.shape[3], v.shape[3]
        self.sequences = self.batch if cu_seqlens is None else cu_seqlens.numel() - 1
        self.scale, (self.type, self.precision), self.device, self.dtype = scale, numbers(q.dtype), q.device, q.dtype
        programs = self.batch * self.heads * triton.cdiv(self.values, 64)
        size = segment_length(self.length, programs, grad, cu_seqlens is not None)
        self.segments = Segments.of(self.batch, self.length, size, cu_seqlens, q.device)
        self.chunk = chunk_length(max(self.keys, self.values), q.dtype)
        self.size = min(size, self.length)
        self.sums = self.totals = None
        self.step = (0, 0)
        if log_decay is not None and log_decay.ndim < 4:
            self._gates(log_decay)

    def _gates(self, g: Tensor) -> None:
        """`sums` `[B, H, T]` within chunks, `totals` `[segments, H]`."""
        wide = self.dtype == torch.float32
        self.sums = torch.empty(self.batch, self.heads, self.length, dtype=torch.float64 if wide else torch.float32, device=self.device)
        self.step = self.sums.stride()[:2]
        self.totals = torch.empty(self.segments.count, self.heads, dtype=torch.float32, device=self.device)
        block = min(16, triton.next_power_of_2(self.heads))
        fused_scalar.gates[(triton.cdiv(self.heads, block) * self.segments.count,)](
            g, self.sums, self.totals, self.segments.table, *((0, 0, g.stride(0)) if g.ndim == 1 else strides(g)), *self.step,
            self.heads, C=self.chunk, BH=block, ACC=tl.float64 if wide else tl.float32, num_warps=4,
        )  # fmt: skip

    def state(self, make=torch.empty) -> Tensor:
        return make(self.sequences, self.heads, self.keys, self.values, dtype=torch.float32, device=self.device)

    def bounds(self, b: Tensor, y: Tensor, initial: Tensor | None, reverse: bool) -> Tensor:
        """States at every boundary of segments, `[places, H, K, V]`."""
        seg = self.segments
        bounds = torch.empty(seg.places, self.heads, self.keys, self.values, dtype=torch.float32, device=self.device)
        keys, values = min(64, padded_size(self.keys)), min(64, padded_size(self.values))
        tiles = triton.cdiv(self.keys, keys) * triton.cdiv(self.values, values)
        fused_scalar.collect[(tiles * self.heads * seg.count,)](
            b, y, bounds, self.sums, seg.table, *strides(b), *strides(y), *self.step,
            self.heads // b.shape[2], self.heads // y.shape[2], self.heads, self.keys, self.values,
            BD=keys, BW=values, C=self.chunk, EVEN=self.keys % keys == 0 and self.values % values == 0, REVERSE=reverse,
            GATED=self.sums is not None, TYPE=self.type, PRECISION=self.precision, num_warps=4, num_stages=3,
        )  # fmt: skip
        self.chain(bounds, initial, reverse)
        return bounds

    def chain(self, bounds: Tensor, initial: Tensor | None, reverse: bool) -> None:
        block = min(1024, padded_size(self.keys * self.values))
        blocks = triton.cdiv(self.keys * self.values, block)
        fused_scalar.chain[(blocks * self.heads * self.sequences,)](
            bounds, self.totals, self.segments.first, initial, self.heads, self.keys, self.values,
            BLOCK=block, REVERSE=reverse, DECAY=0 if self.totals is None else self.totals.ndim, HAS_INIT=initial is not None, num_warps=4,
        )  # fmt: skip

    def sweep(self, a, b, y, initial, final=None, *, reverse=False, transposed=False, z=None) -> Tensor | tuple[Tensor, Tensor]:
        """One of the four sums; with z also `z . out`, `[slices, B, H, T]`."""
        seg, inner, width = self.segments, a.shape[3], y.shape[3]
        part, warps, stages = tile(inner, width, self.dtype)
        out = torch.empty(self.batch, self.length, self.heads, width, dtype=self.dtype, device=self.device)
        slices = triton.cdiv(width, part)
        shape = (slices, self.batch, self.heads, self.length)
        dots = None if z is None else torch.empty(shape, dtype=torch.float32, device=self.device)
        fused_scalar.sweep[(slices * self.heads * seg.count,)](
            a, b, y, out, initial, final, self.sums, seg.table, z, dots,
            *strides(a), *strides(b), *strides(y), *strides(out), *strides(z), 0 if z is None else dots.stride(0), *self.step,
            *(self.heads // t.shape[2] for t in (a, b, y)), 1 if z is None else self.heads // z.shape[2],
            1 if transposed else self.values, self.values if transposed else 1, self.scale, self.heads, inner, width,
            DP=padded_size(inner), BW=part, C=self.chunk, EVEN=inner == padded_size(inner) and width % part == 0, REVERSE=reverse,
            GATED=self.sums is not None, HAS_FINAL=final is not None, HAS_R=z is not None,
            TYPE=self.type, PRECISION=self.precision, num_warps=warps, num_stages=stages,
        )  # fmt: skip
        return out if z is None else (out, dots)

    def gate_gradient(self, log_decay: Tensor, rq: Tensor, rk: Tensor, ends: Tensor, fates: Tensor) -> Tensor:
        """Of a decay per token, from what `sweep` returned beside dq and dk, and the states and their gradients at segments' ends."""
        dg = torch.empty_like(log_decay)
        size = self.keys * self.values
        fused_scalar.gate_gradient[(self.segments.count * self.heads,)](
            rq, rk, dg, ends, fates, self.segments.table, rq.stride(0), *self.step, *strides(dg), self.scale, self.heads, rq.shape[0], size,
            C=ANCHOR, BLOCK=min(1024, padded_size(size)), num_warps=4,
        )  # fmt: skip
        return dg

    def shared(self, gradient: Tensor, like: Tensor) -> Tensor:
        """Summed over the heads that read the same group."""
        groups = like.shape[2]
        return gradient if groups == self.heads else gradient.unflatten(2, (groups, -1)).sum(3)


class _Scalar(torch.autograd.Function):
    """No decay, or one per head, or one per token and head."""

    @staticmethod
    def forward(ctx, q, k, v, log_decay, state, scale, cu_seqlens):
        q, k, v = rows(q), rows(k), rows(v)
        grads = ctx.needs_input_grad[3]
        p = Problem(q, k, v, log_decay, scale, cu_seqlens, grads)
        state = None if state is None else state.contiguous()
        if p.segments.split:
            bounds = p.bounds(k, v, state, reverse=False)
            out, last = p.sweep(q, k, v, bounds), bounds[p.segments.last]
        else:
            bounds, last = None, p.state()
            out = p.sweep(q, k, v, p.state(torch.zeros) if state is None else state, last)
        ctx.save_for_backward(q, k, v, log_decay, state, bounds, last if grads and bounds is None else None)
        ctx.problem = p
        ctx.set_materialize_grads(False)
        return out, last

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do, dlast):
        q, k, v, log_decay, state, bounds, last = ctx.saved_tensors
        p = ctx.problem
        do = torch.zeros(1, dtype=v.dtype, device=v.device).expand(*v.shape[:2], p.heads, v.shape[3]) if do is None else do
        do, dlast = rows(do), None if dlast is None else dlast / p.scale
        if p.segments.split:
            start, ends, fates = bounds, bounds, p.bounds(q, do, dlast, reverse=True)
            first = fates[p.segments.start]
        else:
            start, ends, fates = (p.state(torch.zeros) if x is None else x for x in (state, last, dlast))
            first = p.state() if ctx.needs_input_grad[4] else None
        gated = ctx.needs_input_grad[3]
        dq = p.sweep(do, v, k, start, transposed=True, z=q if gated else None)
        dk = p.sweep(v, do, q, fates, reverse=True, transposed=True, z=k if gated else None)
        dv = p.sweep(k, q, do, fates, None if p.segments.split else first, reverse=True)
        dg = None
        if gated:
            (dq, rq), (dk, rk) = dq, dk
            dg = p.gate_gradient(log_decay, rq, rk, ends, fates)
        dstate = first * p.scale if ctx.needs_input_grad[4] else None
        return p.shared(dq, q), p.shared(dk, k), p.shared(dv, v), dg, dstate, None, None


class _ChannelProblem(Problem):
    """One decay per key channel, and perhaps a bonus."""

    def __init__(self, q, k, v, log_decay, bonus, scale, cu_seqlens, grad):
        super().__init__(q, k, v, log_decay, scale, cu_seqlens, grad)
        self.bonus = bonus
        self.chunks = triton.cdiv(self.size, self.chunk)
        self.block = min(32, padded_size(self.keys))  # wider ones spill registers
        self.even = self.keys % self.block == 0
        wide = self.dtype == torch.float32
        shape = (self.batch, self.length, self.heads, self.keys)
        self.sums = torch.empty(shape, dtype=torch.float64 if wide else torch.float32, device=self.device)
        self.step = strides(self.sums)
        self.totals = torch.empty(self.segments.count, self.heads, self.keys, dtype=torch.float32, device=self.device)
        fused_channel.sums_by_chunk[(self.segments.count * self.heads * triton.cdiv(self.keys, self.block),)](
            log_decay, self.sums, self.totals, self.segments.table, *strides(log_decay), *self.step, self.heads, self.keys,
            C=self.chunk, BD=self.block, ACC=tl.float64 if wide else tl.float32, num_warps=4,
        )  # fmt: skip
        self.p = torch.empty(self.batch, self.heads, self.length, self.chunk, dtype=self.dtype, device=self.device)
        self.qs, self.ks = (torch.empty(shape, dtype=self.dtype, device=self.device) for _ in range(2))
        fused_channel.prepare[(self.segments.count * self.heads * self.chunks,)](
            q, k, self.sums, bonus, self.p, self.qs, self.ks, self.segments.table, *strides(q), *strides(k), *self.step,
            self.p.stride(0), self.p.stride(1), self.heads // q.shape[2], self.heads // k.shape[2], self.heads, self.keys, self.chunks,
            C=self.chunk, BD=self.block, EVEN=self.even, BONUS=bonus is not None, TYPE=self.type, PRECISION=self.precision, num_warps=4,
        )  # fmt: skip

    def bounds(self, b: Tensor, y: Tensor, initial: Tensor | None, reverse: bool) -> Tensor:
        seg = self.segments
        bounds = torch.empty(seg.places, self.heads, self.keys, self.values, dtype=torch.float32, device=self.device)
        keys, values = min(64, padded_size(self.keys)), min(64, padded_size(self.values))
        tiles = triton.cdiv(self.keys, keys) * triton.cdiv(self.values, values)
        fused_channel.collect_rows[(tiles * self.heads * seg.count,)](
            b, y, bounds, self.sums, seg.table, *strides(y), *self.step, self.heads // y.shape[2], self.heads, self.keys, self.values,
            BD=keys, BW=values, C=self.chunk, EVEN=self.keys % keys == 0 and self.values % values == 0, REVERSE=reverse,
            TYPE=self.type, PRECISION=self.precision, num_warps=4, num_stages=3,
        )  # fmt: skip
        self.chain(bounds, initial, reverse)
        return bounds

    def sweep_values(self, a, b, y, initial, final=None, *, reverse=False) -> Tensor:
        part, warps, stages = tile(self.keys, self.values, self.dtype)
        out = torch.empty(self.batch, self.length, self.heads, self.values, dtype=self.dtype, device=self.device)
        fused_channel.sweep_values[(triton.cdiv(self.values, part) * self.heads * self.segments.count,)](
            a, b, y, out, self.p, initial, final, self.sums, self.segments.table, *strides(y), *strides(out), *self.step,
            self.p.stride(0), self.p.stride(1), self.heads // y.shape[2], self.scale, self.heads, self.keys, self.values,
            DP=padded_size(self.keys), BW=part, C=self.chunk, EVEN=self.keys == padded_size(self.keys) and self.values % part == 0,
            REVERSE=reverse, HAS_FINAL=final is not None, TYPE=self.type, PRECISION=self.precision, num_warps=warps, num_stages=stages,
        )  # fmt: skip
        return out

    def within(self, q, k, v, do) -> tuple[Tensor, Tensor, Tensor | None]:
        """What dq and dk get through scores within chunks, and `scale do . v` if there is a bonus."""
        dq, dk = (torch.empty_like(self.qs) for _ in range(2))
        own = None if self.bonus is None else torch.empty(self.batch, self.heads, self.length, dtype=torch.float32, device=self.device)
        part = min(64, padded_size(self.values))
        fused_channel.within[(self.segments.count * self.heads * self.chunks,)](
            q, k, v, do, self.sums, dq, dk, own, self.segments.table, *strides(q), *strides(k), *strides(v), *strides(do), *self.step,
            *((0, 0) if own is None else own.stride()[:2]), *(self.heads // x.shape[2] for x in (q, k, v)),
            self.scale, self.heads, self.keys, self.values, self.chunks,
            C=self.chunk, BD=self.block, BW=part, EVEN=self.even and self.values % part == 0, BONUS=own is not None,
            TYPE=self.type, PRECISION=self.precision, num_warps=8,
        )  # fmt: skip
        return dq, dk, own

    def sweep_keys(self, a, b, y, out, initial, *, reverse=False) -> None:
        part, warps, stages = tile(self.values, self.keys, self.dtype)
        fused_channel.sweep_keys[(triton.cdiv(self.keys, part) * self.heads * self.segments.count,)](
            a, b, y, out, initial, self.sums, self.segments.table, *strides(a), *strides(b), *self.step,
            self.heads // a.shape[2], self.heads // b.shape[2], self.scale, self.heads, self.values, self.keys,
            DP=padded_size(self.values), BW=part, C=self.chunk, EVEN=self.values == padded_size(self.values) and self.keys % part == 0,
            REVERSE=reverse, EXCLUSIVE=self.bonus is not None, TYPE=self.type, PRECISION=self.precision,
            num_warps=warps, num_stages=stages,
        )  # fmt: skip

    def finish(self, q, k, dq, dk, own, ends, fates, log_decay) -> tuple[Tensor, Tensor | None]:
        """Gradients of decay and bonus; dq and dk get the bonus' part."""
        dg = torch.empty(log_decay.shape, dtype=log_decay.dtype, device=self.device)
        du = None if own is None else torch.empty(self.segments.count, self.heads, self.keys, dtype=torch.float32, device=self.device)
        fused_channel.finish[(self.segments.count * self.heads * triton.cdiv(self.keys, self.block),)](
            q, k, dq, dk, dg, own, self.bonus, du, ends, fates, self.segments.table, *strides(q), *strides(k), *self.step, *strides(dg),
            *((0, 0) if own is None else own.stride()[:2]), self.heads // q.shape[2], self.heads // k.shape[2],
            self.scale, self.heads, self.keys, self.values,
            C=self.chunk, BD=self.block, BLOCK=min(64, padded_size(self.values)), BONUS=own is not None, num_warps=4,
        )  # fmt: skip
        return dg, du


class _Channel(torch.autograd.Function):
    """One decay per key channel. The backward computes scores and scaled queries and keys anew."""

    @staticmethod
    def forward(ctx, q, k, v, log_decay, bonus, state, scale, cu_seqlens):
        q, k, v, log_decay = rows(q), rows(k), rows(v), rows(log_decay)
        bonus = None if bonus is None else bonus.contiguous()
        grads = ctx.needs_input_grad[3] or ctx.needs_input_grad[4]
        p = _ChannelProblem(q, k, v, log_decay, bonus, scale, cu_seqlens, grads)
        state = None if state is None else state.contiguous()
        if p.segments.split:
            bounds = p.bounds(p.ks, v, state, reverse=False)
            out, last = p.sweep_values(p.qs, p.ks, v, bounds), bounds[p.segments.last]
        else:
            bounds, last = None, p.state()
            out = p.sweep_values(p.qs, p.ks, v, p.state(torch.zeros) if state is None else state, last)
        ctx.save_for_backward(q, k, v, log_decay, bonus, state, cu_seqlens, bounds, last if grads and bounds is None else None)
        ctx.options = scale, grads
        ctx.set_materialize_grads(False)
        return out, last

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do, dlast):
        q, k, v, log_decay, bonus, state, cu_seqlens, bounds, last = ctx.saved_tensors
        scale, grads = ctx.options
        p = _ChannelProblem(q, k, v, log_decay, bonus, scale, cu_seqlens, grads)
        do = torch.zeros(1, dtype=v.dtype, device=v.device).expand(*v.shape[:2], p.heads, v.shape[3]) if do is None else do
        do, dlast = rows(do), None if dlast is None else dlast / scale
        first = None
        if p.segments.split:
            start, ends, fates = bounds, bounds, p.bounds(p.qs, do, dlast, reverse=True)
            first = fates[p.segments.start]
        else:
            start, ends, fates = (p.state(torch.zeros) if x is None else x for x in (state, last, dlast))
            first = p.state() if ctx.needs_input_grad[5] else None
        dq, dk, own = p.within(q, k, v, do)
        p.sweep_keys(do, v, p.ks, dq, start)
        p.sweep_keys(v, do, p.qs, dk, fates, reverse=True)
        dv = p.sweep_values(p.ks, p.qs, do, fates, None if p.segments.split else first, reverse=True)
        dg = du = None
        if grads:
            dg, du = p.finish(q, k, dq, dk, own, ends, fates, log_decay)
            du = None if du is None else du.sum(0).to(bonus.dtype)
        dstate = first * scale if ctx.needs_input_grad[5] else None
        return p.shared(dq, q), p.shared(dk, k), p.shared(dv, v), dg, du, dstate, None, None
