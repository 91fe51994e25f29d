"""Checkpoints of flash-linear-attention: every key kept bit by bit, and the whole model against its published formulas.

That library computes on GPUs only, so what it defines is written down here once more, reading its tensors by its names.
"""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

import zoo
from zoo.evaluate.closeness import assert_close

D, L, VOCABULARY = 32, 3, 61
TOKENS = {"vocab_size": VOCABULARY, "hidden_size": D, "num_hidden_layers": L, "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2}
PLAIN = {"intermediate_size": 40, "norm_eps": 1e-5, "fuse_norm": True, "fuse_cross_entropy": True}
CASES = {
    "gla": ("gla", {"num_heads": 2, "attn_mode": "fused_chunk"}),
    "gla-wide": ("gla", {"num_heads": 4, "expand_k": 1, "expand_v": 2, "tie_word_embeddings": True}),
    "retnet": ("retnet", {"num_heads": 4, "expand_v": 1.5}),
    "retnet-weightless": ("retnet", {"num_heads": 2, "elementwise_affine": False}),
    "hgrn": ("hgrn", {}),
    "hgrn-wide": ("hgrn", {"expand_ratio": 2}),
    "hgrn2": ("hgrn2", {"expand_ratio": 8}),
    "delta_net": ("delta_net", {"num_heads": 2, "expand_v": 2.0}),
    "delta_net-plain": ("delta_net", {"num_heads": 4, "use_short_conv": False, "allow_neg_eigval": True}),
    "gated_deltanet": ("gated_deltanet", {"num_heads": 2, "num_v_heads": 4, "head_dim": 8, "conv_size": 3}),
    "gated_deltanet-plain": ("gated_deltanet", {"num_heads": 2, "head_dim": 6, "use_gate": False, "allow_neg_eigval": True}),
    "kda": ("kda", {"num_heads": 2, "head_dim": 8, "expand_v": 1.5}),
}  # fmt: skip
every_case = pytest.mark.parametrize("case", CASES)


def config_of(case: str) -> dict:
    """A config as the library writes it."""
    kind, fields = CASES[case]
    return {"model_type": kind, "architectures": [CLASSES[kind] + "ForCausalLM"]} | TOKENS | PLAIN | fields


CLASSES = {
    "gla": "GLA", "retnet": "RetNet", "hgrn": "HGRN", "hgrn2": "HGRN2", "delta_net": "DeltaNet", "gated_deltanet": "GatedDeltaNet",
    "kda": "KDA",
}  # fmt: skip


# -- the documented keys -----------------------------------------------------------------------------------------------


def projections(**sizes) -> dict:
    return {f"{name}_proj.weight": shape for name, shape in sizes.items()}


def gla_keys(c: dict) -> dict:
    keys, values = int(D * c.get("expand_k", 0.5)), int(D * c.get("expand_v", 1.0))
    low = {"gk_proj.0.weight": (16, D), "gk_proj.1.weight": (keys, 16), "gk_proj.1.bias": (keys,)}
    shapes = projections(q=(keys, D), k=(keys, D), v=(values, D), g=(values, D), o=(D, values))
    return shapes | low | {"g_norm_swish_gate.weight": (values // c["num_heads"],)}


def retnet_keys(c: dict) -> dict:
    values = int(D * c.get("expand_v", 2.0))
    norm = {"g_norm_swish_gate.weight": (values // c["num_heads"],)} if c.get("elementwise_affine", True) else {}
    return projections(q=(D, D), k=(D, D), v=(values, D), g=(values, D), o=(D, values)) | norm


def hgrn_keys(c: dict) -> dict:
    inner = D * c.get("expand_ratio", 1)
    return projections(i=(inner, D), f=(inner, D), g=(inner, D), o=(D, inner)) | {"g_norm.weight": (inner,)}


def hgrn2_keys(c: dict) -> dict:
    return projections(q=(D, D), f=(D, D), i=(D, D), o=(D, D)) | {"g_norm.weight": (D,)}


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


MIXER_KEYS = {
    "gla": gla_keys, "retnet": retnet_keys, "hgrn": hgrn_keys, "hgrn2": hgrn2_keys, "delta_net": delta_net_keys,
    "gated_deltanet": gated_deltanet_keys, "kda": kda_keys,
}  # fmt: skip


def keys_of(c: dict) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors of a model."""
    inner = c["intermediate_size"]
    block = {"attn_norm.weight": (D,), "mlp_norm.weight": (D,), "mlp.down_proj.weight": (D, inner)}
    block |= {"mlp.gate_proj.weight": (inner, D), "mlp.up_proj.weight": (inner, D)}
    block |= {f"attn.{name}": shape for name, shape in MIXER_KEYS[c["model_type"]](c).items()}
    keys = {f"model.layers.{i}.{name}": shape for i in range(L) for name, shape in block.items()}
    keys |= {"model.embeddings.weight": (VOCABULARY, D), "model.norm.weight": (D,)}
    if c["model_type"] in ("hgrn", "hgrn2"):
        keys["model.lower_bounds"] = (L, D * c.get("expand_ratio", 1) if c["model_type"] == "hgrn" else D)
    return keys if c.get("tie_word_embeddings") else keys | {"lm_head.weight": (VOCABULARY, D)}


def tensors_of(c: dict) -> dict[str, torch.Tensor]:
    """Such tensors, none of them at a special value."""
    made = {}
    generator = torch.Generator().manual_seed(0)
    for name, shape in keys_of(c).items():
        drawn = torch.randn(shape, generator=generator)
        made[name] = 1 + 0.2 * drawn if "norm" in name and name.endswith("weight") else drawn * (0.2 if len(shape) > 1 else 0.5)
    return made


@pytest.fixture
def checkpoint(tmp_path):
    """case -> config, tensors, the folder they lie in."""

    def make(case: str, **changes):
        config, tensors = config_of(case) | changes, tensors_of(config_of(case))
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


def gla(w: Weights, x, c: dict, index: int) -> torch.Tensor:
    q, k, v, g = w.heads(x, c["num_heads"], "q_proj", "k_proj", "v_proj", "g_proj")
    decay = torch.sigmoid(w.linear("gk_proj.1", w.linear("gk_proj.0", x))).pow(1 / 16).unflatten(-1, (c["num_heads"], -1))
    return w.linear("o_proj", (rms(recur(q, k, v, decay), w["g_norm_swish_gate.weight"]) * F.silu(g)).flatten(-2))


def retnet(w: Weights, x, c: dict, index: int) -> torch.Tensor:
    q, k, v, g = w.heads(x, c["num_heads"], "q_proj", "k_proj", "v_proj", "g_proj")
    half = q.shape[-1] // 2
    angle = torch.outer(torch.arange(x.shape[1]).float(), 1e4 ** (-torch.arange(half).float() / half)).to(x.dtype)[:, None]

    def turn(z):
        real, imaginary = z.split(half, -1)
        return torch.cat([real * angle.cos() - imaginary * angle.sin(), imaginary * angle.cos() + real * angle.sin()], -1)

    decay = (1 - 2.0 ** (-5 - torch.arange(c["num_heads"]))).to(x.dtype).expand(*x.shape[:2], -1).unsqueeze(-1)
    return w.linear("o_proj", (rms(recur(turn(q), turn(k), v, decay), w.get("g_norm_swish_gate.weight")) * F.silu(g)).flatten(-2))


def forget_gate(w: Weights, x, index: int) -> torch.Tensor:
    shares = w.tensors["model.lower_bounds"].softmax(0)
    bound = (shares.cumsum(0) - shares[0])[index]
    return bound + (1 - bound) * torch.sigmoid(w.linear("f_proj", x))


def hgrn(w: Weights, x, c: dict, index: int) -> torch.Tensor:
    f, i = forget_gate(w, x, index), F.silu(w.linear("i_proj", x))
    hidden, states = torch.zeros_like(i[:, 0]), []
    for t in range(x.shape[1]):
        hidden = f[:, t] * hidden + (1 - f[:, t]) * i[:, t]
        states.append(hidden)
    return w.linear("o_proj", rms(torch.stack(states, 1), w["g_norm.weight"]) * F.silu(w.linear("g_proj", x)))


def hgrn2(w: Weights, x, c: dict, index: int) -> torch.Tensor:
    f = forget_gate(w, x, index)
    q, k, v, decay = (z.unflatten(-1, (-1, c["expand_ratio"])) for z in (F.silu(w.linear("q_proj", x)), 1 - f, w.linear("i_proj", x), f))
    return w.linear("o_proj", rms(recur(q, k, v, decay).flatten(-2), w["g_norm.weight"]))


def delta_inputs(w: Weights, x, c: dict, heads: int, v_heads: int):
    """q and k of length one, v, and beta."""

    def convolved(name: str) -> torch.Tensor:
        y = w.linear(f"{name}_proj", x)
        if c.get("use_short_conv", True):
            kernel = w[f"{name}_conv1d.weight"]
            y = F.conv1d(F.pad(y.mT, (kernel.shape[-1] - 1, 0)), kernel, groups=len(kernel)).mT
        return F.silu(y)

    q, k = (convolved(name).unflatten(-1, (heads, -1)) for name in "qk")
    q, k = (z * (z.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for z in (q, k))
    q, k = (z.repeat_interleave(v_heads // heads, 2) for z in (q, k))
    beta = w.linear("b_proj", x).sigmoid() * (2 if c.get("allow_neg_eigval") else 1)
    return q, k, convolved("v").unflatten(-1, (v_heads, -1)), beta


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
    step = F.softplus(w.linear("f_proj.1", w.linear("f_proj.0", x)) + w["dt_bias"]).unflatten(-1, (heads, -1))
    o = rms(recur(q, k, v, (-w["A_log"].exp()[:, None] * step).exp(), beta), w["o_norm.weight"])
    return w.linear("o_proj", o.flatten(-2) * torch.sigmoid(w.linear("g_proj.1", w.linear("g_proj.0", x))))


MIXERS = {
    "gla": gla, "retnet": retnet, "hgrn": hgrn, "hgrn2": hgrn2, "delta_net": delta_net, "gated_deltanet": gated_deltanet, "kda": kda,
}  # fmt: skip


def logits_of(c: dict, tensors: dict, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The whole model."""
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    x = tensors["model.embeddings.weight"][ids]
    for index in range(L):
        w = Weights(tensors, f"model.layers.{index}.")
        mixer = Weights(tensors, f"model.layers.{index}.attn.")
        x = x + MIXERS[c["model_type"]](mixer, rms(x, w["attn_norm.weight"]), c, index)
        y = rms(x, w["mlp_norm.weight"])
        x = x + w.linear("mlp.down_proj", F.silu(w.linear("mlp.gate_proj", y)) * w.linear("mlp.up_proj", y))
    head = "model.embeddings.weight" if c.get("tie_word_embeddings") else "lm_head.weight"
    return F.linear(rms(x, tensors["model.norm.weight"]), tensors[head])


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
