"""Checkpoints of transformers: what neither side can express is refused, and what other releases and publishers wrote is read."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_layout import write_config

import zoo
from zoo.evaluate.trial import find, make_trial

TURNING = {"rope_type": "default", "rope_theta": 1e4}
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 1.0, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}


@pytest.mark.parametrize(
    "layout, trial, changes, message",
    [
        ("llama", "plain", {"model_type": "lama"}, "no layout for checkpoints of model_type 'lama' .did you mean 'llama'"),
        ("llama", "plain", {"hidden_act": "tanh"}, "hidden_act 'tanh'"),
        ("llama", "plain", {"rope_parameters": TURNING | {"rope_type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic' is not supported"),
        ("qwen2", "window", {"max_window_layers": 1, "layer_types": None}, "layer_types mixes"),
        ("phi3", "plain", {"rope_parameters": LONG}, "rope_type 'longrope' is not supported"),
        ("phi3", "plain", {"rope_parameters": TURNING | {"partial_rotary_factor": 0.4}}, "turns 3 channels of a head"),
        ("mamba", "plain", {"hidden_act": "relu"}, "hidden_act 'relu' is not supported"),
        ("mamba2", "plain", {"hidden_act": "relu"}, "hidden_act 'relu' is not supported"),
        ("mamba2", "plain", {"time_step_limit": [0.0, 1.0]}, "time_step_limit.* is not supported"),
        ("gpt2", "plain", {"activation_function": "tanh"}, "hidden_act 'tanh' is not supported"),
        ("gpt2", "plain", {"scale_attn_by_inverse_layer_idx": True}, "only scale_attn_by_inverse_layer_idx=False"),
        ("gpt_neox", "partial", {"rope_parameters": TURNING | {"partial_rotary_factor": 0.4}}, "turns 3 channels of a head"),
        ("gemma2", "plain", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True is not supported"),
        ("gemma2", "plain", {"rope_parameters": TURNING | {"partial_rotary_factor": 0.5}}, "partial_rotary_factor other than 1"),
        ("rwkv", "plain", {"attention_hidden_size": 72}, "attention_hidden_size=72 other than hidden_size=32"),
        ("rwkv", "plain", {"layer_norm_epsilon": 1e-3}, "layer_norm_epsilon=0.001 is not supported"),
        ("qwen3_next", "plain", {"hidden_act": "gelu"}, "a qwen3_next with hidden_act='gelu' is not supported, only hidden_act='silu'"),
        ("recurrent_gemma", "plain", {"intermediate_size": 51}, "odd intermediate_size"),
        ("bamba", "plain", {"time_step_limit": [0.0, 1.0]}, "time_step_limit"),
        ("kimi_linear", "plain", {"tie_word_embeddings": True}, "tie_word_embeddings=True"),
        ("nemotron_h", "all", {"tie_word_embeddings": True}, "tie_word_embeddings=True is not supported"),
        ("nemotron_h", "all", {"sliding_window": 4}, "sliding_window=4 is not supported"),
        ("nemotron_h", "dense", {"mlp_hidden_act": "tanh"}, "hidden_act 'tanh' is not supported"),
        ("zamba2", "shared", {"tie_word_embeddings": False}, "tie_word_embeddings=False is not supported"),
        ("zamba2", "shared", {"use_long_context": True}, "use_long_context=True is not supported"),
        ("zamba2", "shared", {"rms_norm_eps": 1e-6}, "rms_norm_eps=1e-06 is not supported"),
        ("zamba2", "adapted", {"rope_parameters": TURNING | {"partial_rotary_factor": 0.5}}, "partial_rotary_factor other than 1"),
        ("xlstm", "plain", {"weight_mode": "fused"}, "weight_mode='fused' is not supported"),
        ("xlstm", "plain", {"use_bias": True}, "use_bias=True is not supported"),
        ("xlstm", "plain", {"eps": 1e-3}, "eps=0.001 is not supported"),
        ("xlstm", "plain", {"embedding_dim": 64}, "embedding_dim=64 is not supported, only embedding_dim=128"),
    ],
)
def test_what_we_cannot_express_is_refused(tmp_path, layout, trial, changes, message):
    write_config(tmp_path, layout, trial, **changes)
    with pytest.raises(ValueError, match=message):
        zoo.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "name, fields, layout, message",
    [
        ("transformer", {}, "lama", "'transformer' has no layout 'lama' .did you mean 'llama'"),
        ("transformer", {"window": 4}, "llama", "cannot express window=4"),
        ("transformer", {"qk_norm": True}, "qwen2", "cannot express qk_norm=True"),
        ("transformer", {"softcap": 9.0, "post_norm": True}, "mistral", "cannot express post_norm=True, softcap=9.0"),
        ("transformer", {"rope_theta": None}, "qwen3", "rope_theta=None"),
        ("transformer", {"qkv_bias": True}, "llama", "cannot express qkv_bias=True"),
        ("transformer", {"channel_mixer": "mlp"}, "llama", "cannot express channel_mixer='mlp'"),
        ("qwen3_next", {"norm": "rmsnorm"}, "qwen3_next", "cannot express norm='rmsnorm'"),
        ("transformer", {"qk_norm": True}, "phi3", "cannot express qk_norm=True"),
        ("transformer", {"qkv_bias": True}, "phi3", "cannot express qkv_bias=True"),
        ("mamba", {"expand": 1.5}, "mamba", "cannot express expand=1.5"),
        ("mamba", {"inner_norm": "plain"}, "mamba", "cannot express inner_norm='plain'"),
        ("mamba", {"inner_norm": "weighted"}, "falcon_mamba", "cannot express inner_norm='weighted'"),
        ("mamba2", {}, "mamba2", "only norm_groups=1 can be expressed"),
        ("mamba2", {"norm_groups": 2}, "mamba2", "cannot express norm_groups=2"),
        ("gpt2", {"norm": "rmsnorm"}, "gpt2", "cannot express norm='rmsnorm'"),
        ("gpt2", {"channel_args": {"bias": False}}, "gpt2", "cannot express channel_args="),
        ("gpt_neox", {"output_norms": True}, "gpt_neox", "cannot express output_norms=True"),
        ("gemma2", {"embedding_scale": 2.0}, "gemma2", "cannot express embedding_scale=2.0"),
        ("gemma2", {"output_norms": False}, "gemma2", "cannot express output_norms=False"),
        ("nemotron_h", {"mamba": {"dt_floor": 0.0, "head_dim": 16, "num_groups": 2}}, "nemotron_h", "cannot express mamba="),
        ("nemotron_h", {"tie_word_embeddings": True}, "nemotron_h", "tie_word_embeddings=True is not supported"),
        ("zamba2", {"tie_word_embeddings": False}, "zamba2", "tie_word_embeddings=False is not supported"),
        ("zamba2", {"num_kv_heads": 2, "tie_word_embeddings": True}, "zamba2", "num_key_value_heads=2 is not supported"),
        ("rwkv4", {"norm_eps": 1e-3}, "rwkv", "layer_norm_epsilon=0.001 is not supported"),
        ("rwkv4", {"embedding_norm": False}, "rwkv", "cannot express embedding_norm=False"),
        ("xlstm", {"tie_word_embeddings": True}, "xlstm", "cannot express tie_word_embeddings=True"),
        ("xlstm", {"norm": "layernorm"}, "xlstm", "cannot express norm='layernorm'"),
        ("xlstm", {"logit_softcap": None}, "xlstm", "cannot express logit_softcap=None"),
    ],
)
def test_what_they_cannot_express_is_refused(tmp_path, name, fields, layout, message):
    with pytest.raises(ValueError, match=message):
        zoo.from_config(name + "-tiny", **fields).save_pretrained(tmp_path / "out", layout=layout)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "layout, trial, saved, published",
    [
        ("mamba", "plain", "backbone.embeddings.", "backbone.embedding."),
        ("mamba2", "plain", "backbone.embeddings.", "backbone.embedding."),
        ("gpt_neox", "partial", "embed_out.", "lm_head."),
        ("kimi_linear", "dense", ".block_sparse_moe.", ".mlp."),
        ("olmo_hybrid", "plain", "layers.1.feedforward_layer_norm.", "layers.1.post_attention_layernorm."),
    ],
)
def test_names_of_other_releases_are_read(tmp_path, layout, trial, saved, published):
    tiny = make_trial(find(layout), trial, tmp_path)
    shutil.copytree(tiny.folder, tmp_path / "published")
    stored = load_file(tiny.folder / "model.safetensors")
    renamed = {name.replace(saved, published): tensor for name, tensor in stored.items()}
    assert renamed.keys() != stored.keys()
    save_file(renamed, tmp_path / "published" / "model.safetensors", metadata={"format": "pt"})
    again = zoo.from_pretrained(tmp_path / "published").state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in tiny.ours.state_dict().items())


def test_masks_among_the_weights_are_dropped(tmp_path):
    """Checkpoints of old releases hold them."""
    tiny = make_trial(find("gpt2"), "plain", tmp_path)
    stored = load_file(tiny.folder / "model.safetensors")
    masks = {f"transformer.h.{layer}.attn.bias": torch.ones(1, 1, 8, 8) for layer in range(2)}
    bare = {name.removeprefix("transformer."): tensor for name, tensor in (stored | masks).items() if name != "lm_head.weight"}
    save_file(bare, tiny.folder / "model.safetensors", metadata={"format": "pt"})
    ours, report = zoo.from_pretrained(tiny.folder, output_loading_info=True)
    assert report.dropped.keys() == masks.keys()
    assert torch.equal(ours.model.embed_tokens.weight, tiny.theirs.transformer.wte.weight)


def test_layers_of_multi_token_prediction_are_dropped(tmp_path):
    """They are laid out like the others, the first with a projection of two normalised inputs."""
    tiny = make_trial(find("nemotron_h"), "latent", tmp_path)
    stored = load_file(tiny.folder / "model.safetensors")
    extra = {f"mtp.layers.0.{name}.weight": torch.ones(32) for name in ("enorm", "hnorm", "eh_proj", "final_layernorm")}
    for index, layer in ((0, 2), (1, 0)):  # attention, then experts
        start = f"backbone.layers.{layer}."
        extra |= {name.replace(start, f"mtp.layers.{index}."): tensor for name, tensor in stored.items() if name.startswith(start)}
    save_file(stored | {n: t.clone() for n, t in extra.items()}, tiny.folder / "model.safetensors", metadata={"format": "pt"})
    ours, report = zoo.from_pretrained(tiny.folder, output_loading_info=True)
    assert report.dropped.keys() == extra.keys() and len(extra) > 20
    assert torch.equal(ours.model.embed_tokens.weight, tiny.theirs.model.embeddings.weight)


@torch.no_grad()
def test_embeddings_are_scaled_as_in_half_precision_training(tmp_path):
    """The square root of the width is rounded before it is multiplied."""
    tiny = make_trial(find("gemma2"), "biased", tmp_path)
    theirs, ids = tiny.theirs.bfloat16(), tiny.tokens(1, 9)
    assert torch.tensor(tiny.theirs.config.hidden_size**0.5).bfloat16() ** 2 != tiny.theirs.config.hidden_size
    theirs.save_pretrained(tmp_path / "half")
    expected = theirs(ids, output_hidden_states=True).hidden_states[0]
    assert torch.equal(zoo.from_pretrained(tmp_path / "half")(ids, output_hidden_states=True).hidden_states[0], expected)
