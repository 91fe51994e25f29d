"""A model whose layers are of any kinds: a plan names the mixer of each.

    HybridConfig(num_hidden_layers=4, plan=["gla", "gla", {"mixer": "gla", "num_heads": 8}, "transformer"])

Every layer takes the hybrid's shared fields (width, norm, channel mixer ...) and the defaults of its own family's config;
a plan entry may override any of them.
"""

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError

from zoo.config import ZooConfig
from zoo.registry import get, register


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
)
