"""Several mixers side by side: their outputs are summed, each after the first through a gate per channel.

    y_t = m_0(x)_t + sum_i g_i * m_i(x)_t,    g_i [D], zero at first

A new parallel layer therefore equals its first branch, and what the others add is learnt. Put a windowed attention first
and a recurrent mixer second, and the layer has an exact short memory and a compressed long one. The branches see the same
input, as in Hymba's parallel heads (Dong et al. 2024, arXiv:2411.13676); the gate that starts at zero is ReZero's
(Bachlechner et al. 2020, arXiv:2003.04887), one per channel.
"""

from dataclasses import replace

import torch
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import initialization as init

from zoo.config import ZooConfig
from zoo.kernels.packing import Packing
from zoo.mixer import Mixer, State, Traits
from zoo.registry import get, register


@strict
class ParallelConfig(ZooConfig):
    """The branches; each takes the shared fields and overrides what it names."""

    model_type = "zoo_parallel"

    branches: list | None = None  # each {"mixer": name, field: value, ...} or a name; None: windowed attention and gla

    def __post_init__(self, **kwargs):
        if self.branches is None:
            self.branches = [{"mixer": "transformer", "window": 64, "sinks": 4}, "gla"]
        self.branches = [branch if isinstance(branch, dict) else {"mixer": branch} for branch in self.branches]
        super().__post_init__(**kwargs)

    def branch_configs(self) -> list[ZooConfig]:
        """The config of every branch; raises ValueError for fewer than two, an unknown mixer or field, or one that cannot be a branch."""
        if len(self.branches) < 2:
            raise ValueError(f"ParallelConfig: branches has {len(self.branches)} entries; name at least two mixers")
        return [self._branch(index, **branch) for index, branch in enumerate(self.branches)]

    def _branch(self, index: int, mixer: str | None = None, **fields) -> ZooConfig:
        if mixer is None:
            raise ValueError(f"branch {index} names no mixer; write {{'mixer': name, ...}}")
        family = get(mixer)
        if family.mixer is None or family.mixer is ParallelMixer or family.mixer.traits.carry:
            raise ValueError(f"branch {index}: {mixer!r} cannot be a branch; name a mixer that neither branches nor carries between layers")
        try:
            return family.config(**self.shared_fields() | fields)
        except (ValueError, TypeError, StrictDataclassError) as error:
            raise ValueError(f"branch {index} ({mixer}): {error}") from error


class ParallelMixer(Mixer):
    """State: that of every branch, named `<index>_<name>`. Traits are those all branches share."""

    lora_targets = ("q_proj", "k_proj", "v_proj", "out_proj")

    def __init__(self, config: ParallelConfig, layer: int):
        configs = config.branch_configs()
        mixers = [get(branch.name).mixer for branch in configs]
        self.traits = Traits(
            causal=all(m.traits.causal for m in mixers),
            bidirectional=all(m.traits.bidirectional for m in mixers),
        )
        super().__init__(config, layer)
        self.branches = nn.ModuleList(mixer(branch, layer) for mixer, branch in zip(mixers, configs, strict=True))
        self.gate = nn.Parameter(torch.empty(len(configs) - 1, config.hidden_size))
        self.lora_targets = tuple(dict.fromkeys(name for branch in self.branches for name in branch.lora_targets))
        # of a branch itself, not its class: a window makes the state of attention constant
        self.traits = replace(self.traits, constant_state=all(branch.traits.constant_state for branch in self.branches))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        init.zeros_(self.gate)

    def initial_state(self, batch: int, length: int, dtype: torch.dtype = torch.float32, device="cpu") -> State:
        states = (branch.initial_state(batch, length, dtype, device) for branch in self.branches)
        return {f"{index}_{name}": t for index, state in enumerate(states) for name, t in state.items()}

    def operator_flops(self, length: int) -> int:
        return sum(branch.operator_flops(length) for branch in self.branches)

    def forward(self, x: Tensor, state: State | None = None, packing: Packing | None = None) -> tuple[Tensor, State]:
        total, new_state = None, {}
        for index, branch in enumerate(self.branches):
            prefix = f"{index}_"
            own = {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)} if state else None
            y, own = branch(x, own, packing)
            total = y if total is None else torch.addcmul(total, self.gate[index - 1], y)
            new_state |= {prefix + name: t for name, t in own.items()}
        return total, new_state


register(
    "parallel",
    config=ParallelConfig,
    mixer=ParallelMixer,
    title="Mixers side by side behind gates that start at zero",
    paper="arXiv:2411.13676 (parallel heads), arXiv:2003.04887 (the gate)",
    presets={
        "tiny": dict(
            hidden_size=32,
            num_hidden_layers=2,
            vocab_size=256,
            branches=[{"mixer": "transformer", "num_heads": 2, "window": 8, "sinks": 2}, {"mixer": "gla", "num_heads": 2}],
        ),
    },
)
