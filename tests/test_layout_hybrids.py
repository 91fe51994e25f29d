"""Hybrids of transformers: parity with its models, bits kept both ways, every key accounted for."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import zoo
from zoo import registry

SIZES = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 52, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
BOTH = {"layer_types": ["linear_attention", "full_attention"]}
QWEN = BOTH | {
    "head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
}  # fmt: skip
JAMBA = {
    "num_experts": 3, "num_experts_per_tok": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8,
    "mamba_dt_rank": 4, "use_mamba_kernels": False,
}  # fmt: skip
BAMBA = {
    "attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 2,
    "mamba_chunk_size": 8,
}  # fmt: skip
OLMO = BOTH | {
    "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 16,
    "rope_parameters": {"rope_type": "default", "rope_theta": None},
}  # fmt: skip
MINIMAX = BOTH | {"head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1}
KIMI = BOTH | {
    "num_key_value_heads": 4, "moe_intermediate_size": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "v_head_dim": 10,
    "qk_nope_head_dim": 8, "num_experts_per_tok": 2, "num_local_experts": 4, "linear_head_dim": 8, "linear_num_heads": 3,
    "n_shared_experts": 2,
}  # fmt: skip
CASES = {
    "qwen3_next": ("qwen3_next", QWEN),
    "qwen3_next-dense-biased": (
        "qwen3_next",
        QWEN | {"mlp_only_layers": [1], "attention_bias": True, "linear_value_head_dim": 12, "tie_word_embeddings": True},
    ),
    "qwen3_next-odd": (
        "qwen3_next",
        QWEN
        | {"num_experts": 3, "norm_topk_prob": False, "linear_num_key_heads": 3, "linear_num_value_heads": 3}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.5}},
    ),
    "recurrent_gemma": (
        "recurrent_gemma",
        {"num_hidden_layers": 3, "num_key_value_heads": 1, "attention_window_size": 8, "tie_word_embeddings": True},
    ),
    "recurrent_gemma-wide": (
        "recurrent_gemma",
        {
            "block_types": ["attention", "recurrent"], "lru_width": 32, "attention_window_size": 5, "attention_bias": True,
            "logits_soft_cap": 5.0, "conv1d_width": 3, "tie_word_embeddings": False,
        },
    ),
    "jamba": ("jamba", JAMBA),
    "jamba-biased": ("jamba", JAMBA | {"num_experts": 1, "mamba_proj_bias": True, "mamba_conv_bias": False, "mamba_dt_rank": 3}),
    "jamba-tied": ("jamba", JAMBA | {"num_hidden_layers": 3, "attn_layer_offset": 0, "tie_word_embeddings": True, "mamba_expand": 3}),
    "bamba": ("bamba", BAMBA),
    "bamba-biased": ("bamba", BAMBA | {"mamba_proj_bias": True, "attention_bias": True, "mlp_bias": True, "mamba_n_groups": 1}),
    "bamba-tied": ("bamba", BAMBA | {"attn_layer_indices": [0], "tie_word_embeddings": True, "mamba_conv_bias": False, "mamba_d_conv": 3}),
    "lfm2": ("lfm2", {"layer_types": ["conv", "full_attention"], "block_multiple_of": 8}),
    "lfm2-biased": (
        "lfm2",
        {
            "layer_types": ["full_attention", "conv"], "conv_bias": True, "conv_L_cache": 4, "block_auto_adjust_ff_dim": False,
            "tie_word_embeddings": False,
        },
    ),
    "olmo_hybrid": ("olmo_hybrid", OLMO),
    "olmo_hybrid-biased": (
        "olmo_hybrid",
        OLMO | {"attention_bias": True, "linear_num_value_heads": 4, "linear_allow_neg_eigval": False, "tie_word_embeddings": True},
    ),
    "olmo_hybrid-turned": (
        "olmo_hybrid",
        OLMO | {"num_key_value_heads": 4, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "linear_value_head_dim": 12},
    ),
    "minimax": ("minimax", MINIMAX),
    "minimax-weighted": (
        "minimax",
        MINIMAX
        | {"full_attn_alpha_factor": 2.5, "linear_attn_alpha_factor": 3.5, "linear_attn_beta_factor": 0.5, "mlp_alpha_factor": 1.5}
        | {"sliding_window": 6, "num_local_experts": 3, "num_experts_per_tok": 2, "tie_word_embeddings": True},
    ),
    "kimi_linear": ("kimi_linear", KIMI),
    "kimi_linear-grouped": (
        "kimi_linear",
        KIMI | {"q_lora_rank": 12, "attention_bias": True, "num_local_experts": 6, "n_group": 3, "topk_group": 2, "norm_topk_prob": False},
    ),
    "kimi_linear-dense": ("kimi_linear", KIMI | {"mlp_layer_types": ["dense", "dense"], "linear_conv_kernel_dim": 3}),
}  # fmt: skip
# what does not change what a model computes, or is said by another field
FORGOTTEN = {
    "max_position_embeddings", "_name_or_path", "attention_dropout", "router_aux_loss_coef", "decoder_sparse_step",
    "output_router_logits", "use_mamba_kernels", "mamba_chunk_size", "block_auto_adjust_ff_dim", "block_multiple_of",
    "w_init_variance_scale", "linear_a_log_min", "linear_a_log_max", "linear_dt_min", "linear_dt_max", "linear_dt_init_floor",
    "router_jitter_noise", "model_max_length", "pretraining_tp", "head_dim",
}  # fmt: skip
# written as what it amounts to, or of no meaning in a model without experts
RECKONED = {
    "lfm2": {"intermediate_size"},
    "jamba-biased": {"num_experts_per_tok"},
    "kimi_linear-dense": {
        "moe_intermediate_size", "num_experts", "num_experts_per_token", "num_shared_experts", "routed_scaling_factor",
    },
}  # fmt: skip
every_case = pytest.mark.parametrize("case", CASES)


def foreign_model(case: str):
    """A tiny model of transformers with no parameter at a special value."""
    kind, fields = CASES[case]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**SIZES | fields)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.add_(torch.randn_like(buffer) * 0.1)
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """case -> (model of transformers, ours, folder it saved itself to)."""
    cache = {}

    def get(case: str):
        if case not in cache:
            theirs, folder = foreign_model(case), tmp_path_factory.mktemp(case)
            theirs.save_pretrained(folder)
            cache[case] = theirs, zoo.from_pretrained(folder), folder
        return cache[case]

    return get


def token_ids(*shape: int) -> torch.Tensor:
    return torch.randint(3, SIZES["vocab_size"], shape, generator=torch.Generator().manual_seed(1))


def assert_parity(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Within 1e-5 of the largest logit; their recurrences compute in float32 whatever the dtype, so there is nothing more exact."""
    assert ours.shape == theirs.shape and torch.isfinite(ours).all()
    error, scale = (ours - theirs).abs().max().item(), max(1.0, theirs.abs().max().item())
    assert error <= 1e-5 * scale, f"logits differ by {error:.3g} at a scale of {scale:.3g}"


@every_case
@torch.no_grad()
def test_logits_equal_those_of_transformers(saved, case):
    theirs, ours, _ = saved(case)
    for shape in ((2, 23), (1, 1), (1, 70)):
        ids = token_ids(*shape)
        assert_parity(ours(ids).logits, theirs(ids, use_cache=False).logits)


@every_case
@torch.no_grad()
def test_left_padding_and_greedy_continuation_equal_those_of_transformers(saved, case):
    theirs, ours, _ = saved(case)
    ids = token_ids(2, 11)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    given = {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}
    alone = theirs(ids[:1, 4:], use_cache=False).logits[0]
    assert_parity(ours(**given).logits[0, 4:], alone)
    options = {"max_new_tokens": 12, "do_sample": False}
    assert torch.equal(ours.generate(ids, **options), theirs.generate(ids, **options))


@every_case
def test_written_back_it_is_what_it_was(saved, case, tmp_path):
    theirs, ours, folder = saved(case)
    ours.save_pretrained(tmp_path, layout=CASES[case][0])
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    before, after = theirs.state_dict(), again.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    old, new = (json.loads((f / "config.json").read_text()) for f in (folder, tmp_path))
    assert not {n: (v, new.get(n)) for n, v in old.items() if n not in FORGOTTEN | RECKONED.get(case, set()) and new.get(n) != v}


@every_case
def test_every_key_has_a_counterpart(saved, case):
    _, ours, folder = saved(case)
    _, report = zoo.from_pretrained(folder, output_loading_info=True)
    tied = {"lm_head.weight"} if ours.config.tie_word_embeddings else set()
    assert set(report.taken.values()) | set(report.transformed) == set(ours.state_dict()) - tied
    assert not (report.fresh or report.dropped)
    layout = next(layout for layout in registry.get(ours.config.name).layouts if layout.name == CASES[case][0])
    there, _ = layout.to_zoo(layout.to_foreign(ours.state_dict(), ours), ours)
    assert all(torch.equal(there[name], tensor) for name, tensor in ours.state_dict().items() if name not in tied)


@pytest.mark.parametrize("case", [name for name in CASES if name == CASES[name][0]])
def test_half_precision_stays_half(case, tmp_path):
    ids = token_ids(1, 9)
    half = foreign_model(case).bfloat16()
    half.save_pretrained(tmp_path / "half")
    ours = zoo.from_pretrained(tmp_path / "half")
    assert ours.dtype == torch.bfloat16
    assert torch.isfinite(ours(ids).logits).all()
    ours.save_pretrained(tmp_path / "back", layout=CASES[case][0])
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert again.dtype == torch.bfloat16 and all(torch.equal(x, half.state_dict()[n]) for n, x in again.state_dict().items())


@pytest.mark.parametrize(
    "case, saved_as, published_as",
    [
        ("kimi_linear-dense", ".block_sparse_moe.", ".mlp."),
        ("olmo_hybrid", "layers.1.feedforward_layer_norm.", "layers.1.post_attention_layernorm."),
    ],
)
@torch.no_grad()
def test_names_of_published_checkpoints_are_read(saved, case, saved_as, published_as, tmp_path):
    _, ours, folder = saved(case)
    tensors = load_file(folder / "model.safetensors")
    renamed = {name.replace(saved_as, published_as): tensor for name, tensor in tensors.items()}
    assert renamed.keys() != tensors.keys()
    save_file(renamed, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    ids = token_ids(1, 7)
    assert torch.equal(zoo.from_pretrained(tmp_path)(ids).logits, ours(ids).logits)


@pytest.mark.parametrize(
    "case, changes, message",
    [
        ("qwen3_next", {"hidden_act": "gelu"}, "a qwen3_next with hidden_act='gelu' is not supported, only hidden_act='silu'"),
        ("recurrent_gemma", {"intermediate_size": 51}, "odd intermediate_size"),
        ("bamba", {"time_step_limit": [0.0, 1.0]}, "time_step_limit"),
        ("kimi_linear", {"tie_word_embeddings": True}, "tie_word_embeddings=True"),
    ],
)
def test_what_we_cannot_express_is_refused(saved, case, changes, message, tmp_path):
    _, _, folder = saved(case)
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError, match=message):
        zoo.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", sorted({kind for kind, _ in CASES.values()}))
@torch.no_grad()
def test_what_is_made_here_is_read_there(name, tmp_path):
    ours, ids = zoo.from_config(f"{name}-tiny").eval(), token_ids(2, 13)
    ours.save_pretrained(tmp_path, layout=name)
    theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_parity(ours(ids).logits, theirs(ids, use_cache=False).logits)


def test_what_they_cannot_express_is_refused(tmp_path):
    model = zoo.from_config("qwen3_next-tiny", norm="rmsnorm")
    with pytest.raises(ValueError, match="cannot express norm='rmsnorm'"):
        model.save_pretrained(tmp_path / "out", layout="qwen3_next")
