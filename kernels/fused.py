"""What the Triton kernels of all families share."""

import torch
import triton
from triton import language as tl

INTERPRETED = triton.knobs.runtime.interpret  # whose bf16 products are wrong
SAFE = tl.constexpr(40.0)  # e^40 squared, times a few thousand, is finite in float32 and bfloat16
LEAST = tl.constexpr(-80.0)  # e^-80 of anything representable beside it is nothing; sums over a chunk stay small


def numbers(dtype: torch.dtype):
    """What operands are multiplied as, and how."""
    if dtype == torch.bfloat16 and not INTERPRETED:
        return tl.bfloat16, "tf32"
    return tl.float64 if dtype == torch.float32 else tl.float32, "tf32"


@triton.jit
def sigmoid(x):
    """With an exponential that need not care for the smallest numbers beside one, in fewer instructions than `tl.sigmoid`."""
    return 1.0 / (1.0 + tl.exp2(-1.4426950408889634 * x))


@triton.jit
def log1p(x):
    """With all digits of its smallest values."""
    u = 1.0 + x
    exact = (u == 1.0) | (u == float("inf"))
    return tl.where(exact, x, tl.log(u) * (x / tl.where(exact, 1.0, u - 1.0)))


@triton.jit
def softplus(x):
    return tl.maximum(x, 0.0) + log1p(tl.exp(-tl.abs(x)))


@triton.jit
def segment_of(TABLE, segment):
    """Row, first token and end of a segment; see `zoo.kernels.segments.Segments`."""
    return tl.load(TABLE + segment * 5), tl.load(TABLE + segment * 5 + 1), tl.load(TABLE + segment * 5 + 2)


@triton.jit
def load_tile(X, i, c, stride, left, channels, EVEN: tl.constexpr, TYPE: tl.constexpr):
    """Tokens i of a chunk of which `left` exist, channels c."""
    if EVEN:
        return tl.load(X + i[:, None] * stride + c[None, :], mask=i[:, None] < left, other=0.0).to(TYPE)
    return tl.load(X + i[:, None] * stride + c[None, :], mask=(i[:, None] < left) & (c[None, :] < channels), other=0.0).to(TYPE)


@triton.jit
def halves(i, j, half):
    """Which of tokens i lie in the second half of a block whose first half holds j."""
    return ((i & -(2 * half)) == (j & -(2 * half))) & ((i & half) != 0) & ((j & half) == 0)


@triton.jit
def factors(SUMS, sums, read, i, d, stride, left, D, half):
    """exp(read_t - e) for queries and exp(e - G_s) for keys, G being SUMS, and e that at the edge between the halves of the block of
    `2 half` tokens they lie in."""
    at = tl.minimum((i & -(2 * half)) + half - 1, left - 1)
    edge = tl.load(SUMS + at[:, None] * stride + d[None, :], mask=d[None, :] < D, other=0.0)
    return tl.exp(tl.minimum(read - edge, 0.0)), tl.exp(tl.minimum(edge - sums, 0.0))
