"""Attention's rules against masks written out pair by pair, its caches against the whole, and its two small companions against torch."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv1d, group_norm, layer_norm, rms_norm, sigmoid, silu

from zoo.evaluate.closeness import assert_close
from zoo.kernels.attention import cache as kv
from zoo.kernels.attention import chunked
from zoo.kernels.gated_norm import gated_norm
from zoo.kernels.short_conv import short_conv
from zoo.kernels.short_conv import step as conv_step
from zoo.ops import Packing, attention

BACKENDS = ("reference", "chunked")
both = pytest.mark.parametrize("backend", BACKENDS)

RULES = {
    "causal": {},
    "full": {"causal": False},
    "window": {"window": 5},
    "window-one": {"window": 1},
    "window-both": {"window": 4, "causal": False},
    "window-pair": {"window": (6, 2), "causal": False},
    "window-pair-causal": {"window": (6, 2)},
    "dilated": {"window": 3, "dilation": 4},
    "dilated-both": {"window": 2, "dilation": 3, "causal": False},
    "dilated-unlimited": {"dilation": 3},
    "sinks": {"window": 4, "sinks": 3},
    "sinks-both": {"window": 2, "sinks": 3, "causal": False},
    "sinks-dilated": {"window": 3, "sinks": 5, "dilation": 2},
    "global": {"window": 3, "marked": True},
    "global-both": {"window": 3, "marked": True, "causal": False},
    "global-sinks-dilated": {"window": 3, "marked": True, "causal": False, "sinks": 2, "dilation": 2},
}


def normal(*shape, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def same(result: Tensor, expected: Tensor, what: str) -> None:
    """Two ways to one number in float64, the same to the precision of float32."""
    assert_close(result.float(), expected.float(), expected, what)


def triple(batch: int, queries: int, keys: int, heads: int = 4, groups: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    return normal(batch, queries, heads, 8), normal(batch, keys, groups, 8, seed=1), normal(batch, keys, groups, 6, seed=2)


def sees(p: int, j: int, global_p: bool, global_j: bool, *, causal=True, window=None, dilation=1, sinks=0) -> bool:
    """The rule in words, for one pair."""
    if j < 0 or (causal and j > p):
        return False
    if j < sinks or global_p or global_j:
        return True
    if (p - j) % dilation:
        return False
    if window is None:
        return True
    steps = (p - j) // dilation
    if isinstance(window, tuple):
        return -window[1] <= steps <= window[0]
    return steps < window if causal else abs(steps) <= window


def naive(q, k, v, p, j, marked=None, slopes=None, log_forget=None, by_distance=None, softcap=None, normaliser="softmax", **rule):
    """Query by query, key by key; p and j are lists of positions, one for every row."""
    out, lse = q.new_zeros(*q.shape[:3], v.shape[3]), q.new_full(q.shape[:3], -math.inf)
    for b in range(q.shape[0]):
        marks = set() if marked is None else {j[b][s] for s in range(k.shape[1]) if marked[b, s]}
        for t in range(q.shape[1]):
            seen = [s for s in range(k.shape[1]) if sees(p[b][t], j[b][s], p[b][t] in marks, j[b][s] in marks, **rule)]
            for h in range(q.shape[2]) if seen else ():
                g = h // (q.shape[2] // k.shape[2])
                logits = k[b, seen, g] @ q[b, t, h] / math.sqrt(q.shape[3])
                logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
                if slopes is not None:
                    logits = logits - slopes[h] * torch.tensor([abs(p[b][t] - j[b][s]) for s in seen])
                if log_forget is not None:
                    gates = log_forget[b, :, h]
                    logits = logits + torch.stack([gates[s + 1 : j[b].index(p[b][t]) + 1].sum() for s in seen])
                if by_distance is not None:
                    own = by_distance[b, t, h].tolist()
                    logits = logits + torch.tensor([own[min(p[b][t] - j[b][s], len(own) - 1)] for s in seen])
                weights = 1 / (1 + (-logits).exp()) if normaliser == "sigmoid" else logits.softmax(0)
                out[b, t, h], lse[b, t, h] = weights @ v[b, seen, g], logits.logsumexp(0)
    return out, lse


def check(given: tuple, kwargs: dict, exact: tuple[Tensor, Tensor], what: str) -> None:
    """Both backends, with and without log-sum-exp, in float32 against the naive result in float64."""
    narrow = [x.float() for x in given]
    single = {n: x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for n, x in kwargs.items()}
    plain, plain_lse = attention(*narrow, **single, return_lse=True, backend="reference")
    for backend in BACKENDS:
        out, none = attention(*narrow, **single, backend=backend)
        assert none is None
        assert_close(out, plain, exact[0], f"{what} {backend}")
        out, lse = attention(*narrow, **single, return_lse=True, backend=backend)
        assert_close(out, plain, exact[0], f"{what} {backend} with lse")
        blind = exact[1].isinf()
        assert torch.equal(lse.isinf(), blind)
        assert_close(lse.masked_fill(blind, 0), plain_lse.masked_fill(blind, 0), exact[1].masked_fill(blind, 0), f"{what} {backend} lse")
    wide, _ = attention(*given, **kwargs, backend="reference")
    same(wide, exact[0], f"{what}: the definition in float64")


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("queries, keys", [(1, 30), (150, 150), (80, 120)])
def test_rules(name, queries, keys):
    rule = dict(RULES[name])
    given = triple(2, queries, keys)
    marked = None
    if rule.pop("marked", False):
        marked = torch.zeros(2, keys, dtype=torch.bool)
        marked[0, [2, 5, keys - 3]] = True
        marked[1, 1] = True
    j = [list(range(keys))] * 2
    exact = naive(*given, [list(range(keys - queries, keys))] * 2, j, marked=marked, **rule)
    check(given, rule | {"global_tokens": marked}, exact, name)


@pytest.mark.parametrize("rule", [{}, {"window": 7}, {"window": 6, "sinks": 3, "dilation": 2}], ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_biases(rule, causal):
    given, positions = triple(2, 150, 150), [list(range(150))] * 2
    slopes = torch.tensor([0.5, 0.25, 0.125, 1.0], dtype=torch.float64)
    extras = {"slopes": slopes, "softcap": 2.0, "causal": causal}
    if causal:
        extras |= {"log_forget": -normal(2, 150, 4, seed=3).abs(), "by_distance": normal(2, 150, 4, 5, seed=4)}
    check(given, rule | extras, naive(*given, positions, positions, **rule, **extras), "biased")


@pytest.mark.parametrize("rule", [{}, {"window": 9}, {"window": 3, "sinks": 2, "causal": False}], ids=str)
def test_sigmoid(rule):
    """Weights of their own, with slopes of both signs."""
    given, positions = triple(2, 130, 130), [list(range(130))] * 2
    rule = rule | {"slopes": torch.tensor([0.5, 0.25, -0.125, -0.5], dtype=torch.float64), "normaliser": "sigmoid"}
    exact, _ = naive(*given, positions, positions, **rule)
    narrow, single = [x.float() for x in given], rule | {"slopes": rule["slopes"].float()}
    plain, _ = attention(*narrow, **single, backend="reference")
    assert_close(attention(*narrow, **single, backend="chunked")[0], plain, exact, "sigmoid")
    same(attention(*given, **rule, backend="reference")[0], exact, "the definition in float64")


@pytest.mark.parametrize("rule", [{}, {"window": 9, "sinks": 2}], ids=str)
def test_hostile_forget_gates(rule):
    """A gate that forgets all must not blur the gentle ones after it."""
    q, k, v = triple(1, 200, 200)
    gates = -normal(1, 200, 4, seed=3).abs()
    for strong in (-80.0, -1e4):
        gates[:, ::16] = strong
        given = {"q": q.float(), "k": k.float(), "v": v.float(), "log_forget": gates.float()}
        plain, _ = attention(**given, **rule, backend="reference")
        exact, _ = attention(**{name: x.double() for name, x in given.items()}, **rule, backend="reference")
        result, _ = attention(**given, **rule, backend="chunked")
        assert_close(result, plain, exact, f"gates of {strong}")


@pytest.mark.parametrize("rule", [{}, {"window": 6}, {"window": 4, "sinks": 2}, {"window": 3, "dilation": 2, "causal": False}], ids=str)
def test_positions_in_any_order(rule):
    """A shuffled cache with empty slots; the first query sees nothing at all."""
    given = triple(2, 3, 12)
    j = torch.stack([torch.randperm(12, generator=torch.Generator().manual_seed(s)) for s in range(2)]) + 3
    j[:, ::4] = -1
    p = torch.tensor([[0, 9, 14], [1, 13, 14]])
    rule = rule | ({} if "causal" not in rule else {"window": 1})
    exact = naive(*given, p.tolist(), j.tolist(), **rule)
    assert rule.get("causal") is False or exact[1].isinf().any()
    check(given, rule | {"q_positions": p, "kv_positions": j}, exact, "shuffled")


@both
@pytest.mark.parametrize(
    "extras",
    [{}, {"softcap": 3.0}, {"window": 2}, {"slopes": torch.ones(4, dtype=torch.float64)}],
    ids=["plain", "softcap", "window", "slopes"],
)
@pytest.mark.parametrize("return_lse", [False, True])
def test_blind_queries_give_zero_and_pass_no_gradient(backend, extras, return_lse):
    leaves = [x.requires_grad_() for x in triple(1, 3, 4)]
    places = {"q_positions": torch.tensor([[0, 5, 6]]), "kv_positions": torch.tensor([[5, 6, -1, -1]])}
    out, lse = attention(*leaves, **places, **extras, return_lse=return_lse, backend=backend)
    assert out[:, 0].eq(0).all() and out[:, 1:].ne(0).any()
    total = out.sum() + (lse[:, 1:].sum() if return_lse else 0)
    for grad in torch.autograd.grad(total, leaves):
        assert grad.isfinite().all() and grad.ne(0).any()
    (grad,) = torch.autograd.grad(attention(*leaves, **places, **extras, backend=backend)[0].sum(), leaves[:1])
    assert grad[:, 0].eq(0).all()


@pytest.mark.parametrize("cut", [1, 20, 39])
def test_parts_combine_by_their_lse(cut):
    q, k, v = triple(2, 5, 40)
    whole, lse = attention(q, k, v, causal=False, return_lse=True)
    parts = [attention(q, k[:, s], v[:, s], causal=False, return_lse=True) for s in (slice(0, cut), slice(cut, 40))]
    total = torch.logaddexp(parts[0][1], parts[1][1])
    joined = sum(out * (part - total).exp().unsqueeze(-1) for out, part in parts)
    same(joined, whole, "combined")
    same(total, lse, "log-sum-exp")


@pytest.mark.parametrize(
    "extras", [{}, {"softcap": 2.0}, {"window": 200, "slopes": torch.ones(4, dtype=torch.float64)}], ids=["lse", "softcap", "slopes"]
)
def test_query_blocks_equal_the_whole(monkeypatch, extras):
    """The loop over blocks that long sequences take, with its recomputation, against one block."""
    monkeypatch.setattr(chunked, "PAIRS", 2 * 4 * 90 * 16)
    given = triple(2, 90, 90)
    results = []
    for backend in BACKENDS:
        leaves = [x.clone().requires_grad_() for x in given]
        out, lse = attention(*leaves, **extras, return_lse=True, backend=backend)
        results.append([out.detach(), lse.detach(), *torch.autograd.grad(out.square().sum() + lse.sum(), leaves)])
        with torch.no_grad():
            results[-1].append(attention(*given, **extras, backend=backend)[0])
    for block, whole in zip(results[1], results[0], strict=True):
        same(block, whole, "in blocks")


def test_band_is_taken_and_touches_little(monkeypatch):
    """A long window must not fall back to all pairs: dense attention is never called, and peak pairs grow with T W."""
    widths = []
    original = chunked.Softmax.__call__

    def watch(self, q, k, v, seen, added):
        widths.append(k.shape[1])
        return original(self, q, k, v, seen, added)

    monkeypatch.setattr(chunked.Softmax, "__call__", watch)
    for rule in ({"window": 16}, {"window": 16, "causal": False, "sinks": 4}, {"window": 8, "dilation": 4, "softcap": 5.0}):
        attention(*triple(1, 2048, 2048), **rule, backend="chunked")
    assert widths and max(widths) <= 3 * 32 + 4


# -- caches -----------------------------------------------------------------------------------------------------------


def stream(kind: str, given: tuple, lengths: list[int], pieces: list[int], rule: dict, *, packed: bool) -> list[Tensor]:
    """Feed every row its tokens in pieces through a cache; a row that has run out gets nothing in a packed call."""
    store, outs, done = None, [[] for _ in lengths], [0] * len(lengths)
    for piece in pieces:
        new = [min(piece, length - start) if packed else piece for length, start in zip(lengths, done, strict=True)]
        if packed:
            packing = Packing.from_lengths(new)
            q, k, v = (torch.cat([x[n, a : a + c] for n, (a, c) in enumerate(zip(done, new, strict=True))]).unsqueeze(0) for x in given)
        else:
            packing = None
            q, k, v = (x[:, done[0] : done[0] + piece] for x in given)
        places = kv.upcoming(store, k, packing)
        if kind == "ring":
            keys, values, j, store = kv.ring_append(store, k, v, rule["window"], rule.get("sinks", 0), packing)
        else:
            store = kv.append(store, k, v, packing)
            keys, values, j = store["k"], store["v"], kv.positions(store)
        q = q if packing is None else packing.pad(q)
        out, _ = attention(q, keys, values, q_positions=places, kv_positions=j, **rule, backend="chunked")
        for n, count in enumerate(new):
            outs[n].append(out[n, :count])
        done = [a + c for a, c in zip(done, new, strict=True)]
    return [torch.cat(out) for out in outs]


@pytest.mark.parametrize(
    "kind, rule", [("growing", {}), ("growing", {"window": 6}), ("ring", {"window": 6}), ("ring", {"window": 5, "sinks": 3})], ids=str
)
@pytest.mark.parametrize("grad", [False, True], ids=["in-place", "out-of-place"])
@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize(
    "pieces", [[80], [1] * 10 + [70], [2, 1, 30, 1, 1, 45], [70] + [1] * 10], ids=["whole", "steps-first", "mixed", "steps-last"]
)
def test_cache_equals_the_whole(kind, rule, grad, packed, pieces):
    lengths = [80, 7, 71] if packed else [80, 80, 80]
    given = triple(3, 80, 80)
    with torch.set_grad_enabled(grad):
        outs = stream(kind, given, lengths, pieces, rule, packed=packed)
    for n, length in enumerate(lengths):
        expected, _ = attention(*(x[n : n + 1, :length] for x in given), **rule, backend="reference")
        same(outs[n].unsqueeze(0), expected, f"row {n}")


def test_steps_after_rows_of_different_lengths():
    """A packed prefill, then one token for every row."""
    lengths, given = [5, 20, 11], triple(3, 23, 23)
    packing = Packing.from_lengths(lengths)
    _, k, v = (torch.cat([x[n, :length] for n, length in enumerate(lengths)]).unsqueeze(0) for x in given)
    with torch.no_grad():
        growing = kv.append(None, k, v, packing)
        *_, ring = kv.ring_append(None, k, v, 6, 2, packing)
        rule = {"window": 6, "sinks": 2}
        for step in range(3):
            q, k, v = (torch.stack([x[n, length + step] for n, length in enumerate(lengths)]).unsqueeze(1) for x in given)
            places = kv.upcoming(ring, k)
            growing = kv.append(growing, k, v)
            keys, values, j, ring = kv.ring_append(ring, k, v, 6, 2)
            turned, _ = attention(q, keys, values, q_positions=places, kv_positions=j, **rule)
            grown, _ = attention(q, growing["k"], growing["v"], q_positions=places, kv_positions=kv.positions(growing), **rule)
            for n, length in enumerate(lengths):
                whole, _ = attention(*(x[n : n + 1, : length + step + 1] for x in given), **rule, backend="reference")
                same(turned[n], whole[0, -1:], f"ring, row {n}")
                same(grown[n], whole[0, -1:], f"growing, row {n}")


def test_more_queries_than_keys():
    """Attention across sequences: without a window or causality positions mean nothing."""
    given = triple(2, 7, 3)
    check(given, {"causal": False}, naive(*given, [[0] * 7] * 2, [[0, 1, 2]] * 2, causal=False), "across")


def test_growing_cache_with_forget_gates():
    given, gates = triple(2, 40, 40), -normal(2, 40, 4, seed=5).abs()
    whole, _ = attention(*given, log_forget=gates, backend="reference")
    with torch.no_grad():
        store = kv.append(None, given[1], given[2])
    padded = torch.full((2, 64, 4), -3.0, dtype=torch.float64)  # what lies in empty slots does not matter
    padded[:, :40] = gates
    places = {"q_positions": torch.arange(40).expand(2, -1), "kv_positions": kv.positions(store)}
    for backend in BACKENDS:
        out, _ = attention(given[0], store["k"], store["v"], log_forget=padded, **places, backend=backend)
        same(out, whole, backend)


def test_cache_stays_where_it_is():
    """With gradients disabled steps write in place, and capacity grows by grains."""
    assert [kv.capacity(n) for n in (1, 64, 65)] == [64, 64, 128]
    with torch.no_grad():
        _, k, v = triple(2, 60, 60)
        store = kv.append(None, k, v)
        *_, ring = kv.ring_append(None, k, v, 16, 2)
        address, ring_address = [store[n].data_ptr() for n in ("k", "v", "length")], [x.data_ptr() for x in ring.values()]
        for _ in range(4):
            store = kv.append(store, k[:, :1], v[:, :1])
            *_, ring = kv.ring_append(ring, k[:, :1], v[:, :1], 16, 2)
        assert address == [store[n].data_ptr() for n in ("k", "v", "length")]
        assert ring_address == [x.data_ptr() for x in ring.values()]
        assert store["k"].shape[1] == 64 and ring["k"].shape[1] == 18
        store = kv.append(store, k[:, :1], v[:, :1])
        assert store["k"].shape[1] == 128 and store["length"].tolist() == [65, 65]
        assert kv.reserve(store, 200)["k"].shape[1] == 256
        chosen = {name: x[[1, 1, 0]] for name, x in store.items()}
        assert kv.append(chosen, k[[0, 0, 0], :1], v[[0, 0, 0], :1])["length"].tolist() == [66, 66, 66]


@pytest.mark.parametrize(
    "change, named",
    [
        ({"window": 0}, "window"),
        ({"window": (1, -1)}, "window"),
        ({"dilation": 0}, "dilation"),
        ({"sinks": -1}, "sinks"),
        ({"softcap": 0.0}, "softcap"),
        ({"normaliser": "relu"}, "normaliser"),
        ({"normaliser": "sigmoid", "return_lse": True}, "return_lse"),
        ({"q_positions": torch.zeros(2, 4, dtype=torch.int64)}, "kv_positions"),
        ({"log_forget": torch.zeros(2, 5, 4), "causal": False}, "log_forget"),
        ({"by_distance": torch.zeros(2, 4, 4, 3), "causal": False}, "by_distance"),
        ({"by_distance": torch.zeros(2, 5, 4, 3)}, "by_distance"),
        ({"global_tokens": torch.zeros(2, 5)}, "global_tokens"),
        ({"packing": Packing.from_lengths([4])}, "packing"),
        ({"q": torch.zeros(2, 6, 4, 8, dtype=torch.float64)}, "q_positions"),
        ({"k": torch.zeros(2, 5, 3, 8, dtype=torch.float64), "v": torch.zeros(2, 5, 3, 6, dtype=torch.float64)}, "heads"),
    ],
)
def test_attention_refuses_in_words(change, named):
    q, k, v = triple(2, 4, 5)
    with pytest.raises(ValueError, match=named):
        attention(**{"q": q, "k": k, "v": v} | change)


# -- companions -------------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("length", [1, 2, 50])
@pytest.mark.parametrize("width", [1, 4, 7])
def test_short_conv_is_conv1d(backend, length, width):
    x, weight, bias, state = normal(2, length, 6), normal(6, width, seed=1), normal(6, seed=2), normal(2, width - 1, 6, seed=3)
    y, last = short_conv(x, weight, bias, activation="silu", state=state, backend=backend)
    whole = torch.cat([state, x], dim=1)
    expected = silu(conv1d(whole.transpose(1, 2), weight.unsqueeze(1), bias, groups=6)).transpose(1, 2)
    same(y, expected, "convolution")
    assert torch.equal(last, whole[:, length:])


def test_short_conv_steps_in_place():
    x, weight, state = normal(2, 6, 5), normal(5, 4, seed=1), torch.zeros(2, 3, 5, dtype=torch.float64)
    whole, last = short_conv(x, weight, activation="silu")
    steps = torch.stack([conv_step(x[:, t], weight, state=state, activation="silu") for t in range(6)], dim=1)
    same(steps, whole, "steps")
    assert torch.equal(state, last)


def test_short_conv_keeps_the_state_of_x():
    """A state is a window of inputs, in their dtype; it does not hold the whole row in memory."""
    _, state = short_conv(normal(1, 500, 4).bfloat16(), normal(4, 3).bfloat16(), backend="chunked")
    assert state.dtype == torch.bfloat16 and state.untyped_storage().nbytes() == 2 * 4 * 2


def test_short_conv_refuses_an_unknown_activation():
    with pytest.raises(ValueError, match="gelu"):
        short_conv(normal(1, 3, 4), normal(4, 3), activation="gelu")


@both
def test_gated_norm_is_torchs(backend):
    x, weight, bias, gate = normal(3, 5, 12), normal(12, seed=1), normal(12, seed=2), normal(3, 5, 12, seed=3)
    grouped = group_norm(x.reshape(-1, 12), 3, weight, bias, eps=1e-6).reshape(x.shape)
    pairs = {
        "rms": (gated_norm(x, weight, backend=backend), rms_norm(x, (12,), weight, eps=1e-5)),
        "plain": (gated_norm(x, backend=backend), rms_norm(x, (12,), eps=1e-5)),
        "gated": (gated_norm(x, weight, gate, backend=backend), rms_norm(x, (12,), weight, eps=1e-5) * silu(gate)),
        "gate first": (
            gated_norm(x, weight, gate, norm_before_gate=False, backend=backend),
            rms_norm(x * silu(gate), (12,), weight, eps=1e-5),
        ),
        "layer": (gated_norm(x, weight, bias=bias, kind="layer", backend=backend), layer_norm(x, (12,), weight, bias)),
        "group": (
            gated_norm(x, weight, gate, bias=bias, kind="layer", groups=3, activation="sigmoid", eps=1e-6, backend=backend),
            grouped * sigmoid(gate),
        ),
    }
    for name, (result, expected) in pairs.items():
        same(result, expected, name)


@both
@pytest.mark.parametrize("shape", [(12,), (5, 12), (2, 3, 4, 12)], ids=str)
def test_gated_norm_takes_any_rank(backend, shape):
    x, gate = normal(*shape), normal(*shape, seed=1)
    expected = rms_norm(x, (12,), eps=1e-5) * silu(gate)
    same(gated_norm(x, gate=gate, backend=backend), expected, str(shape))


@pytest.mark.parametrize(
    "change, named",
    [({"groups": 5}, "groups"), ({"kind": "batch"}, "kind"), ({"activation": "relu"}, "activation"), ({"gate": normal(12)}, "gate")],
)
def test_gated_norm_refuses_in_words(change, named):
    with pytest.raises(ValueError, match=named):
        gated_norm(**{"x": normal(2, 12)} | change)
