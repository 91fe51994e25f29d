"""The battery of encoder-decoders on every registered one; ids read `[led-padding_changes_nothing]`."""

import pytest
import torch
import transformers

import zoo
from zoo.evaluate.parity import close
from zoo.evaluate.seq2seq_properties import SEQ2SEQ_PROPERTIES, Pair


@pytest.mark.parametrize("check", [pytest.param(check, id=label) for label, check in SEQ2SEQ_PROPERTIES.items()])
@pytest.mark.parametrize("name", zoo.list_models(encoder_decoder=True))
def test_encoder_decoder(name, check):
    check(Pair(name))


def test_what_does_not_fit_is_refused():
    model, ids = zoo.from_config("led-tiny"), torch.ones(2, 4, dtype=torch.long)
    with pytest.raises(ValueError, match="it has base, seq2seq_lm"):
        zoo.from_config("led-tiny", task="causal_lm")
    with pytest.raises(ValueError, match="pass one source for each"):
        model(ids, decoder_input_ids=ids[:1])
    with pytest.raises(ValueError, match="cross attention has no source"):
        model.model.decoder(inputs_embeds=torch.zeros(1, 3, 32))


@torch.no_grad()
def test_global_tokens_of_an_led_are_chosen_at_the_call(tmp_path):
    """Forwards and generating, alone and padded; `num_global_tokens` says the same of the first ones."""
    torch.manual_seed(0)
    config = transformers.LEDConfig(
        vocab_size=97, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=52, decoder_ffn_dim=52, max_encoder_position_embeddings=128, max_decoder_position_embeddings=64,
        attention_window=4, init_std=0.3,
    )  # fmt: skip
    theirs = transformers.LEDForConditionalGeneration(config).eval()
    theirs.save_pretrained(tmp_path)
    ours, ids, written = zoo.from_pretrained(tmp_path), torch.randint(3, 97, (2, 23)), torch.randint(3, 97, (2, 6))
    mask = torch.ones_like(ids)
    mask[1, 15:] = 0
    marks = torch.zeros_like(ids)
    marks[0, 9] = marks[:, 0] = 1
    given = {"attention_mask": mask, "global_attention_mask": marks}
    expected = theirs(ids, decoder_input_ids=written, **given).logits
    close(ours(ids, decoder_input_ids=written, **given).logits, expected, "logits")
    assert not torch.allclose(ours(ids, decoder_input_ids=written, attention_mask=mask).logits, expected), "the mask changes nothing"
    for way in ({}, {"num_beams": 3}):
        options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False} | way
        assert torch.equal(ours.generate(ids, **given, **options), theirs.generate(ids, **given, **options))
    first = zoo.from_config(type(ours.config)(**ours.config.to_dict() | {"num_global_tokens": 1})).eval()
    first.load_state_dict(ours.state_dict())
    marks[0, 9] = 0
    close(first(ids, mask, written).logits, ours(ids, decoder_input_ids=written, **given).logits, "the first token")
