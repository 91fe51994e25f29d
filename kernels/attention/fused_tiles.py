"""Attention under a rule in Triton: tiles of queries against the tiles of keys that the rule lets them see.

A program owns one tile (of queries in `forward` and `queries_gradient`, of keys in `keys_gradient`) of one head and walks over the
tiles of the other side: first those in which every pair is seen, without a mask, then those at the rule's edges and those that are
seen from everywhere (sinks, global tokens), under it; where queries see few keys, over all in order, of which those at the edges take a
branch to a mask. Weights are computed in base 2. With N visible pairs a head: `4 N D` FLOP forward and `14 N D` backward (scores are
computed twice); queries, keys, values, outputs and their gradients are read and written once a tile.

After FlashAttention-2, arXiv:2307.08691, algorithms 1 and 2. Tiles that forget gates have emptied are left out, as in arXiv:2504.06949.
"""

import triton
from triton import language as tl

from zoo.kernels.attention.fused_rule import (
    BIASED,
    DESCRIBED,
    FORGET,
    LOG2E,
    MARKED,
    NEAR,
    ONCE,
    PACKED,
    PLACED,
    SIGMOID,
    SIZES,
    SLOPES,
    edge_tile,
    fetch,
    gates,
    key_tiles,
    log_sum,
    of_head,
    place,
    query_tiles,
    read,
    remembered,
    remembering,
    scores,
    sigmoid,
)


@triton.jit(do_not_specialize=SIZES)
def forward(
    Q, K, V, OUT, LSE, CU, P, J, MARKED_P, MARKED_J, LIST, LISTED, SLOPE, AFTER_P, REST_P, AFTER_J, REST_J, LIMIT,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, o_b, o_t, o_h, lists,
    H, REP, D, W, SEQUENCES, QUERIES, KEYS, back, ahead, dilation, sinks, scale, cap,
    BM: tl.constexpr, BN: tl.constexpr, DP: tl.constexpr, WP: tl.constexpr, EVEN: tl.constexpr, RULE: tl.constexpr,
    TYPE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Outputs and their log-sum-exp. Programs: tiles of queries x heads x rows, the longest first."""
    tiles = QUERIES // BM + SEQUENCES if PACKED & RULE else tl.cdiv(QUERIES, BM)
    h, b = tl.program_id(0) // tiles % H, (tl.program_id(0) // tiles // H).to(tl.int64)
    first, start, queries, keys = place(CU, SEQUENCES, QUERIES, KEYS, tiles - 1 - tl.program_id(0) % tiles, BM, RULE)
    if first >= queries:
        return
    i, j, c, w = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, DP), tl.arange(0, WP)
    inside, tokens = first + i < queries, b * QUERIES + start + first
    by_head, by_key = (b * H + h) * QUERIES + start + first, (b * H + h) * KEYS + start
    LIST_ = LIST + b * lists if LIST is not None else LIST
    K_, V_ = of_head(K, b, start, h // REP, k_b, k_t, k_h, RULE), of_head(V, b, start, h // REP, v_b, v_t, v_h, RULE)
    q = read(Q + b * q_b + start * q_t + h * q_h, first, i, q_t, c, D, inside, True, EVEN, TYPE)
    p = tl.load(P + tokens + i, mask=inside, other=-1).to(tl.int32) if PLACED & RULE else first + keys - queries + i
    marked, begin, left, whole, right, sunk, listed = key_tiles(
        MARKED_P, LISTED, tokens, i, b, first, queries, keys, inside, back, ahead, sinks, BM, BN, RULE
    )
    slope = tl.load(SLOPE + h).to(tl.float32) * LOG2E if SLOPES & RULE else 0.0
    own, rest, anchor, last = gates(AFTER_P, REST_P, by_head, i, inside, 0, RULE)
    begin, left, whole = remembered(AFTER_J, LIMIT, by_key, b * H + h, anchor, begin, left, whole, keys, BN)
    top, total, out = tl.full((BM,), -float("inf"), ACC), tl.zeros((BM,), ACC), tl.zeros((BM, WP), ACC)
    factor = 1.0 if BIASED & RULE else scale
    for EDGE in tl.static_range(1 if ONCE & RULE else 0, 2):
        for n in range(0, left + right + sunk + listed + (whole if NEAR & RULE else 0) if EDGE else whole):
            at, real, cut = begin + (left + n) * BN, j >= 0, False
            if EDGE:
                at, real, cut = edge_tile(n, begin, left, whole, right, sunk, LIST_, start, j, keys, BN, RULE)
            k = fetch(K_, b, h // REP, at, j, k_t, c, D, real, BN, DP, EDGE, EVEN, TYPE, RULE)
            s = tl.dot(q, tl.trans(k), out_dtype=ACC)
            x, _, _ = scores(
                s, p, marked, own, rest, anchor, last, J, MARKED_J, AFTER_J, REST_J, b * KEYS + start, by_key, at, j, 0, real, cut,
                slope, scale, cap, back, ahead, dilation, sinks, False, EDGE, RULE,
            )  # fmt: skip
            v = fetch(V_, b, h // REP, at, j, v_t, w, W, real, BN, WP, EDGE, EVEN, TYPE, RULE)
            if SIGMOID & RULE:
                weights = sigmoid(x * factor)
            else:
                new = tl.maximum(top, tl.max(x, 1) * factor)
                base = tl.where(new == -float("inf"), 0.0, new) if EDGE else new
                weights, fade = tl.exp2(x * factor - base[:, None]), tl.exp2(top - base)
                total, out, top = total * fade + tl.sum(weights, 1), out * fade[:, None], new
            out = tl.dot(weights.to(TYPE), v, out, out_dtype=ACC)
        if (FORGET & RULE) and not EDGE:
            top += (own - anchor) + (rest - last)
    if not SIGMOID & RULE:
        safe = tl.where(total > 0, total, 1.0)
        out *= (1 / safe)[:, None]
        tl.store(LSE + by_head + i, tl.where(total > 0, top / LOG2E + tl.log(safe), -float("inf")), mask=inside)
    OUT += b * o_b + (start + first) * o_t + h * o_h + i[:, None] * o_t + w[None, :]
    tl.store(OUT, out.to(OUT.dtype.element_ty), mask=inside[:, None] if EVEN else inside[:, None] & (w[None, :] < W))


@triton.jit
def weigh(x, RULE: tl.constexpr):
    """Weights from logits below their log-sum-exp (sigmoid: from logits) in base 2."""
    return sigmoid(x) if SIGMOID & RULE else tl.exp2(x)


@triton.jit
def gradients(weights, dp, bend, RULE: tl.constexpr):
    """Of the logits before and after the cap, from those of weights, less o . do if these are softmax's; all of the shape of scores."""
    ds = weights * (1 - weights) * dp if SIGMOID & RULE else weights * dp
    return ds * bend, ds


@triton.jit
def levelled(slant, flow, away, DLSE, i, inside, RULE: tl.constexpr):
    """Sums of the logits' gradients times distances, without the rounding of o in delta. That is what the gradients' own sums, which are
    known, are off by, and times the weights' sums of distances what those with distances are."""
    if SIGMOID & RULE:
        return slant
    elif DLSE is not None:
        return slant - (flow - tl.load(DLSE + i, mask=inside, other=0.0)) * away
    else:
        return slant - flow * away


@triton.jit(do_not_specialize=SIZES)
def queries_gradient(
    Q, K, V, OUT, DO, LSE, DLSE, DQ, BELOW, DELTA, DSLOPE, DAFTER, CU, P, J, MARKED_P, MARKED_J, LIST, LISTED,
    SLOPE, AFTER_P, REST_P, AFTER_J, REST_J, LIMIT,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, o_b, o_t, o_h, g_b, g_t, g_h, d_b, d_t, d_h, lists,
    H, REP, D, W, SEQUENCES, QUERIES, KEYS, back, ahead, dilation, sinks, scale, cap,
    BM: tl.constexpr, BN: tl.constexpr, DP: tl.constexpr, WP: tl.constexpr, EVEN: tl.constexpr, RULE: tl.constexpr,
    TYPE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """DQ; BELOW (if asked for) and DELTA `[B, H, Tq]` for `keys_gradient`; sums of the logits' gradients into DAFTER `[B, H, Tq]`, and what
    this program adds to the gradient of its head's slope. Programs as in `forward`."""
    tiles = QUERIES // BM + SEQUENCES if PACKED & RULE else tl.cdiv(QUERIES, BM)
    h, b = tl.program_id(0) // tiles % H, (tl.program_id(0) // tiles // H).to(tl.int64)
    first, start, queries, keys = place(CU, SEQUENCES, QUERIES, KEYS, tiles - 1 - tl.program_id(0) % tiles, BM, RULE)
    if first >= queries:
        return
    i, j, c, w = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, DP), tl.arange(0, WP)
    inside, tokens = first + i < queries, b * QUERIES + start + first
    by_head, by_key = (b * H + h) * QUERIES + start + first, (b * H + h) * KEYS + start
    LIST_ = LIST + b * lists if LIST is not None else LIST
    K_, V_ = of_head(K, b, start, h // REP, k_b, k_t, k_h, RULE), of_head(V, b, start, h // REP, v_b, v_t, v_h, RULE)
    q = read(Q + b * q_b + start * q_t + h * q_h, first, i, q_t, c, D, inside, True, EVEN, TYPE)
    do = read(DO + b * g_b + start * g_t + h * g_h, first, i, g_t, w, W, inside, True, EVEN, TYPE)
    OUT += b * o_b + start * o_t + h * o_h
    lse, delta = summaries(OUT, LSE, DLSE, BELOW, DELTA, do, first, by_head, i, o_t, w, W, inside, EVEN, ACC, RULE)
    p = tl.load(P + tokens + i, mask=inside, other=-1).to(tl.int32) if PLACED & RULE else first + keys - queries + i
    marked, begin, left, whole, right, sunk, listed = key_tiles(
        MARKED_P, LISTED, tokens, i, b, first, queries, keys, inside, back, ahead, sinks, BM, BN, RULE
    )
    slope = tl.load(SLOPE + h).to(tl.float32) * LOG2E if SLOPES & RULE else 0.0
    own, rest, anchor, last = gates(AFTER_P, REST_P, by_head, i, inside, 0, RULE)
    begin, left, whole = remembered(AFTER_J, LIMIT, by_key, b * H + h, anchor, begin, left, whole, keys, BN)
    dq, flow, slant, away = tl.zeros((BM, DP), ACC), tl.zeros((BM,), ACC), tl.zeros((BM,), ACC), tl.zeros((BM,), ACC)
    factor = 1.0 if BIASED & RULE else scale
    for EDGE in tl.static_range(1 if ONCE & RULE else 0, 2):
        below = lse - (own - anchor) - (rest - last) if (FORGET & RULE) and not EDGE else lse
        for n in range(0, left + right + sunk + listed + (whole if NEAR & RULE else 0) if EDGE else whole):
            at, real, cut = begin + (left + n) * BN, j >= 0, False
            if EDGE:
                at, real, cut = edge_tile(n, begin, left, whole, right, sunk, LIST_, start, j, keys, BN, RULE)
            k = fetch(K_, b, h // REP, at, j, k_t, c, D, real, BN, DP, EDGE, EVEN, TYPE, RULE)
            s = tl.dot(q, tl.trans(k), out_dtype=ACC)
            v = fetch(V_, b, h // REP, at, j, v_t, w, W, real, BN, WP, EDGE, EVEN, TYPE, RULE)
            dp = tl.dot(do, tl.trans(v), out_dtype=ACC)
            x, bend, gap = scores(
                s, p, marked, own, rest, anchor, last, J, MARKED_J, AFTER_J, REST_J, b * KEYS + start, by_key, at, j, 0, real, cut,
                slope, scale, cap, back, ahead, dilation, sinks, False, EDGE, RULE,
            )  # fmt: skip
            weights = weigh(x * factor - below[:, None], RULE)
            ds, df = gradients(weights, dp - delta[:, None], bend, RULE)
            if (FORGET & RULE) or (SLOPES & RULE):
                flow += tl.sum(df, 1)
            if SLOPES & RULE:
                distance = tl.abs(gap).to(tl.float32)
                slant, away = slant + tl.sum(df * distance, 1), away + tl.sum(weights * distance, 1)
            dq = tl.dot(ds.to(TYPE), k, dq, out_dtype=ACC)
    if FORGET & RULE:
        tl.store(DAFTER + by_head + i, flow, mask=inside)
    if SLOPES & RULE:
        tl.store(DSLOPE + tl.program_id(0), -tl.sum(tl.where(inside, levelled(slant, flow, away, DLSE, by_head + i, inside, RULE), 0.0), 0))
    DQ += b * d_b + (start + first) * d_t + h * d_h + i[:, None] * d_t + c[None, :]
    dq = (dq * (scale / LOG2E)).to(DQ.dtype.element_ty)
    tl.store(DQ, dq, mask=inside[:, None] if EVEN else inside[:, None] & (c[None, :] < D))


@triton.jit
def summaries(
    OUT, LSE, DLSE, BELOW, DELTA, do, first, by_head, i, o_t, w, W, inside, EVEN: tl.constexpr, ACC: tl.constexpr, RULE: tl.constexpr
):  # fmt: skip
    """Of queries: their log-sum-exp in base 2, and o . do less its gradient, which BELOW and DELTA keep."""
    if SIGMOID & RULE:
        return tl.zeros_like(i).to(tl.float32), tl.zeros_like(i).to(tl.float32)
    else:
        o = read(OUT, first, i, o_t, w, W, inside, True, EVEN, ACC)
        delta, below = tl.sum(o * do.to(ACC), 1), log_sum(LSE, by_head + i, inside)
        if DLSE is not None:
            delta -= tl.load(DLSE + by_head + i, mask=inside, other=0.0)
        tl.store(DELTA + by_head + i, delta, mask=inside)
        if BELOW is not None:
            tl.store(BELOW + by_head + i, below, mask=inside)
        return below, delta


@triton.jit
def beside(LSE, AFTER, REST, head, by_head, at, i, real, anchor, last, EDGE: tl.constexpr, RULE: tl.constexpr):
    """What `keys_gradient` takes off logits, in base 2, as what has a descriptor is already."""
    if SIGMOID & RULE:
        return 0.0
    elif DESCRIBED & RULE:
        return LSE.load([head.to(tl.int32), at])
    else:
        below = log_sum(LSE, by_head + at + i, real)
        if (FORGET & RULE) and not EDGE:
            below -= (tl.load(AFTER + by_head + at + i) - anchor) + (tl.load(REST + by_head + at + i) - last)
        return below[None, :]


@triton.jit
def shared(DELTA, head, by_head, at, i, real, RULE: tl.constexpr):
    """What it takes off the gradients of weights."""
    if SIGMOID & RULE:
        return 0.0
    elif DESCRIBED & RULE:
        return DELTA.load([head.to(tl.int32), at])
    else:
        return tl.load(DELTA + by_head + at + i, mask=real, other=0.0)[None, :]


@triton.jit(do_not_specialize=SIZES)
def keys_gradient(
    K, Q, V, DO, LSE, DELTA, DK, DV, DAFTER, CU, P, J, MARKED_P, MARKED_J, LIST, LISTED, SLOPE, AFTER_P, REST_P, AFTER_J, REST_J, LIMIT,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, g_b, g_t, g_h, d_b, d_t, d_h, e_b, e_t, e_h, lists,
    H, REP, D, W, SEQUENCES, QUERIES, KEYS, back, ahead, dilation, sinks, scale, cap,
    BM: tl.constexpr, BN: tl.constexpr, DP: tl.constexpr, WP: tl.constexpr, EVEN: tl.constexpr, RULE: tl.constexpr,
    TYPE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """DK, DV, summed over the heads of a group, and DAFTER `[B, H, Tk]`. Scores are [keys, queries]. Programs: tiles of keys x groups x
    rows."""
    tiles = KEYS // BN + SEQUENCES if PACKED & RULE else tl.cdiv(KEYS, BN)
    group, b = tl.program_id(0) // tiles % (H // REP), (tl.program_id(0) // tiles // (H // REP)).to(tl.int64)
    first, start, queries, keys = place(CU, SEQUENCES, QUERIES, KEYS, tl.program_id(0) % tiles, BN, RULE)
    if first >= keys:
        return
    i, j, c, w = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, DP), tl.arange(0, WP)
    inside, end, shift, tokens = first + j < keys, tl.minimum(first + BN, keys) - 1, keys - queries, b * KEYS + start + first
    LIST_ = LIST + b * lists if LIST is not None else LIST
    k = read(K + b * k_b + start * k_t + group * k_h, first, j, k_t, c, D, inside, True, EVEN, TYPE)
    v = read(V + b * v_b + start * v_t + group * v_h, first, j, v_t, w, W, inside, True, EVEN, TYPE)
    at_j = tl.load(J + tokens + j, mask=inside, other=-1).to(tl.int32) if PLACED & RULE else first + j
    marked = tl.load(MARKED_J + tokens + j, mask=inside, other=0)[:, None] if MARKED & RULE else 0
    begin, left, whole, right, listed = query_tiles(
        marked, LISTED, b, b * tiles + first // BN, first - shift, end - shift, queries, first < sinks, back, ahead, BM, RULE
    )
    dk, dv, factor = tl.zeros((BN, DP), ACC), tl.zeros((BN, WP), ACC), 1.0 if BIASED & RULE else scale
    for h in range(group * REP, group * REP + REP):
        Q_, DO_ = of_head(Q, b, start, h, q_b, q_t, q_h, RULE), of_head(DO, b, start, h, g_b, g_t, g_h, RULE)
        by_head, by_key = (b * H + h) * QUERIES + start, (b * H + h) * KEYS + start + first
        slope = tl.load(SLOPE + h).to(tl.float32) * LOG2E if SLOPES & RULE else 0.0
        own, rest, anchor, last = gates(AFTER_J, REST_J, by_key, j, inside, end - first, RULE)
        few, inner, ending = remembering(AFTER_P, LIMIT, by_head, b * H + h, anchor, begin, left, whole, right, queries, BM)
        flow = tl.zeros((BN,), ACC)
        for EDGE in tl.static_range(1 if ONCE & RULE else 0, 2):
            for n in range(0, few + ending + listed + (inner if NEAR & RULE else 0) if EDGE else inner):
                at, real, cut = begin + (few + n) * BM, i >= 0, False
                if EDGE:
                    at, real, cut = edge_tile(n, begin, few, inner, ending, 0, LIST_, start, i, queries, BM, RULE)
                q = fetch(Q_, b, h, at, i, q_t, c, D, real, BM, DP, EDGE, EVEN, TYPE, RULE)
                s = tl.dot(k, tl.trans(q), out_dtype=ACC)
                x, bend, _ = scores(
                    s, at_j, marked, own, rest, anchor, last, P, MARKED_P, AFTER_P, REST_P, b * QUERIES + start, by_head, at, i, shift,
                    real, cut, slope, scale, cap, back, ahead, dilation, sinks, True, EDGE, RULE,
                )  # fmt: skip
                below = beside(LSE, AFTER_P, REST_P, b * H + h, by_head, at, i, real, anchor, last, EDGE, RULE)
                do = fetch(DO_, b, h, at, i, g_t, w, W, real, BM, WP, EDGE, EVEN, TYPE, RULE)
                weights = weigh(x * factor - below, RULE)
                if DESCRIBED & RULE:  # in larger tiles, which have no registers for weights beside their gradients
                    dv = tl.dot(weights.to(TYPE), do, dv, out_dtype=ACC)
                dp = tl.dot(v, tl.trans(do), out_dtype=ACC)
                ds, df = gradients(weights, dp - shared(DELTA, b * H + h, by_head, at, i, real, RULE), bend, RULE)
                if not DESCRIBED & RULE:
                    dv = tl.dot(weights.to(TYPE), do, dv, out_dtype=ACC)
                dk = tl.dot(ds.to(TYPE), q, dk, out_dtype=ACC)
                if FORGET & RULE:
                    flow += tl.sum(df, 1)
        if FORGET & RULE:
            tl.store(DAFTER + by_key + j, -flow, mask=inside)
    DK += b * d_b + (start + first) * d_t + group * d_h + j[:, None] * d_t + c[None, :]
    DV += b * e_b + (start + first) * e_t + group * e_h + j[:, None] * e_t + w[None, :]
    dk = (dk * (scale / LOG2E)).to(DK.dtype.element_ty)
    tl.store(DK, dk, mask=inside[:, None] if EVEN else inside[:, None] & (c[None, :] < D))
    tl.store(DV, dv.to(DV.dtype.element_ty), mask=inside[:, None] if EVEN else inside[:, None] & (w[None, :] < W))
