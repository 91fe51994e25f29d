"""What mixers around a selective scan share (Gu, Dao 2023, arXiv:2312.00752): its parameters' start, its state, its cost."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from zoo import ops
from zoo.kernels.checks import accumulator
from zoo.kernels.packing import Packing
from zoo.kernels.scan.selective import selective_flops
from zoo.layers import ShortConv, wide
from zoo.mixer import Mixer, State


class SelectiveMixer(Mixer):
    """State: `memory` `[B, inner, N]` and `conv`, the convolution's window.

    A subclass sets `inner`, `states` and `rank`, makes `conv` and `dt_proj` (from the rank to the inner width) and calls
    `make_scan_parameters`.
    """

    inner: int
    states: int
    rank: int
    conv: ShortConv
    dt_proj: nn.Linear

    def make_scan_parameters(self) -> None:
        self.A_log = nn.Parameter(torch.empty(self.inner, self.states))
        self.D = nn.Parameter(torch.empty(self.inner))

    def reset_parameters(self) -> None:
        bound = self.rank**-0.5
        init.uniform_(self.dt_proj.weight, -bound, bound)
        init.uniform_(self.dt_proj.bias, math.log(0.001), math.log(0.1))
        step = self.dt_proj.bias.detach().exp()
        init.copy_(self.dt_proj.bias, step + torch.log(-torch.expm1(-step)))  # the inverse of softplus
        rates = torch.arange(1, self.states + 1, dtype=torch.float32, device=self.A_log.device)
        init.copy_(self.A_log, rates.log().expand(self.inner, -1))
        init.ones_(self.D)

    def initial_state(self, batch: int, length: int, dtype: torch.dtype = torch.float32, device="cpu") -> State:
        memory = torch.zeros(batch, self.inner, self.states, dtype=accumulator(dtype), device=device)
        return {"memory": memory, "conv": self.conv.initial_state(batch, dtype, device)}

    def operator_flops(self, length: int) -> int:
        return selective_flops(length, self.inner, self.states)

    def scan(self, u: Tensor, rank: Tensor, B: Tensor, C: Tensor, memory: Tensor | None, packing: Packing | None) -> tuple[Tensor, Tensor]:
        """The scan of u `[B, T, inner]` with steps from `rank` `[B, T, rank]`; its output and last state."""
        dt = F.softplus(wide(self.dt_proj(rank)))
        A = -wide(self.A_log).exp()
        y, memory = ops.selective_scan(wide(u), dt, A, B, C, D=self.D, state=memory, packing=packing)
        return y.to(u.dtype), memory
