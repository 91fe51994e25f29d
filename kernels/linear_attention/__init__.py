"""Linear attention: a matrix memory that decays and is written by outer products.

One operator under linear attention, RetNet, Lightning, Mamba-2, mLSTM, GLA, HGRN2, RWKV-5/6, Based and Hedgehog.
"""

import torch
from torch import Tensor

from zoo.kernels.checks import Shapes, accumulator, float_dtype
from zoo.kernels.dispatch import Backend, Op, kept, states_in_place
from zoo.kernels.linear_attention import chunked, reference
from zoo.kernels.packing import Packing

NAME = "linear_attention"
WIDEST = 512  # channels of a head that the fused kernels take


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    bonus: Tensor | None = None,
    value_log_decay: Tensor | None = None,
    normalize: bool = False,
    state: Tensor | None = None,
    packing: Packing | None = None,
    scale: float | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Outputs and last state of a decaying linear attention, causal in T.

        S_t = diag(exp(log_decay_t)) S_{t-1} + k_t v_t^T
        o_t = scale * q_t S_t                                          without bonus
        o_t = scale * q_t (S_{t-1} + diag(bonus) k_t v_t^T)            with bonus: the current token is read apart
        o_t is divided by scale * q_t . z_t, z_t being S_t for values of one, if normalize

    Args:
        q, k: `[B, T, H, K]`; v: `[B, T, H, V]`, one floating dtype, any strides. Each may have fewer heads than the
            largest of the three, which they must divide: head h reads group `h // (H / groups)`.
        log_decay: natural logarithm of the decay, never positive. None, `[H]`, `[B, T, H]` or `[B, T, H, K]`;
            any floating dtype. 0 keeps all, below -104 forgets all.
        bonus: `[H, K]`, RWKV's u.
        value_log_decay: `[B, T, H, V]`, a log-decay of the state's other side, `S_t` having `S_{t-1} diag(exp(value_log_decay_t))`
            in place of `S_{t-1}`; beside `log_decay` or alone, not with normalize.
        normalize: divide by the sum of weights; q and k must then be non-negative. The weights' sum is carried as
            one more value channel of the state.
        state: S_0, `[B, H, K, V]` (V + 1 if normalize), float32 (float64 with float64 inputs). Default zeros.
            With packing the first dimension is the number of sequences.
        packing: sequences laid end to end in one row (B = 1); the state starts anew at each.
        scale: default `1 / sqrt(K)`; no effect on the output if normalize.
        backend: see `zoo.kernels.dispatch`.

    Returns:
        o `[B, T, H, V]` in the dtype of v, and S_T. Both are differentiable in every tensor.

    Raises:
        ValueError: a shape, dtype or device that breaks the contract, naming the argument; value_log_decay with normalize.
        BackendError: the backend asked for cannot run here.

    Cost: `4 B T H K V` FLOP for the recurrence itself; `chunked` adds `2 B T C H (K + V)`, C = 64.

    Source: Katharopoulos et al. arXiv:2006.16236, eq. 18-20; RetNet arXiv:2307.08621, eq. 6; Mamba-2 arXiv:2405.21060,
    section 6; GLA arXiv:2312.06635, eq. 3; RWKV-6 arXiv:2404.05892, eq. 19; values that decay: GSA arXiv:2409.07146.
    """
    float_dtype(NAME, q=q, k=k, v=v)
    shapes = Shapes(NAME)
    shapes("q", q, "B T Hq K")
    shapes("k", k, "B T Hk K")
    shapes("v", v, "B T Hv V")
    shapes.not_empty("B", "T")
    shapes.sizes["H"] = max(shapes["Hq"], shapes["Hk"], shapes["Hv"])
    for group, name in (("Hq", "q"), ("Hk", "k"), ("Hv", "v")):
        shapes.divides(group, "H", name)
    shapes("log_decay", log_decay, "H", "B T H", "B T H K")
    shapes("bonus", bonus, "H K")
    shapes("value_log_decay", value_log_decay, "B T H V")
    if value_log_decay is not None and normalize:
        raise ValueError(f"{NAME}: value_log_decay gives every value weights of its own; with normalize=True give log_decay alone")
    values = shapes["V"] + normalize
    rows = shapes["B"] if packing is None else packing.count
    shapes.sizes.update(N=rows, S=values)
    shapes("state", state, "N H K S", dtype=accumulator(q.dtype))
    if packing is not None and log_decay is not None and log_decay.ndim == 1:
        log_decay = log_decay.expand(shapes["B"], shapes["T"], -1)  # per token, so that padding does not decay
    tensors = {"q": q, "k": k, "v": v, "log_decay": log_decay, "bonus": bonus, "value_log_decay": value_log_decay, "state": state}
    options = {"scale": float(scale if scale is not None else shapes["K"] ** -0.5), "normalize": bool(normalize)}
    return OP(tensors, options, packing, backend)


def step(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None = None, *, state: Tensor, bonus=None, scale=None) -> Tensor:
    """One token, `[B, H, K]` and `[B, H, V]` -> `[B, H, V]`; `state` `[B, H, K, V]` is updated in place (no gradient)."""
    if log_decay is not None and log_decay.ndim > 1:
        log_decay = log_decay.unsqueeze(1)
    pair = (x.unsqueeze(1) for x in (q, k, v))
    with torch.no_grad(), states_in_place():
        out, new = linear_attention(*pair, log_decay, bonus=bonus, state=state, scale=scale)
    return kept(out, new, state)


def summarize(k: Tensor, v: Tensor, log_decay: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """A segment as a map of states: `S_T = A * S_0 + S`.

    Args: k, v, log_decay as in `linear_attention`, with one number of heads.
    Returns: A `[B, H, K, 1]`, the decay over the segment, and S `[B, H, K, V]`. Segments combine associatively:
    `(A2, S2) after (A1, S1) = (A2 * A1, A2 * S1 + S2)`.
    """
    _, state = linear_attention(k, k, v, log_decay)
    batch, length, heads, keys = k.shape
    total = state.new_zeros(batch, heads, keys)
    if log_decay is not None:
        span = log_decay.to(state.dtype) * length if log_decay.ndim == 1 else log_decay.to(state.dtype).sum(1)
        total = total + (span if span.ndim == 3 else span.unsqueeze(-1))
    return total.exp().unsqueeze(-1), state


def flops(length: int, heads: int, keys: int, values: int) -> int:
    """Multiply-adds times two of the recurrence over one sequence."""
    return 4 * length * heads * keys * values


def _meta(tensors: dict, options: dict, sequences: int) -> tuple[Tensor, Tensor]:
    q, v = tensors["q"], tensors["v"]
    heads = max(tensors[name].shape[2] for name in "qkv")
    shape = (sequences, heads, q.shape[3], v.shape[3] + options["normalize"])
    return v.new_empty(*v.shape[:2], heads, v.shape[3]), q.new_empty(shape, dtype=accumulator(q.dtype))


def _obstacle(tensors: dict) -> str | None:
    """What the fused kernels do not do."""
    if tensors["value_log_decay"] is not None:
        return "it has no kernel for values that decay"
    decay = tensors["log_decay"]
    if decay is not None and decay.ndim == 1 and decay.requires_grad and torch.is_grad_enabled():
        return "the gradient of one decay per head is a sum over time of differences that rounding drowns; give one per token"
    widest = max(tensors["q"].shape[3], tensors["v"].shape[3])
    return f"K or V is {widest}, and its kernels take up to {WIDEST}" if widest > WIDEST else None


def _case(decay: str = "none", heads: int = 2, groups: int = 2, bonus: bool = False, normalize: bool = False, values_decay: bool = False):
    def draw(generator: torch.Generator, batch: int, length: int, dtype: torch.dtype) -> dict:
        def normal(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        keys, values = 5, 7
        q, k, v = normal(batch, length, heads, keys), normal(batch, length, groups, keys), normal(batch, length, groups, values)
        if normalize:
            q, k = q.abs() + 0.1, k.abs() + 0.1
        shape = {"none": None, "head": (heads,), "token": (batch, length, heads), "channel": (batch, length, heads, keys)}[decay]
        inputs = {"q": q, "k": k, "v": v, "log_decay": None if shape is None else -normal(*shape).abs() - 0.2 * (decay == "head")}
        inputs |= {"bonus": normal(heads, keys) if bonus else None, "normalize": normalize}
        inputs["value_log_decay"] = -normal(batch, length, heads, values).abs() if values_decay else None
        inputs["state"] = normal(batch, heads, keys, values + normalize).abs()
        return {n: t.to(dtype) if isinstance(t, Tensor) and n != "state" else t for n, t in inputs.items()}

    return draw


OP = Op(
    NAME,
    reference=reference.linear_attention,
    chunked=chunked.linear_attention,
    tensors=("q", "k", "v", "log_decay?", "bonus?", "value_log_decay?", "state?"),
    options={"scale": "float", "normalize": "bool"},
    along_time=("q", "k", "v", "log_decay", "value_log_decay"),
    meta=_meta,
    fused="zoo.kernels.linear_attention.fused",
    step="zoo.kernels.fused_step",
    obstacle=_obstacle,
    cases={
        "plain": _case(),
        "normalized": _case(normalize=True),
        "head": _case("head", heads=8, groups=8),  # neither few nor gentle: one rounding of exp would be all of the noise
        "token": _case("token"),
        "channel": _case("channel"),
        "channel-bonus": _case("channel", bonus=True),
        "grouped": _case("token", groups=1),
        "values": _case(values_decay=True),
        "values-channel-bonus": _case("channel", bonus=True, values_decay=True),
    },
    call=linear_attention,
)
