"""One token of a selective scan in one launch, for decoding. A program holds the states of some channels, reads them once and writes
them once, to where they were if it is told so. No gradients.

Floor: the state in and out, 8 N bytes a channel.
"""

import torch
import triton
from torch import Tensor
from triton import language as tl

from zoo.kernels.launch import launch, rows
from zoo.kernels.segments import cdiv, power_of_two

TILE = 2048  # states that a program holds
FEWEST = 16  # channels of a program
FILLED = 264  # programs that occupy a GPU


@triton.jit
def selective_step(
    X, DT, A, B, C, SKIP, STATE, AFTER, OUT, x_b, t_b, b_b, b_g, c_b, c_g, D, N, SIZE,
    BD: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """STATE and AFTER [B, D, N], which may be one, and OUT [B, D]; a group has SIZE channels. Programs: B x blocks of channels."""
    blocks = tl.cdiv(D, BD)
    row, d, n = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks * BD + tl.arange(0, BD), tl.arange(0, BN)
    channel = d < D
    inside = channel[:, None] & (n[None, :] < N)
    x = tl.load(X + row * x_b + d, mask=channel, other=0.0).to(tl.float32)
    dt = tl.load(DT + row * t_b + d, mask=channel, other=0.0).to(tl.float32)
    h = tl.zeros((BD, BN), tl.float32)
    at = (row * D + d)[:, None] * N + n[None, :]
    if STATE is not None:
        h += tl.load(STATE + at, mask=inside, other=0.0)
    rate = tl.load(A + d[:, None] * N + n[None, :], mask=inside, other=0.0).to(tl.float32)
    b = tl.load(B + row * b_b + (d // SIZE)[:, None] * b_g + n[None, :], mask=inside, other=0.0).to(tl.float32)
    c = tl.load(C + row * c_b + (d // SIZE)[:, None] * c_g + n[None, :], mask=inside, other=0.0).to(tl.float32)
    h = tl.exp(dt[:, None] * rate) * h + (dt * x)[:, None] * b
    y = tl.sum(h * c, 1)
    if SKIP is not None:
        y += x * tl.load(SKIP + d, mask=channel, other=0.0).to(tl.float32)
    tl.store(OUT + row * D + d, y.to(OUT.dtype.element_ty), mask=channel)
    tl.store(AFTER + at, h, mask=inside)


def selective_scan(x, dt, A, B, C, D, state, into: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """See `zoo.kernels.scan.selective.selective_scan`, for one token. The state behind it is written to `into` if given."""
    x, dt, B, C = (rows(t) for t in (x, dt, B, C))
    A, D, state = (None if t is None else t.contiguous() for t in (A, D, state))
    batch, (width, states) = x.shape[0], A.shape
    after = torch.empty(batch, width, states, dtype=torch.float32, device=x.device) if into is None else into
    out = x.new_empty(x.shape)
    padded = power_of_two(states)
    block = max(FEWEST, TILE // padded)
    while block > FEWEST and batch * cdiv(width, block) < FILLED:
        block //= 2
    launch(
        selective_step, batch * cdiv(width, block),
        x, dt, A, B, C, D, state, after, out, x.stride(0), dt.stride(0), B.stride(0), B.stride(2), C.stride(0), C.stride(2),
        width, states, width // B.shape[2], BD=block, BN=padded, num_warps=min(16, 4 * cdiv(block * padded, TILE)),
    )  # fmt: skip
    return out, after
