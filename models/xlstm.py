"""xLSTM-7B: the matrix memory of mLSTM read and written straight from the block's input, with a gated MLP behind it.

    q, k, v = W_q x_t, W_k x_t, W_v x_t,    i_t = exp(cap(w_i . x_t + b_i)),    f_t = sigmoid(cap(w_f . x_t + b_f))
    C_t = f_t C_{t-1} + i_t k_t v_t^T,    n_t = f_t n_{t-1} + i_t k_t,    h_t = q_t C_t / max(|q_t . n_t|, sqrt(K))
    y_t = W_O (sigmoid(W_o x_t) * layernorm_h(h_t)),    cap(z) = c tanh(z / c)

Paper: Beck, Poeppel, Lippe, Kurle, Blies, Klambauer, Boeck, Hochreiter 2025, arXiv:2503.13427; the cell is that of
arXiv:2405.04517, eq. 19-27. Against the block of that paper there is no convolution, no up-projection and no skip, queries and
keys are half as wide as values, and three things keep training stable: RMSNorm, capped gates, and input gates that start
nearly closed.
"""

import math

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from zoo.config import ZooConfig
from zoo.kernels.checks import accumulator
from zoo.kernels.linear_attention import flops
from zoo.kernels.packing import Packing
from zoo.layers import GatedNorm, merge_heads, mlstm_cell, split_heads, wide
from zoo.layout import Layout, rename
from zoo.mixer import Mixer, State
from zoo.registry import register
from zoo.terms import expect, inner_size, same_fields


@strict
class XLSTMConfig(ZooConfig):
    """Sizes of the heads, and the bound of the gates."""

    model_type = "zoo_xlstm"

    norm_eps: float = 1e-6
    logit_softcap: float | None = 30.0

    num_heads: int = 8
    key_ratio: float = 0.5  # K = D * key_ratio / H
    value_ratio: float = 1.0  # V = D * value_ratio / H
    gate_softcap: float = 15.0  # c of the input and forget gates' pre-activations

    def validate_heads(self):
        """Keys and values must be a whole number of heads."""
        for field in ("key_ratio", "value_ratio"):
            width = int(self.hidden_size * getattr(self, field))
            if width < 1 or width % self.num_heads:
                raise ValueError(f"XLSTMConfig: hidden_size * {field} is {width}, it must be divisible by num_heads={self.num_heads}")


class XLSTMMixer(Mixer):
    """State: `memory` `[B, H, K, V + 1]`, the last channel being n, and their unit `m` `[B, H]`; see `mlstm_cell`."""

    lora_targets = ("q_proj", "k_proj", "v_proj", "gate_proj", "out_proj")

    def __init__(self, config: XLSTMConfig, layer: int):
        super().__init__(config, layer)
        width, self.heads, self.depth = config.hidden_size, config.num_heads, config.num_hidden_layers
        keys, values = int(width * config.key_ratio), int(width * config.value_ratio)
        self.width, self.keys, self.values, self.cap = width, keys // self.heads, values // self.heads, config.gate_softcap
        self.q_proj = nn.Linear(width, keys, bias=False)
        self.k_proj = nn.Linear(width, keys, bias=False)
        self.v_proj = nn.Linear(width, values, bias=False)
        self.gate_proj = nn.Linear(width, values, bias=False)
        self.input_gate_proj = nn.Linear(width, self.heads)
        self.forget_gate_proj = nn.Linear(width, self.heads)
        self.norm = GatedNorm(values, groups=self.heads, kind="layer", eps=config.norm_eps, activation="sigmoid")
        self.out_proj = nn.Linear(values, width, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As the authors start: gates that do not depend on the input, writing little and remembering for long."""
        for gate in (self.input_gate_proj, self.forget_gate_proj):
            init.zeros_(gate.weight)
        init.constant_(self.input_gate_proj.bias, -10.0)
        init.copy_(self.forget_gate_proj.bias, torch.linspace(3.0, 6.0, self.heads))
        for projection in (self.q_proj, self.k_proj, self.v_proj, self.gate_proj):
            init.normal_(projection.weight, std=math.sqrt(2 / (5 * self.width)))
        init.normal_(self.out_proj.weight, std=2 / (self.depth * math.sqrt(self.width)))

    def initial_state(self, batch: int, length: int, dtype: torch.dtype = torch.float32, device="cpu") -> State:
        memory = torch.zeros(batch, self.heads, self.keys, self.values + 1, dtype=accumulator(dtype), device=device)
        return {"memory": memory, "m": torch.zeros(batch, self.heads, dtype=accumulator(dtype), device=device)}

    def operator_flops(self, length: int) -> int:
        return flops(length, self.heads, self.keys, self.values + 1)

    def forward(self, x: Tensor, state: State | None = None, packing: Packing | None = None) -> tuple[Tensor, State]:
        q, k, v = (split_heads(projection(x), self.heads) for projection in (self.q_proj, self.k_proj, self.v_proj))
        gates = (self.input_gate_proj, self.forget_gate_proj)
        log_input, forget = (self.cap * torch.tanh(wide(gate(x)) / self.cap) for gate in gates)
        h, state = mlstm_cell(q, k, v, F.logsigmoid(forget), log_input, state, packing)
        return self.out_proj(self.norm(merge_heads(h), self.gate_proj(x))), state


UNSHARED = ("initializer_range", "intermediate_size")
SAME = {
    "num_heads": "num_heads", "key_ratio": "qk_dim_factor", "value_ratio": "v_dim_factor", "gate_softcap": "gate_soft_cap",
    "norm_eps": "norm_eps", "logit_softcap": "output_logit_soft_cap",
}  # fmt: skip


def from_foreign(foreign: dict) -> dict:
    """Our fields. What chooses kernels, chunks and the dtypes inside them says nothing about the function, and is passed over.

    That library ties no embeddings in this model, whatever the config says.
    """
    expect(foreign, use_bias=False, add_out_norm=True, eps=1e-6, weight_mode="single")
    expect(foreign, embedding_dim=foreign["hidden_size"], num_blocks=foreign["num_hidden_layers"])
    multiple = foreign["ffn_round_up_to_multiple_of"]
    inner = int((foreign["hidden_size"] * foreign["ffn_proj_factor"] + multiple - 1) // multiple * multiple)
    fields = same_fields(foreign, but=UNSHARED) | {own: foreign[name] for own, name in SAME.items()}
    return fields | {"intermediate_size": inner, "tie_word_embeddings": False}


def to_foreign(config: XLSTMConfig) -> dict:
    """The inverse; there logits are always capped."""
    if config.logit_softcap is None:
        raise ValueError("the layout 'xlstm' cannot express logit_softcap=None; set one, or save without layout=")
    inner = inner_size(config)
    return same_fields(config, but=UNSHARED) | {name: getattr(config, own) for own, name in SAME.items()} | {
        "embedding_dim": config.hidden_size,
        "num_blocks": config.num_hidden_layers,
        "ffn_proj_factor": (inner + 0.5) / config.hidden_size,  # there it is rounded down
        "ffn_round_up_to_multiple_of": 1,
    }  # fmt: skip


THEIRS, LAYER = "backbone.blocks.{}.", "model.layers.{}."
LAYOUT = Layout(
    "xlstm", ("xlstm",), from_foreign, to_foreign, prefix="backbone.",
    rules=(
        rename("backbone.embeddings.weight", "model.embed_tokens.weight"),
        rename("backbone.out_norm.weight", "model.norm.weight"),
        rename(THEIRS + "norm_{mlstm,ffn}.weight", LAYER + "{mixer,channel}_norm.weight"),
        rename(THEIRS + "mlstm_layer.{q,k,v,ogate_preact}.weight", LAYER + "mixer.{q,k,v,gate}_proj.weight"),
        rename(THEIRS + "mlstm_layer.{i,f}gate_preact.{weight,bias}", LAYER + "mixer.{input,forget}_gate_proj.{weight,bias}"),
        rename(THEIRS + "mlstm_layer.{multihead_norm,out_proj}.weight", LAYER + "mixer.{norm,out_proj}.weight"),
        rename(THEIRS + "ffn.{proj_up_gate,proj_up,proj_down}.weight", LAYER + "channel_mixer.{gate,up,down}_proj.weight"),
        rename("lm_head.weight", "lm_head.weight"),
        rename("score.{weight,bias}", "score.{weight,bias}"),
    ),
    forgets=(  # kernels and their dtypes, and what is written as what it amounts to
        "mode", "chunkwise_kernel", "sequence_kernel", "step_kernel", "autocast_kernel_dtype", "inference_state_dtype",
        "max_inference_chunksize", "norm_reduction_force_float32", "return_last_states", "ffn_proj_factor",
        "ffn_round_up_to_multiple_of", "tie_word_embeddings",
    ),
    trials={  # its cache takes the widths of q, k and v for multiples of 64; its chunks of 64 know float32 only
        "plain": {"hidden_size": 128},
        "odd": {"hidden_size": 128, "num_heads": 2, "ffn_round_up_to_multiple_of": 1, "ffn_proj_factor": 1.3, "tie_word_embeddings": True},
        "capped": {"hidden_size": 128, "num_heads": 4, "qk_dim_factor": 1.0, "v_dim_factor": 1.5, "output_logit_soft_cap": 2.0,
                   "gate_soft_cap": 5.0, "norm_eps": 1e-3},
    },
)  # fmt: skip


register(
    "xlstm",
    config=XLSTMConfig,
    mixer=XLSTMMixer,
    title="xLSTM 7B: A Recurrent LLM for Fast and Efficient Inference",
    paper="arXiv:2503.13427",
    presets={
        "tiny": dict(hidden_size=32, num_hidden_layers=2, num_heads=2, vocab_size=256),
        "7b": dict(hidden_size=4096, num_hidden_layers=32, intermediate_size=10944, vocab_size=50304),
    },
    layouts=(LAYOUT,),
)
