"""The contract every architecture fulfils."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from zoo.config import ZooConfig
from zoo.kernels.packing import Packing

State = dict[str, Tensor]
ROLES = ("q_proj", "k_proj", "v_proj", "out_proj")


@dataclass(frozen=True)
class Traits:
    """What a mixer can do. A denied capability raises when asked for; the tests assert that it does.

    Args:
        causal: output t depends on inputs up to t only (with `config.causal`).
        bidirectional: `config.causal = False` is supported.
        constant_state: the state's size does not grow with the sequence.
        carry: `forward` takes and returns a fourth value, a tensor handed from layer to layer within one pass.
        amplifies: outputs are larger than inputs by a factor that grows with the sequence; a norm belongs behind.
        beside: `forward` takes further tensors behind the packing, where the caller of the model gives some. Not with `carry`.
    """

    causal: bool = True
    bidirectional: bool = False
    constant_state: bool = True
    carry: bool = False
    amplifies: bool = False
    beside: bool = False


class Layer(nn.Module):
    """A module that initialises its own parameters and buffers, also after it was built on the meta device."""

    def reset_parameters(self) -> None:
        """Write initial values through `transformers.initialization`, which leaves loaded values alone."""


class Mixer(Layer):
    """A sequence mixer: `x [B, T, D] -> y [B, T, D]`, carrying a state.

    A subclass is built as `Mixer(config, layer)` from its own config class and the index of its layer. It must treat its
    projections as modules (call them, never read their weights), so that adapters and quantised layers can stand in for them.
    """

    traits: ClassVar[Traits] = Traits()
    lora_targets: ClassVar[tuple[str, ...]] = ()  # names of the projections worth adapting
    token_states: ClassVar[tuple[str, ...]] = ("k", "v")  # tensors of the state made of single tokens, unread until those come

    def __init__(self, config: ZooConfig, layer: int):
        super().__init__()
        if not config.causal and not self.traits.bidirectional:
            raise ValueError(f"{type(self).__name__} is causal by nature; set causal=True or choose a bidirectional mixer")
        if config.causal and not self.traits.causal:
            raise ValueError(f"{type(self).__name__} sees the whole sequence by nature; set causal=False or choose a causal mixer")
        self.layer = layer

    def forward(self, x: Tensor, state: State | None = None, packing: Packing | None = None) -> tuple[Tensor, State]:
        """Mix along time: training, prefill and a single step alike.

        Args:
            x: `[B, T, D]`; with `packing` `[1, total, D]`.
            state: what the call before returned; None starts anew. It is consumed: with gradients disabled a mixer may
                write into it. Every tensor has the number of sequences as its first dimension.
            packing: several sequences in one row.

        Returns:
            y like x, and the new state. With the carry trait a fourth argument comes in and a third value goes out.
        """
        raise TypeError(f"{type(self).__name__} does not define forward(x, state, packing)")

    def borrow(self, earlier: "list[Mixer | None]") -> None:
        """Called once the model stands, with the mixers of the layers before: the time to refer to modules of theirs.

        Such a module stays a part of the layer that has it, which alone stores it: keep the reference in a tuple.
        """

    def roles(self) -> dict[str, tuple[str, list[slice]]]:
        """Where queries, keys, values and what was read are projected, so that attention's projections can begin theirs.

        Returns: `q_proj`, `k_proj`, `v_proj`, `out_proj` -> the name of a linear layer, and the rows of it that each are this projection,
            head by head. What is made of neither is left out; what else has rows in one layer with them may have a name of its own.
        """
        return {name: (name, [slice(None)]) for name in ROLES}

    def initial_state(self, batch: int, length: int, dtype: torch.dtype = torch.float32, device="cpu") -> State:
        """The state of nothing seen, with room for `length` tokens; passing it equals passing None.

        On `device="meta"` it tells names, shapes and dtypes at no cost. `dtype` is that of the activations.
        """
        raise TypeError(f"{type(self).__name__} does not define initial_state(batch, length, dtype, device)")

    def state_bytes(self, length: int, dtype: torch.dtype = torch.float32) -> int:
        """Bytes of one sequence's state after `length` tokens."""
        return sum(t.numel() * t.element_size() for t in self.initial_state(1, length, dtype, "meta").values())

    def operator_flops(self, length: int) -> int:
        """FLOPs of the sequence operator over `length` tokens of one sequence, a multiply-add counting two."""
        return 0

    def flops(self, length: int) -> int:
        """FLOPs of a forward pass over one sequence: projections and operator, without norms and activations."""
        linears = sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))
        return 2 * length * linears + self.operator_flops(length)
