"""One layer of a model: a sequence mixer and a channel mixer, each around a residual, or one of the two alone."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

from zoo import registry
from zoo.config import ZooConfig
from zoo.kernels.packing import Packing
from zoo.layers import make_norm
from zoo.mixer import Layer, State

CHANNEL = "channel_"  # prefix of the channel mixer's share of the state


class Start(Layer):
    """A learned state to begin from: whatever of a block's state does not hold single tokens, at first empty as ever.

    Args: initial_state: of the block, `(batch, length, dtype, device) -> State`; token_states: see `Mixer`.
    """

    def __init__(self, initial_state: Callable[..., State], token_states: tuple[str, ...]):
        super().__init__()
        self.initial_state = initial_state
        empty = initial_state(1, 0, torch.float32, "meta")
        fixed = [name for name, t in empty.items() if t.is_floating_point() and t.numel() and name.split("_")[-1] not in token_states]
        self.values = nn.ParameterDict({name: nn.Parameter(torch.empty(empty[name].shape)) for name in fixed})
        self.reset_parameters()

    def reset_parameters(self) -> None:
        empty = self.initial_state(1, 0, torch.float32, "cpu")
        for name, value in self.values.items():
            init.copy_(value, empty[name])

    def forward(self, state: State) -> State:
        """An empty state of any number of sequences, filled."""
        return state | {name: value.to(state[name].dtype).expand_as(state[name]).clone() for name, value in self.values.items()}


class Block(GradientCheckpointingLayer):
    """`x + mixer(norm(x))`, then `x + channel_mixer(norm(x))`; without a channel mixer, or a mixer, the other half alone.

    With `post_norm` the norms follow the sums, with `output_norms` there are two more on what the mixers return (Gemma 2,
    arXiv:2408.00118), and with `parallel_residual` the block is `x + mixer(norm(x)) + channel_mixer(norm'(x))` (GPT-NeoX,
    arXiv:2204.06745). Without `input_norms` only those behind remain, without `first_norm` the first mixer reads the embeddings
    as they are, and `residual_weights` weigh both sides of the sums.
    After `learn_state` every sequence begins from a learned state.
    """

    def __init__(self, config: ZooConfig, layer: int):
        super().__init__()
        if not config.name and config.channel_mixer is None:
            raise ValueError(f"layer {layer} has neither a mixer nor a channel mixer; give it one of them")
        self.post_norm, self.parallel = config.post_norm, config.parallel_residual
        self.weights = config.residual_weights
        self.mixer = None
        if config.name:
            self.mixer = registry.mixer_class(config.name)(config, layer)
            self.mixer_norm = self._input_norm(config) if layer or config.first_norm else nn.Identity()
            self.mixer_output_norm = self._output_norm(config)
        self.channel_mixer = None
        if config.channel_mixer is not None:
            self.channel_mixer = registry.get_channel_mixer(config.channel_mixer)(config, **config.channel_args or {})
            self.channel_norm = self._input_norm(config)
            self.channel_output_norm = self._output_norm(config)
        self.start = None

    def learn_state(self) -> None:
        """From now on begin from a learned state, at first that of nothing seen. A state of single tokens stays as it is."""
        start = Start(self._empty_state, () if self.mixer is None else self.mixer.token_states)
        self.start = start if start.values else None

    @staticmethod
    def _input_norm(config: ZooConfig) -> nn.Module:
        return make_norm(config.norm, config.hidden_size, config.norm_eps) if config.input_norms else nn.Identity()

    @staticmethod
    def _output_norm(config: ZooConfig) -> nn.Module:
        return make_norm(config.norm, config.hidden_size, config.norm_eps) if config.output_norms else nn.Identity()

    def forward(
        self, x: Tensor, state: State | None = None, packing: Packing | None = None, carry: Tensor | None = None, *beside: Tensor
    ) -> tuple[Tensor, State, Tensor | None]:
        if state is None and self.start is not None:
            kind = x.device.type
            dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
            state = self.initial_state(x.shape[0] if packing is None else packing.count, 0, dtype, x.device)
        mixer_state, channel_state = split_state(state)
        before, new_state = x, {}
        if self.mixer is not None:
            inner = x if self.post_norm else self.mixer_norm(x)
            if self.mixer.traits.carry:
                y, new_state, carry = self.mixer(inner, mixer_state, packing, carry)
            else:
                y, new_state = self.mixer(inner, mixer_state, packing, *(beside if self.mixer.traits.beside else ()))
            x = self._add(x, self.mixer_output_norm(y), 0)
            x = self.mixer_norm(x) if self.post_norm else x
        if self.channel_mixer is not None:
            inner = before if self.parallel else x
            y, channel_state = self.channel_mixer(inner if self.post_norm else self.channel_norm(inner), channel_state, packing)
            x = self._add(x, self.channel_output_norm(y), 2)
            x = self.channel_norm(x) if self.post_norm else x
            new_state = new_state | {CHANNEL + name: t for name, t in channel_state.items()}
        return x, new_state, carry

    def _add(self, x: Tensor, y: Tensor, first: int) -> Tensor:
        """The residual sum, with the weights at `first` where there are any."""
        return x + y if self.weights is None else self.weights[first] * x + self.weights[first + 1] * y

    def initial_state(self, batch: int, length: int, dtype, device) -> State:
        """The joint state of both mixers, learned where it is; see `Mixer.initial_state`."""
        state = self._empty_state(batch, length, dtype, device)
        return state if self.start is None or torch.device(device).type == "meta" else self.start(state)

    def _empty_state(self, batch: int, length: int, dtype, device) -> State:
        state = {} if self.mixer is None else self.mixer.initial_state(batch, length, dtype, device)
        if self.channel_mixer is None:
            return state
        channel = self.channel_mixer.initial_state(batch, length, dtype, device)
        return state | {CHANNEL + name: t for name, t in channel.items()}


def split_state(state: State | None) -> tuple[State | None, State | None]:
    """The mixer's and the channel mixer's share."""
    if state is None:
        return None, None
    channel = {name.removeprefix(CHANNEL): t for name, t in state.items() if name.startswith(CHANNEL)}
    return {name: t for name, t in state.items() if not name.startswith(CHANNEL)}, channel
