"""Mamba in the Llama: layers of a pretrained transformer become Mamba, whose x, B and C are its values, keys and queries.

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t,    y_t = C_t . h_t + D x_t,    dt_t = softplus(W_up W_down u_t + b)
    output: (y_t * silu(z_t)) W_out,    x = silu(conv(W_x u)),    z, B, C = W_z u, W_B u, W_C u

Channels stand in H heads of N, each with a C of its own; heads share x and B in groups as they did keys and values.

Paper: Wang, Paliotta, May, Rush, Dao 2024, arXiv:2408.15237: section 3 and Algorithm 1; Mamba is arXiv:2312.00752.
"""

from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.kernels.packing import Packing
from zoo.layers import ShortConv, merge_heads, split_heads
from zoo.layout import mapped, rename, squeeze
from zoo.mamba_in_llama import DistilledConfig, beside_layout
from zoo.mixer import State
from zoo.registry import register
from zoo.selective import SelectiveMixer


@strict
class MambaInLlamaConfig(DistilledConfig):
    """Other sizes than those of `DistilledConfig`, and one more."""

    model_type = "zoo_mamba_in_llama"
    teacher = "transformer"

    num_heads: int = 256
    num_kv_heads: int = 64
    state_size: int = 16
    repeat_first: bool = True
    step_rank: int | None = None  # rank of the step size's projection; None: D / 16, rounded up


class MambaInLlamaMixer(SelectiveMixer):
    """State: `memory` `[B, H N, N]`, and `conv`, the last inputs of the convolution, `[B, W - 1, H N]` (G N if it comes first)."""

    lora_targets = ("x_proj", "B_proj", "C_proj", "gate_proj", "out_proj")

    def __init__(self, config: MambaInLlamaConfig, layer: int):
        super().__init__(config, layer)
        width, self.heads, self.groups, self.states = config.hidden_size, config.num_heads, config.num_kv_heads, config.state_size
        self.inner, shared, self.repeat_first = self.heads * self.states, self.groups * self.states, config.repeat_first
        self.rank = config.step_rank or -(-width // 16)
        self.x_proj = nn.Linear(width, shared, bias=False)
        self.B_proj = nn.Linear(width, shared, bias=False)
        self.C_proj = nn.Linear(width, self.inner, bias=False)
        self.gate_proj = nn.Linear(width, self.inner, bias=False)
        self.dt_down = nn.Linear(width, self.rank, bias=False)
        self.dt_proj = nn.Linear(self.rank, self.inner)
        self.conv = ShortConv(self.inner if self.repeat_first else shared, config.conv_kernel, bias=config.conv_bias)
        self.make_scan_parameters()
        self.out_proj = nn.Linear(self.inner, width, bias=False)
        self.reset_parameters()

    def roles(self) -> dict[str, tuple[str, list[slice]]]:
        names = {"q_proj": "C_proj", "k_proj": "B_proj", "v_proj": "x_proj", "out_proj": "out_proj"}
        return {role: (name, [slice(None)]) for role, name in names.items()}

    def repeat(self, x: Tensor) -> Tensor:
        """`[B, T, G N] -> [B, T, H, N]`."""
        return split_heads(x, self.groups).repeat_interleave(self.heads // self.groups, dim=2)

    def forward(self, x: Tensor, state: State | None = None, packing: Packing | None = None) -> tuple[Tensor, State]:
        state = state or {}
        u = self.x_proj(x)
        u, conv = self.conv(merge_heads(self.repeat(u)) if self.repeat_first else u, state.get("conv"), packing)
        u = u if self.repeat_first else merge_heads(self.repeat(u))
        B, C = self.repeat(self.B_proj(x)), split_heads(self.C_proj(x), self.heads)
        y, memory = self.scan(u, self.dt_down(x), B, C, state.get("memory"), packing)
        return self.out_proj(y * F.silu(self.gate_proj(x))), {"memory": memory, "conv": conv}


LAYER, THEIRS = "model.layers.{}.mixer.", "model.layers.{}.mamba."
LAYOUT = beside_layout(
    MambaInLlamaConfig,
    (
        rename(THEIRS + "{in_proj_x,B_proj,C_proj,in_proj_z}.weight", LAYER + "{x_proj,B_proj,C_proj,gate_proj}.weight"),
        rename(THEIRS + "{dt_proj_down,dt_proj,out_proj}.weight", LAYER + "{dt_down,dt_proj,out_proj}.weight"),
        # their code adds it twice, in the projection and in the scan
        mapped(THEIRS + "dt_proj.bias", LAYER + "dt_proj.bias", lambda x: x * 2, lambda x: x / 2),
        rename(THEIRS + "{A_log,D}", LAYER + "{A_log,D}"),
        squeeze(THEIRS + "conv1d.{weight,bias}", LAYER + "conv.{weight,bias}"),
    ),
    ssm={"d_state": 16, "d_conv": 4, "expand": 2, "dt_rank": "auto", "repeat_kv_before_conv": True, "conv_bias": True},
    same={"conv_kernel": "d_conv", "conv_bias": "conv_bias", "repeat_first": "repeat_kv_before_conv", "step_rank": "dt_rank"},
    only={"proj_x_bias": False, "proj_z_bias": False, "out_proj_bias": False},
    matches=lambda ssm: "ngroups" not in ssm,
)


register(
    "mamba_in_llama",
    config=MambaInLlamaConfig,
    mixer=MambaInLlamaMixer,
    title="The Mamba in the Llama: Distilling and Accelerating Hybrid Models",
    paper="arXiv:2408.15237",
    presets={
        "tiny": dict(
            hidden_size=32, num_hidden_layers=2, intermediate_size=48, vocab_size=256, num_heads=8, num_kv_heads=4, state_size=4,
            attention_layers=[1], attention=dict(num_heads=4, num_kv_heads=2, head_dim=8),
        ),
        "zephyr-7b": dict(
            hidden_size=4096, num_hidden_layers=32, intermediate_size=14336, vocab_size=32000, attention_layers=list(range(1, 32, 2)),
            attention=dict(rope_theta=10000.0, window=4096),
        ),
    },
    layouts=(LAYOUT,),
)  # fmt: skip
