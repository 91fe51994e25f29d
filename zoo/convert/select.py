"""Which layers keep attention: a score for each, by a signal with a name, and the choice that scores highest.

    uniform   none: at even distances, the control
    window    the teacher's predictions change when one layer alone sees only a window
    bypass    ... when one layer's mixer is left out
    swap      ... when one layer's attention is replaced by the aligned mixer (SMART, as in Zebra-Llama)
    restore   a student that has given up attention everywhere comes nearer its teacher when one layer gets it back (arXiv:2512.20569)
    both      what the first layer to lose its view costs and what the first to get it back is worth: the shares of window and restore
    recall    a swap costs more of what is looked up in the context than of all else (HALO, arXiv:2601.22156)

`swap` and `recall` read a student whose every layer was aligned, `restore` reads it or, where there is none, the teacher with a window in
every layer; that one alignment serves hybrids of any ratio (`hybrid`).
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from zoo import registry
from zoo.auto import model_class
from zoo.config import nearest
from zoo.convert.student import attention_entry, converted_layers
from zoo.mixer import Traits
from zoo.models.hybrid import HybridConfig

SIGNALS = ("uniform", "window", "bypass", "swap", "restore", "both", "recall")
ALIGNED = ("swap", "recall")  # those that need an aligned student
FLOOR, LARGEST = 1e-4, 50.0  # of the ratio: what its denominator is at least, and the highest score it gives


class Silent(nn.Module):
    """A mixer that adds nothing."""

    traits = Traits()

    def forward(self, x: Tensor, state=None, packing=None) -> tuple[Tensor, dict]:
        return torch.zeros_like(x), {}


# -- scores --------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def layer_scores(
    signal: str, teacher: nn.Module, rows: Tensor, *, aligned: nn.Module | None = None, window: int = 64, sinks: int = 4, seed: int = 0,
    label: str | None = None,
) -> list[float]:  # fmt: skip
    """For each layer how much speaks for keeping its attention.

    Args:
        signal: of `SIGNALS`.
        teacher: a zoo transformer language model.
        rows: `[N, T]` token ids of text.
        aligned: a student of it whose every layer was replaced and aligned, for the signals that read one.
        window, sinks: of the signals "window" and "both", and of "restore" without an aligned student.
        seed: of what is copied for "recall".
        label: of a progress bar; None shows none.

    Raises:
        ValueError: another signal, no aligned student or one that does not fit, rows that are too short.
    """
    if signal not in SIGNALS:
        raise ValueError(f"no signal {signal!r}{nearest(signal, SIGNALS)}; choose one of {', '.join(SIGNALS)}")
    rows = rows.to(teacher.device)
    if signal == "uniform":
        return [0.0] * len(teacher.model.layers)
    if signal == "window":
        return window_sensitivity(teacher, rows, window=window, sinks=sinks, label=label)
    if signal == "bypass":
        return divergences(teacher, rows, (Silent() for _ in teacher.model.layers), label=label)
    if signal == "both":
        options = {"aligned": aligned, "window": window, "sinks": sinks, "label": label}
        found = [torch.tensor(layer_scores(one, teacher, rows, **options), dtype=torch.float64) for one in ("window", "restore")]
        return sum(scores / scores.abs().sum() for scores in found).tolist()
    if signal == "restore" and aligned is None:
        check_rows(rows, window)
        narrow = list(narrowed(teacher, window, sinks))
        return restorations(teacher, rows, teacher, narrow, start=2 * window, label=label)
    mixers = aligned_mixers(teacher, aligned, signal)
    if signal == "swap":
        return divergences(teacher, rows, mixers, label=label)
    if signal == "restore":
        return restorations(teacher, rows, aligned, mixers, label=label)
    return recall_ratio(teacher, rows, mixers, seed=seed, label=label)


def restorations(
    teacher: nn.Module, rows: Tensor, base: nn.Module, mixers: list[nn.Module], *, start: int = 0, label: str | None = None
) -> list[float]:
    """For each layer how much nearer the teacher's predictions come when it alone has attention, and all others these mixers.

    Args: base: what the mixers stand in, the teacher or an aligned student; start: the first position that counts.
    """
    attention = [block.mixer for block in teacher.model.layers]
    expected = F.log_softmax(teacher._logits(teacher.model(rows, use_cache=False).last_hidden_state[:, start:]).float(), -1)
    with ExitStack() as given_up:
        for block, mixer in zip(base.model.layers, mixers, strict=True):
            given_up.enter_context(in_place(block, mixer))
        whole = divergence(base._logits(base.model(rows, use_cache=False).last_hidden_state[:, start:]), expected)
        return [whole - one for one in divergences(base, rows, attention, start=start, expected=expected, label=label)]


def aligned_mixers(teacher: nn.Module, aligned: nn.Module | None, signal: str) -> list[nn.Module]:
    """The mixers of an aligned student, one for each layer of the teacher."""
    if aligned is None:
        raise ValueError(
            f"the signal {signal!r} reads a student whose every layer was aligned: make one with `run --keep-attention 0 --stages align`"
        )
    count = len(teacher.model.layers)
    if converted_layers(aligned) != list(range(count)):
        raise ValueError(
            f"the aligned student has replaced {len(converted_layers(aligned))} of {count} layers; align all: --keep-attention 0"
        )
    if any(block.mixer.traits.carry for block in aligned.model.layers):
        name = aligned.config.plan[0]["mixer"]
        raise ValueError(f"{name} hands values from layer to layer, so one layer alone cannot be swapped; choose uniform, window or bypass")
    return [block.mixer for block in aligned.model.layers]


def divergences(
    base: nn.Module, rows: Tensor, mixers: Iterable[nn.Module], *, start: int = 0, expected: Tensor | None = None, label: str | None = None
) -> list[float]:
    """For each layer the divergence of the predictions from `expected` when it alone has another mixer, in nats per token.

    Each layer is probed from the hidden states that reach it, so a probe costs the layers above it only.

    Args:
        base: the model; mixers: one for each of its layers.
        start: the first position that counts.
        expected: log-probabilities `[N, T - start, vocabulary]`; None: those of `base`.
    """
    out = base.model(rows, use_cache=False, output_hidden_states=True)
    if expected is None:
        expected = F.log_softmax(base._logits(out.last_hidden_state[:, start:]).float(), -1)
    states = one_by_one(base, out.hidden_states, mixers, label)
    return [divergence(base._logits(x[:, start:]), expected) for x in states]


def one_by_one(base: nn.Module, hidden: Sequence[Tensor], mixers: Iterable[nn.Module], label: str | None) -> Iterator[Tensor]:
    """The final states with each layer's mixer replaced in turn."""
    layers = base.model.layers
    for index, mixer in enumerate(tqdm(mixers, desc=label, unit="layer", total=len(layers), disable=label is None)):
        with in_place(layers[index], mixer):
            x = hidden[index]
            for block in layers[index:]:
                x = block(x)[0]
        yield base.model.norm(x)


@contextmanager
def in_place(block: nn.Module, mixer: nn.Module) -> Iterator[None]:
    kept, block.mixer = block.mixer, mixer
    try:
        yield
    finally:
        block.mixer = kept


def divergence(logits: Tensor, expected: Tensor) -> float:
    """Kullback-Leibler divergence from log-probabilities `expected`, in nats per token."""
    found = F.log_softmax(logits.float(), -1)
    return F.kl_div(found, expected, log_target=True, reduction="sum").item() / found.shape[:2].numel()


@torch.no_grad()
def window_sensitivity(teacher: nn.Module, rows: Tensor, *, window: int, sinks: int, label: str | None = None) -> list[float]:
    """How much the teacher's predictions change when one layer alone sees only a window: the swap that conversion makes at its start.

    Args:
        teacher: a zoo transformer language model.
        rows: `[N, T]` token ids; only positions from 2 `window` on are compared (where the window hides something).

    Returns:
        for each layer the mean Kullback-Leibler divergence, in nats per token.

    Raises:
        ValueError: rows no longer than 2 `window`.
    """
    check_rows(rows, window)
    return divergences(teacher, rows, narrowed(teacher, window, sinks), start=2 * window, label=label)


def check_rows(rows: Tensor, window: int) -> None:
    """Raise ValueError for rows that a window hides little of."""
    if rows.shape[1] <= 2 * window:
        raise ValueError(f"rows of {rows.shape[1]} tokens are too short to probe a window of {window}; they need more than {2 * window}")


def narrowed(teacher: nn.Module, window: int, sinks: int) -> Iterator[nn.Module]:
    """The attention of each layer with the same weights and a window."""
    for index, layer in enumerate(teacher.config.layer_configs()):
        entry = attention_entry(layer, window=window, sinks=sinks)
        entry.pop("mixer")
        narrow = registry.get(layer.name).mixer(type(layer)(**layer.shared_fields() | entry), index).to(teacher.device, teacher.dtype)
        narrow.load_state_dict(teacher.model.layers[index].mixer.state_dict(), assign=True)
        yield narrow


def recall_ratio(teacher: nn.Module, rows: Tensor, mixers: list[nn.Module], *, seed: int = 0, label: str | None = None) -> list[float]:
    """What a swap costs of recall over what it costs of everything else.

    Recall is the mean probability of the right token while half a row of random tokens is repeated, all else that of the tokens of
    the text; each cost is counted from the best layer.
    """
    half = rows.shape[1] // 2
    if half < 2:
        raise ValueError(f"rows of {rows.shape[1]} tokens are too short to copy half of; give at least 4")
    drawn = torch.randint(teacher.config.vocab_size, (len(rows), half), generator=torch.Generator().manual_seed(seed)).to(rows.device)
    costs = []
    for ids, start in ((drawn.repeat(1, 2), half), (rows, 1)):
        hidden = teacher.model(ids, use_cache=False, output_hidden_states=True).hidden_states
        right = torch.tensor([probability(teacher, x, ids, start) for x in one_by_one(teacher, hidden, mixers, label)])
        costs.append(right.max() - right)
    recall, rest = costs
    return (recall / rest.clamp_min(FLOOR)).clamp_max(LARGEST).tolist()


def probability(model: nn.Module, states: Tensor, ids: Tensor, start: int) -> float:
    """The mean probability of the tokens from `start` on."""
    found = F.softmax(model._logits(states[:, start - 1 : -1]).float(), -1)
    return found.gather(-1, ids[:, start:, None]).mean().item()


# -- choice --------------------------------------------------------------------------------------------------------------


def even(layers: int, count: int) -> tuple[int, ...]:
    """`count` layers at even distances, from the middle of the first stretch on."""
    return tuple(int((i + 0.5) * layers / count) for i in range(count))


def select_layers(signal: str, scores: list[float], count: int, *, must_keep: Iterable[int] = (), min_gap: int = 1) -> list[int]:
    """Indices of the layers that stay, in order of depth; for "uniform" those of `even` where nothing else binds."""
    if signal == "uniform":
        places = even(len(scores), count) if count else ()
        scores = [-float(min((abs(index - place) for place in places), default=0)) for index in range(len(scores))]
    return most_sensitive(scores, count, must_keep=must_keep, min_gap=min_gap)


def most_sensitive(scores: list[float], count: int, *, must_keep: Iterable[int] = (), min_gap: int = 1) -> list[int]:
    """Indices of `count` layers with the highest scores in sum, in order of depth.

    Args:
        must_keep: indices that are among them.
        min_gap: how far apart any two are at least; 1: neighbours may both stay.

    Raises:
        ValueError: so many layers there are not, or not at this distance.
    """
    must, total = set(must_keep), len(scores)
    if not 0 <= count <= total:
        raise ValueError(f"cannot keep {count} of {total} layers")
    if wrong := [index for index in must if not 0 <= index < total]:
        raise ValueError(f"must_keep names layers {sorted(wrong)}; there are 0 to {total - 1}")
    if min_gap < 1:
        raise ValueError(f"min_gap is {min_gap}; two layers are at least 1 apart")
    nothing: tuple[float, list[int]] = (0.0, [])
    # best[i][c]: of the layers before i, c of them kept; None where that cannot be
    best: list[list[tuple[float, list[int]] | None]] = [[nothing] + [None] * count]
    for index, score in enumerate(scores):
        before = best[max(0, index + 1 - min_gap)]
        skipped = must & set(range(max(0, index + 1 - min_gap), index))
        row = [None if index in must else found for found in best[index]]
        for c in range(1, count + 1):
            if before[c - 1] is not None and not skipped:
                value, chosen = before[c - 1]
                if row[c] is None or value + score > row[c][0]:
                    row[c] = (value + score, [*chosen, index])
        best.append(row)
    if best[-1][count] is None:
        raise ValueError(f"cannot keep {count} of {total} layers with {sorted(must)} among them, {min_gap} apart; ask for fewer or nearer")
    return best[-1][count][1]


def selection(
    signal: str, teacher: nn.Module, rows: Tensor, counts: Iterable[int], *, must_keep: Iterable[int] = (), min_gap: int = 1, **asked
) -> dict:
    """Scores of all layers, and for each number of layers which would stay, by them and at even distances.

    Args: asked: of `layer_scores`; the others of `select_layers`.
    """
    scores, must = layer_scores(signal, teacher, rows, **asked), sorted(must_keep)
    kept = {count: select_layers(signal, scores, count, must_keep=must, min_gap=min_gap) for count in sorted(counts)}
    even_spread = {count: select_layers("uniform", scores, count, must_keep=must, min_gap=min_gap) for count in kept}
    return {"signal": signal, "scores": scores, "kept": kept, "uniform": even_spread, "must_keep": must, "min_gap": min_gap}


# -- what the choice makes -------------------------------------------------------------------------------------------------


def hybrid(teacher: nn.Module, aligned: nn.Module, kept: Iterable[int], **changes) -> nn.Module:
    """A student with the teacher's attention in the layers `kept`, and everything else as in the aligned student.

    Args: changes: fields of that attention's config that are to be others (`rope_theta=None`).

    Raises:
        ValueError: a layer to keep that was never replaced, or that there is not.
    """
    kept, plan = sorted(set(kept)), list(aligned.config.plan)
    layers = teacher.config.layer_configs()
    if wrong := [index for index in kept if not 0 <= index < len(layers)]:
        raise ValueError(f"layers {wrong} cannot be kept, the teacher has 0 to {len(layers) - 1}")
    for index in kept:
        plan[index] = attention_entry(layers[index], **changes)
    config = HybridConfig(**teacher.config.shared_fields() | {"tie_word_embeddings": aligned.config.tie_word_embeddings}, plan=plan)
    with torch.device(aligned.device):
        student = model_class(config, "causal_lm")(config).to(aligned.dtype)
    restored = tuple(f"model.layers.{index}.mixer." for index in kept)
    state = {name: weight for name, weight in aligned.state_dict().items() if not name.startswith(restored)}
    state |= {name: weight for name, weight in teacher.state_dict().items() if name.startswith(restored)}
    student.load_state_dict(state)
    student.generation_config = aligned.generation_config
    return student.eval()
