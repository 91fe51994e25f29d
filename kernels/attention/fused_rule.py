"""The rule of attention inside Triton kernels: which tiles a tile sees, who sees whom in them, and what their logits are.

A call's rule is a sum of the flags below, a constant of the compiler; its numbers (how far a window reaches, lengths) are not.
"""

import triton
from triton import language as tl

PACKED = tl.constexpr(1)  # sequences end to end in a row
PLACED = tl.constexpr(2)  # positions come as tensors
CAUSAL = tl.constexpr(4)
DILATED = tl.constexpr(8)
SINKS = tl.constexpr(16)
MARKED = tl.constexpr(32)  # global tokens
SLOPES = tl.constexpr(64)
FORGET = tl.constexpr(128)
CAP = tl.constexpr(256)
SIGMOID = tl.constexpr(512)
NEAR = tl.constexpr(1024)  # queries see few keys, and one walk over all tiles is shorter than one over those at the edges after the rest
DESCRIBED = tl.constexpr(2048)  # tiles of the other side come by descriptors (TMA)
BIASED = tl.constexpr(64 + 128 + 256)
UNEVEN = tl.constexpr(2 + 8)  # no tile is known to be seen whole
ONCE = tl.constexpr(2 + 8 + 1024)  # one walk
ELSEWHERE = tl.constexpr(16 + 32)  # keys are seen outside the window
LOG2E = tl.constexpr(1.4426950408889634)
SIZES = ["H", "SEQUENCES", "QUERIES", "KEYS", "back", "ahead", "dilation", "sinks"]  # compiled once for all values


@triton.jit
def place(CU, SEQUENCES, QUERIES, KEYS, tile, SIZE: tl.constexpr, RULE: tl.constexpr):
    """The first token of a tile in its sequence, the sequence's first in the row, and its numbers of queries and keys. Of packed rows
    the tiles are counted as if sequence n began with tile `CU[n] // SIZE + n`; some tiles are then empty."""
    if PACKED & RULE:
        low, high = tile * 0, tile * 0 + SEQUENCES
        while high - low > 1:
            middle = (low + high) // 2
            before = tl.load(CU + middle) // SIZE + middle <= tile
            low = tl.where(before, middle, low)
            high = tl.where(before, high, middle)
        start = tl.load(CU + low)
        length = (tl.load(CU + low + 1) - start).to(tl.int32)
        return ((tile - low - start // SIZE) * SIZE).to(tl.int32), start, length, length
    else:
        return tile * SIZE, tile.to(tl.int64) * 0, QUERIES, KEYS


@triton.jit
def span(a, z, back, ahead, length, forced, HULL, SIZE: tl.constexpr, RULE: tl.constexpr):
    """Tiles of the other side that a tile from a to z needs: where they begin, how many at the left edge, inside, and at the right. If
    PLACED all are at the edge, from the first to the last of HULL if there is one."""
    begin, end = tl.maximum(a - back, 0) // SIZE * SIZE, tl.minimum(z + ahead + 1, length)
    if (PLACED & RULE) and HULL is not None:
        begin, end = tl.load(HULL) * SIZE, tl.minimum(tl.load(HULL + 1) * SIZE, length)
    elif PLACED & RULE:
        begin, end = begin * 0, length
    elif ELSEWHERE & RULE:
        begin, end = tl.where(forced, 0, begin), tl.where(forced, length, end)
    count = tl.maximum(tl.cdiv(end - begin, SIZE), 0)
    left = tl.minimum(tl.maximum(z - back - begin + SIZE - 1, 0) // SIZE, count)
    whole = tl.minimum(tl.maximum(tl.minimum(a + ahead + 1, length) - begin - left * SIZE, 0) // SIZE, count - left)
    if UNEVEN & RULE:
        left, whole = count, 0
    elif ELSEWHERE & RULE:
        left, whole = tl.where(forced, count, left), tl.where(forced, 0, whole)
    return begin, left, whole, count - left - whole


@triton.jit
def forgotten(AFTER, own, begin, step, end, count, limit, KEYS: tl.constexpr):
    """How many of so many tiles are forgotten, counted from the far end, found by halves. own: the gates' sum at the end of the program's
    tile (`KEYS`: of keys) that is nearest to them, `AFTER + begin + n step`, not past the end, that of the n-th tile from the far end."""
    low, high = count * 0, count
    while low < high:
        middle = (low + high) // 2
        other = tl.load(AFTER + tl.minimum(begin + middle * step, end))
        gone = (own - other if KEYS else other - own) > limit
        low = tl.where(gone, middle + 1, low)
        high = tl.where(gone, high, middle)
    return low


@triton.jit
def remembered(AFTER, LIMIT, by_key, by_head, own, begin, left, whole, keys, SIZE: tl.constexpr):
    """Where tiles of keys begin for a tile of queries, at the left edge and inside, once those that are forgotten are left out."""
    if LIMIT is not None:
        first, limit = begin + SIZE - 1, tl.load(LIMIT + by_head)
        gone = forgotten(AFTER + by_key, own, first, SIZE, keys - 1, left + whole, limit, False)
        return begin + gone * SIZE, tl.maximum(left - gone, 0), whole - tl.maximum(gone - left, 0)
    else:
        return begin, left, whole


@triton.jit
def remembering(AFTER, LIMIT, first, by_head, own, begin, left, whole, right, queries, SIZE: tl.constexpr):
    """How many tiles of queries at the left edge, inside and at the right have not forgotten a whole tile of keys."""
    if LIMIT is not None:
        count = left + whole + right
        far, limit = begin + (count - 1) * SIZE, tl.load(LIMIT + by_head)
        kept = count - forgotten(AFTER + first, own, far, -SIZE, queries - 1, count, limit, True)
        return tl.minimum(kept, left), tl.minimum(tl.maximum(kept - left, 0), whole), tl.maximum(kept - left - whole, 0)
    else:
        return left, whole, right


@triton.jit
def edge_tile(n, begin, left, whole, right, sunk, LIST, start, i, length, SIZE: tl.constexpr, RULE: tl.constexpr):
    """Where the n-th tile under a mask begins, which of its tokens belong to it, and whether any pair may be hidden: the edges, then `sunk`
    tiles of sinks, then those on the list that holds marked tokens; these two leave out what was there before. NEAR: all, in order."""
    if NEAR & RULE:
        return begin + n * SIZE, begin + n * SIZE + i < length, (n < left) | (n >= left + whole)
    at = begin + tl.where(n < left, n, n + whole) * SIZE
    if (ELSEWHERE & RULE) and not PLACED & RULE:
        m = n - left - right
        at = tl.where(m >= 0, m * SIZE, at)
        least = 0
        if MARKED & RULE:
            listed = (tl.load(LIST + tl.maximum(m - sunk, 0)).to(tl.int64) * SIZE - start).to(tl.int32)
            at = tl.where(m >= sunk, listed, at)
            least = tl.where(m >= sunk, sunk * SIZE, 0)
        j = at + i
        new = (m < 0) | (j < begin) | (j >= begin + (left + whole + right) * SIZE)
        return at, (j >= least) & (j < length) & new, True
    else:
        return at, at + i < length, True


@triton.jit
def sees(gap, j, marked_p, marked_j, back, ahead, dilation, sinks, RULE: tl.constexpr):
    """Whether a query sees a key at j, gap positions before it; all arguments broadcast."""
    near = (gap <= back) & (gap >= -ahead)
    if DILATED & RULE:
        near &= gap % dilation == 0
    if SINKS & RULE:
        near |= j < sinks
    if MARKED & RULE:
        near |= (marked_p | marked_j) != 0
    if (CAUSAL & RULE) and (ELSEWHERE & RULE):
        near &= gap >= 0
    if PLACED & RULE:
        near &= j >= 0
    return near


@triton.jit
def logits(s, gap, slope, gate, scale, cap, RULE: tl.constexpr):
    """In base 2, from products; and the derivative of the cap. Without biases the caller scales."""
    bend = 1.0
    if CAP & RULE:
        y = s * (scale / LOG2E / cap)
        e = tl.exp2(-2 * LOG2E * tl.abs(y))
        y = tl.where(y < 0, e - 1, 1 - e) / (1 + e)
        s, bend = y * (cap * LOG2E), 1 - y * y
    elif BIASED & RULE:
        s *= scale
    if SLOPES & RULE:
        s -= slope * tl.abs(gap).to(tl.float32)
    if FORGET & RULE:
        s += gate
    return s, bend


@triton.jit
def sigmoid(x):
    """Of x in base 2."""
    e = tl.exp2(-tl.abs(x))
    return tl.where(x < 0, e, 1.0) / (1 + e)


@triton.jit
def read(X, at, i, stride, c, channels, inside, MASK: tl.constexpr, EVEN: tl.constexpr, TYPE: tl.constexpr):
    """Tokens at + i, channels c."""
    x = X + at.to(tl.int64) * stride + i[:, None] * stride + c[None, :]
    if MASK:
        return tl.load(x, mask=inside[:, None] if EVEN else inside[:, None] & (c[None, :] < channels), other=0.0).to(TYPE)
    elif EVEN:
        return tl.load(x).to(TYPE)
    else:
        return tl.load(x, mask=c[None, :] < channels, other=0.0).to(TYPE)


@triton.jit
def of_head(X, b, start, h, x_b, x_t, x_h, RULE: tl.constexpr):
    """Where a sequence begins in a row and a head; a descriptor stays as it is."""
    if DESCRIBED & RULE:
        return X
    else:
        return X + b * x_b + start * x_t + h * x_h


@triton.jit
def fetch(
    X, b, h, at, i, stride, c, channels, inside, SIZE: tl.constexpr, PADDED: tl.constexpr,
    MASK: tl.constexpr, EVEN: tl.constexpr, TYPE: tl.constexpr, RULE: tl.constexpr,
):  # fmt: skip
    """`read` of what `of_head` made; by a descriptor tokens behind the row's end and channels that are not there are zeros."""
    if DESCRIBED & RULE:
        return X.load([b.to(tl.int32), at, h, 0]).reshape(SIZE, PADDED).to(TYPE)
    else:
        return read(X, at, i, stride, c, channels, inside, MASK, EVEN, TYPE)


@triton.jit
def gates(AFTER, REST, at, i, inside, anchor, RULE: tl.constexpr):
    """Cumulative log forget gates of a tile in base 2 as sums of two float32 numbers, and those of its token `anchor`."""
    if FORGET & RULE:
        own, rest = tl.load(AFTER + at + i, mask=inside, other=0.0), tl.load(REST + at + i, mask=inside, other=0.0)
        return own, rest, tl.load(AFTER + at + anchor), tl.load(REST + at + anchor)
    else:
        return 0.0, 0.0, 0.0, 0.0


@triton.jit
def gate_of_pair(own, rest, anchor, last, AFTER, REST, at, i, inside, KEYS: tl.constexpr, EDGE: tl.constexpr, RULE: tl.constexpr):
    """What is forgotten between a query and a key, of the program's own tile (`KEYS`: of keys) and of tokens i of the other side. Where a
    whole tile comes before another, only what is forgotten between the program's token `anchor` and the key; the rest belongs to the
    query, and the caller takes it off the log-sum-exp. Neither part can be positive, so float32 keeps both."""
    if FORGET & RULE:
        if EDGE:
            a, b = tl.load(AFTER + at + i, mask=inside, other=0.0)[None, :], tl.load(REST + at + i, mask=inside, other=0.0)[None, :]
            gap = (a - own[:, None]) + (b - rest[:, None])
            return tl.minimum(gap if KEYS else -gap, 0.0)
        elif KEYS:
            return ((anchor - own) + (last - rest))[:, None]
        else:
            return ((anchor - tl.load(AFTER + at + i)) + (last - tl.load(REST + at + i)))[None, :]
    else:
        return 0.0


@triton.jit
def scores(
    s, own_at, own_marked, own, rest, anchor, last, AT, MARKED_, AFTER, REST, tokens, by_head, at, i, shift, real, cut,
    slope, scale, cap, back, ahead, dilation, sinks, KEYS: tl.constexpr, EDGE: tl.constexpr, RULE: tl.constexpr,
):  # fmt: skip
    """From products of the program's own tile (rows) and of tokens at + i of the other side (columns): logits as `logits` makes them,
    masked if `cut`, the derivative of the cap, and how far queries are behind keys."""
    there = tl.load(AT + tokens + at + i, mask=real, other=-1).to(tl.int32) if PLACED & RULE else at + i + shift
    gap = there[None, :] - own_at[:, None] if KEYS else own_at[:, None] - there[None, :]
    gate = gate_of_pair(own, rest, anchor, last, AFTER, REST, by_head + at, i, real, KEYS, EDGE, RULE)
    x, bend = logits(s, gap, slope, gate, scale, cap, RULE)
    if cut:
        marked = tl.load(MARKED_ + tokens + at + i, mask=real, other=0)[None, :] if MARKED & RULE else 0
        j = own_at[:, None] if KEYS else there[None, :]
        seen = sees(gap, j, own_marked, marked, back, ahead, dilation, sinks, RULE)
        if not (NEAR & RULE) or not CAUSAL & RULE:  # else keys behind the end are behind all queries; those add zeros
            seen &= real[None, :]
        x = tl.where(seen, x, -float("inf"))
    return x, bend, gap


@triton.jit
def log_sum(LSE, i, inside):
    """In base 2; of a query that sees nothing any number will do."""
    lse = tl.load(LSE + i, mask=inside, other=0.0) * LOG2E
    return tl.where(lse == -float("inf"), 0.0, lse)


@triton.jit
def key_tiles(
    MARKED_P, LISTED, own, i, b, first, queries, keys, inside, back, ahead, sinks, BM: tl.constexpr, BN: tl.constexpr, RULE: tl.constexpr
):
    """Whether queries of a tile are global, `span` of the keys they see, and the numbers of tiles of sinks and of listed tiles outside."""
    a, z = first + keys - queries, tl.minimum(first + BM, queries) - 1 + keys - queries
    marked, forced, sunk, listed = 0, first < 0, 0, 0
    if MARKED & RULE:
        marked = tl.load(MARKED_P + own + i, mask=inside, other=0)
        forced = tl.max(marked.to(tl.int32), 0) > 0
        marked = marked[:, None]
    hull = LISTED + (b * tl.cdiv(queries, BM) + first // BM) * 2 if (PLACED & RULE) and LISTED is not None else LISTED
    begin, left, whole, right = span(a, z, back, ahead, keys, forced, hull, BN, RULE)
    if not PLACED & RULE:
        if SINKS & RULE:
            if not CAUSAL & RULE:
                right = tl.maximum(right, tl.cdiv(tl.minimum(sinks, keys) - begin, BN) - left - whole)
            sunk = tl.cdiv(tl.minimum(sinks, begin), BN)
        if MARKED & RULE:
            listed = tl.where(forced, 0, tl.load(LISTED + b))
    return marked, begin, left, whole, right, sunk, listed


@triton.jit
def query_tiles(marked, LISTED, b, tile, a, z, queries, sinking, back, ahead, SIZE: tl.constexpr, RULE: tl.constexpr):
    """`span` of the queries that see a tile of keys from a to z (in places of queries), and the number of listed tiles outside."""
    forced, listed = sinking, 0
    if MARKED & RULE:
        many = tl.max(tl.max(marked.to(tl.int32), 1), 0) > 0
        listed = 0 if PLACED & RULE else tl.where(many, 0, tl.load(LISTED + b))
        forced = (forced | many) if SINKS & RULE else many
    hull = LISTED + tile * 2 if (PLACED & RULE) and LISTED is not None else LISTED
    begin, left, whole, right = span(a, z, ahead, back, queries, forced, hull, SIZE, RULE)
    return begin, left, whole, right, listed
