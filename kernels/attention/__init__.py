"""Attention over a mask that is a rule: full, windowed, dilated, with sinks or global tokens, biased or forgetting."""

import torch
from torch import Tensor

from zoo.kernels.attention import (
    blocks,
    chunked,
    reference,
)
from zoo.kernels.checks import Shapes, accumulator, float_dtype
from zoo.kernels.dispatch import Backend, Op
from zoo.kernels.packing import Packing

NAME = "attention"
NORMALISERS = ("softmax", "sigmoid")


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    window: int | tuple[int, int] | None = None,
    dilation: int = 1,
    sinks: int = 0,
    global_tokens: Tensor | None = None,
    slopes: Tensor | None = None,
    log_forget: Tensor | None = None,
    by_distance: Tensor | None = None,
    softcap: float | None = None,
    normaliser: str = "softmax",
    scale: float | None = None,
    q_positions: Tensor | None = None,
    kv_positions: Tensor | None = None,
    packing: Packing | None = None,
    return_lse: bool = False,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Softmax attention of queries at positions p over the keys at positions j that the rule lets them see.

        logit = cap(scale * q_p . k_j) - slope * |p - j| + sum_{j < l <= p} log_forget_l + by_distance_p,p-j
        cap(x) = softcap * tanh(x / softcap)

    Args:
        q: `[B, Tq, H, K]`; k: `[B, Tk, G, K]`; v: `[B, Tk, G, V]`, one floating dtype, any strides. G divides H:
            head h reads group `h // (H / G)`.
        causal: only j <= p.
        window: `(left, right)`, how many positions are visible on either side of p besides p itself; causal attention
            ignores right. W alone means `(W - 1, 0)` if causal, W keys in all, and `(W, W)` if not. None: no limit.
        dilation: only `p - j` divisible by it, and the window counts in its units.
        sinks: positions below it are visible to all, window and dilation notwithstanding.
        global_tokens: `[B, Tk]` booleans: these see all and are seen by all. A query is global if the key at its
            position is. Neither sinks nor global tokens are seen before their time if causal.
        slopes: `[H]`, ALiBi's; negative ones favour the far.
        log_forget: `[B, Tk, H]`, logarithm of the forget gates, never positive, any floating dtype; causal only.
        by_distance: `[B, Tq, H, R]`, what each query adds at distances 0 to R - 1, any floating dtype; farther keys get what the
            last of them gets. Causal only.
        softcap: bound of the logits before biases. scale: default `1 / sqrt(K)`.
        normaliser: what makes weights of logits: "softmax" over the keys that are seen, or "sigmoid" of each by itself.
        q_positions, kv_positions: `[B, Tq]` and `[B, Tk]` int64, both or neither. A key at a negative position is an
            empty slot, never seen. Keys may lie in any order, except that with log_forget positions must not decrease,
            empty slots aside. Default: keys count from 0, queries are the last Tq of them.
        packing: documents laid end to end in one row (B = 1, Tq = Tk); nothing crosses, positions start anew in each.
        return_lse: also return the log-sum-exp of the logits; softmax only.
        backend: see `zoo.kernels.dispatch`.

    Returns:
        out `[B, Tq, H, V]` in the dtype of v, and None or the natural log-sum-exp `[B, Tq, H]` in float32 (float64 with
        float64 inputs), by which attention over parts of the keys can be combined. A query that sees nothing gets 0 and
        -inf, and passes no gradient. Both are differentiable in q, k, v, slopes, log_forget and by_distance.

    Raises:
        ValueError: a shape, dtype, device or combination that breaks the contract, naming the argument.
        BackendError: the backend asked for cannot run here.

    Cost: `2 H (K + V)` FLOP a visible pair. With a window `chunked` takes time and memory in proportion to T W when
    positions are the default ones; with global tokens it must count them, which waits for the device. `fused` leaves out tiles
    of pairs that the rule hides or forget gates have emptied, takes memory for q, k, v and out only, and never waits.

    Source: windows, dilation and global tokens: Longformer arXiv:2004.05150, section 3.1; sinks arXiv:2309.17453; slopes
    arXiv:2108.12409, of both signs arXiv:2502.18845; forget gates arXiv:2503.02130; softcap: Gemma 2 arXiv:2408.00118;
    sigmoid arXiv:2409.04431; queries that weigh distances: Transformer-XL arXiv:1901.02860, section 3.3.
    """
    float_dtype(NAME, q=q, k=k, v=v)
    shapes = Shapes(NAME)
    shapes("q", q, "B Tq H K")
    shapes("k", k, "B Tk G K")
    shapes("v", v, "B Tk G V")
    shapes.not_empty("B", "Tq", "Tk", "G")
    shapes.divides("G", "H", "k")
    shapes("global_tokens", global_tokens, "B Tk", dtype=torch.bool)
    shapes("slopes", slopes, "H")
    shapes("log_forget", log_forget, "B Tk H")
    shapes("by_distance", by_distance, "B Tq H R")
    shapes("q_positions", q_positions, "B Tq", dtype=torch.int64)
    shapes("kv_positions", kv_positions, "B Tk", dtype=torch.int64)
    ordered = q_positions is None and kv_positions is None
    paired = ordered or (q_positions is not None and kv_positions is not None)
    _check(shapes, causal, dilation, sinks, {"log_forget": log_forget, "by_distance": by_distance}, softcap, packing, paired)
    if ordered and causal and shapes["Tq"] > shapes["Tk"]:
        raise ValueError(f"{NAME}: q has {shapes['Tq']} tokens but k only {shapes['Tk']}; give q_positions and kv_positions")
    if ordered and packing is not None and not causal:  # behind a document's end there must be nothing to see
        q_positions = kv_positions = packing.positions.unsqueeze(0)
    if normaliser not in NORMALISERS:
        raise ValueError(f"{NAME}: normaliser {normaliser!r} is unknown; choose one of {', '.join(NORMALISERS)}")
    if return_lse and normaliser != "softmax":
        raise ValueError(f"{NAME}: return_lse is defined for normaliser='softmax' only, not {normaliser!r}")
    left, right = _window(window, causal)
    tensors = {"q": q, "k": k, "v": v, "q_positions": q_positions, "kv_positions": kv_positions}
    tensors |= {"global_tokens": global_tokens, "slopes": slopes, "log_forget": log_forget, "by_distance": by_distance}
    options = {"causal": bool(causal), "left": left, "right": right, "dilation": dilation, "sinks": sinks, "ordered": ordered}
    options |= {"softcap": None if softcap is None else float(softcap), "normaliser": normaliser}
    options |= {"scale": float(scale if scale is not None else shapes["K"] ** -0.5), "return_lse": bool(return_lse)}
    return OP(tensors, options, packing, backend)


def _check(shapes: Shapes, causal, dilation: int, sinks: int, causal_only: dict, softcap, packing, paired: bool) -> None:
    if not paired:
        raise ValueError(f"{NAME}: q_positions and kv_positions belong together; give both or neither")
    if dilation < 1:
        raise ValueError(f"{NAME}: dilation is {dilation}, expected 1 or more")
    if sinks < 0:
        raise ValueError(f"{NAME}: sinks is {sinks}, expected 0 or more")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"{NAME}: softcap is {softcap}, expected a positive number or None")
    for name, tensor in causal_only.items():
        if tensor is not None and not causal:
            raise ValueError(f"{NAME}: {name} is defined for causal attention only; set causal=True")
    if packing is not None and shapes["Tq"] != shapes["Tk"]:
        raise ValueError(f"{NAME}: q has {shapes['Tq']} tokens and k {shapes['Tk']}, but with packing they share one row")


def _window(window: int | tuple[int, int] | None, causal: bool) -> tuple[int | None, int | None]:
    """How many positions are visible to the left and to the right."""
    if window is None:
        return None, None
    if isinstance(window, int):
        left, right = (window - 1, 0) if causal else (window, window)
    else:
        left, right = window
    if left < 0 or right < 0:
        raise ValueError(f"{NAME}: window is {window}, expected W >= {int(causal)} or a pair (left, right) of numbers >= 0")
    return left, right


def flops(pairs: int, heads: int, keys: int, values: int) -> int:
    """Multiply-adds times two for so many visible pairs of query and key."""
    return 2 * pairs * heads * (keys + values)


def _meta(tensors: dict, options: dict, sequences: int) -> tuple[Tensor, Tensor | None]:
    q, v = tensors["q"], tensors["v"]
    lse = q.new_empty(q.shape[:3], dtype=accumulator(q.dtype)) if options["return_lse"] else None
    return v.new_empty(*q.shape[:3], v.shape[3]), lse


def _obstacle(tensors: dict) -> str | None:
    """What the fused kernels do not do."""
    if tensors["by_distance"] is not None:
        return "it has no kernel for queries that weigh distances"
    return blocks.obstacle(tensors)


def _case(groups: int = 2, values: int = 6, marked: bool = False, slopes: bool = False, forget: bool = False, reach: int = 0, **options):
    def draw(generator: torch.Generator, batch: int, length: int, dtype: torch.dtype) -> dict:
        def normal(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        heads, keys = 2, 6
        inputs = {
            "q": normal(batch, length, heads, keys),
            "k": normal(batch, length, groups, keys),
            "v": normal(batch, length, groups, values),
        }
        if marked:
            inputs["global_tokens"] = torch.rand(batch, length, generator=generator) < 0.05
        if slopes:
            inputs["slopes"] = normal(heads).abs()
        if forget:
            inputs["log_forget"] = -normal(batch, length, heads).abs()
        if reach:
            inputs["by_distance"] = normal(batch, length, heads, reach)
        return inputs | options

    return draw


OP = Op(
    NAME,
    reference=reference.attention,
    chunked=chunked.attention,
    tensors=("q", "k", "v", "q_positions?", "kv_positions?", "global_tokens?", "slopes?", "log_forget?", "by_distance?"),
    options={
        "causal": "bool",
        "left": "int?",
        "right": "int?",
        "dilation": "int",
        "sinks": "int",
        "ordered": "bool",
        "softcap": "float?",
        "normaliser": "str",
        "scale": "float",
        "return_lse": "bool",
    },
    along_time=("q", "k", "v", "q_positions", "kv_positions", "global_tokens", "log_forget", "by_distance"),
    meta=_meta,
    pad_values={"kv_positions": -1},
    fused="zoo.kernels.attention.fused",
    obstacle=_obstacle,
    opaque=False,
    cases={
        "causal": _case(),
        "grouped-lse": _case(groups=1, values=5, return_lse=True),
        "full": _case(causal=False, values=8),
        "window": _case(window=5, groups=1),
        "window-sinks": _case(window=4, sinks=2, dilation=2, return_lse=True),
        "longformer": _case(causal=False, window=3, marked=True),
        "alibi": _case(slopes=True, window=7),
        "sigmoid": _case(slopes=True, window=5, groups=1, normaliser="sigmoid"),
        "forgetting": _case(forget=True, softcap=4.0),
        "by-distance": _case(reach=4, slopes=True, window=6),
        "forgetting-window": _case(forget=True, window=6, sinks=1),
    },
    call=attention,
)
