"""S4D: every channel is a linear system of its own, diagonal and the same at all times: a convolution, or a recurrence.

    S_t = exp(dt A) S_{t-1} + B u_t,    y_t = 2 Re(C . S_t) + D u_t,    B = (exp(dt A) - 1) / A        (zero-order hold)
    K_l = 2 Re sum_n C_n B_n exp(l dt A_n),    y = K * u + D u                                       (the convolution)

One of N / 2 complex modes stands for itself and its conjugate, hence 2 Re. A begins at -1/2 + i pi n (S4D-Lin). GELU and a
gated linear unit across channels follow, and a block has nothing else beside it: no channel mixer.

Paper: Gu, Gupta, Goel, Re 2022, arXiv:2206.11893: discretisation and kernel in section 3, S4D-Lin in section 4.
"""

import math

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from zoo import ops
from zoo.config import ZooConfig
from zoo.kernels import long_conv
from zoo.kernels.checks import accumulator
from zoo.kernels.packing import Packing
from zoo.mixer import Mixer, State
from zoo.registry import register

CHUNK = 64  # powers of a mode below this are tabled, and those of its multiples


@strict
class S4DConfig(ZooConfig):
    """Size of the state, and the range of time scales."""

    model_type = "zoo_s4d"

    channel_mixer: str | None = None
    norm: str = "layernorm"
    state_size: int = 64  # N, real numbers in a channel's state
    dt_min: float = 0.001  # steps are drawn log-uniformly from [dt_min, dt_max]
    dt_max: float = 0.1

    def validate_state(self):
        """Modes come in conjugate pairs, and time scales in order."""
        if self.state_size < 2 or self.state_size % 2:
            raise ValueError(f"S4DConfig: state_size={self.state_size} must be even and positive; modes come in conjugate pairs")
        if not 0 < self.dt_min <= self.dt_max:
            raise ValueError(f"S4DConfig: dt_min={self.dt_min} must be positive and at most dt_max={self.dt_max}")


class Powers:
    """`exp(l rate)` for l = 0 .. length - 1 and every mode, never laid out in full; rate is complex128 `[D, N]`.

    With l = r + size c it is a product of two small tables, rounded to `dtype` after the exponential.
    """

    def __init__(self, rate: Tensor, length: int, dtype: torch.dtype):
        self.length, self.size = length, min(CHUNK, length)
        self.chunks = (length + self.size - 1) // self.size
        r, c = torch.arange(self.size, device=rate.device), torch.arange(self.chunks, device=rate.device) * self.size
        fine = (rate.unsqueeze(1) * r.unsqueeze(-1)).exp().to(dtype)
        self.fine = torch.view_as_real(fine).flatten(-2)  # [D, size, 2 N], real and imaginary parts in turn
        self.coarse = (rate.unsqueeze(1) * c.unsqueeze(-1)).exp().to(dtype)  # [D, chunks, N]

    def answer(self, start: Tensor) -> Tensor:
        """`2 Re sum_n start_n exp(l rate_n)`: complex `[B, D, N]` -> real `[B, length, D]`."""
        parts = (start.transpose(0, 1).unsqueeze(2) * self.coarse.unsqueeze(1)).conj()  # Re(a b) = Re a* Re b + Im a* Im b
        parts = torch.view_as_real(parts.resolve_conj()).flatten(-2)  # [D, B, chunks, 2 N]
        values = 2 * parts.flatten(1, 2) @ self.fine.transpose(1, 2)
        return values.reshape(values.shape[0], start.shape[0], -1)[..., : self.length].permute(1, 2, 0)

    def gather(self, u: Tensor) -> Tensor:
        """`sum_l u_l exp(l rate)`: real `[B, length, D]` -> complex `[B, D, N]`."""
        rows = F.pad(u.permute(2, 0, 1), (0, self.chunks * self.size - self.length)).reshape(u.shape[2], -1, self.size)
        parts = (rows @ self.fine).reshape(u.shape[2], u.shape[0], self.chunks, -1, 2)
        return (torch.view_as_complex(parts) * self.coarse.unsqueeze(1)).sum(2).transpose(0, 1)


def backwards(u: Tensor, packing: Packing | None) -> Tensor:
    """The newest input first: `[B, T, D]`, or `[N, longest, D]` with zeros after a packed sequence's oldest."""
    if packing is None:
        return u.flip(1)
    age = torch.arange(max(packing.lengths), device=u.device)
    index = packing.cu_seqlens[1:, None] - 1 - age
    return u[0, index.clamp(min=0)].masked_fill((index < packing.cu_seqlens[:-1, None]).unsqueeze(-1), 0)


class S4DMixer(Mixer):
    """State: `memory` `[B, D, N / 2, 2]`, real and imaginary parts."""

    lora_targets = ("out_proj",)

    def __init__(self, config: S4DConfig, layer: int):
        super().__init__(config, layer)
        self.width, self.modes = config.hidden_size, config.state_size // 2
        self.steps = (math.log(config.dt_min), math.log(config.dt_max))
        self.log_dt = nn.Parameter(torch.empty(self.width))
        self.A_log = nn.Parameter(torch.empty(self.width, self.modes))  # log of minus the real part
        self.A_imag = nn.Parameter(torch.empty(self.width, self.modes))
        self.C = nn.Parameter(torch.empty(self.width, self.modes, 2))  # real and imaginary parts
        self.D = nn.Parameter(torch.empty(self.width))
        self.out_proj = nn.Linear(self.width, 2 * self.width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        init.uniform_(self.log_dt, *self.steps)
        init.constant_(self.A_log, math.log(0.5))
        frequencies = math.pi * torch.arange(self.modes, dtype=torch.float32, device=self.A_imag.device)
        init.copy_(self.A_imag, frequencies.expand(self.width, -1))
        init.normal_(self.C, std=math.sqrt(0.5))  # of unit variance as complex numbers
        init.normal_(self.D)

    def initial_state(self, batch: int, length: int, dtype: torch.dtype = torch.float32, device="cpu") -> State:
        return {"memory": torch.zeros(batch, self.width, self.modes, 2, dtype=accumulator(dtype), device=device)}

    def operator_flops(self, length: int) -> int:
        kernel_and_state = 8 * length * self.width * self.modes
        return kernel_and_state + long_conv.flops(length, length, self.width) + 2 * length * self.width

    def forward(self, x: Tensor, state: State | None = None, packing: Packing | None = None) -> tuple[Tensor, State]:
        real = accumulator(x.dtype)
        A = torch.complex(-self.A_log.double().exp(), self.A_imag.double())
        rate = self.log_dt.double().exp().unsqueeze(-1) * A  # exact, since it is multiplied by the time that has passed
        C = torch.view_as_complex(self.C.to(real))
        weight = C * ((rate.exp() - 1) / A).to(C.dtype)  # C B: the memory holds S / B
        powers = Powers(rate, x.shape[1] if packing is None else max(packing.lengths), weight.dtype)
        y, _ = ops.long_conv(x, powers.answer(weight.unsqueeze(0))[0], skip=self.D, packing=packing)
        memory = powers.gather(backwards(x.to(real), packing))
        if state is not None:
            before = torch.view_as_complex(state["memory"])
            late = powers.answer(before * rate.exp().to(before.dtype) * weight)
            y = y + (late if packing is None else packing.unpad(late)).to(y.dtype)
            passed = x.shape[1] if packing is None else packing.cu_seqlens.diff()[:, None, None]
            memory = memory + before * (rate * passed).exp().to(before.dtype)
        return F.glu(self.out_proj(F.gelu(y)), dim=-1), {"memory": torch.view_as_real(memory).contiguous()}


register(
    "s4d",
    config=S4DConfig,
    mixer=S4DMixer,
    title="On the Parameterization and Initialization of Diagonal State Space Models",
    paper="arXiv:2206.11893",
    presets={
        "tiny": dict(hidden_size=32, num_hidden_layers=2, state_size=8, vocab_size=256),
        "110m": dict(hidden_size=768, num_hidden_layers=12, channel_mixer="mlp", vocab_size=50257, tie_word_embeddings=True),
    },
)
