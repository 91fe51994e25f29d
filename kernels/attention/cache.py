"""Keys and values kept for queries to come, as pure functions on dictionaries of tensors.

A cache holds `k` `[B, L, G, K]`, `v` `[B, L, G, V]` and `length` `[B]` int64, the tokens each row has seen; every tensor
has the rows first, so that selecting and repeating rows is indexing. Rows may differ in length. Where gradients are
disabled a cache is written in place, at fixed addresses, and a step of one token never waits for the device.

A packed row appends each of its sequences to the cache row of the same number. Queries then take the rows' layout too:
`packing.pad(q)` at `upcoming(...)` positions, and `packing.unpad(out)`.
"""

import torch
from torch import Tensor

from zoo.kernels.packing import Packing

GRAIN = 64
Cache = dict[str, Tensor]


def capacity(length: int) -> int:
    """Slots reserved for so many tokens."""
    return -(-length // GRAIN) * GRAIN


def upcoming(cache: Cache | None, k: Tensor, packing: Packing | None = None) -> Tensor:
    """Positions the tokens of k `[B, T, ...]` will have, `[B, T]` (`[N, longest]` if packed, -1 behind a sequence's end)."""
    if packing is None and k.shape[1] == 1 and cache is not None:
        return cache["length"].unsqueeze(1).clone()
    if packing is None:
        first = torch.arange(k.shape[1], device=k.device).expand(k.shape[0], -1)
        return first if cache is None else first + cache["length"].unsqueeze(1)
    own = packing.positions if cache is None else packing.positions + cache["length"][packing.seq_idx]
    return packing.pad(own.unsqueeze(0), -1)


# -- growing ----------------------------------------------------------------------------------------------------------


def append(cache: Cache | None, k: Tensor, v: Tensor, packing: Packing | None = None, **more: Tensor) -> Cache:
    """A cache that also holds k and v: the token at position p of row b lies in slot p of row b.

    Args:
        cache: what an earlier call returned, or None.
        k, v: `[B, T, G, K]` and `[B, T, G, V]`; `[1, total, G, .]` with packing, which then feeds N rows.
        more: what else is kept of every token, `[B, T, ...]`, by its name in the cache, the same in every call.

    Whether there is room is decided on the host: `bound`, `[B, L', 0]`, holds no data, and its length L' is the most tokens
    any row may have. When there is no room a larger cache is allocated, a multiple of `GRAIN` slots; `reserve` does it
    beforehand.
    """
    slots, new = upcoming(cache, k, packing), {"k": k, "v": v} | more
    count, longest = slots.shape
    if cache is None:
        cache = _empty(count, new, slots=0) | {"bound": k.new_empty(count, 0, 0)}
    bound = cache["bound"].shape[1] + longest
    if bound > cache["k"].shape[1]:
        cache = reserve(cache, bound, tuple(new))
    rows = torch.arange(count, device=k.device).unsqueeze(1)
    if packing is not None:
        rows, slots, new = packing.seq_idx, packing.unpad(slots)[0], {name: x[0] for name, x in new.items()}
    written = {name: _write(cache[name], rows, slots, x) for name, x in new.items()}
    return written | {"length": _advance(cache["length"], longest, packing), "bound": k.new_empty(count, bound, 0)}


def reserve(cache: Cache, tokens: int, names: tuple[str, ...] = ("k", "v")) -> Cache:
    """The same cache with room for so many tokens a row; `names`: what it keeps of a token."""
    missing = max(0, capacity(tokens) - cache["k"].shape[1])
    room = {name: cache[name].new_zeros(cache[name].shape[0], missing, *cache[name].shape[2:]) for name in names}
    return cache | {name: torch.cat([cache[name], x], dim=1) for name, x in room.items()}


def positions(cache: Cache) -> Tensor:
    """`[B, L]`: the position in each slot of a growing cache, -1 where it is empty."""
    slots = torch.arange(cache["k"].shape[1], device=cache["k"].device)
    return torch.where(slots < cache["length"].unsqueeze(1), slots, -1)


# -- a ring -----------------------------------------------------------------------------------------------------------


def ring_append(
    cache: Cache | None, k: Tensor, v: Tensor, window: int, sinks: int = 0, packing: Packing | None = None
) -> tuple[Tensor, Tensor, Tensor, Cache]:
    """What the queries of this call may see, and the cache of constant size for the next.

    The first `sinks` positions stay for ever; position p after them lies in slot `sinks + (p - sinks) % window`.

    Args:
        cache, k, v, packing: as in `append`.
        window: how many positions a query sees, itself included: with dilation d, `(W - 1) d + 1`.

    Returns:
        keys, values `[B, L, G, .]` and positions `[B, L]`, -1 where empty. For one token these are the ring itself, for
        more the old ring followed by the new tokens. And the new cache, which holds `sinks + window` slots.
    """
    at = upcoming(cache, k, packing)
    count, longest = at.shape
    if cache is None:
        cache = _empty(count, {"k": k, "v": v}, slots=sinks + window)
    rows = torch.arange(count, device=k.device).unsqueeze(1)
    if packing is None and longest == 1:
        slot = torch.where(at < sinks, at, sinks + (at - sinks) % window) if sinks else at % window
        written = {"k": _write(cache["k"], rows, slot, k), "v": _write(cache["v"], rows, slot, v)}
        written["length"] = _advance(cache["length"], 1, packing)
        return written["k"], written["v"], ring_positions(written["length"], window, sinks), written
    before = ring_positions(cache["length"], window, sinks)
    if packing is not None:
        k, v = packing.pad(k), packing.pad(v)
    keys, values = (torch.cat([cache[name], x.to(cache[name].dtype)], dim=1) for name, x in (("k", k), ("v", v)))
    first = cache["length"].unsqueeze(1)
    length = _advance(cache["length"].clone(), longest, packing)
    after = ring_positions(length, window, sinks)
    own = torch.arange(sinks + window, device=k.device)
    source = torch.where(after >= first, sinks + window + after - first, own)  # where in old ring and new tokens it lies
    new = {"k": keys[rows, source], "v": values[rows, source], "length": length}
    if not torch.is_grad_enabled():
        new = {name: cache[name].copy_(x) for name, x in new.items()}
    return keys, values, torch.cat([before, at], dim=1), new


def ring_leaving(cache: Cache | None, new: Cache, window: int, sinks: int = 0, packing: Packing | None = None) -> tuple[Cache, Tensor]:
    """For each new token the one that leaves the window because of it, `window` positions before; sinks never leave.

    Args:
        cache: a ring as `ring_append` keeps it, which must not have seen the new tokens yet; it may keep more than k and v.
        new: tensors of the new tokens, `[B, T, ...]`, named as in the cache.

    Returns:
        the same names with what leaves, and whether anything does, `[B, T]`; where nothing does, they hold any token.
    """
    at = upcoming(cache, next(iter(new.values())), packing)
    first = 0 if cache is None else cache["length"].unsqueeze(1)
    gone = at - window
    there = gone >= sinks
    slot = sinks + (gone - sinks) % window if cache is not None else 0
    before = 0 if cache is None else sinks + window  # slots ahead of the new tokens
    place = torch.where(there, torch.where(gone < first, slot, before + gone - first), 0)
    found = {}
    for name, x in new.items():
        pool = x if packing is None else packing.pad(x)
        if cache is not None:  # up to so many new tokens, none leaves in the call it came in
            kept = cache[name]
            pool = kept if at.shape[1] <= window else torch.cat([kept, pool.to(kept.dtype)], dim=1)
        found[name] = pool[torch.arange(len(at), device=at.device).unsqueeze(1), place].to(x.dtype)
    if packing is None:
        return found, there
    return {name: packing.unpad(x) for name, x in found.items()}, packing.unpad(there)


def ring_positions(length: Tensor, window: int, sinks: int) -> Tensor:
    """`[B, sinks + window]`: the position in each slot of a ring after `length` `[B]` tokens, -1 where it is empty."""
    length = length.unsqueeze(1)
    newest = length - (sinks + 1)  # counted behind the sinks, negative if there is none
    turning = newest - (newest - torch.arange(window, device=length.device)) % window
    if not sinks:
        return turning.clamp(min=-1)
    kept = torch.arange(sinks, device=length.device)
    return torch.cat([torch.where(kept < length, kept, -1), torch.where(turning >= 0, turning + sinks, -1)], dim=1)


# -- parts ------------------------------------------------------------------------------------------------------------


def _empty(count: int, new: Cache, slots: int) -> Cache:
    kept = {name: x.new_zeros(count, slots, *x.shape[2:]) for name, x in new.items()}
    return kept | {"length": torch.zeros(count, dtype=torch.int64, device=new["k"].device)}


def _write(buffer: Tensor, rows: Tensor, slots: Tensor, x: Tensor) -> Tensor:
    """buffer `[B, L, ...]` with x at these rows and slots: in place where gradients are disabled."""
    put = buffer.index_put if torch.is_grad_enabled() else buffer.index_put_
    return put((rows, slots), x.to(buffer.dtype))


def _advance(length: Tensor, new: int, packing: Packing | None) -> Tensor:
    """The lengths after `new` tokens a row, or as many as the packing says."""
    new = new if packing is None else packing.cu_seqlens.diff()
    return length + new if torch.is_grad_enabled() else length.add_(new)
