"""Structured state space duality: the selective state space of Mamba-2, for every mixer that has one (arXiv:2405.21060)."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from zoo import ops
from zoo.config import ZooConfig
from zoo.kernels.checks import accumulator
from zoo.kernels.linear_attention import flops
from zoo.kernels.packing import Packing
from zoo.layers import GatedNorm, ShortConv, laid_out, merge_heads, split_heads
from zoo.mixer import Mixer, State


class SSDMixer(Mixer):
    """The block of Mamba-2; its equations are in `models/mamba2.py`.

    State: `conv` `[B, W - 1, H P + 2 G N]`, inputs of the convolution, and `memory` `[B, H, N, P]`.

    Args:
        inner: H P, whole heads; values: P; keys: N; groups: G, each set of B and C shared by H / G heads.
        kernel, conv_bias: W of the short convolution, and whether it has a bias.
        in_bias, out_bias: of the two projections.
        norm_groups: groups of the output norm; None: the output is gated and not normalised.
        norm_before_gate: normalise before the gate instead of behind it.
        dt_range: initial time steps are log-uniform in it; dt_floor: none is ever shorter.
    """

    lora_targets = ("in_proj", "out_proj")

    def __init__(
        self, config: ZooConfig, layer: int, *, inner: int, values: int, keys: int, groups: int, kernel: int, conv_bias: bool,
        in_bias: bool, out_bias: bool, norm_groups: int | None, norm_before_gate: bool = False,
        dt_range: tuple[float, float] = (1e-3, 1e-1), dt_floor: float = 0.0,
    ):  # fmt: skip
        super().__init__(config, layer)
        self.inner, self.values, self.keys, self.groups = inner, values, keys, groups
        self.heads, self.dt_range, self.dt_floor = inner // values, dt_range, dt_floor
        mixed = inner + 2 * groups * keys
        self.in_proj = nn.Linear(config.hidden_size, inner + mixed + self.heads, bias=in_bias)
        self.conv = ShortConv(mixed, kernel, bias=conv_bias)
        self.dt_bias = nn.Parameter(torch.empty(self.heads))
        self.A_log = nn.Parameter(torch.empty(self.heads))
        self.D = nn.Parameter(torch.empty(self.heads))
        self.norm = None
        if norm_groups is not None:
            self.norm = GatedNorm(inner, groups=norm_groups, eps=config.norm_eps, norm_before_gate=norm_before_gate)
        self.out_proj = nn.Linear(inner, config.hidden_size, bias=out_bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        low, high = self.dt_range
        init.uniform_(self.dt_bias, math.log(low), math.log(high))
        dt = self.dt_bias.detach().exp()
        init.copy_(self.dt_bias, dt + torch.log(-torch.expm1(-dt)))  # softplus gives dt back
        init.uniform_(self.A_log, 1.0, 16.0)
        init.copy_(self.A_log, self.A_log.detach().log())
        init.ones_(self.D)

    def roles(self) -> dict[str, tuple[str, list[slice]]]:
        shared = self.groups * self.keys
        return laid_out(("z", self.inner), ("v_proj", self.inner), ("k_proj", shared), ("q_proj", shared), ("dt", self.heads))

    def initial_state(self, batch: int, length: int, dtype: torch.dtype = torch.float32, device="cpu") -> State:
        memory = torch.zeros(batch, self.heads, self.keys, self.values, dtype=accumulator(dtype), device=device)
        return {"conv": self.conv.initial_state(batch, dtype, device), "memory": memory}

    def operator_flops(self, length: int) -> int:
        return flops(length, self.heads, self.keys, self.values)

    def project(self, x: Tensor) -> Tensor:
        """z, x, B, C and dt, `[B, T, 2 H P + 2 G N + H]`."""
        return self.in_proj(x)

    def forward(self, x: Tensor, state: State | None = None, packing: Packing | None = None) -> tuple[Tensor, State]:
        shared = self.groups * self.keys
        z, mixed, dt = self.project(x).split([self.inner, self.conv.width, self.heads], dim=-1)
        mixed, conv = self.conv(mixed, state["conv"] if state else None, packing)
        u, B, C = mixed.split([self.inner, shared, shared], dim=-1)
        u, B, C = split_heads(u, self.heads), split_heads(B, self.groups), split_heads(C, self.groups)
        log_decay, v = ops.discretize(dt, self.A_log, self.dt_bias, u, floor=self.dt_floor)
        memory = state["memory"] if state else None
        y, memory = ops.linear_attention(C, B, v, log_decay, scale=1.0, state=memory, packing=packing)
        y = merge_heads(torch.addcmul(y, self.D.to(u.dtype).unsqueeze(-1), u))
        y = y * F.silu(z) if self.norm is None else self.norm(y, z)
        return self.out_proj(y), {"conv": conv, "memory": memory}
