"""The delta rule: a matrix memory that replaces what it holds under a key instead of adding to it.

`delta_rule` is under DeltaNet, Gated DeltaNet, KDA and DeltaProduct; `general_delta_rule` (in `general.py`) under RWKV-7 and
other diagonal-plus-low-rank transitions, of which the former is a special case.
"""

import torch
from torch import Tensor

from zoo.kernels.checks import Shapes, accumulator, float_dtype
from zoo.kernels.delta_rule import chunked, reference, shared
from zoo.kernels.delta_rule.general import general_delta_rule
from zoo.kernels.dispatch import Backend, Op, kept, states_in_place
from zoo.kernels.packing import Packing

__all__ = ["delta_rule", "flops", "general_delta_rule", "step", "summarize"]
NAME = "delta_rule"
WIDEST = 256  # channels of a head that the fused kernels take


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None = None,
    *,
    state: Tensor | None = None,
    packing: Packing | None = None,
    scale: float | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Outputs and last state of the (gated) delta rule, causal in T. The memory decays, then the key is erased and rewritten.

        S_t = (I - beta_t k_t k_t^T) diag(exp(log_decay_t)) S_{t-1} + beta_t k_t v_t^T
        o_t = scale * q_t S_t

    Args:
        q, k: `[B, T, H, K]`; v: `[B, T, H, V]`, one floating dtype, any strides. Each may have fewer heads than the
            largest of the three, which they must divide: head h reads group `h // (H / groups)`.
            The caller normalises k to length one: longer keys than `sqrt(2 / beta)` make the memory grow without bound.
        beta: `[B, T, H]`, 0 to 2, any floating dtype. 0 writes nothing, 1 replaces, above 1 reverses what was there.
        log_decay: natural logarithm of the decay, never positive. None, `[H]`, `[B, T, H]` or `[B, T, H, K]`;
            any floating dtype. 0 keeps all, below -104 forgets all.
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

    Cost: `6 B T H K V` FLOP for the recurrence itself; `chunked` works on chunks of 32 tokens, see `chunked.py`.

    Source: DeltaNet arXiv:2406.06484 (no decay); Gated DeltaNet arXiv:2412.06464 (one decay a head);
    Kimi Linear arXiv:2510.26692 (KDA, one decay a channel); negative eigenvalues, beta to 2: arXiv:2411.12537.
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
    shapes("beta", beta, "B T H")
    shapes("log_decay", log_decay, "H", "B T H", "B T H K")
    shapes.sizes["N"] = shapes["B"] if packing is None else packing.count
    shapes("state", state, "N H K V", dtype=accumulator(q.dtype))
    if packing is not None and log_decay is not None and log_decay.ndim == 1:
        log_decay = log_decay.expand(shapes["B"], shapes["T"], -1)  # per token, so that padding does not decay
    tensors = {"q": q, "k": k, "v": v, "beta": beta, "log_decay": log_decay, "state": state}
    return OP(tensors, {"scale": float(scale if scale is not None else shapes["K"] ** -0.5)}, packing, backend)


def step(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None = None, *, state: Tensor, scale: float | None = None
) -> Tensor:
    """One token, `[B, H, K]`, `[B, H, V]`, `[B, H]` -> `[B, H, V]`; `state` `[B, H, K, V]` is updated in place (no gradient)."""
    if log_decay is not None and log_decay.ndim > 1:
        log_decay = log_decay.unsqueeze(1)
    token = (x.unsqueeze(1) for x in (q, k, v, beta))
    with torch.no_grad(), states_in_place():
        out, new = delta_rule(*token, log_decay, state=state, scale=scale)
    return kept(out, new, state)


def summarize(k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """A segment as a map of states: `S_T = A S_0 + S`.

    Args: k, v, beta, log_decay as in `delta_rule`, with one number of heads.
    Returns: A `[B, H, K, K]` and S `[B, H, K, V]`. Segments combine associatively:
    `(A2, S2) after (A1, S1) = (A2 A1, A2 S1 + S2)`.
    """
    values, state = shared.identity_beside(v, k.shape[-1])
    _, state = delta_rule(k, k, values, beta, log_decay, state=state)
    return state[..., : k.shape[-1]], state[..., k.shape[-1] :]


def flops(length: int, heads: int, keys: int, values: int) -> int:
    """Multiply-adds times two of the recurrence over one sequence."""
    return 6 * length * heads * keys * values


def _obstacle(tensors: dict) -> str | None:
    """What the fused kernels do not do."""
    decay = tensors["log_decay"]
    if decay is not None and decay.ndim == 1 and decay.requires_grad and torch.is_grad_enabled():
        return "the gradient of one decay per head is a sum over time of differences that rounding drowns; give one per token"
    widest = max(tensors["q"].shape[3], tensors["v"].shape[3])
    return f"K or V is {widest}, and its kernels take up to {WIDEST}" if widest > WIDEST else None


def _case(decay: str = "none", heads: int = 2, groups: int = 2, extremes: bool = False):
    def draw(generator: torch.Generator, batch: int, length: int, dtype: torch.dtype) -> dict:
        def normal(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        keys, values = 5, 7
        q, v = normal(batch, length, groups, keys), normal(batch, length, heads, values)
        k = torch.nn.functional.normalize(normal(batch, length, groups, keys), dim=-1)
        beta = 2 * torch.rand(batch, length, heads, generator=generator, dtype=torch.float64)
        if extremes:  # keys of zero, the same key again and again, and beta at its bounds
            beta = beta.round()
            k[:, ::3] = 0
            k[:, 1::3] = k[:, 1:2].clone()
        shape = {"none": None, "head": (heads,), "token": (batch, length, heads), "channel": (batch, length, heads, keys)}[decay]
        inputs = {
            "q": q,
            "k": k,
            "v": v,
            "beta": beta,
            "log_decay": None if shape is None else -normal(*shape).abs() - 0.2 * (decay == "head"),
        }
        inputs["state"] = normal(batch, heads, keys, values)
        return {n: t.to(dtype) if isinstance(t, Tensor) and n != "state" else t for n, t in inputs.items()}

    return draw


OP = Op(
    NAME,
    reference=reference.delta_rule,
    chunked=chunked.delta_rule,
    tensors=("q", "k", "v", "beta", "log_decay?", "state?"),
    options={"scale": "float"},
    along_time=("q", "k", "v", "beta", "log_decay"),
    meta=shared.meta,
    step="zoo.kernels.fused_step",
    fused="zoo.kernels.delta_rule.fused",
    obstacle=_obstacle,
    cases={
        "plain": _case(),
        "extremes": _case(extremes=True),
        "head": _case("head", heads=8, groups=8),  # neither few nor gentle: one rounding of exp would be all of the noise
        "token": _case("token"),
        "channel": _case("channel"),
        "channel-extremes": _case("channel", extremes=True),
        "grouped": _case("token", groups=1),
    },
    call=delta_rule,
)
