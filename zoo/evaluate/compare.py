"""Two language models side by side: how far apart their predictions are, what they make of text that repeats itself, what they write."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from zoo.evaluate.perplexity import PIECE, exp, token_nats

GRAM = 4  # tokens of a phrase whose coming again counts as repetition


class Reading(NamedTuple):
    """Perplexity of all tokens after the first of their row, of those whose bigram was there before in the row, and of the rest.

    Tokens of a repeated bigram can be looked up in the context, which is what recurrent models find hard (Arora et al.,
    arXiv:2312.04927); the rest must be known. None where there are none.
    """

    perplexity: float
    repeated: float | None
    rest: float | None


class Agreement(NamedTuple):
    """Kullback-Leibler divergence of the first model's predictions from the second's, in nats a token, and the share of positions
    at which both find the same token most likely."""

    divergence: float
    top1: float


class Writing(NamedTuple):
    """Greedy continuations beside another model's: the share of tokens that are equal at their place, the mean length up to the first
    that is not, and the share of phrases of four tokens that were there before in the continuation."""

    equal: float
    prefix: float
    repetition: float


def repeated_bigrams(rows: Tensor) -> Tensor:
    """`[N, T - 1]` bool: whether each token of `rows` `[N, T]` after the first ends a bigram that was there before in its row."""
    pairs = rows[:, :-1] * (rows.max() + 1) + rows[:, 1:]
    order = pairs.sort(dim=1, stable=True).indices
    sorted_pairs = pairs.gather(1, order)
    again = torch.zeros_like(pairs, dtype=torch.bool)
    again[:, 1:] = sorted_pairs[:, 1:] == sorted_pairs[:, :-1]
    return torch.zeros_like(again).scatter(1, order, again)


@torch.no_grad()
def read_rows(model: nn.Module, rows: Tensor, *, label: str | None = None) -> Reading:
    """What a model makes of `rows` `[N, T]` of token ids; one row at a time.

    Raises:
        ValueError: no rows of two tokens.
    """
    if rows.ndim != 2 or rows.shape[0] == 0 or rows.shape[1] < 2:
        raise ValueError(f"rows is {list(rows.shape)}; at least one row of two tokens is needed: the text is too short")
    device = next(model.parameters()).device
    rows = rows.to(device)
    nats = torch.cat([token_nats(model, row[None]) for row in tqdm(rows, desc=label, unit="row", disable=label is None)]).double()
    again = repeated_bigrams(rows)
    repeated, rest = (exp(part.mean().item()) if part.numel() else None for part in (nats[again], nats[~again]))
    return Reading(exp(nats.mean().item()), repeated, rest)


@torch.no_grad()
def agreement(teacher: nn.Module, student: nn.Module, rows: Tensor, *, label: str | None = None) -> Agreement:
    """How a student's predictions differ from its teacher's, over all positions of `rows` `[N, T]`."""
    rows, total, same = rows.to(next(student.parameters()).device), 0.0, 0
    for row in tqdm(rows, desc=label, unit="row", disable=label is None):
        wanted, found = (model(input_ids=row[None], use_cache=False).logits[0] for model in (teacher, student))
        for ours, theirs in zip(found.split(PIECE), wanted.split(PIECE), strict=True):
            logs = [F.log_softmax(piece.float(), -1) for piece in (ours, theirs)]
            total += F.kl_div(*logs, log_target=True, reduction="sum").item()
            same += (ours.argmax(-1) == theirs.argmax(-1)).sum().item()
    return Agreement(total / rows.numel(), same / rows.numel())


@torch.no_grad()
def greedy(model: nn.Module, prompts: Tensor, tokens: int) -> Tensor:
    """`[N, tokens]`: what a model finds most likely behind `prompts` `[N, T]`, token by token; it does not stop at an end token."""
    out, written = model(input_ids=prompts, use_cache=True, logits_to_keep=1), []
    for step in range(tokens):
        written.append(out.logits[:, -1:].argmax(-1))
        if step < tokens - 1:
            out = model(input_ids=written[-1], past_key_values=out.past_key_values, use_cache=True)
    return torch.cat(written, dim=1)


def compare_writing(ours: Tensor, theirs: Tensor) -> Writing:
    """Continuations `[N, tokens]` of the same prompts by two models, the first of which is judged."""
    equal = ours == theirs
    prefix = equal.long().cumprod(dim=1).sum(dim=1).double().mean().item()
    phrases = [[tuple(row[i : i + GRAM]) for i in range(len(row) - GRAM + 1)] for row in ours.tolist()]
    count = sum(map(len, phrases))
    again = count - sum(len(set(row)) for row in phrases)
    return Writing(equal.double().mean().item(), prefix, again / max(count, 1))
