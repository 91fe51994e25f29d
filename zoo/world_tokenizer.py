"""The tokenizer of RWKV's World models: bytes, cut from left to right into the longest pieces of a vocabulary."""

import ast
import os
from pathlib import Path

from transformers import AddedToken, PreTrainedTokenizer

END = "<|rwkv_tokenizer_end_of_text|>"  # token 0, which stands for no bytes


class WorldTokenizer(PreTrainedTokenizer):
    """Greedy longest match: every token is the longest piece that the rest of the text's UTF-8 bytes begins with.

    Token 0 begins, ends and pads, but none is added. As strings, tokens are in Latin-1: a character a byte.

    Args: vocab_file: lines `index literal length`, the indices 1, 2, 3, ...; a literal is Python's, of bytes or of a str that counts
    as its UTF-8 bytes. All 256 single bytes must be among them, so that any text can be cut. Raises ValueError otherwise.
    """

    vocab_files_names = {"vocab_file": "rwkv_vocab_v20230424.txt"}
    model_input_names = ["input_ids", "attention_mask"]

    def __init__(self, vocab_file: str | os.PathLike, *, bos_token=END, eos_token=END, pad_token=END, **kwargs):
        self.text = Path(vocab_file).read_text(encoding="utf-8")
        self.pieces = [END] + [read_piece(line, number) for number, line in enumerate(self.text.rstrip("\n").split("\n"), 1)]
        self.ids = {piece: index for index, piece in enumerate(self.pieces)}
        if len(self.ids) < len(self.pieces) or not self.ids.keys() >= set(map(chr, range(256))):
            raise ValueError(f"{vocab_file} has a piece twice, or not all 256 bytes; download it again")
        self.lengths: dict[str, dict[int, None]] = {}  # of the pieces with the same first two bytes, falling
        for piece in sorted(self.pieces[1:], key=len, reverse=True):
            self.lengths.setdefault(piece[:2], {})[len(piece)] = None
        self._added_tokens_decoder = {0: AddedToken(END, normalized=False, special=True)}
        super().__init__(bos_token=bos_token, eos_token=eos_token, pad_token=pad_token, **kwargs)

    @property
    def vocab_size(self) -> int:
        return len(self.pieces)

    def get_vocab(self) -> dict[str, int]:
        return self.ids | self._added_tokens_encoder

    def _tokenize(self, text: str, **kwargs) -> list[str]:
        text, tokens, start = text.encode("utf-8").decode("latin-1"), [], 0
        while start < len(text):
            sizes = (*self.lengths.get(text[start : start + 2], ()), 1)
            tokens.append(next(piece for size in sizes if (piece := text[start : start + size]) in self.ids))
            start += len(tokens[-1])
        return tokens

    def _convert_token_to_id(self, token: str) -> int | None:
        return self.ids.get(token)

    def _convert_id_to_token(self, index: int) -> str:
        if not 0 <= index < len(self.pieces):
            raise ValueError(f"there is no token {index}: the vocabulary ends at {len(self.pieces) - 1}")
        return self.pieces[index]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        added = self._added_tokens_encoder
        return b"".join(t.encode("utf-8" if t in added else "latin-1") for t in tokens).decode("utf-8", errors="replace")

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        path = Path(save_directory, (f"{filename_prefix}-" if filename_prefix else "") + self.vocab_files_names["vocab_file"])
        path.write_text(self.text, encoding="utf-8")
        return (str(path),)


def read_piece(line: str, number: int) -> str:
    """The piece in line `number` of a vocabulary, in Latin-1."""
    index, _, rest = line.partition(" ")
    literal, _, length = rest.rpartition(" ")
    try:
        piece = ast.literal_eval(literal)
        piece = piece.encode("utf-8") if isinstance(piece, str) else piece
        valid = isinstance(piece, bytes) and piece and (int(index), int(length)) == (number, len(piece))
    except (ValueError, SyntaxError):
        valid = False
    if not valid:
        raise ValueError(f"line {number} is {line!r}, expected '{number} literal length' with the literal's length in bytes")
    return piece.decode("latin-1")
