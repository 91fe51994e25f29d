"""Short causal convolution in Triton.

A program walks one segment of a sequence over a block of channels, token by token, with the last W - 1 inputs in registers: every
input is read once, or W - 1 more a segment. Several rows are asked for before the first is used, and in the backward pass before those
at hand are worked on. The gradient of an input is complete W - 1 tokens later, when the last output that reads it has come by; the
walk of the backward pass therefore goes W - 1 tokens past its segment, makes the outputs before SiLU anew, and sums up its share of
the weight's gradient.

Floor, D channels of two bytes, per token: forward x in and y out, 4 D bytes; backward x and dy in, dx out, 6 D bytes.
"""

import torch
import triton
from torch import Tensor
from triton import language as tl

from zoo.kernels.fused import segment_of, sigmoid
from zoo.kernels.launch import launch, rows, strides
from zoo.kernels.packing import Packing
from zoo.kernels.segments import Segments, cdiv, power_of_two

AHEAD = 4  # rows asked for at once
VECTOR = 8  # bytes of a thread's share of a row, less where the window is long
WARPS = 1
PROGRAMS = 4096  # that a GPU is given if there are tokens enough
LEAST, MOST = 16, 256  # tokens of a segment


@triton.jit
def place_of(TABLE, FIRST, segment, SPLIT: tl.constexpr):
    """A segment's sequence, and whether it is the first and the last of it."""
    n = tl.load(TABLE + segment * 5 + 3) - (segment if SPLIT else 0)
    return n, tl.load(FIRST + n) == segment, tl.load(FIRST + n + 1) == segment + 1


@triton.jit
def load_taps(WEIGHT, c, inside, w_d, w_w, W: tl.constexpr):
    taps = ()
    for w in tl.static_range(W):
        taps += (tl.load(WEIGHT + c * w_d + w * w_w, mask=inside, other=0.0).to(tl.float32),)
    return taps


@triton.jit
def load_window(X, STATE, x_t, s_i, inside, is_first, W: tl.constexpr):
    """The W - 1 inputs before X, of the state where X is the first of its sequence."""
    window = ()
    for i in tl.static_range(W - 1):
        x = tl.load(X + (i - W + 1) * x_t, mask=inside & (is_first == 0), other=0.0).to(tl.float32)
        if STATE is not None:
            # the state is used in x's dtype
            x += tl.load(STATE + i * s_i, mask=inside & is_first, other=0.0).to(X.dtype.element_ty).to(tl.float32)
        window += (x,)
    return window


@triton.jit
def load_ahead(X, x_t, inside, left, COUNT: tl.constexpr):
    """The next rows, of which `left` exist."""
    xs = ()
    for i in tl.static_range(COUNT):
        xs += (tl.load(X + i * x_t, mask=inside & (i < left), other=0.0),)
    return xs


@triton.jit
def convolve(window, x, taps, bias, W: tl.constexpr):
    z = x * taps[W - 1]
    for w in tl.static_range(W - 1):
        z += window[w] * taps[w]
    return z if bias is None else z + bias


@triton.jit
def forward(
    X, WEIGHT, BIAS, STATE, OUT, LAST, TABLE, FIRST,
    x_b, x_t, o_b, o_t, s_b, s_i, l_b, l_i, w_d, w_w, D,
    W: tl.constexpr, BD: tl.constexpr, AHEAD: tl.constexpr, SILU: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """OUT, and LAST, the last W - 1 inputs of every sequence. Programs: segments x blocks of channels."""
    blocks = tl.cdiv(D, BD)
    segment, c = (tl.program_id(0) // blocks).to(tl.int64), (tl.program_id(0) % blocks) * BD + tl.arange(0, BD)
    row, start, stop = segment_of(TABLE, segment)
    if start == stop:
        return
    n, is_first, is_last = place_of(TABLE, FIRST, segment, SPLIT)
    inside = c < D
    X += row * x_b + start * x_t + c
    OUT += row * o_b + start * o_t + c
    if STATE is not None:
        STATE += n * s_b + c
    taps = load_taps(WEIGHT, c, inside, w_d, w_w, W)
    bias = None if BIAS is None else tl.load(BIAS + c, mask=inside, other=0.0).to(tl.float32)
    window = load_window(X, STATE, x_t, s_i, inside, is_first, W)
    length = (stop - start).to(tl.int32)
    for t in range(0, length, AHEAD):
        xs = load_ahead(X + t * tl.cast(x_t, tl.int64), x_t, inside, length - t, AHEAD)
        out = OUT + t * tl.cast(o_t, tl.int64)
        for i in tl.static_range(AHEAD):
            x = xs[i].to(tl.float32)
            y = convolve(window, x, taps, bias, W)
            if SILU:
                y *= sigmoid(y)
            tl.store(out + i * o_t, y.to(OUT.dtype.element_ty), mask=inside & (i < length - t))
            window += (x,)
            window = window[1:]
    if AHEAD == 1:  # there was one token at the most, and the window is where it should be; LAST may be STATE
        for i in tl.static_range(W - 1):
            tl.store(LAST + n * l_b + i * l_i + c, window[i].to(LAST.dtype.element_ty), mask=inside)
    elif is_last:
        for i in tl.static_range(W - 1):
            before = length + i < W - 1 and is_first  # still of the old state
            x = tl.load(X + (length + i - W + 1) * tl.cast(x_t, tl.int64), mask=inside & (before == 0), other=0.0)
            if STATE is not None:
                x += tl.load(STATE + (length + i) * s_i, mask=inside & before, other=0.0).to(x.dtype)
            tl.store(LAST + n * l_b + i * l_i + c, x.to(LAST.dtype.element_ty), mask=inside)


@triton.jit
def walk_back(
    xs, dys, DX, DLAST, DSTATE, window, dzs, sums, taps, bias, inside, is_first, t, length, left, o_t, l_i, D,
    W: tl.constexpr, SILU: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """The rows from token t on, all of them the segment's own unless TAIL. sums: of the W gradients of the weight, and the bias's."""
    DX += (t - (W - 1)) * tl.cast(o_t, tl.int64)
    for i in tl.static_range(len(xs)):
        x, dz = xs[i].to(tl.float32), dys[i].to(tl.float32)
        if SILU:
            z = convolve(window, x, taps, bias, W)
            s = sigmoid(z)
            dz *= s * (1.0 + z * (1.0 - s))
        window += (x,)
        dzs += (dz,)
        p = t + (i - W + 1)  # whose gradient is complete
        dx = dz * taps[0]
        for w in tl.static_range(1, W):
            dx += dzs[W - 1 - w] * taps[w]
        written = p >= 0
        if TAIL:
            written = written & (p < length)
            if DLAST is not None:
                j = p - left + W - 1
                dx += tl.load(DLAST + j * l_i, mask=inside & (j >= 0) & (p < length), other=0.0).to(tl.float32)
        tl.store(DX + i * o_t, dx.to(DX.dtype.element_ty), mask=inside & written)
        if DSTATE is not None:
            tl.store(DSTATE + (p + W - 1) * D, dx.to(DSTATE.dtype.element_ty), mask=inside & (p < 0) & is_first)
        if len(sums) > 0:
            own = tl.where(i < length - t, dz, 0.0) if TAIL else dz  # the others are the next segment's
            added = ()
            for w in tl.static_range(W):
                added += (sums[w] + own * window[w],)
            if bias is not None:
                added += (sums[W] + own,)
            sums = added
        window, dzs = window[1:], dzs[1:]
    return window, dzs, sums


@triton.jit
def backward(
    X, DOUT, WEIGHT, BIAS, STATE, DLAST, DX, DSTATE, PARTS, TABLE, FIRST,
    x_b, x_t, y_b, y_t, o_b, o_t, s_b, s_i, l_b, l_i, w_d, w_w, D,
    W: tl.constexpr, BD: tl.constexpr, AHEAD: tl.constexpr, SILU: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """DX, DSTATE [N, W - 1, D], and PARTS [segments, W or W + 1, D], each segment's share of the gradients of weight and bias.
    Programs: segments x blocks of channels."""
    blocks = tl.cdiv(D, BD)
    segment, c = (tl.program_id(0) // blocks).to(tl.int64), (tl.program_id(0) % blocks) * BD + tl.arange(0, BD)
    row, start, stop = segment_of(TABLE, segment)
    if start == stop:
        return
    n, is_first, is_last = place_of(TABLE, FIRST, segment, SPLIT)
    end = stop
    if not is_last:
        end = tl.load(TABLE + segment * 5 + 7)  # of the next segment
    inside = c < D
    X += row * x_b + start * x_t + c
    DOUT += row * y_b + start * y_t + c
    DX += row * o_b + start * o_t + c
    if STATE is not None:
        STATE += n * s_b + c
    if DLAST is not None:
        DLAST += n * l_b + c
    if DSTATE is not None:
        DSTATE += n * (W - 1) * D + c
    taps = load_taps(WEIGHT, c, inside, w_d, w_w, W)
    bias = None if BIAS is None else tl.load(BIAS + c, mask=inside, other=0.0).to(tl.float32)
    window = load_window(X, STATE, x_t, s_i, inside, is_first, W)
    dzs, sums = (), ()
    for _ in tl.static_range(W - 1):
        dzs += (tl.zeros((BD,), tl.float32),)
    if PARTS is not None:
        for _ in tl.static_range(W if BIAS is None else W + 1):
            sums += (tl.zeros((BD,), tl.float32),)
    length, left = (stop - start).to(tl.int32), (end - start).to(tl.int32)
    far_x, far_y = tl.cast(x_t, tl.int64), tl.cast(y_t, tl.int64)
    whole = length // AHEAD * AHEAD
    next_xs, next_dys = load_ahead(X, x_t, inside, whole, AHEAD), load_ahead(DOUT, y_t, inside, whole, AHEAD)
    for t in range(0, whole, AHEAD):
        xs, dys = next_xs, next_dys
        next_xs = load_ahead(X + (t + AHEAD) * far_x, x_t, inside, whole - t - AHEAD, AHEAD)
        next_dys = load_ahead(DOUT + (t + AHEAD) * far_y, y_t, inside, whole - t - AHEAD, AHEAD)
        window, dzs, sums = walk_back(
            xs, dys, DX, DLAST, DSTATE, window, dzs, sums, taps, bias, inside, is_first, t, length, left, o_t, l_i, D, W, SILU, False
        )  # fmt: skip
    for t in range(whole, length + W - 1, AHEAD):
        xs = load_ahead(X + t * far_x, x_t, inside, left - t, AHEAD)
        dys = load_ahead(DOUT + t * far_y, y_t, inside, left - t, AHEAD)
        window, dzs, sums = walk_back(
            xs, dys, DX, DLAST, DSTATE, window, dzs, sums, taps, bias, inside, is_first, t, length, left, o_t, l_i, D, W, SILU, True
        )  # fmt: skip
    for w in tl.static_range(len(sums)):
        tl.store(PARTS + (segment * len(sums) + w) * D + c, sums[w], mask=inside)


class Problem:
    """Sizes and segments of one call."""

    def __init__(self, x: Tensor, weight: Tensor, cu_seqlens: Tensor | None):
        self.batch, self.length, self.channels = x.shape
        self.width, self.packed = weight.shape[1], cu_seqlens is not None
        self.sequences = cu_seqlens.numel() - 1 if self.packed else self.batch
        share = max(1, VECTOR // x.element_size() * 4 // max(4, power_of_two(self.width)))
        self.block = min(32 * WARPS * share, power_of_two(self.channels))
        self.blocks = cdiv(self.channels, self.block)
        size = cdiv(self.batch * self.length * self.blocks, PROGRAMS)
        size = min(max(power_of_two(size), LEAST, power_of_two(self.width)), max(MOST, power_of_two(self.width)))
        self.segments = Segments.of(self.batch, self.length, min(size, self.length), cu_seqlens, x.device)
        self.programs = self.segments.count * self.blocks
        self.ahead = min(AHEAD, power_of_two(self.length))

    def window(self, like: Tensor, otherwise: Tensor | None) -> Tensor:
        """Room for one window a sequence; an empty sequence has what it was given."""
        shape = self.sequences, self.width - 1, self.channels
        if not self.packed:
            return like.new_empty(shape)
        return like.new_zeros(shape) if otherwise is None else otherwise.to(like.dtype, copy=True)


def convolved(x, weight, bias, state, silu: bool, cu_seqlens: Tensor | None, into: Tensor | None = None) -> tuple[Tensor, Tensor, Problem]:
    p = Problem(x, weight, cu_seqlens)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    last = p.window(x, state) if into is None or into.dtype != x.dtype else into
    launch(
        forward, p.programs,
        x, weight, bias, state, out, last, p.segments.table, p.segments.first,
        *strides(x)[:2], *strides(out)[:2], *strides(state)[:2], *strides(last)[:2], *weight.stride(), p.channels,
        W=p.width, BD=p.block, AHEAD=p.ahead, SILU=silu, SPLIT=p.segments.split, num_warps=WARPS,
    )  # fmt: skip
    return out, last, p


class _ShortConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, state, silu: bool, cu_seqlens):
        out, last, ctx.problem = convolved(x, weight, bias, state, silu, cu_seqlens)
        ctx.save_for_backward(x, weight, bias, state)
        ctx.silu = silu
        ctx.set_materialize_grads(False)
        return out, last

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout, dlast):
        x, weight, bias, state = ctx.saved_tensors
        p = ctx.problem
        dout = rows(x.new_zeros(1).expand(x.shape) if dout is None else dout)
        dlast = None if dlast is None else dlast.contiguous()
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
        dstate = p.window(state, dlast) if ctx.needs_input_grad[3] else None
        parts = None
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            make = torch.zeros if p.packed else torch.empty  # there may be segments without tokens
            parts = make(p.segments.count, p.width + (bias is not None), p.channels, dtype=torch.float32, device=x.device)
        launch(
            backward, p.programs,
            x, dout, weight, bias, state, dlast, dx, dstate, parts, p.segments.table, p.segments.first,
            *strides(x)[:2], *strides(dout)[:2], *strides(dx)[:2], *strides(state)[:2], *strides(dlast)[:2], *weight.stride(), p.channels,
            W=p.width, BD=p.block, AHEAD=p.ahead, SILU=ctx.silu, SPLIT=p.segments.split, num_warps=WARPS,
        )  # fmt: skip
        dweight = dbias = None
        if parts is not None:
            total = parts.sum(0)
            dweight, dbias = total[: p.width].t().to(weight.dtype), None if bias is None else total[-1].to(bias.dtype)
        return dx, dweight, dbias, dstate, None, None


def short_conv(
    x, weight, bias, state, activation: str | None, packing: Packing | None = None, into: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See `zoo.kernels.short_conv.short_conv`. For a single token the new state is written to `into` if that has x's dtype."""
    x, cu_seqlens = rows(x), None if packing is None else packing.cu_seqlens
    bias, state = (None if t is None else t.contiguous() for t in (bias, state))
    given = x, weight, bias, state, activation == "silu", cu_seqlens
    return _ShortConv.apply(*given) if into is None else convolved(*given, into)[:2]
