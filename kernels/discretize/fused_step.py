"""Step sizes, decays and inputs of one token in one launch, for decoding. No gradients.

A program holds one head. Floor: x and u in, decays and v out.
"""

import torch
import triton
from torch import Tensor
from triton import language as tl

from zoo.kernels.fused import softplus
from zoo.kernels.launch import launch, rows
from zoo.kernels.segments import power_of_two


@triton.jit
def step(X, RATE, BIAS, U, DECAY, V, x_b, x_h, x_k, b_k, u_b, u_h, floor, H, K, P, BLOCK: tl.constexpr):
    """DECAY [B, H, K] and, where there is U, whose K is 1, V [B, H, P]. Programs: B x H."""
    n, h = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    c = tl.arange(0, BLOCK)
    x = tl.load(X + n * x_b + h * x_h + c * x_k, mask=c < K, other=0.0).to(tl.float32)
    x += tl.load(BIAS + h * K + c * b_k, mask=c < K, other=0.0).to(tl.float32)
    dt = tl.maximum(softplus(x), floor)
    tl.store(DECAY + (n * H + h) * K + c, -tl.exp(tl.load(RATE + h).to(tl.float32)) * dt, mask=c < K)
    if U is not None:
        u = tl.load(U + n * u_b + h * u_h + c, mask=c < P, other=0.0).to(tl.float32)
        v = u * tl.sum(tl.where(c < 1, dt, 0.0), 0)
        tl.store(V + (n * H + h) * P + c, v.to(V.dtype.element_ty), mask=c < P)


def discretize(x, A_log, bias, u, floor: float, into: None = None) -> tuple[Tensor, Tensor | None]:
    """See `zoo.kernels.discretize.discretize`, for one token."""
    batch, _, heads, *channels = x.shape
    u = None if u is None else rows(u)
    decay = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    v = None if u is None else torch.empty(u.shape, dtype=u.dtype, device=u.device)
    width, values = channels[0] if channels else 1, 0 if u is None else u.shape[3]
    block = power_of_two(max(width, values))
    launch(
        step, batch * heads,
        x, A_log.contiguous(), bias.contiguous(), u, decay, v, x.stride(0), x.stride(2), x.stride(3) if channels else 0,
        1 if channels else 0, *((0, 0) if u is None else (u.stride(0), u.stride(2))), float(floor), heads, width, values,
        BLOCK=block, num_warps=max(1, min(8, block // 64)),
    )  # fmt: skip
    return decay, v
