"""What a model finds again in its context: a passkey, a fact among other text, a sequence to copy.

Answers are scored without generating: an answer counts if each of its tokens is the most likely one behind the prompt and the
tokens before it, which is when greedy decoding would write it.
"""

import inspect
import random

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from zoo.generate import begin

GRASS = " The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
KEYS = ("amber", "copper", "harbour", "lantern", "meadow", "orchard", "saddle", "violin")
# kind: opening, what is hidden, what is asked; passkeys as in Mohtashami and Jaggi, arXiv:2305.16300, needles as in RULER, arXiv:2404.06654
PROBES = {
    "passkey": (
        "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. I will quiz you about the "
        "important information there.\n",
        "\nThe pass key is {number}. Remember it. {number} is the pass key.\n",
        "\nWhat is the pass key? The pass key is",
    ),
    "needle": (
        "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about the number "
        "afterwards.\n",
        " One of the special magic numbers for {key} is: {number}.",
        "\nWhat is the special magic number for {key} mentioned in the provided text? The special magic number for {key} mentioned in "
        "the provided text is:",
    ),
}


def retrieval(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, kind: str, lengths: list[int], depths: list[float], *, haystack: str = GRASS,
    trials: int = 4, seed: int = 0, label: str | None = None,
) -> list[list[float]]:  # fmt: skip
    """The share of right answers, a row for each length, a column for each depth.

    Args:
        model: a causal language model of zoo or of transformers, in evaluation mode.
        kind: "passkey" or "needle".
        lengths: of prompt and answer together, in tokens.
        depths: where the secret lies: 0 at the beginning, 1 right before the question.
        haystack: the text around it, repeated as often as needed.
        trials: secrets for each cell.
        label: of a progress bar; None shows none.

    Raises:
        ValueError: another kind, a length that has no room for the question, a depth outside 0 to 1, or an empty haystack.
    """
    if kind not in PROBES:
        raise ValueError(f"no probe {kind!r}; choose one of {', '.join(PROBES)}")
    if not all(0 <= depth <= 1 for depth in depths):
        raise ValueError(f"depths are {depths}, each must lie between 0 and 1")
    if trials < 1 or not lengths or not depths:
        raise ValueError(f"trials is {trials}, lengths are {lengths}, depths are {depths}: at least one of each is needed")
    draw = random.Random(seed)
    progress = tqdm(total=len(lengths) * len(depths) * trials, desc=label, unit="prompt", disable=label is None)
    grid = []
    for length in lengths:
        grid.append([])
        for depth in depths:
            found = 0
            for _ in range(trials):
                prompt, answer = probe(tokenizer, kind, length, depth, haystack, draw)
                found += all(guesses(model, prompt, answer))
                progress.update()
            grid[-1].append(found / trials)
    progress.close()
    return grid


def shortest(tokenizer: PreTrainedTokenizerBase, kind: str) -> int:
    """Tokens of the shortest prompt of a kind, whichever number is hidden."""
    texts = [text.format(number=number, key=key) for text in (*PROBES[kind], " {number}") for key in KEYS for number in (10000, 98765)]
    sizes = [len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) for text in texts]
    each = 2 * len(KEYS)
    return len(begin(tokenizer)) + sum(max(sizes[i : i + each]) + 4 for i in range(0, len(sizes), each))


def probe(
    tokenizer: PreTrainedTokenizerBase, kind: str, length: int, depth: float, haystack: str, draw: random.Random
) -> tuple[list, list]:
    """Token ids of a prompt and of its answer, `length` in all."""
    fields = {"number": draw.randint(10000, 99999), "key": draw.choice(KEYS)}

    def ids(text: str) -> list[int]:
        return tokenizer(text.format(**fields), add_special_tokens=False, verbose=False)["input_ids"]

    opening, hidden, question = map(ids, PROBES[kind])
    answer, opening = ids(" {number}"), begin(tokenizer) + opening
    room = length - sum(map(len, (opening, hidden, question, answer)))
    if room < 0:
        raise ValueError(f"length {length} is too short for a {kind}: the question alone takes {length - room} tokens")
    hay = tokenizer(haystack, add_special_tokens=False, verbose=False)["input_ids"]
    if not hay:
        raise ValueError("the haystack is empty; give some text")
    hay = (hay * (room // len(hay) + 1))[:room]
    cut = round(depth * room)
    return opening + hay[:cut] + hidden + hay[cut:] + question, answer


def copying(
    model: nn.Module, vocabulary: list[int], distances: list[int], *, span: int = 32, cue: int = 8, trials: int = 4, seed: int = 0,
    first: list[int] | None = None, label: str | None = None,
) -> list[float]:  # fmt: skip
    """For each distance the share of tokens that are right when a random span of them comes again.

    Args:
        model: as in `retrieval`.
        vocabulary: token ids to draw from, evenly and each anew.
        distances: tokens from the span's beginning to its repetition, `span` or more; those between are random too.
        cue: tokens of the repetition that are only given.
        first: token ids to begin with.

    Raises:
        ValueError: a distance that is shorter than the span, or a cue that is as long.
    """
    if not 1 <= cue < span or min(distances) < span or trials < 1:
        raise ValueError(f"distances {distances}, span {span}, cue {cue}, trials {trials}: each distance must be at least the span, "
                         "which must be longer than the cue; and both cue and trials at least 1")  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    shares = []
    for distance in tqdm(distances, desc=label, unit="distance", disable=label is None):
        right = []
        for _ in range(trials):
            ids = torch.tensor(vocabulary)[torch.randint(len(vocabulary), (distance,), generator=generator)].tolist()
            right += guesses(model, (first or []) + ids + ids[:cue], ids[cue:span])
        shares.append(sum(right) / len(right))
    return shares


@torch.no_grad()
def guesses(model: nn.Module, prompt: list[int], answer: list[int]) -> list[bool]:
    """For each token of `answer` whether the model finds it the most likely one, given all before it."""
    keep = len(answer) + 1
    fewer = {"logits_to_keep": keep} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    ids: Tensor = torch.tensor([prompt + answer], device=next(model.parameters()).device)
    logits = model(input_ids=ids, use_cache=False, **fewer).logits
    return (logits[0, -keep:-1].argmax(-1) == ids[0, 1 - keep :]).tolist()
