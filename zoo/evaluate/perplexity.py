"""How well a language model predicts text."""

import math
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from zoo.generate import begin, check_ids

PIECE = 1024  # positions whose logits are widened to float32 at a time


class TextScore(NamedTuple):
    """What a model makes of texts: the negative log likelihood of all in nats, and how long they are."""

    nats: float
    tokens: int
    words: int
    bytes: int

    @property
    def perplexity(self) -> float:
        return exp(self.nats / self.tokens)

    @property
    def word_perplexity(self) -> float:
        """Comparable between tokenizers, as bits per byte are."""
        return exp(self.nats / self.words)

    @property
    def bits_per_byte(self) -> float:
        return self.nats / self.bytes / math.log(2)


@torch.no_grad()
def text_score(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, texts: list[str], *, length: int = 1024, stride: int | None = None,
    label: str | None = None,
) -> TextScore:  # fmt: skip
    """The likelihood of every token of every text, each given at least the `length - stride` tokens before it, or all there are.

    A text begins with the tokenizer's token for that; where there is none, its first token is context only, and not counted.

    Args:
        model: a causal language model of zoo or of transformers, in evaluation mode.
        length: of the windows; stride: from one to the next, by default half of it.
        label: of a progress bar; None shows none.

    Raises:
        ValueError: no text with a token to predict, or a stride that leaves a gap.
    """
    stride = length // 2 if stride is None else stride
    if not 1 <= stride < length:
        raise ValueError(f"stride is {stride}, it must lie between 1 and length - 1 = {length - 1}")
    first, score = begin(tokenizer), TextScore(0.0, 0, 0, 0)
    encoded = [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in texts]
    progress = tqdm(total=sum(map(len, encoded)), desc=label, unit="tok", disable=label is None, mininterval=1.0)
    for text, ids in zip(texts, encoded, strict=True):
        counted = text if first else tokenizer.decode(ids[1:])
        check_ids(model, ids)
        row = torch.tensor([first + ids], device=next(model.parameters()).device)
        done = 1  # tokens read already, or given
        for start in range(0, max(row.shape[1] - 1, 0), stride):
            if done < row.shape[1]:
                nats = token_nats(model, row[:, start : start + length])[:, done - start - 1 :]
                score = score._replace(nats=score.nats + nats.sum().item(), tokens=score.tokens + nats.numel())
                progress.update(nats.numel())
                done = start + length
        score = score._replace(words=score.words + len(counted.split()), bytes=score.bytes + len(counted.encode()))
    progress.close()
    if not score.tokens or not score.words:
        raise ValueError("the text is empty; give one with at least two words")
    return score


@torch.no_grad()
def nats_by_position(model: nn.Module, rows: Tensor, *, label: str | None = None) -> Tensor:
    """`[T - 1]` float64: the mean over `rows` `[N, T]` of the negative log likelihood of each token after the first, in nats."""
    rows = rows.to(next(model.parameters()).device)
    nats = [token_nats(model, row[None]).cpu().double() for row in tqdm(rows, desc=label, unit="row", disable=label is None)]
    return torch.cat(nats).mean(0)


def by_position(nats: Tensor, length: int) -> dict[tuple[int, int], float]:
    """Perplexity within ranges of positions that double: [0, length/8), [length/8, length/4), ... up to the end.

    Args: nats: of `nats_by_position`; length: of training, say.
    """
    edges = [0, max(length // 8, 2)]
    while edges[-1] <= len(nats):
        edges.append(2 * edges[-1])
    return {
        (start, min(stop, len(nats) + 1)): exp(nats[max(start - 1, 0) : stop - 1].mean().item())  # nats[0] is of position 1
        for start, stop in pairwise(edges)
    }


def token_nats(model: nn.Module, rows: Tensor) -> Tensor:
    """`[N, T - 1]` float32: the negative log likelihood of each token of `rows` `[N, T]` after the first, in nats."""
    logits = model(input_ids=rows, use_cache=False).logits[:, :-1]
    pairs = zip(logits.split(PIECE, dim=1), rows[:, 1:].split(PIECE, dim=1), strict=True)
    return torch.cat([F.cross_entropy(piece.transpose(1, 2).float(), ids, reduction="none") for piece, ids in pairs], dim=1)


@torch.no_grad()
def perplexity(model: nn.Module, rows: Tensor, *, batch: int = 1, label: str | None = None) -> float:
    """`exp` of the mean negative log likelihood of every token after the first of its row.

    Args:
        model: a causal language model of zoo or of transformers; it is left in the mode it was in.
        rows: `[N, T]` int64 token ids, T >= 2; each row is read on its own.
        batch: rows at a time.
        label: of a progress bar; None shows none.

    Raises:
        ValueError: rows of another shape or too short.
    """
    if rows.ndim != 2 or rows.shape[0] == 0 or rows.shape[1] < 2:
        raise ValueError(
            f"rows is {list(rows.shape)}; perplexity needs [rows, tokens] with at least one row of two tokens: the text is too short"
        )
    was_training = model.training
    model.eval()
    total, counted = 0.0, 0
    progress = tqdm(total=rows.numel(), desc=label, unit="tok", disable=label is None, mininterval=1.0)
    for piece in rows.to(next(model.parameters()).device).split(batch):
        total += token_nats(model, piece).sum().item()
        counted += piece[:, 1:].numel()
        progress.set_postfix(ppl=f"{exp(total / counted):.2f}", refresh=False)
        progress.update(piece.numel())
    progress.close()
    model.train(was_training)
    return exp(total / counted)


def exp(mean: float) -> float:
    """`exp`, and infinity where a float cannot hold it."""
    return math.exp(mean) if mean < 709 else math.inf
