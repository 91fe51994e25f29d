"""What a step costs, and how much of the machine it uses."""

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor, nn

from zoo.block import Block

# dense bfloat16 TFLOP/s from the vendors' data sheets, by a part of the device's name; the first that fits counts
PEAKS = {"B200": 2250, "H200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "A100": 312, "L40S": 362, "L4": 121, "A10G": 70}


def peak_flops() -> float | None:
    """FLOP/s of this process's device in bfloat16, None where it is not known."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return next((1e12 * peak for part, peak in PEAKS.items() if part in name), None)


def forward_flops(model: nn.Module, length: int) -> tuple[int, int]:
    """FLOPs of a forward pass over one document: all of them, and the share of linear layers that are not trained.

    The mixers count themselves (`Mixer.flops`), as do the channel mixers; the head is added, embeddings cost nothing.
    """
    total = frozen = 0
    for block in (module for module in model.modules() if isinstance(module, Block)):
        for part in (block.mixer, block.channel_mixer):
            if part is not None:
                flops, weights = part.flops(length), [m.weight for m in part.modules() if isinstance(m, nn.Linear)]
                idle = sum(w.numel() for w in weights if not w.requires_grad) / max(1, sum(w.numel() for w in weights))
                operator = part.operator_flops(length) if hasattr(part, "operator_flops") else 0
                total += flops
                frozen += round(idle * (flops - operator))
    head = model.get_output_embeddings().weight
    cost = 2 * length * head.numel()
    return total + cost, frozen + (0 if head.requires_grad else cost)


class Meter:
    """Counts tokens and FLOPs between two readings, and the seconds in which the model trained.

    A backward pass costs twice the forward pass, less the gradients of weights that are not trained. What is computed again
    (gradient checkpointing, the chunks of the loss) does not count, nor do evaluation and saving, while `paused`.
    """

    def __init__(self, model: nn.Module):
        self.flops = cache(lambda length: 3 * (counts := forward_flops(model, length))[0] - counts[1])
        self.tokens = 0
        self.start()

    def start(self) -> None:
        """The time before does not count."""
        self.since, self.counted = time.perf_counter(), [0.0, 0.0]

    def add(self, ids: Tensor, cu_seq_lens: Tensor | None) -> None:
        """A batch is about to be trained on."""
        lengths = [ids.shape[1]] * ids.shape[0] if cu_seq_lens is None else cu_seq_lens.diff().tolist()
        self.counted[0] += sum(lengths)
        self.counted[1] += sum(map(self.flops, lengths))

    @contextmanager
    def paused(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.since += time.perf_counter() - start

    def read(self, accelerator, peak: float | None) -> dict[str, float]:
        """Rates over all processes since the last reading; called by all of them at once."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds, processes = time.perf_counter() - self.since, accelerator.num_processes
        tokens, flops = add_up(accelerator, self.counted)
        self.tokens += int(tokens)
        self.start()
        found = {"tokens": self.tokens, "tokens_per_second": tokens / seconds, "tflops": flops / seconds / 1e12, "memory_gib": memory()}
        return found if peak is None else found | {"mfu": flops / seconds / (peak * processes)}


def add_up(accelerator, numbers: list[float]) -> list[float]:
    """Each number's sum over all processes."""
    if accelerator.num_processes == 1:
        return numbers
    return accelerator.reduce(torch.tensor(numbers, dtype=torch.float64, device=accelerator.device), "sum").tolist()


def memory() -> float:
    """GiB held at most so far: by tensors on a GPU, else by the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)  # bytes there, KiB elsewhere
