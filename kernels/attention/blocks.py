"""Softmax attention of blocks of queries over a few chosen blocks of keys."""

import torch
from torch import Tensor

from zoo.kernels.attention.chunked import Softmax, along_time
from zoo.kernels.checks import Shapes, accumulator, float_dtype
from zoo.kernels.dispatch import Backend, Op

NAME = "block_attention"


def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chosen: Tensor,
    *,
    size: int,
    present: Tensor | None = None,
    scale: float | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, None]:
    """Attention in which each block of queries has a list of the blocks of keys it sees.

        o_p = sum_j c_pj exp(scale q_p . k_j) v_j / sum_j c_pj exp(scale q_p . k_j)

    where c counts how often the block of j is on the list of the block of p; block n holds the positions from `n * size` on.

    Args:
        q: `[B, T, H, K]`; k: `[B, T, G, K]`; v: `[B, T, G, V]`, one floating dtype, any strides. G divides H: head h reads
            group `h // (H / G)`.
        chosen: `[B, N, M]`, for all heads alike, or `[B, H, N, M]` int64: the lists, of blocks from 0 to N - 1, where N is
            `T / size` rounded up. -1 stands for none, and a block on a list twice counts twice.
        size: positions in a block.
        present: `[B, T]` booleans, false for keys that are not seen, such as padding. Default: all are.
        scale: default `1 / sqrt(K)`.
        backend: see `zoo.kernels.dispatch`.

    Returns:
        out `[B, T, H, V]` in the dtype of v, and None, as nothing is carried. A query that sees nothing gets 0.

    Raises:
        ValueError: a shape, dtype or device that breaks the contract, naming the argument.
        BackendError: the backend asked for cannot run here.

    Cost: `2 H T M size (K + V)` FLOP. `chunked` lays the chosen blocks beside each block of queries: memory grows with
    T M, for each head if its lists are its own.

    Source: BigBird arXiv:2007.14062, section 2 and appendix D.
    """
    float_dtype(NAME, q=q, k=k, v=v)
    shapes = Shapes(NAME)
    shapes("q", q, "B T H K")
    shapes("k", k, "B T G K")
    shapes("v", v, "B T G V")
    shapes.not_empty("B", "T", "G")
    shapes.divides("G", "H", "k")
    if size < 1:
        raise ValueError(f"{NAME}: size is {size}, expected 1 or more")
    shapes.sizes["N"] = -(-shapes["T"] // size)
    shapes("chosen", chosen, "B N M", "B H N M", dtype=torch.int64)
    shapes("present", present, "B T", dtype=torch.bool)
    lists = chosen.unsqueeze(1) if chosen.ndim == 3 else chosen
    options = {"size": size, "scale": float(scale if scale is not None else shapes["K"] ** -0.5)}
    return OP({"q": q, "k": k, "v": v, "chosen": lists, "present": present}, options, None, backend)


def reference(q, k, v, chosen, present, size, scale) -> tuple[Tensor, None]:
    """One softmax over all pairs, weighted by how often they are chosen."""
    dtype, acc, length, blocks = v.dtype, accumulator(v.dtype), q.shape[1], chosen.shape[2]
    every = torch.arange(blocks, device=q.device)
    count = (chosen.unsqueeze(-1) == every).sum(-2)  # [B, 1 or H, N, N]
    count = count.repeat_interleave(size, dim=2).repeat_interleave(size, dim=3)[:, :, :length, :length]
    if present is not None:
        count = count * present[:, None, None]
    k, v = (x.to(acc).repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    logits = torch.einsum("bqhk,bshk->bhqs", q.to(acc), k) * scale
    blind = (count == 0).all(-1, keepdim=True)  # sees nothing: given everything for the softmax's sake, then set to 0
    weights = (logits + (count + blind).to(acc).log()).softmax(-1).masked_fill(blind, 0)
    return torch.einsum("bhqs,bshv->bqhv", weights, v).to(dtype), None


def chunked(q, k, v, chosen, present, size, scale) -> tuple[Tensor, None]:
    """Every block of queries beside its keys, as a row of its own; a row for each head if their lists differ."""
    batch, length, heads, _ = q.shape
    rows, blocks = chosen.shape[1:3]
    if rows > 1:
        k, v = (x.repeat_interleave(heads // x.shape[2], dim=2) for x in (k, v))
    if present is None:
        present = torch.ones(batch, length, dtype=torch.bool, device=q.device)
    place = chosen.clamp(min=0)
    first = torch.arange(batch, device=q.device)[:, None, None, None]
    second = torch.arange(rows, device=q.device)[:, None, None]

    def cut(x: Tensor) -> Tensor:
        """`[B, T, H, K] -> [B, rows, N, size, H / rows, K]`."""
        x = along_time(x, 0, blocks * size - length)
        return x.unflatten(2, (rows, -1)).unflatten(1, (blocks, size)).permute(0, 3, 1, 2, 4, 5)

    keys, values = (cut(x)[first, second, place].flatten(3, 4).flatten(0, 2) for x in (k, v))
    there = along_time(present, 0, blocks * size - length).unflatten(1, (blocks, size))
    seen = (there[first, place] & (chosen >= 0).unsqueeze(-1)).flatten(3, 4).flatten(0, 2)
    out, _ = Softmax(scale, None, False)(cut(q).flatten(0, 2), keys, values, seen.unsqueeze(1).expand(-1, size, -1), None)
    out = out.unflatten(0, (batch, rows, blocks)).permute(0, 2, 3, 1, 4, 5)  # [B, N, size, rows, H / rows, V]
    return out.flatten(3, 4).flatten(1, 2)[:, :length], None


def _meta(tensors: dict, options: dict, sequences: int) -> tuple[Tensor, None]:
    q, v = tensors["q"], tensors["v"]
    return v.new_empty(*q.shape[:3], v.shape[3]), None


def _case(*, groups: int, own: bool, padded: bool = False):
    def draw(generator: torch.Generator, batch: int, length: int, dtype: torch.dtype) -> dict:
        def normal(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        heads, size, keys = 4, 7, 6
        blocks = -(-length // size)
        lists = (batch, heads, blocks, 3) if own else (batch, blocks, 4)
        inputs = {"q": normal(batch, length, heads, keys), "k": normal(batch, length, groups, keys)}
        inputs |= {"v": normal(batch, length, groups, 5), "size": size}
        if padded:
            inputs["present"] = torch.rand(batch, length, generator=generator) < 0.7
        return inputs | {"chosen": torch.randint(-1, blocks, lists, generator=generator)}

    return draw


OP = Op(
    NAME,
    reference=reference,
    chunked=chunked,
    tensors=("q", "k", "v", "chosen", "present?"),
    options={"size": "int", "scale": "float"},
    along_time=("q", "k", "v", "present"),
    meta=_meta,
    opaque=False,
    cases={
        "shared": _case(groups=2, own=False),
        "each-head": _case(groups=2, own=True),
        "padded": _case(groups=4, own=False, padded=True),
    },
    call=block_attention,
)
