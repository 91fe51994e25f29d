"""The tokenizer of RWKV's World models, against its definition, on a small made-up vocabulary."""

import random

import pytest

import zoo

SYLLABLES = ("a", "b", "ab", " a", "é", "à", "世", "界", "\n", "'", "🜁")


def made_up(size: int = 80) -> list[bytes]:
    """All bytes, and pieces that overlap in every way, some of them in the middle of a character."""
    draw, pieces = random.Random(0), {bytes([byte]): None for byte in range(256)}
    while len(pieces) < 256 + size:
        piece = "".join(draw.choices(SYLLABLES, k=draw.randint(1, 5))).encode()
        start, end = sorted(draw.choices(range(len(piece) + 1), k=2)) if draw.random() < 0.5 else (0, len(piece))
        pieces[piece[start:end] or b"a"] = None
    return list(pieces)


def written(pieces: list[bytes]) -> list[str]:
    """The lines of a vocabulary file, which spell as text what is text."""

    def literal(piece: bytes) -> str:
        text = piece.decode("utf-8", errors="replace")
        return repr(piece) if "\ufffd" in text else repr(text)

    return [f"{index} {literal(piece)} {len(piece)}\n" for index, piece in enumerate(pieces, 1)]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "vocabulary.txt"
    path.write_text("".join(written(made_up())), encoding="utf-8")
    return path


def test_every_token_is_the_longest_piece_that_fits(file):
    pieces, tokenizer, draw = made_up(), zoo.WorldTokenizer(file), random.Random(1)
    used = set()
    for _ in range(200):
        text = "".join(draw.choices([*SYLLABLES, chr(draw.randrange(0x20, 0xD7FF))], k=draw.randint(0, 30)))
        rest, ids = text.encode(), []
        while rest:
            longest = max((piece for piece in pieces if rest.startswith(piece)), key=len)
            ids.append(pieces.index(longest) + 1)
            rest = rest[len(longest) :]
        assert tokenizer.encode(text) == ids and tokenizer.decode(ids) == text
        used |= {len(pieces[index - 1]) for index in ids}
    assert len(used) > 5, "the texts are cut into pieces of too few lengths to tell anything"


def test_it_does_what_tokenizers_of_transformers_do(file, tmp_path):
    tokenizer = zoo.WorldTokenizer(file)
    assert len(tokenizer) == tokenizer.vocab_size == 337
    batch = tokenizer(["ab", "a世ab'"], padding=True, return_tensors="pt")
    assert batch.keys() == {"input_ids", "attention_mask"} and batch["input_ids"][0, -1] == 0 == batch["attention_mask"][0, -1]
    ended = f"b{tokenizer.eos_token}a"
    assert tokenizer.encode(ended) == [99, 0, 98] and tokenizer.decode([99, 0, 98]) == ended
    assert tokenizer.decode([99, 0, 98], skip_special_tokens=True) == "ba"
    assert tokenizer.decode(["世".encode()[0] + 1]) == "\ufffd"
    tokenizer.add_tokens(["世世"])
    tokenizer.save_pretrained(tmp_path / "saved")
    again = zoo.WorldTokenizer.from_pretrained(tmp_path / "saved")
    assert again.get_vocab() == tokenizer.get_vocab() and again.encode("a世世") == [98, 337] and again.decode([98, 337]) == "a世世"


@pytest.mark.parametrize(
    "number, line, message",
    [
        (3, "3 '\\x02' 2\n", r"line 3 is .*, expected '3 literal length'"),
        (3, "4 '\\x02' 1\n", r"line 3 is .*, expected '3 literal length'"),
        (3, "3 open('x') 1\n", r"line 3 is .*, expected '3 literal length'"),
        (3, "3 7 1\n", r"line 3 is .*, expected '3 literal length'"),
        (3, "\n", r"line 3 is '', expected '3 literal length'"),
        (3, "3 '\\x01' 1\n", "has a piece twice, or not all 256 bytes"),
        (3, "3 'abababab' 8\n", "has a piece twice, or not all 256 bytes"),
    ],
)
def test_a_damaged_vocabulary_is_refused(file, number, line, message):
    lines = written(made_up())
    lines[number - 1] = line
    file.write_text("".join(lines), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        zoo.WorldTokenizer(file)


def test_a_token_behind_the_vocabulary_is_refused(file):
    with pytest.raises(ValueError, match="there is no token 337: the vocabulary ends at 336"):
        zoo.WorldTokenizer(file).decode([337])
