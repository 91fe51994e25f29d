"""Mamba-2 in the Llama: layers of a pretrained transformer become Mamba-2, as many heads as it had and as few keys and values.

    z, x, B, C, dt = split(W_in u_t);    x, B, C = silu(conv(x, B, C));    dt = softplus(dt + b)
    S_t = exp(dt_t A_h) S_{t-1} + B_t (dt_t x_t)^T,    y_t = C_t S_t + D_h x_t,    A_h < 0
    output: rmsnorm(y_t * silu(z_t)) W_out, each head by itself

C has H heads, x and B have G, each shared by H / G heads.

Paper: Wang, Paliotta, May, Rush, Dao 2024, arXiv:2408.15237: section 3 and Algorithm 1; Mamba-2 is arXiv:2405.21060.
"""

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn

from zoo.kernels.packing import Packing
from zoo.layers import ShortConv, laid_out, merge_heads, split_heads
from zoo.layout import rename, squeeze
from zoo.mamba_in_llama import DistilledConfig, beside_layout
from zoo.registry import register
from zoo.ssd import SSDMixer


@strict
class Mamba2InLlamaConfig(DistilledConfig):
    """One field beside those of `DistilledConfig`."""

    model_type = "zoo_mamba2_in_llama"
    teacher = "transformer"

    bias: bool = False  # biases of the two projections


class SharedConv(ShortConv):
    """A short convolution over x, B and C; where it comes first, x and B leave it with H heads instead of G."""

    def __init__(self, config: Mamba2InLlamaConfig):
        self.inner, self.shared = config.num_heads * config.state_size, config.num_kv_heads * config.state_size
        self.heads, self.groups, self.repeat_first = config.num_heads, config.num_kv_heads, config.repeat_first
        width = 3 * self.inner if self.repeat_first else self.inner + 2 * self.shared
        super().__init__(width, config.conv_kernel, bias=config.conv_bias)

    def repeat(self, mixed: Tensor) -> Tensor:
        """x, B and C, G heads of the first two become H."""
        x, B, C = mixed.split([self.shared, self.shared, self.inner], dim=-1)
        x, B = (merge_heads(split_heads(t, self.groups).repeat_interleave(self.heads // self.groups, dim=2)) for t in (x, B))
        return torch.cat([x, B, C], dim=-1)

    def forward(self, x: Tensor, state: Tensor | None = None, packing: Packing | None = None) -> tuple[Tensor, Tensor]:
        y, state = super().forward(x, state, packing)
        return (y if self.repeat_first else self.repeat(y)), state


class Mamba2InLlamaMixer(SSDMixer):
    """State: `conv`, the last inputs of the convolution, `[B, W - 1, (2 G + H) N]`, and `memory` `[B, H, N, N]`."""

    def __init__(self, config: Mamba2InLlamaConfig, layer: int):
        heads, states = config.num_heads, config.state_size
        super().__init__(
            config, layer, inner=heads * states, values=states, keys=states, groups=heads, kernel=config.conv_kernel,
            conv_bias=config.conv_bias, in_bias=config.bias, out_bias=config.bias, norm_groups=heads,
        )  # fmt: skip
        self.conv = SharedConv(config)
        sizes = (2 * heads + 2 * config.num_kv_heads) * states + heads
        self.in_proj = nn.Linear(config.hidden_size, sizes, bias=config.bias)

    def roles(self) -> dict[str, tuple[str, list[slice]]]:
        shared = self.conv.shared
        return laid_out(("z", self.inner), ("v_proj", shared), ("k_proj", shared), ("q_proj", self.inner), ("dt", self.heads))

    def project(self, x: Tensor) -> Tensor:
        """z, x, B, C and dt; x and B as the convolution wants them."""
        projected = self.in_proj(x)
        if not self.conv.repeat_first:
            return projected
        z, mixed, dt = projected.split([self.inner, projected.shape[-1] - self.inner - self.heads, self.heads], dim=-1)
        return torch.cat([z, self.conv.repeat(mixed), dt], dim=-1)


LAYER, THEIRS = "model.layers.{}.mixer.", "model.layers.{}.mamba."
LAYOUT = beside_layout(
    Mamba2InLlamaConfig,
    (
        rename(THEIRS + "{in,out}_proj.{weight,bias}", LAYER + "{in,out}_proj.{weight,bias}"),
        rename(THEIRS + "{A_log,D,dt_bias,norm.weight}", LAYER + "{A_log,D,dt_bias,norm.weight}"),
        squeeze(THEIRS + "conv1d.{weight,bias}", LAYER + "conv.{weight,bias}"),
    ),
    ssm={
        "d_state": 128, "d_conv": 4, "expand": 2, "ngroups": 1, "repeat_kv_before_conv": False, "bias": False, "conv_bias": True,
    },
    same={"conv_kernel": "d_conv", "conv_bias": "conv_bias", "repeat_first": "repeat_kv_before_conv", "bias": "bias"},
    only={"rmsnorm": True, "norm_before_gate": False, "D_has_hdim": False, "d_ssm": None, "conv_init": None},
    matches=lambda ssm: "ngroups" in ssm,
    rms_norm_eps=1e-5,  # that of the state spaces' own norms
)  # fmt: skip


register(
    "mamba2_in_llama",
    config=Mamba2InLlamaConfig,
    mixer=Mamba2InLlamaMixer,
    title="The Mamba in the Llama: Distilling and Accelerating Hybrid Models",
    paper="arXiv:2408.15237",
    presets={
        "tiny": dict(
            hidden_size=32, num_hidden_layers=2, intermediate_size=48, vocab_size=256, num_heads=4, num_kv_heads=2, state_size=8,
            attention_layers=[1], attention=dict(num_heads=4, num_kv_heads=2, head_dim=8),
        ),
        "llama3-8b": dict(
            hidden_size=4096, num_hidden_layers=32, intermediate_size=14336, vocab_size=128256, attention_layers=list(range(1, 32, 2)),
        ),
    },
    layouts=(LAYOUT,),
)  # fmt: skip
