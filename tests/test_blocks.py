"""Attention over lists of blocks against pairs written out, the sums that lists are chosen by against whole windows, and the
choices of the architectures against their papers' formulas, token by token."""

import pytest
import torch
from torch import Tensor

from zoo import registry
from zoo.evaluate.closeness import assert_close
from zoo.evaluate.subject import Subject, mix, pieces
from zoo.kernels.attention import blocks, summaries
from zoo.layers import rotary_table, rotate
from zoo.ops import Packing, block_attention

SIZE = 5


def normal(*shape, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def drawn(queries: int, keys: int, lists: int, query_size: int) -> tuple[Tensor, ...]:
    shape = (2, lists, -(-queries // query_size), 3)
    chosen = torch.randint(-1, -(-keys // SIZE), shape, generator=torch.Generator().manual_seed(3))
    chosen = chosen if lists > 1 else chosen[:, 0]
    return normal(2, queries, 4, 8), normal(2, keys, 2, 8, seed=1), normal(2, keys, 2, 6, seed=2), chosen


@pytest.mark.parametrize("backend", ["reference", "gathered", "masked"])
@pytest.mark.parametrize("lists", [1, 2, 4], ids=["shared", "each-group", "each-head"])
@pytest.mark.parametrize("query_size", [1, 3])
@pytest.mark.parametrize("places", [None, [[0, 4, 20, 7], [22, -1, 3, 11]]], ids=["last", "anywhere"])
def test_lists_pair_by_pair(monkeypatch, backend, lists, query_size, places):
    q, k, v, chosen = drawn(4, 23, lists, query_size)
    if backend != "reference":
        monkeypatch.setattr(blocks, "gathered", getattr(blocks, backend))
        monkeypatch.setattr(blocks, "masked", getattr(blocks, backend))
        backend = "chunked"
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
@pytest.mark.parametrize("reuse", [1, 10**6], ids=["gathered", "masked"])
def test_many_queries_are_answered_in_turn(monkeypatch, lists, reuse):
    """The loops that long sequences take, with their recomputation, against the definition."""
    other = "masked" if reuse == 1 else "gathered"
    monkeypatch.setattr(blocks, "GATHERED", 1)
    monkeypatch.setattr(blocks, "PAIRS", 1)
    monkeypatch.setattr(blocks, "REUSE", reuse)
    monkeypatch.setattr(blocks, other, None)
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


# -- architectures ----------------------------------------------------------------------------------------------------

SHORT = {  # lists that leave most blocks out
    "moba": {"block_size": 3, "num_blocks": 3},
    "infllm_v2": {"block_size": 4, "num_blocks": 4, "near_blocks": 2, "pool_size": 6, "pool_stride": 2},
    "nsa": {"block_size": 6, "num_blocks": 4, "pool_size": 4, "pool_stride": 2},
}
every = pytest.mark.parametrize("name", SHORT)


def overlap(first: range, second: range) -> int:
    return len(set(first) & set(second))


def wanted(name: str, config, q: Tensor, k: Tensor, t: int) -> list[set[int]]:
    """The blocks that the token at t sees, for every head (MoBA) or group: q `[T, H, K]`, k `[T, G, K]`."""
    size, own = config.block_size, t // config.block_size
    blocks = [range(n * size, (n + 1) * size) for n in range(own + 1)]
    groups, sharing = k.shape[1], q.shape[1] // k.shape[1]
    if name == "moba":
        always = {own}
        scores = [[k[list(block), h // sharing].mean(0) @ q[t, h] for block in blocks[:-1]] for h in range(q.shape[1])]
    else:
        first, near = (1, 2) if name == "nsa" else (config.first_blocks, config.near_blocks)
        always = {*range(min(first, own + 1)), *range(max(0, own - near + 1), own + 1)}
        stride, length = config.pool_stride, config.pool_size
        windows = [range(n, n + length) for n in range(0, t + 2 - length, stride)]
        scores = []
        for group in range(groups):
            means = torch.stack([k[list(window), group].mean(0) for window in windows]) if windows else k[:0, group]
            heads = range(group * sharing, (group + 1) * sharing)
            share = sum((means @ q[t, h] / k.shape[2] ** 0.5).softmax(0) for h in heads)
            near_windows = [[(n, overlap(window, block)) for n, window in enumerate(windows)] for block in blocks]
            if name == "nsa":
                scores.append([sum(share[n] * common / stride for n, common in row) for row in near_windows])
            else:
                scores.append([max((share[n] for n, common in row if common), default=0.0) for row in near_windows])
    rest = [sorted(set(range(own + 1)) - always, key=lambda n, row=row: -float(row[n])) for row in scores]
    return [always | set(order[: config.num_blocks - len(always)]) for order in rest]


@every
def test_chooses_as_its_paper_says(name):
    config = registry.build_config(f"{name}-tiny", **SHORT[name])
    mixer = registry.get(name).mixer(config, 0)
    q, k, at = normal(1, 61, 4, 8), normal(1, 61, 2, 8, seed=1), torch.arange(61).unsqueeze(0)
    weight = torch.full((config.pool_size, 1, 1), 1 / config.pool_size, dtype=torch.float64) if name == "nsa" else None
    sums = summaries.add(None, k, at, 64, **mixer.pool, weight=weight)
    lists = mixer.choose(q, sums, at)[0]
    for t in range(61):
        found = [set(row.tolist()) - {-1} for row in lists[:, t]]
        assert found == wanted(name, config, q[0], k[0], t), f"token {t}"


@every
def test_many_tokens_choose_in_turn(name, monkeypatch):
    mixer = Subject(name).mixer(torch.float64, **SHORT[name])
    x = Subject(name).inputs(1, 50, torch.float64)
    whole = mix(mixer, x)[0].detach()
    monkeypatch.setattr("zoo.listed.PAIRS", 1)
    turns = mix(mixer, x)[0].detach()
    assert_close(turns.float(), whole.float(), whole, "in turn")


@every
def test_steps_choose_as_the_whole(name):
    """Far beyond what a list holds, token by token, from a first token and from prefills that end within a window or block."""
    subject = Subject(name)
    mixer, x = subject.mixer(torch.float64, **SHORT[name]), subject.inputs(2, 70, torch.float64)
    with torch.no_grad():
        whole, state = mix(mixer, x)
        for prefill in (0, 1, 30, 65):
            result, after = pieces(mixer, x, list(range(prefill, 70)))
            assert_close(result.float(), whole.float(), whole, f"prefill of {prefill}")
            for key, kept in after.items():
                assert_close(kept.float(), state[key].float(), state[key].double(), f"{key} after a prefill of {prefill}")


def test_short_sequences_are_seen_whole():
    """Transformer's weights, loaded as they are: the same until the lists are full, and no longer."""
    sizes = {"num_kv_heads": 2, "num_heads": 4}
    dense = Subject("transformer").mixer(torch.float64, **sizes)
    for name in ("moba", "infllm_v2"):
        mixer = Subject(name).mixer(torch.float64, **SHORT[name], **sizes)
        mixer.load_state_dict(dense.state_dict())
        x, full = Subject(name).inputs(1, 60, torch.float64), SHORT[name]["block_size"] * SHORT[name]["num_blocks"]
        with torch.no_grad():
            result, expected = mix(mixer, x)[0], mix(dense, x)[0]
        assert_close(result[:, :full].float(), expected[:, :full].float(), expected[:, :full], name)
        assert (result[:, full:] - expected[:, full:]).abs().amax((0, 2)).min() > 1e-6, f"{name} sees all for ever"


def test_lists_must_hold_what_is_always_seen():
    for name, fields in (("moba", {"num_blocks": 0}), ("infllm_v2", {"num_blocks": 2}), ("nsa", {"num_blocks": 2})):
        with pytest.raises(Exception, match="num_blocks"):
            registry.build_config(f"{name}-tiny", **fields)
    for name in ("infllm_v2", "nsa"):
        with pytest.raises(Exception, match="pool_stride"):
            registry.build_config(f"{name}-tiny", pool_stride=3)


@pytest.mark.parametrize("shared", [False, True])
def test_native_sparse_attention_token_by_token(shared):
    """Its three branches and their gates, written out; the compression with weights of its own."""
    mixer = Subject("nsa").mixer(torch.float64, **SHORT["nsa"], shared_kv=shared)
    config, x = registry.build_config("nsa-tiny", **SHORT["nsa"]), Subject("nsa").inputs(1, 40, torch.float64)
    with torch.no_grad():
        y, table = mix(mixer, x)[0], rotary_table(torch.arange(40).unsqueeze(0), *mixer.rope)
        q, gates = rotate(mixer.q_proj(x).unflatten(-1, (4, 8)), table)[0], mixer.gate_proj(x).unflatten(-1, (4, 3)).sigmoid()[0]
        k, v = rotate(mixer.k_proj(x).unflatten(-1, (-1, 8)), table)[0], mixer.v_proj(x).unflatten(-1, (-1, 8))[0]
        coarse, chosen, near = [slice(0, 2)] * 3 if shared else [slice(i, i + 2) for i in (0, 2, 4)]
        size, stride, block = config.pool_size, config.pool_stride, config.block_size
        o = torch.zeros_like(q)
        pooled = [torch.stack([(z[n : n + size, coarse] * w.unsqueeze(1)).sum(0) for n in range(0, 41 - size, stride)])
                  for z, w in ((k, mixer.k_weight), (v, mixer.v_weight))]  # fmt: skip
        lists = mixer.choose(q.unsqueeze(0), pooled[0].unsqueeze(0), torch.arange(40).unsqueeze(0))[0]
        for t in range(40):
            for h in range(4):
                g, seen = h // 2, max(0, (t + 1 - size) // stride + 1)
                listed = [j for n in lists[g, t].tolist() if n >= 0 for j in range(n * block, (n + 1) * block) if j <= t]
                window = list(range(max(0, t + 1 - config.window), t + 1))
                branches = (
                    (pooled[0][:seen, g], pooled[1][:seen, g]),
                    (k[listed][:, chosen][:, g], v[listed][:, chosen][:, g]),
                    (k[window][:, near][:, g], v[window][:, near][:, g]),
                )
                for gate, (keys, values) in zip(gates[t, h], branches, strict=True):
                    o[t, h] += gate * ((keys @ q[t, h] / 8**0.5).softmax(0) @ values)
        expected = mixer.out_proj(o.flatten(1)).unsqueeze(0)
    assert_close(y.float(), expected.float(), expected, "the three branches")
