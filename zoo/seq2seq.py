"""Encoder-decoders: one stack of blocks reads a source, another one writes, looking at what the first made of it.

Both are plans over the same registered mixers. A layer of the decoder is two blocks: a causal mixer by itself, and `CrossAttention`
with the channel mixer. The decoder's cache holds the states of the one and the source's keys and values for the other.
"""

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import initialization as init
from transformers.generation import GenerationMixin
from transformers.loss.loss_utils import ForMaskedLMLoss
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput, Seq2SeqModelOutput
from transformers.utils import can_return_tuple

from zoo import ops
from zoo.cache import ZooCache, provide_cache
from zoo.config import ZooConfig
from zoo.kernels.attention import flops
from zoo.kernels.packing import Packing
from zoo.layers import merge_heads, split_heads
from zoo.mixer import Mixer, State, Traits
from zoo.model import ZooModel, ZooPreTrainedModel
from zoo.registry import register_part


@strict
class CrossAttentionConfig(ZooConfig):
    """A block of a decoder that looks at the source."""

    name = "cross_attention"

    num_heads: int = 8
    head_dim: int | None = None  # K; None: D / H
    bias: bool = True
    scale: float | None = None  # of the logits; None: 1 / sqrt(K)


@register_part("cross_attention")
class CrossAttention(Mixer):
    """Softmax attention of the decoder's tokens to all tokens of the source (Vaswani et al. 2017, arXiv:1706.03762, section 3.2.3).

    State: `k` and `v` `[B, S, H, K]` of a source of S tokens, and `place` `[B, S]`, their positions, -1 for padding.
    """

    traits = Traits(constant_state=False, beside=True)
    lora_targets = ("q_proj", "k_proj", "v_proj", "out_proj")

    def __init__(self, config: CrossAttentionConfig, layer: int):
        super().__init__(config, layer)
        self.heads, self.scale = config.num_heads, config.scale
        self.keys = config.head_dim or config.divide("hidden_size", "num_heads")
        width, inner = config.hidden_size, self.heads * self.keys
        self.q_proj = nn.Linear(width, inner, bias=config.bias)
        self.k_proj = nn.Linear(width, inner, bias=config.bias)
        self.v_proj = nn.Linear(width, inner, bias=config.bias)
        self.out_proj = nn.Linear(inner, width, bias=config.bias)

    def initial_state(self, batch: int, length: int, dtype: torch.dtype = torch.float32, device="cpu") -> State:
        """Empty: how long the source is shows with it."""
        return {}

    def operator_flops(self, length: int) -> int:
        """With a source as long as what is written."""
        return flops(length * length, self.heads, self.keys, self.keys)

    def forward(
        self, x: Tensor, state: State | None = None, packing: Packing | None = None, source: Tensor | None = None,
        present: Tensor | None = None,
    ) -> tuple[Tensor, State]:  # fmt: skip
        """`source`: `[B, S, D]`, what the encoder made of it, read where the state does not hold it; present: `[B, S]`, without padding."""
        state = state or self.read(source, present)
        q = split_heads(self.q_proj(x), self.heads)
        q = q if packing is None else packing.pad(q)
        if q.shape[0] != state["k"].shape[0]:
            raise ValueError(f"the decoder has {q.shape[0]} sequences, but the source {state['k'].shape[0]}; pass one source for each")
        asked = torch.zeros(q.shape[:2], dtype=torch.long, device=q.device)
        rule = {"causal": False, "q_positions": asked, "kv_positions": state["place"], "scale": self.scale}
        o, _ = ops.attention(q, state["k"].to(q.dtype), state["v"].to(q.dtype), **rule)
        return self.out_proj(merge_heads(o if packing is None else packing.unpad(o))), state

    def read(self, source: Tensor | None, present: Tensor | None) -> State:
        """The state that holds this source."""
        if source is None:
            raise ValueError("cross attention has no source; run it in an encoder-decoder model")
        k, v = (split_heads(p(source), self.heads) for p in (self.k_proj, self.v_proj))
        place = torch.arange(source.shape[1], device=source.device).expand(source.shape[0], -1)
        return {"k": k, "v": v, "place": place.clone() if present is None else torch.where(present, place, -1)}


@strict
class StackConfig(ZooConfig):
    """One of the two stacks, as the whole's config describes it; it is never saved by itself."""

    @classmethod
    def of(cls, layers: list[ZooConfig]) -> "StackConfig":
        """The stack of these layers, with what their configs share."""
        config = cls(**layers[-1].shared_fields() | {"num_hidden_layers": len(layers)})
        config.layers = layers
        return config

    def layer_configs(self) -> list[ZooConfig]:
        return self.layers


@strict
class Seq2SeqConfig(ZooConfig):
    """An encoder and a decoder. The shared fields are the encoder's; `num_hidden_layers` counts its layers."""

    is_encoder_decoder: bool = True
    decoder_start_token_id: int | None = 2  # what the decoder begins with
    num_decoder_layers: int = 12
    logits_bias: bool = False  # a fixed bias of the logits, stored with the weights

    def validate_decoder(self):
        """There must be a decoder."""
        if self.num_decoder_layers < 1:
            raise ValueError(f"{type(self).__name__}: num_decoder_layers={self.num_decoder_layers} must be positive")

    def encoder_config(self) -> ZooConfig:
        """The encoder's plan."""
        raise TypeError(f"{type(self).__name__} does not define encoder_config()")

    def decoder_layer(self, layer: int) -> list[ZooConfig]:
        """The blocks of one layer of the decoder."""
        raise TypeError(f"{type(self).__name__} does not define decoder_layer(layer)")

    def decoder_config(self) -> StackConfig:
        """The decoder's plan."""
        return StackConfig.of([block for layer in range(self.num_decoder_layers) for block in self.decoder_layer(layer)])

    def layer_configs(self) -> list[ZooConfig]:
        return [*self.encoder_config().layer_configs(), *self.decoder_config().layer_configs()]


class ZooSeq2SeqModel(ZooPreTrainedModel):
    """Token ids of a source `[B, S]` and of what is written `[B, T]` -> the decoder's hidden states `[B, T, D]`.

    The stacks share the encoder's table of embeddings.
    """

    def __init__(self, config: Seq2SeqConfig):
        super().__init__(config)
        self.encoder = ZooModel(config.encoder_config())
        self.decoder = ZooModel(config.decoder_config())
        self.decoder.embed_tokens = None
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.encoder.embed_tokens = value

    def get_encoder(self, modality: str | None = None) -> nn.Module:
        return self.encoder

    def get_decoder(self) -> nn.Module:
        return self.decoder

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: BaseModelOutput | tuple | None = None,
        past_key_values: ZooCache | None = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        global_attention_mask: Tensor | None = None,
        **kwargs,
    ) -> Seq2SeqModelOutput:
        """Read the source, unless `encoder_outputs` are given, and write.

        Args:
            input_ids, attention_mask: `[B, S]`, of the source; zeros of the mask mark padding, on either side.
            decoder_input_ids, decoder_attention_mask: `[B, T]`; the mask, continuing a cache, `[B, past + T]`.
            encoder_outputs: what the encoder returned for this source.
            global_attention_mask: `[B, S]`, as in `ZooModel.forward`.
            The rest as there.

        Raises:
            ValueError: nothing to read or nothing to write is given.
        """
        shared = {"output_hidden_states": output_hidden_states, "return_dict": True, **kwargs}
        if encoder_outputs is None:
            read = {"inputs_embeds": inputs_embeds, "global_attention_mask": global_attention_mask, "use_cache": False}
            encoder_outputs = self.encoder(input_ids, attention_mask, **read, **shared)
        if decoder_input_ids is None and decoder_inputs_embeds is None:
            raise ValueError("nothing is to be written; pass decoder_input_ids, or labels to the ForConditionalGeneration class")
        if decoder_inputs_embeds is None:
            decoder_inputs_embeds = self.encoder._embed(decoder_input_ids)
        present = None if attention_mask is None else attention_mask != 0
        out = self.decoder(
            attention_mask=decoder_attention_mask, past_key_values=past_key_values, inputs_embeds=decoder_inputs_embeds,
            use_cache=self.config.use_cache and not self.training if use_cache is None else use_cache,
            source=(encoder_outputs[0], present), **shared,
        )  # fmt: skip
        return Seq2SeqModelOutput(
            last_hidden_state=out.last_hidden_state, past_key_values=out.past_key_values, decoder_hidden_states=out.hidden_states,
            encoder_last_hidden_state=encoder_outputs[0],
            encoder_hidden_states=encoder_outputs[1] if len(encoder_outputs) > 1 else None,
        )  # fmt: skip


class ZooForConditionalGeneration(ZooPreTrainedModel, GenerationMixin):
    """Token ids of a source `[B, S]` and of what is written `[B, T]` -> logits `[B, T, vocabulary]` of what comes next."""

    _tied_weights_keys = {"lm_head.weight": "model.encoder.embed_tokens.weight"}

    def __init__(self, config: Seq2SeqConfig):
        super().__init__(config)
        self.model = self._base(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.register_buffer("logits_bias", torch.zeros(config.vocab_size) if config.logits_bias else None)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self and self.logits_bias is not None:
            init.zeros_(self.logits_bias)

    @can_return_tuple
    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, decoder_input_ids: Tensor | None = None,
        labels: Tensor | None = None, num_items_in_batch: Tensor | None = None, logits_to_keep: int | Tensor = 0, **kwargs,
    ) -> Seq2SeqLMOutput:  # fmt: skip
        """Logits, and with `labels` `[B, T]` (-100 ignored) the mean cross-entropy; without `decoder_input_ids` these are the labels
        moved one place behind the token to begin with. The rest as in `ZooSeq2SeqModel.forward`."""
        if decoder_input_ids is None and kwargs.get("decoder_inputs_embeds") is None and labels is not None:
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        kwargs.pop("return_dict", None)
        out = self.model(input_ids, attention_mask, decoder_input_ids, return_dict=True, **kwargs)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        states = out.last_hidden_state[:, kept]
        logits = self.lm_head(states if self.config.logit_scale == 1.0 else states * self.config.logit_scale)
        if self.logits_bias is not None:
            logits = logits + self.logits_bias
        loss = None
        if labels is not None:
            loss = ForMaskedLMLoss(logits, labels, self.config.vocab_size, num_items_in_batch)
        return Seq2SeqLMOutput(
            loss=loss, logits=logits, past_key_values=out.past_key_values, decoder_hidden_states=out.decoder_hidden_states,
            encoder_last_hidden_state=out.encoder_last_hidden_state, encoder_hidden_states=out.encoder_hidden_states,
        )  # fmt: skip

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        """`[B, T]`: the token to begin with, and all labels but the last; what is ignored of them is padding."""
        start, padding = self.config.decoder_start_token_id, self.config.pad_token_id
        if start is None or padding is None:
            raise ValueError("labels become the decoder's inputs with the config's decoder_start_token_id and pad_token_id; set both")
        first = torch.full_like(labels[:, :1], start)
        return torch.cat([first, labels[:, :-1].masked_fill(labels[:, :-1] == -100, padding)], dim=1)

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length, *args, **kwargs
    ):
        if generation_config.use_cache is not False:
            provide_cache(generation_config, model_kwargs, len(self.model.decoder.layers), max_cache_length)


SHELLS = {"Model": ZooSeq2SeqModel, "ForConditionalGeneration": ZooForConditionalGeneration}
