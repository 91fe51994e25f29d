"""The same by fast Fourier transform, in `O(T log T)`.

A product of spectra is a circular convolution. Its length n is chosen so that what wraps around falls on outputs nobody
asked for: the past is transformed along with the new inputs, but only the new outputs have to come out right.
"""

import torch
from torch import Tensor

from zoo.kernels.checks import accumulator
from zoo.kernels.long_conv.reference import joined, latest, look_ahead


def long_conv(u, kernel, skip, state, causal: bool, keep: int) -> tuple[Tensor, Tensor]:
    dtype, acc = u.dtype, accumulator(u.dtype)
    length, heard = u.shape[1], joined(state, u)
    total = heard.shape[1]
    kernel = reachable(kernel, total, causal)
    ahead, taps = look_ahead(kernel, causal), kernel.shape[0]
    first = total - length + ahead  # where the new outputs begin in the whole convolution of total + taps - 1
    n = fft_length(max(total + taps - 1 - first, first + length))
    spectrum = transform(heard, n, acc) * transform(kernel.unsqueeze(0), n, acc)
    out = torch.fft.irfft(spectrum, n)[..., first : first + length].transpose(1, 2)
    out = out if skip is None else out + skip.to(acc) * u.to(acc)
    return out.to(dtype).contiguous(), latest(heard, keep)


def reachable(kernel: Tensor, total: int, causal: bool) -> Tensor:
    """The taps that reach from one input of `total` to another."""
    if causal:
        return kernel[:total]
    middle = kernel.shape[0] // 2
    reach = min(middle, total - 1)
    return kernel[middle - reach : middle + reach + 1]


def transform(x: Tensor, n: int, dtype: torch.dtype) -> Tensor:
    """`[B, T, D]` -> spectra `[B, D, n / 2 + 1]`, time innermost, where transforms are fastest."""
    return torch.fft.rfft(x.to(dtype).transpose(1, 2).contiguous(), n)


def fft_length(least: int) -> int:
    """The smallest power of two, or three or five eighths of one, that holds `least`."""
    power = 1 << max(least - 1, 0).bit_length()
    return next(n for n in (power * 5 // 8, power * 3 // 4, power) if n >= least)
