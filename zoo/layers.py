"""Small parts that several architectures are made of."""

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from transformers import initialization as init

from zoo import ops
from zoo.config import ZooConfig
from zoo.few_rows import once
from zoo.kernels.checks import accumulator
from zoo.kernels.packing import Packing
from zoo.mixer import Layer


class RMSNorm(Layer):
    """`x / rms(x) * weight` over the last dimension; with `unit_offset` the stored weight is added to one."""

    def __init__(self, width: int, eps: float = 1e-5, unit_offset: bool = False):
        super().__init__()
        self.eps, self.unit_offset = eps, unit_offset
        self.weight = nn.Parameter(torch.empty(width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        init.constant_(self.weight, 0.0 if self.unit_offset else 1.0)

    def forward(self, x: Tensor) -> Tensor:
        return ops.gated_norm(x, 1.0 + wide(self.weight) if self.unit_offset else self.weight, eps=self.eps)


class GatedNorm(Layer):
    """Norm over each of `groups` equal parts of the width, times a weight, times `activation(gate)` where a gate is given.

    Args: kind: "rms" or "layer"; elementwise: whether there is a weight, one for the whole width; bias: only with "layer".
    """

    def __init__(self, width: int, *, groups: int = 1, kind: str = "rms", eps: float = 1e-5, activation: str = "silu",
                 norm_before_gate: bool = True, elementwise: bool = True, bias: bool = False):  # fmt: skip
        super().__init__()
        self.options = {"groups": groups, "kind": kind, "eps": eps, "activation": activation, "norm_before_gate": norm_before_gate}
        self.weight = nn.Parameter(torch.empty(width)) if elementwise else None
        self.bias = nn.Parameter(torch.empty(width)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.weight is not None:
            init.ones_(self.weight)
        if self.bias is not None:
            init.zeros_(self.bias)

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        return ops.gated_norm(x, self.weight, gate, bias=self.bias, **self.options)


class LayerNorm(nn.LayerNorm):
    """torch's; of single tokens with the kernel of the other norms, which torch's takes three times as long as for so little."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-2] > 1 or torch.is_autocast_enabled(x.device.type):  # in which torch's is in float32
            return super().forward(x)
        return ops.gated_norm(x, self.weight, bias=self.bias, kind="layer", eps=self.eps)


def make_norm(kind: str, width: int, eps: float) -> nn.Module:
    """The norm a config names."""
    if kind in ("layernorm", "biasless_layernorm"):
        return LayerNorm(width, eps=eps, bias=kind == "layernorm")
    return RMSNorm(width, eps, unit_offset=kind == "unit_rmsnorm")


class ShortConv(Layer):
    """Causal depthwise convolution over the last `kernel` tokens; its state is the `kernel - 1` inputs before, `[B, W - 1, D]`."""

    def __init__(self, width: int, kernel: int = 4, bias: bool = False, activation: str | None = "silu"):
        super().__init__()
        self.width, self.kernel, self.activation = width, kernel, activation
        self.weight = nn.Parameter(torch.empty(width, kernel))
        self.bias = nn.Parameter(torch.empty(width)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = 1 / math.sqrt(self.kernel)  # as torch initialises a depthwise convolution
        init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            init.uniform_(self.bias, -bound, bound)

    def initial_state(self, batch: int, dtype: torch.dtype, device) -> Tensor:
        return torch.zeros(batch, self.kernel - 1, self.width, dtype=dtype, device=device)

    def forward(self, x: Tensor, state: Tensor | None = None, packing: Packing | None = None) -> tuple[Tensor, Tensor]:
        return ops.short_conv(x, self.weight, self.bias, activation=self.activation, state=state, packing=packing)


def convolve_together(
    parts: tuple[Tensor, ...], conv: ShortConv | None, state: dict[str, Tensor] | None, packing: Packing | None
) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """Queries, keys and values (or others) through one convolution over all their channels, or through SiLU alone without one.

    Returns: the parts, and the new state: `conv`, or nothing.
    """
    joined, after = torch.cat(parts, dim=-1), {}
    if conv is None:
        joined = nn.functional.silu(joined)
    else:
        joined, after["conv"] = conv(joined, state["conv"] if state else None, packing)
    return joined.split([part.shape[-1] for part in parts], dim=-1), after


def projected_sizes(config: ZooConfig) -> list[int]:
    """Widths of queries, keys and values: `D * key_ratio` and `D * value_ratio` for `num_heads` heads, of which keys and values
    have `num_kv_heads`. ValueError where these do not divide evenly."""
    heads = config.num_heads
    sharing = 1 if config.num_kv_heads is None else config.divide("num_heads", "num_kv_heads")
    keys, values = int(config.hidden_size * config.key_ratio), int(config.hidden_size * config.value_ratio)
    if keys % heads or values % heads:
        raise ValueError(f"{type(config).__name__}: {keys} key and {values} value channels are not divisible by num_heads={heads}")
    return [keys, keys // sharing, values // sharing]


def laid_out(*parts: tuple[str, int]) -> dict[str, tuple[str, list[slice]]]:
    """`Mixer.roles` of a mixer whose `in_proj` has these parts, each with its number of rows, from its first row on."""
    found, start = {"out_proj": ("out_proj", [slice(None)])}, 0
    for name, rows in parts:
        found[name], start = ("in_proj", [slice(start, start + rows)]), start + rows
    return found


class LowRank(nn.Module):
    """`up(activation(down(x)))`, a linear map of small rank; the bias belongs to `up`."""

    def __init__(self, width: int, rank: int, out: int, activation=None, bias: bool = True):
        super().__init__()
        self.down = nn.Linear(width, rank, bias=False)
        self.up = nn.Linear(rank, out, bias=bias)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.down(x)
        return self.up(hidden if self.activation is None else self.activation(hidden))


class SoftplusDecay(Layer):
    """Log-decay `-exp(A_log) softplus(x + dt_bias)` of step sizes x, one rate A per head, as Mamba-2 has it (arXiv:2405.21060).

    Args:
        heads: H; channels: K where every channel decays by itself, x being `[B, T, H * K]` and the result `[B, T, H, K]`;
            None: x and the result are `[B, T, H]`.
        least: A is drawn uniformly from `[least, 16]`, and softplus(dt_bias) log-uniformly from `[0.001, 0.1]`.
    """

    def __init__(self, heads: int, channels: int | None = None, *, least: float = 1.0):
        super().__init__()
        self.heads, self.channels, self.least = heads, channels, least
        self.A_log = nn.Parameter(torch.empty(heads))
        self.dt_bias = nn.Parameter(torch.empty(heads * (channels or 1)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        init.uniform_(self.A_log, self.least, 16.0)
        init.copy_(self.A_log, self.A_log.detach().log())
        init.uniform_(self.dt_bias, math.log(0.001), math.log(0.1))
        step = self.dt_bias.detach().exp()
        init.copy_(self.dt_bias, step + torch.log(-torch.expm1(-step)))  # the inverse of softplus

    def forward(self, x: Tensor) -> Tensor:
        if self.channels is None:
            return ops.discretize(x, self.A_log, self.dt_bias)[0]
        return ops.discretize(split_heads(x, self.heads), self.A_log, split_heads(self.dt_bias, self.heads))[0]


def orthogonal(weight: Tensor, gain: float = 1.0) -> None:
    """Initialise a matrix orthogonally, drawn in float32 whatever its dtype; a loaded one is left alone."""
    drawn = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
    init.copy_(weight, init.orthogonal_(drawn, gain=gain))


def unit_length(x: Tensor, eps: float = 1e-6) -> Tensor:
    """`x / sqrt(sum(x^2) + eps)` over the last dimension, in the dtype of x."""
    channels = x.shape[-1]
    kind = {"dtype": accumulator(x.dtype), "device": x.device}
    share = once(lambda: torch.full((channels,), channels**-0.5, **kind), None, "unit length", channels, *kind.values())
    return ops.gated_norm(x, share, eps=eps / channels)


class BlockLinear(Layer):
    """A linear map with a block-diagonal matrix: `weight` `[blocks, K, K]` (in, out), each block mixing K = width / blocks neighbours."""

    def __init__(self, width: int, blocks: int, bias: bool = True):
        super().__init__()
        if width % blocks:
            raise ValueError(f"BlockLinear: {blocks} blocks do not divide the width {width}")
        self.blocks = blocks
        self.weight = nn.Parameter(torch.empty(blocks, width // blocks, width // blocks))
        self.bias = nn.Parameter(torch.empty(width)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        init.normal_(self.weight, std=self.weight.shape[-1] ** -0.5)
        if self.bias is not None:
            init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        y = merge_heads(torch.einsum("...ni,nio->...no", split_heads(x, self.blocks), self.weight))
        return y if self.bias is None else y + self.bias


class HedgehogFeatures(Layer):
    """`[B, T, H, K] -> [B, T, H, 2 F]`, positive, in float32: softmax of `x W` and of its negative, W `[H, K, F]` (arXiv:2402.04347)."""

    def __init__(self, heads: int, channels: int, features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(heads, channels, features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        init.copy_(self.weight, torch.eye(*self.weight.shape[1:]).expand_as(self.weight))

    def forward(self, x: Tensor) -> Tensor:
        y = wide(torch.einsum("bthk,hkf->bthf", x, self.weight))
        return torch.cat([y.softmax(-1), (-y).softmax(-1)], dim=-1).clamp(min=1e-12)


class ReluFeatures(nn.Module):
    """`relu(W x)`, the same for all heads (T2R, arXiv:2103.13076)."""

    def __init__(self, channels: int):
        super().__init__()
        self.layer = nn.Linear(channels, channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.relu(self.layer(x))


def wide(x: Tensor) -> Tensor:
    """x in float32, or as it is in float64: for gates and decays, which must not be rounded to half precision."""
    return x if x.dtype == torch.float64 else x.float()


def bounded_gates(logit: Tensor, bound_logit: Tensor | None) -> tuple[Tensor, Tensor]:
    """log f and 1 - f of the forget gate `f = gamma + (1 - gamma) sigmoid(logit)`, gamma being the sigmoid of `bound_logit`.

    Neither is computed from the other, so that neither loses digits. Without a bound gamma is zero (HGRN, arXiv:2311.04823).
    """
    logit = wide(logit)
    log_forget, write = nn.functional.logsigmoid(logit), torch.sigmoid(-logit)
    if bound_logit is None:
        return log_forget, write
    bound = wide(bound_logit)
    log_bound, log_rest = nn.functional.logsigmoid(bound), nn.functional.logsigmoid(-bound)
    return torch.logaddexp(log_bound, log_rest + log_forget), torch.sigmoid(-bound) * write


def split_heads(x: Tensor, heads: int) -> Tensor:
    """`[B, T, H * K] -> [B, T, H, K]`, a view."""
    return x.unflatten(-1, (heads, -1))


def merge_heads(x: Tensor) -> Tensor:
    """`[B, T, H, K] -> [B, T, H * K]`."""
    return x.flatten(-2)


def rotary(x: Tensor, positions: Tensor, theta: float = 10000.0, fraction: float = 1.0) -> Tensor:
    """Rotate pairs of channels by angles proportional to position (RoFormer, arXiv:2104.09864, eq. 34; halves as in Llama).

    Args:
        x: `[B, T, H, K]`.
        positions: `[B, T]` integers.
        fraction: share of the channels that turn, the first ones.
    """
    return rotate(x, rotary_table(positions, int(x.shape[-1] * fraction) // 2 * 2, theta))


def rotary_table(positions: Tensor, width: int, theta: float = 10000.0, scaling: dict | None = None) -> tuple[Tensor, Tensor]:
    """Cosines and sines for `rotate`, float32 `[B, T, 1, width]`, of positions `[B, T]`: of both halves, the first one turning back.

    `scaling` stretches the angles for longer contexts, with transformers' keys: {"rope_type": "linear", "factor"} divides
    all frequencies; "llama3" (with "low_freq_factor", "high_freq_factor", "original_max_position_embeddings") divides those
    that turn less than `low_freq_factor` times within the original context, keeps those above `high_freq_factor`, and
    blends in between (Llama 3.1).
    """
    key = width, theta, None if scaling is None else tuple(scaling.items())
    return once(lambda: _rotary_table(positions, width, theta, scaling), positions, *key)


def _rotary_table(positions: Tensor, width: int, theta: float, scaling: dict | None) -> tuple[Tensor, Tensor]:
    frequencies = 1.0 / theta ** (torch.arange(0, width, 2, device=positions.device, dtype=torch.float32) / width)
    if scaling is not None and scaling["rope_type"] == "linear":
        frequencies = frequencies / scaling["factor"]
    elif scaling is not None and scaling["rope_type"] == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        frequencies = (1 - kept) * frequencies / scaling["factor"] + kept * frequencies
    angles = (positions.unsqueeze(-1) * frequencies).unsqueeze(2)  # in float32, as the frequencies are
    angles = torch.cat([-angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Turn the first channels of `x` `[B, T, H, K]` by a `rotary_table`; in x's dtype, as the models were trained."""
    cos, sin = (once(partial(t.to, x.dtype), t, x.dtype) for t in table)
    half = cos.shape[-1] // 2
    first, second, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    turned = first * cos[..., :half] + second * sin[..., :half], second * cos[..., half:] + first * sin[..., half:]
    return torch.cat([*turned, rest] if rest.shape[-1] else turned, dim=-1)


_SCALINGS = {"linear": {"factor"}, "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}}


def check_rope_scaling(scaling: dict | None) -> None:
    """Raise ValueError unless `rotary_table` understands this."""
    if scaling is None:
        return
    kind = scaling.get("rope_type")
    if kind not in _SCALINGS:
        raise ValueError(f"rope_scaling: rope_type {kind!r} is not supported; choose one of {', '.join(_SCALINGS)}, or None")
    if set(scaling) != _SCALINGS[kind] | {"rope_type"}:
        raise ValueError(f"rope_scaling of type {kind!r} has the keys {sorted(scaling)}; it needs rope_type and {sorted(_SCALINGS[kind])}")


def token_shift(x: Tensor, state: Tensor | None = None, packing: Packing | None = None) -> tuple[Tensor, Tensor]:
    """The token before each token, zeros (or `state` `[B, 1, D]`) before the first; and the state after, the last token."""
    if x.shape[1] == 1 and packing is None and state is not None:
        return state.to(x.dtype), x
    weight = x.new_zeros(x.shape[-1], 2)
    weight[:, 0] = 1.0
    return ops.short_conv(x, weight, state=state, packing=packing)


def token_positions(x: Tensor, seen: Tensor | None = None, packing: Packing | None = None) -> Tensor:
    """`[B, T]`: position of every token in its own sequence. `seen` `[B]` (or one per packed sequence) came before."""
    if packing is not None:
        positions = packing.positions if seen is None else packing.positions + seen[packing.seq_idx]
        return positions.unsqueeze(0)
    if seen is not None and x.shape[1] == 1:
        return once(lambda: seen.unsqueeze(1).clone(), None, "positions", seen.shape, seen.dtype)  # all layers have seen the same
    positions = torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1)
    return positions if seen is None else positions + seen.unsqueeze(1)


def mixtures(x: Tensor, before: Tensor, shares: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """`x + (before - x) * share` for each share `[D]`."""
    back = before - x
    return tuple(torch.addcmul(x, back, share) for share in shares)


def exponential_gates(
    log_forget: Tensor, log_input: Tensor, start: Tensor | None = None, packing: Packing | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gates of any size, rescaled so that none exceeds one (xLSTM, arXiv:2405.04517, eq. 15-17).

    Where `S_t = f_t S_{t-1} + i_t k_t v_t^T` may overflow, `exp(-m_t) S_t` with `m_t = max(log f_t + m_{t-1}, log i_t)` does
    not: it decays by `exp(log f_t + m_{t-1} - m_t)` and is written with `exp(log i_t - m_t)`. The recurrence of m is a
    cumulative maximum. m is a choice of units in which S is kept, so no gradient passes through it.

    Args:
        log_forget, log_input: `[B, T, H]`, logarithms of f and i, of any size.
        start: m_0, `[B, H]` (one row per sequence with packing). Default 0.

    Returns:
        log_decay and log_write, float64 `[B, T, H]`, never positive; m `[B, T, H]` and its last value `[B, H]`, as float32
        (float64 for float64 gates).
    """
    with torch.no_grad():
        forget, write = log_forget.double(), log_input.double()
        if packing is not None:  # behind its end a sequence keeps its m
            forget, write = packing.pad(forget), packing.pad(write, -math.inf)
        start = torch.zeros_like(forget[:, 0]) if start is None else start.double()
        total = forget.cumsum(1)
        m = total + torch.maximum((write - total).cummax(1).values, start.unsqueeze(1))
        m = m.to(wide(log_input).dtype)  # rounded before use, so that a state and its stored m belong together
        before, last = torch.cat([start.unsqueeze(1), m[:, :-1]], dim=1), m[:, -1]
        if packing is not None:
            m, before = packing.unpad(m), packing.unpad(before)
    log_decay, log_write = log_forget.double() + before - m, log_input.double() - m
    # rounding may leave them a little above zero: take that off without touching the gradient
    return log_decay - log_decay.detach().clamp(min=0), log_write - log_write.detach().clamp(min=0), m, last


def slot_attention(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: dict[str, Tensor] | None, packing: Packing | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Softmax attention to M slots, moving averages of keys and values (GSA, arXiv:2409.07146).

    A slot keeps `alpha` of itself and takes up `1 - alpha` of the token, its key of k and its value of v. The first pass reads the
    slots' keys, which decay where a linear attention has its values, the second the slots' values.

    Args:
        q: `[B, T, H, K]`; k: `[B, T, G, K]`; v: `[B, T, G, V]`, G dividing H.
        log_decay: log alpha, `[B, T, G, M]`, in float32.
        state: `slot_keys` `[B, H, K, M]` and `slot_values` `[B, H, M, V]`; None: nothing seen.

    Returns:
        `softmax(q . slot keys) slot values` `[B, T, H, V]` in q's dtype, and the new state. The softmax's logits are never rounded.
    """
    keys, values = (state["slot_keys"], state["slot_values"]) if state else (None, None)
    taken = -torch.expm1(log_decay)
    log_decay = log_decay.repeat_interleave(q.shape[2] // log_decay.shape[2], dim=2)
    rule = {"scale": 1.0, "packing": packing}
    logits, keys = ops.linear_attention(wide(q), wide(k), taken, value_log_decay=log_decay, state=keys, **rule)
    o, values = ops.linear_attention(logits.softmax(-1).to(q.dtype), taken.to(q.dtype), v, log_decay, state=values, **rule)
    return o, {"slot_keys": keys, "slot_values": values}


def mlstm_cell(
    q: Tensor, k: Tensor, v: Tensor, log_forget: Tensor, log_input: Tensor, state: dict[str, Tensor] | None, packing: Packing | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """A matrix memory C with exponential gates and a normaliser n (xLSTM, arXiv:2405.04517, eq. 19-21).

    The denominator has 1e-6 added, in units of `exp(m)`, as in the authors' code.

    Args:
        q, k: `[B, T, H, K]`; v: `[B, T, H, V]`; log_forget, log_input: `[B, T, H]`, logarithms of the gates, of any size.
        state: `memory` `[B, H, K, V + 1]`, `exp(-m)` times C and, as the last channel, n; `m` `[B, H]`. None: nothing seen.

    Returns:
        h `[B, T, H, V]` in q's dtype, and the new state.
    """
    memory, start = (state["memory"], state["m"]) if state else (None, None)
    log_decay, log_write, m, last = exponential_gates(log_forget, log_input, start, packing)
    k = (wide(k) * log_write.exp().to(m.dtype).unsqueeze(-1)).to(k.dtype)
    v = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)  # the added channel of the memory is n
    o, memory = ops.linear_attention(q, k, v, log_decay, state=memory, packing=packing)
    h, weight = wide(o).split([o.shape[-1] - 1, 1], dim=-1)
    h = h / (torch.maximum(weight.abs(), (-m).exp().unsqueeze(-1)) + 1e-6)
    return h.to(q.dtype), {"memory": memory, "m": last}
