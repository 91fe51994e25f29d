"""The states of a model's layers as a transformers cache."""

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

from zoo.mixer import State


class StateLayer(CacheLayerMixin):
    """One layer's state: named tensors, each with the batch as its first dimension."""

    is_compileable = False
    supports_early_init = False

    def __init__(self):
        super().__init__()
        self.state: State | None = None
        self.seen = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise TypeError("a zoo cache holds states, not keys and values; the model fills it")

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        raise TypeError("a zoo cache holds states, not keys and values; the model fills it")

    def store(self, state: State, tokens: int) -> None:
        """Keep `state` after `tokens` more columns: in place where shapes allow and no gradient is wanted."""
        if self.state is not None:
            state |= {name: put(self.state[name], new) for name, new in state.items() if name in self.state}
        self.state = state
        self.is_initialized = True
        self.seen += tokens

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.state, self.seen, self.is_initialized = None, 0, False

    def offload(self) -> None:
        self._map(lambda t: t.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        raise TypeError("a zoo cache does not prefetch; offload a model with device_map instead")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map(lambda t: put(t, t.index_select(0, beam_idx.to(t.device))))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map(lambda t: t[indices.to(t.device)])

    def crop(self, tokens_to_remove: int) -> None:
        raise ValueError("a recurrent state cannot be cropped: what it has absorbed cannot be taken back")

    @property
    def batch_size(self) -> int:
        return next(iter(self.state.values())).shape[0] if self.state else -1

    def _map(self, function) -> None:
        if self.state is not None:
            changed = {name: function(t) for name, t in self.state.items()}
            if any(t is not self.state[name] for name, t in changed.items()):
                self.state = changed


def put(old: Tensor, new: Tensor) -> Tensor:
    """`new`: at the address of `old`, where shapes allow and no gradient is wanted."""
    if old is new or old.shape != new.shape or new.requires_grad or old.requires_grad:
        return new
    return old.copy_(new)


class ZooCache(DynamicCache):
    """One state per layer; select, repeat, reorder, reset and length act on all of them.

    Args:
        layers: number of layers of the model.
        max_length: reserve room for this many tokens at once, so that growing states keep their addresses while decoding.
    """

    def __init__(self, layers: int, max_length: int | None = None):
        Cache.__init__(self, layers=[StateLayer() for _ in range(layers)])
        self.max_length = max_length
        self.lengths: Tensor | None = None  # [B] tokens seen per sequence, pads not counted
        self.settled = False  # every sequence has seen a token: a step need not look at the mask

    def count(self, tokens: Tensor) -> None:
        """Add to the number of tokens seen, `[B]`."""
        self.lengths = tokens.clone() if self.lengths is None else self.lengths.add_(tokens)

    def nbytes(self) -> int:
        """Bytes held by all states."""
        return sum(t.numel() * t.element_size() for layer in self.layers for t in (layer.state or {}).values())

    def reset(self) -> None:
        super().reset()
        self.lengths, self.settled = None, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self.lengths = put(self.lengths, self.lengths[beam_idx.to(self.lengths.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.lengths = self.lengths.repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.lengths = self.lengths[indices.to(self.lengths.device)]


def check_cache(cache, layers: int) -> ZooCache:
    """The cache, or an error that says how to make a right one."""
    if not isinstance(cache, ZooCache):
        raise TypeError(f"past_key_values is a {type(cache).__name__}; pass a zoo.ZooCache({layers}) or what the model returned")
    if len(cache.layers) != layers:
        raise ValueError(f"past_key_values has {len(cache.layers)} layers, the model {layers}")
    return cache


def provide_cache(generation_config, model_kwargs: dict, layers: int, length: int) -> bool:
    """Put among what `generate` calls a model with a cache of the kind it asks for, unless there is one; whether this did.

    Raises:
        ValueError: a kind of cache that does not suit.
    """
    kind = generation_config.cache_implementation
    if kind not in (None, "dynamic", "static"):
        raise ValueError(f"cache_implementation={kind!r} does not suit a zoo model; use 'dynamic' or 'static'")
    if model_kwargs.get("past_key_values") is not None:
        return False
    model_kwargs["past_key_values"] = ZooCache(layers, length + 1 if kind == "static" else None)
    return True


def room(state: State | None, block, cache: ZooCache | None, batch: int, dtype: torch.dtype, device) -> State | None:
    """The state a layer starts from: with a reserving cache, buffers of their final size at the first call."""
    if state is None and cache is not None and cache.max_length is not None:
        return block.initial_state(batch, cache.max_length, dtype, device)
    return state
