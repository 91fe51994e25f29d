"""Conversion that holds one layer at a time: blocks are read from the files when their turn comes, what they read lies on the disk.

A stage whose layers learn apart from one another (`Stage.apart`) can go layer by layer instead of row by row: a teacher's block
maps the activations of all rows to the next layer's, and the new mixer beside it learns meanwhile. Device memory holds a block of the
teacher, one of the student with Adam's moments for its mixer, and the activations of one pass.
"""

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig

from zoo.auto import model_class
from zoo.block import Block
from zoo.convert.fit import Steps, order, paces
from zoo.convert.headers import blank_teacher
from zoo.convert.objectives import ask, ask_mixer, compare, entering
from zoo.convert.recipe import Stage
from zoo.convert.starts import begin_layer, needs_text
from zoo.convert.student import converted_layers
from zoo.convert.trainable import trained
from zoo.convert.weights import Account, seed_mixer
from zoo.keys import State
from zoo.loss import chunked_cross_entropy
from zoo.mixer import Mixer
from zoo.models.hybrid import HybridConfig
from zoo.saving import whole_or_nothing
from zoo.stored import read_index

SPARE = 0.9  # of the free disk that activations may take
FORMAT = {"format": "pt"}
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


class Tensors(Mapping):
    """The tensors of a folder's safetensors files, each read when it is asked for."""

    def __init__(self, folder: Path):
        if (folder / INDEX).is_file():
            self.files = {name: folder / file for name, file in read_index(str(folder / INDEX)).items()}
        elif (folder / WEIGHTS).is_file():
            with safe_open(folder / WEIGHTS, framework="pt") as file:
                self.files = dict.fromkeys(file.keys(), folder / WEIGHTS)
        else:
            raise ValueError(f"{folder} has no {WEIGHTS}, whole or in shards, to read single layers from; download or convert the teacher")

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self.files[name], framework="pt") as file:
            return file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)


class Shelf:
    """A language model in a folder, of which parts are read in float32.

    Attributes: model: itself, on the meta device; dtype: of its files.
    """

    def __init__(self, path: str | os.PathLike):
        self.tensors = Tensors(Path(path))
        config = (
            AutoConfig.from_pretrained(path) if json.loads(Path(path, "config.json").read_text())["model_type"] == "zoo_hybrid" else None
        )
        self.model, self.layout = blank_teacher(str(path)) if config is None else (blank(config), None)
        self.dtype = next(dtype for name in self.tensors if (dtype := self.tensors[name].dtype).is_floating_point)

    def state(self, prefix: str) -> State:
        """Its tensors of this beginning, in the dtype of the files."""
        if self.layout is not None:
            return self.layout.to_zoo(self.tensors, self.model, only=lambda name: name.startswith(prefix))[0]
        return {name: self.tensors[name] for name in self.model.state_dict() if name.startswith(prefix) and name in self.tensors}

    def block(self, index: int, device: str = "cpu") -> Block:
        """One layer, in evaluation mode and without gradients."""
        prefix = f"model.layers.{index}."
        with torch.device("meta"):
            block = Block(self.model.config.layer_configs()[index], index)
        state = {name.removeprefix(prefix): tensor.to(device, torch.float32) for name, tensor in self.state(prefix).items()}
        block.load_state_dict(state, assign=True)
        return block.eval().requires_grad_(False)

    def outside(self) -> State:
        """What belongs to no layer: embedding, last norm, and the head where it is not the embedding."""
        return {name: tensor for stem in ("model.embed", "model.norm.", "lm_head.") for name, tensor in self.state(stem).items()}

    def embedding(self) -> Callable[[Tensor], Tensor]:
        """Tokens `[N, T]` -> what the first layer reads of them, `[N, T, D]`; on the CPU, so that no device holds the table."""
        model = self._shell().model

        @torch.no_grad()
        def embed(rows: Tensor) -> Tensor:
            return entering(model, rows.long())

        return embed

    @torch.no_grad()
    def perplexity(self, rows: Tensor, device: str) -> float:
        """Of tokens `[N, T]`, each given those before it in its row."""
        embed = self.embedding()
        at = [(embed(row).to(device), None) for row in rows.split(1)]
        for index in range(self.model.config.num_hidden_layers):
            block = self.block(index, device)
            at = [block(x, None, None, carry)[::2] for x, carry in at]
        del embed  # before what stands behind the layers is read
        shell, vocabulary = self._shell(), self.model.config.vocab_size
        shell.model.norm.to(device)
        shell.lm_head.to(device)
        losses = [
            chunked_cross_entropy(shell.model.norm(x), row.long().to(device), shell._logits, vocabulary)
            for (x, _), row in zip(at, rows.split(1), strict=True)
        ]
        return math.exp(sum(loss.item() for loss in losses) / len(losses))

    def _shell(self) -> nn.Module:
        """The model with weights outside its layers only."""
        shell = blank(self.model.config)
        shell.model.layers = nn.ModuleList()
        shell.load_state_dict({name: tensor.float() for name, tensor in self.outside().items()}, strict=False, assign=True)
        if self.model.config.tie_word_embeddings:
            shell.lm_head.weight = shell.model.embed_tokens.weight
        return shell.eval().requires_grad_(False)


def blank(config) -> nn.Module:
    with torch.device("meta"):
        return model_class(config, "causal_lm")(config)


def write(path: Path, put: Callable[[Path], object]) -> None:
    """Write a file that is there whole or not at all."""
    stage = path.with_name(f".{path.name}.new")
    put(stage)
    os.replace(stage, path)


# -- the student ---------------------------------------------------------------------------------------------------------


def shard(config: HybridConfig, index: int) -> str:
    """The file of a layer of a student; behind the last layer, that of everything else."""
    return f"model-{index + 1:05d}-of-{config.num_hidden_layers + 1:05d}.safetensors"


@torch.no_grad()
def write_student(
    folder: Path, teacher: Shelf, config: HybridConfig, *, inits: dict[str, str], seed: int, rows: Tensor | None, device: str
) -> None:  # fmt: skip
    """Write the student as converted, a file a layer: replaced mixers in float32, the rest as the teacher's files have it.

    Args: inits: see `zoo.convert.starts`; rows: text that they may be measured on. Every layer draws from a seed of its own.
    """
    shell, names = blank(config), {}
    replaced = converted_layers(shell)
    x = teacher.embedding()(rows).to(device) if needs_text(inits, rows) else None
    with whole_or_nothing(folder) as stage:
        for index in range(config.num_hidden_layers):
            source, prefix = teacher.block(index, device), f"model.layers.{index}."
            block = drawn(shell, index, seed).to(device)
            seed_mixer(source.mixer, block.mixer, Account(), f"{prefix}mixer.")
            for name, weight in source.state_dict().items():
                if not name.startswith("mixer."):
                    block.get_parameter(name).copy_(weight)
            if index in replaced:
                begin_layer(source, block, inits, x)
            own = filed(block, index, teacher.dtype, index in replaced)
            save_file(own, stage / shard(config, index), FORMAT)
            names |= dict.fromkeys(own, shard(config, index))
            x = None if x is None else source(x)[0]
        rest = {name: tensor for name, tensor in teacher.outside().items() if name in shell.state_dict()}
        if config.tie_word_embeddings:
            rest.pop("lm_head.weight", None)
        save_file(rest, stage / shard(config, config.num_hidden_layers), FORMAT)
        names |= dict.fromkeys(rest, shard(config, config.num_hidden_layers))
        (stage / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names}, indent=1) + "\n", encoding="utf-8")
        config.architectures, config.dtype = [type(shell).__name__], torch.float32
        config.save_pretrained(stage)


def filed(block: Block, index: int, dtype: torch.dtype, replaced: bool) -> State:
    """A layer as its file has it: a replaced mixer in float32, the rest in this dtype."""
    own = {name: torch.float32 if replaced and name.startswith("mixer.") else dtype for name in block.state_dict()}
    return {f"model.layers.{index}.{name}": weight.to("cpu", own[name]).contiguous() for name, weight in block.state_dict().items()}


def drawn(shell: nn.Module, index: int, seed: int) -> Block:
    """A new layer as its architecture draws it."""
    with torch.random.fork_rng():
        torch.manual_seed(seed * 100_003 + index)
        block = Block(shell.config.layer_configs()[index], index)
        block.apply(shell._init_weights)
    if type(block.mixer).borrow is not Mixer.borrow:
        raise ValueError(f"{type(block.mixer).__name__} borrows modules of other layers, which a conversion layer by layer does not hold")
    if outside := {name for name, _ in block.named_buffers()} - block.state_dict().keys():
        raise ValueError(
            f"{type(block.mixer).__name__} has {min(outside)} in no file, so that a layer cannot be read alone; leave --stream out"
        )
    return block.requires_grad_(False)


# -- its training --------------------------------------------------------------------------------------------------------


class Activations:
    """What the layers at hand read of some rows, `[N, T, D]` and behind it what is carried, in a file; indexed by the rows' numbers."""

    def __init__(self, folder: str, numbers: Tensor, count: int, length: int, width: int, dtype: torch.dtype):
        self.shape, self.place, self.width = (count, length), torch.full((count,), -1), width
        self.place[numbers] = torch.arange(len(numbers))
        self.numbers, self.folder, self.dtype = numbers, Path(folder), dtype
        self.states = self._file("states", width)
        self.carried: Tensor | None = None

    def _file(self, name: str, width: int) -> Tensor:
        kind = np.float32 if self.dtype == torch.float32 else np.int16  # whose bits may be those of a bfloat16
        raw = np.memmap(self.folder / name, kind, "w+", shape=(len(self.numbers), self.shape[1], width))
        return torch.from_numpy(raw).view(self.dtype)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, numbers: Tensor) -> Tensor:
        """`[B, T, .]` in float32, states and behind them what is carried."""
        at = self.place[numbers]
        parts = [part[at] for part in (self.states, self.carried) if part is not None]
        return torch.cat(parts, dim=-1).float()

    def split(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        x, carry = rows.split([self.width, rows.shape[-1] - self.width], dim=-1)
        return x, carry if carry.shape[-1] else None

    def put(self, numbers: Tensor, x: Tensor, carry: Tensor | None) -> None:
        at = self.place[numbers]
        self.states[at] = x.to("cpu", self.dtype)
        if carry is not None:
            if self.carried is None:
                self.carried = self._file("carried", carry.shape[-1])
            self.carried[at] = carry.to("cpu", self.dtype)


def fitting(folder: Path, rows: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """As many of the rows as have room for their activations on the disk, twice over where something is carried.

    Raises:
        ValueError: not even one.
    """
    free = SPARE * shutil.disk_usage(folder).free
    count = int(free // (2 * rows.shape[1] * width * dtype.itemsize))
    if not count:
        raise ValueError(
            f"{folder} has {free / 2**30:.1f} GiB of disk, too little for the activations of one row of {rows.shape[1]} tokens"
        )
    return rows[:count]


def align(
    folder: Path, teacher: Shelf, stage: Stage, rows: Tensor, *, fresh: set[str], seed: int, device: str, done: dict[str, list],
    finished: Callable[[], None], stop: Callable[[], bool], label: str | None = None,
) -> bool:  # fmt: skip
    """Train the student in `folder` layer by layer, each from the teacher's activations; its files are replaced as layers end.

    Args:
        rows: `[N, T]` token ids; fresh: as `Fit` has it.
        done: layer -> its losses, of layers that are; more are added. finished: called whenever one was.
        stop: asked after every step; where it says so the layer at hand is given up.

    Returns:
        whether all layers are done.
    """
    if "lora" in stage.parts:
        raise ValueError(f"stage {stage.name!r}: adapters are not trained layer by layer; train: mixer, or leave --stream out")
    student = Shelf(folder)
    replaced, names = converted_layers(student.model), trained(student.model, stage, fresh)
    numbers = torch.cat(list(order(len(rows), stage.batch, stage.steps, seed))).unique()
    width = student.model.config.hidden_size
    with TemporaryDirectory(prefix=".activations.", dir=folder) as place:
        known = Activations(place, numbers, len(rows), rows.shape[1], width, teacher.dtype)
        chunks = numbers.split(stage.batch // stage.accumulate)
        embed = teacher.embedding()
        for chunk in chunks:
            known.put(chunk, embed(rows[chunk]), None)
        del embed  # and the table with it
        for index in range(replaced[-1] + 1):
            source, block = teacher.block(index, device), student.block(index, device) if index in replaced else None
            if block is not None and str(index) not in done:
                prefix = f"model.layers.{index}."
                own = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
                steps = layer_steps(stage, source, block, known, own, index, seed)
                steps.run(None if label is None else f"{label} layer {index}", lambda _: stop())
                if not steps.done:
                    return False
                state = filed(block, index, teacher.dtype, True)
                write(folder / shard(student.model.config, index), lambda path, state=state: save_file(state, path, FORMAT))
                done[str(index)] = steps.history
                finished()
            if index < replaced[-1]:
                for chunk in chunks:
                    move(known, chunk, source, block, device)
    return True


def layer_steps(stage: Stage, source: Block, block: Block, known: Activations, names: list[str], index: int, seed: int) -> Steps:
    """The steps of one layer."""

    def objective(rows: Tensor) -> list[float]:
        x, carry = known.split(rows)
        loss, _, _ = compare(stage, source, block, x, carry=carry)
        loss.backward()
        return [loss.item()]

    own = dict(block.named_parameters())
    return Steps(
        block, {name: own[name] for name in names}, objective, known, stage, what=[f"layer {index}"], paces=paces(block, stage), seed=seed
    )


@torch.no_grad()
def move(known: Activations, chunk: Tensor, source: Block, block: Block | None, device: str) -> None:
    """Replace the activations of some rows by what the next layer reads."""
    x, carry = known.split(known[chunk].to(device))
    if block is not None and block.mixer.traits.carry:
        answer = ask(source, x)
        known.put(chunk, answer.out, ask_mixer(block.mixer, answer.read, carry).carry)
    else:
        known.put(chunk, source(x)[0], carry)
