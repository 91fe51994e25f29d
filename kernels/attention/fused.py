"""Attention under a rule in Triton: the host's side, and its gradient.

One launch forward, two backward; nothing waits for the device. bf16 and fp16 are multiplied as they are with float32 between products, fp32
as fp64 throughout: two kernels make the same weights, and a gate's gradient is a long sum of their differences. What torch computes as
fast, plain causal or full attention in half precision, is left to it.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from triton import language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from zoo.kernels.attention import chunked, fused_rule, fused_tiles, rules
from zoo.kernels.fused import INTERPRETED
from zoo.kernels.launch import launch, rows, strides
from zoo.kernels.packing import Packing
from zoo.kernels.segments import cdiv, padded_size

EVERYTHING = 1 << 29  # how far a query sees without a window
FEW = 2048  # positions
MUCH = 1 << 18  # tokens of all heads; with fewer a device waits for the host, whom descriptors cost time
NEGLIGIBLE = 80  # powers of 2; 24 are float32's precision, and the rest is more than there are tokens
LOG2E = fused_rule.LOG2E.value


def attention(
    q, k, v, q_positions, kv_positions, global_tokens, slopes, log_forget, by_distance,
    causal, left, right, dilation, sinks, ordered, softcap, normaliser, scale, return_lse, packing: Packing | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """See `zoo.kernels.attention.attention`."""
    windowed = left is not None or dilation > 1
    plain = slopes is None and log_forget is None and softcap is None and normaliser == "softmax" and not windowed
    whole = packing is None and ordered and not (return_lse or (causal and q.shape[1] != k.shape[1]))
    if plain and whole and q.is_cuda and q.dtype != torch.float32:
        return chunked.native(q, k, v, None, scale, causal=causal), None
    if ordered:
        q_positions = kv_positions = None
    if scale < 0:
        q, scale = -q, -scale
    after = _cumulative(log_forget, q_positions, kv_positions, q.shape[1])
    rule = Rule(causal, left, right, dilation, sinks if windowed else 0, max(scale, 1e-30), softcap, normaliser == "sigmoid")
    places = Places(q, k, q_positions, kv_positions, global_tokens if windowed else None, packing)
    out, lse = _Attention.apply(q, k, v, slopes, *after, rule, places)
    return out, lse.transpose(1, 2).float() if return_lse else None


def _cumulative(log_forget: Tensor | None, p: Tensor | None, j: Tensor | None, queries: int) -> tuple[Tensor | None, Tensor | None]:
    """Cumulative log forget gates at queries and keys, `[B, H, T]` in float64."""
    if log_forget is None:
        return None, None
    if p is not None:
        return tuple(x.transpose(1, 2).contiguous() for x in rules.cumulative(log_forget, p, j, queries))
    after = log_forget.transpose(1, 2).contiguous().double().cumsum(-1)  # along the last dimension, where torch scans in parallel
    return (after if queries == after.shape[2] else after[..., -queries:].contiguous()), after


class Rule(NamedTuple):
    """Who sees whom, and what becomes of a logit."""

    causal: bool
    left: int | None
    right: int | None
    dilation: int
    sinks: int
    scale: float
    softcap: float | None
    alone: bool  # weights are sigmoids

    def reach(self) -> tuple[int, int]:
        """How many positions before its own and after it a query sees."""
        back = EVERYTHING if self.left is None else min(self.left * self.dilation, EVERYTHING)
        ahead = 0 if self.causal else EVERYTHING if self.right is None else min(self.right * self.dilation, EVERYTHING)
        return back, ahead

    def numbers(self) -> tuple:
        """As kernels take them."""
        return *self.reach(), self.dilation, self.sinks, self.scale * LOG2E, self.softcap or 1.0

    def flags(self, places: "Places", slopes: Tensor | None, after: Tensor | None) -> int:
        terms = (
            (fused_rule.PACKED, places.cu is not None),
            (fused_rule.PLACED, places.p is not None),
            (fused_rule.CAUSAL, self.causal),
            (fused_rule.DILATED, self.dilation > 1),
            (fused_rule.SINKS, self.sinks > 0),
            (fused_rule.MARKED, places.marked_j is not None),
            (fused_rule.SLOPES, slopes is not None),
            (fused_rule.FORGET, after is not None),
            (fused_rule.CAP, self.softcap is not None),
            (fused_rule.SIGMOID, self.alone),
        )
        return sum(flag.value for flag, there in terms if there)


class Places:
    """Where queries and keys are, in the row and by their positions, and which of them are global."""

    def __init__(self, q: Tensor, k: Tensor, p: Tensor | None, j: Tensor | None, marked: Tensor | None, packing: Packing | None):
        self.queries, self.keys = q.shape[1], k.shape[1]
        self.cu, self.sequences = (None, 0) if packing is None else (packing.cu_seqlens, packing.count)
        self.p, self.j = (None, None) if p is None else (p.contiguous(), j.contiguous())
        self.marked_p = self.marked_j = None
        if marked is not None:
            self.marked_j = marked.contiguous().view(torch.uint8)
            self.marked_p = self._marked_queries(marked)

    def _marked_queries(self, marked: Tensor) -> Tensor:
        """`[B, Tq]`: whether the key at the query's own position is global."""
        if self.p is not None:
            known = self.j.masked_fill(~marked, -2).sort(-1).values
            found = torch.searchsorted(known, self.p).clamp(max=self.keys - 1)
            return (known.gather(1, found) == self.p).view(torch.uint8)
        if self.queries == self.keys:
            return self.marked_j
        return pad(self.marked_j, (self.queries - self.keys, 0)).contiguous()  # the last ones

    def listed(self, marked: Tensor | None, size: int) -> tuple[Tensor | None, Tensor | None, int]:
        """Tiles of the row with global tokens in front, `[B, tiles]`, how many they are, and the stride of rows."""
        if marked is None or self.p is not None:
            return None, None, 0
        some = blocks(marked, size, 0).amax(-1)
        return some.argsort(dim=1, descending=True, stable=True).int(), some.sum(1, dtype=torch.int32), some.shape[1]

    def hull(self, by_keys: bool, queries: int, keys: int, rule: "Rule") -> Tensor | None:
        """Of explicit positions: the first and the last but one of the tiles of the other side that a tile needs, `[B, tiles, 2]`."""
        if self.p is None or self.cu is not None:
            return None
        back, ahead = rule.reach()
        least, most = blocks(self.p, queries, EVERYTHING).amin(-1), blocks(self.p, queries, -EVERYTHING).amax(-1)
        first, last = blocks(self.j.where(self.j >= 0, EVERYTHING), keys, EVERYTHING).amin(-1), blocks(self.j, keys, -1).amax(-1)
        first, last = first.unsqueeze(1), last.unsqueeze(1)
        need = (last >= 0) & (last >= least.unsqueeze(2) - back) & (first <= most.unsqueeze(2) + ahead)
        everywhere = (first < rule.sinks) & (last >= 0)
        if self.marked_j is not None:
            everywhere = everywhere | (blocks(self.marked_j, keys, 0).amax(-1) > 0).unsqueeze(1)
            everywhere = everywhere | (blocks(self.marked_p, queries, 0).amax(-1) > 0).unsqueeze(2)
        need = (need | everywhere).byte()
        need = need.transpose(1, 2) if by_keys else need
        begin, end = need.argmax(-1), need.shape[2] - need.flip(-1).argmax(-1)
        return torch.stack([begin, torch.where(need.amax(-1) > 0, end, begin)], -1).int()

    def tiles(self, length: int, size: int) -> int:
        """Programs for a row."""
        return cdiv(length, size) if self.cu is None else length // size + self.sequences


def blocks(x: Tensor, size: int, value: int) -> Tensor:
    """`[B, T] -> [B, tiles, size]`, with the value behind the end."""
    return pad(x, (0, -x.shape[1] % size), value=value).unflatten(1, (-1, size))


class Tiles(NamedTuple):
    """A launch: queries and keys of a tile, warps, stages of the pipeline."""

    queries: int
    keys: int
    warps: int
    stages: int


# by channels of the widest head, up to which an entry serves: forward, gradient of queries, gradients of keys
NEAR = {  # where a query sees few keys, and small tiles have the least edge
    64: 3 * (Tiles(64, 64, 4, 3),),
    128: (Tiles(64, 64, 4, 3), Tiles(64, 64, 4, 2), Tiles(64, 64, 4, 2)),
    256: (Tiles(128, 64, 8, 2), Tiles(64, 64, 8, 2), Tiles(32, 64, 8, 2)),
}
ADDRESSED = NEAR | {128: (Tiles(64, 64, 4, 3), Tiles(64, 64, 4, 2), Tiles(32, 64, 4, 2))}  # addresses take registers
FAR = NEAR | {128: (Tiles(64, 64, 4, 3), Tiles(128, 64, 8, 3), Tiles(32, 128, 8, 3))}
SINGLE = {32: 3 * (Tiles(64, 64, 4, 1),), 256: 3 * (Tiles(32, 32, 4, 1),)}


def tiles(q: Tensor, v: Tensor, reach: int, described: bool) -> tuple[Tiles, Tiles, Tiles]:
    """For so many positions that a query sees."""
    table = SINGLE if q.dtype == torch.float32 else FAR if reach >= FEW else NEAR if described else ADDRESSED
    return next(found for most, found in table.items() if max(q.shape[3], v.shape[3]) <= most)


def walk(q: Tensor, k: Tensor, v: Tensor, flags: int, reach: int) -> int:
    """Flags of how programs walk: by descriptors where these were measured to be faster, else 0. Short walks of up to 128 channels and long
    ones of up to 64 or more than 128; no gates, beside which two programs on a multiprocessor have no memory for barriers, and no packed
    rows, of which a tile would read on in the next sequence."""
    wide = max(q.shape[3], v.shape[3])
    slower = wide > 128 if reach < FEW else 64 < wide <= 128
    if q.dtype == torch.float32 or flags & ~fused_rule.CAUSAL.value or slower or q.shape[:3].numel() < MUCH:
        return 0
    if q.shape[1] & 3 or not all(fits(x) for x in (q, k, v)):  # rows of log-sum-exps have descriptors too
        return 0
    return fused_rule.DESCRIBED.value | (fused_rule.NEAR.value if reach < FEW else 0)


def fits(x: Tensor) -> bool:
    """Whether it can have a descriptor."""
    *far, near = x.stride()
    return near == 1 and x.numel() > 0 and x.data_ptr() & 15 == 0 and all(n > 0 and n * x.itemsize & 15 == 0 for n in far)


def described(x: Tensor, size: int) -> TensorDescriptor:
    """By which a kernel reads tiles of so many tokens of `[B, T, H, channels]` or of `[B, H, T]`; what is behind the end reads as zeros."""
    x, block = (x, [1, size, 1, padded_size(x.shape[3])]) if x.dim() == 4 else (x.flatten(0, 1), [1, size])
    return TensorDescriptor(x, list(x.shape), list(x.stride()), block)


def types(dtype: torch.dtype) -> tuple[tl.dtype, tl.dtype]:
    """What operands are multiplied as, and summed up in."""
    if dtype == torch.float32:
        return tl.float64, tl.float64
    if dtype == torch.bfloat16:
        return tl.float32 if INTERPRETED else tl.bfloat16, tl.float32
    return tl.float16, tl.float32


def halves(after: Tensor | None, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """In base 2, as sums of two numbers: of two float32 ones differences are as exact as float64's and cheaper."""
    if after is None:
        return None, None
    after = after * LOG2E
    high = after.to(dtype)
    return high, (after - high).to(dtype)


def limit(q: Tensor, k: Tensor, slopes: Tensor | None, after: Tensor | None, rule: Rule, places: Places) -> Tensor | None:
    """`[B, H]`, in base 2: a tile of keys all of which have been forgotten by more adds nothing to sums in float32, as a query's own
    key has a gate of 1, and logits differ by no more than twice the product of the largest norms."""
    if after is None or slopes is not None or places.p is not None:
        return None
    queries, keys = (torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32).amax(1) for x in (q, k))
    most = queries * keys.repeat_interleave(q.shape[2] // k.shape[2], dim=1) * (rule.scale * LOG2E)
    most = most if rule.softcap is None else most.clamp(max=rule.softcap * LOG2E)
    return 2.02 * most + NEGLIGIBLE


class Problem:
    """Sizes and types of one call, and its launches."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, slopes: Tensor | None, after: tuple, rule: Rule, places: Places):
        wide = torch.float64 if q.dtype == torch.float32 else torch.float32
        self.rule, self.places, self.terms = (
            rule,
            places,
            (slopes, *halves(after[0], wide), *halves(after[1], wide), limit(q, k, slopes, after[0], rule, places)),
        )
        self.batch, self.heads, self.groups, self.keys, self.values = q.shape[0], q.shape[2], k.shape[2], q.shape[3], v.shape[3]
        reach, flags = sum(rule.reach()), rule.flags(places, slopes, after[0])
        self.walk = walk(q, k, v, flags, reach)
        self.tiles = tiles(q, v, reach, self.walk > 0)
        kind, exact = types(q.dtype)
        tile = padded_size(self.keys), padded_size(self.values)
        self.constants = {"DP": tile[0], "WP": tile[1], "EVEN": tile == (self.keys, self.values)}
        self.constants |= {"RULE": flags | self.walk, "TYPE": kind, "ACC": exact}
        self.sizes = self.heads, self.heads // self.groups, self.keys, self.values, places.sequences, places.queries, places.keys

    def launch(self, kernel, tile: Tiles, by_keys: bool, tensors: tuple, strided: tuple, walked: tuple[int, ...]) -> None:
        """Programs for tiles of queries of every head, or of keys of every group. walked: the places of tensors of the other side."""
        p, size = self.places, tile.queries if by_keys else tile.keys
        if self.walk:
            tensors = [described(x, size) if n in walked else x for n, x in enumerate(tensors)]
        listed, counts, lists = p.listed(p.marked_p if by_keys else p.marked_j, size)
        counts = p.hull(by_keys, tile.queries, tile.keys, self.rule) if listed is None else counts
        programs = p.tiles(p.keys, tile.keys) * self.groups if by_keys else p.tiles(p.queries, tile.queries) * self.heads
        launch(
            kernel, programs * self.batch,
            *tensors, p.cu, p.p, p.j, p.marked_p, p.marked_j, listed, counts, *self.terms, *(n for x in strided for n in strides(x)), lists,
            *self.sizes, *self.rule.numbers(), BM=tile.queries, BN=tile.keys, **self.constants,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
        """Outputs, and the log-sum-exp `[B, H, Tq]` of softmax."""
        out = v.new_empty(self.batch, q.shape[1], self.heads, self.values)
        exact = torch.float64 if q.dtype == torch.float32 else torch.float32  # it grows with distance under slopes
        lse = None if self.rule.alone else q.new_empty(self.batch, self.heads, q.shape[1], dtype=exact)
        self.launch(fused_tiles.forward, self.tiles[0], False, (q, k, v, out, lse), (q, k, v, out), (1, 2))
        return out, lse

    def backward(self, q, k, v, out, lse, do, dlse) -> tuple[Tensor | None, ...]:
        """Gradients of queries, keys, values, slopes and cumulative gates at queries and keys."""
        dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
        delta = None if lse is None else torch.empty_like(lse)
        below = torch.empty_like(lse) if self.walk else None
        if self.walk and not fits(do):
            do = do.clone(memory_format=torch.contiguous_format)
        slopes, after_p, _, after_j, *_ = self.terms
        dp, dj = (None if x is None else torch.empty_like(x, dtype=torch.float64) for x in (after_p, after_j))
        tile, programs = self.tiles[1], self.places.tiles(self.places.queries, self.tiles[1].queries)
        dslope = None if slopes is None else q.new_zeros(self.batch, self.heads, programs, dtype=torch.float32)
        tensors = q, k, v, out, do, lse, dlse, dq, below, delta, dslope, dp
        self.launch(fused_tiles.queries_gradient, tile, False, tensors, (q, k, v, out, do, dq), (1, 2))
        tensors = k, q, v, do, below if self.walk else lse, delta, dk, dv, dj
        self.launch(fused_tiles.keys_gradient, self.tiles[2], True, tensors, (q, k, v, do, dk, dv), (1, 3, 4, 5))
        return dq, dk, dv, None if slopes is None else dslope.double().sum((0, 2)).to(slopes.dtype), dp, dj


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, slopes, after_p, after_j, rule: Rule, places: Places):
        q, k, v = rows(q), rows(k), rows(v)
        ctx.problem = Problem(q, k, v, slopes, (after_p, after_j), rule, places)
        out, lse = ctx.problem.forward(q, k, v)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do, dlse):
        q, k, v, out, lse = ctx.saved_tensors
        do = rows(torch.zeros(1, dtype=out.dtype, device=out.device).expand(out.shape) if do is None else do)
        dlse = None if dlse is None else dlse.contiguous()
        return *ctx.problem.backward(q, k, v, out, lse, do, dlse), None, None
