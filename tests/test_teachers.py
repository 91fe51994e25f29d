"""Teachers of every family: loaded as transformers computes them, equal to a student with their own attention, read whole or in parts."""

import pytest
import torch
import transformers

from zoo.convert import check_logits, convert, load_teacher, seed_student
from zoo.convert.headers import read_blueprint
from zoo.convert.plan import make_plan
from zoo.convert.recipe import load_recipe
from zoo.convert.stream import Shelf

SIZES = dict(
    vocab_size=97, hidden_size=32, intermediate_size=52, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
ALONE = {name: value for name, value in SIZES.items() if name != "num_key_value_heads"}
TEACHERS = {
    "llama": ("Llama", SIZES | {"attention_bias": True}),
    "mistral": ("Mistral", SIZES | {"sliding_window": 7}),
    "qwen2": ("Qwen2", SIZES | {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", SIZES | {"head_dim": 12}),
    "gemma2": ("Gemma2", SIZES | {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 9}),
    "phi3": ("Phi3", SIZES),
    "gpt2": ("GPT2", dict(vocab_size=97, n_embd=32, n_layer=3, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2)),
    "gpt_neox": ("GPTNeoX", ALONE),
}


@pytest.fixture(params=TEACHERS)
def path(request, tmp_path):
    name, fields = TEACHERS[request.param]
    head = "LMHeadModel" if name == "GPT2" else "ForCausalLM"
    torch.manual_seed(0)
    model = getattr(transformers, name + head)(getattr(transformers, f"{name}Config")(**fields))
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape) * 0.1)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    return str(tmp_path)


def test_a_teacher_of_any_family_is_converted(path):
    teacher = load_teacher(path, dtype=torch.float32)
    ids = torch.randint(0, 97, (2, 30), generator=torch.Generator().manual_seed(1))
    check_logits(teacher, path, ids)
    same = convert(teacher, mixer="transformer", window=None)
    assert torch.equal(same(ids).logits, teacher(ids).logits), "the maps from teacher to student change it"
    student = convert(teacher, mixer="gla", keep=[1], window=6, sinks=2)
    account = seed_student(teacher, student)
    assert account.copied == set(teacher.state_dict()) and student(ids).logits.isfinite().all()
    plan = make_plan(read_blueprint(path), load_recipe("zoo", {"keep": [1], "mixer": "gla", "window": 6, "sinks": 2}))
    assert plan.strip == "X A X" and plan.weights["student"].parameters == sum(p.numel() for p in student.parameters())
    shelf = Shelf(path)
    for index, block in enumerate(teacher.model.layers):
        own = shelf.block(index).state_dict()
        assert all(torch.equal(own[name], weight) for name, weight in block.state_dict().items())


def test_a_gemma_that_scales_otherwise_is_refused(tmp_path):
    torch.manual_seed(0)
    fields = TEACHERS["gemma2"][1] | {"query_pre_attn_scalar": 12}
    transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**fields)).save_pretrained(tmp_path)
    for read in (load_teacher, Shelf, read_blueprint):
        with pytest.raises(ValueError, match="query_pre_attn_scalar=12 beside head_dim=8 cannot be a teacher"):
            read(str(tmp_path))
