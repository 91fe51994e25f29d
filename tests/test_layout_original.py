"""Checkpoints as the authors of Mamba and RWKV publish them, and flash-linear-attention's of the same blocks."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, Mamba2Config, MambaConfig, RwkvConfig

import zoo
from zoo.evaluate.parity import close

D, L, INNER, VOCABULARY = 16, 2, 32, 40
BLOCKS = ("mamba", "mamba2")


def ids() -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (2, 13), generator=torch.Generator().manual_seed(1))


def drawn(shapes: dict, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Tensors of these shapes, none at a special value."""
    generator, made = torch.Generator().manual_seed(0), {}
    for name, shape in shapes.items():
        x = torch.randn(shape, generator=generator)
        gain = ("norm" in name or ".ln" in name) and name.endswith("weight")
        x = 1 + 0.2 * x if gain else x * (0.3 if len(shape) > 1 else 0.5)
        made[name] = x.to(dtype)
    return made


def mamba_keys(block: str, embedding: str, tied: bool = False) -> dict[str, tuple[int, ...]]:
    """Documented names and shapes of a tiny model."""
    layer = {"norm.weight": (D,), "mixer.out_proj.weight": (D, INNER)}
    if block == "mamba":
        layer |= {"mixer.A_log": (INNER, 4), "mixer.D": (INNER,), "mixer.conv1d.weight": (INNER, 1, 4), "mixer.conv1d.bias": (INNER,)}
        layer |= {"mixer.in_proj.weight": (2 * INNER, D), "mixer.x_proj.weight": (9, INNER), "mixer.dt_proj.weight": (INNER, 1)}
        layer |= {"mixer.dt_proj.bias": (INNER,)}
    else:
        layer |= {"mixer.A_log": (4,), "mixer.D": (4,), "mixer.dt_bias": (4,), "mixer.norm.weight": (INNER,)}
        layer |= {"mixer.conv1d.weight": (INNER + 8, 1, 4), "mixer.conv1d.bias": (INNER + 8,), "mixer.in_proj.weight": (2 * INNER + 12, D)}
    keys = {f"backbone.layers.{i}.{name}": shape for i in range(L) for name, shape in layer.items()}
    keys |= {f"backbone.{embedding}.weight": (VOCABULARY, D), "backbone.norm_f.weight": (D,)}
    return keys if tied else keys | {"lm_head.weight": (VOCABULARY, D)}


def theirs(block: str, tensors: dict, tied: bool = False):
    """A model of transformers with these tensors, whose blocks are the same."""
    sizes = {"vocab_size": VOCABULARY, "hidden_size": D, "num_hidden_layers": L, "state_size": 4, "tie_word_embeddings": tied}
    config = MambaConfig(**sizes) if block == "mamba" else Mamba2Config(**sizes, num_heads=4, head_dim=8, n_groups=1, chunk_size=8)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.load_state_dict({name.replace("embedding.", "embeddings."): tensor for name, tensor in tensors.items()})
    return model


@torch.no_grad()
def check_logits(block: str, tensors: dict, ours, tied: bool = False) -> None:
    """Against transformers' model of the same tensors."""
    close(ours(ids()).logits, theirs(block, tensors, tied)(ids()).logits, "logits")


def original_config(block: str, tied: bool) -> dict:
    sizes = {"d_state": 4} if block == "mamba" else {"layer": "Mamba2", "d_state": 4, "headdim": 8}
    return {
        "d_model": D, "n_layer": L, "vocab_size": VOCABULARY - 3, "ssm_cfg": sizes, "rms_norm": True, "residual_in_fp32": True,
        "fused_add_norm": True, "pad_vocab_size_multiple": 8, "tie_embeddings": tied,
    }  # fmt: skip


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("block", BLOCKS)
def test_the_authors_mamba(tmp_path, block, tied):
    config, tensors = original_config(block, tied), drawn(mamba_keys(block, "embedding"))
    if tied:
        tensors["lm_head.weight"] = tensors["backbone.embedding.weight"]
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps(config))
    ours, report = zoo.from_pretrained(tmp_path, output_loading_info=True)
    assert type(ours).__name__ == {"mamba": "MambaForCausalLM", "mamba2": "Mamba2ForCausalLM"}[block]
    assert not report.fresh and set(report.dropped) == ({"lm_head.weight"} if tied else set())
    check_logits(block, tensors, ours, tied)
    ours.save_pretrained(tmp_path / "back", layout=f"{block}-original")
    back = torch.load(tmp_path / "back" / "pytorch_model.bin", weights_only=True)
    assert back.keys() == tensors.keys() and all(torch.equal(back[name], tensors[name]) for name in tensors)
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    assert written.keys() <= config.keys() | {"d_intermediate", "attn_layer_idx", "attn_cfg"}  # that library refuses any other
    assert zoo.from_pretrained(tmp_path / "back").config.to_dict() | {"_name_or_path": ""} == ours.config.to_dict() | {"_name_or_path": ""}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"d_intermediate": 8}, "d_intermediate=8 is not supported"),
        ({"attn_layer_idx": [1]}, "attn_layer_idx=.1. is not supported"),
        ({"rms_norm": False}, "rms_norm=False is not supported"),
        ({"ssm_cfg": {"layer": "Mamba2", "norm_before_gate": True}}, "norm_before_gate=True is not supported"),
        ({"ssm_cfg": {"d_sate": 4}}, "d_sate"),
        ({"ssm_cfg": {"layer": "Mamba9"}}, "no layout for checkpoints of model_type None"),
    ],
)
def test_what_the_authors_mamba_cannot_be_is_refused(tmp_path, changes, message):
    (tmp_path / "config.json").write_text(json.dumps(original_config("mamba", True) | changes))
    with pytest.raises(ValueError, match=message):
        zoo.from_pretrained(tmp_path)


@pytest.mark.parametrize("block", BLOCKS)
def test_mamba_of_flash_linear_attention(tmp_path, block):
    config = {"model_type": block, "vocab_size": VOCABULARY, "hidden_size": D, "num_hidden_layers": L, "state_size": 4, "expand": 2}
    config |= {"fuse_norm": True, "norm_eps": 1e-5, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config |= {"dt_rank": 1} if block == "mamba" else {"head_dim": 8, "n_groups": 1, "dt_limit": [0.0, math.inf], "chunk_size": 256}
    tensors = drawn(mamba_keys(block, "embeddings"))
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    ours, report = zoo.from_pretrained(tmp_path, output_loading_info=True)
    assert not report.fresh and not report.dropped and ours.config.norm_eps == 1e-5
    check_logits(block, tensors, ours)
    ours.save_pretrained(tmp_path / "back", layout=f"fla-{block}")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == tensors.keys() and all(torch.equal(back[name], tensors[name]) for name in tensors)
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    assert {name: written.get(name, value) for name, value in config.items()} == config
    assert written["architectures"] == [{"mamba": "MambaForCausalLM", "mamba2": "Mamba2ForCausalLM"}[block]]


# -- RWKV: a file of tensors ---------------------------------------------------------------------------------------------


def rwkv_keys(attention: dict, channel: dict, inner: int) -> dict[str, tuple[int, ...]]:
    """What all versions share, with these vectors and matrices inside."""
    block = {f"ln{i}.{kind}": (D,) for i in (1, 2) for kind in ("weight", "bias")}
    block |= {f"att.{name}.weight": (D, D) for name in ("receptance", "key", "value", "output")}
    block |= {"ffn.key.weight": (inner, D), "ffn.value.weight": (D, inner)}
    block |= {f"att.{name}": shape for name, shape in attention.items()} | {f"ffn.{name}": shape for name, shape in channel.items()}
    keys = {f"blocks.{i}.{name}": shape for i in range(L) for name, shape in block.items()}
    keys |= {f"{name}.{kind}": (D,) for name in ("blocks.0.ln0", "ln_out") for kind in ("weight", "bias")}
    return keys | {"emb.weight": (VOCABULARY, D), "head.weight": (VOCABULARY, D)}


def rwkv4_keys() -> dict:
    mixes = {f"time_mix_{name}": (1, 1, D) for name in "kvr"}
    channel = {f"time_mix_{name}": (1, 1, D) for name in "kr"} | {"receptance.weight": (D, D)}
    return rwkv_keys(mixes | {"time_decay": (D,), "time_first": (D,)}, channel, 4 * D)


def rwkv5_keys() -> dict:
    attention = {f"time_mix_{name}": (1, 1, D) for name in "rkvg"} | {"time_decay": (2, D // 2), "time_faaaa": (2, D // 2)}
    attention |= {"gate.weight": (D, D), "ln_x.weight": (D,), "ln_x.bias": (D,)}
    return rwkv_keys(attention, {f"time_mix_{name}": (1, 1, D) for name in "kr"} | {"receptance.weight": (D, D)}, 56)


def rwkv6_keys() -> dict:
    attention = {f"time_maa_{name}": (1, 1, D) for name in "xwkvrg"} | {"time_maa_w1": (D, 15), "time_maa_w2": (5, 3, D)}
    attention |= {"time_decay": (1, 1, D), "time_decay_w1": (D, 6), "time_decay_w2": (6, D), "time_faaaa": (2, D // 2)}
    attention |= {"gate.weight": (D, D), "ln_x.weight": (D,), "ln_x.bias": (D,)}
    return rwkv_keys(attention, {f"time_maa_{name}": (1, 1, D) for name in "kr"} | {"receptance.weight": (D, D)}, 56)


def rwkv7_keys() -> dict:
    attention = dict.fromkeys(("x_r", "x_w", "x_k", "x_v", "x_a", "x_g", "k_k", "k_a", "w0", "a0", "v0"), (1, 1, D))
    for name, rank in {"w": 6, "a": 5, "v": 4, "g": 7}.items():
        attention |= {f"{name}1": (D, rank), f"{name}2": (rank, D)}
    attention |= {"r_k": (2, D // 2), "ln_x.weight": (D,), "ln_x.bias": (D,)}
    return rwkv_keys(attention, {"x_k": (1, 1, D)}, 4 * D)


RWKV = {"rwkv4": rwkv4_keys, "rwkv5": rwkv5_keys, "rwkv6": rwkv6_keys, "rwkv7": rwkv7_keys}
UNUSED = {"rwkv7": {"blocks.0.att.v0", "blocks.0.att.v1", "blocks.0.att.v2"}}  # the first layer's


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", RWKV)
def test_a_file_of_rwkv_keeps_its_bits(tmp_path, name, dtype):
    tensors = drawn(RWKV[name](), dtype)
    torch.save(tensors, tmp_path / "model.pth")
    ours, report = zoo.from_pretrained(tmp_path / "model.pth", output_loading_info=True)
    assert ours.config.name == name and ours.dtype == dtype and not report.fresh
    assert set(report.dropped) == UNUSED.get(name, set())
    assert torch.isfinite(ours(ids()).logits).all()
    ours.save_pretrained(tmp_path / "back", layout=f"{name}-pth")
    assert [path.name for path in (tmp_path / "back").iterdir()] == [f"{name}.pth"]
    back = torch.load(tmp_path / "back" / f"{name}.pth", weights_only=True)
    kept = {key: tensor for key, tensor in tensors.items() if key not in UNUSED.get(name, set())}
    assert back.keys() == kept.keys() and all(torch.equal(back[key], kept[key]) for key in kept)
    assert all(tensor.is_contiguous() for tensor in back.values())


def test_the_head_of_a_file_gives_way_to_another_task(tmp_path):
    torch.save(drawn(rwkv4_keys()), tmp_path / "model.pth")
    ours, report = zoo.from_pretrained(tmp_path / "model.pth", task="sequence_classification", output_loading_info=True)
    assert list(report.dropped) == ["head.weight"] and report.fresh == ["score.weight"]
    assert type(ours).__name__ == "RWKV4ForSequenceClassification"


def test_what_a_file_cannot_say_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"cannot express norm_eps=0\.001"):
        zoo.from_config("rwkv7-tiny", norm_eps=1e-3).save_pretrained(tmp_path / "out", layout="rwkv7-pth")
    torch.save({"emb.weight": torch.zeros(2, 2)}, tmp_path / "model.pth")
    with pytest.raises(ValueError, match="no layout for checkpoints of model_type None"):
        zoo.from_pretrained(tmp_path / "model.pth")


@torch.no_grad()
def test_rwkv4_equals_transformers(tmp_path):
    """The same tensors under the names of transformers' RWKV."""
    tensors = drawn(rwkv4_keys())
    torch.save(tensors, tmp_path / "model.pth")
    config = RwkvConfig(vocab_size=VOCABULARY, hidden_size=D, num_hidden_layers=L, attention_hidden_size=D, intermediate_size=4 * D)
    model = AutoModelForCausalLM.from_config(config).eval()
    spelled = {"emb.": "rwkv.embeddings.", "blocks.0.ln0": "rwkv.blocks.0.pre_ln", "ln_out": "rwkv.ln_out"}
    inside = {".att.": ".attention.", ".ffn.": ".feed_forward.", "mix_k": "mix_key", "mix_v": "mix_value", "mix_r": "mix_receptance"}

    def rename(name: str) -> str:
        start = next((old for old in spelled if name.startswith(old)), "blocks." if name.startswith("blocks.") else "")
        name = spelled.get(start, "rwkv.blocks." if start else "") + name.removeprefix(start)
        for old, new in inside.items():
            name = name.replace(old, new)
        return name

    model.load_state_dict({rename(name): tensor for name, tensor in tensors.items()})
    close(zoo.from_pretrained(tmp_path / "model.pth")(ids()[:1]).logits, model(ids()[:1]).logits, "logits")


def rwkv5(tensors: dict, tokens: torch.Tensor) -> torch.Tensor:
    """Logits of one text, token after token, by the formulas of Eagle (arXiv:2404.05892, section 4.1)."""

    def norm(x, name, groups=1, eps=1e-5):
        return F.group_norm(x[None], groups, tensors[name + ".weight"], tensors[name + ".bias"], eps)[0]

    before, memory, logits = {}, {i: torch.zeros(2, D // 2, D // 2) for i in range(L)}, []
    for token in tokens:
        x = norm(tensors["emb.weight"][token], "blocks.0.ln0")
        for i in range(L):
            mine = {name.removeprefix(f"blocks.{i}."): t for name, t in tensors.items() if name.startswith(f"blocks.{i}.")}
            for part, letters, place in (("att", "rkvg", "ln1"), ("ffn", "kr", "ln2")):
                now = norm(x, f"blocks.{i}.{place}")
                old = before.get((i, part), torch.zeros(D))
                before[i, part] = now
                mixed = {n: torch.lerp(old, now, mine[f"{part}.time_mix_{n}"].flatten()) for n in letters}
                r, k = (mine[f"{part}.{long}.weight"] @ mixed[long[0]] for long in ("receptance", "key"))
                if part == "ffn":
                    x = x + r.sigmoid() * (mine["ffn.value.weight"] @ k.relu().square())
                    continue
                v, gate = mine["att.value.weight"] @ mixed["v"], F.silu(mine["att.gate.weight"] @ mixed["g"])
                r, k, v = (t.view(2, D // 2) for t in (r, k, v))
                write = k[:, :, None] * v[:, None]
                out = torch.einsum("hk,hkv->hv", r, memory[i] + mine["att.time_faaaa"][:, :, None] * write)
                memory[i] = (-mine["att.time_decay"].exp()).exp()[:, :, None] * memory[i] + write
                x = x + mine["att.output.weight"] @ (gate * norm(out.flatten() / 8, f"blocks.{i}.att.ln_x", groups=2))
        logits.append(tensors["head.weight"] @ norm(x, "ln_out"))
    return torch.stack(logits)


@torch.no_grad()
def test_rwkv5_equals_its_formulas(tmp_path):
    tensors = drawn(rwkv5_keys())
    torch.save(tensors, tmp_path / "model.pth")
    close(zoo.from_pretrained(tmp_path / "model.pth")(ids()[:1]).logits[0], rwkv5(tensors, ids()[0]), "logits")


def test_earlier_versions_of_rwkv5_are_refused(tmp_path):
    tensors = drawn(rwkv5_keys())
    whole = {name: tensor[:, :1] if name.endswith(("decay", "faaaa")) else tensor for name, tensor in tensors.items()}
    torch.save(whole, tmp_path / "model.pth")
    with pytest.raises(ValueError, match=r"RWKV-5\.1, whose 2 heads decay as a whole"):
        zoo.from_pretrained(tmp_path / "model.pth")
    torch.save({name: tensor for name, tensor in tensors.items() if "gate" not in name}, tmp_path / "model.pth")
    with pytest.raises(ValueError, match=r"RWKV-5\.0, which has no gate"):
        zoo.from_pretrained(tmp_path / "model.pth")


@pytest.mark.parametrize("name", ["rwkv6", "rwkv7"])
@torch.no_grad()
def test_both_layouts_of_rwkv_lead_to_one_model(tmp_path, name):
    """What flash-linear-attention's converter does, through our own two tables: matrices are transposed and reordered."""
    tensors = drawn(RWKV[name]())
    torch.save(tensors, tmp_path / "model.pth")
    ours = zoo.from_pretrained(tmp_path / "model.pth")
    if name == "rwkv6":
        ours.config.head_norm_eps = ours.config.norm_eps = 64e-5  # there one number serves all norms
    ours.save_pretrained(tmp_path / "fla", layout=f"fla-{name}")
    again = load_file(tmp_path / "fla" / "model.safetensors")
    layer = "model.layers.1.attn."
    if name == "rwkv6":
        rank = 3
        for place, letter in enumerate("rwkvg"):
            row = "wkvrg".index(letter)
            low, high = again[layer + "x_proj.0.linear.weight"], again[layer + "x_proj.2.weight"]
            theirs = tensors["blocks.1.att.time_maa_w1"][:, row * rank : row * rank + rank]
            assert torch.equal(low[place * rank : place * rank + rank], theirs.t())
            assert torch.equal(high[:, place * rank : place * rank + rank], tensors["blocks.1.att.time_maa_w2"][row].t())
            assert torch.equal(again[layer + "x_bias"][place], tensors[f"blocks.1.att.time_maa_{letter}"].flatten())
        assert torch.equal(again["model.layers.1.ffn.key.mu"], tensors["blocks.1.ffn.time_maa_k"].flatten())
    else:
        for letter in "wavg":
            assert torch.equal(again[f"{layer}{letter}_lora.lora.0.weight"], tensors[f"blocks.1.att.{letter}1"].t())
            assert torch.equal(again[f"{layer}{letter}_lora.lora.2.weight"], tensors[f"blocks.1.att.{letter}2"].t())
        assert torch.equal(again["model.layers.1.ffn.x_k"], tensors["blocks.1.ffn.x_k"].flatten())


# -- RetNet: torchscale ------------------------------------------------------------------------------------------------------

SIZES = {"decoder_embed_dim": D, "decoder_layers": L, "decoder_ffn_embed_dim": 20, "vocab_size": VOCABULARY, "activation_fn": "swish"}
HEADS = {"decoder_retention_heads": 2, "decoder_value_embed_dim": 24}


def retnet_tensors() -> dict[str, torch.Tensor]:
    """Documented names and shapes of a tiny model, and the two tables beside them."""
    layer = {f"retention.{name}_proj.weight": (D, D) for name in "qk"} | {f"retention.{name}_proj.weight": (24, D) for name in "vg"}
    layer |= {"retention.out_proj.weight": (D, 24), "ffn.fc1.weight": (20, D), "ffn.gate.weight": (20, D), "ffn.fc2.weight": (D, 20)}
    layer |= {"retention_layer_norm.weight": (D,), "final_layer_norm.weight": (D,)}
    keys = {f"layers.{i}.{name}": shape for i in range(L) for name, shape in layer.items()}
    keys |= {"embed_tokens.weight": (VOCABULARY, D), "layer_norm.weight": (D,), "output_projection.weight": (VOCABULARY, D)}
    angle = 1.0 / 10000 ** torch.linspace(0, 1, D // 4)
    tables = {"angle": angle.repeat_interleave(2), "decay": torch.log(1 - 2 ** (-5 - torch.arange(2.0)))}
    return drawn(keys) | {f"retnet_rel_pos.{name}": table for name, table in tables.items()}


def retnet(tensors: dict, tokens: torch.Tensor, eps: float, rescaled: bool) -> torch.Tensor:
    """Logits of one text by retention's parallel form (arXiv:2307.08621, eq. 5), with or without the factors of section 2.2."""

    def norm(x, weight=1.0):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight

    time = torch.arange(len(tokens))
    decay = torch.tril(torch.exp((time[:, None] - time) * tensors["retnet_rel_pos.decay"][:, None, None]))
    if rescaled:
        decay = decay / decay.sum(-1, keepdim=True).sqrt()
    turn = torch.polar(torch.ones(()), time[:, None] * tensors["retnet_rel_pos.angle"][::2])
    x = tensors["embed_tokens.weight"][tokens]
    for i in range(L):
        mine = {name.removeprefix(f"layers.{i}."): t for name, t in tensors.items() if name.startswith(f"layers.{i}.")}
        inner = norm(x, mine["retention_layer_norm.weight"])
        q, k, v, gate = (
            (inner @ mine[f"retention.{name}_proj.weight"].T).unflatten(-1, (2, -1)).transpose(0, 1).contiguous() for name in "qkvg"
        )
        q, k = (torch.view_as_complex(t.unflatten(-1, (-1, 2))) * turn for t in (q, k))  # neighbouring channels turn together
        scores = (q @ k.mH).real * decay / (D // 2) ** 0.5
        if rescaled:
            scores = scores / scores.sum(-1, keepdim=True).abs().clamp(min=1)
        y = (F.silu(gate) * norm(scores @ v)).transpose(0, 1).flatten(1)
        x = x + y @ mine["retention.out_proj.weight"].T
        inner = norm(x, mine["final_layer_norm.weight"])
        x = x + (F.silu(inner @ mine["ffn.fc1.weight"].T) * (inner @ mine["ffn.gate.weight"].T)) @ mine["ffn.fc2.weight"].T
    return norm(x, tensors["layer_norm.weight"]) @ tensors["output_projection.weight"].T


@pytest.mark.parametrize("eps, rescaled", [(1e-3, False), (1e-12, True)])
@torch.no_grad()
def test_the_authors_retnet(tmp_path, eps, rescaled):
    """The factors that rescale scores cancel in the norm, but for its epsilon."""
    config, tensors = SIZES | HEADS | {"layernorm_eps": eps, "dropout": 0.1}, retnet_tensors()
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps(config))
    ours, report = zoo.from_pretrained(tmp_path, output_loading_info=True)
    assert type(ours).__name__ == "RetNetForCausalLM" and not report.fresh and not report.dropped
    close(ours(ids()[:1]).logits[0], retnet(tensors, ids()[0], eps, rescaled), "logits")
    ours.save_pretrained(tmp_path / "back", layout="retnet-torchscale")
    back = torch.load(tmp_path / "back" / "pytorch_model.bin", weights_only=True)
    assert back.keys() == tensors.keys() and all(torch.equal(back[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"deepnorm": True}, "deepnorm=True is not supported"),
        ({"decoder_normalize_before": False}, "decoder_normalize_before=False is not supported"),
        ({"moe_freq": 2}, "moe_freq=2 is not supported"),
        ({"multiway": True}, "multiway=True is not supported"),
        ({"activation_fn": "tanh"}, "activation_fn 'tanh' is not supported"),
        ({"decoder_layer": 3}, "no field 'decoder_layer' .did you mean 'decoder_layers'"),
        ({"decoder_retention_heads": 4}, "angles or decays are not those of the paper"),
    ],
)
def test_what_the_authors_retnet_cannot_be_is_refused(tmp_path, changes, message):
    torch.save(retnet_tensors(), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps(SIZES | HEADS | changes))
    with pytest.raises(ValueError, match=message):
        zoo.from_pretrained(tmp_path)


def test_what_torchscale_cannot_express_is_refused(tmp_path):
    fields = {"channel_mixer": "swiglu", "norm": "rmsnorm", "norm_weight": False}
    zoo.from_config("retnet-tiny", **fields).save_pretrained(tmp_path / "in", layout="retnet-torchscale")
    assert zoo.from_pretrained(tmp_path / "in").config.intermediate_size == 128
    for change, message in (
        ({"channel_mixer": "mlp"}, "channel_mixer='mlp'"), ({"norm": "layernorm"}, "norm='layernorm'"),
        ({"norm_weight": True}, "norm_weight=True"), ({"rope_inclusive": False}, "rope_inclusive=False"),
        ({"embedding_scale": 2.0}, "embedding_scale=2.0"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"cannot express.* {message}"):
            zoo.from_config("retnet-tiny", **fields | change).save_pretrained(tmp_path / "out", layout="retnet-torchscale")
