"""What kernels of arithmetic that was put off call: functions that Triton lacks, and rows times a matrix."""

import triton
from triton import language as tl


@triton.jit
def expm1(x):
    """With all digits of its smallest values."""
    u = tl.exp(x)
    safe = (u != 1.0) & (tl.abs(x) < 0.5)
    return tl.where(u == 1.0, x, tl.where(safe, (u - 1.0) * x / tl.log(tl.where(safe, u, 2.0)), u - 1.0))


@triton.jit
def tanh(x):
    """By its series where the difference of exponentials would lose digits."""
    e = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    s = x * x
    near = 1.0 + s * (-1.0 / 3.0 + s * (2.0 / 15.0 + s * (-17.0 / 315.0 + s * (62.0 / 2835.0))))
    return tl.where(tl.abs(x) < 0.25, x * near, tl.where(x < 0.0, -far, far))


@triton.jit
def gelu_none(x):
    return 0.5 * x * (1.0 + tl.erf(0.7071067811865476 * x))


@triton.jit
def gelu_tanh(x):
    return 0.5 * x * (1.0 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))


@triton.jit
def largest(x, mask, axis: tl.constexpr):
    """Of each row, or no number if one of them is none."""
    strange = tl.max((mask & (x != x)).to(tl.int32), axis, keep_dims=True)
    return tl.where(strange > 0, float("nan"), tl.max(tl.where(mask, x, float("-inf")), axis, keep_dims=True))


@triton.jit
def products(X, W, x_r, w_n, D, r, n, inside, row, M: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr):
    """[M, BN], rows r of X with rows n of W, summed once at the end so that nobody waits before the next numbers are asked for."""
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
