"""The definition: one masked softmax, or sigmoid, over all pairs."""

import torch
from torch import Tensor

from zoo.kernels.attention import rules
from zoo.kernels.attention.rules import Rule
from zoo.kernels.checks import accumulator


def attention(
    q, k, v, q_positions, kv_positions, global_tokens, slopes, log_forget, by_distance,
    causal, left, right, dilation, sinks, ordered, softcap, normaliser, scale, return_lse,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    dtype, acc = v.dtype, accumulator(v.dtype)
    rule = Rule(causal, left, right, dilation, sinks)
    after_p, after_j = rules.cumulative(log_forget, q_positions, kv_positions, q.shape[1])
    p, j = rules.default_positions(q, k) if q_positions is None else (q_positions, kv_positions)
    marked = None if global_tokens is None else rules.marked_queries(p, j, global_tokens)
    seen = rules.visible(rule, p, j, marked, global_tokens).unsqueeze(1)
    k, v = (x.to(acc).repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    logits = torch.einsum("bqhk,bshk->bhqs", q.to(acc), k) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    added = rules.bias(p.unsqueeze(-1) - j.unsqueeze(-2), slopes, after_p, after_j, by_distance, acc)
    if added is not None:
        logits = logits + added
    blind = ~seen.any(-1, keepdim=True)  # sees nothing: given everything for the softmax's sake, then set to 0
    logits = logits.masked_fill(~(seen | blind), -torch.inf)
    weights = logits.sigmoid() if normaliser == "sigmoid" else logits.softmax(-1)
    out = torch.einsum("bhqs,bshv->bqhv", weights.masked_fill(blind, 0), v).to(dtype)
    if not return_lse:
        return out, None
    return out, logits.logsumexp(-1).masked_fill(blind.squeeze(-1), -torch.inf).transpose(1, 2)
