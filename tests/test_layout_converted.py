"""Checkpoints of converted transformers: the documented keys kept bit by bit, and the whole model against its published formulas.

Their libraries compute on GPUs only, so what they define is written down here once more, reading their tensors by their names.
"""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

import zoo
from zoo.evaluate.closeness import assert_close

D, L, H, G, VOCABULARY = 32, 3, 4, 2, 61
K, INNER = D // H, 40
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": D, "num_hidden_layers": L, "num_attention_heads": H, "num_key_value_heads": G,
    "intermediate_size": INNER, "rms_norm_eps": 1e-6, "hidden_act": "silu", "pad_token_id": None, "bos_token_id": 1,
    "eos_token_id": 2, "rope_theta": 1000.0,
}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
RANKS6 = {"lora_rank_tokenshift": 3, "lora_rank_decay": 5, "lora_rank_gate": 6}
RANKS7 = {"lora_rank_decay": 5, "lora_rank_iclr": 4, "lora_rank_value_residual_mix": 3, "lora_rank_gate": 6}
NEW = {
    "attention_bias": True, "attention_output_bias": False, "use_rope": True, "gate_rank_type": 1, "balance_state": True,
    "groupnorm_att": False,
}  # fmt: skip
NATIVE = {"head_size": 8, "head_size_divisor": 8, "wkv_version": 7}
CASES = {
    "liger_gla": ("liger_gla", {"rope_scaling": LLAMA3, "pool_size": 8}),
    "liger_gla-wide": ("liger_gla", {"head_dim": 12, "tie_word_embeddings": True}),
    "liger_hgrn2": ("liger_hgrn2", {}),
    "liger_gsa": ("liger_gsa", {"pool_size": 4}),
    "liger_mistral_gla": ("liger_mistral_gla", {"sliding_window": 16}),
    "liger_qwen2_gla": ("liger_qwen2_gla", {}),
    "liger_qwen3_gla": ("liger_qwen3_gla", {"num_key_value_heads": 4, "head_dim": 8}),
    "qrwkv6": ("rwkv6qwen2", NEW | RANKS6 | {"use_tokenshift": True}),
    "qrwkv6-first": ("rwkv6qwen2", {"attention_bias": True}),
    "qrwkv6-low": ("rwkv6qwen2", NEW | RANKS6 | {"use_tokenshift": False, "gate_rank_type": 2, "groupnorm_att": True, "use_rope": False}),
    "qrwkv6-plain": ("rwkv6qwen2", NEW | RANKS6 | {"use_tokenshift": True, "gate_rank_type": 0, "balance_state": False}),
    "qrwkv7": ("rwkv7qwen2", NEW | RANKS7 | {"gate_rank_type": 2}),
    "qrwkv7-first": ("rwkv7qwen2", RANKS7 | {"attention_bias": True, "attention_output_bias": False}),
    "qrwkv7-full": ("rwkv7qwen2", NEW | RANKS7 | {"balance_state": False, "groupnorm_att": True, "tie_word_embeddings": True}),
    "arwkv": ("rwkv_hybrid", NATIVE | {"wkv_has_gate": False, "wkv_has_group_norm": False}),
    "arwkv-gated": ("rwkv_hybrid", NATIVE | {"wkv_has_gate": True, "wkv_has_group_norm": True, "head_size": 16}),
}  # fmt: skip
CASES |= {"lolcats": ("lolcats", {"feature_map": "lolcats_hedgehog", "rope_scaling": LLAMA3})}
CLASSES = {
    "lolcats": "LolcatsModel", "liger_gla": "LigerGLA", "liger_gsa": "LigerGSA", "liger_hgrn2": "LigerHGRN2",
    "liger_mistral_gla": "LigerMistralGLA", "liger_qwen2_gla": "LigerQwen2GLA", "liger_qwen3_gla": "LigerQwen3GLA",
    "rwkv6qwen2": "RWKV6Qwen2", "rwkv7qwen2": "RWKV7Qwen2", "rwkv_hybrid": "RwkvHybrid",
}  # fmt: skip
UNSAID = {"rwkv_hybrid": ("num_attention_heads", "num_key_value_heads")}  # the teacher's heads, of which nothing is left
every_case = pytest.mark.parametrize("case", CASES)


def config_of(case: str) -> dict:
    """A config as the library writes it."""
    kind, fields = CASES[case]
    return {"model_type": kind, "architectures": [CLASSES[kind] + "ForCausalLM"]} | SIZES | fields


# -- the documented keys -----------------------------------------------------------------------------------------------


def projections(c: dict, biased: bool) -> dict:
    width, groups = H * (c.get("head_dim") or K), c["num_key_value_heads"] * (c.get("head_dim") or K)
    shapes = {"q_proj.weight": (width, D), "k_proj.weight": (groups, D), "v_proj.weight": (groups, D), "o_proj.weight": (D, width)}
    return shapes | ({"q_proj.bias": (width,), "k_proj.bias": (groups,), "v_proj.bias": (groups,)} if biased else {})


def liger_keys(c: dict) -> dict:
    return projections(c, "qwen" in c["model_type"])


def gate_keys(c: dict, kind: int) -> dict:
    rank = c.get("lora_rank_gate")
    return {0: {}, 1: {"gate.weight": (D, D)}, 2: {"g1": (D, rank), "g2": (rank, D)}}[kind]


def norm_keys(present: bool) -> dict:
    return {"ln_x.weight": (D,), "ln_x.bias": (D,)} if present else {}


def qrwkv6_keys(c: dict) -> dict:
    mixes, decays = c.get("lora_rank_tokenshift", 32), c.get("lora_rank_decay", 64)
    shapes = projections(c, True) | gate_keys(c, c.get("gate_rank_type", 1)) | norm_keys(c.get("groupnorm_att", False))
    shapes |= {"time_decay": (1, 1, D), "time_decay_w1": (D, decays), "time_decay_w2": (decays, D)}
    if not c.get("use_tokenshift", True):
        return shapes
    shapes |= {f"time_maa_{name}": (1, 1, D) for name in "xrkvwg"}
    return shapes | {"time_maa_w1": (D, 5 * mixes), "time_maa_w2": (5, mixes, D)}


def rwkv7_keys(ranks: dict, heads: int) -> dict:
    """The tensors of RWKV-7 that all of these have; those of token shift and gate excepted."""
    shapes = {"k_k": (1, 1, D), "k_a": (1, 1, D), "r_k": (heads, D // heads)}
    for name, rank in ranks.items():
        shapes |= {f"{name}0": (1, 1, D), f"{name}1": (D, rank), f"{name}2": (rank, D)}
    return shapes


def qrwkv7_keys(c: dict) -> dict:
    ranks = {"w": c["lora_rank_decay"], "a": c["lora_rank_iclr"], "v": c["lora_rank_value_residual_mix"]}
    first = "gate_rank_type" not in c
    shapes = projections(c, True) | rwkv7_keys(ranks, H) | gate_keys(c, c.get("gate_rank_type", 2))
    return shapes | norm_keys(c.get("groupnorm_att", True)) | ({f"x_{name}": (1, 1, D) for name in "rwkvag"} if first else {})


def arwkv_keys(c: dict) -> dict:
    shapes = rwkv7_keys({"w": 64, "a": 64, "v": 32}, D // c["head_size"]) | norm_keys(c["wkv_has_group_norm"])
    shapes |= {f"{name}.weight": (D, D) for name in ("receptance", "key", "value", "output")}
    shapes |= {f"x_{name}": (1, 1, D) for name in "rwkvag"} | ({"g1": (D, 128), "g2": (128, D)} if c["wkv_has_gate"] else {})
    return {f"time_mixer.{name}": shape for name, shape in shapes.items()}


def lolcats_keys(c: dict) -> dict:
    maps = {f"feature_map_{s}.mlp.linears.{head}.weight": (128, K) for s in "qk" for head in range(H)}
    return projections(c, False) | maps | {"window_factors": (1, H, 1, 1)}


def keys_of(c: dict) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors of a model."""
    block = {"input_layernorm.weight": (D,), "post_attention_layernorm.weight": (D,), "mlp.down_proj.weight": (D, INNER)}
    block |= {"mlp.gate_proj.weight": (INNER, D), "mlp.up_proj.weight": (INNER, D)}
    block |= {f"self_attn.{name}": shape for name, shape in MIXERS[c["model_type"]][0](c).items()}
    keys = {f"model.layers.{i}.{name}": shape for i in range(L) for name, shape in block.items()}
    keys |= {"model.embed_tokens.weight": (VOCABULARY, D), "model.norm.weight": (D,)}
    return keys if c.get("tie_word_embeddings") else keys | {"lm_head.weight": (VOCABULARY, D)}


def unused(c: dict) -> set[str]:
    """What a checkpoint has and its model does not look at."""
    names = {f"0.self_attn.v{i}" for i in range(3)} if c["model_type"] == "rwkv7qwen2" else set()
    if c["model_type"] == "rwkv_hybrid":
        names = {f"0.self_attn.time_mixer.v{i}" for i in range(3)}
        names |= set() if c["wkv_has_gate"] else {f"{i}.self_attn.time_mixer.x_g" for i in range(L)}
    elif c["model_type"] == "rwkv7qwen2" and "gate_rank_type" in c:
        names |= {f"{i}.self_attn.{name}" for i in range(L) for name in (("k_k", "k_a", "r_k") if c["balance_state"] else ("r_k",))}
    return {"model.layers." + name for name in names}


def drawn(shapes: dict) -> dict[str, torch.Tensor]:
    """Tensors of these shapes, none of them at a special value."""
    made, generator = {}, torch.Generator().manual_seed(0)
    for name, shape in shapes.items():
        x = torch.randn(shape, generator=generator)
        made[name] = (
            1 + 0.2 * x if ("norm" in name or "ln_x" in name) and name.endswith("weight") else x * (0.2 if len(shape) == 2 else 0.5)
        )
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

    def __contains__(self, name: str) -> bool:
        return self.prefix + name in self.tensors

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self[name + ".weight"], self.tensors.get(f"{self.prefix}{name}.bias"))

    def low(self, name: str, x: torch.Tensor, activation) -> torch.Tensor:
        return activation(x @ self[name + "1"]) @ self[name + "2"]

    def qkv(self, xq, xk, xv, c: dict) -> list[torch.Tensor]:
        parts = zip(("q_proj", "k_proj", "v_proj"), (xq, xk, xv), (H, c["num_key_value_heads"], c["num_key_value_heads"]), strict=True)
        return [self.linear(name, x).unflatten(-1, (heads, -1)) for name, x, heads in parts]


def rms(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight


def turn(x: torch.Tensor, c: dict) -> torch.Tensor:
    """Rotary positions; the angles are float32 whatever the dtype."""
    half, s = x.shape[-1] // 2, c.get("rope_scaling")
    frequency = c["rope_theta"] ** (-torch.arange(half).float() / half)
    if s:
        turns = s["original_max_position_embeddings"] * frequency / (2 * math.pi)
        keep = ((turns - s["low_freq_factor"]) / (s["high_freq_factor"] - s["low_freq_factor"])).clamp(0, 1)
        frequency = keep * frequency + (1 - keep) * frequency / s["factor"]
    angle = torch.outer(torch.arange(x.shape[1]).float(), frequency)[:, None]
    (real, imaginary), cos, sin = x.split(half, -1), angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    return torch.cat([real * cos - imaginary * sin, imaginary * cos + real * sin], -1)


def recur(q, k, v, decay, erase=None, write=None) -> torch.Tensor:
    """`S_t = decay S_{t-1} (+ write (erase S_{t-1})) + k v`, read by q; all `[B, T, H, K]`."""
    memory, out = q.new_zeros(q.shape[0], q.shape[2], q.shape[-1], v.shape[-1]), []
    for t in range(q.shape[1]):
        update = torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
        if erase is not None:
            update = update + torch.einsum("bhk,bhv->bhkv", write[:, t], torch.einsum("bhk,bhkv->bhv", erase[:, t], memory))
        memory = memory * decay[:, t, :, :, None] + update
        out.append(torch.einsum("bhk,bhkv->bhv", q[:, t], memory))
    return torch.stack(out, 1)


def before(x: torch.Tensor) -> torch.Tensor:
    return F.pad(x, (0, 0, 1, -1))


def slots(q, k, v, keep) -> torch.Tensor:
    """Softmax attention to slots, of whose keys and values `keep` `[B, T, H, M]` stays and the rest is replaced by the token's."""
    keys, values, out = 0, 0, []
    for t in range(q.shape[1]):
        kept = keep[:, t, :, :, None]
        keys, values = kept * keys + (1 - kept) * k[:, t, :, None], kept * values + (1 - kept) * v[:, t, :, None]
        out.append(torch.einsum("bhm,bhmv->bhv", torch.einsum("bhk,bhmk->bhm", q[:, t], keys).softmax(-1), values))
    return torch.stack(out, 1)


def liger(w: Weights, x, c: dict, first) -> torch.Tensor:
    q, k, v = w.qkv(x, x, x, c)
    k, v = (z.repeat_interleave(H // c["num_key_value_heads"], 2) for z in (k, v))
    gate = torch.sigmoid(k)
    if c["model_type"] == "liger_gsa":
        remembered = slots(q, k, v, torch.sigmoid(k.unflatten(-1, (c["pool_size"], -1)).mean(-1)) ** (1 / 16))
    else:
        written, decay = (1 - gate, gate) if c["model_type"] == "liger_hgrn2" else (k.softmax(-1), gate ** (1 / 16))
        remembered = recur(q.softmax(-1), written, v, decay)
    age = torch.arange(x.shape[1])[:, None] - torch.arange(x.shape[1])
    scores = torch.einsum("bthk,bshk->bhts", turn(q, c), turn(k, c)) * q.shape[-1] ** -0.5
    window = torch.einsum("bhts,bshv->bthv", scores.masked_fill((age < 0) | (age > 64), -math.inf).softmax(-1), v)
    return w.linear("o_proj", (window / 2 + remembered / 2).flatten(-2)), first


def closed(w: Weights, y, xg, eps: float, heads: int = H) -> torch.Tensor:
    """Norm over each head, where there is one; the gate is applied by the caller."""
    if "ln_x.weight" in w:
        y = F.group_norm(y.flatten(0, 1).flatten(1), heads, w["ln_x.weight"], w["ln_x.bias"], eps).view(*y.shape[:2], -1)
    return y if y.ndim == 3 else y.flatten(-2)


def gated(w: Weights, y, xg) -> torch.Tensor:
    if "gate.weight" in w:
        return y * torch.sigmoid(w.linear("gate", xg))
    return y * w.low("g", xg, torch.sigmoid) if "g1" in w else y


def qrwkv6(w: Weights, x, c: dict, first) -> torch.Tensor:
    xr = xk = xv = xw = xg = x
    if "time_maa_x" in w:
        back = before(x) - x
        low = torch.tanh((x + back * w["time_maa_x"]) @ w["time_maa_w1"]).unflatten(-1, (5, -1))
        mixes = torch.einsum("btnr,nrd->nbtd", low, w["time_maa_w2"])
        xr, xk, xv, xw, xg = (x + back * (w[f"time_maa_{name}"] + mix) for name, mix in zip("rkvwg", mixes, strict=True))
    r, k, v = w.qkv(xr, xk, xv, c)
    if c.get("use_rope"):
        r, k = turn(r, c), turn(k, c)
    k, v = (z.repeat_interleave(H // G, 2) for z in (k, v))
    logarithm = -(w["time_decay"] + w.low("time_decay_w", xw, torch.tanh)).exp()
    decay = logarithm.clamp(min=-5).exp().unflatten(-1, (H, K))
    if c.get("balance_state", True):
        k = k * (1 - decay)
    y = closed(w, recur(r, k, v, decay) * K**-0.5, xg, K * 1e-5)
    return w.linear("o_proj", gated(w, y, xg)), first


def rwkv7(w: Weights, x, c: dict, first, names: list[str], heads: int, balance: bool, eps: float, project) -> torch.Tensor:
    """RWKV-7's recurrence with receptances, keys and values from `project`."""
    native = "x_r" in w
    xr, xw, xk, xv, xa, xg = (x + (before(x) - x) * w[f"x_{name}"] if native else x for name in "rwkvag")
    r, k, v = project(xr, xk, xv)
    decay = (-math.exp(-0.5) * torch.sigmoid(w["w0"] + w.low("w", xw, torch.tanh))).exp().unflatten(-1, (heads, -1))
    a = torch.sigmoid(w["a0"] + w.low("a", xa, lambda z: z)).unflatten(-1, (heads, -1))
    first = v if first is None else first
    if first is not v:
        v = v + (first - v) * torch.sigmoid(w["v0"] + w.low("v", xv, lambda z: z)).unflatten(-1, (heads, -1))
    removed, k_a = k if balance else k * w["k_k"].view(heads, -1), w["k_a"].view(heads, -1)
    removed = F.normalize(removed, dim=-1)
    k = k * (1 - decay + a) if balance else k * (1 + (a - 1) * k_a)
    y = recur(r, k, v, decay, removed, -removed * a)
    y = closed(w, y if native or "ln_x.weight" in w else y * K**-0.5, xg, eps, heads)
    if native:
        y = y + ((r * k * w["r_k"]).sum(-1, keepdim=True) * v).flatten(-2)
    return w.linear(names[-1], gated(w, y, xg)), first


def qrwkv7(w: Weights, x, c: dict, first) -> torch.Tensor:
    def project(xr, xk, xv):
        r, k, v = w.qkv(xr, xk, xv, c)
        if c.get("use_rope"):
            r, k = turn(r, c), turn(k, c)
        return r, k.repeat_interleave(H // G, 2), v.repeat_interleave(H // G, 2)

    return rwkv7(w, x, c, first, ["o_proj"], H, c.get("balance_state", False), K * 1e-5, project)


def arwkv(w: Weights, x, c: dict, first) -> torch.Tensor:
    w, heads = Weights(w.tensors, w.prefix + "time_mixer."), D // c["head_size"]

    def project(*mixed):
        return [w.linear(name, z).unflatten(-1, (heads, -1)) for name, z in zip(("receptance", "key", "value"), mixed, strict=True)]

    return rwkv7(w, x, c, first, ["output"], heads, False, 64e-5, project)


def share(w: Weights, x, c: dict, features, terraced: bool, eps: float) -> torch.Tensor:
    """LoLCATs: softmax over a window of 64 and linear attention before it, divided by the sum of both."""
    q, k, v = w.qkv(x, x, x, c)
    q, k, v = turn(q, c), turn(k, c).repeat_interleave(H // G, 2), v.repeat_interleave(H // G, 2)
    t = torch.arange(x.shape[1])[:, None]
    j, start = t.T, (t // 64 - 1) * 64 if terraced else t - 63
    scores = torch.einsum("bthk,bshk->bhts", q, k) * q.shape[-1] ** -0.5
    scores = scores.masked_fill((j > t) | (j < start), -math.inf)
    exact = torch.sigmoid(w["window_factors"]) * (scores - scores.amax(-1, keepdim=True)).exp()
    maps = [torch.cat([y.softmax(-1), (-y).softmax(-1)], -1) for y in (features("q", q), features("k", k))]
    weights = exact + torch.einsum("bthf,bshf->bhts", *maps) * (j < start)
    return w.linear("o_proj", torch.einsum("bhts,bshv->bthv", weights / (weights.sum(-1, keepdim=True) + eps), v).flatten(-2))


def lolcats(w: Weights, x, c: dict, first) -> torch.Tensor:
    def features(name: str, z):
        return torch.stack([w.linear(f"feature_map_{name}.mlp.linears.{head}", z[:, :, head]) for head in range(H)], 2)

    return share(w, x, c, features, False, 1e-6), first


def lolcats_added(w: Weights, x, c: dict, first) -> torch.Tensor:
    def features(name: str, z):
        return torch.einsum("bthk,hkf->bthf", z, w[f"feature_map_{name}.mlp.layer"])

    return share(w, x, c, features, True, 0.0), first


MIXERS = {
    "lolcats": (lolcats_keys, lolcats), "llama": (lambda c: projections(c, False), lolcats_added),
    "liger_gla": (liger_keys, liger), "liger_gsa": (liger_keys, liger), "liger_hgrn2": (liger_keys, liger),
    "liger_mistral_gla": (liger_keys, liger), "liger_qwen2_gla": (liger_keys, liger), "liger_qwen3_gla": (liger_keys, liger),
    "rwkv6qwen2": (qrwkv6_keys, qrwkv6),
    "rwkv7qwen2": (qrwkv7_keys, qrwkv7), "rwkv_hybrid": (arwkv_keys, arwkv),
}  # fmt: skip


def logits_of(c: dict, tensors: dict, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The whole model."""
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    x, first = tensors["model.embed_tokens.weight"][ids], None
    for index in range(L):
        w = Weights(tensors, f"model.layers.{index}.")
        y, first = MIXERS[c["model_type"]][1](Weights(tensors, f"{w.prefix}self_attn."), rms(x, w["input_layernorm.weight"]), c, first)
        x = x + y
        y = rms(x, w["post_attention_layernorm.weight"])
        x = x + w.linear("mlp.down_proj", F.silu(w.linear("mlp.gate_proj", y)) * w.linear("mlp.up_proj", y))
    head = "model.embed_tokens.weight" if c.get("tie_word_embeddings") else "lm_head.weight"
    return F.linear(rms(x, tensors["model.norm.weight"]), tensors[head])


# -- tests -------------------------------------------------------------------------------------------------------------


@every_case
@torch.no_grad()
def test_logits_follow_the_published_formulas(checkpoint, case):
    config, tensors, folder = checkpoint(case)
    ids = torch.randint(0, VOCABULARY, (2, 90), generator=torch.Generator().manual_seed(1))
    plain, exact = (logits_of(config, tensors, ids, dtype) for dtype in (torch.float32, torch.float64))
    assert_close(zoo.from_pretrained(folder)(ids).logits, plain, exact, "logits")


@every_case
def test_written_back_it_is_what_it_was(checkpoint, case, tmp_path):
    config, tensors, folder = checkpoint(case)
    ours, report = zoo.from_pretrained(folder, output_loading_info=True)
    assert not report.fresh and set(report.dropped) == unused(config)
    used = set(report.taken) | {name for names in report.transformed.values() for name in names}
    assert used == set(tensors) - unused(config)
    ours.save_pretrained(tmp_path / "back", layout=config["model_type"])
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == used and all(torch.equal(back[name], tensors[name]) for name in used)
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    said = {name: value for name, value in config.items() if name not in UNSAID.get(config["model_type"], ())}
    assert {name: written.get(name, value) for name, value in said.items()} == said
    again = zoo.from_pretrained(tmp_path / "back")
    assert again.config.to_dict() | {"_name_or_path": ""} == ours.config.to_dict() | {"_name_or_path": ""}


# -- beside a base model -----------------------------------------------------------------------------------------------


def added_tensors() -> tuple[dict, dict]:
    """What LoLCATs trains first, feature maps of 3 columns, and what it trains then, adapters of rank 2."""
    attention = [f"model.layers.{i}.self_attn." for i in range(L)]
    maps = {f"{where}feature_map_{s}.mlp.layer": (H, K, 3) for where in attention for s in "qk"}
    maps |= {f"{where}window_factors": (1, H, 1, 1) for where in attention}
    sizes = {"q": (D, D), "k": (G * K, D), "v": (G * K, D), "o": (D, D)}
    adapters = {f"base_model.model.{where}{s}_proj.lora_A.default.weight": (2, n) for where in attention for s, (_, n) in sizes.items()}
    adapters |= {f"base_model.model.{where}{s}_proj.lora_B.default.weight": (n, 2) for where in attention for s, (n, _) in sizes.items()}
    return drawn(maps), drawn(adapters)


@pytest.fixture
def pieces(tmp_path):
    """A Llama, what was trained beside it in two steps, and the folders of the three."""
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]} | SIZES
    tensors, (maps, adapters) = drawn(keys_of(config)), added_tensors()
    for name in ("base", "maps", "adapters"):
        (tmp_path / name).mkdir()
    save_file(tensors, tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    torch.save({"model_state_dict": maps}, tmp_path / "maps" / "model.pt")
    torch.save(adapters, tmp_path / "adapters" / "model.pt")
    return config, tensors, maps, adapters, tmp_path


@torch.no_grad()
def test_what_was_added_to_a_base_model_is_joined_to_it(pieces):
    config, tensors, maps, adapters, folder = pieces
    ids = torch.randint(0, VOCABULARY, (2, 200), generator=torch.Generator().manual_seed(1))
    ours, report = zoo.from_pretrained(folder / "maps", base=folder / "base", output_loading_info=True)
    assert not report.fresh and not report.dropped and ours.config.feature_dim == 3
    plain, exact = (logits_of(config, tensors | maps, ids, dtype) for dtype in (torch.float32, torch.float64))
    assert_close(ours(ids).logits, plain, exact, "logits")
    ours = zoo.from_pretrained(folder / "adapters", base=[folder / "base", folder / "maps"])
    for name in list(tensors):
        if (first := f"base_model.model.{name.removesuffix('weight')}lora_A.default.weight") in adapters:
            tensors[name] = tensors[name] + 16 / 2 * adapters[first.replace("lora_A", "lora_B")] @ adapters[first]
    plain, exact = (logits_of(config, tensors | maps, ids, dtype) for dtype in (torch.float32, torch.float64))
    assert_close(ours(ids).logits, plain, exact, "logits with adapters")


def test_written_whole_it_needs_no_base(pieces, tmp_path):
    _, tensors, maps, _, folder = pieces
    ours = zoo.from_pretrained(folder / "maps", base=folder / "base")
    ours.save_pretrained(tmp_path / "back", layout="lolcats-added")
    back = torch.load(tmp_path / "back" / "model.pt", weights_only=True)
    assert back.keys() == (tensors | maps).keys() and all(torch.equal(back[name], x) for name, x in (tensors | maps).items())
    again = zoo.from_pretrained(tmp_path / "back")
    assert all(torch.equal(x, again.state_dict()[name]) for name, x in ours.state_dict().items())
    with pytest.raises(ValueError, match="cannot tell what was trained from its base model"):
        ours.save_pretrained(tmp_path / "delta", layout="lolcats-added", delta=True)


def test_what_was_added_needs_its_base(pieces):
    _, _, _, _, folder = pieces
    with pytest.raises(ValueError, match=r"has no config.json; .* name that model with base="):
        zoo.from_pretrained(folder / "maps")
    with pytest.raises(ValueError, match=r"checkpoints of the layout .llama. are whole"):
        zoo.from_pretrained(folder / "adapters", base=folder / "base")


@pytest.mark.parametrize(
    "case, changes, message",
    [
        ("liger_gla", {"hidden_act": "gelu"}, "liger_gla with hidden_act='gelu' is not supported"),
        ("liger_qwen3_gla", {"head_dim": 16}, "liger_qwen3_gla with head_dim=16"),
        ("qrwkv6", {"num_attention_layers": 1}, "rwkv6qwen2 with num_attention_layers=1"),
        ("qrwkv6", {"attention_output_bias": True}, "attention_output_bias=True"),
        ("qrwkv6", {"gate_rank_type": 3}, "gate_rank_type=3"),
        ("qrwkv7", {"rope_scaling": LLAMA3}, "rwkv7qwen2 with rope_scaling"),
        ("arwkv", {"wkv_version": 6}, "rwkv_hybrid with wkv_version=6"),
        ("arwkv", {"wkv_layers": [0, 2]}, r"wkv_layers=\[0, 2\]"),
        ("lolcats", {"feature_map": "t2r"}, "lolcats with feature_map='t2r'"),
        ("liger_gla", {"model_type": "liger_rwkv"}, "no layout for checkpoints of model_type 'liger_rwkv'"),
        ("liger_gsa", {"pool_size": 5}, "liger_gsa with pool_size=5"),
    ],
)
def test_what_we_cannot_express_is_refused(checkpoint, case, changes, message):
    _, _, folder = checkpoint(case, **changes)
    with pytest.raises(ValueError, match=message):
        zoo.from_pretrained(folder)


@pytest.mark.parametrize(
    "name, fields, layout, message",
    [
        ("liger", {"window": 64}, "liger_gla", "window=64"),
        ("liger", {"window": 65, "memory": "hgrn2"}, "liger_gla", "memory='hgrn2'"),
        ("qrwkv6", {"head_norm_eps": 1e-3}, "rwkv6qwen2", "head_norm_eps=0.001"),
        ("lolcats", {}, "lolcats", "window=8"),
        ("lolcats", {"window": 64, "terraced": False}, "lolcats-added", "terraced=False"),
        ("qrwkv7", {}, "rwkv_hybrid", "balance=True"),
        ("qrwkv7", {"native": True}, "rwkv7qwen2", "balance=True"),
    ],
)
def test_what_they_cannot_express_is_refused(tmp_path, name, fields, layout, message):
    with pytest.raises(ValueError, match=message):
        zoo.from_config(f"{name}-tiny", **fields).save_pretrained(tmp_path / "out", layout=layout)
    assert not (tmp_path / "out").exists()
