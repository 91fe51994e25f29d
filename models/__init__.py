"""The catalogue: one file per architecture. `from zoo.models import GLAConfig, GLAForCausalLM` finds any class by its name."""

import importlib
import sys


def __getattr__(name: str):
    registry = importlib.import_module("zoo.registry")
    for entry in registry.ARCHITECTURES.values():
        module = sys.modules[entry.config.__module__]
        if name in getattr(module, "__dict__", {}) and name.startswith(entry.config.__name__.removesuffix("Config")):
            return getattr(module, name)
    raise AttributeError(f"zoo.models has no {name!r}; zoo.list_models() names the architectures")
