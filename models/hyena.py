"""Hyena: long convolutions, whose filters a small network computes from the position, between gates computed from the data.

    v, x^1, ..., x^N = short convolutions of W_in u
    z^1 = x^1 v,    z^{n+1}_t = x^{n+1}_t (h^n * z^n)_t,    y = W_out z^N        (Definition 3.1, its first filter being one)
    h^n_t = (exp(-a t / L) + shift) FFN(t / L, cos(2 pi f t / L), -sin(2 pi f t / L)),    FFN with sines as activations

and a skip weight beside each filter. As in the authors' models, an operator of order N has N + 1 projections, N gates and
N - 1 long filters; the short convolution of v stands for the first. Filters end after L taps: what lies further back is not
heard, and inputs may be longer than L.

Paper: Poli et al. 2023, arXiv:2302.10866: the operator in section 3.1, the filters in section 3.3.
"""

import math
from dataclasses import field

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from zoo import ops
from zoo.config import ZooConfig
from zoo.kernels import long_conv, short_conv
from zoo.kernels.packing import Packing
from zoo.layers import ShortConv, wide
from zoo.mixer import Layer, Mixer, State
from zoo.registry import register

SLOW, FAST = math.log(100) / 1.5, math.log(100) / 0.3  # a: the window falls to a hundredth after 1.5 L to 0.3 L taps
LOWEST = 1e-4  # the first frequency f; the others are whole numbers


@strict
class HyenaConfig(ZooConfig):
    """Order of the operator, and the network that makes its filters."""

    model_type = "zoo_hyena"

    channel_mixer: str | None = "mlp"
    channel_args: dict | None = field(default_factory=lambda: {"act": "gelu_tanh"})
    norm: str = "layernorm"
    order: int = 2  # N, gates; one more than long filters
    filter_length: int = 2048  # L, taps
    filter_width: int = 64  # hidden channels of the filter network
    filter_depth: int = 4  # its linear layers
    filter_features: int = 33  # its inputs, an odd number: the position, and cosines and sines of (features - 1) / 2 frequencies
    trained_positions: bool = False  # those inputs are parameters, which begin as said
    filter_frequency: float = 14.0  # factor inside its sines at initialisation
    window_shift: float = 0.0  # what the window falls to
    conv_kernel: int = 3  # taps of the short convolutions

    def validate_filters(self):
        """There must be a filter, and a frequency."""
        for name, least in (("order", 2), ("filter_length", 2), ("filter_width", 1), ("filter_depth", 2), ("filter_features", 3)):
            if getattr(self, name) < least:
                raise ValueError(f"HyenaConfig: {name}={getattr(self, name)} must be at least {least}")
        if self.filter_features % 2 == 0:
            raise ValueError(f"HyenaConfig: filter_features={self.filter_features} must be odd: one position, and pairs of cosine and sine")


class ImplicitFilter(Layer):
    """Filters of L taps, `[L, channels]`, as a network's answer to the position.

    The network's weights are no linear layers: they act on no activations, and are computed with in float32 at least.
    """

    def __init__(self, config: HyenaConfig, channels: int):
        super().__init__()
        self.taps, self.channels, self.features = config.filter_length, channels, config.filter_features
        self.initial, self.shift, self.std = config.filter_frequency, config.window_shift, config.initializer_range
        widths = [config.filter_features, *[config.filter_width] * (config.filter_depth - 1)]
        self.weights = nn.ParameterList(torch.empty(out, width) for width, out in zip(widths, [*widths[1:], channels], strict=True))
        self.biases = nn.ParameterList(torch.empty(width) for width in widths[1:])
        self.frequency = nn.Parameter(torch.empty(config.filter_width))
        self.positions = nn.Parameter(torch.empty(self.taps, self.features)) if config.trained_positions else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for weight in self.weights:
            init.normal_(weight, std=self.std)
        for bias in self.biases:
            init.zeros_(bias)
        init.constant_(self.frequency, self.initial)
        if self.positions is not None:
            init.copy_(self.positions, self.encode())

    def encode(self) -> Tensor:
        """Every tap's time, from 0 to 1, and its cosines and sines: float64 `[L, features]`."""
        tap = torch.arange(self.taps, dtype=torch.float64, device=self.frequency.device).unsqueeze(1)
        bands = torch.linspace(LOWEST, self.features // 2 - 1, self.features // 2, dtype=torch.float64, device=tap.device)
        angle = 2 * math.pi / self.taps * tap * bands
        return torch.cat([tap / (self.taps - 1), angle.cos(), -angle.sin()], dim=-1)

    def forward(self) -> Tensor:
        frequency, encoded = wide(self.frequency), self.encode()
        h = encoded.to(frequency.dtype) if self.positions is None else wide(self.positions)
        for weight, bias in zip(self.weights, self.biases, strict=False):
            h = torch.sin(frequency * F.linear(h, wide(weight), wide(bias)))
        rates = torch.linspace(SLOW, FAST, self.channels, dtype=torch.float64, device=frequency.device)
        window = torch.exp(-encoded[:, :1] * rates) + self.shift
        return F.linear(h, wide(self.weights[-1])) * window.to(frequency.dtype)

    def flops(self) -> int:
        """FLOPs of the network, once for all sequences of a pass."""
        return 2 * self.taps * sum(w.numel() for w in self.weights)


class HyenaMixer(Mixer):
    """State: `conv`, the last inputs of the short convolutions, and of each long one `past<n>` `[B, L - 1, D]`."""

    lora_targets = ("in_proj", "out_proj")

    def __init__(self, config: HyenaConfig, layer: int):
        super().__init__(config, layer)
        self.width, self.filters, self.taps = config.hidden_size, config.order - 1, config.filter_length
        inner = (config.order + 1) * self.width
        self.in_proj = nn.Linear(self.width, inner)
        self.conv = ShortConv(inner, config.conv_kernel, bias=True, activation=None)
        self.filter = ImplicitFilter(config, self.width * self.filters)
        self.skip = nn.Parameter(torch.empty(self.width * self.filters))  # channel by channel the filters, as in their network's output
        self.out_proj = nn.Linear(self.width, self.width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        init.normal_(self.skip)

    def initial_state(self, batch: int, length: int, dtype: torch.dtype = torch.float32, device="cpu") -> State:
        past = {f"past{n}": torch.zeros(batch, self.taps - 1, self.width, dtype=dtype, device=device) for n in range(self.filters)}
        return past | {"conv": self.conv.initial_state(batch, dtype, device)}

    def operator_flops(self, length: int) -> int:
        short = short_conv.flops(length, self.conv.kernel, self.conv.width)
        long = self.filters * long_conv.flops(length, self.taps, self.width)
        return short + long + (self.filters + 1) * length * self.width + self.filter.flops()

    def forward(self, x: Tensor, state: State | None = None, packing: Packing | None = None) -> tuple[Tensor, State]:
        state = state or {}
        projected, conv = self.conv(self.in_proj(x), state.get("conv"), packing)
        last, *gates, z = projected.split(self.width, dim=-1)
        kernels, skips = self.filter().unflatten(-1, (self.width, -1)), self.skip.unflatten(-1, (self.width, -1))
        after = {"conv": conv}
        for n, gate in enumerate(reversed(gates)):
            past = state.get(f"past{n}")
            z, past = ops.long_conv(z * gate, kernels[..., n], skip=skips[:, n], state=past, packing=packing)
            after[f"past{n}"] = F.pad(past, (0, 0, self.taps - 1 - past.shape[1], 0))
        return self.out_proj(last * z), after


# what the authors' language models, trained on the Pile, have in common
PILE = {"vocab_size": 50257, "tie_word_embeddings": True, "trained_positions": True}

register(
    "hyena",
    config=HyenaConfig,
    mixer=HyenaMixer,
    title="Hyena Hierarchy: Towards Larger Convolutional Language Models",
    paper="arXiv:2302.10866",
    presets={
        "tiny": dict(
            hidden_size=32, num_hidden_layers=2, vocab_size=256, filter_length=64, filter_width=16, filter_features=5, intermediate_size=64,
            trained_positions=True,
        ),
        "125m": dict(hidden_size=768, num_hidden_layers=18, intermediate_size=1536, **PILE),
        "153m": dict(hidden_size=864, num_hidden_layers=18, intermediate_size=1728, **PILE),
        "355m": dict(hidden_size=1024, num_hidden_layers=36, intermediate_size=2048, **PILE),
        "1.3b": dict(hidden_size=2048, num_hidden_layers=36, intermediate_size=4096, **PILE),
    },
)  # fmt: skip
