"""Checkpoints as the authors of Mamba and RWKV publish them, and flash-linear-attention's of the same blocks."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_layout_hybrids import assert_parity
from transformers import AutoModelForCausalLM, Mamba2Config, MambaConfig

import zoo

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
    assert_parity(ours(ids()).logits, theirs(block, tensors, tied)(ids()).logits)


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
