"""The selective scan: N states a channel, whose step, input and readout depend on the token."""

import torch
from torch import Tensor

from zoo.kernels.checks import Shapes, float_dtype
from zoo.kernels.dispatch import Backend, Op, kept, states_in_place
from zoo.kernels.packing import Packing
from zoo.kernels.scan import chunked, reference
from zoo.kernels.scan.reference import carried_dtype

NAME = "selective_scan"
MOST = 32  # states of a channel that the fused kernels keep in registers


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    state: Tensor | None = None,
    packing: Packing | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Outputs and last state of Mamba's selective state space, causal in T.

        h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t
        y_t = C_t . h_t + D x_t

    With complex A one state stands for a conjugate pair, as in S4, and `y_t = 2 Re(C_t . h_t) + D x_t`, C not conjugated.

    Args:
        x, dt: `[B, T, D]`, one floating dtype. dt is the step, not negative: what softplus returned.
        A: `[D, N]`, any floating or complex dtype, its real part never positive.
        B, C: `[B, T, G, N]`, or `[B, T, N]` for G = 1; channel d reads group `d // (D / G)`. Any floating dtype, complex
            only if A is.
        D: skip weights, `[D]`. Default none.
        state: h_0, `[B, D, N]`, float32 (float64 with float64 inputs), complex64 (complex128) if A is complex. Default
            zeros. With packing the first dimension is the number of sequences.
        packing: sequences laid end to end in one row (B = 1); the state starts anew at each.
        backend: see `zoo.kernels.dispatch`.

    Returns:
        y `[B, T, D]` in the dtype of x, and h_T. Both are differentiable in every tensor.

    Raises:
        ValueError: a shape, dtype or device that breaks the contract, naming the argument.
        BackendError: the backend asked for cannot run here.

    Cost: `6 B T D N` FLOP and `B T D N` exponentials. `chunked` holds the states of C tokens at a time, and for the
    backward pass one state every C tokens; C is 256, or less (down to 16) where that would be more than a segment (`zoo.kernels.chunking`).

    Source: Mamba arXiv:2312.00752, Algorithm 2, with B discretised as `dt B`; complex states as in S4D arXiv:2206.11893.
    """
    float_dtype(NAME, x=x, dt=dt)
    for name, tensor in (("A", A), ("B", B), ("C", C)):
        float_dtype(NAME, **{name: tensor})
        if tensor.is_complex() and not A.is_complex():
            raise ValueError(f"{NAME}: {name} is complex but A is real; make A complex or take the real part of {name}")
    if x.is_complex():
        raise ValueError(f"{NAME}: x is {x.dtype}, expected a real dtype; only A, B and C may be complex")
    shapes = Shapes(NAME)
    shapes("x", x, "B T D")
    shapes("dt", dt, "B T D")
    shapes.not_empty("B", "T", "D")
    shapes("A", A, "D N")
    shapes.not_empty("N")
    B, C = (g.unsqueeze(2) if g.ndim == 3 else g for g in (B, C))
    for name, group, tensor in (("B", "Gb", B), ("C", "Gc", C)):
        shapes(name, tensor, f"B T {group} N")
        shapes.divides(group, "D", name)
    if B.shape[2] != C.shape[2]:
        groups = max(B.shape[2], C.shape[2])
        raise ValueError(f"{NAME}: B has {B.shape[2]} groups and C has {C.shape[2]}; repeat the fewer to {groups}")
    shapes("D", D, "D")
    shapes.sizes["rows"] = shapes["B"] if packing is None else packing.count
    shapes("state", state, "rows D N", dtype=carried_dtype(x.dtype, A))
    return OP({"x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D, "state": state}, {}, packing, backend)


def selective_step(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *, state: Tensor, D: Tensor | None = None) -> Tensor:
    """One token: x, dt `[B, D]`, B, C `[B, G, N]` or `[B, N]` -> y `[B, D]`; `state` `[B, D, N]` is updated in place (no gradient)."""
    x, dt, B, C = (t.unsqueeze(1) for t in (x, dt, B, C))
    with torch.no_grad(), states_in_place():
        out, new = selective_scan(x, dt, A, B, C, D=D, state=state)
    return kept(out, new, state)


def selective_summarize(x: Tensor, dt: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """A segment as a map of states: `S_T = decay * S_0 + S`.

    Args: x, dt, A, B as in `selective_scan`.
    Returns: the decay over the segment and S, both `[B, D, N]`. Segments combine associatively:
    `(A2, S2) after (A1, S1) = (A2 * A1, A2 * S1 + S2)`.
    """
    _, state = selective_scan(x, dt, A, B, B)
    exact = A.to(torch.complex128 if A.is_complex() else torch.float64)
    return (dt.double().sum(1).unsqueeze(-1) * exact).exp().to(state.dtype), state


def selective_flops(length: int, width: int, states: int) -> int:
    """Floating-point operations of the real recurrence over one sequence, exponentials not counted."""
    return 6 * length * width * states


def _meta(tensors: dict, options: dict, sequences: int) -> tuple[Tensor, Tensor]:
    x, A = tensors["x"], tensors["A"]
    return x.new_empty(x.shape), x.new_empty(sequences, *A.shape, dtype=carried_dtype(x.dtype, A))


def _obstacle(tensors: dict) -> str | None:
    """What the fused kernels do not do."""
    A = tensors["A"]
    if A.is_complex():
        return "its states would be complex, and its kernels have real ones"
    return f"a channel has {A.shape[1]} states, and its kernels keep up to {MOST} in registers" if A.shape[1] > MOST else None


def _case(*, groups: int | None = 2, skip: bool = True, complex_valued: bool = False):
    def draw(generator: torch.Generator, batch: int, length: int, dtype: torch.dtype) -> dict:
        def normal(*shape, imaginary: bool = False):
            return torch.randn(*shape, generator=generator, dtype=torch.complex128 if imaginary else torch.float64)

        width, states = 6, 3
        group = (batch, length, states) if groups is None else (batch, length, groups, states)
        A = -normal(width, states).abs()
        inputs = {
            "x": normal(batch, length, width),
            "dt": normal(batch, length, width).abs(),
            "A": torch.complex(A, normal(width, states)) if complex_valued else A,
            "B": normal(*group, imaginary=complex_valued),
            "C": normal(*group, imaginary=complex_valued),
            "D": normal(width) if skip else None,
        }
        inputs = {n: t if t is None else t.to(carried_dtype(dtype, t) if t.is_complex() else dtype) for n, t in inputs.items()}
        return inputs | {"state": normal(batch, width, states, imaginary=complex_valued)}

    return draw


OP = Op(
    NAME,
    reference=reference.selective_scan,
    chunked=chunked.selective_scan,
    tensors=("x", "dt", "A", "B", "C", "D?", "state?"),
    options={},
    along_time=("x", "dt", "B", "C"),
    meta=_meta,
    fused="zoo.kernels.scan.fused_selective",
    obstacle=_obstacle,
    step="zoo.kernels.scan.fused_step",
    cases={
        "plain": _case(groups=None, skip=False),
        "skip": _case(groups=1),
        "grouped": _case(),
        "complex": _case(complex_valued=True),
    },
    call=selective_scan,
)
