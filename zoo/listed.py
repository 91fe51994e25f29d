"""Attention whose tokens choose the blocks of keys that they see, by sums of keys over windows: what its mixers share."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from zoo import ops
from zoo.attending import RotaryAttention
from zoo.config import ZooConfig
from zoo.kernels.attention import cache, flops, summaries
from zoo.kernels.checks import accumulator
from zoo.kernels.packing import Packing
from zoo.mixer import State, Traits

PAIRS = 1 << 24  # of queries and windows at once, over batch and heads


class ListedAttention(RotaryAttention):
    """Causal attention of each token to its own block of keys up to itself, and to a list of blocks before.

    On every list are the token's own block and those just before, and the first ones; a subclass ranks the rest. Which blocks
    are chosen passes no gradient. A sequence of no more blocks than a list holds is seen as a whole.

    State: that of attention without a window, and `sums` `[B, S, G, K]`, float32 sums of the keys of each window.

    Args: config: with `block_size`, keys in a block, and `num_blocks`, blocks on a list, those always there included, beside the
        fields of heads and angles; firsts, locals: how many of the first blocks, and of the last ones up to the own, are always
        there; pool: size and stride of the windows, whose stride divides `block_size`; default: the blocks themselves.
    """

    traits = Traits(constant_state=False)

    def __init__(
        self, config: ZooConfig, layer: int, *, rope_scaling: dict | None = None, firsts: int = 0, locals: int = 1,
        pool: tuple[int, int] | None = None,
    ):  # fmt: skip
        keys = config.head_dim or config.divide("hidden_size", "num_heads")
        super().__init__(
            config, layer, heads=config.num_heads, groups=config.num_kv_heads or config.num_heads, keys=keys,
            rope=(keys, config.rope_theta, rope_scaling), qkv_bias=config.qkv_bias,
        )  # fmt: skip
        self.block, self.listed, self.firsts, self.locals = config.block_size, config.num_blocks, firsts, locals
        size, stride = pool or (self.block, self.block)
        self.pool = {"size": size, "stride": stride}

    def initial_state(self, batch: int, length: int, dtype: torch.dtype = torch.float32, device="cpu") -> State:
        count = summaries.windows(cache.capacity(length), self.pool["stride"])
        sums = torch.zeros(batch, count, self.groups, self.keys, dtype=accumulator(dtype), device=device)
        return super().initial_state(batch, length, dtype, device) | {"sums": sums}

    def operator_flops(self, length: int) -> int:
        before = sum(min(n, self.listed - 1) * min(self.block, length - n * self.block) for n in range(-(-length // self.block)))
        whole, rest = divmod(length, self.block)
        within = whole * self.block * (self.block + 1) // 2 + rest * (rest + 1) // 2
        scored = summaries.pairs(length, **self.pool)
        return flops(before * self.block + within, self.heads, self.keys, self.values) + flops(scored, self.heads, self.keys, 0)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, state: State | None, packing: Packing | None
    ) -> tuple[Tensor, State]:
        after = cache.append(state, k, v, packing=packing)
        after["sums"] = self.add(state, "sums", k, positions, after, packing)
        if packing is not None:
            q, positions = packing.pad(q), packing.pad(positions, -1)
        o = self.read(q, after, self.choose(q, after["sums"], positions), positions)
        return o if packing is None else packing.unpad(o), after

    def add(
        self, state: State | None, name: str, x: Tensor, positions: Tensor, after: State, packing: Packing | None,
        weight: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """The sums of this name after the tokens x `[B, T, G, .]`, for all slots of the cache `after` them."""
        sums, slots = state[name] if state else None, after["k"].shape[1]
        return summaries.add(sums, x, positions, slots, **self.pool, weight=weight, packing=packing)

    def read(self, q: Tensor, kept: State, lists: Tensor, positions: Tensor) -> Tensor:
        """What queries at these positions read in the listed blocks of the cache."""
        listed = {"size": self.block, "query_size": 1, "causal": True, "q_positions": positions, "scale": self.scale}
        return ops.block_attention(q, kept["k"], kept["v"], lists, **listed)[0]

    def choose(self, q: Tensor, sums: Tensor, positions: Tensor) -> Tensor:
        """The lists `[B, R, T, listed]` of queries `[B, T, H, K]`, -1 for no block."""
        q, sums = q.detach(), sums.detach()
        step = max(16, PAIRS // (q.shape[0] * q.shape[2] * sums.shape[1]))
        if step >= q.shape[1]:
            return self.best(q, sums, positions)
        parts = zip(q.split(step, dim=1), positions.split(step, dim=1), strict=True)
        return torch.cat([self.best(part, sums, places) for part, places in parts], dim=2)

    def best(self, q: Tensor, sums: Tensor, positions: Tensor) -> Tensor:
        """The same at once."""
        ranks = self.rank(q, sums, positions)
        block = torch.arange(ranks.shape[-1], device=q.device)
        gap = (positions // self.block).unsqueeze(-1) - block  # [B, T, N]
        always = (gap < self.locals) | (block < self.firsts)
        ranks = ranks.masked_fill(always.unsqueeze(1), torch.inf).masked_fill((gap < 0).unsqueeze(1), -torch.inf)
        ranks = pad(ranks, (0, max(0, self.listed - ranks.shape[-1])), value=-torch.inf)
        ranks, lists = ranks.sort(dim=-1, descending=True, stable=True)  # of equals the earlier: a later call must choose alike
        return lists[..., : self.listed].masked_fill(ranks[..., : self.listed] == -torch.inf, -1)

    def rank(self, q: Tensor, sums: Tensor, positions: Tensor) -> Tensor:
        """How much queries `[B, T, H, K]` want each block, `[B, R, T, N]` for R = 1, G or H; later blocks do not count."""
        raise TypeError(f"{type(self).__name__} does not define rank(q, sums, positions)")

    def relevance(self, q: Tensor, keys: Tensor, positions: Tensor) -> Tensor:
        """Attention of a group's heads to the windows complete by then, `[B, G, T, N, windows of a block]`, 0 elsewhere.

        A window stands with every block that it overlaps. keys: `[B, S, G, K]`, one for each window.
        """
        size, stride = self.pool["size"], self.pool["stride"]
        scale = self.keys**-0.5 if self.scale is None else self.scale
        logits = torch.einsum("btgrk,bsgk->bgrts", q.to(keys.dtype).unflatten(2, (self.groups, -1)), keys) * scale
        complete = summaries.last_positions(keys.shape[1], **self.pool, device=q.device) <= positions.unsqueeze(-1)
        blind = ~complete.any(-1, keepdim=True)
        weights = logits.masked_fill(~(complete | blind)[:, None, None], -torch.inf).softmax(-1)
        shared = weights.sum(2).masked_fill(~complete.unsqueeze(1), 0)
        own, overlap = self.block // stride, size // stride - 1
        return pad(shared, (overlap, -keys.shape[1] % own)).unfold(-1, own + overlap, own)
