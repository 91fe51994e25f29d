"""Text that every machine with Python has: the reference topics behind `help()`."""

import torch
from torch import Tensor

# long topics of prose, code and tables in every CPython from 3.10 on; never trained on
HELD_OUT = ("debugger", "import", "strings", "calls")


def pydoc_topics() -> tuple[list[str], list[str]]:
    """CPython's `pydoc_data` topics: documents to train on, and the held-out ones.

    Topics quote one another, so a paragraph that a held-out topic contains is cut from the training documents, and of a
    paragraph that occurs twice only the first stays.
    """
    from pydoc_data.topics import topics

    held = [topics[name] for name in HELD_OUT]
    seen = {paragraph for text in held for paragraph in _paragraphs(text)}
    training = []
    for name in sorted(topics.keys() - set(HELD_OUT)):
        fresh = [p for p in _paragraphs(topics[name]) if p not in seen]
        seen.update(fresh)
        training.append("\n\n".join(fresh))
    return [text for text in training if text], held


def token_rows(tokenizer, documents: list[str], length: int, *, join: bool) -> Tensor:
    """`[N, length]` int64 rows of token ids; what is left over at the end is dropped.

    Args:
        tokenizer: of transformers.
        join: rows run on from one document to the next, with the end-of-sequence token between; otherwise no row holds
            text of two documents.

    Raises:
        ValueError: not even one row.
    """
    encoded = [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in documents]
    if join:
        between = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        encoded = [[token for ids in encoded for token in ids + between]]
    rows = [ids[i : i + length] for ids in encoded for i in range(0, len(ids) - length + 1, length)]
    if not rows:
        raise ValueError(
            f"the text is too short: its longest piece has {max(map(len, encoded), default=0)} tokens, a row needs {length}; give more"
        )
    return torch.tensor(rows)


def _paragraphs(text: str) -> list[str]:
    return [p for p in text.split("\n\n") if p.strip()]
