"""Checkpoints of flash-linear-attention: every key kept bit by bit, and the whole model against its published formulas.

That library computes on GPUs only, so what it defines is written down here once more, reading its tensors by its names.
"""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

import zoo
from zoo.evaluate.closeness import assert_close
from zoo.layout import find_layout

D, L, VOCABULARY = 32, 3, 61
TOKENS = {"vocab_size": VOCABULARY, "hidden_size": D, "num_hidden_layers": L, "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2}
PLAIN = {"intermediate_size": 40, "norm_eps": 1e-5, "fuse_norm": True, "fuse_cross_entropy": True}
RANKS = {"decay_low_rank_dim": 6, "a_low_rank_dim": 5, "v_low_rank_dim": 4, "gate_low_rank_dim": 7}
CASES = {
    "gla": ("gla", {"num_heads": 2, "attn_mode": "fused_chunk"}),
    "gla-wide": ("gla", {"num_heads": 4, "expand_k": 1, "expand_v": 2, "tie_word_embeddings": True}),
    "gla-grouped": ("gla", {"num_heads": 4, "num_kv_heads": 2, "use_short_conv": True, "conv_size": 3}),
    "gsa": ("gsa", {"num_heads": 4, "num_kv_heads": 2, "expand_k": 0.5, "num_slots": 6, "norm_eps": 1e-3}),
    "gsa-learned": ("gsa", {"num_heads": 2, "num_slots": 5, "feature_map": "t2r", "use_short_conv": True, "gate_logit_normalizer": 4}),
    "retnet": ("retnet", {"num_heads": 4, "expand_v": 1.5}),
    "retnet-weightless": ("retnet", {"num_heads": 2, "elementwise_affine": False}),
    "retnet-grouped": ("retnet", {"num_heads": 4, "num_kv_heads": 2, "expand_k": 0.5}),
    "hgrn": ("hgrn", {}),
    "hgrn-wide": ("hgrn", {"expand_ratio": 2}),
    "hgrn-convolved": ("hgrn", {"use_short_conv": True}),
    "hgrn2": ("hgrn2", {"expand_ratio": 8}),
    "hgrn2-convolved": ("hgrn2", {"expand_ratio": 16, "use_short_conv": True, "conv_size": 3}),
    "delta_net": ("delta_net", {"num_heads": 2, "expand_v": 2.0}),
    "delta_net-plain": ("delta_net", {"num_heads": 4, "use_short_conv": False, "allow_neg_eigval": True}),
    "gated_deltanet": ("gated_deltanet", {"num_heads": 2, "num_v_heads": 4, "head_dim": 8, "conv_size": 3}),
    "gated_deltanet-plain": ("gated_deltanet", {"num_heads": 2, "head_dim": 6, "use_gate": False, "allow_neg_eigval": True}),
    "kda": ("kda", {"num_heads": 2, "head_dim": 8, "expand_v": 1.5}),
    "kda-bounded": ("kda", {"num_heads": 2, "head_dim": 8, "expand_v": 1.0, "safe_gate": True, "lower_bound": -5.0}),
    "linear_attn": ("linear_attn", {"num_heads": 4}),
    "linear_attn-elu": ("linear_attn", {"num_heads": 2, "feature_map": "elu", "norm_feature_map": True}),
    "linear_attn-hedgehog": ("linear_attn", {"num_heads": 4, "num_kv_heads": 2, "feature_map": "hedgehog", "norm_feature_map": True}),
    "linear_attn-t2r": ("linear_attn", {"num_heads": 2, "feature_map": "t2r", "expand_k": 0.5, "expand_v": 1.5}),
    "linear_attn-dpfp": ("linear_attn", {"num_heads": 4, "feature_map": "dpfp"}),
    "transformer": ("transformer", {"num_heads": 4, "num_kv_heads": 2, "window_size": 5, "qkv_bias": True}),
    "transformer-normed": ("transformer", {"num_heads": 2, "qk_norm": True, "rope_theta": 500.0, "tie_word_embeddings": True}),
    "transformer-apart": ("transformer", {"num_heads": 2, "qk_norm": True, "norm_eps": 0.1}),
    "forgetting": ("forgetting_transformer", {"num_heads": 4, "num_kv_heads": 2, "qkv_bias": True, "use_output_gate": True}),
    "forgetting-normed": ("forgetting_transformer", {"num_heads": 2, "qk_norm": True, "norm_eps": 1e-3, "tie_word_embeddings": True}),
    "rwkv6": ("rwkv6", {"num_heads": 2, "expand_k": 1.0, "proj_low_rank_dim": 4, "gate_low_rank_dim": 6}),
    "rwkv6-narrow": ("rwkv6", {"num_heads": 4, "proj_low_rank_dim": 4, "gate_low_rank_dim": 6}),
    "rwkv6-wide": ("rwkv6", {"num_heads": 2, "expand_v": 1.5, "proj_low_rank_dim": 4, "gate_low_rank_dim": 6}),
    "rwkv7": ("rwkv7", {"head_dim": 8} | RANKS),
    "rwkv7-tied": ("rwkv7", {"head_dim": 16, "num_heads": 2, "tie_word_embeddings": True} | RANKS),
}  # fmt: skip
every_case = pytest.mark.parametrize("case", CASES)


def config_of(case: str) -> dict:
    """A config as the library writes it."""
    kind, fields = CASES[case]
    return {"model_type": kind, "architectures": [CLASSES[kind] + "ForCausalLM"]} | TOKENS | PLAIN | fields


CLASSES = {
    "gla": "GLA", "gsa": "GSA", "retnet": "RetNet", "hgrn": "HGRN", "hgrn2": "HGRN2", "delta_net": "DeltaNet",
    "gated_deltanet": "GatedDeltaNet", "kda": "KDA", "rwkv6": "RWKV6", "rwkv7": "RWKV7", "transformer": "Transformer",
    "linear_attn": "LinearAttention", "forgetting_transformer": "ForgettingTransformer",
}  # fmt: skip


# -- the documented keys -----------------------------------------------------------------------------------------------


def projections(**sizes) -> dict:
    return {f"{name}_proj.weight": shape for name, shape in sizes.items()}


def convolution_keys(c: dict, **widths) -> dict:
    """Kernels by projection, where there are any; `use_short_conv` is false unless the config says otherwise."""
    return {f"{name}_conv1d.weight": (width, 1, c.get("conv_size", 4)) for name, width in widths.items() if c.get("use_short_conv")}


def gla_keys(c: dict) -> dict:
    keys, values, sharing = int(D * c.get("expand_k", 0.5)), int(D * c.get("expand_v", 1.0)), c["num_heads"] // groups_of(c)
    shared = keys // sharing
    low = {"gk_proj.0.weight": (16, D), "gk_proj.1.weight": (shared, 16), "gk_proj.1.bias": (shared,)}
    shapes = projections(q=(keys, D), k=(shared, D), v=(values // sharing, D), g=(values, D), o=(D, values))
    shapes |= convolution_keys(c, q=keys, k=shared, v=values // sharing)
    return shapes | low | {"g_norm_swish_gate.weight": (values // c["num_heads"],)}


def groups_of(c: dict) -> int:
    return c.get("num_kv_heads") or c["num_heads"]


def gsa_keys(c: dict) -> dict:
    keys, sharing = int(D * c.get("expand_k", 1.0)), c["num_heads"] // groups_of(c)
    shapes = projections(q=(keys, D), k=(keys // sharing, D), v=(D // sharing, D), f=(groups_of(c) * c["num_slots"], D), o=(D, D))
    shapes |= convolution_keys(c, q=keys, k=keys // sharing, v=D // sharing)
    features = {"feature_map.layer.weight": (keys // c["num_heads"],) * 2} if c.get("feature_map") == "t2r" else {}
    return shapes | features | {"g_norm.weight": (D,)}


def retnet_keys(c: dict) -> dict:
    keys, values, sharing = int(D * c.get("expand_k", 1.0)), int(D * c.get("expand_v", 2.0)), c["num_heads"] // groups_of(c)
    norm = {"g_norm_swish_gate.weight": (values // c["num_heads"],)} if c.get("elementwise_affine", True) else {}
    return projections(q=(keys, D), k=(keys // sharing, D), v=(values // sharing, D), g=(values, D), o=(D, values)) | norm


def hgrn_keys(c: dict) -> dict:
    inner = D * c.get("expand_ratio", 1)
    shapes = projections(i=(inner, D), f=(inner, D), g=(inner, D), o=(D, inner)) | convolution_keys(c, i=inner, f=inner)
    return shapes | {"g_norm.weight": (inner,)}


def hgrn2_keys(c: dict) -> dict:
    return projections(q=(D, D), f=(D, D), i=(D, D), o=(D, D)) | convolution_keys(c, q=D, f=D, i=D) | {"g_norm.weight": (D,)}


def delta_keys(c: dict, keys: int, values: int, heads: int, channels: int) -> dict:
    """What the three delta rules share."""
    convolved = {"q_conv1d.weight": keys, "k_conv1d.weight": keys, "v_conv1d.weight": values}
    shapes = {name: (width, 1, c.get("conv_size", 4)) for name, width in convolved.items()} if c.get("use_short_conv", True) else {}
    shapes |= projections(q=(keys, D), k=(keys, D), v=(values, D), b=(heads, D), o=(D, values))
    return shapes | {"o_norm.weight": (channels,)}


def delta_net_keys(c: dict) -> dict:
    values, heads = int(D * c.get("expand_v", 1.0)), c["num_heads"]
    return delta_keys(c, D, values, heads, values // heads)


def gated_deltanet_keys(c: dict) -> dict:
    heads, channels = c.get("num_v_heads") or c["num_heads"], 2 * c["head_dim"]
    gate = projections(g=(heads * channels, D)) if c.get("use_gate", True) else {}
    decay = projections(a=(heads, D)) | {"A_log": (heads,), "dt_bias": (heads,)}
    return delta_keys(c, c["num_heads"] * c["head_dim"], heads * channels, heads, channels) | gate | decay


def kda_keys(c: dict) -> dict:
    heads, keys, values = c["num_heads"], c["head_dim"], int(c["head_dim"] * c["expand_v"])
    low = {"f_proj.0.weight": (values, D), "f_proj.1.weight": (heads * keys, values)}
    low |= {"g_proj.0.weight": (values, D), "g_proj.1.weight": (heads * values, values), "g_proj.1.bias": (heads * values,)}
    return delta_keys(c, heads * keys, heads * values, heads, values) | low | {"A_log": (heads,), "dt_bias": (heads * keys,)}


def linear_attn_keys(c: dict) -> dict:
    keys, values, sharing = int(D * c.get("expand_k", 1.0)), int(D * c.get("expand_v", 1.0)), c["num_heads"] // groups_of(c)
    channels, maps = keys // c["num_heads"], {}
    layers = {None: ("layer1", "layer2"), "hedgehog": ("layer",), "t2r": ("layer",)}.get(c.get("feature_map"), ())
    for name in (f"feature_map_{side}.{layer}" for side in "qk" for layer in layers):
        maps |= {f"{name}.weight": (channels, channels)} | ({f"{name}.bias": (channels,)} if c.get("feature_map") != "t2r" else {})
    shapes = projections(q=(keys, D), k=(keys // sharing, D), v=(values // sharing, D), o=(D, values))
    return shapes | {"norm.weight": (values // c["num_heads"],)} | maps


def transformer_keys(c: dict) -> dict:
    channels = D // c["num_heads"]
    shared = c.get("num_kv_heads", c["num_heads"]) * channels
    shapes = projections(q=(D, D), k=(shared, D), v=(shared, D), o=(D, D))
    shapes |= {"q_proj.bias": (D,), "k_proj.bias": (shared,), "v_proj.bias": (shared,)} if c.get("qkv_bias") else {}
    return shapes | ({"q_norm.weight": (channels,), "k_norm.weight": (channels,)} if c.get("qk_norm") else {})


def forgetting_keys(c: dict) -> dict:
    shared = groups_of(c) * D // c["num_heads"]
    shapes = {name: shape for name, shape in transformer_keys(c).items() if "norm" not in name} | projections(f=(c["num_heads"], D))
    shapes |= {"f_proj.bias": (c["num_heads"],)} | (projections(g=(D, D)) if c.get("use_output_gate") else {})
    return shapes | ({"q_norm.weight": (D,), "k_norm.weight": (shared,)} if c.get("qk_norm") else {})


def rwkv_keys(c: dict, linear: str = "", keys: int = D, values: int = D) -> dict:
    """What both versions share."""
    inner, norms = c["intermediate_size"], {f"{part}_norm.{kind}": (D,) for part in ("attn", "ffn") for kind in ("weight", "bias")}
    sizes = {"r": keys, "k": keys, "v": values}
    shapes = {f"attn.{name}_proj{linear}.weight": (size, D) for name, size in sizes.items()} | {"attn.o_proj.weight": (D, values)}
    shapes |= {"attn.g_norm.weight": (values,), "attn.g_norm.bias": (values,), f"ffn.key{linear}.weight": (inner, D)}
    return norms | shapes | {"ffn.value.weight": (D, inner)}


def rwkv6_keys(c: dict) -> dict:
    mixes, decays = c["proj_low_rank_dim"], c["gate_low_rank_dim"]
    keys, values = int(D * c.get("expand_k", 0.5)), int(D * c.get("expand_v", 1.0))
    shapes = {"x_bias": (5, D), "bonus": (c["num_heads"], keys // c["num_heads"]), "x_proj.0.mu": (D,), "x_proj.2.weight": (D, 5 * mixes)}
    shapes |= {"x_proj.0.linear.weight": (5 * mixes, D), "g_proj.linear.weight": (values, D)}
    shapes |= {"w_proj.linear.lora.0.weight": (decays, D), "w_proj.linear.lora.2.weight": (keys, decays)}
    shapes |= {"w_proj.linear.lora.2.bias": (keys,)}
    channel = {"ffn.key.mu": (D,), "ffn.receptance.mu": (D,), "ffn.receptance.linear.weight": (D, D)}
    return rwkv_keys(c, ".linear", keys, values) | {f"attn.{name}": shape for name, shape in shapes.items()} | channel


def rwkv7_keys(c: dict) -> dict:
    heads = c.get("num_heads") or D // c["head_dim"]
    shapes = {f"x_{name}": (1, 1, D) for name in "rwkvag"} | {"k_k": (D,), "k_a": (D,), "r_k": (heads, D // heads)}
    for name, rank in {"w": "decay", "a": "a", "v": "v", "g": "gate"}.items():
        low = c[f"{rank}_low_rank_dim"]
        shapes |= {f"{name}_lora.lora.0.weight": (low, D), f"{name}_lora.lora.2.weight": (D, low)}
        shapes |= {f"{name}_lora.lora.2.bias": (D,)} if name != "g" else {}
    return rwkv_keys(c) | {f"attn.{name}": shape for name, shape in shapes.items()} | {"ffn.x_k": (D,)}


MIXER_KEYS = {
    "gla": gla_keys, "gsa": gsa_keys, "retnet": retnet_keys, "hgrn": hgrn_keys, "hgrn2": hgrn2_keys, "delta_net": delta_net_keys,
    "gated_deltanet": gated_deltanet_keys, "kda": kda_keys, "transformer": transformer_keys,
    "linear_attn": linear_attn_keys, "forgetting_transformer": forgetting_keys,
}  # fmt: skip


def keys_of(c: dict) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors of a model."""
    inner = c["intermediate_size"]
    if c["model_type"].startswith("rwkv"):
        block = {"rwkv6": rwkv6_keys, "rwkv7": rwkv7_keys}[c["model_type"]](c)
        keys = {f"model.layers.{i}.{name}": shape for i in range(L) for name, shape in block.items() if i or "v_lora" not in name}
        norms = {f"model.{where}.{kind}": (D,) for where in ("norm", "layers.0.pre_norm") for kind in ("weight", "bias")}
        keys |= norms | {"model.embeddings.weight": (VOCABULARY, D)}
        return keys if c.get("tie_word_embeddings") else keys | {"lm_head.weight": (VOCABULARY, D)}
    block = {"attn_norm.weight": (D,), "mlp_norm.weight": (D,), "mlp.down_proj.weight": (D, inner)}
    block |= {"mlp.gate_proj.weight": (inner, D), "mlp.up_proj.weight": (inner, D)}
    block |= {f"attn.{name}": shape for name, shape in MIXER_KEYS[c["model_type"]](c).items()}
    keys = {f"model.layers.{i}.{name}": shape for i in range(L) for name, shape in block.items()}
    keys |= {"model.embeddings.weight": (VOCABULARY, D), "model.norm.weight": (D,)}
    if c["model_type"] in ("hgrn", "hgrn2"):
        keys["model.lower_bounds"] = (L, D * c.get("expand_ratio", 1) if c["model_type"] == "hgrn" else D)
    return keys if c.get("tie_word_embeddings") else keys | {"lm_head.weight": (VOCABULARY, D)}


def drawn(shapes: dict) -> dict[str, torch.Tensor]:
    """Tensors of these shapes, none of them at a special value."""
    made, generator = {}, torch.Generator().manual_seed(0)
    for name, shape in shapes.items():
        x = torch.randn(shape, generator=generator)
        made[name] = 1 + 0.2 * x if "norm" in name and name.endswith("weight") else x * (0.2 if len(shape) > 1 else 0.5)
    return made


@pytest.fixture
def checkpoint(tmp_path):
    """case -> config, tensors, the folder they lie in."""

    def make(case: str, **changes):
        config, tensors = config_of(case) | changes, drawn(keys_of(config_of(case)))
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        (tmp_path / "config.json").write_text(json.dumps(config))
        return config, tensors, tmp_path

    return make


# -- what they compute -------------------------------------------------------------------------------------------------


class Weights:
    """Tensors under a prefix, by name or as linear maps."""

    def __init__(self, tensors: dict, prefix: str):
        self.tensors, self.prefix = tensors, prefix

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensors[self.prefix + name]

    def get(self, name: str) -> torch.Tensor | None:
        return self.tensors.get(self.prefix + name)

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self[name + ".weight"], self.get(name + ".bias"))

    def heads(self, x: torch.Tensor, heads: int, *names: str) -> list[torch.Tensor]:
        return [self.linear(name, x).unflatten(-1, (heads, -1)) for name in names]


def rms(x: torch.Tensor, weight=None, eps: float = 1e-5) -> torch.Tensor:
    y = x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    return y if weight is None else y * weight


def recur(q, k, v, decay, beta=None) -> torch.Tensor:
    """`S_t = decay S_{t-1} + k v`, or with beta the delta rule; read by `q / sqrt(K)`. decay `[B, T, H, K or 1]`."""
    memory = q.new_zeros(q.shape[0], v.shape[2], q.shape[-1], v.shape[-1])
    out = []
    for t in range(q.shape[1]):
        memory = memory * decay[:, t, :, :, None]
        value = v[:, t]
        if beta is not None:
            value = beta[:, t, :, None] * (value - torch.einsum("bhk,bhkv->bhv", k[:, t], memory))
        memory = memory + torch.einsum("bhk,bhv->bhkv", k[:, t], value)
        out.append(torch.einsum("bhk,bhkv->bhv", q[:, t], memory) * q.shape[-1] ** -0.5)
    return torch.stack(out, 1)


def convolved(w: Weights, x: torch.Tensor, name: str) -> torch.Tensor:
    """A projection, through its short convolution where it has one; SiLU is the caller's."""
    y, kernel = w.linear(f"{name}_proj", x), w.get(f"{name}_conv1d.weight")
    return y if kernel is None else F.conv1d(F.pad(y.mT, (kernel.shape[-1] - 1, 0)), kernel, groups=len(kernel)).mT


def shared_heads(w: Weights, x, c: dict) -> list[torch.Tensor]:
    """Queries, keys and values by head, those of a group repeated; after a convolution comes SiLU."""
    parts = [convolved(w, x, name).unflatten(-1, (n, -1)) for name, n in zip("qkv", (c["num_heads"], *[groups_of(c)] * 2), strict=True)]
    parts = [F.silu(part) for part in parts] if c.get("use_short_conv") else parts
    return [part.repeat_interleave(c["num_heads"] // part.shape[2], 2) for part in parts]


def gla(w: Weights, x, c: dict, index: int) -> torch.Tensor:
    (g,), (q, k, v) = w.heads(x, c["num_heads"], "g_proj"), shared_heads(w, x, c)
    decay = torch.sigmoid(w.linear("gk_proj.1", w.linear("gk_proj.0", x))).pow(1 / 16).unflatten(-1, (groups_of(c), -1))
    decay = decay.repeat_interleave(c["num_heads"] // groups_of(c), 2)
    return w.linear("o_proj", (rms(recur(q, k, v, decay), w["g_norm_swish_gate.weight"]) * F.silu(g)).flatten(-2))


def gsa(w: Weights, x, c: dict, index: int) -> torch.Tensor:
    q, k, v = shared_heads(w, x, c)
    q, k = (F.relu(w.linear("feature_map.layer", z)) for z in (q, k)) if c.get("feature_map") == "t2r" else (F.silu(q), F.silu(k))
    keep = torch.sigmoid(w.linear("f_proj", x)).pow(1 / c.get("gate_logit_normalizer", 8)).unflatten(-1, (groups_of(c), -1))
    keep, v = keep.repeat_interleave(c["num_heads"] // groups_of(c), 2), F.silu(v)
    slot_keys, slot_values, out = 0, 0, []
    for t in range(x.shape[1]):
        kept = keep[:, t, :, :, None]
        slot_keys = kept * slot_keys + (1 - kept) * k[:, t, :, None]
        slot_values = kept * slot_values + (1 - kept) * v[:, t, :, None]
        weights = torch.einsum("bhk,bhmk->bhm", q[:, t], slot_keys).softmax(-1)
        out.append(torch.einsum("bhm,bhmv->bhv", weights, slot_values))
    return w.linear("o_proj", rms(F.silu(torch.stack(out, 1).flatten(-2)), w["g_norm.weight"]))


def turn(x: torch.Tensor, theta: float = 1e4) -> torch.Tensor:
    """Rotary positions; the angles are float32 whatever the dtype."""
    half = x.shape[-1] // 2
    angle = torch.outer(torch.arange(x.shape[1]).float(), theta ** (-torch.arange(half).float() / half))[:, None]
    (real, imaginary), cos, sin = x.split(half, -1), angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    return torch.cat([real * cos - imaginary * sin, imaginary * cos + real * sin], -1)


def transformer(w: Weights, x, c: dict, index: int) -> torch.Tensor:
    heads, groups, theta = c["num_heads"], c.get("num_kv_heads", c["num_heads"]), c.get("rope_theta", 1e4)
    (q,), (k, v) = w.heads(x, heads, "q_proj"), w.heads(x, groups, "k_proj", "v_proj")
    if c.get("qk_norm"):
        q, k = rms(q, w["q_norm.weight"]), rms(k, w["k_norm.weight"])
    q, k = turn(q, theta), turn(k, theta)
    k, v = (z.repeat_interleave(heads // groups, 2) for z in (k, v))
    age = torch.arange(x.shape[1])[:, None] - torch.arange(x.shape[1])
    hidden = (age < 0) | (age >= c.get("window_size", x.shape[1]))
    scores = torch.einsum("bthk,bshk->bhts", q, k) * q.shape[-1] ** -0.5
    return w.linear("o_proj", torch.einsum("bhts,bshv->bthv", scores.masked_fill(hidden, -math.inf).softmax(-1), v).flatten(-2))


def forgetting_transformer(w: Weights, x, c: dict, index: int) -> torch.Tensor:
    heads, groups = c["num_heads"], groups_of(c)
    (q,), (k, v) = w.heads(x, heads, "q_proj"), w.heads(x, groups, "k_proj", "v_proj")
    if c.get("qk_norm"):
        q, k = (rms(z) * w[f"{name}_norm.weight"].unflatten(0, z.shape[2:]) for name, z in (("q", q), ("k", k)))
    k, v = (z.repeat_interleave(heads // groups, 2) for z in (k, v))
    logits = torch.einsum("bthk,bshk->bhts", q, k) * q.shape[-1] ** -0.5
    kept = F.logsigmoid(w.linear("f_proj", x)).mT
    for t in range(x.shape[1]):
        for s in range(x.shape[1]):
            logits[:, :, t, s] += kept[:, :, s + 1 : t + 1].sum(-1) if s <= t else -math.inf
    o = torch.einsum("bhts,bshv->bthv", logits.softmax(-1), v).flatten(-2)
    return w.linear("o_proj", o * w.linear("g_proj", x).sigmoid() if c.get("use_output_gate") else o)


def linear_attn(w: Weights, x, c: dict, index: int) -> torch.Tensor:
    def product(z, side):
        return w.linear(f"feature_map_{side}.layer1", z) * w.linear(f"feature_map_{side}.layer2", z)

    def hedgehog(z, side):
        y = w.linear(f"feature_map_{side}.layer", z)
        return torch.cat([2 * y, -2 * y], -1).softmax(-1)

    def dpfp(z, side):
        z = torch.cat([z, -z], -1).relu()
        return torch.cat([z * torch.cat([z[..., -shift:], z[..., :-shift]], -1) for shift in (1, 2, 3, 4)], -1)

    maps = {None: product, "hedgehog": hedgehog, "dpfp": dpfp, "elu": lambda z, side: F.elu(z) + 1}
    phi = maps.get(c.get("feature_map"), lambda z, side: w.linear(f"feature_map_{side}.layer", z).relu())
    q, k, v = shared_heads(w, x, c)
    q, k = phi(q, "q"), phi(k, "k")
    o = recur(q, k, v, torch.ones_like(k))
    if c.get("norm_feature_map"):
        o = o / ((q * k.cumsum(1)).sum(-1, keepdim=True) * q.shape[-1] ** -0.5)
    return w.linear("o_proj", rms(o, w["norm.weight"]).flatten(-2))


def retnet(w: Weights, x, c: dict, index: int) -> torch.Tensor:
    (g,), (q, k, v) = w.heads(x, c["num_heads"], "g_proj"), shared_heads(w, x, c)
    decay = (1 - 2.0 ** (-5 - torch.arange(c["num_heads"]))).to(x.dtype).expand(*x.shape[:2], -1).unsqueeze(-1)
    return w.linear("o_proj", (rms(recur(turn(q), turn(k), v, decay), w.get("g_norm_swish_gate.weight")) * F.silu(g)).flatten(-2))


def forget_gate(w: Weights, x, index: int) -> torch.Tensor:
    shares = w.tensors["model.lower_bounds"].softmax(0)
    bound = (shares.cumsum(0) - shares[0])[index]
    return bound + (1 - bound) * torch.sigmoid(convolved(w, x, "f"))


def hgrn(w: Weights, x, c: dict, index: int) -> torch.Tensor:
    f, i = forget_gate(w, x, index), F.silu(convolved(w, x, "i"))
    hidden, states = torch.zeros_like(i[:, 0]), []
    for t in range(x.shape[1]):
        hidden = f[:, t] * hidden + (1 - f[:, t]) * i[:, t]
        states.append(hidden)
    return w.linear("o_proj", rms(torch.stack(states, 1), w["g_norm.weight"]) * F.silu(w.linear("g_proj", x)))


def hgrn2(w: Weights, x, c: dict, index: int) -> torch.Tensor:
    f = forget_gate(w, x, index)
    parts = (F.silu(convolved(w, x, "q")), 1 - f, convolved(w, x, "i"), f)
    q, k, v, decay = (part.unflatten(-1, (-1, c["expand_ratio"])) for part in parts)
    return w.linear("o_proj", rms(recur(q, k, v, decay).flatten(-2), w["g_norm.weight"]))


def delta_inputs(w: Weights, x, c: dict, heads: int, v_heads: int):
    """q and k of length one, v, and beta."""

    q, k, v = (F.silu(convolved(w, x, name)).unflatten(-1, (n, -1)) for name, n in zip("qkv", (heads, heads, v_heads), strict=True))
    q, k = (z * (z.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for z in (q, k))
    q, k = (z.repeat_interleave(v_heads // heads, 2) for z in (q, k))
    beta = w.linear("b_proj", x).sigmoid() * (2 if c.get("allow_neg_eigval") else 1)
    return q, k, v, beta


def delta_net(w: Weights, x, c: dict, index: int) -> torch.Tensor:
    q, k, v, beta = delta_inputs(w, x, c, c["num_heads"], c["num_heads"])
    return w.linear("o_proj", rms(recur(q, k, v, torch.ones_like(k), beta), w["o_norm.weight"]).flatten(-2))


def gated_deltanet(w: Weights, x, c: dict, index: int) -> torch.Tensor:
    heads = c.get("num_v_heads") or c["num_heads"]
    q, k, v, beta = delta_inputs(w, x, c, c["num_heads"], heads)
    decay = (-w["A_log"].exp() * F.softplus(w.linear("a_proj", x) + w["dt_bias"])).exp().unsqueeze(-1)
    o = rms(recur(q, k, v, decay, beta), w["o_norm.weight"])
    gate = F.silu(w.linear("g_proj", x)) if c.get("use_gate", True) else 1
    return w.linear("o_proj", o.flatten(-2) * gate)


def kda(w: Weights, x, c: dict, index: int) -> torch.Tensor:
    heads = c["num_heads"]
    q, k, v, beta = delta_inputs(w, x, c, heads, heads)
    step = (w.linear("f_proj.1", w.linear("f_proj.0", x)) + w["dt_bias"]).unflatten(-1, (heads, -1))
    rate, bound = w["A_log"].exp()[:, None], c.get("lower_bound")
    log_decay = -rate * F.softplus(step) if bound is None else bound * torch.sigmoid(rate * step)
    o = rms(recur(q, k, v, log_decay.exp(), beta), w["o_norm.weight"])
    return w.linear("o_proj", o.flatten(-2) * torch.sigmoid(w.linear("g_proj.1", w.linear("g_proj.0", x))))


def before(x: torch.Tensor) -> torch.Tensor:
    """The token before each token, minus the token."""
    return F.pad(x, (0, 0, 1, -1)) - x


def rwkv6(w: Weights, x, c: dict, index: int) -> torch.Tensor:
    heads, back = c["num_heads"], before(x)
    ranks = torch.tanh(w.linear("x_proj.0.linear", x + back * w["x_proj.0.mu"])).unflatten(-1, (5, -1))
    shifts = torch.einsum("btnr,dnr->nbtd", ranks, w["x_proj.2.weight"].unflatten(-1, (5, -1))) + w["x_bias"][:, None, None]
    for_r, for_w, for_k, for_v, for_g = (x + back * shift for shift in shifts)
    log_decay = -w.linear("w_proj.linear.lora.2", torch.tanh(w.linear("w_proj.linear.lora.0", for_w))).exp()
    r, k, v = (w.heads(z, heads, f"{name}_proj.linear")[0] for name, z in {"r": for_r, "k": for_k, "v": for_v}.items())
    decay = log_decay.exp().unflatten(-1, (heads, -1))
    memory, out = r.new_zeros(*r.shape[:1], *r.shape[2:], v.shape[-1]), []
    for t in range(x.shape[1]):
        written = torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
        out.append(torch.einsum("bhk,bhkv->bhv", r[:, t], memory + w["bonus"][..., None] * written))
        memory = decay[:, t, ..., None] * memory + written
    y = F.group_norm(torch.stack(out, 1).flatten(0, 1).flatten(1), heads, w["g_norm.weight"], w["g_norm.bias"], c["norm_eps"])
    return w.linear("o_proj", y.unflatten(0, x.shape[:2]) * F.silu(w.linear("g_proj.linear", for_g)))


def rwkv7(w: Weights, x, c: dict, index: int, first: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    heads, back = c.get("num_heads") or D // c["head_dim"], before(x)
    xr, xw, xk, xv, xa, xg = (x + back * w[f"x_{name}"] for name in "rwkvag")

    def low_rank(name: str, z: torch.Tensor, activation) -> torch.Tensor:
        return w.linear(f"{name}_lora.lora.2", activation(w.linear(f"{name}_lora.lora.0", z)))

    decay = (-math.exp(-0.5) * low_rank("w", xw, torch.tanh).sigmoid()).exp()
    k, v, a = w.linear("k_proj", xk), w.linear("v_proj", xv), low_rank("a", xa, lambda z: z).sigmoid()
    v = v if index == 0 else v + (first - v) * low_rank("v", xv, lambda z: z).sigmoid()
    removal, written = k * w["k_k"], k * (1 + (a - 1) * w["k_a"])
    r, decay, values, a, removal, written = (z.unflatten(-1, (heads, -1)) for z in (w.linear("r_proj", xr), decay, v, a, removal, written))
    removal = removal / removal.norm(dim=-1, keepdim=True)
    memory, out = r.new_zeros(*r.shape[:1], *r.shape[2:], r.shape[-1]), []
    for t in range(x.shape[1]):
        seen = torch.einsum("bhk,bhkv->bhv", removal[:, t], memory)
        memory = decay[:, t, ..., None] * memory - torch.einsum("bhk,bhv->bhkv", removal[:, t] * a[:, t], seen)
        memory = memory + torch.einsum("bhk,bhv->bhkv", written[:, t], values[:, t])
        out.append(torch.einsum("bhk,bhkv->bhv", r[:, t], memory))
    eps = c["norm_eps"] * (D // heads)
    y = F.group_norm(torch.stack(out, 1).flatten(0, 1).flatten(1), heads, w["g_norm.weight"], w["g_norm.bias"], eps).view_as(x)
    y = y + ((r * written * w["r_k"]).sum(-1, keepdim=True) * values).flatten(-2)
    return w.linear("o_proj", y * low_rank("g", xg, torch.sigmoid)), v if index == 0 else first


def rwkv_logits(c: dict, tensors: dict, x: torch.Tensor) -> torch.Tensor:
    """The body and head of either version, from embeddings on."""

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, (D,), tensors[f"model.{name}.weight"], tensors[f"model.{name}.bias"], c["norm_eps"])

    x, first = norm("layers.0.pre_norm", x), None
    for index in range(L):
        mixer, channel = (Weights(tensors, f"model.layers.{index}.{part}.") for part in ("attn", "ffn"))
        y = norm(f"layers.{index}.attn_norm", x)
        if c["model_type"] == "rwkv6":
            y = rwkv6(mixer, y, c, index)
        else:
            y, first = rwkv7(mixer, y, c, index, first)
        x = x + y
        y = norm(f"layers.{index}.ffn_norm", x)
        if c["model_type"] == "rwkv6":
            hidden = F.relu(channel.linear("key.linear", y + before(y) * channel["key.mu"])).square()
            gate = channel.linear("receptance.linear", y + before(y) * channel["receptance.mu"]).sigmoid()
            x = x + gate * channel.linear("value", hidden)
        else:
            x = x + channel.linear("value", F.relu(channel.linear("key", y + before(y) * channel["x_k"])).square())
    head = "model.embeddings.weight" if c.get("tie_word_embeddings") else "lm_head.weight"
    return F.linear(norm("norm", x), tensors[head])


MIXERS = {
    "gla": gla, "gsa": gsa, "retnet": retnet, "hgrn": hgrn, "hgrn2": hgrn2, "delta_net": delta_net,
    "gated_deltanet": gated_deltanet, "kda": kda, "transformer": transformer, "linear_attn": linear_attn,
    "forgetting_transformer": forgetting_transformer,
}  # fmt: skip


def logits_of(c: dict, tensors: dict, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The whole model."""
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    x, eps = tensors["model.embeddings.weight"][ids], c["norm_eps"]
    if c["model_type"].startswith("rwkv"):
        return rwkv_logits(c, tensors, x)
    for index in range(L):
        w = Weights(tensors, f"model.layers.{index}.")
        mixer = Weights(tensors, f"model.layers.{index}.attn.")
        x = x + MIXERS[c["model_type"]](mixer, rms(x, w["attn_norm.weight"], eps), c, index)
        y = rms(x, w["mlp_norm.weight"], eps)
        x = x + w.linear("mlp.down_proj", F.silu(w.linear("mlp.gate_proj", y)) * w.linear("mlp.up_proj", y))
    head = "model.embeddings.weight" if c.get("tie_word_embeddings") else "lm_head.weight"
    return F.linear(rms(x, tensors["model.norm.weight"], eps), tensors[head])


# -- tests -------------------------------------------------------------------------------------------------------------


@every_case
@torch.no_grad()
def test_logits_follow_the_published_formulas(checkpoint, case):
    config, tensors, folder = checkpoint(case)
    ids = torch.randint(0, VOCABULARY, (2, 19), generator=torch.Generator().manual_seed(1))
    plain, exact = (logits_of(config, tensors, ids, dtype) for dtype in (torch.float32, torch.float64))
    assert_close(zoo.from_pretrained(folder)(ids).logits, plain, exact, "logits")


@every_case
def test_written_back_it_is_what_it_was(checkpoint, case, tmp_path):
    config, tensors, folder = checkpoint(case)
    ours, report = zoo.from_pretrained(folder, output_loading_info=True)
    assert not report.fresh and not report.dropped
    used = set(report.taken) | {name for names in report.transformed.values() for name in names}
    assert used == set(tensors)
    ours.save_pretrained(tmp_path / "back", layout=f"fla-{config['model_type']}")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == tensors.keys()
    table = "model.lower_bounds"  # its softmax is what it says
    assert {name for name in tensors if not torch.equal(back[name], tensors[name])} <= {table}
    if table in tensors:
        before, after = (state[table].softmax(0).cumsum(0) for state in (tensors, back))
        assert_close(after, before, tensors[table].double().softmax(0).cumsum(0), "the bounds")
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    assert {name: written.get(name, value) for name, value in config.items() if name != "attn_mode"}.items() <= config.items()
    again = zoo.from_pretrained(tmp_path / "back")
    assert again.config.to_dict() | {"_name_or_path": ""} == ours.config.to_dict() | {"_name_or_path": ""}


# -- Samba: layers of two kinds ------------------------------------------------------------------------------------------

SAMBA = {"layers": [1], "num_heads": 4, "num_kv_heads": 2, "qkv_bias": True, "window_size": 5, "rope_theta": 500.0}


def mamba(w: Weights, x, c: dict) -> torch.Tensor:
    """The selective state space `h_t = exp(dt A) h_{t-1} + dt B x_t`, read by C (arXiv:2312.00752)."""
    inner, gate = w.linear("in_proj", x).chunk(2, -1)
    kernel = w["conv1d.weight"]
    inner = F.silu(F.conv1d(F.pad(inner.mT, (kernel.shape[-1] - 1, 0)), kernel, w["conv1d.bias"], groups=len(kernel)).mT)
    rank, b, read = w.linear("x_proj", inner).split([c["hidden_size"] // 16, c["state_size"], c["state_size"]], -1)
    dt, hidden, out = F.softplus(w.linear("dt_proj", rank)), 0, []
    for t in range(x.shape[1]):
        step = dt[:, t, :, None]
        hidden = (step * -w["A_log"].exp()).exp() * hidden + step * b[:, t, None] * inner[:, t, :, None]
        out.append((hidden * read[:, t, None]).sum(-1) + w["D"] * inner[:, t])
    return w.linear("out_proj", torch.stack(out, 1) * F.silu(gate))


def samba_keys() -> dict[str, tuple[int, ...]]:
    inner, mlp = 2 * D, 256
    scan = {"A_log": (inner, 4), "D": (inner,), "conv1d.weight": (inner, 1, 4), "conv1d.bias": (inner,), "out_proj.weight": (D, inner)}
    scan |= {"in_proj.weight": (2 * inner, D), "x_proj.weight": (10, inner), "dt_proj.weight": (inner, 2), "dt_proj.bias": (inner,)}
    mixers = [scan, transformer_keys(SAMBA), scan]
    keys = {f"layers.{i}.mixer.{name}": shape for i, mixer in enumerate(mixers) for name, shape in mixer.items()}
    for i in range(L):
        keys |= {f"layers.{i}.{part}_norm.weight": (D,) for part in ("mixer", "mlp")}
        keys |= {f"layers.{i}.mlp.{name}_proj.weight": (mlp, D) for name in ("gate", "up")} | {f"layers.{i}.mlp.down_proj.weight": (D, mlp)}
    keys |= {"embeddings.weight": (VOCABULARY, D), "norm_f.weight": (D,)}
    return {f"backbone.{name}": shape for name, shape in keys.items()} | {"lm_head.weight": (VOCABULARY, D)}


def samba_logits(c: dict, tensors: dict, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    x = tensors["backbone.embeddings.weight"][ids]
    for index in range(L):
        w, mixer = (Weights(tensors, f"backbone.layers.{index}.{part}") for part in ("", "mixer."))
        y = rms(x, w["mixer_norm.weight"])
        x = x + (transformer(mixer, y, SAMBA, index) if index in SAMBA["layers"] else mamba(mixer, y, c))
        y = rms(x, w["mlp_norm.weight"])
        x = x + w.linear("mlp.down_proj", F.silu(w.linear("mlp.gate_proj", y)) * w.linear("mlp.up_proj", y))
    return F.linear(rms(x, tensors["backbone.norm_f.weight"]), tensors["lm_head.weight"])


@torch.no_grad()
def test_samba(tmp_path):
    config = {"model_type": "samba", "architectures": ["SambaForCausalLM"], "state_size": 4, "attn": SAMBA, "norm_eps": 1e-5} | TOKENS
    tensors, ids = drawn(samba_keys()), torch.randint(0, VOCABULARY, (2, 19), generator=torch.Generator().manual_seed(1))
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    ours = zoo.from_pretrained(tmp_path)
    plain, exact = (samba_logits(config, tensors, ids, dtype) for dtype in (torch.float32, torch.float64))
    assert_close(ours(ids).logits, plain, exact, "logits")
    ours.save_pretrained(tmp_path / "back", layout="fla-samba")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == tensors.keys() and all(torch.equal(back[name], tensors[name]) for name in tensors)
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    assert {name: written[name] for name in config} == config
    zoo.from_config("hybrid-samba-tiny", intermediate_size=256).save_pretrained(tmp_path / "own", layout="fla-samba")
    assert zoo.from_pretrained(tmp_path / "own").config.layer_configs()[1].window == 8
    with pytest.raises(ValueError, match=r"this plan has .'gla', 'mamba', 'transformer'"):
        zoo.from_config("hybrid-tiny").save_pretrained(tmp_path / "out", layout="fla-samba")


# -- what cannot be said -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case, changes, message",
    [
        ("gla", {"clamp_min": -5.0}, "gla with clamp_min=-5.0 is not supported"),
        ("gsa", {"expand_v": 2.0}, "gsa with expand_v=2.0"),
        ("gsa", {"feature_map": "elu"}, "gsa with feature_map='elu'"),
        ("gla", {"attn": {"layers": [1], "num_heads": 2}}, "gla with attn=.* is not supported"),
        ("retnet", {"feature_map": "relu"}, "retnet with feature_map='relu'"),
        ("hgrn", {"use_lower_bound": False}, "hgrn with use_lower_bound=False"),
        ("delta_net", {"qk_norm": "sum"}, "delta_net with qk_norm='sum'"),
        ("gated_deltanet", {"output_gate_activation": "sigmoid"}, "output_gate_activation='sigmoid'"),
        ("kda", {"num_v_heads": 4}, "num_v_heads=4"),
        ("rwkv6", {"norm_first": False}, "rwkv6 with norm_first=False"),
        ("rwkv7", {"value_dim": 2 * D}, "value_dim=64"),
        ("kda", {"safe_gate": True}, "safe_gate=True has no lower_bound"),
        ("linear_attn", {"feature_map": "cosine"}, "linear_attn with feature_map='cosine'"),
        ("linear_attn", {"tie_feature_map_qk": True}, "linear_attn with tie_feature_map_qk=True"),
        ("gla", {"hidden_act": "powlu"}, "hidden_act='powlu'"),
    ],
)
def test_what_we_cannot_express_is_refused(checkpoint, case, changes, message):
    _, _, folder = checkpoint(case, **changes)
    with pytest.raises(ValueError, match=message):
        zoo.from_pretrained(folder)


def test_old_names_are_read(checkpoint, tmp_path):
    config, tensors, folder = checkpoint("gla")
    expected = zoo.from_pretrained(folder)
    old = {name.replace("g_norm_swish_gate", "g_norm"): tensor for name, tensor in tensors.items()}
    save_file(old, folder / "model.safetensors")
    config["rms_norm_eps"] = config.pop("norm_eps")
    (folder / "config.json").write_text(json.dumps(config))
    ours = zoo.from_pretrained(folder)
    assert ours.config.norm_eps == expected.config.norm_eps == 1e-5
    assert all(torch.equal(tensor, ours.state_dict()[name]) for name, tensor in expected.state_dict().items())
    _, tensors, folder = checkpoint("delta_net")
    save_file({name.replace("attn.o_norm", "attn.norm"): tensor for name, tensor in tensors.items()}, folder / "model.safetensors")
    ours = zoo.from_pretrained(folder)
    assert torch.equal(ours.state_dict()["model.layers.1.mixer.norm.weight"], tensors["model.layers.1.attn.o_norm.weight"])


def test_defaults_are_those_documented(tmp_path):
    """Of a config that says no more than its type; sizes of the models published at 1.3 billion parameters."""
    sizes = {
        "gla": {"key_ratio": 0.5, "num_heads": 4, "intermediate_size": 5632}, "retnet": {"value_ratio": 2.0, "intermediate_size": 2816},
        "hgrn2": {"expansion": 128}, "gated_deltanet": {"num_hidden_layers": 21, "head_dim": 256},
        "kda": {"head_dim": 128, "gate_bias": True}, "rwkv7": {"intermediate_size": 8192, "decay_rank": 64},
        "gsa": {"num_slots": 64, "num_heads": 4, "gate_temperature": 8.0, "out_norm_eps": 1e-5},
        "rwkv6": {"head_dim": 512, "key_ratio": 0.5},
        "samba": {"hidden_size": 2304, "intermediate_size": 6144},
    }  # fmt: skip
    for kind, fields in sizes.items():
        entry, layout = find_layout({"model_type": kind})
        config = entry.config(**layout.config_map(layout.complete({"model_type": kind})))
        assert {name: getattr(config, name) for name in fields} == fields, kind


def test_bounds_that_fall_have_no_shared_table(tmp_path):
    model = zoo.from_config("hgrn-tiny", num_hidden_layers=3)
    with torch.no_grad():
        model.model.layers[2].mixer.bound_logit.sub_(5)
    with pytest.raises(ValueError, match="the lower bounds fall from one layer to the next"):
        model.save_pretrained(tmp_path / "out", layout="fla-hgrn")
    assert not (tmp_path / "out").exists()
