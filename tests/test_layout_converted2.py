"""Transformers that others made recurrent, as they were published: every key kept bit by bit, and the model against its formulas.

Their libraries compute on GPUs only, so what they define is written down here once more, reading their tensors by their names.
"""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_layout_fla import Weights, drawn, recur, rms, transformer, turn
from torch.nn import functional as F

import zoo
from zoo.evaluate.closeness import assert_close
from zoo.ops import use_backend

D, L, VOCABULARY, INNER = 32, 3, 61, 40
LLAMA = {
    "vocab_size": VOCABULARY, "hidden_size": D, "intermediate_size": INNER, "num_hidden_layers": L, "num_attention_heads": 4,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "hidden_act": "silu", "max_position_embeddings": 128, "rope_theta": 500.0,
    "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LLAMBA = {"d_model": D, "n_layer": L, "vocab_size": VOCABULARY, "pad_vocab_size_multiple": 1}
MLP = {"intermediate_size": INNER, "bias": False, "act_fn": "silu"}
BESIDE = "mamba_config.json"
SIDE = {"d_model": D, "rms_norm_eps": 1e-5, "vocab_size": None, "intermediate_size": INNER, "hidden_act": "silu", "n_layer": L}
JET = {"head_dim": 6, "num_heads": 2, "expand_v": 2.6666666667, "conv_size": 4, "dconv_generator_reduction": 8, "norm_eps": "1e-5",
       "mode": "chunk", "dconv_implementation": "triton"}  # fmt: skip
QWEN = LLAMA | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "_layer_implementation": "Qwen2MemDecoderLayer",
                "sliding_window": 5, "loss_type": ["kl"], "use_normalized_l2": True}  # fmt: skip
CASES = {  # layout, config.json, the file beside it
    "llamba": (
        "llamba",
        LLAMBA | {"model_type": "llamba", "architectures": ["LlambaForCausalLM"], "mlp_cfg": MLP, "tie_embeddings": True,
                  "ssm_cfg": {"d_state": 8, "n_v_heads": 4, "n_qk_heads": 4, "expand": 1, "activation": "identity", "bias": False}},
        None,
    ),
    "llamba-untyped": (
        "llamba",
        LLAMBA | {"mlp_cfg": MLP | {"bias": True}, "tie_embeddings": False, "ssm_cfg": {"d_state": 6, "n_v_heads": 4, "n_qk_heads": 2,
                  "expand": 2, "activation": "silu", "bias": True, "d_conv": 3, "conv_bias": False}},
        None,
    ),
    "mamba2_in_llama": (
        "mamba2_in_llama",
        LLAMA | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
        SIDE | {"ssm_cfg": {"expand": 1, "ngroups": 4, "d_state": 8}, "d_inner": D, "d_xb": 16, "attn_layers": [1]},
    ),
    "mamba2_in_llama-repeated": (
        "mamba2_in_llama",
        LLAMA | {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 5},
        SIDE | {"ssm_cfg": {"expand": 1, "ngroups": 4, "d_state": 8, "repeat_kv_before_conv": True, "bias": True}, "d_inner": D,
                "d_xb": 16, "attn_layers": [0, 2]},
    ),
    "mamba_in_llama": (
        "mamba_in_llama",
        LLAMA | {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 7},
        SIDE | {"ssm_cfg": {"expand": 1, "d_state": 4}, "d_xb": 16, "attn_layers": [1]},
    ),
    "mamba_in_llama-alone": (
        "mamba_in_llama",
        LLAMA | {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True},
        SIDE | {"ssm_cfg": {"expand": 1, "d_state": 4, "repeat_kv_before_conv": False, "conv_bias": False, "dt_rank": 5}, "d_xb": 16,
                "attn_layers": []},
    ),
    "jet_nemotron": (
        "jet_nemotron",
        LLAMA | {"model_type": "jet_nemotron", "architectures": ["JetNemotronForCausalLM"], "layer_types": ["swa", "jet", "attn"],
                 "efficient_attention_config": {"jet": JET, "swa": {"window_size": 5}}},
        None,
    ),
    "ahn-gated": (
        "ahn",
        QWEN | {"_ahn_implementation": "GatedDeltaNet", "num_attn_sinks": 3, "tie_word_embeddings": True},
        None,
    ),
    "ahn-delta": ("ahn", QWEN | {"_ahn_implementation": "DeltaNet", "num_attn_sinks": 1, "sliding_window": 4}, None),
    "ahn-mamba2": ("ahn", QWEN | {"_ahn_implementation": "Mamba2"}, None),
    "jet_nemotron-alone": (
        "jet_nemotron",
        LLAMA | {"model_type": "jet_nemotron", "architectures": ["JetNemotronForCausalLM"], "layer_types": ["jet"] * L,
                 "tie_word_embeddings": True, "efficient_attention_config": {"jet": JET | {"expand_v": 2, "conv_size": 3}}},
        None,
    ),
}  # fmt: skip
every_case = pytest.mark.parametrize("case", CASES)


# -- the documented keys -----------------------------------------------------------------------------------------------


def biased(keys: dict, *names: str) -> dict:
    """With biases for these matrices."""
    return keys | {f"{name}.bias": keys[f"{name}.weight"][:1] for name in names}


def llamba_keys(c: dict, side: dict | None) -> dict:
    ssm = c["ssm_cfg"]
    inner, heads = D * ssm["expand"], ssm["n_v_heads"]
    mixed = inner + 2 * ssm["n_qk_heads"] * ssm["d_state"]
    keys = {"in_proj.weight": (mixed + inner + heads, D), "out_proj.weight": (D, inner), "D": (heads,)}
    keys |= {"conv1d.weight": (mixed, 1, ssm.get("d_conv", 4))} | ({"conv1d.bias": (mixed,)} if ssm.get("conv_bias", True) else {})
    return biased(keys, "in_proj", "out_proj") if ssm["bias"] else keys | {"z_bias": (inner,)}


def mamba2_keys(c: dict, side: dict) -> dict:
    ssm, inner, shared = side["ssm_cfg"], side["d_inner"], side["d_xb"]
    heads = ssm["ngroups"]
    mixed = 3 * inner if ssm.get("repeat_kv_before_conv") else inner + 2 * shared
    keys = {"in_proj.weight": (2 * inner + 2 * shared + heads, D), "out_proj.weight": (D, inner), "norm.weight": (inner,)}
    keys |= {"conv1d.weight": (mixed, 1, 4), "conv1d.bias": (mixed,), "A_log": (heads,), "dt_bias": (heads,), "D": (heads,)}
    return biased(keys, "in_proj", "out_proj") if ssm.get("bias") else keys


def mamba_keys(c: dict, side: dict) -> dict:
    ssm, shared = side["ssm_cfg"], side["d_xb"]
    rank, mixed = ssm.get("dt_rank", 2), D if ssm.get("repeat_kv_before_conv", True) else shared
    keys = {"in_proj_x.weight": (shared, D), "B_proj.weight": (shared, D), "C_proj.weight": (D, D), "in_proj_z.weight": (D, D)}
    keys |= {"dt_proj_down.weight": (rank, D), "dt_proj.weight": (D, rank), "dt_proj.bias": (D,), "out_proj.weight": (D, D)}
    keys |= {"A_log": (D, ssm["d_state"]), "D": (D,), "conv1d.weight": (mixed, 1, 4)}
    return keys | ({"conv1d.bias": (mixed,)} if ssm.get("conv_bias", True) else {})


def jet_keys(c: dict, side: dict | None) -> dict:
    jet = c["efficient_attention_config"]["jet"]
    heads, keys, values = jet["num_heads"], jet["num_heads"] * jet["head_dim"], jet["num_heads"] * int(jet["head_dim"] * jet["expand_v"])
    sizes = {"q": keys, "k": keys, "v": values, "b": heads, "a": heads, "g": values}
    shapes = {f"{name}_proj.weight": (size, D) for name, size in sizes.items()} | {"o_proj.weight": (D, values)}
    inside, taps = values // jet["dconv_generator_reduction"], values * jet["conv_size"]
    made = {"w1.weight": (inside, D), "w2.weight": (taps, inside), "w2.bias": (taps,)}
    shapes |= {f"dynamic_conv1d.kernel_generator.{name}": shape for name, shape in made.items()}
    return shapes | {"A_log": (heads,), "dt_bias": (heads,), "o_norm.weight": (values // heads,)}


def ahn_keys(c: dict, side: dict | None) -> dict:
    heads, kind = c["num_attention_heads"], c["_ahn_implementation"]
    channels, names = D // heads, "dt_proj g_proj" if kind == "Mamba2" else "b_proj g_proj"
    keys = {f"{name}.weight": (heads, D) for name in names.split()} | {"o_proj.weight": (heads, channels, channels)}
    if kind == "Mamba2":
        keys = biased(keys, "dt_proj", "g_proj") | {"norm.weight": (D,), "A_log": (heads,), "dt_bias": (heads,)}
    else:
        keys |= {"o_norm.weight": (channels,)}
    if kind == "GatedDeltaNet":
        keys |= {"a_proj.weight": (heads, D), "A_log": (heads,), "dt_bias": (heads,), "D": (heads,)}
    return {f"ahn.fn.{name}": shape for name, shape in keys.items()} | attention_keys(c, side)


def attention_keys(c: dict, side: dict | None) -> dict:
    shared = D * c["num_key_value_heads"] // c["num_attention_heads"]
    keys = {f"{name}_proj.weight": (shared if name in "kv" else D, D) for name in "qkvo"}
    return keys if side else biased(keys, "q_proj", "k_proj", "v_proj")


KEYS = {"llamba": llamba_keys, "mamba2_in_llama": mamba2_keys, "mamba_in_llama": mamba_keys, "jet_nemotron": jet_keys, "ahn": ahn_keys}


def kind_of(case: str, index: int) -> tuple[str, str]:
    """What layer `index` is, and under which name its tensors lie."""
    layout, config, side = CASES[case]
    if layout == "ahn":
        return layout, "self_attn"
    if layout == "jet_nemotron":
        return {"jet": layout, "attn": "attention", "swa": "window"}[config["layer_types"][index]], "self_attn"
    if side is not None and index in side["attn_layers"]:
        return "attention", "self_attn"
    return layout, "mixer" if layout == "llamba" else "mamba"


def keys_of(case: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors of a model."""
    layout, c, side = CASES[case]
    keys = {}
    for i in range(L):
        kind, name = kind_of(case, i)
        mixer = attention_keys(c, side) if kind in ("attention", "window") else KEYS[kind](c, side)
        mlp = {"gate_proj.weight": (INNER, D), "up_proj.weight": (INNER, D), "down_proj.weight": (D, INNER)}
        if c.get("mlp_cfg", MLP)["bias"]:
            mlp = biased(mlp, "gate_proj", "up_proj", "down_proj")
        keys |= {f"layers.{i}.{'' if key.startswith('ahn.') else name + '.'}{key}": shape for key, shape in mixer.items()}
        keys |= {f"layers.{i}.mlp.{key}": shape for key, shape in mlp.items()}
        keys |= {f"layers.{i}.{part}_layernorm.weight": (D,) for part in ("input", "post_attention")}
    ends = {"embedding.weight": (VOCABULARY, D), "final_layernorm.weight": (D,)}
    if layout != "llamba":
        ends = {"embed_tokens.weight": (VOCABULARY, D), "norm.weight": (D,)}
    body = "backbone." if layout == "llamba" else "model."
    tied = c.get("tie_embeddings", c.get("tie_word_embeddings"))
    return {body + key: shape for key, shape in (keys | ends).items()} | ({} if tied else {"lm_head.weight": (VOCABULARY, D)})


@pytest.fixture
def checkpoint(tmp_path):
    """case -> config, the file beside it, tensors, the folder they lie in."""

    def make(case: str, changes: dict | None = None, beside: dict | None = None):
        _, config, side = CASES[case]
        config, tensors = config | (changes or {}), drawn(keys_of(case))
        tensors |= {name: torch.ones_like(tensor) for name, tensor in tensors.items() if name.endswith("ahn.fn.D")}
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        (tmp_path / "config.json").write_text(json.dumps(config))
        if side is not None:
            side = side | (beside or {})
            (tmp_path / BESIDE).write_text(json.dumps(side))
        return config, side, tensors, tmp_path

    return make


# -- what they compute -------------------------------------------------------------------------------------------------


def convolved(w: Weights, x: torch.Tensor, name: str = "conv1d") -> torch.Tensor:
    kernel = w[f"{name}.weight"]
    return F.conv1d(F.pad(x.mT, (kernel.shape[-1] - 1, 0)), kernel, w.get(f"{name}.bias"), groups=len(kernel)).mT


def llamba(w: Weights, x, c: dict, side: dict | None) -> torch.Tensor:
    """MOHAWK's discrete Mamba-2 (arXiv:2408.10189): the kernel's step is softplus(a), by which x was divided before."""
    ssm = c["ssm_cfg"]
    inner, heads, shared = D * ssm["expand"], ssm["n_v_heads"], ssm["n_qk_heads"] * ssm["d_state"]
    mixed, z, a = w.linear("in_proj", x).split([inner + 2 * shared, inner, heads], -1)
    mixed = convolved(w, mixed)
    mixed = F.silu(mixed) if ssm["activation"] == "silu" else mixed
    v, b, read = mixed.split([inner, shared, shared], -1)
    v, b, read = v.unflatten(-1, (heads, -1)), *(t.unflatten(-1, (ssm["n_qk_heads"], -1)) for t in (b, read))
    step, repeat = F.softplus(a)[..., None], heads // ssm["n_qk_heads"]
    b, read = (t.repeat_interleave(repeat, 2) for t in (b, read))
    y = recur(read * ssm["d_state"] ** 0.5, b, step * (v / step), (-step).exp()) + w["D"][:, None] * v
    bias = 0 if ssm["bias"] else w["z_bias"]
    return w.linear("out_proj", y.flatten(-2) * F.silu(z + bias))


def mamba2(w: Weights, x, c: dict, side: dict) -> torch.Tensor:
    ssm, inner, shared = side["ssm_cfg"], side["d_inner"], side["d_xb"]
    heads, states = ssm["ngroups"], ssm["d_state"]
    z, u, b, read, dt = w.linear("in_proj", x).split([inner, shared, shared, inner, heads], -1)

    def repeated(t: torch.Tensor) -> torch.Tensor:
        return t.unflatten(-1, (-1, states)).repeat_interleave(inner // shared, 2).flatten(-2)

    if ssm.get("repeat_kv_before_conv"):
        u, b, read = F.silu(convolved(w, torch.cat([repeated(u), repeated(b), read], -1))).split(inner, -1)
    else:
        u, b, read = F.silu(convolved(w, torch.cat([u, b, read], -1))).split([shared, shared, inner], -1)
        u, b = repeated(u), repeated(b)
    u, b, read = (t.unflatten(-1, (heads, -1)) for t in (u, b, read))
    step = F.softplus(dt + w["dt_bias"])
    y = recur(read * states**0.5, b, step[..., None] * u, (-step * w["A_log"].exp()).exp()[..., None]) + w["D"][:, None] * u
    y = rms(y * F.silu(z).unflatten(-1, (heads, -1))).flatten(-2) * w["norm.weight"]
    return w.linear("out_proj", y)


def mamba(w: Weights, x, c: dict, side: dict) -> torch.Tensor:
    """The bias of the step counts twice in their code."""
    ssm, shared, states = side["ssm_cfg"], side["d_xb"], side["ssm_cfg"]["d_state"]

    def repeated(t: torch.Tensor) -> torch.Tensor:
        return t.unflatten(-1, (-1, states)).repeat_interleave(D // shared, 2).flatten(-2)

    u = w.linear("in_proj_x", x)
    u = F.silu(convolved(w, repeated(u))) if ssm.get("repeat_kv_before_conv", True) else repeated(F.silu(convolved(w, u)))
    b, read = (t.unflatten(-1, (-1, states)).repeat_interleave(states, 2) for t in (repeated(w.linear("B_proj", x)), w.linear("C_proj", x)))
    step = F.softplus(w.linear("dt_proj", w.linear("dt_proj_down", x)) + w["dt_proj.bias"])
    hidden, out = torch.zeros_like(b[:, 0]), []
    for t in range(x.shape[1]):
        dt = step[:, t, :, None]
        hidden = (-dt * w["A_log"].exp()).exp() * hidden + dt * u[:, t, :, None] * b[:, t]
        out.append((hidden * read[:, t]).sum(-1) + w["D"] * u[:, t])
    return w.linear("out_proj", torch.stack(out, 1) * F.silu(w.linear("in_proj_z", x)))


def jet_nemotron(w: Weights, x, c: dict, side: dict | None) -> torch.Tensor:
    """Gated DeltaNet (arXiv:2412.06464, eq. 10) whose values are convolved by kernels made from each token."""
    jet = c["efficient_attention_config"]["jet"]
    heads, taps, v = jet["num_heads"], jet["conv_size"], w.linear("v_proj", x)
    q, k = (F.silu(z) for z in w.heads(x, heads, "q_proj", "k_proj"))
    q, k = (z * (z.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for z in (q, k))
    made = Weights(w.tensors, w.prefix + "dynamic_conv1d.kernel_generator.")
    kernels = made.linear("w2", F.silu(made.linear("w1", x))).unflatten(-1, (-1, taps))
    v = F.silu((F.pad(v, (0, 0, taps - 1, 0)).unfold(1, taps, 1) * kernels).sum(-1)).unflatten(-1, (heads, -1))
    decay = (-w["A_log"].exp() * F.softplus(w.linear("a_proj", x) + w["dt_bias"])).exp().unsqueeze(-1)
    o = rms(recur(q, k, v, decay, w.linear("b_proj", x).sigmoid()), w["o_norm.weight"])
    return w.linear("o_proj", o.flatten(-2) * F.silu(w.linear("g_proj", x)))


def window(w: Weights, x, c: dict, side: dict | None) -> torch.Tensor:
    return attention(w, x, c | {"sliding_window": c["efficient_attention_config"]["swa"]["window_size"]}, side)


def attention(w: Weights, x, c: dict, side: dict | None) -> torch.Tensor:
    said = {"num_heads": c["num_attention_heads"], "num_kv_heads": c["num_key_value_heads"], "rope_theta": c["rope_theta"]}
    window = c.get("sliding_window")
    return transformer(w, x, said | ({"window_size": window} if window else {}), 0)


def turned(w: Weights, x, c: dict) -> list[torch.Tensor]:
    """Queries, keys and values of all heads."""
    heads, groups = c["num_attention_heads"], c["num_key_value_heads"]
    (q,), (k, v) = w.heads(x, heads, "q_proj"), w.heads(x, groups, "k_proj", "v_proj")
    q, k = turn(q, c["rope_theta"]), turn(k, c["rope_theta"])
    return [q, *(t.repeat_interleave(heads // groups, 2) for t in (k, v))]


def ahn(w: Weights, x, c: dict, side: dict | None) -> torch.Tensor:
    """Token by token: softmax over sinks and window, and a memory that has been given what left the window (arXiv:2510.07318)."""
    fn, kind = Weights(w.tensors, w.prefix.replace("self_attn", "ahn.fn")), c["_ahn_implementation"]
    (q, k, v), width, sinks, heads = turned(w, x, c), c["sliding_window"], c.get("num_attn_sinks", 0), c["num_attention_heads"]
    q_unit, k_unit = (z * (z.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for z in (q, k))
    if kind == "Mamba2":
        q_unit, k_unit = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        step = F.softplus(fn.linear("dt_proj", x) + fn["dt_bias"])
        decay = (-step * fn["A_log"].exp()).exp()
    else:
        step, decay = fn.linear("b_proj", x).sigmoid(), torch.ones(*x.shape[:2], heads, dtype=x.dtype)
        if kind == "GatedDeltaNet":
            decay = (-fn["A_log"].exp() * F.softplus(fn.linear("a_proj", x) + fn["dt_bias"])).exp()
    memory, out = x.new_zeros(len(x), heads, q.shape[-1], q.shape[-1]), []
    for t in range(x.shape[1]):
        if (gone := t - width) >= sinks:
            memory = decay[:, gone, :, None, None] * memory
            held = 0 if kind == "Mamba2" else torch.einsum("bhk,bhkv->bhv", k_unit[:, gone], memory)
            memory = memory + torch.einsum("bhk,bhv->bhkv", k_unit[:, gone], step[:, gone, :, None] * (v[:, gone] - held))
        seen = [j for j in range(t + 1) if j < sinks or j > t - width]
        shares = (torch.einsum("bhk,bshk->bhs", q[:, t], k[:, seen]) * q.shape[-1] ** -0.5).softmax(-1)
        read = torch.einsum("bhk,bhkv->bhv", q_unit[:, t], memory) * (1 if kind == "Mamba2" else q.shape[-1] ** -0.5)
        gate = F.silu(fn.linear("g_proj", x[:, t]))[..., None]
        read = (
            rms((read * gate).flatten(-2), fn["norm.weight"]).view_as(read) if kind == "Mamba2" else rms(read, fn["o_norm.weight"]) * gate
        )
        out.append(torch.einsum("bhs,bshv->bhv", shares, v[:, seen]) + torch.einsum("bhi,hio->bho", read, fn["o_proj.weight"]))
    return w.linear("o_proj", torch.stack(out, 1).flatten(-2))


MIXERS = {
    "llamba": llamba, "mamba2_in_llama": mamba2, "mamba_in_llama": mamba, "jet_nemotron": jet_nemotron, "attention": attention,
    "window": window, "ahn": ahn,
}  # fmt: skip


def logits_of(case: str, c: dict, side: dict | None, tensors: dict, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The whole model."""
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    body, names = ("backbone.", ("embedding", "final_layernorm")) if "ssm_cfg" in c else ("model.", ("embed_tokens", "norm"))
    x = tensors[f"{body}{names[0]}.weight"][ids]
    for index in range(L):
        w = Weights(tensors, f"{body}layers.{index}.")
        kind, name = kind_of(case, index)
        x = x + MIXERS[kind](Weights(tensors, f"{body}layers.{index}.{name}."), rms(x, w["input_layernorm.weight"]), c, side)
        y = rms(x, w["post_attention_layernorm.weight"])
        x = x + w.linear("mlp.down_proj", F.silu(w.linear("mlp.gate_proj", y)) * w.linear("mlp.up_proj", y))
    head = tensors.get("lm_head.weight", tensors[f"{body}{names[0]}.weight"])
    return F.linear(rms(x, tensors[f"{body}{names[1]}.weight"]), head)


# -- tests -------------------------------------------------------------------------------------------------------------


@every_case
@torch.no_grad()
def test_logits_follow_the_published_formulas(checkpoint, case):
    config, side, tensors, folder = checkpoint(case)
    ids = torch.randint(0, VOCABULARY, (2, 19), generator=torch.Generator().manual_seed(1))
    plain, exact = (logits_of(case, config, side, tensors, ids, dtype) for dtype in (torch.float32, torch.float64))
    assert_close(zoo.from_pretrained(folder)(ids).logits, plain, exact, "logits")


@every_case
def test_written_back_it_is_what_it_was(checkpoint, case, tmp_path):
    config, side, tensors, folder = checkpoint(case)
    ours, report = zoo.from_pretrained(folder, output_loading_info=True)
    assert not report.fresh and not report.dropped
    assert set(report.taken) | {name for names in report.transformed.values() for name in names} == set(tensors)
    unknown = {} if case.startswith("llamba") else {"max_position_embeddings": 128}  # to us, who need no table
    ours.save_pretrained(tmp_path / "back", layout=CASES[case][0], **unknown)
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == tensors.keys() and all(torch.equal(back[name], tensor) for name, tensor in tensors.items())
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    if case.startswith("llamba"):  # their config knows no more than this
        config = {name: config[name] for name in ("mlp_cfg", "ssm_cfg", "tie_embeddings", *LLAMBA)}
        written["ssm_cfg"] = {name: written["ssm_cfg"][name] for name in config["ssm_cfg"]}
    elif case.startswith("ahn"):
        config = {name: value for name, value in config.items() if name not in ("loss_type", "use_normalized_l2")}
    elif case.startswith("jet_nemotron"):
        config = config | {"efficient_attention_config": {"jet": config["efficient_attention_config"]["jet"] | {"norm_eps": 1e-5}}}
        written["efficient_attention_config"] = {"jet": written["efficient_attention_config"]["jet"]}
    else:
        written["rope_theta"] = written["rope_parameters"]["rope_theta"]
    assert {name: written.get(name) for name in config} == config
    if side is not None:
        assert json.loads((tmp_path / "back" / BESIDE).read_text()) == {"d_inner": D} | side
    again = zoo.from_pretrained(tmp_path / "back")
    assert again.config.to_dict() | {"_name_or_path": ""} == ours.config.to_dict() | {"_name_or_path": ""}


@pytest.mark.parametrize(
    "case, changes, beside, message",
    [
        ("llamba", {"lm_head_bias": True}, None, "llamba with lm_head_bias=True"),
        ("llamba", {"norm_epsilon": 1e-6}, None, "llamba with norm_epsilon=1e-06"),
        ("llamba", {"ssm_cfg": {"n_qk_heads": 4, "activation": "gelu"}}, None, "llamba with activation='gelu'"),
        ("llamba", {"ssm_cfg": {"n_qk_heads": 4, "rmsnorm": True}}, None, "rmsnorm"),
        ("mamba2_in_llama", {"attention_bias": True}, None, "attention_bias=True"),
        ("mamba2_in_llama", {"rms_norm_eps": 1e-6}, {"rms_norm_eps": 1e-6}, "rms_norm_eps=1e-06"),
        ("mamba2_in_llama", {}, {"n_layer": 4}, "n_layer=4, config.json num_hidden_layers=3"),
        ("mamba2_in_llama", {}, {"ssm_cfg": {"ngroups": 4, "d_state": 8, "rmsnorm": False}}, "rmsnorm=False"),
        ("mamba2_in_llama", {}, {"ssm_cfg": {"ngroups": 4, "d_state": 8, "wild": 1}}, "wild"),
        ("mamba2_in_llama", {}, {"ssm_cfg": {"ngroups": 3, "d_state": 8}}, "d_inner=32 must be ngroups=3 times d_state=8"),
        ("jet_nemotron", {"layer_types": ["swa", "jet", "mamba"]}, None, "mamba"),
        ("jet_nemotron", {"efficient_attention_config": {"jet": JET | {"wild": 1}}}, None, "wild"),
        ("jet_nemotron", {"efficient_attention_config": {"jet": JET | {"expand_v": 2.1}}}, None, "expand_v=2.1"),
        ("ahn-gated", {"use_q_proj": True}, None, "use_q_proj=True"),
        ("ahn-gated", {"use_ahn_router": True}, None, "use_ahn_router=True"),
        ("ahn-gated", {"_ahn_implementation": "GLA"}, None, "_ahn_implementation='GLA'"),
        ("ahn-gated", {"sliding_window": None}, None, "no sliding_window"),
        ("jet_nemotron", {"hidden_act": "gelu"}, None, "hidden_act='gelu'"),
        ("mamba_in_llama", {}, {"ssm_cfg": {"d_state": 4, "proj_x_bias": True}}, "proj_x_bias=True"),
    ],
)  # fmt: skip
def test_what_we_cannot_express_is_refused(checkpoint, case, changes, beside, message):
    *_, folder = checkpoint(case, changes, beside)
    with pytest.raises(ValueError, match=message):
        zoo.from_pretrained(folder)


def test_what_was_trained_beside_a_base_model_finds_its_place(checkpoint, tmp_path):
    config, _, tensors, folder = checkpoint("ahn-gated", {"fa_layer_ids": "0"})
    whole, report = zoo.from_pretrained(folder, output_loading_info=True)
    assert report.dropped.keys() == {name for name in tensors if name.startswith("model.layers.0.ahn.")}
    trained = {name: tensor for name, tensor in tensors.items() if ".ahn." in name}
    base, part = tmp_path / "base", tmp_path / "part"
    for place, said, content in ((base, LLAMA | {"model_type": "qwen2"}, tensors), (part, config, trained)):
        place.mkdir()
        held = {name: tensor for name, tensor in content.items() if place == part or ".ahn." not in name}
        save_file(held, place / "model.safetensors", metadata={"format": "pt"})
        (place / "config.json").write_text(json.dumps(said))
    joined = zoo.from_pretrained(part, base=base)
    assert all(torch.equal(tensor, whole.state_dict()[name]) for name, tensor in joined.state_dict().items())
    joined.save_pretrained(tmp_path / "back", layout="ahn", delta=True)
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == trained.keys() - report.dropped.keys() and all(torch.equal(back[name], trained[name]) for name in back)
    with pytest.raises(ValueError, match="'ahn' checkpoint holds only what was added to a base model; name that model's with base="):
        zoo.from_pretrained(part)
    with pytest.raises(ValueError, match="checkpoints of the layout 'qwen2' are whole; leave base= out"):
        zoo.from_pretrained(base, base=base)
    with pytest.raises(ValueError, match="'llamba' cannot tell what was trained from its base model"):
        zoo.from_config("llamba-tiny").save_pretrained(tmp_path / "out", layout="llamba", delta=True)


VARIANTS = {  # what the smallest presets leave out
    "ahn-delta": ("ahn-tiny", {"memory": "delta_net"}),
    "ahn-mamba2": ("ahn-tiny", {"memory": "mamba2", "full_layers": [1], "sinks": 0}),
    "llamba": ("llamba-tiny", {"bias": True, "conv_activation": "silu", "conv_bias": False}),
    "mamba2_in_llama": ("mamba2_in_llama-tiny", {"repeat_first": True, "bias": True}),
    "mamba_in_llama": ("mamba_in_llama-tiny", {"repeat_first": False, "step_rank": 3}),
}


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_pieces_of_any_length_give_the_whole(variant):
    name, fields = VARIANTS[variant]
    torch.manual_seed(0)
    model = zoo.from_config(name, **fields).eval()
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    ids = torch.randint(3, 256, (2, 40), generator=torch.Generator().manual_seed(1))
    with use_backend("reference"):
        plain, exact = model(ids).logits, copy.deepcopy(model).double()(ids).logits
    out, seen, cache = [], 0, None
    for length in (3, 1, 1, 9, 1, 20, 1, 4):
        step = model(ids[:, seen : seen + length], past_key_values=cache, use_cache=True)
        out, seen, cache = [*out, step.logits], seen + length, step.past_key_values
    assert_close(torch.cat(out, 1), plain, exact, "logits")
