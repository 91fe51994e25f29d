"""How fast a language model reads and writes, and what its memory of a sequence weighs."""

import time
from typing import NamedTuple

import torch
from torch import Tensor, nn

from zoo.config import ZooConfig
from zoo.decode import Steps, obstacle
from zoo.model import ZooForCausalLM


class Speed(NamedTuple):
    """Tokens per second: `read` of the prompt in one call, `write` of the tokens after it, one by one."""

    read: float
    write: float


@torch.no_grad()
def generation_speed(model: nn.Module, prompt: Tensor, tokens: int = 32) -> Speed:
    """Read `prompt` `[B, T]` once, then write `tokens` tokens greedily; wall clock, counted over the whole batch.

    The first call of each kind is not counted: it may compile or fill caches.
    """
    if tokens < 1:
        raise ValueError(f"tokens is {tokens}, at least one must be written")
    prompt, more = prompt.to(next(model.parameters()).device), {}

    def write(count: int, out):
        for _ in range(count):
            ids = out.logits[:, -1:].argmax(-1)
            out = model(input_ids=ids, past_key_values=out.past_key_values, use_cache=True, **more)
        return out

    write(1, model(input_ids=prompt[:, :8], use_cache=True))
    start = _now(prompt.device)
    out = model(input_ids=prompt, use_cache=True, logits_to_keep=1)
    read = _now(prompt.device) - start
    if isinstance(model, ZooForCausalLM) and obstacle(model) is None:
        more["steps"] = Steps(model, prompt.shape[1] + tokens + 2)
    out = write(2, out)  # after which steps are recorded
    start = _now(prompt.device)
    write(tokens, out)
    return Speed(prompt.numel() / read, prompt.shape[0] * tokens / (_now(prompt.device) - start))


def state_bytes(model: nn.Module, length: int, dtype: torch.dtype = torch.float32) -> int:
    """Bytes of state and KV cache of one sequence after `length` tokens, over all layers of a zoo model.

    Of an encoder-decoder these are the states of what is written; the keys and values of the source come on top.

    Args: dtype: of the activations; recurrent states stay in float32 where their mixer says so.
    """
    if not isinstance(model.config, ZooConfig):
        raise TypeError(
            f"state_bytes reads the states that a zoo model declares, got a {type(model).__name__}; load it with zoo.from_pretrained"
        )
    stack = getattr(model, "model", model)
    blocks = (stack.decoder if model.config.is_encoder_decoder else stack).layers
    states = (block.initial_state(1, length, dtype, "meta") for block in blocks)
    return sum(t.numel() * t.element_size() for state in states for t in state.values())


def _now(device: torch.device) -> float:
    """Seconds, after the device has caught up."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
