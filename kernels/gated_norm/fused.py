"""A norm and a gate in Triton.

A program holds several rows of one group of channels, or one long row, whole. The backward pass makes the statistics anew from the
rows, which it has to read anyway; its programs go through many tiles of rows, ask for the next one before they work on this one, and
keep their share of the gradients of weight and bias in registers, so that a sum over few programs is left.

Floor, D channels of two bytes, per row: forward x and gate in, y out, 6 D bytes; backward x, gate, dy in, dx, dgate out, 10 D bytes.
"""

import torch
import triton
from torch import Tensor
from triton import language as tl

from zoo.kernels.fused import sigmoid
from zoo.kernels.launch import launch, rows
from zoo.kernels.packing import Packing
from zoo.kernels.segments import cdiv, power_of_two

TILE = 2048  # numbers that four warps hold of a tensor
PROGRAMS = 1056  # of a backward pass: eight a multiprocessor of 132


@triton.jit
def offsets(r, first, second, third, L1, L2):
    """Of rows whose index goes over three dimensions."""
    return r // (L1 * L2) * first + r // L2 % L1 * second + r % L2 * third


@triton.jit
def load_rows(X, r, c, first, second, third, L1, L2, inside):
    return tl.load(X + offsets(r, first, second, third, L1, L2)[:, None] + c[None, :], mask=inside, other=0.0)


@triton.jit
def opening(gate, SILU: tl.constexpr):
    """The gate's activation and its derivative."""
    s = sigmoid(gate)
    if SILU:
        return gate * s, s * (1.0 + gate * (1.0 - s))
    return s, s * (1.0 - s)


@triton.jit
def normalise(x, present, G, eps, LAYER: tl.constexpr):
    """Normalised rows, and what they were multiplied by."""
    if LAYER:
        x = tl.where(present, x - tl.sum(x, 1)[:, None] / G, 0.0)
    inverse = tl.rsqrt(tl.sum(x * x, 1) / G + eps)
    return x * inverse[:, None], inverse[:, None]


@triton.jit
def both(a, b, c, d):
    return a + c, b + d


@triton.jit
def differentiate(x, dn, present, G, eps, LAYER: tl.constexpr):
    """Normalised rows n, and the gradient of rows from that of n."""
    if LAYER:
        n, inverse = normalise(x, present, G, eps, LAYER)
        along, mean = tl.reduce((dn * n, dn), 1, both)
        return n, (dn - n * (along / G)[:, None] - (mean / G)[:, None]) * inverse
    squares, along = tl.reduce((x * x, dn * x), 1, both)  # the latter is of x, so that one reduction finds both
    inverse = tl.rsqrt(squares / G + eps)[:, None]
    n = x * inverse
    return n, (dn - n * ((along / G)[:, None] * inverse)) * inverse


@triton.jit
def load_channels(WEIGHT, c, G):
    return tl.load(WEIGHT + c, mask=c < G, other=0.0).to(tl.float32)[None, :]


@triton.jit
def affine(n, weight, bias):
    if weight is not None:
        n = n * weight
    return n if bias is None else n + bias


@triton.jit
def forward(
    X, GATE, WEIGHT, BIAS, OUT, x_0, x_1, x_2, g_0, g_1, g_2, L1, L2, ROWS, GROUPS, G, eps,
    BD: tl.constexpr, R: tl.constexpr, LAYER: tl.constexpr, SILU: tl.constexpr, GATE_LAST: tl.constexpr,
):  # fmt: skip
    """OUT [ROWS, GROUPS * G]. Programs: tiles of R rows x groups."""
    group, tile = tl.program_id(0) % GROUPS, (tl.program_id(0) // GROUPS).to(tl.int64)
    r, c = tile * R + tl.arange(0, R), tl.arange(0, BD)
    first = group * G
    present = c[None, :] < G
    inside = (r[:, None] < ROWS) & present
    x = load_rows(X + first, r, c, x_0, x_1, x_2, L1, L2, inside).to(tl.float32)
    if GATE is not None:
        gate, _ = opening(load_rows(GATE + first, r, c, g_0, g_1, g_2, L1, L2, inside).to(tl.float32), SILU)
        if not GATE_LAST:
            x *= gate
    y, _ = normalise(x, present, G, eps, LAYER)
    weight = None if WEIGHT is None else load_channels(WEIGHT + first, c, G)
    bias = None if BIAS is None else load_channels(BIAS + first, c, G)
    y = affine(y, weight, bias)
    if GATE is not None and GATE_LAST:
        y *= gate
    tl.store(OUT + (r * GROUPS * G + first)[:, None] + c[None, :], y.to(OUT.dtype.element_ty), mask=inside)


@triton.jit
def load_three(X, GATE, DOUT, r, c, x_0, x_1, x_2, g_0, g_1, g_2, y_0, y_1, y_2, L1, L2, inside):
    x = load_rows(X, r, c, x_0, x_1, x_2, L1, L2, inside)
    dy = load_rows(DOUT, r, c, y_0, y_1, y_2, L1, L2, inside)
    gate = dy
    if GATE is not None:
        gate = load_rows(GATE, r, c, g_0, g_1, g_2, L1, L2, inside)
    return x, gate, dy


@triton.jit
def backward(
    X, GATE, WEIGHT, BIAS, DOUT, DX, DGATE, PARTS, x_0, x_1, x_2, g_0, g_1, g_2, y_0, y_1, y_2, L1, L2, ROWS, GROUPS, G, SLICES, eps,
    BD: tl.constexpr, R: tl.constexpr, LAYER: tl.constexpr, SILU: tl.constexpr, GATE_LAST: tl.constexpr,
):  # fmt: skip
    """DX and DGATE [ROWS, GROUPS * G], and PARTS [1 or 2, SLICES, GROUPS * G], shares of the gradients of weight and, if any, bias.
    Programs: SLICES, each of which takes every SLICES-th tile of R rows, x groups."""
    group, slice_ = tl.program_id(0) % GROUPS, (tl.program_id(0) // GROUPS).to(tl.int64)
    c, first = tl.arange(0, BD), group * G
    present = c[None, :] < G
    X += first
    DOUT += first
    if GATE is not None:
        GATE += first
    weight = None if WEIGHT is None else load_channels(WEIGHT + first, c, G)
    bias = None if BIAS is None else load_channels(BIAS + first, c, G)
    dweight, dbias = tl.zeros((R, BD), tl.float32), tl.zeros((R, BD), tl.float32)
    r = slice_ * R + tl.arange(0, R)
    tiles = tl.cdiv(ROWS, R)
    inside = (r[:, None] < ROWS) & present
    xs, gates, dys = load_three(X, GATE, DOUT, r, c, x_0, x_1, x_2, g_0, g_1, g_2, y_0, y_1, y_2, L1, L2, inside)
    for _ in range(slice_, tiles, SLICES):
        x, dy, gate = xs.to(tl.float32), dys.to(tl.float32), gates.to(tl.float32)
        own, r = r, r + SLICES * R
        written = inside
        inside = (r[:, None] < ROWS) & present
        xs, gates, dys = load_three(X, GATE, DOUT, r, c, x_0, x_1, x_2, g_0, g_1, g_2, y_0, y_1, y_2, L1, L2, inside)
        at = (own * GROUPS * G + first)[:, None] + c[None, :]
        raw, du = x, dy
        if GATE is not None:
            act, slope = opening(gate, SILU)
            if GATE_LAST:
                du = dy * act
            else:
                x = x * act
        dn = du if weight is None else du * weight
        n, dx = differentiate(x, dn, present, G, eps, LAYER)
        if WEIGHT is not None:
            dweight += du * n
        if BIAS is not None:
            dbias += du
        if GATE is not None:
            if GATE_LAST:
                dgate = dy * affine(n, weight, bias) * slope
            else:
                dgate = dx * raw * slope
                dx *= act
            tl.store(DGATE + at, dgate.to(DGATE.dtype.element_ty), mask=written)
        tl.store(DX + at, dx.to(DX.dtype.element_ty), mask=written)
    if PARTS is not None:
        PARTS += slice_ * GROUPS * G + first + c
        tl.store(PARTS, tl.sum(dweight, 0), mask=c < G)
        if BIAS is not None:
            tl.store(PARTS + SLICES * GROUPS * G, tl.sum(dbias, 0), mask=c < G)


class Rows:
    """The rows of several tensors of one shape, and how they are cut into tiles."""

    def __init__(self, tensors: tuple[Tensor | None, ...], groups: int):
        self.tensors, self.inner, self.strides = laid(tensors)
        self.channels, self.groups = tensors[0].shape[-1], groups
        self.count, self.size = tensors[0].numel() // self.channels, self.channels // groups
        self.block = power_of_two(self.size)
        self.height = min(cdiv(TILE, self.block), power_of_two(self.count))
        self.warps = min(16, max(1, 4 * self.height * self.block // TILE))
        self.tiles = cdiv(self.count, self.height)


def laid(tensors: tuple[Tensor | None, ...]) -> tuple[tuple[Tensor | None, ...], tuple[int, int], list[int]]:
    """Tensors as kernels read them, the sizes of the two inner of three dimensions that rows go over, and the strides of all.
    Neighbouring dimensions are one where all tensors allow it; if more than three remain, tensors are copied."""
    tensors = tuple(None if x is None else rows(x) for x in tensors)
    sizes, joined = [], []
    for i, size in enumerate(tensors[0].shape[:-1]):
        if size == 1:
            continue
        own = [0 if x is None else x.stride(i) for x in tensors]
        if sizes and all(outer == inner * size for outer, inner in zip(joined[-1], own, strict=True)):
            sizes[-1], joined[-1] = sizes[-1] * size, own
        else:
            sizes.append(size)
            joined.append(own)
    if len(sizes) > 3:
        return laid(tuple(None if x is None else x.contiguous() for x in tensors))
    missing = 3 - len(sizes)
    sizes, joined = sizes + [1] * missing, joined + [[0] * len(tensors)] * missing  # one dimension needs no division
    return tensors, (sizes[1], sizes[2]), [stride for own in zip(*joined, strict=True) for stride in own]


class _GatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gate, weight, bias, groups: int, eps: float, kinds: dict[str, bool]):
        weight, bias = (None if t is None else t.contiguous() for t in (weight, bias))
        p = Rows((x, gate), groups)
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        launch(
            forward, p.tiles * groups,
            *p.tensors, weight, bias, out, *p.strides, *p.inner, p.count, groups, p.size, eps,
            BD=p.block, R=p.height, **kinds, num_warps=p.warps,
        )  # fmt: skip
        ctx.save_for_backward(*p.tensors, weight, bias)
        ctx.options = groups, eps, kinds
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):
        x, gate, weight, bias = ctx.saved_tensors
        groups, eps, kinds = ctx.options
        p = Rows((x, gate, dout), groups)
        dx, dgate = (None if t is None else torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, gate))
        slices = cdiv(p.tiles, cdiv(p.tiles * groups, PROGRAMS))
        parts = None
        if ctx.needs_input_grad[2] or ctx.needs_input_grad[3]:
            parts = torch.empty(1 if bias is None else 2, slices, p.channels, dtype=torch.float32, device=x.device)
        x, gate, dout = p.tensors
        launch(
            backward, slices * groups,
            x, gate, weight, bias, dout, dx, dgate, parts, *p.strides, *p.inner, p.count, groups, p.size, slices, eps,
            BD=p.block, R=p.height, **kinds, num_warps=p.warps,
        )  # fmt: skip
        dweight = dbias = None
        if parts is not None:
            total = parts.sum(1)
            dweight, dbias = (None if t is None else total[i].to(t.dtype) for i, t in enumerate((weight, bias)))
        return dx, dgate, dweight, dbias, None, None, None


def gated_norm(
    x, weight, gate, bias, kind: str, groups: int, activation: str, norm_before_gate: bool, eps: float, packing: Packing | None = None
) -> tuple[Tensor, None]:
    """See `zoo.kernels.gated_norm.gated_norm`. Tokens are alike, so packing changes nothing."""
    kinds = {"LAYER": kind == "layer", "SILU": activation == "silu", "GATE_LAST": norm_before_gate}
    return _GatedNorm.apply(x, gate, weight, bias, groups, eps, kinds), None
