"""Checkpoints of further teachers: parity with transformers, bits kept both ways, and strictness about what cannot be said."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_layout import check_written_back, token_ids, write_config
from transformers import CONFIG_MAPPING, AutoModel, AutoModelForCausalLM

import zoo
from zoo.evaluate.closeness import assert_close
from zoo.layout import get_layout
from zoo.registry import get

TOKENS = {"vocab_size": 97, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
ATTENTION = {
    "hidden_size": 36, "intermediate_size": 52, "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}  # fmt: skip
TURNING = {"rope_type": "default", "rope_theta": 1e4}
MAMBA = {"hidden_size": 36, "num_hidden_layers": 2, "state_size": 5}
SIZES = {
    "phi3": ATTENTION,
    "mamba": MAMBA,
    "falcon_mamba": MAMBA,
    "mamba2": {"hidden_size": 36, "num_hidden_layers": 2, "num_heads": 6, "head_dim": 12, "state_size": 5, "n_groups": 3, "chunk_size": 8},
    "rwkv": {"hidden_size": 36, "num_hidden_layers": 3},
    "gpt2": {"n_embd": 36, "n_layer": 3, "n_head": 6, "n_positions": 128},
    "gpt_neox": {"hidden_size": 36, "intermediate_size": 52, "num_hidden_layers": 3, "num_attention_heads": 6}
    | {"rope_parameters": TURNING | {"partial_rotary_factor": 0.34}},
    "gemma2": ATTENTION | {"head_dim": 8, "query_pre_attn_scalar": 5, "sliding_window": 5},
}  # fmt: skip
NEOX_PLAIN = {"use_parallel_residual": False, "attention_bias": False, "tie_word_embeddings": True, "hidden_act": "gelu_pytorch_tanh"}
CASES = {
    "phi3": ("phi3", {}),
    "phi3-window": ("phi3", {"sliding_window": 5, "num_key_value_heads": 6, "tie_word_embeddings": True}),
    "phi3-partial": ("phi3", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e4, "partial_rotary_factor": 0.7}}),
    "mamba": ("mamba", {}),
    "mamba-biased": (
        "mamba",
        {"use_bias": True, "use_conv_bias": False, "tie_word_embeddings": False, "time_step_rank": 5, "conv_kernel": 3},
    ),
    "falcon_mamba": ("falcon_mamba", {}),
    "falcon_mamba-biased": ("falcon_mamba", {"use_bias": True, "expand": 3, "mixer_rms_eps": 1e-3, "layer_norm_epsilon": 1e-4}),
    "mamba2": ("mamba2", {}),
    "mamba2-biased": ("mamba2", {"n_groups": 1, "use_bias": True, "use_conv_bias": False, "conv_kernel": 3, "time_step_min": 1e-2}),
    "mamba2-tied": ("mamba2", {"n_groups": 2, "tie_word_embeddings": True, "layer_norm_epsilon": 1e-3}),
    "rwkv": ("rwkv", {}),
    "gpt2": ("gpt2", {}),
    "gpt2-untied": ("gpt2", {"n_inner": 52, "activation_function": "relu", "tie_word_embeddings": False, "layer_norm_epsilon": 1e-3}),
    "gpt_neox": ("gpt_neox", {"rope_parameters": TURNING | {"partial_rotary_factor": 0.7}}),
    "gpt_neox-sequential": ("gpt_neox", NEOX_PLAIN),
    "gpt_neox-stretched": (
        "gpt_neox",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 5e4, "factor": 2.5, "partial_rotary_factor": 1.0}},
    ),
    "gemma2": ("gemma2", {}),
    "gemma2-full": (
        "gemma2",
        {"layer_types": ["full_attention", "full_attention", "sliding_attention"], "attention_bias": True, "hidden_size": 48}
        | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": None, "tie_word_embeddings": False},
    ),
    "gemma2-uncapped": ("gemma2", {"attn_logit_softcapping": None, "hidden_activation": "silu", "num_key_value_heads": 6}),
    "rwkv-tied": ("rwkv", {"intermediate_size": 52, "tie_word_embeddings": True}),
}
CONV = ("conv1d",)
MERGED = {
    "phi3": ("qkv_proj", "gate_up_proj"),
    "mamba": CONV,
    "falcon_mamba": CONV,
    "mamba2": CONV,
    "rwkv": ("time_mix",),
    "gpt2": ("attn.c_", "mlp.c_"),
    "gpt_neox": ("query_key_value",),
    "gemma2": (),
}  # foreign keys that change more than their name
ROUNDED = ("mamba", "falcon_mamba", "mamba2", "rwkv")  # transformers computes parts of these in float32, whatever their dtype
FORGOTTEN = {"max_position_embeddings", "_name_or_path", "attention_dropout", "chunk_size"}
every_case = pytest.mark.parametrize("case", CASES)
every_kind = pytest.mark.parametrize("kind", SIZES)


def foreign_model(kind: str, **fields):
    """A tiny model of transformers with no parameter at a special value."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**TOKENS | SIZES[kind] | fields), attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """case -> (model of transformers, folder it saved itself to)."""
    cache = {}

    def load(case: str):
        if case not in cache:
            kind, fields = CASES[case]
            cache[case] = foreign_model(kind, **fields), tmp_path_factory.mktemp(case)
            cache[case][0].save_pretrained(cache[case][1])
        return cache[case]

    return load


def layout_of(kind: str):
    return get_layout(get(zoo.layouts()[kind]), kind)


def assert_parity(result, theirs, given: dict, kind: str) -> None:
    """`result` are the logits of `theirs`: by the rule of closeness, or to 1e-5 where transformers has no exact answer."""
    plain = theirs(**given).logits
    if kind in ROUNDED:
        assert result.shape == plain.shape
        assert (result - plain).abs().max() <= 1e-5 * max(1.0, plain.abs().max())
    else:
        assert_close(result, plain, copy.deepcopy(theirs).double()(**given).logits, "logits")


@every_case
@torch.no_grad()
def test_logits_equal_those_of_transformers(saved, case):
    theirs, folder = saved(case)
    ours, kind = zoo.from_pretrained(folder), CASES[case][0]
    for shape in ((2, 23), (1, 1), (3, 64)):
        ids = token_ids(*shape)
        assert_parity(ours(ids).logits, theirs, {"input_ids": ids}, kind)


@every_case
@torch.no_grad()
def test_a_padded_batch_equals_the_sequences_alone_in_transformers(saved, case):
    """Alone, as transformers lets padding into the convolutions of biased Mambas and into RWKV, which it decodes one by one."""
    theirs, folder = saved(case)
    ours, kind = zoo.from_pretrained(folder), CASES[case][0]
    ids, padding, new = token_ids(2, 11), (4, 0), 12
    mask = torch.arange(11) >= torch.tensor(padding).unsqueeze(1)
    given = {"input_ids": ids.masked_fill(~mask, 0), "attention_mask": mask.long()}
    options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
    logits, continued = ours(**given).logits, ours.generate(**given, **options)
    for row, start in enumerate(padding):
        alone = ids[row : row + 1, start:]
        assert_parity(logits[row : row + 1, start:], theirs, {"input_ids": alone}, kind)
        assert torch.equal(continued[row, start:], theirs.generate(alone, **options)[0])


@every_case
def test_written_back_it_is_what_it_was(saved, case, tmp_path):
    theirs, folder = saved(case)
    check_written_back(theirs, folder, tmp_path, CASES[case][0], FORGOTTEN)


@every_case
def test_every_key_has_one_counterpart(saved, case):
    theirs, folder = saved(case)
    ours, report = zoo.from_pretrained(folder, output_loading_info=True)
    kind, stored = CASES[case][0], set(load_file(folder / "model.safetensors"))
    changed = {name for names in report.transformed.values() for name in names}
    assert set(report.taken) | changed == stored
    tied = {"lm_head.weight"} if theirs.config.tie_word_embeddings else set()
    assert set(report.taken.values()) | set(report.transformed) == set(ours.state_dict()) - tied
    assert changed == {name for name in stored if any(part in name for part in MERGED[kind])}
    assert not (report.fresh or report.dropped)
    back = layout_of(kind).to_foreign(ours.state_dict(), ours)
    assert back.keys() == stored
    there, _ = layout_of(kind).to_zoo(back, ours)
    assert all(torch.equal(there[name], tensor) for name, tensor in ours.state_dict().items() if name in there)
    assert all(tensor.is_contiguous() for made in (back, there) for tensor in made.values())


@every_kind
def test_half_precision_and_bare_bodies_keep_their_bits(kind, tmp_path):
    theirs = foreign_model(kind).bfloat16()
    theirs.save_pretrained(tmp_path / "half")
    ours = zoo.from_pretrained(tmp_path / "half", task="base")
    assert ours.dtype == torch.bfloat16
    ours.save_pretrained(tmp_path / "back", layout=kind)
    body = AutoModel.from_pretrained(tmp_path / "back")
    expected = theirs.base_model.state_dict()
    assert body.dtype == torch.bfloat16 and body.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in body.state_dict().items())


@pytest.mark.parametrize(
    "kind, old, new",
    [
        ("mamba", "backbone.embedding.weight", "backbone.embeddings.weight"),
        ("mamba2", "backbone.embedding.weight", "backbone.embeddings.weight"),
        ("gpt_neox", "lm_head.weight", "embed_out.weight"),
    ],
)
def test_names_of_other_releases_are_read(tmp_path, kind, old, new):
    theirs = foreign_model(kind)
    theirs.save_pretrained(tmp_path)
    expected, stored = zoo.from_pretrained(tmp_path).state_dict(), load_file(tmp_path / "model.safetensors")
    save_file({old if name == new else name: tensor for name, tensor in stored.items()}, tmp_path / "model.safetensors")
    assert new in stored and all(torch.equal(t, expected[n]) for n, t in zoo.from_pretrained(tmp_path).state_dict().items())


def test_masks_among_the_weights_are_dropped(tmp_path):
    """Checkpoints of old releases hold them."""
    theirs = foreign_model("gpt2")
    theirs.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    masks = {f"transformer.h.{layer}.attn.bias": torch.ones(1, 1, 8, 8) for layer in range(3)}
    bare = {name.removeprefix("transformer."): tensor for name, tensor in (stored | masks).items() if name != "lm_head.weight"}
    save_file(bare, tmp_path / "model.safetensors")
    ours, report = zoo.from_pretrained(tmp_path, output_loading_info=True)
    assert report.dropped.keys() == masks.keys()
    assert torch.equal(ours.model.embed_tokens.weight, theirs.transformer.wte.weight)


@torch.no_grad()
def test_embeddings_are_scaled_as_in_half_precision_training(tmp_path):
    """The square root of the width is rounded before it is multiplied."""
    theirs, ids = foreign_model("gemma2", hidden_size=78).bfloat16(), token_ids(1, 9)
    theirs.save_pretrained(tmp_path)
    expected = theirs(ids, output_hidden_states=True).hidden_states[0]
    assert torch.equal(zoo.from_pretrained(tmp_path)(ids, output_hidden_states=True).hidden_states[0], expected)


LONG = {"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 1.0, "short_factor": [1.0] * 3, "long_factor": [2.0] * 3}


@pytest.mark.parametrize(
    "kind, changes, message",
    [
        ("phi3", {"rope_parameters": LONG}, "rope_type 'longrope' is not supported"),
        ("phi3", {"rope_parameters": TURNING | {"partial_rotary_factor": 0.5}}, "turns 3 channels of a head"),
        ("mamba", {"hidden_act": "relu"}, "hidden_act 'relu' is not supported"),
        ("mamba2", {"hidden_act": "relu"}, "hidden_act 'relu' is not supported"),
        ("mamba2", {"time_step_limit": [0.0, 1.0]}, "time_step_limit .* is not supported"),
        ("gpt2", {"activation_function": "tanh"}, "hidden_act 'tanh' is not supported"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "only scale_attn_by_inverse_layer_idx=False"),
        ("gpt_neox", {"rope_parameters": TURNING | {"partial_rotary_factor": 0.5}}, "turns 3 channels of a head"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True is not supported"),
        ("gemma2", {"rope_parameters": TURNING | {"partial_rotary_factor": 0.5}}, "partial_rotary_factor other than 1"),
        ("rwkv", {"attention_hidden_size": 72}, "attention_hidden_size=72 other than hidden_size=36"),
        ("rwkv", {"layer_norm_epsilon": 1e-3}, "layer_norm_epsilon=0.001 is not supported"),
    ],
)
def test_what_we_cannot_express_is_refused(tmp_path, kind, changes, message):
    foreign_model(kind).save_pretrained(tmp_path)
    write_config(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        zoo.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "name, fields, layout, message",
    [
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
        ("rwkv4", {"norm_eps": 1e-3}, "rwkv", "layer_norm_epsilon=0.001 is not supported"),
        ("rwkv4", {"embedding_norm": False}, "rwkv", "cannot express embedding_norm=False"),
    ],
)
def test_what_they_cannot_express_is_refused(tmp_path, name, fields, layout, message):
    with pytest.raises(ValueError, match=message):
        zoo.from_config(name + "-tiny", **fields).save_pretrained(tmp_path / "out", layout=layout)
    assert not (tmp_path / "out").exists()
