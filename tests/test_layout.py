"""Foreign checkpoints: parity with the library they come from, bits kept both ways, and strictness about every key."""

import copy
import json

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

import zoo
from zoo import registry
from zoo.evaluate.closeness import assert_close
from zoo.layout import Layout, drop, fresh, get_layout, mapped, merge, rename, split, transpose

SIZES = {
    "vocab_size": 97, "hidden_size": 36, "intermediate_size": 52, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
STRETCHED = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
BIASED = {"attention_bias": True, "mlp_bias": True}
CASES = {
    "llama": ("llama", {}),
    "llama-tied-biased": (
        "llama",
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "hidden_act": "gelu_pytorch_tanh"},
    ),
    "llama-stretched": ("llama", {"rope_parameters": STRETCHED | {"original_max_position_embeddings": 16}, "num_key_value_heads": 6}),
    "llama-linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5}, "head_dim": 10}),
    "mistral-window": ("mistral", {"sliding_window": 5}),
    "mistral": ("mistral", {"sliding_window": None, "head_dim": 14}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen2-window": ("qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 0}),
    "qwen3": ("qwen3", {"head_dim": 8, "rms_norm_eps": 1e-3}),
    "qwen3-biased": ("qwen3", {"head_dim": 8, "attention_bias": True, "num_key_value_heads": 1}),
}
FORGOTTEN = {"max_position_embeddings", "_name_or_path", "attention_dropout", "pretraining_tp", "max_window_layers"}
every_case = pytest.mark.parametrize("case", CASES)


def foreign_model(case: str, auto=AutoModelForCausalLM, **more):
    """A tiny model of transformers with no parameter at a special value."""
    kind, fields = CASES[case]
    torch.manual_seed(0)
    model = auto.from_config(CONFIG_MAPPING[kind](**SIZES | fields | more)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """case -> (model of transformers, folder it saved itself to)."""
    cache = {}

    def get(case: str):
        if case not in cache:
            model = foreign_model(case)
            cache[case] = model, tmp_path_factory.mktemp(case)
            model.save_pretrained(cache[case][1])
        return cache[case]

    return get


def token_ids(*shape: int) -> torch.Tensor:
    return torch.randint(3, SIZES["vocab_size"], shape, generator=torch.Generator().manual_seed(1))


def write_config(folder, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@every_case
@torch.no_grad()
def test_logits_equal_those_of_transformers(saved, case):
    theirs, folder = saved(case)
    ours, ids = zoo.from_pretrained(folder), token_ids(2, 23)
    assert_close(ours(ids).logits, theirs(ids).logits, copy.deepcopy(theirs).double()(ids).logits, "logits")


@every_case
@torch.no_grad()
def test_left_padding_and_greedy_continuation_equal_those_of_transformers(saved, case):
    theirs, folder = saved(case)
    ours, ids = zoo.from_pretrained(folder), token_ids(2, 11)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    given = {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}
    exact = copy.deepcopy(theirs).double()(ids[:1, 4:]).logits[0]
    assert_close(ours(**given).logits[0, 4:], theirs(**given).logits[0, 4:], exact, "the padded row")
    options = {"max_new_tokens": 12, "do_sample": False}
    assert torch.equal(ours.generate(**given, **options), theirs.generate(**given, **options))


def check_written_back(theirs, folder, target, layout: str, forgotten: set[str]) -> None:
    """Saved in its layout again, a model is what it was: transformers reads equal bits, and the config the same but for `forgotten`."""
    zoo.from_pretrained(folder).save_pretrained(target, layout=layout)
    again, info = AutoModelForCausalLM.from_pretrained(target, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    before, after = theirs.state_dict(), again.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    old, new = (json.loads((f / "config.json").read_text()) for f in (folder, target))
    assert not {n: (v, new.get(n)) for n, v in old.items() if n not in forgotten and new.get(n) != v}


@every_case
def test_written_back_it_is_what_it_was(saved, case, tmp_path):
    theirs, folder = saved(case)
    check_written_back(theirs, folder, tmp_path, CASES[case][0], FORGOTTEN)


@every_case
def test_every_key_has_one_counterpart(saved, case):
    theirs, folder = saved(case)
    ours, report = zoo.from_pretrained(folder, output_loading_info=True)
    layout = get_layout(registry.get("transformer"), CASES[case][0])
    tied = {"lm_head.weight"} if ours.config.tie_word_embeddings else set()
    assert set(report.taken) == set(theirs.state_dict()) - tied
    assert set(report.taken.values()) == set(ours.state_dict()) - tied
    assert not (report.transformed or report.fresh or report.dropped)
    back = layout.to_foreign(ours.state_dict(), ours)
    assert back.keys() == set(report.taken)
    there, _ = layout.to_zoo(back, ours)
    assert all(torch.equal(there[name], tensor) for name, tensor in ours.state_dict().items() if name not in tied)


def test_one_key_too_few_too_many_or_misshapen_is_named(saved):
    theirs, folder = saved("llama")
    ours, state = zoo.from_pretrained(folder), theirs.state_dict()
    layout = registry.get("transformer").layouts[0]
    for name in state:
        with pytest.raises(ValueError, match=rf"missing 1: {name}$"):
            layout.to_zoo({n: t for n, t in state.items() if n != name}, ours)
        with pytest.raises(ValueError, match=rf"unknown 1: {name}x$"):
            layout.to_zoo(state | {name + "x": state[name]}, ours)
        with pytest.raises(ValueError, match=rf"^{name}: .* in the checkpoint, but .* in the model"):
            layout.to_zoo(state | {name: state[name][..., 1:]}, ours)
        renamed = {n + "x" if n == name else n: t for n, t in state.items()}
        with pytest.raises(ValueError, match=rf"missing 1: {name} \(did you mean '{name}x'\?\)"):
            layout.to_zoo(renamed, ours)
    own = ours.state_dict()
    own.pop("model.norm.weight")
    with pytest.raises(ValueError, match=r"missing 1: model\.norm\.weight"):
        layout.to_foreign(own, ours)


def test_declared_drops_and_tied_copies_are_reported(saved):
    theirs, folder = saved("llama-tied-biased")
    ours = zoo.from_pretrained(folder)
    buffer = "model.layers.1.self_attn.rotary_emb.inv_freq"
    _, report = registry.get("transformer").layouts[0].to_zoo(theirs.state_dict() | {buffer: torch.zeros(3)}, ours)
    assert report.dropped.keys() == {buffer, "lm_head.weight"}
    assert "rope_theta" in report.dropped[buffer] and "tied" in report.dropped["lm_head.weight"]


def fused_layout(*extra) -> Layout:
    """An invented one that uses every kind of rule, for `transformer-tiny`."""
    return Layout(
        "fused", ("fused",), dict, lambda config: {}, prefix="body.",
        rules=(
            merge(["body.embed.low", "body.embed.high"], "model.embed_tokens.weight"),
            split("body.{}.in", ["model.layers.{}.mixer.q_proj.weight", "model.layers.{}.mixer.k_proj.weight"]),
            rename("body.{}.{value,out}", "model.layers.{}.mixer.{v,out}_proj.weight"),
            transpose("body.{}.{w1,w3}", "model.layers.{}.channel_mixer.{gate,up}_proj.weight"),
            merge(["body.{}.left", "body.{}.right"], "model.layers.{}.channel_mixer.down_proj.weight", 1, lambda config: [50, 78]),
            mapped("body.{}.scale", "model.layers.{}.mixer_norm.weight", lambda x: x[0], lambda x: x[None]),
            fresh("model.layers.{}.channel_norm.weight"),
            rename("body.norm", "model.norm.weight"),
            rename("head", "lm_head.weight"),
            drop("body.rubbish.{}", "nobody knows"),
            *extra,
        ),
    )  # fmt: skip


def test_every_kind_of_rule_undoes_itself():
    model, layout = zoo.from_config("transformer-tiny"), fused_layout()
    foreign = layout.to_foreign(model.state_dict(), model)
    assert foreign["body.1.in"].shape == (48, 32) and foreign["body.0.w1"].shape == (32, 128)
    assert (
        foreign["body.1.left"].shape == (32, 50)
        and foreign["body.embed.low"].shape == (128, 32)
        and foreign["body.0.scale"].shape == (1, 32)
    )
    own, report = layout.to_zoo(foreign | {"body.rubbish.7": torch.zeros(1)}, model)
    assert report.dropped == {"body.rubbish.7": "nobody knows"}
    assert report.fresh == [f"model.layers.{i}.channel_norm.weight" for i in range(2)]
    assert report.transformed["model.layers.0.mixer.k_proj.weight"] == ["body.0.in"]
    for made in (foreign, {name: own[name] for name in report.transformed}):
        assert all(tensor.is_contiguous() for tensor in made.values())
        assert len({tensor.untyped_storage().data_ptr() for tensor in made.values()}) == len(made)
    assert own.keys() == model.state_dict().keys() - set(report.fresh)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in own.items())
    for name in foreign:
        with pytest.raises(ValueError, match=rf"missing 1: {name}$"):
            layout.to_zoo({n: t for n, t in foreign.items() if n != name}, model)
    with pytest.raises(ValueError, match=r"body\.0\.in cannot become .*: it is \[47, 32\]"):
        layout.to_zoo(foreign | {"body.0.in": torch.zeros(47, 32)}, model)


def test_rules_that_cannot_be_followed_are_refused():
    with pytest.raises(ValueError, match=r"slots of .* differ"):
        rename("a.{}.{x,y}", "b.{}")
    model = zoo.from_config("transformer-tiny")
    with pytest.raises(ValueError, match=r"2 rules for our key lm_head\.weight"):
        fused_layout(rename("other_head", "lm_head.weight")).to_foreign(model.state_dict(), model)
    with pytest.raises(ValueError, match=r"no rule for our key model\.layers\.0\.mixer\.q_proj\.bias"):
        biased = zoo.from_config("transformer-tiny", qkv_bias=True)
        fused_layout().to_foreign(biased.state_dict(), biased)
    family = registry.get("transformer")
    with pytest.raises(ValueError, match="model type 'llama' is read by the layout 'llama' already"):
        config = type("AnotherConfig", (family.config,), {"model_type": "zoo_another"})
        parts = {"mixer": family.mixer, "presets": family.presets, "layouts": family.layouts}
        registry.register("another", config=config, title="", paper="", **parts)


def test_shards_and_pickles_load_and_damage_is_named(saved, tmp_path):
    theirs, _ = saved("llama")
    ids = token_ids(1, 5)
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 2
    expected = zoo.from_pretrained(tmp_path)(ids).logits
    whole = shards[1].read_bytes()
    shards[1].write_bytes(whole[:-10])
    with pytest.raises(ValueError, match=rf"{shards[1].name} is truncated"):
        zoo.from_pretrained(tmp_path)
    shards[1].unlink()
    with pytest.raises(OSError, match=shards[1].name):
        zoo.from_pretrained(tmp_path)
    for path in tmp_path.glob("*.safetensors*"):
        path.unlink()
    with pytest.raises(ValueError, match=r"neither model\.safetensors nor pytorch_model\.bin"):
        zoo.from_pretrained(tmp_path)
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    assert torch.equal(zoo.from_pretrained(tmp_path)(ids).logits, expected)
    damaged = (tmp_path / "pytorch_model.bin").read_bytes()[:-2000]
    (tmp_path / "pytorch_model.bin").write_bytes(damaged)
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is truncated"):
        zoo.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "case, changes, message",
    [
        ("llama", {"model_type": "lama"}, "no layout for checkpoints of model_type 'lama' .did you mean 'llama'"),
        ("llama", {"hidden_act": "tanh"}, "hidden_act 'tanh'"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope_type 'dynamic' is not supported"),
        ("qwen2-window", {"max_window_layers": 1, "layer_types": None}, "layer_types mixes"),
    ],
)
def test_what_we_cannot_express_is_refused(tmp_path, case, changes, message):
    foreign_model(case).save_pretrained(tmp_path)
    write_config(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        zoo.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "fields, layout, message",
    [
        ({}, "lama", "'transformer' has no layout 'lama' .did you mean 'llama'"),
        ({"window": 4}, "llama", "cannot express window=4"),
        ({"qk_norm": True}, "qwen2", "cannot express qk_norm=True"),
        ({"softcap": 9.0, "post_norm": True}, "mistral", "cannot express post_norm=True, softcap=9.0"),
        ({"rope_theta": None}, "qwen3", "rope_theta=None"),
        ({"qkv_bias": True}, "llama", "cannot express qkv_bias=True"),
        ({"channel_mixer": "mlp"}, "llama", "cannot express channel_mixer='mlp'"),
    ],
)
def test_what_they_cannot_express_is_refused(tmp_path, fields, layout, message):
    with pytest.raises(ValueError, match=message):
        zoo.from_config("transformer-tiny", **fields).save_pretrained(tmp_path / "out", layout=layout)
    assert not (tmp_path / "out").exists()


@torch.no_grad()
def test_other_tasks_keep_the_body(saved, tmp_path):
    theirs, folder = saved("llama")
    ours, report = zoo.from_pretrained(folder, task="token_classification", output_loading_info=True)
    assert report.fresh == ["score.weight", "score.bias"] and list(report.dropped) == ["lm_head.weight"]
    assert torch.isfinite(ours.score.weight).all() and ours.score.weight.std() > 0 and not ours.score.bias.any()
    base = zoo.from_pretrained(folder, task="base")
    base.save_pretrained(tmp_path / "base", layout="llama")
    body, ids = AutoModel.from_pretrained(tmp_path / "base"), token_ids(1, 9)
    assert all(torch.equal(tensor, theirs.model.state_dict()[name]) for name, tensor in body.state_dict().items())
    assert torch.equal(zoo.from_pretrained(tmp_path / "base")(ids).last_hidden_state, base(ids).last_hidden_state)
    judge = foreign_model("qwen3", AutoModelForSequenceClassification, num_labels=5)
    judge.save_pretrained(tmp_path / "judge")
    ours = zoo.from_pretrained(tmp_path / "judge")
    assert type(ours).__name__ == "TransformerForSequenceClassification" and ours.config.num_labels == 5
    assert_close(ours(ids).logits, judge(ids).logits, copy.deepcopy(judge).double()(ids).logits, "class logits")


def test_dtype_is_honoured(saved, tmp_path):
    theirs, folder = saved("qwen2-tied")
    assert zoo.from_pretrained(folder).dtype == torch.float32
    assert zoo.from_pretrained(folder, dtype=torch.bfloat16).dtype == torch.bfloat16
    copy.deepcopy(theirs).bfloat16().save_pretrained(tmp_path / "half")
    ours = zoo.from_pretrained(tmp_path / "half")
    assert ours.dtype == torch.bfloat16 and ours.lm_head.weight is ours.model.embed_tokens.weight
    ours.save_pretrained(tmp_path / "back", layout="qwen2", max_shard_size="10KB", max_position_embeddings=77)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert again.dtype == torch.bfloat16 and again.config.max_position_embeddings == 77
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 2
