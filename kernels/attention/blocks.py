"""Softmax attention of queries over a few chosen blocks of keys."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from zoo.kernels.attention import rules
from zoo.kernels.attention.chunked import Softmax, along_time
from zoo.kernels.checks import Shapes, accumulator, float_dtype
from zoo.kernels.dispatch import Backend, Op

NAME = "block_attention"
WIDEST = 256  # channels of a head that the fused kernels take
GATHERED = 1 << 24  # numbers of keys laid beside queries at once
PAIRS = 1 << 24  # of queries and keys at once, over batch and heads, where all pairs are looked at
REUSE = 16  # a key that many queries share costs each this much less than one copied for it alone


def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chosen: Tensor,
    *,
    size: int,
    query_size: int | None = None,
    causal: bool = False,
    q_positions: Tensor | None = None,
    present: Tensor | None = None,
    scale: float | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, None]:
    """Attention in which each block of queries has a list of the blocks of keys it sees.

        o_p = sum_j c_pj exp(scale q_p . k_j) v_j / sum_j c_pj exp(scale q_p . k_j)

    where c counts how often the block of j is on the list of the block of p; block n holds the keys from `n * size` on.

    Args:
        q: `[B, Tq, H, K]`; k: `[B, Tk, G, K]`; v: `[B, Tk, G, V]`, one floating dtype, any strides. G divides H: head h reads
            group `h // (H / G)`.
        chosen: `[B, N, M]`, for all heads alike, or `[B, R, N, M]` int64 with R = G, a list for each group, or R = H, for each
            head. These are the lists, of blocks from 0 to `Tk / size` (rounded up) less 1, for N blocks of queries, which is
            `Tq / query_size` rounded up. -1 stands for none, and a block on a list twice counts twice.
        size: keys in a block.
        query_size: queries in a block; 1: each has a list of its own. Default: `size`.
        causal: of the blocks on its list a query sees the keys up to its own position only; a key's position is its index.
        q_positions: `[B, Tq]` int64, for causal attention; a query at a negative one sees nothing. Default: the last Tq of Tk.
        present: `[B, Tk]` booleans, false for keys that are not seen, such as padding. Default: all are.
        scale: default `1 / sqrt(K)`.
        backend: see `zoo.kernels.dispatch`.

    Returns:
        out `[B, Tq, H, V]` in the dtype of v, and None, as nothing is carried. A query that sees nothing gets 0.

    Raises:
        ValueError: a shape, dtype or device that breaks the contract, naming the argument.
        BackendError: the backend asked for cannot run here.

    Cost: `2 H Tq M size (K + V)` FLOP. `chunked` lays the chosen blocks beside each block of queries, as many of these at once
    as fit: `R N M size (K + V)` numbers are read, and no matrix of all pairs is made. Where the lists hold so much of the keys
    that copying costs more (prefills of few thousand tokens whose lists are each query's own), some queries at a time look at
    all keys under a mask.

    Source: BigBird arXiv:2007.14062, section 2 and appendix D; lists chosen for each query and group: Native Sparse Attention,
    arXiv:2502.11089, for each query and head: MoBA, arXiv:2502.13189.
    """
    float_dtype(NAME, q=q, k=k, v=v)
    shapes = Shapes(NAME)
    shapes("q", q, "B Tq H K")
    shapes("k", k, "B Tk G K")
    shapes("v", v, "B Tk G V")
    shapes.not_empty("B", "Tq", "Tk", "G")
    shapes.divides("G", "H", "k")
    query_size = size if query_size is None else query_size
    if size < 1 or query_size < 1:
        raise ValueError(f"{NAME}: size is {size} and query_size {query_size}, expected 1 or more")
    if q_positions is not None and not causal:
        raise ValueError(f"{NAME}: q_positions say what a query sees in causal attention only; set causal=True")
    if causal and q_positions is None and shapes["Tq"] > shapes["Tk"]:
        raise ValueError(f"{NAME}: q has {shapes['Tq']} tokens but k only {shapes['Tk']}; give q_positions")
    shapes.sizes["N"] = -(-shapes["Tq"] // query_size)
    shapes("chosen", chosen, "B N M", "B G N M", "B H N M", dtype=torch.int64)
    shapes("q_positions", q_positions, "B Tq", dtype=torch.int64)
    shapes("present", present, "B Tk", dtype=torch.bool)
    lists = chosen.unsqueeze(1) if chosen.ndim == 3 else chosen
    options = {"size": size, "query_size": query_size, "causal": bool(causal)}
    options["scale"] = float(scale if scale is not None else shapes["K"] ** -0.5)
    return OP({"q": q, "k": k, "v": v, "chosen": lists, "q_positions": q_positions, "present": present}, options, None, backend)


def reference(q, k, v, chosen, q_positions, present, size, query_size, causal, scale) -> tuple[Tensor, None]:
    """One softmax over all pairs, weighted by how often they are chosen."""
    dtype, acc, length, keys, heads = v.dtype, accumulator(v.dtype), q.shape[1], k.shape[1], q.shape[2]
    every = torch.arange(-(-keys // size), device=q.device)
    count = (chosen.unsqueeze(-1) == every).sum(-2)  # [B, R, blocks of queries, blocks of keys]
    count = count.repeat_interleave(query_size, dim=2).repeat_interleave(size, dim=3)[:, :, :length, :keys]
    if count.shape[1] > 1:
        count = count.repeat_interleave(heads // count.shape[1], dim=1)
    if causal:
        at = rules.default_positions(q, k)[0] if q_positions is None else q_positions
        count = count * (torch.arange(keys, device=q.device) <= at.unsqueeze(-1)).unsqueeze(1)
    if present is not None:
        count = count * present[:, None, None]
    k, v = (x.to(acc).repeat_interleave(heads // x.shape[2], dim=2) for x in (k, v))
    logits = torch.einsum("bqhk,bshk->bhqs", q.to(acc), k) * scale
    blind = (count == 0).all(-1, keepdim=True)  # sees nothing: given everything for the softmax's sake, then set to 0
    weights = (logits + (count + blind).to(acc).log()).softmax(-1).masked_fill(blind, 0)
    return torch.einsum("bhqs,bshv->bqhv", weights, v).to(dtype), None


def chunked(q, k, v, chosen, q_positions, present, size, query_size, causal, scale) -> tuple[Tensor, None]:
    """Copies of the listed keys, or all keys under a mask, whichever reads less."""
    batch, queries, keys = q.shape[0], q.shape[1], k.shape[1]
    if present is None:
        present = torch.ones(batch, keys, dtype=torch.bool, device=q.device)
    at = rules.default_positions(q, k)[0].expand(batch, -1) if q_positions is None else q_positions
    copied = queries * chosen.shape[3] * size // query_size
    way = masked if queries > 1 and keys * (1 + queries // REUSE) < copied else gathered
    return way(q, k, v, chosen, at, present, size, query_size, causal, scale), None


def masked(q, k, v, chosen, at, present, size, query_size, causal, scale) -> Tensor:
    """Some queries at a time against all keys."""
    heads, keys = q.shape[2], k.shape[1]
    count = -(-keys // size)
    inside, all_k, all_v = torch.arange(keys, device=q.device), k.transpose(1, 2), v.transpose(1, 2)

    def block(start: int, stop: int) -> Tensor:
        lists = chosen[:, :, torch.arange(start, stop, device=q.device) // query_size]
        once = torch.ones_like(lists, dtype=accumulator(q.dtype))
        times = once.new_zeros(*lists.shape[:3], count + 1)  # the last for no block
        times = times.scatter_add(3, lists.where(lists >= 0, count), once)
        weight = times[..., :count].log().repeat_interleave(size, dim=3)[..., :keys]
        hidden = ~present[:, None, None]
        if causal:
            hidden = hidden | (inside > at[:, start:stop].unsqueeze(-1)).unsqueeze(1)
        weight = weight.masked_fill(hidden, -torch.inf).to(q.dtype)
        blind = (weight == -torch.inf).all(-1, keepdim=True)  # sees nothing: given everything for the softmax's sake, then set to 0
        weight = weight.masked_fill(blind, 0)
        if weight.shape[1] > 1:
            weight, blind = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (weight, blind))
        asked = q[:, start:stop].transpose(1, 2)
        out = scaled_dot_product_attention(asked, all_k, all_v, weight, scale=scale, enable_gqa=heads > k.shape[2])
        return out.masked_fill(blind, 0).transpose(1, 2)

    return in_turn(block, q.shape[1], max(16, PAIRS // (q.shape[0] * heads * keys)), dim=1)


def gathered(q, k, v, chosen, at, present, size, query_size, causal, scale) -> Tensor:
    """Every block of queries beside its keys, as a row of its own; a row for each head or group if their lists differ."""
    batch, length = q.shape[:2]
    rows, blocks, listed = chosen.shape[1:]
    sets = min(rows, k.shape[2])  # of keys with lists of their own
    first = torch.arange(batch, device=q.device)[:, None, None, None]
    second = (torch.arange(rows, device=q.device) // (rows // sets))[:, None, None]
    inside, soft = torch.arange(size, device=q.device), Softmax(scale, None, False)

    def cut(x: Tensor, size: int) -> Tensor:
        """`[B, T, ...] -> [B, N, size, ...]`, zeros behind the end."""
        missing = -x.shape[1] % size
        return (along_time(x, 0, missing) if missing else x).unflatten(1, (-1, size))  # a cache of whole blocks is not copied

    def apart(x: Tensor, size: int, parts: int) -> Tensor:
        """`[B, T, H, K] -> [B, parts, N, size, H / parts, K]`."""
        return cut(x.unflatten(2, (parts, -1)), size).permute(0, 3, 1, 2, 4, 5)

    queries, keys, values = apart(q, query_size, rows), apart(k, size, sets), apart(v, size, sets)
    asked, there = cut(at, query_size), cut(present, size)

    def block(start: int, stop: int) -> Tensor:
        lists = chosen[:, :, start:stop]
        place = lists.clamp(min=0)
        near, read = (x[first, second, place].flatten(3, 4).flatten(0, 2) for x in (keys, values))
        seen = (there[first, place] & (lists >= 0).unsqueeze(-1)).unsqueeze(3)
        if causal:
            seen = seen & ((place.unsqueeze(-1) * size + inside).unsqueeze(3) <= asked[:, None, start:stop, :, None, None])
        seen = seen.flatten(4).expand(-1, -1, -1, query_size, -1).flatten(0, 2)
        return soft(queries[:, :, start:stop].flatten(0, 2), near, read, seen, None)[0].unflatten(0, (batch, rows, stop - start))

    step = max(16, GATHERED // (batch * max(1, listed) * size * max(rows, k.shape[2]) * max(k.shape[3], v.shape[3])))
    out = in_turn(block, blocks, step, dim=2)
    return out.permute(0, 2, 3, 1, 4, 5).flatten(3, 4).flatten(1, 2)[:, :length]


def in_turn(block: Callable[[int, int], Tensor], count: int, step: int, dim: int) -> Tensor:
    """`block(start, stop)` over so many, `step` at a time, side by side along `dim`; recomputed in the backward pass."""
    if step >= count:
        return block(0, count)
    bounds = [(start, min(start + step, count)) for start in range(0, count, step)]
    again = {"use_reentrant": False, "preserve_rng_state": False}
    return torch.cat([checkpoint(block, *bound, **again) if torch.is_grad_enabled() else block(*bound) for bound in bounds], dim=dim)


def _meta(tensors: dict, options: dict, sequences: int) -> tuple[Tensor, None]:
    q, v = tensors["q"], tensors["v"]
    return v.new_empty(*q.shape[:3], v.shape[3]), None


def obstacle(tensors: dict) -> str | None:
    """What the fused kernels do not do."""
    if tensors["q"].shape[1] == 1 < tensors["k"].shape[1]:
        return "one query of many keys would leave most of a GPU idle"
    widest = max(tensors["q"].shape[3], tensors["v"].shape[3])
    return f"K or V is {widest}, and its kernels take up to {WIDEST}" if widest > WIDEST else None


def _case(*, groups: int, lists: int = 1, padded: bool = False, **options):
    def draw(generator: torch.Generator, batch: int, length: int, dtype: torch.dtype) -> dict:
        def normal(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        heads, size, keys = 4, 7, 6
        blocks, rows = -(-length // size), -(-length // options.get("query_size", size))
        shape = (batch, rows, 4) if lists == 1 else (batch, lists, rows, 3)
        inputs = {"q": normal(batch, length, heads, keys), "k": normal(batch, length, groups, keys)}
        inputs |= {"v": normal(batch, length, groups, 5), "size": size}
        if padded:
            inputs["present"] = torch.rand(batch, length, generator=generator) < 0.7
        return inputs | options | {"chosen": torch.randint(-1, blocks, shape, generator=generator)}

    return draw


OP = Op(
    NAME,
    reference=reference,
    chunked=chunked,
    tensors=("q", "k", "v", "chosen", "q_positions?", "present?"),
    options={"size": "int", "query_size": "int", "causal": "bool", "scale": "float"},
    along_time=("q", "k", "v", "q_positions", "present"),
    meta=_meta,
    fused="zoo.kernels.attention.fused_blocks",
    obstacle=obstacle,
    opaque=False,
    cases={
        "shared": _case(groups=2),
        "each-head": _case(groups=2, lists=4),
        "padded": _case(groups=4, padded=True),
        "causal-each-group": _case(groups=2, lists=2, query_size=1, causal=True),
        "causal-each-head": _case(groups=2, lists=4, query_size=3, causal=True, padded=True),
    },
    call=block_attention,
)
