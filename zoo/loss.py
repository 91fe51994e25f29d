"""Cross entropy of a language model that never holds the logits of more than a few tokens."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from zoo.layers import wide

LOGITS = 2**24  # held at once: 64 MiB of float32


def chunked_cross_entropy(
    states: Tensor,
    labels: Tensor,
    head: Callable[[Tensor], Tensor],
    vocab_size: int,
    *,
    count: Tensor | int | None = None,
    shift_labels: Tensor | None = None,
) -> Tensor:
    """The mean negative log likelihood of the next token, as `transformers` defines it, in chunks that are computed again for gradients.

    Tokens without a label never reach the head (within `torch.compile`, where their number is not known, they do).

    Args:
        states: `[B, T, D]`, what the head reads.
        labels: `[B, T]`, -100 where there is none; shifted here, unless `shift_labels` `[B, T]` is given, which is not.
        head: `[N, D]` -> logits `[N, vocab_size]`; it is called as it is, so that it may carry an adapter.
        count: what the sum is divided by; by default the number of labels.

    Returns:
        a scalar in float32, of float64 states in float64.
    """
    targets = F.pad(labels[:, 1:], (0, 1), value=-100) if shift_labels is None else shift_labels
    states, targets = states.flatten(0, 1), targets.flatten().to(states.device)
    if not torch.compiler.is_compiling():
        kept = (targets != -100).nonzero().flatten()
        kept = kept if len(kept) else kept.new_zeros(1)  # one without a label, so that every parameter has its gradient of zero
        states, targets = states[kept], targets[kept]
    rows = max(64, LOGITS // vocab_size)
    total = torch.zeros((), device=states.device)
    for part, target in zip(states.split(rows), targets.split(rows), strict=True):
        total = total + checkpoint(_sum, head, part, target, use_reentrant=False, preserve_rng_state=False)
    return total / ((targets != -100).sum() if count is None else count)


def _sum(head: Callable[[Tensor], Tensor], states: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(wide(head(states)), targets, ignore_index=-100, reduction="sum")
