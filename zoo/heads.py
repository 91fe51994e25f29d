"""Heads that answer about a text: what is masked in it, what it is, what each token is, where an answer lies."""

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import (
    BaseModelOutputWithPoolingAndCrossAttentions,
    MaskedLMOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)
from transformers.utils import can_return_tuple

from zoo.block import Block
from zoo.config import ZooConfig
from zoo.model import Transform, ZooForCausalLM, ZooModel, ZooPreTrainedModel, passed_on


class Reader(ZooPreTrainedModel):
    """What these heads share: one pass over the text, without a cache."""

    def _read(self, input_ids: Tensor | None, attention_mask: Tensor | None, kwargs: dict) -> BaseModelOutputWithPoolingAndCrossAttentions:
        return self.model(input_ids, attention_mask, use_cache=False, return_dict=True, **passed_on(kwargs))


def transform(config: ZooConfig, arguments: dict | None) -> nn.Module:
    """A `Transform` with these arguments, where there are any."""
    return nn.Identity() if arguments is None else Transform(config, **arguments)


class ZooForMaskedLM(Reader):
    """Token ids `[B, T]` with masked ones -> logits `[B, T, vocabulary]` for each position itself."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: ZooConfig):
        super().__init__(config)
        if config.causal:
            raise ValueError(f"{type(self).__name__} needs a bidirectional model; set causal=False, or take the ForCausalLM class")
        self.model = self._base(config)
        self.head = Transform(config, **config.head_args or {})
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    @can_return_tuple
    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, labels: Tensor | None = None, **kwargs
    ) -> MaskedLMOutput:
        """Logits, and with `labels` `[B, T]` (-100 ignored, not shifted) the mean cross-entropy."""
        out = self._read(input_ids, attention_mask, kwargs)
        logits = self.lm_head(self.head(out.last_hidden_state))
        loss = None if labels is None else self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size)
        return MaskedLMOutput(loss=loss, logits=logits, hidden_states=out.hidden_states)


class ZooForSequenceClassification(Reader):
    """Token ids `[B, T]` -> logits `[B, num_labels]`, read at the last token (at the first of a bidirectional model).

    With `config.classifier_args` a `Transform` stands before it, with `config.pooler_args` it reads the pooler; then it has a bias.
    With `config.classifier_mean` it reads the mean of all states.
    """

    def __init__(self, config: ZooConfig):
        super().__init__(config)
        self.model = self._base(config)
        self.classifier = transform(config, config.classifier_args)
        bias = config.classifier_args is not None or config.pooler_args is not None
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=bias)
        self.post_init()

    @can_return_tuple
    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, labels: Tensor | None = None, **kwargs
    ) -> SequenceClassifierOutputWithPast:
        """Logits of every sequence; `attention_mask` (or `pad_token_id`) tells where it ends."""
        if attention_mask is None and input_ids is not None and self.config.pad_token_id is not None:
            attention_mask = (input_ids != self.config.pad_token_id).long()
        out = self._read(input_ids, attention_mask, kwargs)
        logits = self.score(self._classified(out, attention_mask))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=None, labels=labels, pooled_logits=logits, config=self.config)
        return SequenceClassifierOutputWithPast(loss=loss, logits=logits, hidden_states=out.hidden_states)

    def _classified(self, out: BaseModelOutputWithPoolingAndCrossAttentions, attention_mask: Tensor | None) -> Tensor:
        """`[B, D]`: what is classified."""
        states = out.last_hidden_state
        if self.config.classifier_mean:
            weight = states.new_ones(states.shape[:2]) if attention_mask is None else (attention_mask != 0).to(states.dtype)
            return self.classifier(torch.einsum("btd,bt->bd", states, weight) / weight.sum(-1, keepdim=True))
        if self.config.classifier_args is None and self.config.pooler_args is not None:
            return out.pooler_output
        index = torch.zeros(states.shape[0], dtype=torch.long, device=states.device)
        if attention_mask is not None:
            order = torch.arange(1, states.shape[1] + 1, device=states.device) * (attention_mask != 0)
            index = order.argmax(-1) if self.config.causal else (attention_mask != 0).int().argmax(-1)
        elif self.config.causal:
            index = index + states.shape[1] - 1
        return self.classifier(states[torch.arange(states.shape[0], device=states.device), index])


class ZooForTokenClassification(Reader):
    """Token ids `[B, T]` -> logits `[B, T, num_labels]`, with `config.token_classifier_args` behind a `Transform`."""

    def __init__(self, config: ZooConfig):
        super().__init__(config)
        self.model = self._base(config)
        self.classifier = transform(config, config.token_classifier_args)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, labels: Tensor | None = None, **kwargs
    ) -> TokenClassifierOutput:
        """Logits of every token; `labels` `[B, T]` with -100 ignored."""
        out = self._read(input_ids, attention_mask, kwargs)
        logits = self.score(self.classifier(out.last_hidden_state))
        loss = None if labels is None else self.loss_function(logits, labels, self.config)
        return TokenClassifierOutput(loss=loss, logits=logits, hidden_states=out.hidden_states)


class ZooForQuestionAnswering(Reader):
    """Token ids `[B, T]` -> how likely an answer begins, and ends, at each token: two logits `[B, T]`.

    With `config.token_classifier_args` a `Transform` stands before the head, with `config.answer_block` a channel mixer.
    """

    def __init__(self, config: ZooConfig):
        super().__init__(config)
        self.model = self._base(config)
        self.classifier = transform(config, config.token_classifier_args)
        self.answer_block = None
        if config.answer_block:
            behind = {"post_norm": True, "output_norms": False, "parallel_residual": False}
            self.answer_block = Block(ZooConfig(**config.shared_fields() | behind), config.num_hidden_layers)
        self.answer = nn.Linear(config.hidden_size, 2)
        self.post_init()

    @can_return_tuple
    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, start_positions: Tensor | None = None,
        end_positions: Tensor | None = None, **kwargs,
    ) -> QuestionAnsweringModelOutput:  # fmt: skip
        """Logits, and with the tokens `[B]` at which answers begin and end the mean cross-entropy of both; T or more: ignored.

        Raises:
            ValueError: one of the two without the other.
        """
        if (start_positions is None) != (end_positions is None):
            raise ValueError("start_positions and end_positions belong together; pass both or neither")
        out = self._read(input_ids, attention_mask, kwargs)
        states = out.last_hidden_state if self.answer_block is None else self.answer_block(out.last_hidden_state)[0]
        begin, end = self.answer(self.classifier(states)).unbind(-1)
        loss = None if start_positions is None else self.loss_function(begin, end, start_positions, end_positions)
        return QuestionAnsweringModelOutput(loss=loss, start_logits=begin, end_logits=end, hidden_states=out.hidden_states)


SHELLS = {
    "Model": ZooModel,
    "ForCausalLM": ZooForCausalLM,
    "ForMaskedLM": ZooForMaskedLM,
    "ForSequenceClassification": ZooForSequenceClassification,
    "ForTokenClassification": ZooForTokenClassification,
    "ForQuestionAnswering": ZooForQuestionAnswering,
}
