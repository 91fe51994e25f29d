"""Decoding as fast as memory allows: on a GPU a step is recorded once as a CUDA graph and replayed for every further token.

A step of one token is hundreds of small kernels, and launching them one by one takes the host several times as long as the device
needs to run them. `generate` makes a `Steps` where nothing but the kernels of the model would run in a step, and hands it to
`ZooForCausalLM.forward` with every token.
"""

import logging
from collections.abc import Callable
from functools import cache as once

import torch
from torch import Tensor, nn
from torch.nn.modules import module as everywhere

from zoo.block import Block
from zoo.cache import ZooCache
from zoo.mixer import State

Replay = Callable[[], None]
DEVICE = "cuda"  # whose work can be recorded
ROOM = 512  # tokens for which a state that grows gets room at the least
PIECE = 2**16  # tokens of all rows that are read at once, where only the last ones' logits are asked for

logger = logging.getLogger(__name__)


def obstacle(model: nn.Module) -> str | None:
    """Why steps of this model cannot be recorded, or None."""
    places = {t.device for t in (*model.parameters(), *model.buffers())}
    if len(places) > 1 or next(iter(places)).type != DEVICE:
        return f"it does not lie on one {DEVICE} device"
    if everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks:
        return "hooks are to be called in every step"
    for module in model.modules():
        if module._forward_hooks or module._forward_pre_hooks or hasattr(module, "_hf_hook"):
            return "hooks are to be called in every step"
        if getattr(module, "waits_for_device", False):
            return f"{type(module).__name__} waits for the device"
    return None


def record_graph(run: Callable[[], Tensor]) -> tuple[Replay, Tensor]:
    """What `run` enqueues on the current device as a CUDA graph, none of it done yet, and its result, renewed by every replay."""
    graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    stream = _stream(torch.cuda.current_device())
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            result = run()
        finally:
            graph.capture_end()
    current.wait_stream(stream)
    return graph.replay, result


@once
def _stream(device: int) -> torch.cuda.Stream:
    """The one to record on: each stream costs a workspace of the matrix library, for good."""
    return torch.cuda.Stream(device)


class Steps:
    """The decode steps of one model on one cache, recorded at the second and replayed from then on.

    The first runs as it is: kernels compile, and states come to the addresses that they keep. States that grow get room for twice
    the tokens there are, up to `limit`; when that is used up there is more room, another step as it is, and another recording.

    Args:
        model: a `ZooForCausalLM`. Its weights and settings must stay what they are.
        limit: no more tokens than this come.
    """

    def __init__(self, model: nn.Module, limit: int):
        self.model = model
        table = model.config.max_position_embeddings
        self.limit = limit if table is None else min(limit, table - model.config.position_offset)
        mixers = enumerate(block.mixer for block in model.model.layers)
        self.growing = [i for i, mixer in mixers if mixer is not None and not mixer.traits.constant_state]
        self.room = 0  # tokens for which the states keep their addresses
        self.refused = False
        self.replay: Replay | None = None

    def __call__(self, ids: Tensor, cache: ZooCache) -> Tensor | None:
        """Logits `[B, 1, vocabulary]` after tokens `[B, 1]`, the cache being one token further; None: run this step as it is."""
        seen = cache.get_seq_length()
        if self.refused or seen >= self.limit or not recordable(ids, cache):
            return None
        if seen >= self.room:
            self.room, self.replay = min(self.limit, 2 * seen + ROOM) if self.growing else self.limit, None
            widen(cache, self.model.model.layers, self.growing, self.room)
            return None
        if self.replay is not None and not self._fits(ids, cache):
            self.replay = None
            return None
        if self.replay is None:
            self._record(ids, cache)
        if self.refused:
            return None
        self.ids.copy_(ids)
        self.replay()
        self._advance(cache)
        return self.logits.clone()

    def _fits(self, ids: Tensor, cache: ZooCache) -> bool:
        """Whether the recorded step is of this batch and these states."""
        same = all(layer.state is state for layer, state in zip(cache.layers, self.states, strict=True))
        return same and cache.lengths is self.lengths and ids.shape == self.ids.shape

    def _record(self, ids: Tensor, cache: ZooCache) -> None:
        """Record a step, the cache being as it was after; or refuse to, from now on."""
        self.ids, self.lengths = ids.clone(), cache.lengths
        self.states, seen = [layer.state for layer in cache.layers], [layer.seen for layer in cache.layers]
        try:
            self.replay, self.logits = record_graph(lambda: self.model.step(self.ids, cache))
            moved = self._counters([layer.state for layer in cache.layers])
        except (RuntimeError, ValueError) as error:
            moved = f"{type(error).__name__}: {error}"
        for layer, state, count in zip(cache.layers, self.states, seen, strict=True):
            layer.state, layer.seen = state, count
        cache.lengths = self.lengths
        if moved is not None:
            self.refused, self.replay = True, None
            logger.warning("decode steps run as they are, launched one by one: recording them failed (%s)", moved)

    def _counters(self, after: list[State]) -> str | None:
        """Find the tensors whose shape alone counts tokens; a state that left its place is an obstacle, which is returned."""
        self.counters = []
        for index, (old, new) in enumerate(zip(self.states, after, strict=True)):
            for name, t in old.items():
                if t.numel() == 0 and new[name].shape != t.shape:
                    self.counters.append((old, name))
                elif new[name].shape != t.shape or new[name].data_ptr() != t.data_ptr():
                    return f"state {name!r} of layer {index} moves"
        return None

    def _advance(self, cache: ZooCache) -> None:
        """What a step changes on the host."""
        for layer in cache.layers:
            layer.seen += 1
        longer: dict[tuple, Tensor] = {}
        for state, name in self.counters:
            t = state[name]
            key = t.shape, t.dtype
            if key not in longer:
                longer[key] = t.new_empty(t.shape[0], t.shape[1] + 1, *t.shape[2:])
            state[name] = longer[key]


def recordable(ids: Tensor, cache: ZooCache) -> bool:
    """Whether a step of these tokens is a single one without pads and gradients, at one precision."""
    single = ids.shape[1] == 1 and cache.settled
    return single and not (torch.is_grad_enabled() or torch.is_autocast_enabled(ids.device.type) or torch.compiler.is_compiling())


def widen(cache: ZooCache, blocks: nn.ModuleList, growing: list[int], tokens: int) -> None:
    """Room for so many tokens in these layers' states, which keep what they hold."""
    for index in growing:
        layer, block = cache.layers[index], blocks[index]
        layer.state = layer.state | widened(layer.state, block, tokens)


def widened(state: State, block: Block, tokens: int) -> State:
    """Those of a state's tensors that have less room than for so many tokens, with that room: their second dimension is time."""
    shapes = block.initial_state(1, tokens, torch.float32, "meta")
    short = [name for name, t in state.items() if t.numel() and t.ndim > 1 and t.shape[1] < shapes[name].shape[1]]
    if not short:
        return {}
    some = state[short[0]]
    empty = block.initial_state(some.shape[0], tokens, some.dtype, some.device)
    found = {name: empty[name].to(state[name].dtype) for name in short}
    for name, t in found.items():
        t[:, : state[name].shape[1]] = state[name]
    return found


def pieces(batch: int, length: int, keep: int, mask: Tensor | None) -> list[int]:
    """Where to cut a long prompt: the starts of its pieces, `[0]` where it is read at once. The last has the `keep` last tokens.

    Pads in front of all rows belong to the first piece, so that none consists of pads.
    """
    width = max(PIECE // batch, 1)
    if length <= width or keep > width:
        return [0]
    first = 0 if mask is None else int((mask[:, -length:] != 0).any(0).int().argmax())
    return [0, *range(first + width, length - width, width), length - width] if first + width < length else [0]
