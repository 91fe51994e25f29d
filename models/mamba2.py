"""Mamba-2: a selective state space model that decays by one number per head, which makes it linear attention.

    z, x, B, C, dt = split(W_in u_t);    x, B, C = silu(conv(x, B, C));    dt = softplus(dt + b)
    S_t = exp(dt_t A_h) S_{t-1} + B_t (dt_t x_t)^T,    y_t = C_t S_t + D_h x_t,    A_h < 0
    output: rmsnorm(y_t * silu(z_t)) W_out

So C are queries, B keys, shared by the heads of a group, and dt x values.

Paper: Dao, Gu 2024, arXiv:2405.21060: the duality in section 5, the block in section 7 (figure 6, right).
"""

import math

from huggingface_hub.dataclasses import strict

from zoo.config import ZooConfig
from zoo.fla import SILU, fla_layout, from_fla
from zoo.layout import Layout, rename, squeeze
from zoo.registry import register
from zoo.ssd import SSDMixer
from zoo.state_spaces import state_spaces_layout
from zoo.terms import COMMON, expect_free_steps


@strict
class Mamba2Config(ZooConfig):
    """Sizes of the state, and the range of the first time steps."""

    model_type = "zoo_mamba2"

    channel_mixer: str | None = None

    expand: float = 2.0  # inner width = D * expand
    head_dim: int = 64  # P, channels per head (V); H = D * expand / P
    state_size: int = 128  # N, the length of B and C (K)
    num_groups: int = 1  # sets of B and C, each shared by H / num_groups heads
    conv_kernel: int = 4  # tokens seen by the short convolution
    conv_bias: bool = True
    bias: bool = False  # biases of the two projections
    norm_groups: int | None = None  # groups of the output norm; None: num_groups
    dt_min: float = 1e-3  # initial time steps are log-uniform between dt_min and dt_max
    dt_max: float = 1e-1
    dt_floor: float = 0.0  # no time step is ever shorter

    @property
    def inner(self) -> int:
        """The inner width, H P."""
        return round(self.hidden_size * self.expand)

    def validate_inner(self):
        """The inner width must be a whole number of heads, and heads of groups."""
        if self.inner % self.head_dim or self.inner // self.head_dim % self.num_groups:
            raise ValueError(
                f"Mamba2Config: the inner width {self.inner} must be divisible by head_dim={self.head_dim}, "
                f"and the heads that gives by num_groups={self.num_groups}"
            )


class Mamba2Mixer(SSDMixer):
    """The state is that of `SSDMixer`."""

    def __init__(self, config: Mamba2Config, layer: int):
        super().__init__(
            config, layer, inner=config.inner, values=config.head_dim, keys=config.state_size,
            groups=config.num_groups, kernel=config.conv_kernel, conv_bias=config.conv_bias, in_bias=config.bias, out_bias=config.bias,
            norm_groups=config.norm_groups or config.num_groups, dt_range=(config.dt_min, config.dt_max), dt_floor=config.dt_floor,
        )  # fmt: skip


RENAMED = {
    "norm_eps": "layer_norm_epsilon", "head_dim": "head_dim", "state_size": "state_size", "num_groups": "n_groups",
    "conv_kernel": "conv_kernel", "conv_bias": "use_conv_bias", "bias": "use_bias", "dt_min": "time_step_min", "dt_max": "time_step_max",
}  # fmt: skip


def from_mamba2(foreign: dict) -> dict:
    """Fields of a Mamba2Config for one of transformers, whose output norm has one group whatever `n_groups` is."""
    if foreign["hidden_act"] not in ("silu", "swish"):
        raise ValueError(f"hidden_act {foreign['hidden_act']!r} is not supported; Mamba-2's is 'silu'")
    expect_free_steps(foreign)
    fields = {name: foreign[name] for name in COMMON} | {own: foreign[name] for own, name in RENAMED.items()}
    return fields | {"expand": float(foreign["expand"]), "norm_groups": 1}


def to_mamba2(config: Mamba2Config) -> dict:
    """The inverse. What it cannot say is left out, and noticed by mapping back."""
    if config.norm_groups is None and config.num_groups > 1:
        raise ValueError(
            f"mamba2's output norm has one group, this one num_groups={config.num_groups}; only norm_groups=1 can be expressed"
        )
    fields = {name: getattr(config, name) for name in COMMON} | {name: getattr(config, own) for own, name in RENAMED.items()}
    return fields | {
        "expand": int(config.expand),
        "num_heads": config.inner // config.head_dim,
        "time_step_rank": -(-config.hidden_size // 16),
    }


RULES = (
    rename("backbone.embeddings.weight", "model.embed_tokens.weight"),
    rename("backbone.layers.{}.norm.weight", "model.layers.{}.mixer_norm.weight"),
    rename("backbone.layers.{}.mixer.{in,out}_proj.{weight,bias}", "model.layers.{}.mixer.{in,out}_proj.{weight,bias}"),
    rename("backbone.layers.{}.mixer.{A_log,D,dt_bias,norm.weight}", "model.layers.{}.mixer.{A_log,D,dt_bias,norm.weight}"),
    squeeze("backbone.layers.{}.mixer.conv1d.{weight,bias}", "model.layers.{}.mixer.conv.{weight,bias}"),
    rename("backbone.norm_f.weight", "model.norm.weight"),
    rename("lm_head.weight", "lm_head.weight"),
    rename("score.{weight,bias}", "score.{weight,bias}"),
)
ALIASES = (("backbone.embedding.weight", "backbone.embeddings.weight"),)
FORGETS = ("time_step_floor", "rescale_prenorm_residual", "residual_in_fp32", "num_heads", "time_step_rank")
SMALL = {"hidden_size": 36, "num_heads": 6, "head_dim": 12, "state_size": 5, "chunk_size": 8}
TRIALS = {
    "plain": SMALL | {"n_groups": 3},
    "biased": SMALL | {"n_groups": 1, "use_bias": True, "use_conv_bias": False, "conv_kernel": 3, "time_step_min": 1e-2},
    "tied": SMALL | {"n_groups": 2, "tie_word_embeddings": True, "layer_norm_epsilon": 1e-3},
}
MAMBA2 = Layout("mamba2", ("mamba2",), from_mamba2, to_mamba2, RULES, prefix="backbone.", aliases=ALIASES, trials=TRIALS, forgets=FORGETS)
FLA = fla_layout(
    "mamba2",
    "Mamba2",
    RULES,
    same={
        "head_dim": "head_dim", "state_size": "state_size", "expand": "expand", "num_groups": "n_groups", "conv_kernel": "conv_kernel",
        "conv_bias": "use_conv_bias", "bias": "use_bias", "dt_min": "dt_min", "dt_max": "dt_max",
    },
    defaults={
        "num_hidden_layers": 48, "norm_eps": 1e-5, "pad_token_id": 0, "head_dim": 64, "state_size": 128, "expand": 2.0, "n_groups": 1,
        "conv_kernel": 4, "use_conv_bias": True, "use_bias": False, "dt_min": 0.001, "dt_max": 0.1,
    },
    only={
        "hidden_act": SILU, "rmsnorm": (True,), "norm_before_gate": (False,), "D_has_hdim": (False,),
        "dt_limit": ([0.0, math.inf], (0.0, math.inf)),
    },
    mlp=False,
    matches=from_fla,
    prefix="backbone.",
)  # fmt: skip
ORIGINAL = state_spaces_layout(
    "mamba2-original",
    "Mamba2",
    (rename("backbone.embedding.weight", "model.embed_tokens.weight"), *RULES[1:]),
    defaults={
        "d_state": 128, "d_conv": 4, "expand": 2, "headdim": 64, "ngroups": 1, "conv_bias": True, "bias": False, "dt_min": 0.001,
        "dt_max": 0.1,
    },
    same={
        "head_dim": "headdim", "state_size": "d_state", "num_groups": "ngroups", "conv_kernel": "d_conv", "conv_bias": "conv_bias",
        "bias": "bias", "dt_min": "dt_min", "dt_max": "dt_max",
    },
    only={"rmsnorm": True, "norm_before_gate": False, "D_has_hdim": False},
)  # fmt: skip

_PUBLISHED = dict(vocab_size=50288, tie_word_embeddings=True)

register(
    "mamba2",
    config=Mamba2Config,
    mixer=Mamba2Mixer,
    title="Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State Space Duality",
    paper="arXiv:2405.21060",
    presets={
        "tiny": dict(hidden_size=32, num_hidden_layers=2, head_dim=16, state_size=8, num_groups=2, vocab_size=256),
        "130m": dict(hidden_size=768, num_hidden_layers=24, **_PUBLISHED),
        "370m": dict(hidden_size=1024, num_hidden_layers=48, **_PUBLISHED),
        "780m": dict(hidden_size=1536, num_hidden_layers=48, **_PUBLISHED),
        "1.3b": dict(hidden_size=2048, num_hidden_layers=48, **_PUBLISHED),
        "2.7b": dict(hidden_size=2560, num_hidden_layers=64, **_PUBLISHED),
    },
    layouts=(MAMBA2, FLA, ORIGINAL),
)
