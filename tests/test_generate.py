"""Writing text, with the smallest models and a tokenizer of bytes."""

import io
import json

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import zoo
from zoo.__main__ import main
from zoo.generate import encode, generate, load_language_model, position_limit

TEMPLATE = "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }};{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
PROMPTS = ["Once upon", "a", "naïve 世界"]


def byte_tokenizer(**fields) -> PreTrainedTokenizerFast:
    """Bytes as tokens 0 to 255, and 256 to begin and end with."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(letters)}, merges=[]))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, **{"bos_token": "<|end|>", "eos_token": "<|end|>"} | fields)


def make(name: str = "gla-tiny", **fields):
    """A model with weights large enough that it has opinions."""
    torch.manual_seed(0)
    model = zoo.from_config(name, vocab_size=260, **fields)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.2)
    return model.eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    """Kinds of checkpoints, each with its tokenizer: of the zoo, of transformers in a layout that the zoo reads, and in none."""
    root, sizes = tmp_path_factory.mktemp("models"), dict(vocab_size=260, hidden_size=32, num_hidden_layers=1, intermediate_size=52)
    torch.manual_seed(0)
    made = {
        "zoo": make(),
        "llama": LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4)),
        "gpt2": GPT2LMHeadModel(GPT2Config(vocab_size=260, n_embd=32, n_layer=1, n_head=4, n_positions=64)),
    }
    for name, model in made.items():
        model.save_pretrained(root / name)
        byte_tokenizer(chat_template=TEMPLATE).save_pretrained(root / name)
    return {name: str(root / name) for name in made}


@pytest.mark.parametrize("kind", ["zoo", "llama", "gpt2"])
def test_a_folder_is_loaded_whoever_wrote_it(folders, kind):
    model, tokenizer = load_language_model(folders[kind])
    assert isinstance(model.config, zoo.ZooConfig) and not model.training
    if kind != "zoo":
        original, _ = load_language_model(folders[kind], original=True)
        assert not isinstance(original.config, zoo.ZooConfig)
        assert generate(original, tokenizer, PROMPTS, max_new_tokens=6) == generate(model, tokenizer, PROMPTS, max_new_tokens=6)
        assert position_limit(original) == position_limit(model) == (64 if kind == "gpt2" else None)


def test_a_model_that_the_zoo_does_not_read_stays_with_transformers(tmp_path):
    from transformers import OPTConfig, OPTForCausalLM

    assert "opt" not in zoo.layouts()
    sizes = dict(hidden_size=32, ffn_dim=52, num_hidden_layers=1, num_attention_heads=4, word_embed_proj_dim=32)
    OPTForCausalLM(OPTConfig(vocab_size=260, max_position_embeddings=32, **sizes)).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    model, _ = load_language_model(tmp_path)
    assert isinstance(model, OPTForCausalLM) and position_limit(model) == 32


def test_batches_are_as_each_prompt_alone():
    model, tokenizer = make(), byte_tokenizer()
    alone = [generate(model, tokenizer, [prompt], max_new_tokens=12)[0] for prompt in PROMPTS]
    assert generate(model, tokenizer, PROMPTS, max_new_tokens=12, batch=2) == alone
    ids = torch.tensor([encode(model, tokenizer, PROMPTS[0])])
    out = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=256, pad_token_id=256)
    assert tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True) == alone[0]


def test_sampling_follows_its_seed_and_top_k_of_one_is_greedy():
    model, tokenizer = make(), byte_tokenizer()
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(generate(model, tokenizer, PROMPTS, max_new_tokens=12, temperature=2.0))
    assert drawn[0] == drawn[1] != drawn[2]
    greedy = generate(model, tokenizer, PROMPTS, max_new_tokens=12)
    assert generate(model, tokenizer, PROMPTS, max_new_tokens=12, temperature=1.0, top_k=1) == greedy


def test_conversations_go_through_the_template():
    model, tokenizer = make(), byte_tokenizer(chat_template=TEMPLATE)
    turns = [{"role": "user", "content": "hi"}]
    assert tokenizer.decode(encode(model, tokenizer, turns)) == "u:hi;a:"
    assert generate(model, tokenizer, [turns], max_new_tokens=4) == generate(model, tokenizer, ["u:hi;a:"], max_new_tokens=4)


def test_the_command_streams_writes_files_and_talks(folders, tmp_path, capsys, monkeypatch):
    model, tokenizer = load_language_model(folders["zoo"])
    short, chat = ["--max-new-tokens", "6"], [{"role": "system", "content": "S"}, {"role": "user", "content": "hi"}]
    assert main(["generate", folders["zoo"], "Once", *short]) == 0
    assert capsys.readouterr().out == generate(model, tokenizer, ["Once"], max_new_tokens=6)[0] + "\n"

    assert main(["generate", folders["zoo"], "--chat", "hi", "--system", "S", *short]) == 0
    assert capsys.readouterr().out == generate(model, tokenizer, [chat], max_new_tokens=6)[0] + "\n"

    (tmp_path / "prompts").write_text("\n".join([*PROMPTS, ""]), encoding="utf-8")
    assert main(["generate", folders["zoo"], "--file", f"{tmp_path}/prompts", "-o", f"{tmp_path}/out", "--batch", "2", *short]) == 0
    lines = [json.loads(line) for line in (tmp_path / "out").read_text(encoding="utf-8").splitlines()]
    assert [line["prompt"] for line in lines] == PROMPTS
    assert [line["text"] for line in lines] == generate(model, tokenizer, PROMPTS, max_new_tokens=6)
    capsys.readouterr()

    monkeypatch.setattr("sys.stdin", io.StringIO("hi\nand?\n\nnot read\n"))
    assert main(["generate", folders["zoo"], "--chat", "--system", "S", *short]) == 0
    first = generate(model, tokenizer, [chat], max_new_tokens=6)[0]
    more = [*chat, {"role": "assistant", "content": first}, {"role": "user", "content": "and?"}]
    assert capsys.readouterr().out == f"{first}\n{generate(model, tokenizer, [more], max_new_tokens=6)[0]}\n"


def test_bad_input_is_named(folders, tmp_path):
    model, tokenizer = make(), byte_tokenizer()
    bare = byte_tokenizer(bos_token=None, eos_token=None)
    for arguments, options, message in (
        ((model, tokenizer, []), {}, "there is no prompt"),
        ((model, bare, [""]), {}, "the prompt is empty"),
        ((model, tokenizer, [[{"role": "user", "content": "hi"}]]), {}, "has no chat template"),
        ((model, tokenizer, ["a"]), {"temperature": -1.0}, "temperature=-1.0"),
        ((model, tokenizer, ["a"]), {"top_p": 0.5}, "must be positive to sample"),
        ((zoo.from_config("gla-tiny", vocab_size=50), tokenizer, ["z"]), {}, r"vocabulary of 50; the tokenizer belongs to another"),
        ((load_language_model(folders["gpt2"])[0], tokenizer, ["a" * 60]), {"max_new_tokens": 5}, "has 65 tokens.* ends at 64"),
    ):
        with pytest.raises(ValueError, match=message):
            generate(*arguments, **options)
    assert generate(model, tokenizer, [""], max_new_tokens=2) == generate(model, tokenizer, ["<|end|>"], max_new_tokens=2)
    with pytest.raises(ValueError, match="does not exist; name a folder"):
        load_language_model(tmp_path / "none")
    with pytest.raises(ValueError, match=r"has no config\.json"):
        load_language_model(tmp_path)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no tokenizer that loads; name the folder"):
        load_language_model(tmp_path)
    assert load_language_model(tmp_path, tokenizer=folders["zoo"])[1].eos_token_id == 256
