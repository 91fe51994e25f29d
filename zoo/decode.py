"""Decoding as fast as memory allows: on a GPU a step is recorded once as a CUDA graph and replayed for every further token.

A step of one token is hundreds of small kernels, and launching them one by one takes the host several times as long as the device
needs to run them. `generate` makes a `Steps` where nothing but the kernels of the model would run in a step, and hands it to
`ZooForCausalLM.forward` with every token.
"""

import gc
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache as once
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.nn.modules import module as everywhere

from zoo.block import Block
from zoo.cache import ZooCache, put
from zoo.few_rows import FewRows
from zoo.kernels import dispatch
from zoo.mixer import State

Replay = Callable[[], None]
DEVICE = "cuda"  # whose work can be recorded
ROOM, GRAIN = 512, 256  # tokens for which a state that grows gets room at the least, and steps in which there is more
SMALL = 8  # recordings are kept for later calls while their states are so many times smaller than the weights
PIECE = 2**16  # tokens of all rows that are read at once, where only the last ones' logits are asked for

logger = logging.getLogger(__name__)
_one_at_a_time = threading.Lock()
_kept: "WeakKeyDictionary[nn.Module, dict[int, Recording]]" = WeakKeyDictionary()  # by the number of rows, the oldest first


def obstacle(model: nn.Module) -> str | None:
    """Why steps of this model cannot be recorded, or None."""
    places = {t.device for t in (*model.parameters(), *model.buffers())}
    if len(places) > 1 or next(iter(places)).type != DEVICE:
        return f"it does not lie on one {DEVICE} device"
    if everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks:
        return "hooks are to be called in every step"
    for module in model.modules():
        if module._compiled_call_impl is not None or hasattr(module.forward, "_torchdynamo_orig_callable"):
            return "it is compiled"
        if module._forward_hooks or module._forward_pre_hooks or hasattr(module, "_hf_hook"):
            return "hooks are to be called in every step"
        if getattr(module, "waits_for_device", False):
            return f"{type(module).__name__} waits for the device"
    return None


def record_graph(run: Callable[[], Tensor], device: torch.device) -> tuple[Replay, Tensor]:
    """What `run` enqueues on the device as a CUDA graph, none of it done yet, and its result, renewed by every replay."""
    graph = torch.cuda.CUDAGraph()
    with _one_at_a_time, torch.cuda.device(device):
        current, stream = torch.cuda.current_stream(), _stream(torch.cuda.current_device())
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            try:
                result = _captured(graph, run)
            except RuntimeError:  # a recording that failed leaves the random numbers to a graph, until another one succeeds
                _captured(torch.cuda.CUDAGraph(), lambda: torch.zeros(1, device=device))
                raise
        current.wait_stream(stream)
    return graph.replay, result


def _captured(graph: torch.cuda.CUDAGraph, run: Callable[[], Tensor]) -> Tensor:
    collecting = gc.isenabled()
    gc.disable()  # what is collected may call the driver, which a recording does not survive
    try:
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            return run()
        finally:
            graph.capture_end()
    finally:
        if collecting:
            gc.enable()


@once
def _stream(device: int) -> torch.cuda.Stream:
    """The one to record on: each stream costs a workspace of the matrix library, for good."""
    return torch.cuda.Stream(device)


@dataclass
class Recording:
    """A recorded step: what it reads (`ids`, and `states` and `lengths` of a cache), `logits` that it writes, and for whom.

    counters: tensors of the states whose shape alone counts tokens; room: for how many tokens the states have it; mark: of the model,
    see `fingerprint`; owner: the cache in use.
    """

    replay: Replay
    ids: Tensor
    logits: Tensor
    states: list[State]
    lengths: Tensor
    counters: list[tuple[State, str]]
    room: int
    mark: tuple
    owner: ref

    @property
    def nbytes(self) -> int:
        """Bytes that the states take."""
        return sum(t.nbytes for state in self.states for t in state.values())

    def fits(self, ids: Tensor, cache: ZooCache) -> bool:
        """Whether the recorded step is of this batch and these states."""
        same = all(layer.state is state for layer, state in zip(cache.layers, self.states, strict=True))
        return same and cache.lengths is self.lengths and ids.shape == self.ids.shape

    def step(self, ids: Tensor, cache: ZooCache) -> Tensor:
        """Do it, and on the host what belongs to it: logits `[B, 1, vocabulary]`."""
        self.ids.copy_(ids)
        self.replay()
        for layer in cache.layers:
            layer.seen += 1
        longer: dict[tuple, Tensor] = {}
        for state, name in self.counters:
            t = state[name]
            key = t.shape, t.dtype
            if key not in longer:
                longer[key] = t.new_empty(t.shape[0], t.shape[1] + 1, *t.shape[2:])
            state[name] = longer[key]
        return self.logits.clone()

    def adopt(self, ids: Tensor, cache: ZooCache) -> bool:
        """Move what the cache holds to where this step reads it; whether that is possible."""
        pairs = [(old, layer.state) for old, layer in zip(self.states, cache.layers, strict=True)]
        alike = all(old.keys() == new.keys() and all(_alike(old[n], new[n]) for n in old) for old, new in pairs)
        if not alike or ids.shape != self.ids.shape:
            return False
        for (old, new), layer in zip(pairs, cache.layers, strict=True):
            old.update({name: put(old[name], t) for name, t in new.items()})
            layer.state = old
        cache.lengths = put(self.lengths, cache.lengths)
        self.owner = ref(cache)
        return True


def _alike(old: Tensor, new: Tensor) -> bool:
    return old.dtype == new.dtype and old.device == new.device and (old.shape == new.shape or old.numel() == new.numel() == 0)


def keep(model: nn.Module, recording: Recording) -> None:
    """For later calls with as many rows, unless it is large; where all together are, at the cost of those kept before."""
    kept, allowed = _kept.setdefault(model, {}), sum(p.nbytes for p in model.parameters())
    kept.pop(len(recording.ids), None)
    if SMALL * recording.nbytes > allowed:
        return
    kept[len(recording.ids)] = recording
    while SMALL * sum(one.nbytes for one in kept.values()) > allowed:
        del kept[next(iter(kept))]


def forget(model: nn.Module) -> None:
    """Give back what is kept of a model's earlier calls."""
    _kept.pop(model, None)


class Steps:
    """The decode steps of one model on one cache, recorded at the second and replayed from then on.

    The first runs as it is: kernels compile, and states come to the addresses that they keep. States that grow get room for twice
    the tokens there are, up to `limit`; when that is used up there is more room, another step as it is, and another recording.
    A later call with as many rows takes the recording over, while states are small beside the model; see `forget`.

    Args:
        model: a `ZooForCausalLM`. Its weights and settings must stay what they are.
        limit: no more tokens than this come.
        keep: nobody else refers to the cache, so that its states may be another's afterwards.
    """

    def __init__(self, model: nn.Module, limit: int, keep: bool = False):
        self.model, self.keep = model, keep
        table = model.config.max_position_embeddings
        self.limit = limit if table is None else min(limit, table - model.config.position_offset)
        mixers = enumerate(block.mixer for block in model.model.layers)
        self.growing = [i for i, mixer in mixers if mixer is not None and not mixer.traits.constant_state]
        self.room = 0  # tokens for which the states keep their addresses
        self.refused = False
        self.recording: Recording | None = None

    def __call__(self, ids: Tensor, cache: ZooCache) -> Tensor | None:
        """Logits `[B, 1, vocabulary]` after tokens `[B, 1]`, the cache being one token further; None: run this step as it is."""
        seen = cache.get_seq_length()
        if self.refused or seen >= self.limit or not recordable(ids, cache):
            return None
        if seen >= self.room:
            self.recording = None
            if not self._take_over(ids, cache):
                self.room = self._wanted(seen)
                widen(cache, self.model.model.layers, self.growing, self.room)
                return self._step(ids, cache)
        if self.recording is not None and not self.recording.fits(ids, cache):
            self.recording = None
            return None
        if self.recording is None:
            self._record(ids, cache)
        return None if self.recording is None else self.recording.step(ids, cache)

    def _step(self, ids: Tensor, cache: ZooCache) -> Tensor:
        with FewRows(self.model):
            return self.model.step(ids, cache)

    def _wanted(self, seen: int) -> int:
        """For how many tokens there should be room: a whole number of grains, so that calls of like lengths agree."""
        return -(-min(self.limit, 2 * seen + ROOM) // GRAIN) * GRAIN if self.growing else self.limit

    def _take_over(self, ids: Tensor, cache: ZooCache) -> bool:
        """Go on with what an earlier call recorded, if nobody uses it, nothing has changed and its room is about what is wanted."""
        kept = _kept.get(self.model, {}).pop(len(ids), None) if self.keep and not self.room else None
        if kept is None or kept.owner() is not None or kept.mark != fingerprint(self.model):
            return False
        if self.growing:
            if not cache.get_seq_length() < kept.room <= 2 * self._wanted(cache.get_seq_length()):
                return False
            widen(cache, self.model.model.layers, self.growing, kept.room)
        if not kept.adopt(ids, cache):
            return False
        self.recording, self.room = kept, kept.room if self.growing else self.limit
        keep(self.model, kept)
        return True

    def _record(self, ids: Tensor, cache: ZooCache) -> None:
        """Record a step, the cache being as it was after; or refuse to, from now on."""
        ids, lengths = ids.clone(), cache.lengths
        before = [(layer.state, layer.seen) for layer in cache.layers]
        try:
            replay, logits = record_graph(lambda: self._step(ids, cache), ids.device)
            counters, moved = _compare([state for state, _ in before], [layer.state for layer in cache.layers])
        except (RuntimeError, ValueError) as error:
            moved = f"{type(error).__name__}: {error}"
        for layer, (state, seen) in zip(cache.layers, before, strict=True):
            layer.state, layer.seen = state, seen
        cache.lengths = lengths
        if moved:
            self.refused = True
            logger.warning("decode steps run as they are, launched one by one: recording them failed (%s)", moved)
            return
        states, mark = [state for state, _ in before], fingerprint(self.model)
        self.recording = Recording(replay, ids, logits, states, lengths, counters, self.room, mark, ref(cache))
        if self.keep:
            keep(self.model, self.recording)


def _compare(before: list[State], after: list[State]) -> tuple[list[tuple[State, str]], str]:
    """The tensors whose shape alone counts tokens, and which state left its place during a step, if any did."""
    counters = []
    for index, (old, new) in enumerate(zip(before, after, strict=True)):
        for name, t in old.items():
            if t.numel() == 0 and new[name].shape != t.shape:
                counters.append((old, name))
            elif new[name].shape != t.shape or new[name].data_ptr() != t.data_ptr():
                return [], f"state {name!r} of layer {index} moves"
    return counters, ""


def fingerprint(model: nn.Module) -> tuple:
    """What a recorded step depends on besides its inputs: where the weights are, and how every module is set."""
    places = tuple(t.data_ptr() for t in (*model.parameters(), *model.buffers()))
    settings = tuple(_plain(vars(module)) for module in model.modules())
    return places, settings, _plain(vars(model.config)), dispatch._preferred, torch.is_inference_mode_enabled()


def _plain(value: object) -> object:
    """A value to be compared later: numbers, names and collections of such as they are, anything else by its identity."""
    if isinstance(value, dict):
        return tuple((key, _plain(item)) for key, item in value.items() if key not in ("_parameters", "_buffers", "_modules"))
    if isinstance(value, list | tuple | set):
        return tuple(_plain(item) for item in value)
    return value if isinstance(value, bool | int | float | str | None) else id(value)


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
