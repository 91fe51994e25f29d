"""The model around the blocks, and the head that writes, once for every architecture. `zoo.heads` has the others."""

from contextlib import nullcontext
from itertools import pairwise

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import (
    BaseModelOutputWithPoolingAndCrossAttentions,
    CausalLMOutputWithPast,
)
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import can_return_tuple

from zoo.block import Block
from zoo.cache import ZooCache, check_cache, provide_cache, room
from zoo.channel import activation
from zoo.config import ZooConfig
from zoo.decode import Steps, obstacle, pieces
from zoo.entry import Entry
from zoo.kernels.dispatch import states_in_place
from zoo.layers import make_norm, token_positions
from zoo.loss import chunked_cross_entropy
from zoo.mixer import Layer
from zoo.sampling import sample, suits
from zoo.saving import CheckpointMixin

# what the Trainer and the flattening collator send along and a zoo model needs no more than its cu_seq_lens_q
_ACCEPTED = {"cu_seq_lens_k", "max_length_q", "max_length_k", "return_dict", "output_attentions", "num_items_in_batch", "shift_labels"}


class ZooPreTrainedModel(CheckpointMixin, PreTrainedModel):
    """What all heads share: loading, saving and initialisation."""

    config_class = ZooConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]
    _skip_keys_device_placement = ["past_key_values"]
    _can_compile_fullgraph = True
    _is_stateful = True
    _supports_sdpa = True
    _keep_in_fp32_modules_strict = ["choice_bias"]  # of experts: its steps are small beside its size

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
            if isinstance(module, nn.Linear) and module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm | nn.GroupNorm):
            if module.weight is not None:
                init.ones_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, Layer):
            module.reset_parameters()


class Transform(nn.Module):
    """`norm(act(dense(x)))` before a decoder, as a pooler or before a classifier; by default BERT's before its decoder
    (arXiv:1810.04805, in the authors' code).

    Args: act: a name of `zoo.channel.ACTIVATIONS`; bias: of the dense layer; norm: a kind of `make_norm`, None for none.
    """

    def __init__(self, config: ZooConfig, *, act: str = "gelu", bias: bool = True, norm: str | None = "layernorm"):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size, bias=bias)
        self.act = activation(act)
        self.norm = nn.Identity() if norm is None else make_norm(norm, config.hidden_size, config.norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.act(self.dense(x)))


class ZooModel(ZooPreTrainedModel):
    """Token ids `[B, T]` -> hidden states `[B, T, D]`."""

    def __init__(self, config: ZooConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        table = config.max_position_embeddings
        self.embed_positions = None if table is None else nn.Embedding(table, config.hidden_size)
        self.embed_types = nn.Embedding(config.token_types, config.hidden_size) if config.token_types else None
        self.embed_norm = make_norm(config.norm, config.hidden_size, config.norm_eps) if config.embedding_norm else None
        self.embed_projection = nn.Linear(config.hidden_size, config.hidden_size) if config.embedding_projection else nn.Identity()
        self.layers = nn.ModuleList(Block(layer, index) for index, layer in enumerate(config.layer_configs()))
        mixers = [block.mixer for block in self.layers]
        for index, mixer in enumerate(mixers):
            if mixer is not None:
                mixer.borrow(mixers[:index])
        if config.learned_state:
            for block in self.layers:
                block.learn_state()
        self.norm = nn.Identity() if config.post_norm else make_norm(config.norm, config.hidden_size, config.norm_eps)
        self.pooler = None if config.pooler_args is None else Transform(config, **config.pooler_args)
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: ZooCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        cu_seq_lens_q: Tensor | None = None,
        seq_idx: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        global_attention_mask: Tensor | None = None,
        source: tuple[Tensor, Tensor | None] | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPoolingAndCrossAttentions:
        """Run the layers.

        Args:
            input_ids: `[B, T]`, or inputs_embeds `[B, T, D]`.
            attention_mask: `[B, T]` or, continuing a cache, `[B, past + T]`; zero marks padding, on either side.
            position_ids, cu_seq_lens_q, seq_idx: packed documents in one row; see `zoo.entry.Entry`.
            past_key_values: a `ZooCache`, updated in place.
            use_cache: return a cache to continue from; default `config.use_cache`, never while training.
            output_hidden_states: return the input of every block and the final states.
            token_type_ids: `[B, T]`, where the config has `token_types`; default 0.
            global_attention_mask: `[B, T]`, where mixers can make tokens global: nonzero for those that see all and are seen by all.
            source: of a decoder, what its encoder returned `[B, S, D]`, and `[B, S]` false for padding.

        Raises:
            ValueError: both or neither of ids and embeddings, an empty batch, a mask of the wrong shape, more tokens than the
                position table holds, packed documents together with a cache, token types that the model has no table for,
                global tokens that no mixer knows.
        """
        _refuse_unknown(kwargs)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
        x = inputs_embeds if input_ids is None else self._embed(input_ids)
        if x.ndim != 3 or x.numel() == 0:
            raise ValueError(f"the batch is empty or misshapen: {list(x.shape[:2])}; expected [batch, tokens] with at least one token")
        x = self._add_types(x, token_type_ids)
        batch, length = x.shape[:2]
        cache = None if past_key_values is None else check_cache(past_key_values, len(self.layers))
        cached, settled = (False, False) if cache is None else (cache.get_seq_length() > 0, cache.settled)
        entry = Entry.open(batch, length, attention_mask, position_ids, cu_seq_lens_q, seq_idx, cached, settled)
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        documents = entry.packing is not None and entry.keep is None
        if cache is None and use_cache and not documents:
            cache = ZooCache(len(self.layers))
        x, beside = self._position(entry.enter(x), entry, cache), source or self._global(global_attention_mask, entry, batch, length)

        hidden, carry = [], None
        with nullcontext() if cache is None or torch.compiler.is_compiling() else states_in_place():
            for index, block in enumerate(self.layers):
                if output_hidden_states or (output_hidden_states is None and self.config.output_hidden_states):
                    hidden.append(entry.leave(x))
                state = None if cache is None else room(cache.layers[index].state, block, cache, batch, x.dtype, x.device)
                x, state, carry = block(x, state, entry.packing, carry, *beside)
                if cache is not None:
                    cache.layers[index].store(state, length)
        x = self.norm(x)
        pooled = None if self.pooler is None else self.pooler(entry.ends(x, last=self.config.causal))
        x = entry.leave(x)
        if cache is not None:
            cache.count(entry.counts(batch, length, x.device))
            cache.settled = settled or entry.begun()
        return BaseModelOutputWithPoolingAndCrossAttentions(
            last_hidden_state=x,
            pooler_output=pooled,
            past_key_values=cache if use_cache else None,
            hidden_states=(*hidden, x) if hidden else None,
        )

    def _embed(self, input_ids: Tensor) -> Tensor:
        x = self.embed_tokens(input_ids)
        scale = self.config.embedding_scale
        return x if scale == 1.0 else x * x.new_full((), scale)  # rounded to the activations' dtype, as models were trained

    def _add_types(self, x: Tensor, token_type_ids: Tensor | None) -> Tensor:
        """Add what is learned about the types of tokens, where the config asks for it."""
        if self.embed_types is None:
            if token_type_ids is not None:
                raise ValueError("this model has no token types; leave token_type_ids out, or set token_types in its config")
            return x
        if token_type_ids is None:
            token_type_ids = torch.zeros(x.shape[:2], dtype=torch.long, device=x.device)
        if token_type_ids.shape != x.shape[:2]:
            raise ValueError(f"token_type_ids is {list(token_type_ids.shape)}, expected {list(x.shape[:2])}: one for each token")
        return x + self.embed_types(token_type_ids)

    def _global(self, global_attention_mask: Tensor | None, entry: Entry, batch: int, length: int) -> tuple[Tensor, ...]:
        """What mixers are told about global tokens, if anything."""
        if global_attention_mask is None:
            return ()
        if not any(block.mixer is not None and block.mixer.traits.beside for block in self.layers):
            raise ValueError("no mixer of this model makes tokens global; leave global_attention_mask out")
        if global_attention_mask.shape != (batch, length):
            raise ValueError(
                f"global_attention_mask is {list(global_attention_mask.shape)}, expected {[batch, length]}: one for each token"
            )
        return (entry.enter(global_attention_mask != 0),)

    def _position(self, x: Tensor, entry: Entry, cache: ZooCache | None) -> Tensor:
        """Add learned positions, normalise and project the embeddings, where the config asks for it."""
        if self.embed_positions is not None:
            table, offset = self.config.max_position_embeddings, self.config.position_offset
            longest = x.shape[1] if entry.packing is None else max(entry.packing.lengths)
            longest += cache.get_seq_length() if cache is not None else 0
            if longest > table - offset:
                behind = f" behind position_offset={offset}" if offset else ""
                raise ValueError(
                    f"a sequence of {longest} tokens exceeds max_position_embeddings={table}{behind}; shorten it or enlarge the table"
                )
            x = x + self.embed_positions(token_positions(x, None if cache is None else cache.lengths, entry.packing) + offset)
        return self.embed_projection(x if self.embed_norm is None else self.embed_norm(x))


class ZooGenerationMixin(GenerationMixin):
    """`generate` with one kind of cache for every architecture, whatever its class name says."""

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length, *args, **kwargs
    ):
        if generation_config.use_cache is False:
            return
        own = provide_cache(generation_config, model_kwargs, len(self.model.layers), max_cache_length)
        model_kwargs.pop("position_ids", None)  # a zoo model counts positions itself
        if obstacle(self) is None:
            keep = own and not generation_config.return_dict_in_generate
            model_kwargs["steps"] = Steps(self, max_cache_length + 1, keep)

    def _sample(self, input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus=False, streamer=None, **model_kwargs):
        if not suits(generation_config, synced_gpus, model_kwargs):
            return super()._sample(input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus, streamer, **model_kwargs)
        return sample(self, input_ids, logits_processor, stopping_criteria, generation_config, streamer, model_kwargs)


class ZooForCausalLM(ZooPreTrainedModel, ZooGenerationMixin):
    """Token ids `[B, T]` -> logits `[B, T, vocabulary]`."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: ZooConfig):
        super().__init__(config)
        if not config.causal:
            raise ValueError(f"{type(self).__name__} needs a causal model; set causal=True, or take the ForMaskedLM class")
        self.model = self._base(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: ZooCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        skip_logits: bool = False,
        steps: Steps | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Next-token logits, and with `labels` `[B, T]` (-100 ignored, shifted here) the mean cross-entropy.

        Args:
            logits_to_keep: the last so many positions, or indices; 0 keeps all. With a cache, and without gradients, a long prompt
                whose last logits are wanted is read in pieces: so the memory that it takes besides does not grow with it.
            skip_logits: return the loss alone, computed in chunks, so that the logits never stand in memory whole.
            steps: what recorded the decode steps of `past_key_values`, from `generate`.
            The rest as in `ZooModel.forward`.

        Raises:
            ValueError: `skip_logits` without labels.
        """
        others = [inputs_embeds, labels, *passed_on(kwargs).values(), self.config.output_hidden_states]
        if input_ids is not None and all(value is None or value is False for value in others):
            logits = None if steps is None or past_key_values is None else steps(input_ids, past_key_values)
            if logits is not None:
                return CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)
            if position_ids is None or attention_mask is not None:
                wanted = self.config.use_cache and not self.training if use_cache is None else use_cache
                keep = logits_to_keep if wanted or past_key_values is not None else 0
                input_ids, past_key_values = self._read_ahead(input_ids, attention_mask, past_key_values, keep)
        out = self.model(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, return_dict=True, **passed_on(kwargs)
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        states, vocabulary, logits, loss = out.last_hidden_state[:, kept], self.config.vocab_size, None, None
        if skip_logits:
            if labels is None:
                raise ValueError("skip_logits leaves nothing to return without labels; pass labels")
            count, shifted = kwargs.get("num_items_in_batch"), kwargs.get("shift_labels")
            loss = chunked_cross_entropy(states, labels, self._logits, vocabulary, count=count, shift_labels=shifted)
        else:
            logits = self._logits(states)
            if labels is not None:
                sums = {n: kwargs[n] for n in ("num_items_in_batch", "shift_labels") if n in kwargs}
                loss = self.loss_function(logits=logits, labels=labels, vocab_size=vocabulary, **sums)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=out.past_key_values, hidden_states=out.hidden_states)

    def step(self, input_ids: Tensor, cache: ZooCache) -> Tensor:
        """Logits `[B, 1, vocabulary]` after one more token of every row, `[B, 1]`: nothing but work for the device."""
        out = self.model(input_ids, past_key_values=cache, use_cache=True, return_dict=True)
        return self._logits(out.last_hidden_state)

    def _read_ahead(
        self, input_ids: Tensor, attention_mask: Tensor | None, cache: ZooCache | None, keep: int | Tensor
    ) -> tuple[Tensor, ZooCache | None]:
        """Read all pieces of a long prompt but the last, if the last `keep` logits are all that is wanted: what is left, and the cache."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or not isinstance(keep, int) or keep <= 0:
            return input_ids, cache
        length, starts = input_ids.shape[1], pieces(*input_ids.shape, keep, attention_mask)
        for start, stop in pairwise(starts):
            mask = None if attention_mask is None else attention_mask[:, : attention_mask.shape[1] - length + stop]
            cache = self.model(input_ids[:, start:stop], mask, past_key_values=cache, use_cache=True).past_key_values
        return input_ids[:, starts[-1] :], cache

    def _logits(self, states: Tensor) -> Tensor:
        """The head, with scale and cap where the config asks for them."""
        logits = self.lm_head(states)
        if self.config.logit_scale != 1.0:
            logits = logits * self.config.logit_scale
        if self.config.logit_softcap is not None:
            logits = torch.tanh(logits / self.config.logit_softcap) * self.config.logit_softcap
        return logits


def passed_on(kwargs: dict) -> dict:
    """The arguments a head passes on to the model."""
    return {n: v for n, v in kwargs.items() if n not in ("num_items_in_batch", "shift_labels", "return_dict")}


def _refuse_unknown(kwargs: dict) -> None:
    unknown = [name for name in kwargs if name not in _ACCEPTED]
    if unknown:
        raise TypeError(f"forward() got unknown arguments {unknown}; a zoo model takes no others than its signature says")
    if kwargs.get("output_attentions"):
        raise ValueError("output_attentions is not available: the mixers do not form attention maps")
