"""A model whose layers are of any kinds: a plan names the mixer of each.

    HybridConfig(num_hidden_layers=4, plan=["gla", "gla", {"mixer": "gla", "num_heads": 8}, "transformer"])

Every layer takes the hybrid's shared fields (width, norm, channel mixer ...) and the defaults of its own family's config;
a plan entry may override any of them.
"""

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError

from zoo.config import ZooConfig
from zoo.fla import SILU, fla_layout, rounded_up
from zoo.layout import Rule, rename, squeeze
from zoo.registry import get, register
from zoo.terms import inner_size


@strict
class HybridConfig(ZooConfig):
    """A plan, and the shared fields."""

    model_type = "zoo_hybrid"

    plan: list | None = None  # one entry per layer: a mixer's name, or {"mixer": name, field: value, ...}

    def __post_init__(self, **kwargs):
        if self.plan is None:
            self.plan = ["transformer"] * self.num_hidden_layers
        self.plan = [entry if isinstance(entry, dict) else {"mixer": entry} for entry in self.plan]
        super().__post_init__(**kwargs)

    def layer_configs(self) -> list[ZooConfig]:
        """See `ZooConfig.layer_configs`; raises ValueError for a plan of the wrong length or an unknown mixer or field."""
        if len(self.plan) != self.num_hidden_layers:
            raise ValueError(f"the plan has {len(self.plan)} entries for num_hidden_layers={self.num_hidden_layers}; make them equal")
        return [self._layer(index, **entry) for index, entry in enumerate(self.plan)]

    def _layer(self, index: int, mixer: str | None = None, **fields) -> ZooConfig:
        if mixer is None:
            raise ValueError(f"plan entry {index} names no mixer; write {{'mixer': name, ...}}")
        family = get(mixer)
        if family.mixer is None:
            raise ValueError(f"plan entry {index}: {mixer!r} has no mixer of its own")
        try:
            return family.config(**self.shared_fields() | fields)
        except (ValueError, TypeError, StrictDataclassError) as error:
            raise ValueError(f"plan entry {index} ({mixer}): {error}") from error


def samba(width: int, pairs: int, heads: int) -> dict:
    """Samba (arXiv:2406.07522): Mamba and attention over a window of 2048 in turn, each with a gated MLP."""
    window = {"mixer": "transformer", "num_heads": heads, "window": 2048}
    return dict(
        hidden_size=width,
        num_hidden_layers=2 * pairs,
        intermediate_size=4 * width * 2 // 3,
        tie_word_embeddings=True,
        plan=["mamba", window] * pairs,
    )


# Samba as flash-linear-attention has it: a plan of Mamba, and of attention where `attn` says so.
MAMBA = {"state_size": "state_size", "expand": "expand", "conv_kernel": "conv_kernel", "bias": "use_bias"}
WINDOW = {
    "num_heads": "num_heads",
    "num_kv_heads": "num_kv_heads",
    "qkv_bias": "qkv_bias",
    "window": "window_size",
    "rope_theta": "rope_theta",
}
ATTENTION = {"num_kv_heads": None, "qkv_bias": False, "window_size": None, "rope_theta": 10000.0}  # what `attn` may leave out
EVERY_OTHER = {"layers": range(1, 18, 2), "num_heads": 18, "num_kv_heads": 18, "window_size": 2048}  # where there is no `attn`


def read_samba(foreign: dict) -> dict:
    """Further fields for a config of Samba."""
    count, rank = foreign["num_hidden_layers"], foreign["time_step_rank"]
    mamba = {"mixer": "mamba", "step_rank": None if rank == "auto" else rank} | {own: foreign[name] for own, name in MAMBA.items()}
    plan = [mamba | {"expand": float(foreign["expand"])}] * count
    attention = foreign["attn"] or []
    for group in [attention] if isinstance(attention, dict) else attention:
        said = ATTENTION | group
        window = {own: said[name] for own, name in WINDOW.items()} | {"rope_theta": float(said["rope_theta"])}
        if window["num_kv_heads"] == window["num_heads"]:
            window["num_kv_heads"] = None
        for index in said["layers"]:
            if index < count:
                plan[index] = {"mixer": "transformer"} | {name: value for name, value in window.items() if value is not None}
    inner = rounded_up(foreign["hidden_size"] * (foreign["hidden_ratio"] or 4) * 2 / 3, 256)
    return {"plan": plan, "intermediate_size": inner}


def write_samba(config: HybridConfig) -> dict:
    """The inverse. What it cannot say is left out, and noticed by mapping back."""
    layers = config.layer_configs()
    attended = [index for index, layer in enumerate(layers) if layer.name == "transformer"]
    scanned = [layer for layer in layers if layer.name == "mamba"]
    if not attended or len(attended) + len(scanned) < len(layers) or not scanned:
        raise ValueError(f"a samba has layers of mamba and of transformer, this plan has {sorted({layer.name for layer in layers})}")
    window, mamba = layers[attended[0]], scanned[0]
    said = {name: getattr(window, own) for own, name in WINDOW.items()} | {"num_kv_heads": window.num_kv_heads or window.num_heads}
    sizes = {name: getattr(mamba, own) for own, name in MAMBA.items()} | {"time_step_rank": mamba.step_rank or "auto"}
    inner = inner_size(config)
    return sizes | {"attn": {"layers": attended} | said, "hidden_ratio": 1.5 * inner / config.hidden_size}


def samba_rules(config: HybridConfig) -> tuple[Rule, ...]:
    """The two kinds of layer share names on our side, so each layer has rules of its own."""
    rules = [
        rename("backbone.embeddings.weight", "model.embed_tokens.weight"),
        rename("backbone.layers.{}.{mixer,mlp}_norm.weight", "model.layers.{}.{mixer,channel}_norm.weight"),
        rename("backbone.layers.{}.mlp.{gate,up,down}_proj.weight", "model.layers.{}.channel_mixer.{gate,up,down}_proj.weight"),
        rename("backbone.norm_f.weight", "model.norm.weight"),
        rename("lm_head.weight", "lm_head.weight"),
        rename("score.{weight,bias}", "score.{weight,bias}"),
    ]
    for index, layer in enumerate(config.layer_configs()):
        theirs, ours = f"backbone.layers.{index}.mixer.", f"model.layers.{index}.mixer."
        if layer.name == "transformer":
            rules.append(rename(theirs + "{q,k,v,o}_proj.{weight,bias}", ours + "{q,k,v,out}_proj.{weight,bias}"))
        else:
            rules.append(rename(theirs + "{in,x,dt,out}_proj.{weight,bias}", ours + "{in,x,dt,out}_proj.{weight,bias}"))
            rules.append(rename(theirs + "{A_log,D}", ours + "{A_log,D}"))
            rules.append(squeeze(theirs + "conv1d.{weight,bias}", ours + "conv.{weight,bias}"))
    return tuple(rules)


SAMBA = fla_layout(
    "samba",
    "Samba",
    samba_rules,
    defaults={
        "hidden_size": 2304, "num_hidden_layers": 18, "norm_eps": 1e-5, "pad_token_id": 0, "state_size": 16, "expand": 2.0,
        "conv_kernel": 4, "use_bias": False, "time_step_rank": "auto", "hidden_ratio": 4, "attn": EVERY_OTHER,
    },
    only={"attn": None, "hidden_act": SILU, "use_conv_bias": (True,)},
    read=read_samba,
    write=write_samba,
    mlp=False,
    prefix="backbone.",
    trials={"plain": {"state_size": 4, "attn": EVERY_OTHER | {"layers": [1], "num_heads": 4, "num_kv_heads": 2, "window_size": 5}}},
)  # fmt: skip


register(
    "hybrid",
    config=HybridConfig,
    mixer=None,
    title="Any plan of mixers",
    paper="none",
    presets={
        "tiny": dict(
            hidden_size=32,
            num_hidden_layers=3,
            vocab_size=256,
            plan=[
                {"mixer": "mamba", "state_size": 4},
                {"mixer": "transformer", "num_heads": 4, "window": 8},
                {"mixer": "gla", "num_heads": 2},
            ],
        ),
        "samba-tiny": dict(
            hidden_size=32,
            num_hidden_layers=2,
            vocab_size=256,
            plan=[{"mixer": "mamba", "state_size": 4}, {"mixer": "transformer", "num_heads": 4, "window": 8}],
        ),
        "samba-421m": samba(1536, 6, 12),
        "samba-1.3b": samba(2304, 9, 18),
    },
    layouts=(SAMBA,),
)
