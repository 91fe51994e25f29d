"""The same in pieces that fit: torch's own attention where it serves, a band of blocks for windows, else query blocks.

- Nothing but causal or full: one call of `scaled_dot_product_attention`.
- A window over a long sequence: every block of C queries is laid beside the C + left + right keys it can see, with the
  sinks and global tokens in front, so time and memory grow with T W. A dilated window is the same within each residue
  class of positions. Global queries see everything and are computed apart.
- Otherwise blocks of queries against all keys, recomputed in the backward pass: memory grows with the keys only.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from zoo.kernels.attention import rules
from zoo.kernels.attention.rules import Rule
from zoo.kernels.checks import accumulator

PAIRS = 1 << 24  # of queries and keys at once, over batch and heads where logits are kept
SMALLEST, LARGEST = 32, 256  # blocks of the band


def attention(
    q, k, v, q_positions, kv_positions, global_tokens, slopes, log_forget, by_distance,
    causal, left, right, dilation, sinks, ordered, softcap, normaliser, scale, return_lse,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    rule = Rule(causal, left, right, dilation, sinks)
    soft = Softmax(scale, softcap, return_lse, normaliser)
    queries, keys = q.shape[1], k.shape[1]
    unruled = left is None and dilation == 1 and kv_positions is None
    biased = slopes is not None or log_forget is not None or by_distance is not None
    if unruled and not biased and soft.native and (not causal or queries in (1, keys)):
        if queries == 1:  # branched, so that the flag stays a plain bool where a compiler makes T symbolic
            causal = False
        return native(q, k, v, None, scale, causal=causal), None
    after = rules.cumulative(log_forget, q_positions, kv_positions, queries)
    countable = global_tokens is None or not torch.compiler.is_compiling()  # how many there are is not known to a tracer
    if ordered and left is not None and (queries == keys or (dilation == 1 and queries < keys)) and countable:
        band = Band(rule, soft, q, k, kv_positions, global_tokens)
        if band.pays:
            return band(q, k, v, slopes, *after, by_distance)
    return dense(rule, soft, q, k, v, q_positions, kv_positions, global_tokens, slopes, *after, by_distance)


class Softmax:
    """What happens between logits and outputs, for any set of pairs; with another normaliser the sigmoid of each logit."""

    def __init__(self, scale: float, softcap: float | None, return_lse: bool, normaliser: str = "softmax"):
        self.scale, self.softcap, self.return_lse, self.alone = scale, softcap, return_lse, normaliser == "sigmoid"
        self.native = softcap is None and not return_lse and not self.alone

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor, added: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """q `[B, Tq, H, K]`, k and v `[B, Tk, G, .]`, seen `[B, Tq, Tk]`, added to the logits `[B, H, Tq, Tk]`."""
        blind = ~seen.any(-1, keepdim=True)  # sees nothing: given everything for the softmax's sake, then set to 0
        safe = (seen | blind).unsqueeze(1)
        if self.native and added is None:
            return native(q, k, v, safe, self.scale).masked_fill(blind.unsqueeze(-1), 0), None
        dtype, acc = v.dtype, accumulator(v.dtype)
        batch, queries, heads, _ = q.shape
        q, k, v = (x.to(acc).transpose(1, 2) for x in (q, k, v))
        grouped = (batch, k.shape[1], -1)
        logits = ((q * self.scale).reshape(*grouped, q.shape[-1]) @ k.transpose(-1, -2)).reshape(batch, heads, queries, -1)
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        if added is not None:
            logits = logits + added
        logits = logits.masked_fill(~safe, -torch.inf)
        top = logits.detach().amax(-1, keepdim=True)
        weights = logits.sigmoid() if self.alone else (logits - top).exp()
        total = 1.0 if self.alone else weights.sum(-1, keepdim=True)
        out = (weights.reshape(*grouped, k.shape[2]) @ v).reshape(batch, heads, queries, -1) / total
        out = out.transpose(1, 2).masked_fill(blind.unsqueeze(-1), 0).to(dtype)
        lse = (total.log() + top).squeeze(-1).transpose(1, 2).masked_fill(blind, -torch.inf) if self.return_lse else None
        return out, lse


def native(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, scale: float, causal: bool = False) -> Tensor:
    """torch's attention, layout `[B, T, H, .]`; `seen` `[B, 1, Tq, Tk]`."""
    heads, values = q.shape[2], v.shape[3]
    wide = max(q.shape[3], values)  # its fast kernels want one size of head
    q, k, v = (pad(x, (0, wide - x.shape[3])) if x.shape[3] < wide else x for x in (q, k, v))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    single = q.shape[2] == 1 and heads > k.shape[1]
    if single:  # the queries of a group side by side, so that its keys are read once
        q = q.unflatten(1, (k.shape[1], -1)).squeeze(3)
        seen = None if seen is None else seen.expand(-1, -1, q.shape[2], -1)
    out = scaled_dot_product_attention(q, k, v, seen, is_causal=causal, scale=scale, enable_gqa=q.shape[1] > k.shape[1])
    if single:
        out = out.reshape(out.shape[0], heads, 1, -1)
    return out[..., :values].transpose(1, 2)


def dense(
    rule, soft: Softmax, q, k, v, q_positions, kv_positions, marked, slopes, after_p, after_j, by_distance
) -> tuple[Tensor, Tensor | None]:
    """Blocks of queries against all keys."""
    plain = q_positions is None
    p, j = rules.default_positions(q, k) if plain else (q_positions, kv_positions)
    offset = k.shape[1] - q.shape[1]

    def block(start: int, stop: int):
        seeing = slice(None, offset + stop if plain and rule.causal else None)
        own, keys = p[:, start:stop], j[:, seeing]
        flags = None if marked is None else marked[:, seeing]
        own_flags = None if marked is None else rules.marked_queries(own, j, marked)
        seen = rules.visible(rule, own, keys, own_flags, flags)
        pair = (None, None) if after_p is None else (after_p[:, start:stop], after_j[:, seeing])
        weighed = None if by_distance is None else by_distance[:, start:stop]
        added = rules.bias(own.unsqueeze(-1) - keys.unsqueeze(-2), slopes, *pair, weighed, accumulator(v.dtype))
        return soft(q[:, start:stop], k[:, seeing], v[:, seeing], seen, added)

    together = soft.native and slopes is None and after_p is None and by_distance is None
    size = max(16, PAIRS // (q.shape[0] * k.shape[1] * (1 if together else q.shape[2])))
    if size >= q.shape[1]:
        return block(0, q.shape[1])
    bounds = [(start, min(start + size, q.shape[1])) for start in range(0, q.shape[1], size)]
    if torch.is_grad_enabled():
        parts = [checkpoint(block, *bound, use_reentrant=False, preserve_rng_state=False) for bound in bounds]
    else:
        parts = [block(*bound) for bound in bounds]
    outs, sums = zip(*parts, strict=True)
    return torch.cat(outs, dim=1), torch.cat(sums, dim=1) if soft.return_lse else None


class Band:
    """A window over keys whose row index is their position (or which are empty)."""

    def __init__(self, rule: Rule, soft: Softmax, q: Tensor, k: Tensor, kv_positions: Tensor | None, marked: Tensor | None):
        self.rule, self.soft, self.marked, self.batch = rule, soft, marked, q.shape[0]
        self.left, self.right, self.step = rule.left, 0 if rule.causal else rule.right, rule.dilation
        self.keys, self.offset = k.shape[1], k.shape[1] - q.shape[1]
        index = torch.arange(self.keys, device=k.device).expand(self.batch, -1)
        self.present = index >= 0 if kv_positions is None else kv_positions >= 0
        self.everywhere = self.present & (index < rule.sinks)  # [B, Tk]: the keys laid in front of every block
        self.count = min(rule.sinks, self.keys)
        if marked is not None:
            self.everywhere = self.everywhere | self.present & marked
            self.count = int(self.everywhere.sum(1).max())
        reach = self.left + self.right
        self.size = min(LARGEST, max(SMALLEST, 1 << reach.bit_length()))
        self.span = self.size + reach
        self.length = -(-q.shape[1] // self.step)  # of a residue class
        self.blocks = -(-self.length // self.size)
        self.pays = self.length >= 2 * self.size and self.keys >= 2 * (self.span + self.count) * self.step

    def __call__(self, q, k, v, slopes, after_p, after_j, by_distance) -> tuple[Tensor, Tensor | None]:
        order = self.everywhere.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, : self.count]
        front = self.front(order, order)
        p = self.query_blocks(torch.arange(self.offset, self.keys, device=q.device).expand(self.batch, -1))
        near = torch.arange(self.left, self.left + self.size, device=q.device).unsqueeze(1) - torch.arange(self.span, device=q.device)
        gap = torch.cat([p.unsqueeze(-1) - front.unsqueeze(1), (near * self.step).expand(p.shape[0], -1, -1)], dim=-1)
        valid = torch.cat([self.front(self.everywhere, order), self.key_blocks(self.present & ~self.everywhere)], dim=1)
        inside = torch.cat([gap.new_ones(self.size, self.count, dtype=torch.bool), (near <= self.left) & (near >= -self.right)], dim=-1)
        seen = inside & valid.unsqueeze(1)
        if self.rule.causal:
            seen = seen & (gap >= 0)
        keys, values = (torch.cat([self.front(x, order), self.key_blocks(x)], dim=1) for x in (k, v))
        after = (None, None)
        if after_p is not None:
            after = self.query_blocks(after_p), torch.cat([self.front(after_j, order), self.key_blocks(after_j)], dim=1)
        weighed = None if by_distance is None else self.query_blocks(by_distance)
        added = rules.bias(gap, slopes, *after, weighed, accumulator(v.dtype))
        out, lse = self.soft(self.query_blocks(q), keys, values, seen, added)
        out, lse = self.join(out, q.shape[1]), None if lse is None else self.join(lse, q.shape[1])
        return (out, lse) if self.marked is None else self.answer_marked(out, lse, q, k, v, slopes, after_p, after_j, by_distance)

    def classes(self, x: Tensor) -> Tensor:
        """Residue classes of positions as rows of their own: `[B, T, ...]` -> `[B d, T / d, ...]`."""
        if self.step == 1:
            return x
        return along_time(x, 0, -x.shape[1] % self.step).unflatten(1, (-1, self.step)).transpose(1, 2).flatten(0, 1)

    def query_blocks(self, x: Tensor) -> Tensor:
        """`[B, Tq, ...]` -> `[B d N, C, ...]` for N blocks a class."""
        x = self.classes(x)
        return along_time(x, 0, self.blocks * self.size - x.shape[1]).unflatten(1, (-1, self.size)).flatten(0, 1)

    def key_blocks(self, x: Tensor) -> Tensor:
        """`[B, Tk, ...]` -> `[B d N, C + left + right, ...]`, the neighbourhoods of the blocks; beyond the ends lie zeros."""
        x = self.classes(x)
        front = self.left - self.offset
        x = along_time(x, front, (self.blocks - 1) * self.size + self.span - front - x.shape[1])
        return x.unfold(1, self.span, self.size).movedim(-1, 2).flatten(0, 1)

    def front(self, x: Tensor, order: Tensor) -> Tensor:
        """The keys seen from everywhere, for every block: `[B, Tk, ...]` -> `[B d N, E, ...]`; `order` itself likewise."""
        if x is not order:
            x = x[torch.arange(self.batch, device=x.device).unsqueeze(1), order]
        return x.repeat_interleave(self.step * self.blocks, dim=0)

    def join(self, x: Tensor, queries: int) -> Tensor:
        """The inverse of `query_blocks`."""
        x = x.unflatten(0, (self.batch, self.step, self.blocks)).flatten(2, 3)[:, :, : self.length]
        return x.transpose(1, 2).flatten(1, 2)[:, :queries]

    def answer_marked(self, out, lse, q, k, v, slopes, after_p, after_j, by_distance) -> tuple[Tensor, Tensor | None]:
        """Global queries see everything: they are gathered, answered apart and put in their places."""
        own = self.marked[:, self.offset :]
        chosen = own.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, : int(own.sum(1).max())]
        rows = torch.arange(self.batch, device=q.device).unsqueeze(1)
        positions = torch.arange(self.keys, device=q.device).masked_fill(~self.present, -1)
        after_p, by_distance = (None if x is None else x[rows, chosen] for x in (after_p, by_distance))
        asked = chosen + self.offset, positions, self.marked  # a row with fewer of them asks for ordinary ones, rightly answered
        answer, total = dense(self.rule, self.soft, q[rows, chosen], k, v, *asked, slopes, after_p, after_j, by_distance)
        return out.index_put((rows, chosen), answer), None if lse is None else lse.index_put((rows, chosen), total)


def along_time(x: Tensor, front: int, back: int) -> Tensor:
    """x with so many zeros before and behind in dimension 1; negative numbers cut."""
    return pad(x, (*[0, 0] * (x.ndim - 2), front, back))
