"""What the two hybrids of Mamba-in-the-Llama have in common (Wang et al. 2024, arXiv:2408.15237).

Layers of a pretrained transformer become state spaces that keep its projections: values are written as x, keys as B, and queries
read as C, with as few heads of x and B as there were of keys and values. Other layers still attend. Checkpoints have the
transformer's config.json, and the state spaces' sizes in a file beside it.
"""

from collections.abc import Callable
from functools import partial
from typing import ClassVar

from huggingface_hub.dataclasses import strict

from zoo.config import ZooConfig
from zoo.converted import KEPT, PROJECTIONS, read_teacher, write_teacher
from zoo.layout import Layout, Rule, within
from zoo.registry import get
from zoo.terms import expect

BESIDE = "mamba_config.json"
ATTENTION = dict(num_heads=32, num_kv_heads=8, head_dim=128, rope_theta=500000.0, rope_scaling=None, window=None)
IDLE = {"chunk_size", "use_mem_eff_path", "use_fast_path", "headdim", "dt_min", "dt_max", "dt_init_floor", "A_init_range"}
AUTO = "auto"  # a rank that follows from the width
ROTARY = ("rope_theta", "rope_scaling")


@strict
class DistilledConfig(ZooConfig):
    """Sizes of the state spaces, and the layers that still attend; a subclass names their architecture, the teacher's."""

    teacher: ClassVar[str]

    num_heads: int = 32  # H, of C and of memories
    num_kv_heads: int = 8  # G, of x and B
    state_size: int = 128  # N, of each head; also its number of channels
    conv_kernel: int = 4  # W, tokens seen by the short convolution
    conv_bias: bool = True
    repeat_first: bool = False  # x (and B) get H heads before the convolution instead of behind it
    attention: dict | None = None  # fields of the teacher's config that differ from those of Llama 3 8B
    attention_layers: list[int] | None = None  # None: no layer attends

    def __post_init__(self, **kwargs):
        self.attention = ATTENTION | (self.attention or {})
        super().__post_init__(**kwargs)

    def validate_groups(self):
        """Heads must share x and B evenly."""
        self.divide("num_heads", "num_kv_heads")

    def attending(self) -> ZooConfig:
        """The config of a layer that attends."""
        return get(self.teacher).config(**self.shared_fields() | self.attention)

    def layer_configs(self) -> list[ZooConfig]:
        attending = set(self.attention_layers or [])
        if not attending:
            return super().layer_configs()
        attention = self.attending()
        return [attention if index in attending else self for index in range(self.num_hidden_layers)]


def read_fields(foreign: dict, ssm: dict, same: dict, only: dict, outside: dict, kind: str) -> dict:
    """Our fields for a completed config; see `beside_layout`."""
    expect(foreign, attention_bias=False, **outside)
    side, fields = foreign[BESIDE], read_teacher(foreign)
    sizes = {"d_model": "hidden_size", "rms_norm_eps": "rms_norm_eps", "intermediate_size": "intermediate_size",
             "hidden_act": "hidden_act", "n_layer": "num_hidden_layers", "vocab_size": "vocab_size"}  # fmt: skip
    for name, theirs in sizes.items():
        if side.get(name) not in (None, foreign[theirs]):
            raise ValueError(f"{BESIDE} says {name}={side[name]!r}, config.json {theirs}={foreign[theirs]!r}; they must agree")
    expect({"model_type": f"{kind} in {BESIDE}"} | side["ssm_cfg"], **only)
    if unknown := side["ssm_cfg"].keys() - ssm.keys() - only.keys() - IDLE:
        raise ValueError(f"ssm_cfg in {BESIDE} has the fields {sorted(unknown)}, which {kind} does not know")
    said = ssm | side["ssm_cfg"]
    states, inner = said["d_state"], side.get("d_inner") or int(said["expand"] * side["d_model"])
    groups = said.get("ngroups", inner // states)
    if groups * states != inner or side["d_xb"] % states:
        raise ValueError(
            f"{BESIDE}: d_inner={inner} must be ngroups={groups} times d_state={states}, which must divide d_xb={side['d_xb']}"
        )
    heads = {name: fields.pop(name) for name in ("num_heads", "num_kv_heads", *ROTARY)}
    heads |= {"head_dim": foreign.get("head_dim") or foreign["hidden_size"] // heads["num_heads"], "window": foreign.get("sliding_window")}
    return fields | {own: None if said[name] == AUTO else said[name] for own, name in same.items()} | {
        "num_heads": groups,
        "num_kv_heads": side["d_xb"] // states,
        "state_size": states,
        "attention": heads,
        "attention_layers": sorted(side["attn_layers"]) or None,
    }  # fmt: skip


def write_fields(config: DistilledConfig, ssm: dict, same: dict) -> dict:
    """The inverse of `read_fields`."""
    attention = config.attending()
    foreign = write_teacher(attention) | {"head_dim": attention.head_dim}
    if attention.window is not None:
        foreign |= {"model_type": "mistral", "sliding_window": attention.window}
    said = {name: AUTO if getattr(config, own) is None else getattr(config, own) for own, name in same.items()} | {
        "d_state": config.state_size,
        "ngroups": config.num_heads,
    }
    said = {name: value for name, value in said.items() if name in ssm and value != ssm[name]}
    foreign[BESIDE] = {
        "d_model": config.hidden_size,
        "ssm_cfg": {"expand": 1} | said,
        "rms_norm_eps": config.norm_eps,
        "vocab_size": None,
        "d_inner": config.num_heads * config.state_size,
        "d_xb": config.num_kv_heads * config.state_size,
        "intermediate_size": foreign["intermediate_size"],
        "hidden_act": "silu",
        "n_layer": config.num_hidden_layers,
        "attn_layers": config.attention_layers or [],
    }
    return foreign


def beside_layout(
    config: type[DistilledConfig], rules: tuple[Rule, ...], *, ssm: dict, same: dict, only: dict, matches: Callable[[dict], bool], **outside
) -> Layout:  # fmt: skip
    """A layout of the authors' for one of their state spaces.

    Args:
        config: of our architecture, whose name is the layout's too.
        rules: for the keys of the state spaces.
        ssm: what `ssm_cfg` may say, with the defaults, beside what does not matter.
        same: our field -> that of `ssm_cfg` with the same meaning, beside the sizes.
        only: what it may say too, with the only value that we can express.
        matches: whether an `ssm_cfg` is for this state space.
        outside: fields of config.json, with the only value that we can express.
    """

    kind = config.model_type.removeprefix("zoo_")

    def reads(foreign: dict) -> bool:
        return BESIDE in foreign and matches(foreign[BESIDE].get("ssm_cfg") or {})

    return Layout(
        kind,
        ("llama", "mistral"),
        partial(read_fields, ssm=ssm, same=same, only=only, outside=outside, kind=kind),
        partial(write_fields, ssm=ssm, same=same),
        (*KEPT, *within(config.teacher, PROJECTIONS), *within(kind, *rules)),
        matches=reads,
        beside=(BESIDE,),
    )
