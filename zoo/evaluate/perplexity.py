"""How well a language model predicts text."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm


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
        logits = model(input_ids=piece, use_cache=False).logits
        total += F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), piece[:, 1:].flatten(), reduction="sum").item()
        counted += piece[:, 1:].numel()
        progress.set_postfix(ppl=f"{_exp(total / counted):.2f}", refresh=False)
        progress.update(piece.numel())
    progress.close()
    model.train(was_training)
    return _exp(total / counted)


def _exp(mean: float) -> float:
    """`exp`, and infinity where a float cannot hold it."""
    return math.exp(mean) if mean < 709 else math.inf
