"""Who sees whom, and with what bias: the rules of attention as functions of positions."""

from typing import NamedTuple

import torch
from torch import Tensor


class Rule(NamedTuple):
    """A mask without tensors.

    Args:
        causal: a query sees no later position.
        left, right: how many positions are visible on either side, in units of dilation; None for all of them.
        dilation: only positions a multiple of it away are visible.
        sinks: positions below it are visible from anywhere.
    """

    causal: bool
    left: int | None
    right: int | None
    dilation: int
    sinks: int


def visible(rule: Rule, p: Tensor, j: Tensor, marked_p: Tensor | None, marked_j: Tensor | None) -> Tensor:
    """`[B, Tq, Tk]`: whether the query at position p `[B, Tq]` sees the key at j `[B, Tk]`; marked ones are global."""
    gap = p.unsqueeze(-1) - j.unsqueeze(-2)
    seen = (j >= 0).unsqueeze(-2)
    if rule.causal:
        seen = seen & (gap >= 0)
    near = _near(rule, gap)
    if near is None:
        return seen.expand(gap.shape)
    near = near | (j < rule.sinks).unsqueeze(-2)
    if marked_j is not None:
        near = near | marked_j.unsqueeze(-2) | marked_p.unsqueeze(-1)
    return seen & near


def _near(rule: Rule, gap: Tensor) -> Tensor | None:
    """Whether the window reaches over this gap; None if there is no window."""
    near = None if rule.left is None else (gap <= rule.left * rule.dilation) & (gap >= -rule.right * rule.dilation)
    if rule.dilation == 1:
        return near
    grid = gap % rule.dilation == 0
    return grid if near is None else near & grid


def marked_queries(p: Tensor, j: Tensor, marked: Tensor) -> Tensor:
    """`[B, Tq]`: whether the key at the query's own position is marked."""
    return ((p.unsqueeze(-1) == j.unsqueeze(-2)) & marked.unsqueeze(-2)).any(-1)


def bias(
    gap: Tensor, slopes: Tensor | None, after_p: Tensor | None, after_j: Tensor | None, by_distance: Tensor | None, dtype: torch.dtype
) -> Tensor | None:
    """What is added to the logits, `[B, H, Tq, Tk]`.

    Args:
        gap: p - j, `[B, Tq, Tk]`.
        slopes: `[H]`.
        after_p, after_j: cumulative log forget gates at queries `[B, Tq, H]` and keys `[B, Tk, H]`, float64: only their
            difference is small, and float32 would lose gentle gates behind a strong one.
        by_distance: `[B, Tq, H, R]`.
    """
    total = None
    if slopes is not None:
        total = -slopes.to(dtype)[:, None, None] * gap.abs().unsqueeze(1)
    if after_p is not None:
        forgotten = (after_p.unsqueeze(2) - after_j.unsqueeze(1)).movedim(-1, 1).clamp(max=0).to(dtype)  # later keys are masked
        total = forgotten if total is None else total + forgotten
    if by_distance is not None:
        place = gap.clamp(0, by_distance.shape[-1] - 1).unsqueeze(1)  # keys at negative distances are masked
        own = by_distance.to(dtype).transpose(1, 2)
        own = own.gather(-1, place.expand(*own.shape[:3], gap.shape[-1]))
        total = own if total is None else total + own
    return total


def cumulative(log_forget: Tensor | None, p: Tensor | None, j: Tensor | None, queries: int) -> tuple[Tensor | None, Tensor | None]:
    """Cumulative log forget gates at queries and keys, for keys in the order of their positions."""
    if log_forget is None:
        return None, None
    if p is None:
        after = log_forget.double().cumsum(1)
        return after[:, after.shape[1] - queries :], after
    after = log_forget.double().masked_fill((j < 0).unsqueeze(-1), 0).cumsum(1)
    last = torch.searchsorted(j.cummax(1).values, p.contiguous(), right=True) - 1  # the last key not later than the query
    index = last.clamp(min=0).unsqueeze(-1).expand(-1, -1, after.shape[2])
    return after.gather(1, index), after


def default_positions(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Keys count from 0, queries are the last of them: `[1, Tq]` and `[1, Tk]`."""
    p = torch.arange(k.shape[1] - q.shape[1], k.shape[1], device=k.device)
    return p.unsqueeze(0), torch.arange(k.shape[1], device=k.device).unsqueeze(0)
