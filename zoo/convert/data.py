"""What a conversion learns from: files of text or of tokens, Python's help topics, or what the teacher itself writes."""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from zoo.convert.teacher import open_teacher
from zoo.convert.texts import pydoc_topics
from zoo.generate import begin
from zoo.train.data import check_ids, documents, encode
from zoo.train.data import token_rows as token_file

BINARY = (".bin", ".npy")
WRITTEN = "teacher:"  # data that the teacher is to write


# -- files ---------------------------------------------------------------------------------------------------------------


def read_tokens(paths: tuple[str, ...], tokenizer, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Token ids to train on and held out, `[N]` each: the last tenth of every file, or certain of Python's help topics.

    A single file of tokens stays on the disk, from which rows are read as they are needed.

    Raises:
        ValueError: text without a tokenizer, no text, or ids that the teacher does not have.
    """
    if tokenizer is None and not (paths and all(Path(path).suffix in BINARY for path in paths)):
        raise ValueError("the teacher has no tokenizer, so the data must be files of tokens: --data tokens.npy")
    if not paths:
        parts = [torch.tensor([i for text in texts for i in encode(tokenizer, "text", [(text, True)])[0]]) for texts in pydoc_topics()]
        check_ids(parts[0].numpy(), vocab_size, "Python's help topics")
        return parts[0].int(), parts[1].int()
    train, held = [], []
    for path in map(Path, paths):
        tokens = map_tokens(path, vocab_size) if path.suffix in BINARY else encode_file(path, tokenizer, vocab_size)
        cut = len(tokens) - len(tokens) // 10
        train.append(tokens[:cut])
        held.append(tokens[cut:])
    if len(paths) == 1:
        return train[0], held[0]
    return torch.cat([part.int() for part in train]), torch.cat([part.int() for part in held])


def encode_file(path: Path, tokenizer, vocab_size: int) -> Tensor:
    """Token ids of a file of text or .jsonl, its documents end to end."""
    tokens = torch.tensor([i for _, kind, parts in documents(path, tokenizer) for i in encode(tokenizer, kind, parts)[0]]).int()
    if not len(tokens):
        raise ValueError(f"{path} holds no text; name another file")
    check_ids(tokens.numpy(), vocab_size, path)
    return tokens


def map_tokens(path: Path, vocab_size: int) -> Tensor:
    """Token ids of an .npy or .bin file, left on the disk."""
    if path.is_file() and not path.stat().st_size:
        raise ValueError(f"{path} is empty; name another file of tokens")
    found = token_file(path, 1, vocab_size, None).tokens  # checked; mapped anew so that torch may have it
    again = np.load(path, mmap_mode="c") if path.suffix == ".npy" else np.memmap(path, found.dtype, "c")
    return torch.from_numpy(again)


def rows_of(tokens: Tensor, length: int, what: str) -> Tensor:
    """`[N, length]`, a view; what is left over at the end is dropped."""
    count = len(tokens) // length
    if not count:
        raise ValueError(f"the {what} has {len(tokens)} tokens, a row needs {length}; give more with --data, or shorten the stage's length")
    return tokens[: count * length].view(count, length)


def spread(rows: Tensor, count: int) -> Tensor:
    """`count` of the rows at even distances, or all if they are fewer, as int64."""
    return rows[torch.linspace(0, len(rows) - 1, min(count, len(rows))).round().long()].long()


def fingerprint(tokens: Tensor) -> str:
    """Of all the tokens, whatever their width on the disk."""
    digest = hashlib.sha256()
    for part in tokens.split(2**22):
        digest.update(part.int().numpy().tobytes())
    return digest.hexdigest()[:16]


def deadline(minutes: float | None) -> Callable[[], bool]:
    """A question whether so many minutes have passed since now; None: they never have."""
    start = time.monotonic()
    return lambda: minutes is not None and time.monotonic() - start >= 60 * minutes


# -- what the teacher writes ---------------------------------------------------------------------------------------------


def provide(
    names: Iterable[str], teacher: str, folder: Path, *, seed: int, device: str, say: Callable[[str], None]
) -> tuple[str, ...]:  # fmt: skip
    """Whole paths of the data; for `teacher:N` the teacher writes N tokens into the folder first, and only once."""
    found = []
    for name in names:
        if name.startswith(WRITTEN):
            count = name.removeprefix(WRITTEN)
            if not count.isdigit():
                raise ValueError(f"--data {name} must say how many tokens, such as {WRITTEN}2000000")
            name = folder / f"sampled-{count}-{seed}.bin"
            model, tokenizer = open_teacher(teacher, device)
            sample_tokens(model, name, int(count), first=first_token(tokenizer), seed=seed, source=teacher, say=say)
        found.append(os.path.abspath(name))
    return tuple(found)


def first_token(tokenizer) -> int | None:
    """What a sampled text begins with; None where there is no tokenizer, or nothing it begins with."""
    return next(iter(begin(tokenizer)), None) if tokenizer else None


@torch.no_grad()
def sample_tokens(
    teacher: nn.Module, path: str | os.PathLike, count: int, *, first: int | None = None, seed: int = 0, length: int = 512, batch: int = 16,
    temperature: float = 1.0, source: str = "", stop: Callable[[], bool] = lambda: False, say: Callable[[str], None] = lambda line: None,
) -> bool:  # fmt: skip
    """Sample at least `count` tokens from the teacher into a .bin file, once: beside it a .json says whose, how, and their hash.

    Called again it goes on where it was left, to the same tokens; each batch has a seed of its own.

    Args:
        first: the token every text begins with; None: a random one.
        length: of a text; batch: texts at a time.
        source: what the .json says of the teacher.
        stop: asked after every batch; True leaves the rest for another call.
        say: called with a line when it begins and ends.

    Returns:
        whether all is there.

    Raises:
        ValueError: a temperature or size that is not positive, another kind of file, or one that was sampled otherwise.
    """
    path = Path(path)
    if path.suffix != ".bin":
        raise ValueError(f"{path}: sampled tokens go into a .bin file")
    if temperature <= 0 or min(count, length, batch) < 1:
        raise ValueError(f"temperature={temperature}, tokens={count}, length={length}, batch={batch}: all must be positive")
    asked = {"teacher": source, "first": first, "seed": seed, "length": length, "batch": batch, "temperature": temperature}
    notes, total = path.with_suffix(".json"), -(-count // (length * batch)) * length * batch
    known = json.loads(notes.read_text(encoding="utf-8")) if notes.is_file() else asked
    if path.is_file() and (wrong := [name for name in asked if asked[name] != known.get(name)]):
        raise ValueError(f"{path} was sampled with {wrong[0]}={known.get(wrong[0])!r}, not {asked[wrong[0]]!r}; name another file")
    width = np.uint16 if teacher.config.vocab_size <= 2**16 else np.uint32
    step = batch * length * width().itemsize
    done = path.stat().st_size // step if path.is_file() else 0
    write(notes, asked | {"tokens": done * batch * length})
    say(f"{done * batch * length:,} of {total:,} tokens are sampled")
    with path.open("r+b" if path.is_file() else "wb") as file:
        file.truncate(done * step)  # the last batch may have been cut
        file.seek(0, os.SEEK_END)
        while done * batch * length < total:
            file.write(sample_batch(teacher, first, length, batch, temperature, 2**20 * seed + done).astype(width).tobytes())
            done += 1
            if stop():
                break
    content = path.read_bytes()
    write(notes, asked | {"tokens": done * batch * length, "sha256": hashlib.sha256(content).hexdigest()})
    say(f"{done * batch * length:,} tokens are in {path}")
    return done * batch * length >= total


def sample_batch(teacher: nn.Module, first: int | None, length: int, batch: int, temperature: float, seed: int) -> np.ndarray:
    """`[batch, length]` token ids."""
    generator = torch.Generator(teacher.device).manual_seed(seed)
    ids = torch.randint(teacher.config.vocab_size, (batch, 1), generator=generator, device=teacher.device)
    if first is not None:
        ids = torch.full_like(ids, first)
    written, cache = [ids], None
    for _ in range(length - 1):
        out = teacher(input_ids=written[-1], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        chances = torch.softmax(out.logits[:, -1].float() / temperature, -1)
        written.append(torch.multinomial(chances, 1, generator=generator))
    return torch.cat(written, dim=1).cpu().numpy()


def write(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
