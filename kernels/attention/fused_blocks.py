"""Attention to listed blocks of keys in Triton, forward and backward.

Heads that share both a list and their keys are a set, and its queries in a block, one for each head and token, are the rows of a tile. A
program of `forward` and `queries_gradient` gathers the keys on its list, as many at once as fit a tile, whatever the size of a block. For
`keys_gradient` the lists are turned around by sorting, and a program gathers the rows that list its block. With N listed pairs a head:
`4 N D` FLOP forward and `14 N D` backward; keys and values are read once for each tile of rows that lists them.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton import language as tl

from zoo.kernels.attention.fused import types
from zoo.kernels.attention.fused_rule import log_sum, read
from zoo.kernels.launch import launch, rows, strides
from zoo.kernels.packing import Packing
from zoo.kernels.segments import cdiv, padded_size

LOG2E = tl.constexpr(1.4426950408889634)
SIZES = ["H", "QUERIES", "KEYS", "N", "M", "length", "PIECES"]  # compiled once for all values
FILLED = 256  # lists over all heads and rows, of one block of queries, that keep a GPU busy while a block that all list is summed up


@triton.jit
def gather(X, at, c, channels, real, EVEN: tl.constexpr, TYPE: tl.constexpr):
    """Tokens at these offsets, channels c."""
    mask = real[:, None] if EVEN else real[:, None] & (c[None, :] < channels)
    return tl.load(X + at[:, None] + c[None, :], mask=mask, other=0.0).to(TYPE)


@triton.jit
def keys_at(X, first, j, i, stride, c, channels, real, EVEN: tl.constexpr, TYPE: tl.constexpr, TOGETHER: tl.constexpr):
    """Tokens j, which if TOGETHER are first + i."""
    if TOGETHER:
        return read(X, first, i, stride, c, channels, real, True, EVEN, TYPE)
    else:
        return gather(X, j * stride, c, channels, real, EVEN, TYPE)


@triton.jit
def positions(P, b, token, real, QUERIES, KEYS):
    """Of queries."""
    if P is None:
        return token + KEYS - QUERIES
    else:
        return tl.load(P + b * QUERIES + token, mask=real, other=-1)


@triton.jit
def listed_keys(CHOSEN, PRESENT, y, i, b, size, M, KEYS, TOGETHER: tl.constexpr):
    """The keys y + i of a list, the first of them, and whether they are there. TOGETHER: a tile's are of one block."""
    if TOGETHER:
        block = tl.load(CHOSEN + y // size)
        first = block * size + y % size
        j = first + i
    else:
        block = tl.load(CHOSEN + (y + i) // size, mask=y + i < M * size, other=-1)
        first, j = block * size, block * size + (y + i) % size
    real = (block >= 0) & (j < KEYS)
    if PRESENT is not None:
        real &= tl.load(PRESENT + b * KEYS + j, mask=real, other=0) != 0
    return first, j, real


@triton.jit(do_not_specialize=SIZES[:5])
def forward(
    Q, K, V, OUT, LSE, CHOSEN, P, PRESENT,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, o_b, o_t, o_h, c_b, c_r,
    H, G, SETS, D, W, QUERIES, KEYS, N, M, size, query_size, scale,
    BM: tl.constexpr, BN: tl.constexpr, DP: tl.constexpr, WP: tl.constexpr, EVEN: tl.constexpr, CAUSAL: tl.constexpr,
    TYPE: tl.constexpr, ACC: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """Outputs and their log-sum-exp. Programs: tiles of a block's rows x blocks of queries x sets x rows."""
    heads = H // SETS
    parts = tl.cdiv(query_size * heads, BM)
    part, n = tl.program_id(0) % parts, tl.program_id(0) // parts % N
    s, b = tl.program_id(0) // parts // N % SETS, (tl.program_id(0) // parts // N // SETS).to(tl.int64)
    x, i, c, w = part * BM + tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, DP), tl.arange(0, WP)
    token, h = (n * query_size + x // heads).to(tl.int64), s * heads + x % heads
    inside = (x < query_size * heads) & (token < QUERIES)
    p = positions(P, b, token, inside, QUERIES, KEYS)
    CHOSEN += b * c_b + s * c_r + n.to(tl.int64) * M
    K += b * k_b + (s // (SETS // G)) * k_h
    V += b * v_b + (s // (SETS // G)) * v_h
    q = gather(Q + b * q_b, token * q_t + h * q_h, c, D, inside, EVEN, TYPE)
    top, total, out = tl.full((BM,), -float("inf"), ACC), tl.zeros((BM,), ACC), tl.zeros((BM, WP), ACC)
    for y in range(0, M * size, BN):
        first, j, real = listed_keys(CHOSEN, PRESENT, y, i, b, size, M, KEYS, TOGETHER)
        k = keys_at(K, first, j, i, k_t, c, D, real, EVEN, TYPE, TOGETHER)
        v = keys_at(V, first, j, i, v_t, w, W, real, EVEN, TYPE, TOGETHER)
        seen = real[None, :] & (j[None, :] <= p[:, None]) if CAUSAL else real[None, :]
        z = tl.where(seen, tl.dot(q, tl.trans(k), out_dtype=ACC) * scale, -float("inf"))
        new = tl.maximum(top, tl.max(z, 1))
        base = tl.where(new == -float("inf"), 0.0, new)
        weights, fade = tl.exp2(z - base[:, None]), tl.exp2(top - base)
        total, top = total * fade + tl.sum(weights, 1), new
        out = tl.dot(weights.to(TYPE), v, out * fade[:, None], out_dtype=ACC)
    safe = tl.where(total > 0, total, 1.0)
    tl.store(LSE + (b * H + h) * QUERIES + token, tl.where(total > 0, top / LOG2E + tl.log(safe), -float("inf")), mask=inside)
    out = (out / safe[:, None]).to(OUT.dtype.element_ty)
    OUT += b * o_b + (token * o_t + h * o_h)[:, None] + w[None, :]
    tl.store(OUT, out, mask=inside[:, None] if EVEN else inside[:, None] & (w[None, :] < W))


@triton.jit(do_not_specialize=SIZES[:5])
def queries_gradient(
    Q, K, V, OUT, DO, LSE, DQ, DELTA, CHOSEN, P, PRESENT,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, o_b, o_t, o_h, g_b, g_t, g_h, d_b, d_t, d_h, c_b, c_r,
    H, G, SETS, D, W, QUERIES, KEYS, N, M, size, query_size, scale,
    BM: tl.constexpr, BN: tl.constexpr, DP: tl.constexpr, WP: tl.constexpr, EVEN: tl.constexpr, CAUSAL: tl.constexpr,
    TYPE: tl.constexpr, ACC: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """DQ, and DELTA `[B, H, Tq]` for `keys_gradient`. Programs as in `forward`."""
    heads = H // SETS
    parts = tl.cdiv(query_size * heads, BM)
    part, n = tl.program_id(0) % parts, tl.program_id(0) // parts % N
    s, b = tl.program_id(0) // parts // N % SETS, (tl.program_id(0) // parts // N // SETS).to(tl.int64)
    x, i, c, w = part * BM + tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, DP), tl.arange(0, WP)
    token, h = (n * query_size + x // heads).to(tl.int64), s * heads + x % heads
    inside = (x < query_size * heads) & (token < QUERIES)
    p = positions(P, b, token, inside, QUERIES, KEYS)
    CHOSEN += b * c_b + s * c_r + n.to(tl.int64) * M
    K += b * k_b + (s // (SETS // G)) * k_h
    V += b * v_b + (s // (SETS // G)) * v_h
    q = gather(Q + b * q_b, token * q_t + h * q_h, c, D, inside, EVEN, TYPE)
    o = gather(OUT + b * o_b, token * o_t + h * o_h, w, W, inside, EVEN, TYPE)
    do = gather(DO + b * g_b, token * g_t + h * g_h, w, W, inside, EVEN, TYPE)
    own = (b * H + h) * QUERIES + token
    delta = tl.sum(o.to(ACC) * do.to(ACC), 1).to(tl.float32)
    tl.store(DELTA + own, delta, mask=inside)
    lse, dq = log_sum(LSE, own, inside), tl.zeros((BM, DP), ACC)
    for y in range(0, M * size, BN):
        first, j, real = listed_keys(CHOSEN, PRESENT, y, i, b, size, M, KEYS, TOGETHER)
        k = keys_at(K, first, j, i, k_t, c, D, real, EVEN, TYPE, TOGETHER)
        v = keys_at(V, first, j, i, v_t, w, W, real, EVEN, TYPE, TOGETHER)
        seen = real[None, :] & (j[None, :] <= p[:, None]) if CAUSAL else real[None, :]
        z = tl.dot(q, tl.trans(k), out_dtype=ACC) * scale - lse[:, None]
        weights = tl.exp2(tl.where(seen, z, -float("inf")))
        ds = weights * (tl.dot(do, tl.trans(v), out_dtype=ACC) - delta[:, None])
        dq = tl.dot(ds.to(TYPE), k, dq, out_dtype=ACC)
    dq = (dq * (scale / LOG2E)).to(DQ.dtype.element_ty)
    DQ += b * d_b + (token * d_t + h * d_h)[:, None] + c[None, :]
    tl.store(DQ, dq, mask=inside[:, None] if EVEN else inside[:, None] & (c[None, :] < D))


@triton.jit
def piece_of_list(FIRST, piece, blocks, length):
    """The block whose list of queries holds a piece, and the piece's first and last place but one; pieces are counted as if the list of
    block n began with piece `FIRST[n] // length + n`. Some are empty."""
    low, high = piece * 0, piece * 0 + blocks
    while high - low > 1:
        middle = (low + high) // 2
        before = tl.load(FIRST + middle) // length + middle <= piece
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    first = tl.load(FIRST + low)
    begin = first + (piece - low - first // length) * length
    end = tl.minimum(begin + length, tl.load(FIRST + low + 1))
    return low, begin, tl.where(begin < first, begin, end)


@triton.jit
def asking_rows(ORDER, y, m, asking, h, heads, query_size, QUERIES, M, TOGETHER: tl.constexpr):
    """Of the rows y + m of a list turned around: the first one's token, their tokens and heads, of which h is the set's first, and
    whether they are there. TOGETHER: a tile's are of one head and one block of queries."""
    size = query_size * heads
    if TOGETHER:
        t = tl.load(ORDER + y // size).to(tl.int32) // M * query_size + y % size % query_size
        return t, (t + m).to(tl.int64), h + y % size // query_size, t + m < QUERIES
    else:
        x = (y + m) % size
        t = tl.load(ORDER + (y + m) // size, mask=y + m < asking, other=0).to(tl.int32) // M * query_size + x // heads
        return t, t.to(tl.int64), h + x % heads, (y + m < asking) & (t < QUERIES)


@triton.jit
def rows_at(X, t, token, h, m, x_t, x_h, c, channels, there, EVEN: tl.constexpr, TYPE: tl.constexpr, TOGETHER: tl.constexpr):
    """These tokens of these heads."""
    if TOGETHER:
        return read(X + h * x_h, t, m, x_t, c, channels, there, True, EVEN, TYPE)
    else:
        return gather(X, token * x_t + h * x_h, c, channels, there, EVEN, TYPE)


@triton.jit(do_not_specialize=SIZES)
def keys_gradient(
    K, Q, V, DO, LSE, DELTA, DK, DV, ORDER, FIRST, P, PRESENT,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, g_b, g_t, g_h, d_b, d_t, d_h, e_b, e_t, e_h, c_b, c_r, f_b, f_r, length, PIECES,
    H, G, SETS, D, W, QUERIES, KEYS, N, M, size, query_size, scale,
    BM: tl.constexpr, BN: tl.constexpr, DP: tl.constexpr, WP: tl.constexpr, EVEN: tl.constexpr, CAUSAL: tl.constexpr,
    TYPE: tl.constexpr, ACC: tl.constexpr, SPLIT: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """DK and DV. ORDER `[B, R, N M]`: places in the lists sorted by the block that is there, those of block n from FIRST `[B, R, blocks +
    1]` on. Programs: tiles of a block x blocks of keys x groups x rows; if SPLIT tiles of a block x PIECES of the order x sets x rows, and
    DK, DV are `[B, SETS, PIECES, size, .]`."""
    heads, parts, blocks, u = H // SETS, tl.cdiv(size, BN), tl.cdiv(KEYS, size), SETS // G
    part, n = tl.program_id(0) % parts, tl.program_id(0) // parts % PIECES
    own, b = tl.program_id(0) // parts // PIECES, tl.program_id(0) // parts // PIECES
    own, b = (own % SETS, (b // SETS).to(tl.int64)) if SPLIT else (own % G, (b // G).to(tl.int64))
    s_first, s_end, group, begin, end = own * u, own * u + u, own, 0, 0
    if SPLIT:
        s_first, s_end, group = own, own + 1, own // u
        n, begin, end = piece_of_list(FIRST + b * f_b + own * f_r, n, blocks, length)
        if begin >= end:
            return
    i, m, c, w = part * BN + tl.arange(0, BN), tl.arange(0, BM), tl.arange(0, DP), tl.arange(0, WP)
    j = (n * size + i).to(tl.int64)
    inside = (i < size) & (j < KEYS)
    real = inside
    if PRESENT is not None:
        real &= tl.load(PRESENT + b * KEYS + j, mask=inside, other=0) != 0
    k = gather(K + b * k_b + group * k_h, j * k_t, c, D, real, EVEN, TYPE)
    v = gather(V + b * v_b + group * v_h, j * v_t, w, W, real, EVEN, TYPE)
    dk, dv = tl.zeros((BN, DP), ACC), tl.zeros((BN, WP), ACC)
    for s in range(s_first, s_end):
        if SPLIT:
            listed, asking = begin, end - begin
        else:
            listed = tl.load(FIRST + b * f_b + s * f_r + n)
            asking = tl.load(FIRST + b * f_b + s * f_r + n + 1) - listed
        asking = (asking * query_size * heads).to(tl.int32)
        for y in range(0, asking, BM):
            t, token, h, there = asking_rows(
                ORDER + b * c_b + s * c_r + listed, y, m, asking, s * heads, heads, query_size, QUERIES, M, TOGETHER
            )
            p = positions(P, b, token, there, QUERIES, KEYS)
            at = (b * H + h) * QUERIES + token
            lse, delta = log_sum(LSE, at, there), tl.load(DELTA + at, mask=there, other=0.0)
            q = rows_at(Q + b * q_b, t, token, h, m, q_t, q_h, c, D, there, EVEN, TYPE, TOGETHER)
            do = rows_at(DO + b * g_b, t, token, h, m, g_t, g_h, w, W, there, EVEN, TYPE, TOGETHER)
            seen = real[:, None] & there[None, :]
            if CAUSAL:
                seen &= j[:, None] <= p[None, :]
            z = tl.dot(k, tl.trans(q), out_dtype=ACC) * scale - lse[None, :]
            weights = tl.exp2(tl.where(seen, z, -float("inf")))
            dv = tl.dot(weights.to(TYPE), do, dv, out_dtype=ACC)
            ds = weights * (tl.dot(v, tl.trans(do), out_dtype=ACC) - delta[None, :])
            dk = tl.dot(ds.to(TYPE), q, dk, out_dtype=ACC)
    if SPLIT:
        to = ((b * SETS + own) * PIECES + tl.program_id(0) // parts % PIECES) * size + i
        DK, DV, inside = DK + (to * D)[:, None] + c[None, :], DV + (to * W)[:, None] + w[None, :], i < size
    else:
        DK += b * d_b + group * d_h + (j * d_t)[:, None] + c[None, :]
        DV += b * e_b + group * e_h + (j * e_t)[:, None] + w[None, :]
    dk = (dk * (scale / LOG2E)).to(DK.dtype.element_ty)
    tl.store(DK, dk, mask=inside[:, None] if EVEN else inside[:, None] & (c[None, :] < D))
    tl.store(DV, dv.to(DV.dtype.element_ty), mask=inside[:, None] if EVEN else inside[:, None] & (w[None, :] < W))


@triton.jit(do_not_specialize=["KEYS", "length", "PIECES"])
def combine(PARTS, OUT, FIRST, f_b, f_r, o_b, o_t, o_h, length, PIECES, G, SETS, D, KEYS, size, BN: tl.constexpr, DP: tl.constexpr):
    """The sum over sets and pieces of what `keys_gradient` left. Programs: tiles of a block x blocks of keys x groups x rows."""
    parts, blocks, u = tl.cdiv(size, BN), tl.cdiv(KEYS, size), SETS // G
    part, n = tl.program_id(0) % parts, tl.program_id(0) // parts % blocks
    group, b = tl.program_id(0) // parts // blocks % G, (tl.program_id(0) // parts // blocks // G).to(tl.int64)
    i, c = part * BN + tl.arange(0, BN), tl.arange(0, DP)
    j = (n * size + i).to(tl.int64)
    mask = ((i < size) & (j < KEYS))[:, None] & (c[None, :] < D)
    total = tl.zeros((BN, DP), PARTS.dtype.element_ty)
    for s in range(group * u, group * u + u):
        first, end = tl.load(FIRST + b * f_b + s * f_r + n), tl.load(FIRST + b * f_b + s * f_r + n + 1)
        piece = first // length + n
        for m in range(0, tl.cdiv(end - first, length)):
            at = ((b * SETS + s) * PIECES + piece + m) * size + i
            total += tl.load(PARTS + (at * D)[:, None] + c[None, :], mask=mask, other=0.0)
    OUT += b * o_b + group * o_h + (j * o_t)[:, None] + c[None, :]
    tl.store(OUT, total.to(OUT.dtype.element_ty), mask=mask)


class Tile(NamedTuple):
    """A launch: rows and keys of a tile, warps, stages of the pipeline."""

    rows: int
    keys: int
    warps: int
    stages: int


def tiles(own: int, size: int, query_size: int, wide: int, dtype: torch.dtype) -> tuple[Tile, Tile, Tile]:
    """For so many rows of queries with a list, keys in a block, queries in a block, and channels: forward, gradient of queries, gradients
    of keys."""
    most = 32 if dtype == torch.float32 else 64
    own, size = min(most, padded_size(own)), min(most, padded_size(size))
    asking = 32 if query_size == 1 else min(32, padded_size(query_size))
    if dtype == torch.float32:
        return Tile(own, 32, 4, 1), Tile(own, 32, 4, 1), Tile(asking, size, 4, 1)
    if wide <= 128:
        return Tile(own, 64, 4, 3), Tile(own, 64, 4, 2), Tile(asking, size, 4, 2)
    return Tile(own, 64, 8, 2), Tile(own, 64, 8, 2), Tile(asking, size, 8, 2)


def block_attention(
    q, k, v, chosen, q_positions, present, size: int, query_size: int, causal: bool, scale: float, packing: Packing | None = None
) -> tuple[Tensor, None]:
    """See `zoo.kernels.attention.blocks.block_attention`; never packed."""
    return _Listed.apply(q, k, v, chosen, q_positions, present, size, query_size, causal, scale), None


class Problem:
    """Sizes, lists and types of one call, and its launches."""

    def __init__(self, q, k, v, chosen, p, present, size: int, query_size: int, causal: bool, scale: float):
        self.batch, self.queries, self.heads, self.channels = q.shape
        self.keys, self.groups, self.values = k.shape[1], k.shape[2], v.shape[3]
        self.lists, self.size, self.query_size = chosen.shape[1], size, query_size
        self.sets = max(self.lists, self.groups)
        self.chosen = chosen.contiguous()
        self.p = None if p is None else p.contiguous()
        self.present = None if present is None else present.contiguous().view(torch.uint8)
        kind, exact = types(q.dtype)
        wide = padded_size(self.channels), padded_size(self.values)
        self.tiles = tiles(query_size * self.heads // self.sets, size, query_size, max(wide), q.dtype)
        self.constants = {"DP": wide[0], "WP": wide[1], "EVEN": wide == (self.channels, self.values), "CAUSAL": causal}
        self.constants |= {"TYPE": kind, "ACC": exact}
        self.exact = torch.float64 if q.dtype == torch.float32 else torch.float32
        self.sizes = self.heads, self.groups, self.sets, self.channels, self.values, self.queries, self.keys, *chosen.shape[2:]
        self.sizes = *self.sizes, size, query_size, scale * LOG2E.value

    def by_list(self, x: Tensor) -> tuple[int, int]:
        """Strides of rows and lists."""
        return x.stride(0), x.stride(1) if self.lists > 1 else 0

    def by_queries(self, kernel, tile: Tile, tensors: tuple, strided: tuple) -> None:
        part, keys, warps, stages = tile
        programs = cdiv(self.query_size * self.heads // self.sets, part) * self.chosen.shape[2] * self.sets * self.batch
        launch(
            kernel, programs, *tensors, self.chosen, self.p, self.present, *(n for x in strided for n in strides(x)),
            *self.by_list(self.chosen), *self.sizes, BM=part, BN=keys, **self.constants,
            TOGETHER=self.size % keys == 0, num_warps=warps, num_stages=stages,
        )  # fmt: skip

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out = v.new_empty(*q.shape[:3], self.values)
        lse = q.new_empty(self.batch, self.heads, self.queries, dtype=torch.float32)
        self.by_queries(forward, self.tiles[0], (q, k, v, out, lse), (q, k, v, out))
        return out, lse

    def backward(self, q, k, v, out, lse, do) -> tuple[Tensor, Tensor, Tensor]:
        (dq, dk, dv), delta = (x.new_empty(x.shape) for x in (q, k, v)), torch.empty_like(lse)
        self.by_queries(queries_gradient, self.tiles[1], (q, k, v, out, do, lse, dq, delta), (q, k, v, out, do, dq))
        queries, part, warps, stages = self.tiles[2]
        blocks = cdiv(self.keys, self.size)
        found, order = self.chosen.flatten(2).sort(dim=-1, stable=True)
        first = torch.searchsorted(found, torch.arange(blocks + 1, device=q.device).expand(*found.shape[:2], -1).contiguous())
        split, entries = self.batch * self.sets * self.chosen.shape[3] < FILLED, order.shape[2]
        length = max(1, cdiv(2 * entries, blocks)) if split else 0
        pieces, owners = (entries // length + blocks, self.sets) if split else (blocks, self.groups)
        parts = [x.new_empty(self.batch, self.sets, pieces, self.size, x.shape[3], dtype=self.exact) if split else x for x in (dk, dv)]
        launch(
            keys_gradient, cdiv(self.size, part) * pieces * owners * self.batch,
            k, q, v, do, lse, delta, *parts, order, first, self.p, self.present, *(n for x in (q, k, v, do, dk, dv) for n in strides(x)),
            *self.by_list(order), *self.by_list(first), length, pieces, *self.sizes, BM=queries, BN=part, **self.constants, SPLIT=split,
            TOGETHER=self.query_size % queries == 0,
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
        for some, whole in zip(parts, (dk, dv), strict=True) if split else ():
            launch(
                combine, cdiv(self.size, part) * blocks * self.groups * self.batch,
                some, whole, first, *self.by_list(first), *strides(whole), length, pieces, self.groups, self.sets, whole.shape[3],
                self.keys, self.size, BN=part, DP=padded_size(whole.shape[3]), num_warps=4,
            )  # fmt: skip
        return dq, dk, dv


class _Listed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, chosen, p, present, *rule):
        q, k, v = rows(q), rows(k), rows(v)
        ctx.problem = Problem(q, k, v, chosen, p, present, *rule)
        out, lse = ctx.problem.forward(q, k, v)
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do):
        return *ctx.problem.backward(*ctx.saved_tensors, rows(do)), *[None] * 7
