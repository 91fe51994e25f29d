"""The whole battery: properties of mixers and of models, each a name and a function of a `Subject`, of encoder-decoders of a `Pair`."""

import zoo.evaluate.generation_properties  # noqa: F401  (enters its properties)
from zoo.evaluate.conformance import MIXER_PROPERTIES, run
from zoo.evaluate.model_properties import MODEL_PROPERTIES
from zoo.evaluate.seq2seq_properties import SEQ2SEQ_PROPERTIES, Pair

__all__ = ["MIXER_PROPERTIES", "MODEL_PROPERTIES", "SEQ2SEQ_PROPERTIES", "Pair", "run"]
