"""The one rule of closeness. No test states a number of its own."""

import torch
from torch import Tensor


def error_bound(plain: Tensor | tuple[Tensor, ...], exact: Tensor, *, gradient: bool = False, dtype: torch.dtype | None = None) -> float:
    """How far from `exact` a result may be, given how far the plain computation in the tested dtype is.

    After FlashAttention's tests: twice the error of the plain computation (three times for gradients), plus four units of
    rounding at the scale of the result.

    Args:
        plain: the definition computed in the tested dtype; or several plain computations, of which the noisiest counts. One
            draw of rounding errors says little about the next where a whole model amplifies a few of them.
        exact: the definition computed in float64.
        dtype: the tested one, where the result is of a wider one: a float32 state of kernels that multiply bfloat16.
    """
    factor = 3 if gradient else 2
    exact = exact.double() if not exact.is_complex() else exact.to(torch.complex128)
    scale = exact.abs().max().item() if exact.numel() else 0.0
    plains = plain if isinstance(plain, tuple) else (plain,)
    noise = max((p - exact).abs().max().item() for p in plains) if exact.numel() else 0.0
    eps = max(torch.finfo(d).eps for d in (plains[0].dtype, dtype) if d is not None)
    return factor * noise + 4 * eps * scale


def assert_close(
    result: Tensor,
    plain: Tensor | tuple[Tensor, ...],
    exact: Tensor,
    what: str,
    *,
    gradient: bool = False,
    dtype: torch.dtype | None = None,
) -> None:
    """Raise AssertionError unless `max |result - exact| <= error_bound(plain, exact)` and `result` is finite; integers must be equal."""
    assert result.shape == exact.shape, f"{what}: shape {tuple(result.shape)}, expected {tuple(exact.shape)}"
    if not (exact.is_floating_point() or exact.is_complex()):
        assert torch.equal(result, exact), f"{what}: {result.tolist()}, expected {exact.tolist()}"
        return
    assert torch.isfinite(torch.view_as_real(result) if result.is_complex() else result).all(), f"{what}: not finite"
    if not exact.numel():
        return
    error = (result - exact.to(torch.complex128 if exact.is_complex() else torch.float64)).abs().max().item()
    bound = error_bound(plain, exact, gradient=gradient, dtype=dtype)
    assert error <= bound, f"{what}: off by {error:.3g}, the rule allows {bound:.3g}"
