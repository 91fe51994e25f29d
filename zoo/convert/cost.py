"""How long the stages of a plan will take, from a speed that was measured or is said to be assumed."""

import time
from dataclasses import dataclass

import torch

from zoo.block import Block
from zoo.convert.headers import Blueprint
from zoo.convert.plan import blank_student, layout_config
from zoo.convert.recipe import Method
from zoo.convert.student import converted_layers

ASSUMED = 3e13  # FLOP/s in float32 where nothing was measured or said


@dataclass(frozen=True)
class Pace:
    """FLOP/s of training, and how they are known."""

    rate: float
    origin: str

    def __post_init__(self):
        if not self.rate > 0:
            raise ValueError(f"a speed of {self.rate} FLOP/s is none; give a positive number, such as --speed 3e13")

    def seconds(self, flops: float) -> float:
        return flops / self.rate

    def describe(self) -> str:
        unit, name = next((u, n) for u, n in ((1e12, "TFLOP/s"), (1e9, "GFLOP/s"), (1.0, "FLOP/s")) if self.rate >= u or u == 1.0)
        return f"{self.rate / unit:.3g} {name}, {self.origin}"


def assumed(rate: float | None = None) -> Pace:
    """What the caller says, or a speed that one GPU of a data centre reaches."""
    return Pace(ASSUMED, "assumed; --device measures it") if rate is None else Pace(rate, "as you said")


def measure_pace(teacher: Blueprint, method: Method, device: str, repeats: int = 3) -> Pace:
    """The speed at which a device takes one replaced layer forward and backward, in float32, on a row of the first stage.

    Only that layer is made, with random weights. The fastest of some repeats counts; the first, which may compile, does not.
    """
    student, _ = blank_student(teacher.model, layout_config(teacher.model, method))
    index, length = next(iter(converted_layers(student)), 0), method.stages[0].length
    with torch.device(device):
        block = Block(student.config.layer_configs()[index], index)
    x = torch.randn(1, length, student.config.hidden_size, device=device)
    flops = 3 * (block.mixer.flops(length) + (0 if block.channel_mixer is None else block.channel_mixer.flops(length)))
    times = []
    for _ in range(repeats + 1):
        start = now(device)
        block(x)[0].square().mean().backward()
        times.append(now(device) - start)
    name = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else "this machine"
    return Pace(flops / min(times[1:]), f"measured on {name}: a layer with a row of {length} tokens, forward and backward")


def now(device: str) -> float:
    """Seconds, once the device has done what it was asked to."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def duration(seconds: float) -> str:
    """Readable: 42 s, 3.1 min, 5.2 h, 12 days."""
    for unit, least in (("days", 2 * 86400), ("h", 5400), ("min", 100)):
        if seconds >= least:
            return f"{seconds / {'days': 86400, 'h': 3600, 'min': 60}[unit]:.3g} {unit}"
    return f"{seconds:.3g} s"
