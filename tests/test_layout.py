"""Foreign checkpoints: rules that undo themselves, strictness about every key, other tasks and files. Parity is test_parity.py's."""

import copy
import json

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

import zoo
from zoo import registry
from zoo.evaluate.trial import find, foreign_config, make_trial
from zoo.layout import Layout, drop, fresh, mapped, merge, rename, split, transpose


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A tiny model of transformers, saved by it, and ours."""
    return make_trial(find("llama"), "plain", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    """The same with tied embeddings."""
    return make_trial(find("qwen2"), "tied", tmp_path_factory.mktemp("qwen2"))


def write_config(folder, layout: str, trial: str, **changes) -> None:
    """The config of a trial with these changes, as transformers would write it."""
    foreign_config(find(layout), find(layout).trials[trial]).save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_one_key_too_few_too_many_or_misshapen_is_named(llama):
    ours, state, layout = llama.ours, llama.theirs.state_dict(), llama.layout
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


def test_declared_drops_and_tied_copies_are_reported(tied):
    buffer = "model.layers.1.self_attn.rotary_emb.inv_freq"
    _, report = tied.layout.to_zoo(tied.theirs.state_dict() | {buffer: torch.zeros(3)}, tied.ours)
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


def test_shards_and_pickles_load_and_damage_is_named(llama, tmp_path):
    theirs, ids = llama.theirs, llama.tokens(1, 5)
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


@torch.no_grad()
def test_other_tasks_keep_the_body(llama, tmp_path):
    folder = llama.folder
    ours, report = zoo.from_pretrained(folder, task="token_classification", output_loading_info=True)
    assert report.fresh == ["score.weight", "score.bias"] and list(report.dropped) == ["lm_head.weight"]
    assert torch.isfinite(ours.score.weight).all() and ours.score.weight.std() > 0 and not ours.score.bias.any()
    base = zoo.from_pretrained(folder, task="base")
    base.save_pretrained(tmp_path, layout="llama")
    ids = llama.tokens(1, 9)
    assert torch.equal(zoo.from_pretrained(tmp_path)(ids).last_hidden_state, base(ids).last_hidden_state)
    assert torch.equal(AutoModel.from_pretrained(tmp_path).embed_tokens.weight, llama.theirs.model.embed_tokens.weight)


def test_dtype_is_honoured(tied, tmp_path):
    assert zoo.from_pretrained(tied.folder).dtype == torch.float32
    assert zoo.from_pretrained(tied.folder, dtype=torch.bfloat16).dtype == torch.bfloat16
    copy.deepcopy(tied.theirs).bfloat16().save_pretrained(tmp_path / "half")
    ours = zoo.from_pretrained(tmp_path / "half")
    assert ours.dtype == torch.bfloat16 and ours.lm_head.weight is ours.model.embed_tokens.weight
    ours.save_pretrained(tmp_path / "back", layout="qwen2", max_shard_size="10KB", max_position_embeddings=77)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert again.dtype == torch.bfloat16 and again.config.max_position_embeddings == 77
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 2
