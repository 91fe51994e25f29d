"""What must not change what a model learns: accumulation, packing, checkpointing, resuming, several processes, adapters."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from zoo.auto import from_config
from zoo.evaluate.closeness import assert_close, error_bound
from zoo.evaluate.subject import Subject
from zoo.train.adapt import Coverage, add_lora
from zoo.train.arguments import RunArguments
from zoo.train.data import IGNORE, Rows, collate, packed
from zoo.train.trainer import ZooTrainer

STEPS, BLOCK = 4, 32
PLAN = ["gla", "mamba2", {"mixer": "transformer", "num_heads": 2}]  # a scan, a convolution and attention


def model(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    small = dict(hidden_size=32, num_hidden_layers=len(PLAN), vocab_size=97, initializer_range=0.1)
    return from_config("hybrid", plan=PLAN, **small).to(dtype)


def rows(packing: bool = True) -> Rows:
    """23 documents of 5 to 31 random tokens, the first 3 tokens of each not learned."""
    generator = np.random.default_rng(0)
    ends = np.cumsum([0, *generator.integers(5, BLOCK, 23)]).tolist()
    places = list(pairwise(ends))
    trained = np.ones(ends[-1], dtype=bool)
    for start, _ in places:
        trained[start : start + 3] = False
    shared = packed(places, BLOCK) if packing else [[place] for place in places]
    return Rows(generator.integers(3, 97, ends[-1], dtype=np.int32), BLOCK, trained=trained, rows=shared)


def blocks() -> Rows:
    """Rows that are one document each, all as long."""
    return Rows(np.random.default_rng(0).integers(3, 97, 24 * BLOCK, dtype=np.int32), BLOCK)


def learned(
    folder: str, *, dtype: torch.dtype = torch.float32, data: Callable[[], Rows] = rows, stop: int | None = None, resume: bool = False,
    **changes,
) -> Tensor:  # fmt: skip
    """All weights end to end after `STEPS` steps of plain gradient descent, by the Trainer as a user runs it.

    Args:
        stop: end after so many steps, as an interrupted run does, and resume: go on from its checkpoint.
        changes: of the training arguments.
    """
    settings = dict(
        max_steps=STEPS, per_device_train_batch_size=4, learning_rate=0.5, optim="sgd", max_grad_norm=0.0, use_cpu=True, seed=1,
        save_steps=2, save_strategy="steps" if stop or resume else "no", lr_scheduler_type="cosine",
    )  # fmt: skip
    trainer = ZooTrainer(model(dtype), RunArguments(folder, **settings | changes), data())
    if stop:
        trainer.add_callback(StopAt(stop, trainer))
    trainer.train(resume_from_checkpoint=str(Path(folder, f"checkpoint-{STEPS // 2}")) if resume else None)
    return weights(trainer.model)


def weights(trained: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in trained.parameters()])


class StopAt(TrainerCallback):
    """Interrupts a trainer in its step `stop`, as a signal would."""

    def __init__(self, stop: int, trainer: ZooTrainer):
        self.stop, self.trainer = stop, trainer

    def on_step_begin(self, args, state, control, **kwargs):
        self.trainer.interruption.raised |= state.global_step + 1 == self.stop


def resumed(folder: str) -> Tensor:
    """Interrupted in the middle, and resumed from the checkpoint that was left."""
    learned(folder, stop=STEPS // 2)
    return learned(folder, resume=True)


def launched(folder: str) -> Tensor:
    """By `accelerate launch` in two processes, each with half of every batch."""
    launch("learned", folder)
    return torch.load(Path(folder, "weights.pt"))


def sharded(folder: str) -> Tensor:
    """The same steps with FSDP2 in two processes: parameters, gradients and optimizer in shards, block by block."""
    launch("sharded", folder)
    return torch.load(Path(folder, "weights.pt"))


def launch(what: str, folder: str) -> None:
    """Run this file in two processes on the CPU.

    Raises:
        RuntimeError: it failed; the message is what it wrote.
    """
    line = "-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"
    line += f" --main_process_port 0 --module zoo.evaluate.training {what}"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    result = subprocess.run([sys.executable, *line.split(), folder], env=environment, capture_output=True, text=True, timeout=300)
    if result.returncode:
        raise RuntimeError(f"{what} in two processes failed:\n{result.stdout}\n{result.stderr}")


def shard(folder: str) -> None:
    """What each of the two processes does for `sharded`: what accelerate does with `fsdp_version: 2`, which it does on GPUs only."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo")
    rank, trained, data = torch.distributed.get_rank(), model().train(), rows()
    mesh = init_device_mesh("cpu", (2,))
    for block in trained.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(trained, mesh=mesh)
    plain = torch.optim.SGD(trained.parameters(), lr=0.1)
    for step in range(STEPS):
        batch = [data[(4 * step + i) % len(data)] for i in range(4)]
        count = sum(int((sample["labels"] != IGNORE).sum()) for sample in batch)
        loss = trained(**collate(batch[2 * rank : 2 * rank + 2]), skip_logits=True, use_cache=False, num_items_in_batch=count).loss
        (2 * loss).backward()  # gradients are averaged over both
        plain.step()
        plain.zero_grad()
    whole = torch.cat([p.detach().full_tensor().flatten() for p in trained.parameters()])
    if rank == 0:
        torch.save(whole, Path(folder, "weights.pt"))
    torch.distributed.destroy_process_group()


def unsharded(folder: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """The steps of `shard` in one process."""
    trained, data = model(dtype).train(), rows()
    plain = torch.optim.SGD(trained.parameters(), lr=0.1)
    for step in range(STEPS):
        trained(**collate([data[(4 * step + i) % len(data)] for i in range(4)]), skip_logits=True, use_cache=False).loss.backward()
        plain.step()
        plain.zero_grad()
    return weights(trained)


FULL = dict(per_device_train_batch_size=64)  # all documents in every batch
# what is done otherwise -> (the same run as it is usually done, done otherwise); both take a folder
EQUIVALENCES: dict[str, tuple[Callable, Callable]] = {
    "2 batches of 2 accumulated, against a batch of 4": (
        learned, partial(learned, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    ),
    "documents packed into rows, against each in its own": (
        partial(learned, data=partial(rows, packing=False), **FULL), partial(learned, **FULL)
    ),
    "gradient checkpointing, against none": (learned, partial(learned, gradient_checkpointing=True)),
    "compiled, against eager": (
        partial(learned, data=blocks), partial(learned, data=blocks, torch_compile=True, torch_compile_backend="aot_eager")
    ),
    "interrupted at step 2 and resumed, against straight on": (learned, resumed),
    "2 processes with batches of 2, against 1 with 4": (learned, launched),
    "2 processes with FSDP2 and batches of 2, against 1 with 4": (unsharded, sharded),
}  # fmt: skip


def compare(name: str) -> tuple[float, float]:
    """Largest difference between the weights of both runs, and what the rule of closeness allows.

    Raises:
        AssertionError: it is more.
    """
    usual, otherwise = EQUIVALENCES[name]
    with tempfile.TemporaryDirectory() as folder:
        plain, exact = usual(f"{folder}/plain"), usual(f"{folder}/exact", dtype=torch.float64)
        Path(folder, "other").mkdir()
        result = otherwise(f"{folder}/other")
    assert_close(result, plain, exact, name, gradient=True)
    assert not torch.equal(plain, weights(model())), f"{name}: nothing was learned"
    return (result - plain).abs().max().item(), error_bound(plain, exact, gradient=True)


def adapters(name: str) -> tuple[Coverage, float, float]:
    """Adapters on all declared targets of an architecture: their coverage, by how much they change the logits, and by how much
    these change again when they are merged, computed in float64."""
    subject = Subject(name)
    trained, ids = subject.model(dtype=torch.float64), subject.tokens(2, 9)
    with torch.no_grad():
        before = trained(ids).logits
        torch.manual_seed(0)
        adapted, coverage = add_lora(trained, (), r=4)
        for key, parameter in adapted.named_parameters():
            if "lora_B" in key:
                parameter.normal_(std=0.1)
        during = adapted(ids).logits
        after = adapted.merge_and_unload()(ids).logits
    return coverage, (during - before).abs().max().item(), (after - during).abs().max().item()


if __name__ == "__main__":
    what, folder = sys.argv[1:]
    if what == "sharded":
        shard(folder)
    else:
        result = learned(folder, per_device_train_batch_size=2)
        if os.environ["RANK"] == "0":
            torch.save(result, Path(folder, "weights.pt"))
