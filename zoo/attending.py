"""What mixers with softmax attention share: the cache of keys and values, and who sees whom."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from zoo import ops
from zoo.config import ZooConfig
from zoo.kernels.attention import cache, flops
from zoo.kernels.packing import Packing
from zoo.layers import RMSNorm, merge_heads, rotary_table, rotate, split_heads, token_positions
from zoo.mixer import Mixer, State, Traits


class AttentionMixer(Mixer):
    """Softmax attention of H query heads to G sets of keys; the projections are a subclass's.

    State: `k` `[B, L, G, K]`, `v` `[B, L, G, V]`, `length` `[B]`, and without a window `bound` `[B, T, 0]`, whose shape alone
    says how many tokens there may be. L grows in steps with the sequence; with a window it is fixed. A bidirectional layer
    sees its whole sequence at once and has no state.

    Args: heads: H; groups: G; keys: K; values: V, None is K; window: how many tokens are seen, the own included, on either side
        if bidirectional; the rest as `ops.attention` has them.
    """

    traits = Traits(bidirectional=True, constant_state=False)

    def __init__(
        self, config: ZooConfig, layer: int, *, heads: int, groups: int, keys: int, values: int | None = None,
        window: int | None = None, sinks: int = 0, softcap: float | None = None, scale: float | None = None,
    ):  # fmt: skip
        super().__init__(config, layer)
        if window is not None or not config.causal:
            self.traits = replace(self.traits, constant_state=True)
        self.heads, self.groups, self.keys, self.values = heads, groups, keys, values or keys
        self.causal, self.window, self.sinks, self.softcap = config.causal, window, sinks, softcap
        self.scale = scale

    def initial_state(self, batch: int, length: int, dtype: torch.dtype = torch.float32, device="cpu") -> State:
        if not self.causal:
            return {}
        slots = cache.capacity(length) if self.window is None else self.window + self.sinks
        k, v = (torch.zeros(batch, slots, self.groups, width, dtype=dtype, device=device) for width in (self.keys, self.values))
        state = {"k": k, "v": v, "length": torch.zeros(batch, dtype=torch.long, device=device)}
        return state if self.window is not None else state | {"bound": k.new_empty(batch, 0, 0)}

    def operator_flops(self, length: int) -> int:
        seen = min(length, length if self.window is None else self.window + self.sinks)
        pairs = seen * (seen + 1) // 2 + (length - seen) * seen
        pairs = pairs if self.causal else 2 * pairs - length
        return flops(pairs, self.heads, self.keys, self.values)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, state: State | None, packing: Packing | None,
        by_distance: Tensor | None = None, **terms,
    ) -> tuple[Tensor, State]:  # fmt: skip
        """Attention of these queries to the cached and the new keys, and the cache after; `terms`: further ones of `ops.attention`
        that belong to no single token."""
        window = None if self.window is None else (self.window - 1, self.window - 1)  # beside the own token; if causal the left counts
        rule = {"causal": self.causal, "window": window, "sinks": self.sinks, "softcap": self.softcap, "scale": self.scale} | terms
        if not self.causal:
            return ops.attention(q, k, v, **rule, packing=packing)[0], {}
        if self.window is None:
            after = cache.append(state, k, v, packing=packing)
            keys, values, kv_positions = after["k"], after["v"], cache.positions(after)
        else:
            keys, values, kv_positions, after = cache.ring_append(state, k, v, self.window, self.sinks, packing=packing)
        if state is None:
            return ops.attention(q, k, v, **rule, by_distance=by_distance, packing=packing)[0], after
        if packing is not None:
            q, positions = packing.pad(q), packing.pad(positions, -1)
            by_distance = None if by_distance is None else packing.pad(by_distance)
        o, _ = ops.attention(q, keys, values, **rule, by_distance=by_distance, q_positions=positions, kv_positions=kv_positions)
        return o if packing is None else packing.unpad(o), after


class RotaryAttention(AttentionMixer):
    """Attention whose queries, keys and values are plain projections, queries and keys turned by their positions.

    Args: rope: arguments of `zoo.layers.rotary_table` after the positions; None: nothing turns; qk_norm: an RMSNorm over each
        head of q and k, before they turn, a number being its epsilon; inputs: width of what is read, None is D; the rest as in
        `AttentionMixer`.
    """

    lora_targets = ("q_proj", "k_proj", "v_proj", "out_proj")

    def __init__(
        self, config: ZooConfig, layer: int, *, heads: int, groups: int, keys: int, rope: tuple | None, qkv_bias: bool = False,
        out_bias: bool = False, qk_norm: bool | float = False, inputs: int | None = None, **rule,
    ):  # fmt: skip
        super().__init__(config, layer, heads=heads, groups=groups, keys=keys, **rule)
        self.rope, inputs = rope, inputs or config.hidden_size
        self.q_proj = nn.Linear(inputs, heads * keys, bias=qkv_bias)
        self.k_proj = nn.Linear(inputs, groups * keys, bias=qkv_bias)
        self.v_proj = nn.Linear(inputs, groups * keys, bias=qkv_bias)
        self.out_proj = nn.Linear(heads * keys, config.hidden_size, bias=out_bias)
        eps = config.norm_eps if qk_norm is True else qk_norm
        self.q_norm = RMSNorm(keys, eps) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(keys, eps) if qk_norm else nn.Identity()

    def forward(self, x: Tensor, state: State | None = None, packing: Packing | None = None) -> tuple[Tensor, State]:
        return self.finish(self.q_proj(x), self.k_proj(x), self.v_proj(x), state, packing)

    def finish(self, q: Tensor, k: Tensor, v: Tensor, state: State | None, packing: Packing | None) -> tuple[Tensor, State]:
        """All that follows the projections `[B, T, H * K]` of q and `[B, T, G * K]` of k and v."""
        positions = token_positions(q, state["length"] if state else None, packing)
        o, state = self.attend(*self.turn(q, k, v, positions), positions, state, packing)
        return self.out_proj(merge_heads(o)), state

    def project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values `[B, T, ., K]` of tokens at these positions `[B, T]`."""
        return self.turn(self.q_proj(x), self.k_proj(x), self.v_proj(x), positions)

    def turn(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same of what the projections gave."""
        q, k = self.q_norm(split_heads(q, self.heads)), self.k_norm(split_heads(k, self.groups))
        if self.rope is not None:
            table = rotary_table(positions, *self.rope)
            q, k = rotate(q, table), rotate(k, table)
        return q, k, split_heads(v, self.groups)


def united(parts: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Attention to the union of sets of keys that share none, from outputs `[B, T, H, V]` and log-sum-exps `[B, T, H]` over each.

    What sees nothing in any has 0.
    """
    outs, sums = (torch.stack(part) for part in zip(*parts, strict=True))
    top = sums.detach().amax(0)
    weights = (sums - top.masked_fill(top.isinf(), 0)).exp().unsqueeze(-1)  # where nothing is seen all of them are 0
    return (weights * outs).sum(0) / weights.sum(0).clamp(min=torch.finfo(weights.dtype).tiny)
