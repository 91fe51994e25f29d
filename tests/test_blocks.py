"""Attention over lists of blocks against pairs written out, and the sums that lists are chosen by against whole windows."""

import pytest
import torch
from torch import Tensor

from zoo.evaluate.closeness import assert_close
from zoo.kernels.attention import blocks, summaries
from zoo.ops import Packing, block_attention

SIZE = 5


def normal(*shape, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def drawn(queries: int, keys: int, lists: int, query_size: int) -> tuple[Tensor, ...]:
    shape = (2, lists, -(-queries // query_size), 3)
    chosen = torch.randint(-1, -(-keys // SIZE), shape, generator=torch.Generator().manual_seed(3))
    chosen = chosen if lists > 1 else chosen[:, 0]
    return normal(2, queries, 4, 8), normal(2, keys, 2, 8, seed=1), normal(2, keys, 2, 6, seed=2), chosen


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("lists", [1, 2, 4], ids=["shared", "each-group", "each-head"])
@pytest.mark.parametrize("query_size", [1, 3])
@pytest.mark.parametrize("places", [None, [[0, 4, 20, 7], [22, -1, 3, 11]]], ids=["last", "anywhere"])
def test_lists_pair_by_pair(backend, lists, query_size, places):
    q, k, v, chosen = drawn(4, 23, lists, query_size)
    given = {"size": SIZE, "query_size": query_size, "causal": True, "q_positions": None if places is None else torch.tensor(places)}
    out, _ = block_attention(q, k, v, chosen, **given, backend=backend)
    for row in range(2):
        for t, place in enumerate([19, 20, 21, 22] if places is None else places[row]):
            for head in range(4):
                listed = chosen[row, t // query_size] if lists == 1 else chosen[row, head * lists // 4, t // query_size]
                seen = [j for n in listed.tolist() if n >= 0 for j in range(n * SIZE, min(n * SIZE + SIZE, 23)) if j <= place]
                expected = torch.zeros(6, dtype=torch.float64)
                if seen:
                    logits = k[row, seen, head // 2] @ q[row, t, head] / 8**0.5
                    expected = logits.softmax(0) @ v[row, seen, head // 2]
                assert_close(out[row, t, head].float(), expected.float(), expected, f"row {row}, query {t}, head {head}")


@pytest.mark.parametrize("lists", [1, 2, 4], ids=["shared", "each-group", "each-head"])
def test_many_queries_are_answered_in_turn(monkeypatch, lists):
    """The loop that long sequences take, with its recomputation, against the definition."""
    monkeypatch.setattr(blocks, "GATHERED", 1)
    *given, chosen = drawn(50, 50, lists, 1)
    results = []
    for backend in ("reference", "chunked"):
        leaves = [x.clone().requires_grad_() for x in given]
        out, _ = block_attention(*leaves, chosen, size=SIZE, query_size=1, causal=True, backend=backend)
        results.append([out.detach(), *torch.autograd.grad(out.square().sum(), leaves)])
        with torch.no_grad():
            results[-1].append(block_attention(*given, chosen, size=SIZE, query_size=1, causal=True, backend=backend)[0])
    for exact, result in zip(*results, strict=True):
        assert_close(result.float(), exact.float(), exact, "in turn")


def test_lists_are_checked():
    q, k, v, chosen = drawn(4, 23, 2, 1)
    with pytest.raises(ValueError, match="chosen"):
        block_attention(q, k, v, chosen[:, :, 1:], size=SIZE, query_size=1)
    with pytest.raises(ValueError, match="q_positions"):
        block_attention(q, k, v, chosen, size=SIZE, query_size=1, q_positions=torch.zeros(2, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="query_size"):
        block_attention(q, k, v, chosen, size=SIZE, query_size=0)
    with pytest.raises(ValueError, match="q_positions"):
        block_attention(k.repeat(1, 1, 2, 1), k[:, :4], v[:, :4], chosen, size=SIZE, query_size=1, causal=True)


@pytest.mark.parametrize("size, stride", [(4, 4), (6, 2), (6, 3)])
@pytest.mark.parametrize("grad", [False, True], ids=["in-place", "out-of-place"])
def test_sums_grow_with_the_sequence(size, stride, grad):
    """In pieces, as rows and packed, weighted: complete sums are those of the windows cut out, and the last ones say when."""
    x, weight, lengths = normal(3, 40, 2, 5), normal(size, 5, seed=1).unsqueeze(1), [40, 3, 29]
    with torch.set_grad_enabled(grad):
        rows = packed = None
        for start, stop in ((0, 1), (1, 17), (17, 18), (18, 40)):
            at = torch.arange(start, stop).expand(3, -1)
            rows = summaries.add(rows, x[:, start:stop], at, stop, size=size, stride=stride, weight=weight)
            counts = [max(0, min(stop, length) - start) for length in lengths]
            packing = Packing.from_lengths(counts)
            new = torch.cat([x[n, start : start + count] for n, count in enumerate(counts)]).unsqueeze(0)
            place = (packing.positions + start).unsqueeze(0)
            packed = summaries.add(packed, new, place, stop, size=size, stride=stride, weight=weight, packing=packing)
    assert rows.shape[1] == summaries.windows(40, stride)
    last = summaries.last_positions(rows.shape[1], size=size, stride=stride, device="cpu")
    for n, length in enumerate(lengths):
        for window, end in enumerate(last.tolist()):
            for sums, whole in ((rows, 40), (packed, length)):
                if end < whole:
                    expected = (x[n, end + 1 - size : end + 1] * weight).sum(0)
                    assert_close(sums[n, window].float(), expected.float(), expected, f"window {window} of row {n}")
    counted = sum((last <= place).sum().item() for place in range(40))
    assert summaries.pairs(40, size=size, stride=stride) == counted
    assert summaries.pairs(size - 1, size=size, stride=stride) == 0
