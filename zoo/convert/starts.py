"""How a new mixer begins where the teacher has no weight for it: its decay, its gates, its convolutions, the scale of its values.

    decay    native, or measured: half is forgotten over the mean distance at which the teacher's head attends (arXiv:2606.16429)
    rate     native, or measured: the delta rule's beta from 0.3 to 0.7, higher where the teacher's head attends to less
    gate     native, zero (nothing passes at first), one (everything does) or random (between branches: uniform up to one)
    conv     identity (the last input passes) or native
    skip     native or zero: the weight of the input itself in the output of a state space
    values   native, or measured: what each head reads is scaled to what the teacher's head reads by least squares

The measures are Taylor-Calibrate's; that sharp attention writes more is our reading.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zoo import registry
from zoo.block import Block
from zoo.convert.maps import weights_of
from zoo.convert.objectives import ask, ask_mixer, entering
from zoo.convert.recipe import STARTS
from zoo.layers import LowRank, ShortConv, SoftplusDecay
from zoo.mixer import Mixer
from zoo.ssd import SSDMixer

NEAREST = 2.0  # tokens: no head forgets faster
RIDGE = 1e-2  # of the power of a channel
SCALES = (0.1, 10.0)
OPEN = 1.2784645427610738  # silu of it is one
FASTEST = math.exp(-0.5)  # log-decay of RWKV-7


@dataclass
class Facts:
    """Of one layer on some text: mean distance `[H]` at which heads attend, in tokens; entropy `[H]` as a share of the highest there is;
    `constant` `[D]`, whose product with a token is nearest to one; what the mixer read, and what its heads did `[B, T, H K]`."""

    distance: Tensor
    entropy: Tensor
    constant: Tensor
    read: Tensor
    heads: Tensor


@torch.no_grad()
def begin(teacher: nn.Module, student: nn.Module, layers: list[int], starts: dict[str, str], rows: Tensor | None) -> None:
    """Let the replaced `layers` begin as `starts` says.

    Raises:
        ValueError: a start that a mixer cannot take, or one to measure without `rows` `[N, T]` of tokens.
    """
    x = entering(teacher.model, rows.to(teacher.device).long()) if needs_text(starts, rows) else None
    for index, (source, block) in enumerate(zip(teacher.model.layers, student.model.layers, strict=True)):
        if index in layers:
            begin_layer(source, block, starts, x)
        x = None if x is None else source(x)[0]


def needs_text(starts: dict[str, str], rows: Tensor | None) -> bool:
    """Whether anything is measured; ValueError if there is nothing to measure it on."""
    measured = [what for what, way in starts.items() if way == "measured"]
    if measured and (rows is None or not len(rows)):
        raise ValueError(f"init.{measured[0]}=measured needs text to measure it on; pass rows")
    return bool(measured)


@torch.no_grad()
def begin_layer(source: Block, block: Block, starts: dict[str, str], x: Tensor | None) -> None:
    """The same of one layer, whose teacher's block reads `x` `[B, T, D]`; None: nothing is measured."""
    ways = {what: known[0] for what, known in STARTS.items()} | starts
    facts = None if x is None else measure(source, x)
    for mixer in getattr(block.mixer, "branches", [block.mixer]):
        if type(mixer) is type(source.mixer):
            continue
        if ways["conv"] == "identity":
            pass_on(mixer)
        if ways["decay"] == "measured":
            forget_over(mixer, facts.distance)
        if ways["rate"] == "measured":
            write_at(mixer, 0.7 - 0.4 * facts.entropy, facts.constant)
        if ways["skip"] == "zero":
            wanted(mixer, "D", "skip=zero").zero_()
        if ways["gate"] != "native" and block.mixer is mixer:
            set_gate(mixer, ways["gate"])
        if ways["values"] == "measured":
            scale_heads(mixer, facts)
    if ways["gate"] != "native" and hasattr(block.mixer, "branches"):
        {"zero": nn.init.zeros_, "one": nn.init.ones_, "random": nn.init.uniform_}[ways["gate"]](block.mixer.gate)


def measure(source: Block, x: Tensor) -> Facts:
    """Facts of a layer of the teacher."""
    answers, heads = [], []
    hook = source.mixer.out_proj.register_forward_pre_hook(lambda _, inputs: heads.append(inputs[0]))
    try:
        weights = weights_of(source.mixer, lambda: answers.append(ask(source, x))).float()
    finally:
        hook.remove()
    length, read = weights.shape[-1], answers[0].read
    at = torch.arange(length, device=x.device)
    distance = (weights * (at[:, None] - at).clamp_min(0)).sum(-1).mean((0, 2))
    highest = torch.log(at + 1.0).clamp_min(1e-6)[1:]
    entropy = torch.special.entr(weights).sum(-1)[..., 1:] / highest
    tokens = read.flatten(0, 1).double()
    gram = tokens.T @ tokens
    ridge = RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=x.device)
    constant = torch.linalg.solve(gram + ridge, tokens.sum(0))
    return Facts(distance, entropy.mean((0, 2)), constant.to(read.dtype), read, heads[0])


# -- parts ---------------------------------------------------------------------------------------------------------------


def wanted(mixer: Mixer, name: str, start: str):
    """A part of a mixer, or a ValueError that says which start needs it."""
    found = getattr(mixer, name, None)
    if found is None:
        raise ValueError(f"init.{start}: {type(mixer).__name__} has no {name} that could begin so; leave that out")
    return found


def pass_on(mixer: Mixer) -> None:
    """Let short convolutions pass their last input on; at random they would scramble what the projections say."""
    for module in mixer.modules():
        if isinstance(module, ShortConv):
            module.weight.zero_()[:, -1] = 1.0
            if module.bias is not None:
                module.bias.zero_()


def forget_over(mixer: Mixer, distance: Tensor) -> None:
    """Set every head's decay, whatever the token, to one half over these numbers of tokens `[H]`."""
    rate, decay, projection = math.log(2) / distance.clamp_min(NEAREST), getattr(mixer, "decay", None), getattr(mixer, "decay_proj", None)
    roles = mixer.roles()
    kind = next((name for name in LOGITS if type(mixer) is registry.get(name).mixer), None)
    if isinstance(decay, SoftplusDecay):
        silence(projection)
        rates, bound = spread(rate, decay.heads, decay.channels or 1), getattr(decay, "bound", None)
        decay.A_log.zero_()
        decay.dt_bias.copy_(inverse_softplus(rates) if bound is None else torch.logit(rates / -bound))
    elif isinstance(mixer, SSDMixer):
        silence(mixer.in_proj, *roles["dt"][1])
        mixer.dt_bias.fill_(math.log(math.e - 1))  # steps of one, so that values are written as they are
        mixer.A_log.copy_(spread(rate, mixer.heads).log())
    elif kind is not None and projection is not None:
        silence(projection)
        bias = (projection.up if isinstance(projection, LowRank) else projection).bias
        channels = getattr(mixer, "decay_channels", getattr(mixer, "keys", mixer.out_proj.in_features // mixer.heads))
        bias.copy_(LOGITS[kind](spread(rate, len(bias) // channels, channels), mixer))
    else:
        raise ValueError(f"init.decay=measured: {type(mixer).__name__} has no decay that could be set; choose native")


# rate of decay, mixer -> the bias of its `decay_proj` that gives it
LOGITS: dict[str, Callable[[Tensor, Mixer], Tensor]] = {
    "gla": lambda rate, mixer: torch.logit(torch.exp(-rate * mixer.temperature)),
    "linearized": lambda rate, mixer: torch.logit(torch.exp(-rate * mixer.temperature)),
    "rwkv6": lambda rate, mixer: rate.log(),
    "qrwkv6": lambda rate, mixer: rate.log(),
    "rwkv7": lambda rate, mixer: torch.logit(rate / FASTEST),
    "qrwkv7": lambda rate, mixer: torch.logit(rate / FASTEST),
}


def write_at(mixer: Mixer, rate: Tensor, constant: Tensor) -> None:
    """Set the delta rule's rate of every head to these `[H]`, as nearly as a projection without a bias can."""
    projection = wanted(mixer, "beta_proj", "rate=measured")
    logits = torch.logit(spread(rate, projection.out_features) / mixer.largest_beta)
    projection.weight.copy_(logits[:, None] * constant)


def set_gate(mixer: Mixer, way: str) -> None:
    """Close or open a mixer's output gate; at random it begins by itself."""
    gate, rows = getattr(mixer, "gate_proj", None), mixer.roles().get("z")
    if way == "random" or (way == "one" and gate is None and rows is None):
        return
    if rows is not None:
        silence(mixer.in_proj, *rows[1])
    else:
        silence(wanted(mixer, "gate_proj", f"gate={way}"))
    bias = getattr(mixer, "gate_bias", None)
    if bias is None and rows is not None and mixer.in_proj.bias is not None:
        bias = mixer.in_proj.bias[rows[1][0]]
    if way == "one":
        if bias is None:
            raise ValueError(
                f"init.gate=one: the gate of {type(mixer).__name__} has no bias to hold it open; "
                "set mixer_args.use_gate=false where it has that"
            )
        bias.fill_(OPEN)
        return
    if bias is not None:
        bias.zero_()
    width = mixer.out_proj.out_features
    x = torch.randn(1, 4, width, generator=torch.Generator().manual_seed(0)).to(mixer.out_proj.weight)
    if ask_mixer(mixer, x).mixed.any():
        raise ValueError(f"init.gate=zero: weights of zero do not close the gate of {type(mixer).__name__}; choose native")


def scale_heads(mixer: Mixer, facts: Facts) -> None:
    """Scale what the output projection takes from each head to what the teacher's takes. Behind a norm a scale of values would be lost."""
    found = []
    hook = wanted(mixer, "out_proj", "values=measured").register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))
    try:
        ask_mixer(mixer, facts.read)
    finally:
        hook.remove()
    own, theirs, heads = found[0], facts.heads, len(facts.distance)
    if own.shape != theirs.shape:
        raise ValueError(
            f"init.values=measured: {type(mixer).__name__} reads {own.shape[-1]} channels and attention {theirs.shape[-1]}; "
            "give the mixer the teacher's number and width of heads"
        )
    own, theirs = (x.double().unflatten(-1, (heads, -1)) for x in (own, theirs))
    scale = ((own * theirs).sum((0, 1, 3)) / own.square().sum((0, 1, 3)).clamp_min(1e-12)).clamp(*SCALES)
    mixer.out_proj.weight.mul_(scale.repeat_interleave(own.shape[-1]).to(mixer.out_proj.weight.dtype))


def silence(module: nn.Module, rows: slice = slice(None)) -> None:
    """Let a projection, or some of its rows, give nothing; of one of low rank the second factor."""
    linear = module.up if isinstance(module, LowRank) else module
    linear.weight[rows] = 0.0
    if linear.bias is not None:
        linear.bias[rows] = 0.0


def spread(values: Tensor, heads: int, channels: int = 1) -> Tensor:
    """`[H]` of the teacher's heads for so many: repeated, or the mean of those that share one; then for each channel."""
    if len(values) % heads and heads % len(values):
        raise ValueError(
            f"what was measured of {len(values)} heads cannot be told to {heads}; give the mixer the teacher's number of heads"
        )
    values = values.unflatten(0, (heads, -1)).mean(1) if heads <= len(values) else values.repeat_interleave(heads // len(values))
    return values.repeat_interleave(channels)


def inverse_softplus(x: Tensor) -> Tensor:
    return x + torch.log(-torch.expm1(-x))
