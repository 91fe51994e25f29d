"""The definition."""

from torch import Tensor
from torch.nn import functional as F

from zoo.kernels.checks import accumulator


def discretize(x, A_log, bias, u, floor: float) -> tuple[Tensor, Tensor | None]:
    acc = accumulator(x.dtype)
    dt = F.softplus(x + bias.to(acc))
    dt = dt.clamp(min=floor) if floor else dt
    rate = A_log.to(acc).exp()
    log_decay = -dt * (rate if x.ndim == 3 else rate.unsqueeze(-1))
    return log_decay, None if u is None else (u * dt.unsqueeze(-1)).to(u.dtype)
