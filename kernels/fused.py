"""What the Triton kernels of all families share."""

import torch
import triton
from triton import language as tl

INTERPRETED = triton.knobs.runtime.interpret  # whose bf16 products are wrong


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
def segment_of(TABLE, segment):
    """Row, first token and end of a segment; see `zoo.kernels.segments.Segments`."""
    return tl.load(TABLE + segment * 5), tl.load(TABLE + segment * 5 + 1), tl.load(TABLE + segment * 5 + 2)


@triton.jit
def load_tile(X, i, c, stride, left, channels, EVEN: tl.constexpr, TYPE: tl.constexpr):
    """Tokens i of a chunk of which `left` exist, channels c."""
    if EVEN:
        return tl.load(X + i[:, None] * stride + c[None, :], mask=i[:, None] < left, other=0.0).to(TYPE)
    return tl.load(X + i[:, None] * stride + c[None, :], mask=(i[:, None] < left) & (c[None, :] < channels), other=0.0).to(TYPE)
