"""Every operator, chunked against the definition: same inputs, one run.

Width 512 as 8 heads of 64 (16 states a channel for the selective scan), batch 1, float32, forward without gradients.
"""

from collections.abc import Iterator, Sequence
from functools import partial

import torch

from zoo.evaluate.bench.case import Draw
from zoo.evaluate.bench.measure import Clock
from zoo.ops import OPS

HEADS, KEYS, WIDTH, STATES = 8, 64, 512, 16


def inputs(length: int, device: str) -> dict[str, tuple[str, dict]]:
    """Row name -> (operator, arguments)."""
    draw = Draw(device, torch.float32)
    heads, wide = partial(draw.normal, 1, length, HEADS, KEYS), partial(draw.normal, 1, length, WIDTH)

    def decay(*shape: int) -> torch.Tensor:
        return -draw.uniform(*shape)

    q, k, v, beta = heads(), draw.unit(1, length, HEADS, KEYS), heads(), draw.uniform(1, length, HEADS)
    decays = {"none": None, "head": decay(HEADS), "token": decay(1, length, HEADS), "channel": decay(1, length, HEADS, KEYS)}
    rows = {f"linear_attention, decay {n}": ("linear_attention", dict(q=q, k=k, v=v, log_decay=d)) for n, d in decays.items()}
    rows |= {f"delta_rule, decay {n}": ("delta_rule", dict(q=q, k=k, v=v, beta=beta, log_decay=d)) for n, d in decays.items()}
    a, b = -k, k * draw.uniform(1, length, HEADS, 1)
    rows["general_delta_rule"] = ("general_delta_rule", dict(q=q, k=k, v=v, a=a, b=b, log_decay=decays["channel"]))
    rows["scan"] = ("scan", dict(x=wide(), log_decay=decay(1, length, WIDTH)))
    rows["scan, complex"] = ("scan", dict(x=wide(), log_decay=torch.complex(decay(WIDTH), draw.normal(WIDTH))))
    selective = dict(x=wide(), dt=wide().abs(), A=decay(WIDTH, STATES) - 0.1)
    rows["selective_scan"] = ("selective_scan", selective | {n: draw.normal(1, length, STATES) for n in "BC"})
    rows["long_conv"] = ("long_conv", dict(u=wide(), kernel=draw.normal(length, WIDTH)))
    rows["short_conv"] = ("short_conv", dict(x=wide(), weight=draw.normal(WIDTH, 4), activation="silu"))
    rows["attention, window 512"] = ("attention", dict(q=q, k=k, v=v, window=512))
    return rows


def compare(ops: Sequence[str] | None, length: int, clock: Clock) -> Iterator[dict]:
    """Rows with `reference_ms` and `chunked_ms`, of these operators or of all."""
    for name, (op, arguments) in inputs(length, clock.device).items():
        if ops and op not in ops:
            continue
        row: dict = {"row": name}
        for backend in ("reference", "chunked"):
            if backend == "chunked" or op != "long_conv":  # whose definition is a double loop
                run = partial(OPS[op].call, **arguments, backend=backend)
                with torch.no_grad():
                    row[f"{backend}_ms"] = clock.median(run)
        yield row
