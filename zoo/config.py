"""What a checkpoint says about its architecture: shared sizes, and for each layer its mixer and channel mixer."""

import dataclasses
import difflib
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

# what transformers itself writes into or passes beside a config without declaring it as a field
_FOREIGN = {
    "_name_or_path", "_commit_hash", "name_or_path", "model_type", "torch_dtype", "num_labels", "auto_map", "attn_implementation",
    "experts_implementation", "output_attentions", "quantization_config", "_attn_implementation_internal",
    "_experts_implementation_internal", "_output_attentions", "max_length", "zoo_version",
}  # fmt: skip


def nearest(name: str, known) -> str:
    """` (did you mean 'x'?)` for the closest known name, or an empty string."""
    close = difflib.get_close_matches(str(name), [str(k) for k in known], n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


@strict
class ZooConfig(PreTrainedConfig):
    """Fields every architecture shares. A family's config adds the few fields of its mixer.

    Unknown fields are errors. No field is about speed: backends are chosen at the call.
    """

    name: ClassVar[str] = ""  # registry name, set by `register`
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    vocab_size: int = 32000
    hidden_size: int = 1024  # D
    num_hidden_layers: int = 24
    causal: bool = True  # False: every token sees the whole sequence, where the mixer can
    channel_mixer: str | None = "swiglu"  # a name of zoo.list_channel_mixers(), None for a block without one
    channel_args: dict | None = None  # further arguments of the channel mixer
    intermediate_size: int | None = None  # width inside the channel mixer; None: the channel mixer's own rule
    norm: str = "rmsnorm"  # rmsnorm, unit_rmsnorm (weight stored as offset from one), layernorm, or biasless_layernorm
    norm_eps: float = 1e-5
    post_norm: bool = False  # normalise after the residual sum instead of before the mixer
    input_norms: bool = True  # False: no norm before the mixers (with `output_norms`, so that there is one behind)
    first_norm: bool = True  # False: no norm before the first mixer (with `embedding_norm`, so that its input is normalised)
    learned_state: bool = False  # sequences begin from learned states (not of attention, which holds single tokens)
    output_norms: bool = False  # norms also on what both mixers return, before it is added
    parallel_residual: bool = False  # both mixers read the block's input, each through its own norm
    residual_weights: list[float] | None = None  # a, b of the mixer's sum `a x + b y`, then of the channel mixer's; None: all 1
    embedding_norm: bool = False  # a norm between embedding and first block
    embedding_projection: bool = False  # a linear map behind that norm
    embedding_scale: float = 1.0  # embeddings are multiplied by this
    max_position_embeddings: int | None = None  # rows of a learned position table; None: no table, any length
    position_offset: int = 0  # the row of that table for the first token; those before it are not used
    token_types: int = 0  # rows of a learned table of token types; 0: no table
    logit_scale: float = 1.0  # the language model's logits are multiplied by this
    logit_softcap: float | None = None  # c tanh(logits / c), after the scale
    head_args: dict | None = None  # arguments of the `zoo.model.Transform` before the decoder of masked language models
    pooler_args: dict | None = None  # of one on the state of the first token (if causal of the last); None: no pooler
    classifier_args: dict | None = None  # of one before the classifier of sequences; None: it reads the pooler, or the state itself
    classifier_mean: bool = False  # this classifier reads the mean of all states instead of one
    token_classifier_args: dict | None = None  # of one before the classifier of tokens, and before the head that marks answers
    answer_block: bool = False  # this head has a channel mixer before it, with a norm behind the residual sum
    initializer_range: float = 0.02  # standard deviation of linear and embedding weights
    tie_word_embeddings: bool = False
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs):
        fields = {f.name for f in dataclasses.fields(self)}
        for key in kwargs:
            if key not in _FOREIGN:
                raise ValueError(f"{type(self).__name__} has no field {key!r}{nearest(key, fields)}")
        for key in ("max_length", "zoo_version"):
            kwargs.pop(key, None)
        super().__post_init__(**kwargs)

    def validate_sizes(self):
        """Sizes must be positive."""
        for field in ("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size", "max_position_embeddings"):
            value = getattr(self, field)
            if value is not None and value <= 0:
                raise ValueError(f"{type(self).__name__}: {field} is {value}, it must be positive")
        for field in ("position_offset", "token_types"):
            if getattr(self, field) < 0:
                raise ValueError(f"{type(self).__name__}: {field} is {getattr(self, field)}, it must not be negative")
        if self.position_offset >= (self.max_position_embeddings or 1):
            raise ValueError(
                f"{type(self).__name__}: position_offset={self.position_offset} leaves no row of "
                f"max_position_embeddings={self.max_position_embeddings}; choose a smaller one"
            )

    def validate_norm(self):
        """The norm must be one the block can build."""
        known = ("rmsnorm", "unit_rmsnorm", "layernorm", "biasless_layernorm")
        if self.norm not in known:
            raise ValueError(f"{type(self).__name__}: norm {self.norm!r} is unknown; choose one of {', '.join(known)}")
        if self.post_norm and not self.first_norm:
            raise ValueError(f"{type(self).__name__}: with post_norm no norm stands before a mixer; leave first_norm=True")
        if self.post_norm and (self.output_norms or self.parallel_residual):
            raise ValueError(f"{type(self).__name__}: post_norm goes with neither output_norms nor parallel_residual; choose one")

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoConfig"):
        """Nothing to do: the code is installed. transformers calls this after `trust_remote_code=True`, and would from then on copy
        source files beside every checkpoint that is saved."""

    def shared_fields(self) -> dict[str, Any]:
        """The fields of ZooConfig itself, which a hybrid hands to the configs of its layers."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(ZooConfig) if f.name in _SHARED}

    def layer_configs(self) -> list["ZooConfig"]:
        """The config of every layer, in order; its class's `name` says which mixer. A pure model repeats itself.

        A plain ZooConfig, which has no name, is a layer with a channel mixer alone.
        """
        return [self] * self.num_hidden_layers

    def divide(self, whole: str, parts: str) -> int:
        """`whole / parts` for two field names, or an error that names both."""
        total, count = getattr(self, whole), getattr(self, parts)
        if count <= 0 or total % count:
            raise ValueError(f"{type(self).__name__}: {whole}={total} is not divisible by {parts}={count}")
        return total // count

    def divide_heads(self) -> None:
        """Raise unless heads have whole channels of the width, where no `head_dim` is given, and share groups of keys evenly."""
        if self.head_dim is None:
            self.divide("hidden_size", "num_heads")
        if self.num_kv_heads is not None:
            self.divide("num_heads", "num_kv_heads")


_SHARED = {f.name for f in dataclasses.fields(ZooConfig)} - {f.name for f in dataclasses.fields(PreTrainedConfig)}
