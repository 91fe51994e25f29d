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
from zoo.kernels.linear_attention import fused_bounds, fused_channel, fused_gate, fused_pair, fused_scalar
from zoo.kernels.linear_attention.reference import normalized
from zoo.kernels.packing import Packing
from zoo.kernels.segments import Segments, cdiv, padded_size

CHUNK = 64
FILLED = 128  # programs that occupy a GPU well enough to leave sequences whole
WHOLE = 96  # heads of all segments from which a program takes all of a head's channels
TURNED = 128  # channels of keys and of values, padded, for which launches that hold transposes were measured to be faster
WIDEST = 256  # channels that a product within a chunk sums up at once
AHEAD, LANES = 8, 128  # tokens that are read before the first is used, where a warp runs along tokens, and its channels
ANCHOR = 1024  # tokens over which roundings may add up in the gradient of a decay


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
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in given):
        out, state = run.apply(*given, scale, cu_seqlens)
    else:  # the host's time for an autograd.Function is saved, and nothing is cut up for gradients
        out, state = run.forward(Unrecorded(len(given)), *given, scale, cu_seqlens)
    return normalized(out.float()).to(out.dtype) if normalize else out, state


class Unrecorded:
    """In place of the context of an `autograd.Function` that nobody differentiates."""

    def __init__(self, inputs: int):
        self.needs_input_grad = (False,) * inputs

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        pass

    def set_materialize_grads(self, value: bool) -> None:
        pass


def _by_channel(q: Tensor, k: Tensor, log_decay: Tensor | None, heads: int) -> Tensor:
    """The same decay, one number per channel."""
    shape = (*q.shape[:2], heads, q.shape[3])
    if log_decay is None:
        return torch.zeros((), device=q.device).expand(shape)
    return (log_decay if log_decay.ndim == 3 else log_decay[None, None]).unsqueeze(-1).expand(shape)


def segment_length(length: int, programs: int, wanted: int, anchored: bool, packed: bool) -> int:
    """How long segments are: whole sequences where these are short or programs enough, never so short that states outweigh tokens."""
    if not packed and (length <= 2 * ANCHOR or (programs >= FILLED and not anchored)):
        return length
    pieces = cdiv(wanted, programs)
    return ANCHOR if anchored else max(ANCHOR, cdiv(cdiv(length, pieces), CHUNK) * CHUNK)


class Tile(NamedTuple):
    """A launch of `sweep`: channels of the slice, warps, stages of the pipeline, and whether it holds transposes."""

    slice: int
    warps: int
    stages: int
    turned: bool = False


def tile(inner: int, width: int, dtype: torch.dtype, heads: int, turned: bool, stored: bool) -> Tile:
    """For an inner dimension and a width; `heads`: of all segments together; `turned`: whether it may hold transposes; `stored`: whether
    the state behind the last token is, for which half a head's transposes in registers were slower."""
    padded = padded_size(inner)
    if dtype != torch.bfloat16:
        return Tile(min(32 if padded <= 128 else 16, padded_size(width)), 8, 1)
    if turned and heads >= WHOLE:  # one program on a multiprocessor has to read ahead
        return Tile(TURNED, 8, 3, True)
    part = min(64, padded_size(width))
    if padded <= 128:  # two programs on a multiprocessor hide one another's waits
        return Tile(part, 4, 2 if heads * width >= 2 * FILLED * part else 3, turned and not stored)
    return Tile(part, 8, 2) if padded <= 256 else Tile(min(32, part), 8, 1)


class Met(NamedTuple):
    """What of a sum stems from the state before a chunk, times x and summed over channels, in parts `[slices, B, H, T]`."""

    x: Tensor
    parts: list[Tensor]


def chunk_length(channels: int, dtype: torch.dtype) -> int:
    """Tokens of a chunk, for the most channels of a product."""
    most = {torch.bfloat16: CHUNK, torch.float16: CHUNK, torch.float32: CHUNK // 2}[dtype]
    return most if channels <= (128 if dtype == torch.float32 else 256) else most // 2


class Problem:
    """Sizes, decays and segments of one call, and its launches."""

    def __init__(self, q, k, v, log_decay: Tensor | None, scale: float, cu_seqlens: Tensor | None, anchored: bool, paired: bool = False):
        self.batch, self.length = q.shape[:2]
        self.heads = max(q.shape[2], k.shape[2], v.shape[2])
        self.keys, self.values = q.shape[3], v.shape[3]
        self.sequences = self.batch if cu_seqlens is None else cu_seqlens.numel() - 1
        self.scale, (self.type, self.precision), self.device, self.dtype = scale, numbers(q.dtype), q.device, q.dtype
        self.exact = torch.float64 if q.dtype == torch.float32 else torch.float32  # what kernels sum up in
        self.wide = torch.bfloat16 if q.dtype == torch.bfloat16 else self.exact  # of scaled queries and keys
        self.acc = tl.float64 if self.exact == torch.float64 else tl.float32
        programs, wanted = self.batch * self.heads, FILLED
        if not paired:
            programs, wanted = programs * cdiv(self.values, 64), 2 * FILLED
        size = min(segment_length(self.length, programs, wanted, anchored, cu_seqlens is not None), self.length)
        self.segments = Segments.of(self.batch, self.length, size, cu_seqlens, q.device)
        self.log_decay, self.channel = log_decay, log_decay is not None and log_decay.ndim == 4
        self.turned = log_decay is None and q.dtype == torch.bfloat16 and padded_size(self.keys) == padded_size(self.values) == TURNED
        channels = max(self.keys, self.values)
        self.chunk = chunk_length(channels if self.channel else min(channels, WIDEST), q.dtype)
        self.chunks = cdiv(size, self.chunk)  # of a segment
        self.edges = self.unsafe = self.safes = self.diagonal = self.sums = self.totals = None
        self.per_token = self.heads * self.length, self.length  # strides of [B, H, T]

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=self.device)

    def state(self, make=torch.empty) -> Tensor:
        return make(self.sequences, self.heads, self.keys, self.values, dtype=self.exact, device=self.device)

    def scaled(self, x: Tensor, z: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Keys or values, and queries or the output's gradients, as `sweep` wants them for a decay per head or token."""
        g, (count, channels) = self.log_decay, (self.segments.count, x.shape[3])
        self.sums = self.empty(self.batch, self.heads, self.length, dtype=self.exact)
        self.edges = self.empty(count, self.chunks, self.heads, 2, dtype=self.exact)
        xs = self.empty(self.batch, self.length, self.heads, channels, dtype=self.wide)
        zs = None if z is None else torch.empty_like(xs)
        launch(
            fused_scalar.prepare, self.chunks * self.heads * count,
            x, z, g, xs, zs, self.sums, self.edges, self.segments.table, *strides(x), *strides(z),
            *((0, 0, g.stride(0)) if g.ndim == 1 else strides(g)), *strides(xs), *self.per_token, self.heads // x.shape[2],
            1 if z is None else self.heads // z.shape[2], self.heads, channels, self.chunks,
            C=self.chunk, BD=min(64, padded_size(channels)), HAS_Z=z is not None, ACC=self.acc, num_warps=4,
        )  # fmt: skip
        self.unsafe = self.edges[..., 0].amax(1)
        self.totals = self.edges[..., 1].sum(1) if self.segments.split else None
        return xs, zs

    def decay(self, transposed: bool) -> int:
        """As the kernels name it, for a state of keys by values or of values by keys."""
        if not self.channel:
            return (fused_scalar.NONE if self.log_decay is None else fused_scalar.TOKEN).value
        return (fused_scalar.COLUMNS if transposed else fused_scalar.ROWS).value

    def bounds(self, b: Tensor, y: Tensor, initial: Tensor | None, reverse: bool) -> Tensor:
        """States at every boundary of segments, `[places, H, K, V]`."""
        seg, size = self.segments, self.keys * self.values
        bounds = self.empty(seg.places, self.heads, self.keys, self.values, dtype=self.exact)
        keys, values = (min(32 if self.dtype == torch.float32 else 64, padded_size(n)) for n in (self.keys, self.values))
        tiles = cdiv(self.keys, keys) * cdiv(self.values, values)
        launch(
            fused_bounds.collect, tiles * self.heads * seg.count,
            b, y, bounds, self.sums, seg.table, self.edges, self.unsafe, self.safes, *strides(b), *strides(y), *self.per_token,
            self.heads // b.shape[2], self.heads // y.shape[2], self.heads, self.keys, self.values, self.chunks,
            BD=keys, BW=values, C=self.chunk, EVEN=self.keys % keys == 0 and self.values % values == 0, REVERSE=reverse,
            DECAY=self.decay(False), TYPE=self.type, ACC=self.acc, PRECISION=self.precision, num_warps=4, num_stages=3,
        )  # fmt: skip
        block = min(1024, padded_size(size))
        launch(
            fused_bounds.chain, cdiv(size, block) * self.heads * self.sequences,
            bounds, self.totals, seg.first, initial, self.heads, self.keys, self.values, BLOCK=block, AHEAD=AHEAD, REVERSE=reverse,
            DECAY=0 if self.totals is None else self.totals.ndim, HAS_INIT=initial is not None, num_warps=4,
        )  # fmt: skip
        return bounds

    def sweep(self, a, b, y, initial, final=None, *, reverse=False, transposed=False, met: Met | None = None) -> Tensor:
        """One of the four sums. All are linear in a and b's channels: many are cut up."""
        inner = a.shape[3]
        if inner <= WIDEST or self.channel:
            return self._sweep(a, b, y, initial, final, reverse, transposed, met)
        out = None
        for first in range(0, inner, WIDEST):
            cut = slice(first, first + WIDEST)
            states = (None if x is None else x[..., cut] if transposed else x[..., cut, :] for x in (initial, final))
            part = self._sweep(a[..., cut], b[..., cut], y, *states, reverse, transposed, met)
            out = part if out is None else out.add_(part)
        return out

    def _sweep(self, a, b, y, initial, final, reverse: bool, transposed: bool, met: Met | None) -> Tensor:
        seg, inner, width = self.segments, a.shape[3], y.shape[3]
        part, warps, stages, turned = tile(inner, width, self.dtype, seg.count * self.heads, self.turned, final is not None)
        at_first = (0, 0, 0) if initial is None else (*((1, self.values) if transposed else (self.values, 1)), self.keys * self.values)
        initial = zero(self.device, self.exact) if initial is None else initial
        out = self.empty(self.batch, self.length, self.heads, width, dtype=self.wide if transposed and self.channel else self.dtype)
        slices, x, into = cdiv(width, part), y if met is None else met.x, None
        if met is not None:
            into = self.empty(slices, self.batch, self.heads, self.length, dtype=self.exact)
            met.parts.append(into)
        at_a, at_b, at_y, at_x, at_out = strides(a), strides(b), strides(y), strides(x), strides(out)
        launch(
            fused_scalar.sweep, slices * self.heads * seg.count,
            a, b, y, x, out, into, initial, final, self.sums, seg.table, self.edges, self.unsafe, self.safes, self.diagonal,
            *at_a, *at_b, *at_y, *at_x, *at_out, *self.per_token,
            self.heads // a.shape[2], self.heads // b.shape[2], self.heads // y.shape[2], self.heads // x.shape[2],
            self.batch * self.heads * self.length, *at_first, self.keys * self.values, self.scale, self.heads, inner, width, self.chunks,
            ALIKE=at_a[1] == at_b[1] == at_y[1] == at_x[1] == at_out[1], DP=padded_size(inner), BW=part, C=self.chunk,
            EVEN=inner == padded_size(inner) and width % part == 0, REVERSE=reverse, TURNED=turned, DECAY=self.decay(transposed),
            BONUS=self.diagonal is not None, GATED=met is not None, HAS_FINAL=final is not None, TYPE=self.type, ACC=self.acc,
            PRECISION=self.precision, num_warps=warps, num_stages=stages,
        )  # fmt: skip
        return out

    def forward(self, q: Tensor, k: Tensor, v: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """The output, the last state, the one to start `sweep` from again, and those at the segments' ends."""
        start = self.bounds(k, v, state, reverse=False) if self.segments.split else state
        ends = start if self.segments.split else self.state()
        out = self.sweep(q, k, v, start, ends)
        return out, ends[self.segments.last] if self.segments.split else ends, start, ends

    def fates(self, q: Tensor, do: Tensor, dlast: Tensor | None, wants_first: bool) -> tuple[Tensor | None, Tensor | None]:
        """The gradients of states that a sum against time starts from, and where it leaves that of the first state."""
        if self.segments.split:
            fates = self.bounds(q, do, dlast, reverse=True)
            return fates, fates if wants_first else None
        return dlast, self.state() if wants_first else None

    def first(self, found: Tensor | None) -> Tensor | None:
        """The gradient of the first state."""
        return found[self.segments.start] if found is not None and self.segments.split else found

    def regrouped(self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> "Problem":
        """The same in segments of which `pair` has a program each."""
        if self.segments.split or self.length <= 2 * ANCHOR or self.batch * self.heads >= WHOLE:
            return self
        return Problem(q, k, v, None, self.scale, cu_seqlens, False, paired=True)

    def pair(self, q, k, v, do, dlast, wants_first: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """Gradients of k and v, and of the first state."""
        seg, sizes = self.segments, (self.keys, self.values)
        fates, found = self.fates(q, do, dlast, wants_first)
        initial, at_last = (zero(self.device, self.exact), (0, 0, 0)) if fates is None else (fates, (self.values, 1, sizes[0] * sizes[1]))
        dk, dv = (self.empty(self.batch, self.length, self.heads, n, dtype=self.dtype) for n in sizes)
        padded = [padded_size(n) for n in sizes]
        launch(
            fused_pair.pair, self.heads * seg.count,
            q, k, v, do, dk, dv, initial, found, seg.table,
            *strides(q), *strides(k), *strides(v), *strides(do), *strides(dk), *strides(dv),
            *(self.heads // t.shape[2] for t in (q, k, v)), *at_last, self.scale, self.heads, *sizes,
            ALIKE=len({x.stride(1) for x in (q, k, v, do, dk, dv)}) == 1, DP=padded[0], WP=padded[1], C=self.chunk,
            EVEN=padded == list(sizes), HAS_FINAL=found is not None,
            TYPE=self.type, ACC=self.acc, PRECISION=self.precision, num_warps=8, num_stages=3,
        )  # fmt: skip
        return dk, dv, self.first(found)

    def backward(self, q, k, do, dlast, wants_first: bool, met: Met | None = None) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Gradients: of v, of the first state, and those that `sweep` against time starts from."""
        fates, found = self.fates(q, do, dlast, wants_first)
        return self.sweep(k, q, do, fates, found, reverse=True, met=met), self.first(found), fates

    def gate_gradient(self, q, k, v, do, ends: Tensor, fates: Tensor | None, read: list[Tensor], written: list[Tensor]) -> Tensor:
        """Of a decay per head or token, from states and their gradients at the segments' ends and what `sweep` found beside sums."""
        fates = self.state(torch.zeros) if fates is None else fates
        read, written = (parts[0] if len(parts) == 1 else torch.cat(parts) for parts in (read, written))
        dg = self.empty(self.batch, self.length, self.heads, dtype=self.exact)
        most = 128 if self.dtype == torch.bfloat16 else 32
        launch(
            fused_gate.gate_gradient, self.segments.count * self.heads,
            q, k, v, do, dg, read, written, self.sums, ends, fates, self.segments.table,
            *strides(q), *strides(k), *strides(v), *strides(do), *strides(dg), *self.per_token,
            *(self.heads // x.shape[2] for x in (q, k, v)), read.stride(0), self.scale, self.heads, self.keys, self.values,
            C=self.chunk, BD=min(most, padded_size(self.keys)), BW=min(most, padded_size(self.values)),
            BLOCK=min(1024, padded_size(self.keys * self.values)), READS=read.shape[0], WRITES=written.shape[0],
            TYPE=self.type, ACC=self.acc, PRECISION=self.precision, num_warps=4, num_stages=2,
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
        self.diagonal = None if bonus is None else self.empty(self.batch, self.heads, self.length, dtype=self.exact)
        self.by_chunk = count * self.chunks * self.heads
        groups = self.heads // q.shape[2], self.heads // k.shape[2]
        launch(
            fused_channel.prepare, self.by_chunk,
            q, k, log_decay, bonus, self.qs, self.ks, self.edges, self.safes, self.exact_sums, self.diagonal, self.segments.table,
            *strides(q), *strides(k), *strides(log_decay), *strides(self.qs), *self.per_token, *groups, self.heads, self.keys, self.chunks,
            C=self.chunk, BD=padded_size(self.keys), AHEAD=AHEAD, BONUS=bonus is not None, ACC=self.acc,
            num_warps=cdiv(padded_size(self.keys), LANES), num_stages=1,
        )  # fmt: skip
        self.totals = self.edges[:, :, :, 1:3].sum((1, 3))

    def exact_outputs(self, q: Tensor, k: Tensor, y: Tensor, out: Tensor, reverse: bool = False) -> None:
        """Make the output, or the gradient of v, final where a chunk is not safe."""
        launch(
            fused_channel.exact_outputs, self.by_chunk,
            q, k, y, out, self.exact_sums, self.safes, self.segments.table, *strides(q), *strides(k), *strides(y), *strides(out),
            *strides(self.qs), *(self.heads // x.shape[2] for x in (q, k, y)), self.scale, self.heads, self.keys, self.values, self.chunks,
            C=self.chunk, BD=min(32, padded_size(self.keys)), BW=min(32, padded_size(self.values)), REVERSE=reverse,
            BONUS=self.bonus is not None, TYPE=self.type, ACC=self.acc, PRECISION=self.precision, num_warps=4, num_stages=1,
        )  # fmt: skip

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
        dg, du, own = torch.empty(self.log_decay.shape, dtype=self.log_decay.dtype, device=self.device), None, None
        if self.bonus is not None:
            du, own = self.empty(self.segments.count, self.heads, self.keys), torch.empty_like(self.diagonal)
            launch(
                fused_channel.own_gradient, self.batch * self.heads * cdiv(self.length, CHUNK),
                v, do, own, *strides(v), *strides(do), *self.per_token, self.heads // v.shape[2], self.scale, self.heads, self.length,
                self.values, C=CHUNK, BW=min(64, padded_size(self.values)), num_warps=4,
            )  # fmt: skip
        block = min(128, padded_size(self.keys))
        launch(
            fused_channel.finish, self.segments.count * self.heads * cdiv(self.keys, block),
            q, k, self.log_decay, dq, dk, dg, self.edges, self.safes, own, self.bonus, du, ends, fates, self.segments.table,
            *strides(q), *strides(k), *strides(self.log_decay), *strides(dq), *strides(dg), *self.per_token,
            self.heads // q.shape[2], self.heads // k.shape[2], self.scale, self.heads, self.keys, self.values, self.chunks,
            C=self.chunk, BD=block, BLOCK=16, AHEAD=AHEAD, BONUS=du is not None, ACC=self.acc, num_warps=cdiv(block, LANES), num_stages=1,
        )  # fmt: skip
        return dg, None if du is None else du.sum(0).to(self.bonus.dtype)


def cotangent(do: Tensor | None, v: Tensor, heads: int) -> Tensor:
    """The output's gradient as kernels read it."""
    return rows(torch.zeros(1, dtype=v.dtype, device=v.device).expand(*v.shape[:2], heads, v.shape[3]) if do is None else do)


class _Scalar(torch.autograd.Function):
    """No decay, or one per head, or one per token and head. The backward scales anew."""

    @staticmethod
    def forward(ctx, q, k, v, log_decay, state, scale, cu_seqlens):
        q, k, v = rows(q), rows(k), rows(v)
        p = ctx.problem = Problem(q, k, v, log_decay, scale, cu_seqlens, ctx.needs_input_grad[3])
        by_value = p.values < p.keys or k.shape[2] < p.heads  # the smaller ones, once they have a decay each
        ks = k if log_decay is None or by_value else p.scaled(k)[0]
        vs = v if log_decay is None or not by_value else p.scaled(v)[0]
        out, last, start, ends = p.forward(q, ks, vs, None if state is None else state.contiguous())
        ctx.by_value, ctx.cu_seqlens = by_value, cu_seqlens
        ctx.save_for_backward(q, k, v, start, ends if ctx.needs_input_grad[3] else None)
        ctx.set_materialize_grads(False)
        return out, last.float()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do, dlast):
        q, k, v, start, ends = ctx.saved_tensors
        p = ctx.problem
        do, dlast = cotangent(do, v, p.heads), None if dlast is None else dlast.to(p.exact) / p.scale
        qs, ks, vs, dos = q, k, v, do
        if p.log_decay is not None and ctx.by_value:
            vs, dos = p.scaled(v, do)
        elif p.log_decay is not None:
            ks, qs = p.scaled(k, q)
        read, written = (Met(q, []), Met(v, [])) if ctx.needs_input_grad[3] else (None, None)
        dq = p.sweep(do, vs, ks, start, transposed=True, met=read)
        if p.turned:
            dk, dv, dstate = p.regrouped(q, k, v, ctx.cu_seqlens).pair(q, k, v, do, dlast, ctx.needs_input_grad[4])
        else:
            dv, dstate, fates = p.backward(qs, k, dos, dlast, ctx.needs_input_grad[4], written)
            dk = p.sweep(v, dos, qs, fates, reverse=True, transposed=True)
        dg = p.gate_gradient(q, k, v, do, ends, fates, read.parts, written.parts) if ctx.needs_input_grad[3] else None
        dstate = (dstate * p.scale).float() if ctx.needs_input_grad[4] else None
        return p.shared(dq, q), p.shared(dk, k), p.shared(dv, v), dg, dstate, None, None


class _Channel(torch.autograd.Function):
    """One decay per key channel. The backward scales queries and keys anew."""

    @staticmethod
    def forward(ctx, q, k, v, log_decay, bonus, state, scale, cu_seqlens):
        q, k, v, log_decay = rows(q), rows(k), rows(v), rows(log_decay)
        bonus = None if bonus is None else bonus.contiguous()
        ctx.options = scale, cu_seqlens, any(ctx.needs_input_grad)
        p = ChannelProblem(q, k, v, log_decay, bonus, *ctx.options)
        out, last, start, ends = p.forward(p.qs, p.ks, v, None if state is None else state.contiguous())
        p.exact_outputs(q, k, v, out)
        ctx.save_for_backward(q, k, v, log_decay, bonus, start, ends)
        ctx.set_materialize_grads(False)
        return out, last.float()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do, dlast):
        q, k, v, log_decay, bonus, start, ends = ctx.saved_tensors
        p = ChannelProblem(q, k, v, log_decay, bonus, *ctx.options)
        do, dlast = cotangent(do, v, p.heads), None if dlast is None else dlast.to(p.exact) / p.scale
        dv, dstate, fates = p.backward(p.qs, p.ks, do, dlast, ctx.needs_input_grad[5])
        p.exact_outputs(q, k, do, dv, reverse=True)
        dq = p.sweep(do, v, p.ks, start, transposed=True)
        dk = p.sweep(v, do, p.qs, fates, reverse=True, transposed=True)
        dg, du = p.finish(q, k, v, do, dq, dk, ends, p.state(torch.zeros) if fates is None else fates)
        dstate = (dstate * p.scale).float() if ctx.needs_input_grad[5] else None
        return p.shared(dq, q), p.shared(dk, k), p.shared(dv, v), dg, du, dstate, None, None
