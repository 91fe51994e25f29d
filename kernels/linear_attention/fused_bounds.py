"""Triton kernels of linear attention for the states between the segments of a sequence.

`collect` sums what each segment but the last adds to M, and `chain` turns these into what each segment starts from; with one segment
neither runs. M and the sum it belongs to are those of `fused_scalar`.

Floor, K = V = D channels of two bytes, per token and head: 2 D numbers of 2 bytes in; 2 D^2 FLOP; the states beside them are few.
"""

import triton
from triton import language as tl

from zoo.kernels.fused import load_tile, segment_of
from zoo.kernels.linear_attention.fused_scalar import (
    EXACT,
    NONE,
    ROWS,
    TOKEN,
    at_the_edge,
    load_decays,
    load_rest,
    scaled,
)


@triton.jit
def gather(
    B, Y, SUMS, EDGES, SAFES, m, b_t, y_t, own, length, place, h, d, w, H, D, W,
    C: tl.constexpr, EVEN: tl.constexpr, REVERSE: tl.constexpr, DECAY: tl.constexpr, TYPE: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """What all chunks of a segment make of M."""
    i, last = tl.arange(0, C), tl.cdiv(length, C) - 1
    READ: tl.constexpr = 2 if REVERSE else 0
    SCALED: tl.constexpr = (DECAY != NONE) & (DECAY != EXACT)
    if DECAY != NONE:
        before, after, near, safe = load_decays(
            SUMS, EDGES, SAFES, last if REVERSE else 0, i, d, D, own, length, place, H, h, C, DECAY, READ
        )
    for n in range(0, last + 1):
        j = (last - n) if REVERSE else n
        left, t = length - j * C, (j * C).to(tl.int64)
        b = load_tile(B + t * b_t, i, d, b_t, left, D, EVEN, TYPE)
        y = load_tile(Y + t * y_t, i, w, y_t, left, W, EVEN, TYPE)
        if DECAY != NONE:
            following = tl.maximum(j - 1, 0) if REVERSE else tl.minimum(j + 1, last)
            before_, after_, near_, safe_ = load_decays(SUMS, EDGES, SAFES, following, i, d, D, own, length, place, H, h, C, DECAY, READ)
        if DECAY == EXACT:
            edge = tl.where(before > 0, near, before)
            y = (y * tl.exp(edge if REVERSE else (after - edge))[:, None]).to(TYPE)
            m *= tl.exp(after)
        if SCALED:
            m = scaled(m, before, DECAY)
        if DECAY == ROWS and not safe:
            m = scaled(m, load_rest(EDGES, (place + j) * H + h, READ, d, D), DECAY)
        m = tl.dot(tl.trans(b), y, m, input_precision=PRECISION, out_dtype=ACC)
        if SCALED:
            before_ = before_ + after
        if DECAY != NONE:
            before, after, near, safe = before_, after_, near_, safe_
    if SCALED:
        m = scaled(m, after, DECAY)
    return m


@triton.jit
def collect(
    B, Y, BOUNDS, SUMS, TABLE, EDGES, UNSAFE, SAFES, b_b, b_t, b_h, y_b, y_t, y_h, s_b, s_h, b_rep, y_rep, H, D, W, CHUNKS,
    BD: tl.constexpr, BW: tl.constexpr, C: tl.constexpr, EVEN: tl.constexpr, REVERSE: tl.constexpr, DECAY: tl.constexpr,
    TYPE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What every segment but a sequence's last (first if REVERSE) adds to M, into BOUNDS at its end (its start if REVERSE). Programs:
    segments x heads x tiles of D x W."""
    slices = tl.cdiv(W, BW)
    tiles = tl.cdiv(D, BD) * slices
    tile_, h, segment = tl.program_id(0) % tiles, tl.program_id(0) // tiles % H, (tl.program_id(0) // tiles // H).to(tl.int64)
    row, start, stop = segment_of(TABLE, segment)
    if (start == stop) | at_the_edge(TABLE, segment, tl.num_programs(0) // (tiles * H), REVERSE):
        return
    d, w = (tile_ // slices) * BD + tl.arange(0, BD), (tile_ % slices) * BW + tl.arange(0, BW)
    B += row * b_b + start * b_t + (h // b_rep) * b_h
    Y += row * y_b + start * y_t + (h // y_rep) * y_h
    own = row * s_b + h * s_h + start
    length, place = (stop - start).to(tl.int32), segment * CHUNKS
    m = tl.zeros((BD, BW), ACC)
    if DECAY == TOKEN:
        if tl.load(UNSAFE + segment * H + h) > 0:
            m = gather(B, Y, SUMS, EDGES, SAFES, m, b_t, y_t, own, length, place, h, d, w, H, D, W, C, EVEN, REVERSE, EXACT,
                       TYPE, ACC, PRECISION)  # fmt: skip
        else:
            m = gather(B, Y, SUMS, EDGES, SAFES, m, b_t, y_t, own, length, place, h, d, w, H, D, W, C, EVEN, REVERSE, DECAY,
                       TYPE, ACC, PRECISION)  # fmt: skip
    else:
        m = gather(B, Y, SUMS, EDGES, SAFES, m, b_t, y_t, own, length, place, h, d, w, H, D, W, C, EVEN, REVERSE, DECAY,
                   TYPE, ACC, PRECISION)  # fmt: skip
    at = tl.load(TABLE + segment * 5 + (3 if REVERSE else 4))
    inside = (d[:, None] < D) & (w[None, :] < W)
    tl.store(BOUNDS + (at * H + h) * D * W + d[:, None] * W + w[None, :], m, mask=inside)


@triton.jit
def chain(
    BOUNDS, TOTALS, FIRST, INIT, H, D, W,
    BLOCK: tl.constexpr, AHEAD: tl.constexpr, REVERSE: tl.constexpr, DECAY: tl.constexpr, HAS_INIT: tl.constexpr,
):  # fmt: skip
    """BOUNDS from what each segment adds to what M is at each boundary, but for the last, which `sweep` finds. FIRST [sequences + 1]:
    their first segments; segment s of sequence n lies between the boundaries s + n and s + n + 1. DECAY: 0, or the dimensions of TOTALS:
    2 for [segments, H], 3 for [segments, H, D]. Programs: sequences x heads x blocks of D x W."""
    size = D * W
    blocks = tl.cdiv(size, BLOCK)
    x, h = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK), tl.program_id(0) // blocks % H
    n = (tl.program_id(0) // blocks // H).to(tl.int64)
    first, last = tl.load(FIRST + n), tl.load(FIRST + n + 1)
    inside = x < size
    if HAS_INIT:
        m = tl.load(INIT + (n * H + h) * size + x, mask=inside, other=0.0).to(BOUNDS.dtype.element_ty)
    else:
        m = tl.zeros((BLOCK,), BOUNDS.dtype.element_ty)
    tl.store(BOUNDS + (((last if REVERSE else first) + n) * H + h) * size + x, m, mask=inside)
    count, step, first = (last - first).to(tl.int32) - 1, -1 if REVERSE else 1, (last - 1) if REVERSE else first
    BOUNDS += ((first + n + (0 if REVERSE else 1)) * H + h) * size
    for j in range(0, count, AHEAD):
        added, decays = (), ()
        for u in tl.static_range(AHEAD):
            there, at = inside & (j + u < count), ((first + (j + u) * step) * H + h) * (D if DECAY == 3 else 1)
            added += (tl.load(BOUNDS + (j + u) * step * H * size + x, mask=there, other=0.0),)
            if DECAY == 3:
                decays += (tl.load(TOTALS + at + x // W, mask=there, other=0.0),)
            elif DECAY == 2:
                decays += (tl.load(TOTALS + at, mask=j + u < count, other=0.0),)
        for u in tl.static_range(AHEAD):
            if DECAY > 0:
                m *= tl.exp(decays[u])
            m += added[u]
            tl.store(BOUNDS + (j + u) * step * H * size + x, m, mask=inside & (j + u < count))
