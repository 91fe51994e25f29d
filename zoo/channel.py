"""Channel mixers: what follows the sequence mixer in a block. Same contract, `(x, state, packing) -> (y, state)`."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from zoo.config import ZooConfig
from zoo.kernels.packing import Packing
from zoo.layers import token_shift
from zoo.mixer import Layer, State
from zoo.registry import register_channel_mixer


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU in its tanh approximation."""
    return F.gelu(x, approximate="tanh")


def squared_relu(x: Tensor) -> Tensor:
    """`relu(x)^2` (Primer, arXiv:2109.08668)."""
    return F.relu(x).square()


ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": gelu_tanh, "relu": F.relu, "relu2": squared_relu, "tanh": torch.tanh}


def activation(name: str):
    """The function of this name, or an error listing those known."""
    if name not in ACTIVATIONS:
        raise ValueError(f"activation {name!r} is unknown; choose one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


class ChannelMixer(Layer):
    """A channel mixer without a state, unless a subclass says otherwise."""

    lora_targets: tuple[str, ...] = ("up_proj", "down_proj")
    waits_for_device: bool = False  # a decode step needs a value on the host

    def initial_state(self, batch: int, length: int, dtype: torch.dtype, device) -> State:
        return {}

    def flops(self, length: int) -> int:
        """FLOPs of a forward pass over `length` tokens, without activations, a multiply-add counting two."""
        return 2 * length * sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))


@register_channel_mixer("swiglu")
class GatedMLP(ChannelMixer):
    """`down(act(c gate(x)) * up(x))`, c being `gate_scale` (Shazeer 2020, arXiv:2002.05202).

    Default width: 8/3 D rounded up to a multiple of 64.
    """

    lora_targets = ("gate_proj", "up_proj", "down_proj")

    def __init__(
        self, config: ZooConfig, *, act: str = "silu", bias: bool = False, intermediate_size: int | None = None, width: int | None = None,
        gate_scale: float = 1.0,
    ):  # fmt: skip
        super().__init__()
        width = width or config.hidden_size
        inner = intermediate_size or config.intermediate_size or -(-8 * width // 3 // 64) * 64
        self.act, self.gate_scale = activation(act), gate_scale
        self.gate_proj = nn.Linear(width, inner, bias=bias)
        self.up_proj = nn.Linear(width, inner, bias=bias)
        self.down_proj = nn.Linear(inner, width, bias=bias)

    def forward(self, x: Tensor, state: State | None = None, packing: Packing | None = None) -> tuple[Tensor, State]:
        gate = self.gate_proj(x)
        gate = gate if self.gate_scale == 1.0 else gate * self.gate_scale
        return self.down_proj(self.act(gate) * self.up_proj(x)), {}


@register_channel_mixer("mlp")
class MLP(ChannelMixer):
    """`down(act(up(x)))` (Vaswani et al. 2017, arXiv:1706.03762, eq. 2). Default width: 4 D."""

    def __init__(
        self, config: ZooConfig, *, act: str = "gelu", bias: bool = True, intermediate_size: int | None = None, width: int | None = None
    ):
        super().__init__()
        width = width or config.hidden_size
        inner = intermediate_size or config.intermediate_size or 4 * config.hidden_size
        self.act = activation(act)
        self.up_proj = nn.Linear(width, inner, bias=bias)
        self.down_proj = nn.Linear(inner, width, bias=bias)

    def forward(self, x: Tensor, state: State | None = None, packing: Packing | None = None) -> tuple[Tensor, State]:
        return self.down_proj(self.act(self.up_proj(x))), {}


@register_channel_mixer("rwkv")
class RWKVChannelMix(ChannelMixer):
    """RWKV's channel mixing: the token before is mixed in, then `value(relu(key)^2)`, gated by a receptance.

    RWKV-4 (arXiv:2305.13048, eq. 16-18) has the receptance and a width of 4 D, RWKV-5/6 3.5 D; RWKV-7 (arXiv:2503.14456,
    section 4) drops the receptance. State: `shift` `[B, 1, D]`, the last token.

    Args: mix_back: the mixes weigh the token before instead of the token itself, as RWKV-6 and RWKV-7 store them.
    """

    lora_targets = ("key", "value", "receptance")

    def __init__(self, config: ZooConfig, *, receptance: bool = True, mix_back: bool = False):
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size or 4 * config.hidden_size
        self.width, self.mix_back = width, mix_back
        self.key_mix = nn.Parameter(torch.empty(width))
        self.key = nn.Linear(width, inner, bias=False)
        self.value = nn.Linear(inner, width, bias=False)
        self.receptance = nn.Linear(width, width, bias=False) if receptance else None
        self.receptance_mix = nn.Parameter(torch.empty(width)) if receptance else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for mix in (self.key_mix, self.receptance_mix):
            if mix is not None:
                ramp = torch.linspace(0, 1, self.width)
                init.copy_(mix, 1 - ramp if self.mix_back else ramp)

    def initial_state(self, batch: int, length: int, dtype: torch.dtype, device) -> State:
        return {"shift": torch.zeros(batch, 1, self.width, dtype=dtype, device=device)}

    def forward(self, x: Tensor, state: State | None = None, packing: Packing | None = None) -> tuple[Tensor, State]:
        before, shift = token_shift(x, state["shift"] if state else None, packing)
        ends = (x, before) if self.mix_back else (before, x)
        y = self.value(F.relu(self.key(torch.lerp(*ends, self.key_mix))).square())
        if self.receptance is not None:
            y = torch.sigmoid(self.receptance(torch.lerp(*ends, self.receptance_mix))) * y
        return y, {"shift": shift}


@register_channel_mixer("moe")
class MixtureOfExperts(ChannelMixer):
    """Each token goes to its `top_k` of `experts` gated MLPs, weighted by the router; a shared expert sees all tokens.

    Switch and Mixtral routing (arXiv:2101.03961, eq. 1-2; arXiv:2401.04088, section 2.1), shared expert of DeepSeekMoE
    (arXiv:2401.06066, eq. 9), which `shared_gate` weighs by a sigmoid, as in Qwen2-MoE. `scores` of "sigmoid" rate every expert
    by itself, and a bias that is not trained by gradients balances the choice (DeepSeek-V3, arXiv:2412.19437, eq. 12-16); then
    only experts of the best `top_groups` of `groups` are eligible.

    Args:
        normalize: the chosen weights sum to one; scale: they are multiplied by this after.
        gated: the experts are gated MLPs, else plain ones.
        latent_size: width of a projection of the tokens on which the routed experts work; None: they see the tokens themselves.
        bias: the shared expert and the projections to and from the latent width have biases.
    """

    lora_targets = ("gate_proj", "up_proj", "down_proj")
    waits_for_device = True  # which experts have work is read on the host, so that idle ones are not computed

    def __init__(self, config: ZooConfig, *, experts: int = 8, top_k: int = 2, expert_size: int | None = None,
                 shared_size: int | None = None, shared_gate: bool = False, normalize: bool = True, act: str = "silu",
                 scores: str = "softmax", groups: int = 1, top_groups: int = 1, scale: float = 1.0, gated: bool = True,
                 latent_size: int | None = None, bias: bool = False):  # fmt: skip
        super().__init__()
        if not 1 <= top_k <= experts:
            raise ValueError(f"moe: top_k={top_k} must lie between 1 and experts={experts}")
        if scores not in ("softmax", "sigmoid") or (groups > 1 and scores == "softmax") or experts % groups or top_groups > groups:
            raise ValueError(
                f"moe: scores={scores!r} with top_groups={top_groups} of groups={groups} for experts={experts}; scores must be "
                "'softmax', or 'sigmoid' with groups that divide the experts"
            )
        self.top_k, self.normalize, self.groups, self.top_groups, self.scale = top_k, normalize, groups, top_groups, scale
        self.router = nn.Linear(config.hidden_size, experts, bias=False)
        kind, width = GatedMLP if gated else MLP, config.hidden_size
        self.experts = nn.ModuleList(
            kind(config, act=act, bias=False, intermediate_size=expert_size, width=latent_size) for _ in range(experts)
        )
        self.latent_in = nn.Linear(width, latent_size, bias=bias) if latent_size else None
        self.latent_out = nn.Linear(latent_size, width, bias=bias) if latent_size else None
        self.shared = kind(config, act=act, bias=bias, intermediate_size=shared_size) if shared_size else None
        self.shared_gate = nn.Linear(config.hidden_size, 1, bias=False) if shared_size and shared_gate else None
        self.register_buffer("choice_bias", torch.empty(experts) if scores == "sigmoid" else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.choice_bias is not None:
            init.zeros_(self.choice_bias)

    def flops(self, length: int) -> int:
        routed = sum(m.weight.numel() for m in self.experts.modules() if isinstance(m, nn.Linear))
        return super().flops(length) - 2 * length * routed + 2 * length * routed * self.top_k // len(self.experts)

    def route(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and numbers of the chosen experts, `[tokens, top_k]` each."""
        logits = self.router(tokens).float()
        if self.choice_bias is None:
            weights, chosen = logits.softmax(-1).topk(self.top_k, dim=-1)
        else:
            scores = logits.sigmoid()
            eligible = scores + self.choice_bias
            if self.groups > 1:
                eligible = eligible.unflatten(-1, (self.groups, -1))
                best = eligible.topk(min(2, eligible.shape[-1]), dim=-1).values.sum(-1).topk(self.top_groups, dim=-1).indices
                kept = torch.zeros_like(eligible[..., 0], dtype=torch.bool).scatter(-1, best, True)
                eligible = eligible.masked_fill(~kept.unsqueeze(-1), -torch.inf).flatten(-2)
            chosen = eligible.topk(self.top_k, dim=-1).indices
            weights = scores.gather(-1, chosen)
        if self.normalize:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights * self.scale, chosen

    def forward(self, x: Tensor, state: State | None = None, packing: Packing | None = None) -> tuple[Tensor, State]:
        tokens = x.flatten(0, -2)
        weights, chosen = self.route(tokens)
        y = torch.zeros_like(tokens) if self.shared is None else self.shared(tokens)[0]
        if self.shared_gate is not None:
            y = torch.sigmoid(self.shared_gate(tokens)) * y
        inner, routed = tokens, y
        if self.latent_in is not None:
            inner = self.latent_in(tokens)
            routed = torch.zeros_like(inner)
        for index, expert in enumerate(self.experts):
            row, rank = (chosen == index).nonzero(as_tuple=True)
            out, _ = expert(inner[row])
            routed = routed.index_add(0, row, (weights[row, rank, None] * out).to(y.dtype))
        y = routed if self.latent_out is None else y + self.latent_out(routed)
        return y.view_as(x), {}
