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


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor | None, gate_bias: Tensor | None) -> Tensor:
    """`[ROWS, N]` of x `[ROWS, D]`."""
    x, weight, bias, gate, gate_bias = (None if t is None else rows(t) for t in (x, weight, bias, gate, gate_bias))
    (count, width), size = x.shape, weight.shape[0]
    y = x.new_empty(count, size)
    height = min(HEIGHT, power_of_two(count))
    columns = 1 if width <= 2048 or height == HEIGHT else 2
    block = min(power_of_two(width), 1024 if height > 2 or (width > 2048 and width % 2048) else 2048)
    launch(
        forward, cdiv(size, columns) * cdiv(count, height),
        x, weight, bias, gate, gate_bias, y, x.stride(0), weight.stride(0), 0 if gate is None else gate.stride(0), count, size, width,
        M=height, BN=columns, BD=block,
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
