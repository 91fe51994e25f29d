"""Where padding ends: a padded or packed batch becomes rows without pads, and is put back at the exit."""

import torch
from torch import Tensor

from zoo.kernels.packing import Packing


class Entry:
    """How a batch enters and leaves the layers.

    Exactly one of three things holds: the rows are whole (`packing` is None); pads were cut out, so that one row holds the
    batch's B sequences; or the caller's own row of documents is used as it is.

    Args (of `open`):
        batch, length: of the token ids.
        attention_mask: `[B, T_total]`, nonzero where there is a token; its last `length` columns belong to this call.
        position_ids: `[B, T]`; without mask and cache, positions that start anew mark packed documents.
        cu_seq_lens_q: `[N + 1]` and seq_idx: `[1, total]`: packed documents, as DataCollatorWithFlattening writes them.
        cached: something was seen before; settled: every row has begun, so that a single column is a token and no pad.
    """

    def __init__(self, packing: Packing | None = None, keep: Tensor | None = None):
        self.packing = packing
        self.keep = keep  # [B, T] bool, where pads were cut out

    @classmethod
    def open(cls, batch: int, length: int, attention_mask: Tensor | None, position_ids: Tensor | None,
             cu_seq_lens_q: Tensor | None, seq_idx: Tensor | None, cached: bool, settled: bool) -> "Entry":  # fmt: skip
        documents = _documents(batch, length, attention_mask, position_ids, cu_seq_lens_q, seq_idx, cached)
        if documents is not None:
            if cached:
                raise ValueError("packed documents cannot continue a cache; generate from one sequence per row")
            return cls(documents)
        if attention_mask is None or (length == 1 and settled):  # no look at the mask, which would wait for the device
            return cls()
        if attention_mask.ndim != 2 or attention_mask.shape[0] != batch or attention_mask.shape[1] < length:
            raise ValueError(f"attention_mask is {list(attention_mask.shape)}, expected [{batch}, {length} or more]: one entry per token")
        if torch.compiler.is_compiling():
            raise ValueError("attention_mask cannot be read inside torch.compile; leave it out, or pack the batch (cu_seq_lens_q)")
        keep = attention_mask[:, -length:] != 0
        if bool(keep.all()):
            return cls()
        return cls(Packing.from_lengths(keep.sum(-1)), keep)

    def begun(self) -> bool:
        """Whether every sequence has at least one token in this call."""
        return self.packing is None or min(self.packing.lengths) > 0

    def enter(self, x: Tensor) -> Tensor:
        """`[B, T, ...]` -> the rows the layers see."""
        return x if self.keep is None else x[self.keep].unsqueeze(0)

    def leave(self, x: Tensor) -> Tensor:
        """Back to `[B, T, ...]`, zeros where pads were."""
        if self.keep is None:
            return x
        out = x.new_zeros(*self.keep.shape, *x.shape[2:])
        out[self.keep] = x[0]
        return out

    def ends(self, x: Tensor, last: bool) -> Tensor:
        """The first (or last) token of every sequence of rows the layers see: `[B, D]`, `[N, D]` for N packed documents."""
        if self.packing is None:
            return x[:, -1 if last else 0]
        index = self.packing.cu_seqlens[1:] - 1 if last else self.packing.cu_seqlens[:-1]
        return x[0, index.clamp(0, x.shape[1] - 1)]  # an empty sequence has none, and gets another's

    def counts(self, batch: int, length: int, device) -> Tensor:
        """`[B]`: tokens of every sequence in this call."""
        if self.packing is None:
            return torch.full((batch,), length, dtype=torch.long, device=device)
        return self.packing.cu_seqlens.diff()


def _documents(batch, length, attention_mask, position_ids, cu_seq_lens_q, seq_idx, cached) -> Packing | None:
    """The packing the caller asked for, in whichever of the three ways."""
    if cu_seq_lens_q is None and seq_idx is None and (position_ids is None or attention_mask is not None or cached or length == 1):
        return None
    if cu_seq_lens_q is None and seq_idx is None and torch.compiler.is_compiling():
        raise ValueError("position_ids cannot be read inside torch.compile; leave them out, or pass cu_seq_lens_q")
    if cu_seq_lens_q is not None:
        ends = cu_seq_lens_q.long()
    else:
        marks = seq_idx if seq_idx is not None else (position_ids == 0).cumsum(-1)
        if seq_idx is None and bool((position_ids == torch.arange(length, device=marks.device)).all()):
            return None
        starts = (marks[0, 1:] != marks[0, :-1]).nonzero().flatten() + 1
        ends = torch.cat([starts.new_zeros(1), starts, starts.new_full((1,), length)])
    if batch != 1:
        raise ValueError(f"packed documents lie in one row, but the batch has {batch}; flatten it to [1, total]")
    if seq_idx is None and cu_seq_lens_q is None and not torch.equal(position_ids[0], Packing(ends).positions):
        raise ValueError("position_ids neither count from 0 nor restart at 0 for each packed document; a zoo model counts positions itself")
    return Packing(ends)
