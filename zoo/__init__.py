"""A zoo of efficient sequence architectures behind one interface."""

from zoo import ops
from zoo.auto import from_config, from_pretrained
from zoo.cache import ZooCache
from zoo.config import ZooConfig
from zoo.layout import layouts
from zoo.mixer import Mixer, State, Traits
from zoo.registry import (
    build_config,
    list_channel_mixers,
    list_mixers,
    list_models,
    list_presets,
    load_all,
    register,
    register_channel_mixer,
)
from zoo.world_tokenizer import WorldTokenizer

__version__ = "0.1.0"

load_all()

from zoo import hub  # noqa: E402  (what stands on the catalogue, which is complete only now)
from zoo.models import HybridConfig  # noqa: E402

__all__ = [
    "HybridConfig", "Mixer", "State", "Traits", "WorldTokenizer", "ZooCache", "ZooConfig", "build_config", "from_config", "from_pretrained",
    "hub", "layouts", "list_channel_mixers", "list_mixers", "list_models", "list_presets", "ops", "register", "register_channel_mixer",
]  # fmt: skip
