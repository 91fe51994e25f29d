"""The battery of encoder-decoders on every registered one; ids read `[led-padding_changes_nothing]`."""

import pytest
import torch

import zoo
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
