"""The battery itself: a mixer in one new file passes all of it, and every deliberately broken one is rejected."""

import importlib.util
import sys

import pytest
import torch

import zoo
from zoo import registry
from zoo.evaluate.battery import MIXER_PROPERTIES, MODEL_PROPERTIES, run

TOY = """
import torch
from torch import nn

from zoo import ops
from zoo.config import ZooConfig
from zoo.layers import split_heads, merge_heads
from zoo.mixer import Mixer, Traits
from zoo.registry import register


class {prefix}Config(ZooConfig):
    model_type = "zoo_{name}"

    num_heads: int = 2


class {prefix}Mixer(Mixer):
    lora_targets = ("qkv_proj", "out_proj")

    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.heads, self.keys = config.num_heads, config.divide("hidden_size", "num_heads")
        self.qkv_proj = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def initial_state(self, batch, length, dtype=torch.float32, device="cpu"):
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return {{"memory": torch.zeros(batch, self.heads, self.keys, self.keys, dtype=wide, device=device)}}

    def operator_flops(self, length):
        return 4 * length * self.heads * self.keys**2

    def forward(self, x, state=None, packing=None):
        q, k, v = (split_heads(part, self.heads) for part in self.qkv_proj(x).chunk(3, dim=-1))
        memory = state["memory"] if state else None
        decay = torch.full((self.heads,), -0.1, dtype=torch.float64, device=x.device)
        o, memory = ops.linear_attention(q, k, v, decay, state=memory, packing=packing)
        return self.out_proj(merge_heads(o)), {{"memory": memory}}


register("{name}", config={prefix}Config, mixer={prefix}Mixer, title="A toy", paper="none",
         presets={{"tiny": dict(hidden_size=32, num_hidden_layers=2, vocab_size=256)}})
"""

# name -> (what to replace in the toy, by what, properties of which at least one must object)
BROKEN = {
    "leaks_the_future": (
        "o, memory = ops",
        "v = v + v.mean(1, keepdim=True)\n        o, memory = ops",
        {"sees_no_future", "prefill_then_steps_equal_the_whole"},
    ),
    "forgets_the_gradient": (
        '{{"memory": memory}}\n\n\nregister',
        '{{"memory": memory.detach()}}\n\n\nregister',
        {"state_passes_gradients"},
    ),
    "mixes_documents": ("state=memory, packing=packing)", "state=memory)", {"packed_documents_are_separate"}),
    "ignores_the_state": ("state=memory, packing", "state=None, packing", {"prefill_then_steps_equal_the_whole"}),
    "grows_its_state": (
        '{{"memory": memory}}\n\n\nregister',
        '{{"memory": memory, "past": torch.cat([state["past"], x], 1) if state else x}}\n\n\nregister',
        {"declares_its_state"},
    ),
    "mixes_rows": ("o, memory = ops", "v = v + v.mean(0, keepdim=True)\n        o, memory = ops", {"rows_are_independent"}),
    "reads_weights": (
        "self.qkv_proj(x).chunk",
        "nn.functional.linear(x, self.qkv_proj.weight).chunk",
        {"adapts_with_lora"},
    ),
    "wastes_a_parameter": (
        "        self.out_proj = nn",
        "        self.idle = nn.Parameter(torch.ones(3))\n        self.out_proj = nn",
        {"every_parameter_learns"},
    ),
    "loses_a_buffer": (
        "        self.out_proj = nn",
        '        self.register_buffer("lost", torch.full((3,), 7.0), persistent=False)\n        self.out_proj = nn',
        {"initialises_what_a_checkpoint_lacks"},
    ),
    "branches_on_data": (
        "o, memory = ops",
        "q = q * 2 if q.sum() > 0 else q\n        o, memory = ops",
        {"compiles_whole", "trains_compiled"},
    ),
    "overflows": ("o, memory = ops", "k = (10 * k).exp()\n        o, memory = ops", {"survives_extreme_inputs"}),
    "counts_pads": (
        "o, memory = ops",
        "q = q * torch.arange(1, x.shape[1] + 1, device=x.device).to(x.dtype)[:, None, None]\n        o, memory = ops",
        {"padding_changes_nothing", "prefill_then_steps_equal_the_whole"},
    ),
}


@pytest.fixture
def load(tmp_path):
    """Import a mixer from one file in a temporary folder; it leaves the catalogue afterwards."""
    loaded = []

    def load(name: str, source: str) -> str:
        path = tmp_path / f"{name}.py"
        path.write_text(source)
        spec = importlib.util.spec_from_file_location(f"toys_{name}", path)
        module = sys.modules[f"toys_{name}"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        loaded.append(name)
        return name

    yield load
    for name in loaded:
        registry.unregister(name)
        del sys.modules[f"toys_{name}"]


def source(name: str, old: str = "", new: str = "") -> str:
    assert old in TOY, "the toy has changed; the breakage no longer applies"
    return TOY.replace(old, new, 1).format(name=name, prefix=name.title().replace("_", ""))


def test_one_file_registers_and_passes_everything(load):
    name = load("toy", source("toy"))
    assert name in zoo.list_models() and name in zoo.list_mixers()
    results = run(name, MIXER_PROPERTIES | MODEL_PROPERTIES)
    assert len(results) > 30
    assert not {label: error for label, error in results.items() if error}
    hybrid = zoo.from_config("hybrid", hidden_size=32, vocab_size=64, num_hidden_layers=2, plan=["toy", {"mixer": "gla", "num_heads": 2}])
    assert torch.isfinite(hybrid(torch.randint(0, 64, (1, 5))).logits).all()


@pytest.mark.parametrize("fault", BROKEN)
def test_the_battery_rejects(load, fault):
    old, new, watchmen = BROKEN[fault]
    load(fault, source(fault, old, new))
    properties = {label: check for label, check in (MIXER_PROPERTIES | MODEL_PROPERTIES).items() if label in watchmen}
    assert properties.keys() == watchmen
    results = run(fault, properties)
    assert any(results.values()), f"nothing objected to a mixer that {fault.replace('_', ' ')}"
