"""Products of few rows with a matrix in Triton.

A program reads one or two rows of the matrices, once, keeps products of every row of x in registers, and sums them at the end:
as many programs as the matrix has rows fill the device where a library's would not, and nobody waits for a sum before the next
numbers are asked for. The backward pass is torch's, since whoever learns has many rows.

Floor, N x D matrices of two bytes: 2 N D bytes for every 8 rows.
"""

import torch
import triton
from torch import Tensor
from torch.nn import functional as F
from triton import language as tl

from zoo.kernels.fused import sigmoid
from zoo.kernels.launch import launch, rows
from zoo.kernels.packing import Packing
from zoo.kernels.segments import cdiv, power_of_two

HEIGHT = 8  # rows of x that a program takes at the most


@triton.jit
def products(X, W, x_r, w_n, D, r, n, inside, row, M: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr):
    """[M, BN], rows r of X with rows n of W."""
    d = tl.arange(0, BD)
    acc = tl.zeros((M, BN, BD), tl.float32)
    X += (r * x_r)[:, None, None] + d[None, None, :]
    W += (n * w_n)[None, :, None] + d[None, None, :]
    for start in range(0, D, BD):
        here = (start + d)[None, None, :] < D
        w = tl.load(W + start, mask=here & row[None, :, None], other=0.0)
        x = tl.load(X + start, mask=here & inside[:, None, None], other=0.0)
        acc += x.to(tl.float32) * w.to(tl.float32)
    return tl.sum(acc, 2)


@triton.jit
def forward(
    X, W, BIAS, GATE, GATE_BIAS, Y, x_r, w_n, g_n, ROWS, N, D, M: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Y [ROWS, N]. Programs: slices of N x tiles of M rows."""
    slices = tl.cdiv(N, BN)
    r = (tl.program_id(0) // slices).to(tl.int64) * M + tl.arange(0, M)
    n = (tl.program_id(0) % slices).to(tl.int64) * BN + tl.arange(0, BN)
    inside, row = r < ROWS, n < N
    y = products(X, W, x_r, w_n, D, r, n, inside, row, M, BN, BD)
    if BIAS is not None:
        y += tl.load(BIAS + n, mask=row, other=0.0).to(tl.float32)[None, :]
    if GATE is not None:
        gate = products(X, GATE, x_r, g_n, D, r, n, inside, row, M, BN, BD)
        if GATE_BIAS is not None:
            gate += tl.load(GATE_BIAS + n, mask=row, other=0.0).to(tl.float32)[None, :]
        y *= gate * sigmoid(gate)
    tl.store(Y + r[:, None] * N + n[None, :], y.to(Y.dtype.element_ty), mask=inside[:, None] & row[None, :])


@triton.jit
def part(X, W, BIAS, Y, D, r, inside, slice_, N, first, TOTAL, M: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr):
    """One matrix's share of several: columns `first` to `first + N` of Y."""
    n = slice_.to(tl.int64) * BN + tl.arange(0, BN)
    y = products(X, W, D, D, D, r, n, inside, n < N, M, BN, BD)
    if BIAS is not None:
        y += tl.load(BIAS + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    tl.store(Y + r[:, None] * TOTAL + first + n[None, :], y.to(Y.dtype.element_ty), mask=inside[:, None] & (n < N)[None, :])


@triton.jit
def side_by_side(
    X0, X1, X2, X3, W0, W1, W2, W3, BIAS0, BIAS1, BIAS2, BIAS3, Y, ROWS, N0, N1, N2, N3, D,
    M: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Y [ROWS, N0 + N1 + N2 + N3], products of each X [ROWS, D] with its matrix. Programs: slices of all matrices, at most 8 rows."""
    at, total, first = tl.program_id(0), N0 + N1 + N2 + N3, 0
    r = tl.arange(0, M)
    inside = r < ROWS
    own = tl.cdiv(N0, BN)
    if at < own:
        part(X0, W0, BIAS0, Y, D, r, inside, at, N0, 0, total, M, BN, BD)
    at, first, own = at - own, N0, tl.cdiv(N1, BN)
    if (at >= 0) & (at < own):
        part(X1, W1, BIAS1, Y, D, r, inside, at, N1, first, total, M, BN, BD)
    if W2 is not None:
        at, first, own = at - own, first + N1, tl.cdiv(N2, BN)
        if (at >= 0) & (at < own):
            part(X2, W2, BIAS2, Y, D, r, inside, at, N2, first, total, M, BN, BD)
    if W3 is not None:
        at, first, own = at - own, first + N2, tl.cdiv(N3, BN)
        if at >= 0:
            part(X3, W3, BIAS3, Y, D, r, inside, at, N3, first, total, M, BN, BD)


def tiles(count: int, width: int) -> dict[str, int]:
    """Rows of x, rows of a matrix and channels that a program takes."""
    height = min(HEIGHT, power_of_two(count))
    columns = 1 if width <= 2048 or height == HEIGHT else 2
    block = min(power_of_two(width), 1024 if height > 2 or (width > 2048 and width % 2048) else 2048)
    return {"M": height, "BN": columns, "BD": block}


def several(xs: list[Tensor], weights: list[Tensor], biases: list[Tensor | None]) -> tuple[Tensor, ...]:
    """Products of two to four x `[ROWS, D]`, at most 8 rows, each with its matrix that lies in one piece, in one launch; no gradients.
    They are columns of one tensor."""
    xs, sizes, absent = [x.contiguous() for x in xs], [w.shape[0] for w in weights], [None] * (4 - len(weights))
    (count, width), total = xs[0].shape, sum(sizes)
    y, tile = xs[0].new_empty(count, total), tiles(count, width)
    launch(
        side_by_side, sum(cdiv(size, tile["BN"]) for size in sizes),
        *xs, *absent, *weights, *absent, *biases, *absent, y, count, *sizes, *(0 for _ in absent), width, **tile,
    )  # fmt: skip
    return y.split(sizes, dim=-1)


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor | None, gate_bias: Tensor | None) -> Tensor:
    """`[ROWS, N]` of x `[ROWS, D]`."""
    x, weight, bias, gate, gate_bias = (None if t is None else rows(t) for t in (x, weight, bias, gate, gate_bias))
    (count, width), size = x.shape, weight.shape[0]
    y = x.new_empty(count, size)
    tile = tiles(count, width)
    launch(
        forward, cdiv(size, tile["BN"]) * cdiv(count, tile["M"]),
        x, weight, bias, gate, gate_bias, y, x.stride(0), weight.stride(0), 0 if gate is None else gate.stride(0), count, size, width,
        **tile,
    )  # fmt: skip
    return y


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, gate, gate_bias):
        ctx.save_for_backward(x, weight, bias, gate, gate_bias)
        return multiply(x, weight, bias, gate, gate_bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, weight, bias, gate, gate_bias = ctx.saved_tensors
        if gate is None:
            return (*differentiate(x, weight, bias, dy), None, None)
        opening, y = F.linear(x, gate, gate_bias), F.linear(x, weight, bias)
        share = torch.sigmoid(opening)
        dx, *own = differentiate(x, weight, bias, dy * opening * share)
        more, *others = differentiate(x, gate, gate_bias, dy * y * share * (1 + opening * (1 - share)))
        return (dx + more, *own, *others)


def differentiate(x: Tensor, weight: Tensor, bias: Tensor | None, dy: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of what was multiplied."""
    return dy @ weight, dy.T @ x, None if bias is None else dy.sum(0)


def linear(x, weight, bias, gate, gate_bias, packing: Packing | None = None) -> tuple[Tensor, None]:
    """See `zoo.kernels.linear.linear`. Rows know nothing of one another, so packing changes nothing."""
    y = _Linear.apply(x.reshape(-1, x.shape[-1]), weight, bias, gate, gate_bias)
    return y.view(*x.shape[:-1], -1), None
