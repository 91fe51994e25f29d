"""transformers' loop of greedy decoding and sampling, for recorded steps: the host is a step ahead of the device.

Its own loop asks after every token whether all rows have ended, and the device idles from the answer until the next step has been
launched. Here the answer is read one step late. The step that was one too many is undone.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers.generation import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from zoo.decode import Steps

KNOWN = {"past_key_values", "attention_mask", "use_cache", "logits_to_keep", "steps"}  # what this loop gives a step, or needs not


def suits(config: GenerationConfig, synced_gpus: bool, given: dict) -> bool:
    """Whether `sample` is right for a call: nothing but tokens are wanted, of a cache that nobody sees afterwards."""
    steps = given.get("steps")
    return steps is not None and steps.keep and not synced_gpus and not config.is_assistant and given.keys() <= KNOWN


def sample(
    model: nn.Module, ids: Tensor, processors: LogitsProcessorList, criteria: StoppingCriteriaList, config: GenerationConfig,
    streamer: BaseStreamer | None, given: dict,
) -> Tensor:  # fmt: skip
    """Tokens `[B, T]` with those written behind them, as `GenerationMixin._sample` has it."""
    steps, cache = given["steps"], given["past_key_values"]
    ends = any(hasattr(one, "eos_token_id") for one in criteria)
    going, told = torch.ones(len(ids), dtype=torch.long, device=ids.device), Told(ids, streamer)
    logits = model._prefill(ids, config, given).logits
    while True:
        undo = rewind(ids.device) if config.do_sample else None
        scores = processors(ids, logits[:, -1].to(copy=True, dtype=torch.float32))
        tokens = torch.multinomial(scores.softmax(-1), num_samples=1).squeeze(1) if config.do_sample else scores.argmax(-1)
        if ends:
            tokens = tokens * going + config._pad_token_tensor.to(ids.device) * (1 - going)
        ids = torch.cat([ids, tokens.unsqueeze(1)], dim=-1)
        going = going & ~criteria(ids, None)
        told.note(going, tokens)
        if told.ended():
            ids = ids[:, :-1]
            if undo is not None:
                undo()
            break
        if criteria.max_length is not None and ids.shape[1] >= criteria.max_length:
            told.ended()
            break
        logits = step(model, steps, tokens.unsqueeze(1), cache)
    if streamer is not None:
        streamer.end()
    return ids


def step(model: nn.Module, steps: Steps, tokens: Tensor, cache) -> Tensor:
    """Logits after one more token of every row, none of which is a pad."""
    logits = steps(tokens, cache)
    return model(tokens, past_key_values=cache, use_cache=True).logits if logits is None else logits


class Told:
    """What the device says of each step, read after the next one has been launched."""

    def __init__(self, ids: Tensor, streamer: BaseStreamer | None):
        cuda = ids.is_cuda
        self.streamer, self.noted, self.read = streamer, 0, -1  # steps noted, and read, of which the first reading is empty
        self.slots = [
            (torch.zeros((), dtype=torch.bool, pin_memory=cuda), torch.zeros(len(ids), dtype=torch.long, pin_memory=cuda),
             torch.cuda.Event() if cuda else None)
            for _ in range(2)
        ]  # fmt: skip

    def note(self, going: Tensor, tokens: Tensor) -> None:
        """Have copied which rows go on, and the tokens."""
        flag, kept, event = self.slots[self.noted % 2]
        flag.copy_(going.max() == 0, non_blocking=True)
        if self.streamer is not None:
            kept.copy_(tokens, non_blocking=True)
        if event is not None:
            event.record(torch.cuda.current_stream(going.device))
        self.noted += 1

    def ended(self) -> bool:
        """Whether no row went on after the step that is to be read next; its tokens go to the streamer."""
        self.read += 1
        if self.read == 0:  # no step came before
            return False
        flag, kept, event = self.slots[(self.read - 1) % 2]
        if event is not None:
            event.synchronize()
        if self.streamer is not None:
            self.streamer.put(kept.clone())
        return bool(flag)


def rewind(device: torch.device) -> Callable[[], None]:
    """What brings the random numbers back to where they are now."""
    if device.type == "cuda":
        generator = torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]
        offset = generator.get_offset()
        return lambda: generator.set_offset(offset)
    state = torch.get_rng_state()
    return lambda: torch.set_rng_state(state)
