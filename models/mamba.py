"""Mamba: a selective state space, whose step size, input and output maps depend on the token.

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t,    y_t = C_t . h_t + D x_t                 (Algorithm 2)
    dt_t = softplus(W_dt r_t + b),    [r_t, B_t, C_t] = W_x x_t

x passes a short convolution and SiLU before; y is gated by SiLU of the other half of the input projection (figure 3). The
block has no channel mixer.

Paper: Gu, Dao 2023, arXiv:2312.00752: Algorithm 2, figure 3, initialisation in section 3.6. Falcon Mamba
(arXiv:2410.05355) and Jamba (arXiv:2403.19887) normalise r, B and C before use.
"""

from functools import partial

from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.config import ZooConfig
from zoo.fla import SILU, fla_layout, from_fla
from zoo.kernels.packing import Packing
from zoo.layers import GatedNorm, ShortConv
from zoo.layout import Layout, rename, squeeze
from zoo.mixer import State
from zoo.registry import register
from zoo.selective import SelectiveMixer
from zoo.state_spaces import state_spaces_layout
from zoo.terms import COMMON


@strict
class MambaConfig(ZooConfig):
    """Sizes of the state space."""

    model_type = "zoo_mamba"

    channel_mixer: str | None = None
    state_size: int = 16  # N, per channel
    expand: float = 2.0  # inner width = D * expand
    conv_kernel: int = 4  # W
    conv_bias: bool = True
    bias: bool = False  # biases of the input and output projections
    step_rank: int | None = None  # rank of the step size's projection; None: D / 16, rounded up
    inner_norm: str | None = None  # RMS norms of r, B and C: "plain" (no weights, Falcon Mamba), "weighted" (Jamba), or None
    inner_norm_eps: float = 1e-6

    def validate_inner_norm(self):
        """The norm must be one of those the mixer has."""
        if self.inner_norm not in (None, "plain", "weighted"):
            raise ValueError(f"MambaConfig: inner_norm {self.inner_norm!r} is unknown; choose 'plain', 'weighted' or None")


class MambaMixer(SelectiveMixer):
    """State: `memory` `[B, inner, N]`, and `conv`, the last inputs of the convolution, `[B, W - 1, inner]`."""

    lora_targets = ("in_proj", "x_proj", "dt_proj", "out_proj")

    def __init__(self, config: MambaConfig, layer: int):
        super().__init__(config, layer)
        width, self.states = config.hidden_size, config.state_size
        self.inner, self.rank = int(width * config.expand), config.step_rank or -(-width // 16)
        self.in_proj = nn.Linear(width, 2 * self.inner, bias=config.bias)
        self.conv = ShortConv(self.inner, config.conv_kernel, bias=config.conv_bias)
        self.x_proj = nn.Linear(self.inner, self.rank + 2 * self.states, bias=False)
        self.dt_proj = nn.Linear(self.rank, self.inner)
        self.make_scan_parameters()
        self.out_proj = nn.Linear(self.inner, width, bias=config.bias)
        self.r_norm, self.B_norm, self.C_norm = (
            GatedNorm(size, eps=config.inner_norm_eps, elementwise=config.inner_norm == "weighted") if config.inner_norm else nn.Identity()
            for size in (self.rank, self.states, self.states)
        )
        self.reset_parameters()

    def forward(self, x: Tensor, state: State | None = None, packing: Packing | None = None) -> tuple[Tensor, State]:
        state = state or {}
        x, gate = self.in_proj(x).chunk(2, dim=-1)
        x, conv = self.conv(x, state.get("conv"), packing)
        rank, B, C = self.x_proj(x).split([self.rank, self.states, self.states], dim=-1)
        rank, B, C = self.r_norm(rank), self.B_norm(B), self.C_norm(C)
        y, memory = self.scan(x, rank, B, C, state.get("memory"), packing)
        return self.out_proj(y * F.silu(gate)), {"memory": memory, "conv": conv}


def from_mamba(foreign: dict) -> dict:
    """Fields of a MambaConfig for a config of Mamba or Falcon Mamba. Fields about the first time steps are not needed."""
    if foreign["hidden_act"] not in ("silu", "swish"):
        raise ValueError(f"hidden_act {foreign['hidden_act']!r} is not supported; Mamba's is 'silu'")
    fields = {name: foreign[name] for name in COMMON} | {own: foreign[name] for own, name in RENAMED.items()}
    fields |= {"expand": float(foreign["expand"])}
    if foreign["model_type"] == "falcon_mamba":
        fields |= {"inner_norm": "plain", "inner_norm_eps": foreign["mixer_rms_eps"]}
    return fields


def to_mamba(config: MambaConfig, kind: str) -> dict:
    """The inverse, for a model type. What it cannot say is left out, and noticed by mapping back."""
    fields = {name: getattr(config, name) for name in COMMON} | {name: getattr(config, own) for own, name in RENAMED.items()}
    fields |= {"expand": int(config.expand), "time_step_rank": config.step_rank or -(-config.hidden_size // 16)}
    return fields if kind == "mamba" else fields | {"mixer_rms_eps": config.inner_norm_eps}


RENAMED = {
    "norm_eps": "layer_norm_epsilon", "state_size": "state_size", "conv_kernel": "conv_kernel", "conv_bias": "use_conv_bias",
    "bias": "use_bias", "step_rank": "time_step_rank",
}  # fmt: skip
RULES = (
    rename("backbone.embeddings.weight", "model.embed_tokens.weight"),
    rename("backbone.layers.{}.norm.weight", "model.layers.{}.mixer_norm.weight"),
    rename("backbone.layers.{}.mixer.{in,x,dt,out}_proj.{weight,bias}", "model.layers.{}.mixer.{in,x,dt,out}_proj.{weight,bias}"),
    rename("backbone.layers.{}.mixer.{A_log,D}", "model.layers.{}.mixer.{A_log,D}"),
    squeeze("backbone.layers.{}.mixer.conv1d.{weight,bias}", "model.layers.{}.mixer.conv.{weight,bias}"),
    rename("backbone.norm_f.weight", "model.norm.weight"),
    rename("lm_head.weight", "lm_head.weight"),
    rename("score.{weight,bias}", "score.{weight,bias}"),
)
ALIASES = (("backbone.embedding.weight", "backbone.embeddings.weight"),)
FORGETS = (  # where its steps start, how it computes, and a stream that we keep in the dtype of the weights
    "time_step_min", "time_step_max", "time_step_floor", "time_step_scale", "time_step_init_scheme", "rescale_prenorm_residual",
    "use_mambapy", "use_associative_scan", "residual_in_fp32",
)  # fmt: skip
SMALL = {"state_size": 5, "hidden_size": 36}
BIASED = SMALL | {"use_bias": True, "tie_word_embeddings": False}
TRIALS = {
    "mamba": {"plain": SMALL, "biased": BIASED | {"use_conv_bias": False, "time_step_rank": 5, "conv_kernel": 3}},
    "falcon_mamba": {"plain": SMALL, "biased": BIASED | {"expand": 3, "mixer_rms_eps": 1e-3, "layer_norm_epsilon": 1e-4}},
}
LAYOUTS = tuple(
    Layout(kind, (kind,), from_mamba, partial(to_mamba, kind=kind), RULES, prefix="backbone.", aliases=ALIASES, forgets=FORGETS,
           trials=trials)
    for kind, trials in TRIALS.items()
)  # fmt: skip
FLA = fla_layout(
    "mamba",
    "Mamba",
    RULES,
    same={
        "state_size": "state_size", "expand": "expand", "conv_kernel": "conv_kernel", "conv_bias": "use_conv_bias", "bias": "use_bias",
    },
    defaults={
        "num_hidden_layers": 48, "norm_eps": 1e-5, "pad_token_id": 0, "state_size": 16, "expand": 2.0, "conv_kernel": 4,
        "use_conv_bias": True, "use_bias": False, "dt_rank": "auto",
    },
    only={"hidden_act": SILU},
    read=lambda foreign: {"step_rank": None if foreign["dt_rank"] == "auto" else foreign["dt_rank"]},
    write=lambda config: {"dt_rank": config.step_rank or -(-config.hidden_size // 16)},
    mlp=False,
    matches=from_fla,
    prefix="backbone.",
)  # fmt: skip
ORIGINAL = state_spaces_layout(
    "mamba-original",
    "Mamba1",
    (rename("backbone.embedding.weight", "model.embed_tokens.weight"), *RULES[1:]),
    defaults={"d_state": 16, "d_conv": 4, "expand": 2, "dt_rank": "auto", "conv_bias": True, "bias": False},
    same={"state_size": "d_state", "conv_kernel": "d_conv", "conv_bias": "conv_bias", "bias": "bias", "step_rank": "dt_rank"},
    only={},
)


register(
    "mamba",
    config=MambaConfig,
    mixer=MambaMixer,
    title="Mamba: Linear-Time Sequence Modeling with Selective State Spaces",
    paper="arXiv:2312.00752",
    presets={
        "tiny": dict(hidden_size=32, num_hidden_layers=2, state_size=8, vocab_size=256),
        "130m": dict(hidden_size=768, num_hidden_layers=24, vocab_size=50280, tie_word_embeddings=True),
        "370m": dict(hidden_size=1024, num_hidden_layers=48, vocab_size=50280, tie_word_embeddings=True),
        "790m": dict(hidden_size=1536, num_hidden_layers=48, vocab_size=50280, tie_word_embeddings=True),
        "1.4b": dict(hidden_size=2048, num_hidden_layers=48, vocab_size=50280, tie_word_embeddings=True),
        "2.8b": dict(hidden_size=2560, num_hidden_layers=64, vocab_size=50280, tie_word_embeddings=True),
    },
    layouts=(*LAYOUTS, FLA, ORIGINAL),
)
