"""Text, chats and tokens as rows of whole documents that never see one another."""

import bisect
import hashlib
import json
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from zoo.generate import begin

IGNORE = -100
KINDS = '{"text": ...}, {"prompt": ..., "completion": ...} or {"messages": [{"role": ..., "content": ...}, ...]}'
Piece = tuple[str, bool]  # some text, and whether the model learns to write it


class Rows(Dataset):
    """Rows of at most `block_size` tokens, each holding whole documents or pieces of one.

    An item has `input_ids` and `labels` `[T]`, -100 at the first token of every document, which nothing predicts, and where the
    model is not to learn; and `lengths`, those of its documents.

    Args:
        tokens, trained: `[total]`, all documents end to end; None: all tokens are trained on.
        rows: for every row the places `(start, stop)` of its documents; None: the tokens are cut every `block_size`.
        end: a token behind which a new document begins, where the places do not say so.
    """

    def __init__(
        self, tokens: np.ndarray, block_size: int, *, trained: np.ndarray | None = None,
        rows: list[list[tuple[int, int]]] | None = None, end: int | None = None,
    ):  # fmt: skip
        self.tokens, self.block_size, self.trained, self.rows, self.end = tokens, block_size, trained, rows, end

    def __len__(self) -> int:
        return len(self.tokens) // self.block_size if self.rows is None else len(self.rows)

    def __getitem__(self, index: int) -> dict:
        places = [(index * self.block_size, (index + 1) * self.block_size)] if self.rows is None else self.rows[index]
        ids = np.concatenate([self.tokens[start:stop] for start, stop in places]).astype(np.int64)
        lengths = [stop - start for start, stop in places]
        if self.end is not None:
            ends = [0, *(np.flatnonzero(ids[:-1] == self.end) + 1).tolist(), len(ids)]
            lengths = [after - before for before, after in pairwise(ends)]
        labels = ids.copy()
        if self.trained is not None:
            labels[~np.concatenate([self.trained[start:stop] for start, stop in places])] = IGNORE
        labels[np.cumsum([0, *lengths[:-1]])] = IGNORE
        return {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(labels), "lengths": lengths}

    def fingerprint(self) -> str:
        """Changes when the rows do: their places and at most 2^20 tokens, evenly spread."""
        digest = hashlib.sha256(repr((len(self.tokens), self.block_size, self.end, self.rows)).encode())
        for start in np.linspace(0, max(0, len(self.tokens) - 2**14), 64).astype(int):
            for part in (self.tokens, self.trained):
                digest.update(b"" if part is None else part[start : start + 2**14].tobytes())
        return digest.hexdigest()[:16]

    def describe(self) -> str:
        documents = "" if self.rows is None else f", {sum(map(len, self.rows)):,} documents"
        return f"{len(self):,} rows of at most {self.block_size:,} tokens{documents}, {len(self.tokens):,} tokens"


def collate(samples: list[dict]) -> dict[str, Tensor]:
    """A batch: `[B, T]` where every row is one document and all are as long, else `[1, total]` with `cu_seq_lens_q`; no pads."""
    lengths = [length for sample in samples for length in sample["lengths"]]
    if len(lengths) == len(samples) and len(set(lengths)) == 1:
        return {name: torch.stack([sample[name] for sample in samples]) for name in ("input_ids", "labels")}
    batch = {name: torch.cat([sample[name] for sample in samples])[None] for name in ("input_ids", "labels")}
    return batch | {"cu_seq_lens_q": torch.tensor([0, *lengths]).cumsum(0).int()}


# -- documents ---------------------------------------------------------------------------------------------------------


def documents(path: Path, tokenizer) -> Iterator[tuple[str, str, list[Piece]]]:
    """`(where, kind, pieces)` of every document: a line of a .jsonl file, or any other file as a whole.

    Raises:
        ValueError: what is not there, not JSON, or not of one of the three kinds; file and line are named.
    """
    if not path.is_file():
        raise ValueError(f"{path} is no file; name .jsonl, .bin, .npy or text files")
    if path.suffix not in (".jsonl", ".json"):
        try:
            yield str(path), "text", [(path.read_text(encoding="utf-8"), True)]
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is no text in UTF-8: {error}") from error
        return
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                where = f"{path}:{number}"
                try:
                    record = json.loads(line)
                except ValueError as error:
                    raise ValueError(f"{where}: not JSON ({error}); expected one object a line, {KINDS}") from error
                yield where, *pieces(record, where, tokenizer)


def pieces(record: dict, where: str, tokenizer) -> tuple[str, list[Piece]]:
    """Kind and pieces of one record.

    Raises:
        ValueError: it is of none of the kinds, a value is no text, or a chat cannot be written out.
    """
    keys = set(record) if isinstance(record, dict) else set()
    if "messages" in keys:
        return "chat", turns(record["messages"], where, tokenizer)
    names = ("prompt", "completion") if "prompt" in keys else ("text",)
    if not keys.issuperset(names) or not all(isinstance(record[name], str) for name in names):
        found = f"an object with {sorted(keys)}" if keys else f"{type(record).__name__}"
        raise ValueError(f"{where}: expected {KINDS} with texts as values, found {found}")
    return names[0], [(record[name], name != "prompt") for name in names]


def turns(messages: list, where: str, tokenizer) -> list[Piece]:
    """A chat as its template writes it, cut at the assistant's turns; those are learned, with what the template puts behind them.

    Raises:
        ValueError: no messages, no template, no assistant, or a template that writes a turn otherwise once others follow.
    """
    whole = isinstance(messages, list) and messages and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in messages)
    if not whole or not any(m["role"] == "assistant" for m in messages):
        raise ValueError(f"{where}: messages must be a list of objects with role and content, one at least the assistant's")
    if not tokenizer.chat_template:
        raise ValueError(f"{where} is a chat, but the tokenizer has no chat template; name a file with one: --chat_template FILE")

    def written(count: int, **kwargs) -> str:
        return tokenizer.apply_chat_template(messages[:count], tokenize=False, **kwargs) if count else ""

    found, text = [], ""
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            for upto, learned in ((written(index, add_generation_prompt=True), False), (written(index + 1), True)):
                if not upto.startswith(text):
                    raise ValueError(
                        f"{where}: the chat template does not just append turn {index + 1}, so its place is unknown; name another one: "
                        "--chat_template FILE"
                    )
                found.append((upto[len(text) :], learned))
                text = upto
    return found


def encode(tokenizer, kind: str, parts: list[Piece]) -> tuple[list[int], list[bool]]:
    """Token ids of a document, and which the model learns.

    A text or completion begins as `zoo.generate` begins one, and ends with the end-of-sequence token; a chat is what its template
    says. A token across two pieces belongs to the later one.
    """
    if tokenizer.is_fast:
        text = "".join(part for part, _ in parts)
        read = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        borders = np.cumsum([len(part) for part, _ in parts])
        owners = np.searchsorted(borders, [max(stop, 1) for _, stop in read["offset_mapping"]])
        ids, learned = read["input_ids"], [parts[owner][1] for owner in owners]
    else:
        read = [tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"] for part, _ in parts]
        ids = [token for some in read for token in some]
        learned = [flag for some, (_, flag) in zip(read, parts, strict=True) for _ in some]
    if kind == "chat":
        return ids, learned
    before, behind = begin(tokenizer), [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    return before + ids + behind, [False] * len(before) + learned + [True] * len(behind)


# -- rows --------------------------------------------------------------------------------------------------------------


def text_rows(
    found: Iterable[tuple[str, str, list[Piece]]], tokenizer, block_size: int, *, packing: bool = True, drop_long: bool = False
) -> Rows:
    """Rows of encoded documents. Texts longer than a row are cut into several; a chat or completion that is longer is an error.

    Args:
        packing: several documents share a row, best fit first; otherwise each has its own.
        drop_long: leave out what is too long instead.

    Raises:
        ValueError: nothing to learn from, or a document that is too long.
    """
    ids, learned, places, total = [], [], [], 0
    for where, kind, parts in found:
        own, flags = encode(tokenizer, kind, parts)
        if kind != "text" and len(own) > block_size:
            if drop_long:
                continue
            raise ValueError(
                f"{where}: {len(own)} tokens, but a row holds {block_size}; raise --block_size, or leave such documents out: --drop_long"
            )
        cuts = [*range(0, len(own), block_size), len(own)]
        places += [(total + a, total + b) for a, b in pairwise(cuts) if any(flags[a + 1 : b])]
        ids.append(np.array(own, dtype=np.int32))
        learned.append(np.array(flags, dtype=bool))
        total += len(own)
    if not places:
        raise ValueError("the data is empty: no document has a token to learn behind its first; name other files")
    rows = packed(places, block_size) if packing else [[place] for place in places]
    return Rows(np.concatenate(ids), block_size, trained=np.concatenate(learned), rows=rows)


def packed(places: list[tuple[int, int]], size: int) -> list[list[tuple[int, int]]]:
    """Documents in rows of at most `size` tokens, the longest first, each where it leaves the least room."""
    rows: list[list[tuple[int, int]]] = []
    free: list[tuple[int, int]] = []  # (room left, row), sorted
    for start, stop in sorted(places, key=lambda place: place[0] - place[1]):
        at = bisect.bisect_left(free, (stop - start, -1))
        room, row = free.pop(at) if at < len(free) else (size, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append((start, stop))
        bisect.insort(free, (room - (stop - start), row))
    return rows


def token_rows(path: Path, block_size: int, vocab_size: int, end: int | None) -> Rows:
    """Rows of tokens that stay on the disk: an .npy file of integers, or a .bin file of them as they lie in memory, with
    16 bits each where the vocabulary fits and 32 otherwise.

    Raises:
        ValueError: not integers, fewer than a row, or an id outside the vocabulary.
    """
    if not path.is_file():
        raise ValueError(f"{path} is no file")
    tokens = (
        np.load(path, mmap_mode="r") if path.suffix == ".npy" else np.memmap(path, np.uint16 if vocab_size <= 2**16 else np.uint32, "r")
    )
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu" or len(tokens) < block_size:
        raise ValueError(f"{path} holds {list(tokens.shape)} {tokens.dtype}; expected one row of at least {block_size} integers")
    for start in range(0, len(tokens), 2**24):
        check_ids(tokens[start : start + 2**24], vocab_size, path)
    return Rows(tokens, block_size, end=end)


def check_ids(tokens: np.ndarray, vocab_size: int, source) -> None:
    """Raise ValueError if a token id lies outside the vocabulary."""
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocab_size:
        wrong = low if low < 0 else high
        raise ValueError(f"{source}: token id {wrong} is outside the vocabulary of {vocab_size}; was it made by another tokenizer?")


def text_bytes(samples: list[dict], tokenizer) -> int:
    """UTF-8 bytes of the text whose tokens have labels, as the tokenizer decodes them."""
    total = 0
    for sample in samples:
        for labels in sample["labels"].split(sample["lengths"]):
            total += len(tokenizer.decode(labels[labels != IGNORE], skip_special_tokens=True).encode("utf-8"))
    return total
