"""The general delta rule: what is read under one key moves to another, beside a decay a channel."""

import torch
from torch import Tensor

from zoo.kernels.checks import Shapes, accumulator, float_dtype
from zoo.kernels.delta_rule import chunked, reference, shared
from zoo.kernels.dispatch import Backend, Op, kept, states_in_place
from zoo.kernels.packing import Packing

NAME = "general_delta_rule"
WIDEST = 128  # channels of a head that the fused kernels take


def general_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    log_decay: Tensor,
    *,
    state: Tensor | None = None,
    packing: Packing | None = None,
    scale: float | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Outputs and last state of a memory with diagonal-plus-low-rank transitions, causal in T.

        S_t = (diag(exp(log_decay_t)) + b_t a_t^T) S_{t-1} + k_t v_t^T
        o_t = scale * q_t S_t

    a reads S_{t-1} before the decay. `delta_rule(q, k, v, beta, log_decay)` is the case
    `a = -exp(log_decay) k, b = beta k`, with `beta k` for k.

    Args:
        q, k, a, b: `[B, T, H, K]`; v: `[B, T, H, V]`, one floating dtype, any strides. Each may have fewer heads than the
            largest of the five, which they must divide: head h reads group `h // (H / groups)`.
            The caller keeps the transitions from growing: RWKV-7 has a of length one and b = -a times rates from 0 to 1.
        log_decay: `[B, T, H, K]`, natural logarithm of the decay, never positive; any floating dtype.
            0 keeps all, below -104 forgets all.
        state: S_0, `[B, H, K, V]`, float32 (float64 with float64 inputs). Default zeros.
            With packing the first dimension is the number of sequences.
        packing: sequences laid end to end in one row (B = 1); the state starts anew at each.
        scale: default `1 / sqrt(K)`.
        backend: see `zoo.kernels.dispatch`.

    Returns:
        o `[B, T, H, V]` in the dtype of v, and S_T. Both are differentiable in every tensor.

    Raises:
        ValueError: a shape, dtype or device that breaks the contract, naming the argument.
        BackendError: the backend asked for cannot run here.

    Cost: `8 B T H K V` FLOP for the recurrence itself; `chunked` works on chunks of 32 tokens, see `chunked.py`.

    Source: RWKV-7 arXiv:2503.14456 (there `a = -kappa`, `b = kappa * rate`, scale 1).
    """
    float_dtype(NAME, q=q, k=k, v=v, a=a, b=b)
    shapes = Shapes(NAME)
    for name, x in {"q": q, "k": k, "a": a, "b": b}.items():
        shapes(name, x, f"B T H{name} K")
    shapes("v", v, "B T Hv V")
    shapes.not_empty("B", "T")
    heads = shapes.sizes["H"] = max(shapes["H" + name] for name in "qkvab")
    for name in "qkvab":
        shapes.divides("H" + name, "H", name)
    shapes("log_decay", log_decay, "B T H K")
    shapes.sizes["N"] = shapes["B"] if packing is None else packing.count
    shapes("state", state, "N H K V", dtype=accumulator(q.dtype))
    q, k, v, a, b = (x if x.shape[2] == heads else x.repeat_interleave(heads // x.shape[2], dim=2) for x in (q, k, v, a, b))
    tensors = {"q": q, "k": k, "v": v, "a": a, "b": b, "log_decay": log_decay, "state": state}
    return OP(tensors, {"scale": float(scale if scale is not None else shapes["K"] ** -0.5)}, packing, backend)


def step(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, log_decay: Tensor, *, state: Tensor, scale: float | None = None) -> Tensor:
    """One token, `[B, H, K]` and `[B, H, V]` -> `[B, H, V]`; `state` `[B, H, K, V]` is updated in place (no gradient)."""
    token = (x.unsqueeze(1) for x in (q, k, v, a, b, log_decay))
    with torch.no_grad(), states_in_place():
        out, new = general_delta_rule(*token, state=state, scale=scale)
    return kept(out, new, state)


def summarize(k: Tensor, v: Tensor, a: Tensor, b: Tensor, log_decay: Tensor) -> tuple[Tensor, Tensor]:
    """A segment as a map of states: `S_T = A S_0 + S`.

    Args: k, v, a, b, log_decay as in `general_delta_rule`, with one number of heads.
    Returns: A `[B, H, K, K]` and S `[B, H, K, V]`. Segments combine associatively:
    `(A2, S2) after (A1, S1) = (A2 A1, A2 S1 + S2)`.
    """
    values, state = shared.identity_beside(v, k.shape[-1])
    _, state = general_delta_rule(k, k, values, a, b, log_decay, state=state)
    return state[..., : k.shape[-1]], state[..., k.shape[-1] :]


def _obstacle(tensors: dict) -> str | None:
    """What the fused kernels do not do."""
    widest = max(tensors["k"].shape[3], tensors["v"].shape[3])
    return f"K or V is {widest}, and its kernels take up to {WIDEST}" if widest > WIDEST else None


def _case(bounded: bool = True, groups: int = 2):
    def draw(generator: torch.Generator, batch: int, length: int, dtype: torch.dtype) -> dict:
        def normal(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        heads, keys, values = 2, 5, 7
        q, k, a, b = normal(4, batch, length, groups, keys)
        if bounded:  # as in RWKV-7
            a = torch.nn.functional.normalize(a, dim=-1)
            b = -a * b.sigmoid()
        else:
            a, b = 0.3 * a, 0.3 * b
        inputs = {"q": q, "k": k, "v": normal(batch, length, heads, values), "a": a, "b": b}
        inputs["log_decay"] = -normal(batch, length, heads, keys).abs()
        inputs["state"] = normal(batch, heads, keys, values)
        return {n: t if n == "state" else t.to(dtype) for n, t in inputs.items()}

    return draw


OP = Op(
    NAME,
    reference=reference.general_delta_rule,
    chunked=chunked.general_delta_rule,
    tensors=("q", "k", "v", "a", "b", "log_decay", "state?"),
    options={"scale": "float"},
    along_time=("q", "k", "v", "a", "b", "log_decay"),
    meta=shared.meta,
    step="zoo.kernels.fused_step",
    fused="zoo.kernels.delta_rule.fused_general",
    obstacle=_obstacle,
    cases={"bounded": _case(), "free": _case(bounded=False), "grouped": _case(groups=1)},
    call=general_delta_rule,
)
