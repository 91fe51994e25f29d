"""One line for every step, a picture of the losses, and a summary."""

import time
from collections.abc import Callable
from pathlib import Path

from transformers.trainer_callback import TrainerCallback


class Display(TrainerCallback):
    """Says what happens: `say` is called with one line at a time, on the first process only."""

    def __init__(self, say: Callable[[str], None]):
        self.say = say

    def on_train_begin(self, args, state, control, **kwargs):
        self.start, self.first = time.monotonic(), state.global_step

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or not logs:
            return
        if "loss" in logs:
            self.say(self.line(state, logs))
        elif "eval_loss" in logs:
            more = f" | {logs['eval_bits_per_byte']:.4f} bits/byte" if "eval_bits_per_byte" in logs else ""
            self.say(f"eval {state.global_step:>6} | loss {logs['eval_loss']:.4f} | perplexity {logs['eval_perplexity']:.3f}{more}")

    def line(self, state, logs: dict) -> str:
        """Loss and gradient norm, what was learned how fast, and how long it takes."""
        elapsed, done = time.monotonic() - self.start, state.global_step - self.first
        left = elapsed / done * (state.max_steps - state.global_step)
        rate = logs["tflops"]
        share = f"{100 * logs['mfu']:.1f}% MFU" if "mfu" in logs else f"{rate:.2f} TFLOP/s" if rate >= 1 else f"{1e3 * rate:.1f} GFLOP/s"
        return (
            f"step {state.global_step:>6}/{state.max_steps} | loss {logs['loss']:.4f} | gnorm {logs.get('grad_norm', float('nan')):.3f} | "
            f"lr {logs['learning_rate']:.2e} | {logs['tokens_per_second']:,.0f} tok/s | {share} | {logs['memory_gib']:.1f} GiB | "
            f"{clock(elapsed)} < {clock(left)}"
        )


def clock(seconds: float) -> str:
    """`3725 -> '1:02:05'`."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def summary(history: list[dict], seconds: float, folder: str) -> str:
    """What came of a run, from the Trainer's history."""
    steps = [entry for entry in history if "loss" in entry]
    evals = [entry for entry in history if "eval_loss" in entry]
    if not steps:
        return f"{folder}: no step was taken"
    parts = [f"{steps[-1]['step']} steps, {steps[-1]['tokens']:,} tokens in {clock(seconds)}"]
    parts.append(f"loss {steps[0]['loss']:.4f} -> {steps[-1]['loss']:.4f}")
    if evals:
        best = min(evals, key=lambda entry: entry["eval_loss"])
        more = f", {best['eval_bits_per_byte']:.4f} bits/byte" if "eval_bits_per_byte" in best else ""
        parts.append(f"best on held-out text at step {best['step']}: perplexity {best['eval_perplexity']:.3f}{more}")
    return f"{folder}: {'; '.join(parts)}"


def draw(history: list[dict], path: Path) -> None:
    """Losses of training and evaluation by step, and the learning rate; needs matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="constrained")
    FigureCanvasAgg(figure)
    losses, rates = figure.subplots(2, 1, height_ratios=(3, 1), sharex=True)
    for key, style, label in (("loss", "-", "training"), ("eval_loss", "o-", "held out")):
        if points := [(entry["step"], entry[key]) for entry in history if key in entry]:
            losses.plot(*zip(*points, strict=True), style, linewidth=1, markersize=3, label=label)
    losses.set(ylabel="nats per token")
    losses.legend()
    rates.plot(*zip(*((e["step"], e["learning_rate"]) for e in history if "learning_rate" in e), strict=True), color="#5e81ac", linewidth=1)
    rates.set(xlabel="step", ylabel="learning rate")
    rates.locator_params(axis="x", integer=True)
    figure.savefig(path, dpi=120)
