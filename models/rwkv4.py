"""RWKV-4: an average of all values so far, weighted by their keys and by how long ago they were.

    wkv_t = (sum_{s<t} e^{k_s - (t-1-s) w} v_s + e^{u + k_t} v_t) / (sum_{s<t} e^{k_s - (t-1-s) w} + e^{u + k_t})     (eq. 16)
    y_t = W_O (sigmoid(r_t) * wkv_t)                                                                                  (eq. 17)

r, k and v each read their own mixture of a token and the token before it (eq. 11-13); w > 0 and u belong to the channel.
The sums are kept divided by e^m_t with m_t = max_{s<=t} (k_s - (t-s) w), so that no exponent is positive. The maxima of
all tokens come from one cumulative maximum of `k_s + s w`; the sums are then two scans with log-decay `m_{t-1} - w - m_t`.

Paper: Peng et al. 2023, arXiv:2305.13048, initialisation as in the authors' training code.
"""

import math

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import initialization as init

from zoo import ops
from zoo.config import ZooConfig
from zoo.fla import layer
from zoo.kernels.packing import Packing
from zoo.kernels.scan import flops
from zoo.layers import orthogonal, token_positions, token_shift, wide
from zoo.layout import Layout, rename
from zoo.mixer import Mixer, State
from zoo.registry import register
from zoo.rwkv import BLOCK, as_vector, channel_mixes, file_layout
from zoo.terms import COMMON

NOTHING = -1e38  # the maximum of no keys: finite, so that differences are, and below any key


@strict
class RWKV4Config(ZooConfig):
    """The shared fields, with the defaults of RWKV-4; it has no others."""

    model_type = "zoo_rwkv4"

    vocab_size: int = 50277
    norm: str = "layernorm"
    embedding_norm: bool = True
    channel_mixer: str | None = "rwkv"


class RWKV4Mixer(Mixer):
    """State: `numerator`, `denominator` and `maximum` `[B, D]`, and `shift` `[B, 1, D]`, the last token."""

    lora_targets = ("receptance", "key", "value", "output")

    def __init__(self, config: RWKV4Config, layer: int):
        super().__init__(config, layer)
        width = self.width = config.hidden_size
        self.layers = config.num_hidden_layers
        self.key_mix = nn.Parameter(torch.empty(width))
        self.value_mix = nn.Parameter(torch.empty(width))
        self.receptance_mix = nn.Parameter(torch.empty(width))
        self.decay = nn.Parameter(torch.empty(width))  # log w
        self.bonus = nn.Parameter(torch.empty(width))  # u
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.receptance = nn.Linear(width, width, bias=False)
        self.output = nn.Linear(width, width, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        channel = torch.arange(self.width, device=self.decay.device, dtype=torch.float32)
        depth, left = self.layer / max(1, self.layers - 1), 1 - self.layer / self.layers
        share = channel / self.width
        init.copy_(self.key_mix, share**left)
        init.copy_(self.value_mix, share**left + 0.3 * depth)
        init.copy_(self.receptance_mix, share ** (0.5 * left))
        init.copy_(self.decay, 8 * (channel / max(1, self.width - 1)) ** (0.7 + 1.3 * depth) - 5)
        init.copy_(self.bonus, math.log(0.3) + 0.5 * ((channel + 1) % 3 - 1))
        orthogonal(self.value.weight)
        for projection in (self.key, self.receptance, self.output):
            init.zeros_(projection.weight)

    def initial_state(self, batch: int, length: int, dtype: torch.dtype = torch.float32, device="cpu") -> State:
        sums = torch.zeros(batch, self.width, dtype=torch.float64 if dtype == torch.float64 else torch.float32, device=device)
        shift = torch.zeros(batch, 1, self.width, dtype=dtype, device=device)
        return {"numerator": sums, "denominator": sums.clone(), "maximum": torch.full_like(sums, NOTHING), "shift": shift}

    def operator_flops(self, length: int) -> int:
        return flops(length, 2 * self.width)

    def forward(self, x: Tensor, state: State | None = None, packing: Packing | None = None) -> tuple[Tensor, State]:
        if state is None:
            state = self.initial_state(x.shape[0] if packing is None else packing.count, 0, x.dtype, x.device)
        before, shift = token_shift(x, state["shift"], packing)
        mixes = (self.receptance_mix, self.key_mix, self.value_mix)
        xr, xk, xv = (before + (x - before) * mix for mix in mixes)
        gate = torch.sigmoid(self.receptance(xr))
        average, after = self.average(wide(self.key(xk)), wide(self.value(xv)), state, packing)
        return self.output(gate * average.to(gate.dtype)), after | {"shift": shift}

    def average(self, k: Tensor, v: Tensor, state: State, packing: Packing | None) -> tuple[Tensor, State]:
        """`wkv` of keys and values `[B, T, D]`, and the sums after them. No gradient needs to pass the maxima: they cancel."""
        w = wide(self.decay).exp()
        with torch.no_grad():
            top = self.maxima(k, w, state["maximum"], packing)
            before, last = token_shift(top, state["maximum"].unsqueeze(1), packing)
            drop = (before - w - top).clamp(max=0).to(k.dtype)
        log_decay = drop + (w.detach() - w)  # the value of drop, the gradient of -w
        weight = (k - top).to(k.dtype).exp()
        numerators, numerator = ops.scan(weight * v, log_decay, state=state["numerator"], packing=packing)
        denominators, denominator = ops.scan(weight, log_decay, state=state["denominator"], packing=packing)
        numerators, _ = token_shift(numerators, state["numerator"].unsqueeze(1), packing)
        denominators, _ = token_shift(denominators, state["denominator"].unsqueeze(1), packing)
        own = k + wide(self.bonus)
        peak = torch.maximum(before, own.detach())
        past, own = (before - peak).to(k.dtype).exp(), (own - peak).to(k.dtype).exp()
        average = (past * numerators + own * v) / (past * denominators + own)
        maximum = last.squeeze(1).to(k.dtype)
        rounding = (last.squeeze(1) - maximum).exp().to(k.dtype)  # the sums stay exact beside a rounded maximum
        return average, {"numerator": numerator * rounding, "denominator": denominator * rounding, "maximum": maximum}

    @staticmethod
    def maxima(k: Tensor, w: Tensor, start: Tensor, packing: Packing | None) -> Tensor:
        """`m_t` in float64, `[B, T, D]`, continuing from `start` `[B, D]` (or one per packed sequence)."""
        age = (token_positions(k, None, packing) + 1).unsqueeze(-1) * w.double()
        score = k + age
        if packing is None:
            score, start = score.cummax(dim=1).values, start.unsqueeze(1)
        else:
            score = packing.unpad(packing.pad(score, -math.inf).cummax(dim=1).values)
            start = start[packing.seq_idx].unsqueeze(0)
        return torch.maximum(score, start) - age


def from_rwkv(foreign: dict) -> dict:
    """Fields of an RWKV4Config for a config of transformers.

    `rescale_every` is not needed: it halves the residual stream of deep float16 models, which the norms undo up to their epsilon.
    """
    if foreign["attention_hidden_size"] != foreign["hidden_size"]:
        raise ValueError(
            f"attention_hidden_size={foreign['attention_hidden_size']} other than hidden_size={foreign['hidden_size']} is not supported"
        )
    if foreign["layer_norm_epsilon"] != 1e-5:
        raise ValueError(f"layer_norm_epsilon={foreign['layer_norm_epsilon']} is not supported: the last norm of an rwkv has 1e-05 always")
    fields = {name: foreign[name] for name in COMMON if name in foreign}
    return fields | {"intermediate_size": foreign["intermediate_size"], "norm_eps": foreign["layer_norm_epsilon"]}


def to_rwkv(config: RWKV4Config) -> dict:
    """The inverse. What it cannot say is left out, and noticed by mapping back."""
    fields = {name: getattr(config, name) for name in COMMON}
    inner = config.intermediate_size or 4 * config.hidden_size
    return fields | {"attention_hidden_size": config.hidden_size, "intermediate_size": inner, "layer_norm_epsilon": config.norm_eps}


RWKV = Layout(
    "rwkv", ("rwkv",), from_rwkv, to_rwkv, prefix="rwkv.", forgets=("context_length", "rescale_every"),
    trials={"plain": {}, "tied": {"intermediate_size": 40, "tie_word_embeddings": True}, "default": {"intermediate_size": None}},
    rules=(
        rename("rwkv.embeddings.weight", "model.embed_tokens.weight"),
        rename("rwkv.blocks.0.pre_ln.{weight,bias}", "model.embed_norm.{weight,bias}"),
        rename("rwkv.blocks.{}.ln{1,2}.{weight,bias}", "model.layers.{}.{mixer,channel}_norm.{weight,bias}"),
        rename("rwkv.blocks.{}.attention.time_{decay,first}", "model.layers.{}.mixer.{decay,bonus}"),
        as_vector("rwkv.blocks.{}.attention.time_mix_{key,value,receptance}", "model.layers.{}.mixer.{key,value,receptance}_mix"),
        as_vector("rwkv.blocks.{}.feed_forward.time_mix_{key,receptance}", "model.layers.{}.channel_mixer.{key,receptance}_mix"),
        rename(
            "rwkv.blocks.{}.attention.{key,value,receptance,output}.weight", "model.layers.{}.mixer.{key,value,receptance,output}.weight"
        ),
        rename("rwkv.blocks.{}.feed_forward.{key,value,receptance}.weight", "model.layers.{}.channel_mixer.{key,value,receptance}.weight"),
        rename("rwkv.ln_out.{weight,bias}", "model.norm.{weight,bias}"),
        rename("head.weight", "lm_head.weight"),
        rename("score.{weight,bias}", "score.{weight,bias}"),
    ),
)  # fmt: skip


def is_file(shapes: dict) -> bool:
    """Whether these are the tensors of this version; the next one has a norm over each head."""
    return "blocks.0.att.time_mix_k" in shapes and "blocks.0.att.ln_x.weight" not in shapes


FILE = (
    layer("att.time_{decay,first}", "mixer.{decay,bonus}", BLOCK),
    as_vector(BLOCK + "att.time_mix_{k,v,r}", "model.layers.{}.mixer.{key,value,receptance}_mix"),
    layer("att.{key,value,receptance,output}.weight", "mixer.{key,value,receptance,output}.weight", BLOCK),
    channel_mixes("time_mix"),
)

register(
    "rwkv4",
    config=RWKV4Config,
    mixer=RWKV4Mixer,
    title="RWKV: Reinventing RNNs for the Transformer Era",
    paper="arXiv:2305.13048",
    presets={
        "tiny": dict(hidden_size=32, num_hidden_layers=2, vocab_size=256),
        "169m": dict(hidden_size=768, num_hidden_layers=12),
        "430m": dict(hidden_size=1024, num_hidden_layers=24),
        "1.5b": dict(hidden_size=2048, num_hidden_layers=24),
        "3b": dict(hidden_size=2560, num_hidden_layers=32),
        "7b": dict(hidden_size=4096, num_hidden_layers=32),
        "14b": dict(hidden_size=5120, num_hidden_layers=40),
    },
    layouts=(RWKV, file_layout("rwkv4", is_file, lambda shapes: {}, FILE)),
)
