"""Mixers of attention against the formulas of their papers, written out token by token in float64."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from zoo.evaluate.closeness import assert_close
from zoo.evaluate.subject import Subject
from zoo.kernels.packing import Packing

LENGTH = 70


def heads_of(x: Tensor, count: int) -> Tensor:
    """`[T, H * K] -> [H, T, K]`."""
    return x.unflatten(-1, (count, -1)).transpose(0, 1)


def normal(x: Tensor, eps: float, weight: Tensor | float = 1.0) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight


def turned(x: Tensor, theta: float = 1e4) -> Tensor:
    """Pairs of channels as complex numbers, multiplied by `exp(i p theta^(-2 n / K))`; angles are float32 in every dtype."""
    half = x.shape[-1] // 2
    angle = torch.outer(torch.arange(x.shape[-2]).float(), theta ** (-torch.arange(half) / half)).to(x.dtype)
    y = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([y.real, y.imag], -1)


def fox(mixer, x: Tensor) -> Tensor:
    """The Pro block: forget gates, normalised queries and keys, shifted keys and values, a gated and normalised output."""
    heads, groups = mixer.heads, mixer.groups
    sharing = heads // groups

    def shifted(name: str, y: Tensor) -> Tensor:
        back = mixer.shifts[name].proj(x).sigmoid().repeat_interleave(y.shape[-1] // groups, -1)
        return back * pad(y, (0, 0, 1, -1)) + (1 - back) * y

    q, k, v = heads_of(mixer.q_proj(x), heads), shifted("k", mixer.k_proj(x)), shifted("v", mixer.v_proj(x))
    k, v = heads_of(k, groups), heads_of(v, groups)
    eps = mixer.q_norm.options["eps"]
    q = normal(q, eps, mixer.q_norm.weight.unflatten(0, (heads, 1, -1)))
    k = normal(k, eps, mixer.k_norm.weight.unflatten(0, (groups, 1, -1)))
    kept = mixer.forget_proj(x).sigmoid().log()
    o = torch.zeros_like(q)
    for h in range(heads):
        for t in range(LENGTH):
            forgotten = torch.stack([kept[j + 1 : t + 1, h].sum() for j in range(t + 1)])
            logits = k[h // sharing, : t + 1] @ q[h, t] / math.sqrt(q.shape[-1]) + forgotten
            o[h, t] = logits.softmax(0) @ v[h // sharing, : t + 1]
    o = normal(o, eps).transpose(0, 1).flatten(1) * mixer.norm.weight
    return mixer.out_proj(o * mixer.gate_proj(x).sigmoid())


def swat(mixer, x: Tensor) -> Tensor:
    """Sigmoids, with slopes of either sign (eq. 4 and 5)."""
    heads, groups = mixer.heads, mixer.groups
    q, k, v = turned(heads_of(mixer.q_proj(x), heads)), turned(heads_of(mixer.k_proj(x), groups)), heads_of(mixer.v_proj(x), groups)
    slopes = [-(2.0**-n) for n in range(1, heads // 2 + 1)] + [2.0**-n for n in range(1, heads // 2 + 1)]
    o = torch.zeros_like(q)
    for h in range(heads):
        for m in range(LENGTH):
            for n in range(max(0, m - mixer.window + 1), m + 1):
                logit = q[h, m] @ k[h // (heads // groups), n] / math.sqrt(q.shape[-1]) + slopes[h] * (m - n)
                o[h, m] += v[h // (heads // groups), n] / (1 + (-logit).exp())
    return mixer.out_proj(o.transpose(0, 1).flatten(1))


def longnet(mixer, x: Tensor) -> Tensor:
    """Each pattern by itself, mixed in proportion to the denominators."""
    q, k, v = (heads_of(p(x), mixer.heads) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    q, k, o = turned(q), turned(k), torch.zeros_like(q)
    for h in range(mixer.heads):
        for t in range(LENGTH):
            above, below = 0, 0
            for size, step in mixer.patterns:
                begin = t // size * size
                taken = [begin + n for n in range(size) if n % step == h % step and begin + n < LENGTH]
                if t in taken:
                    seen = [j for j in taken if j <= t or not mixer.causal]
                    weights = (k[h, seen] @ q[h, t] / math.sqrt(q.shape[-1])).exp()
                    above, below = above + weights @ v[h, seen], below + weights.sum()
            o[h, t] = above / below
    return mixer.out_proj(o.transpose(0, 1).flatten(1))


def transformer_xl(mixer, x: Tensor) -> Tensor:
    """Content and distance each with its own bias, over the last tokens; distances are clamped."""
    q, k, v = (heads_of(p(x), mixer.heads) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    width, o = x.shape[-1], torch.zeros_like(q)
    frequencies = (10000.0 ** (-torch.arange(0, width, 2) / width)).float()
    for t in range(LENGTH):
        seen = list(range(max(0, t - mixer.window + 1), t + 1))
        angles = torch.stack([min(t - j, 17) * frequencies for j in seen])
        waves = torch.cat([angles.sin(), angles.cos()], -1).to(x.dtype)
        for h in range(mixer.heads):
            content = k[h, seen] @ (q[h, t] + mixer.content_bias[h])
            distance = waves @ mixer.distances.weight[h].T @ (q[h, t] + mixer.distances.bias[h])
            o[h, t] = ((content + distance) / math.sqrt(q.shape[-1])).softmax(0) @ v[h, seen]
    return mixer.out_proj(o.transpose(0, 1).flatten(1))


@torch.no_grad()
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both-sides"])
@pytest.mark.parametrize("formula", [fox, swat, longnet, transformer_xl], ids=lambda formula: formula.__name__)
def test_mixer_follows_its_paper(formula, causal):
    subject = Subject(formula.__name__)
    if not causal and not subject.traits().bidirectional:
        with pytest.raises(ValueError, match="causal"):
            subject.mixer(causal=False)
        return
    x = subject.inputs(1, LENGTH, torch.float64)
    plain, exact = (formula(subject.mixer(dtype, causal=causal), x[0].to(dtype)) for dtype in (torch.float32, torch.float64))
    assert_close(subject.mixer(causal=causal)(x.float())[0][0], plain, exact, formula.__name__)


@pytest.mark.parametrize("joined", ["layers", "heads", "merged"])
@pytest.mark.parametrize("pattern", ["strided", "fixed"])
@torch.no_grad()
def test_sparse_transformers_follow_their_paper(pattern, joined):
    """Section 4.3, with every pair written down; whole, step by step and packed, and the cost is that of the pairs."""
    stride, last = 5, 2
    t, j = torch.arange(LENGTH).unsqueeze(1), torch.arange(LENGTH)
    if pattern == "strided":
        near, far = j >= t - stride, (t - j) % stride == 0
    else:
        near, far = j // stride == t // stride, (j % stride >= stride - last).expand(LENGTH, -1)
    for layer in range(2):
        seen = {"layers": [(near, far)[layer]] * 4, "heads": [near, near, far, far], "merged": [near | far] * 4}[joined]
        seen = torch.stack(seen) & (j <= t)
        fields = {"pattern": pattern, "joined": joined, "stride": stride, "num_summaries": last, "causal": True}
        models = [Subject("sparse_transformer").model("base", dtype=dtype, **fields) for dtype in (torch.float64, torch.float32)]
        exact, mixer = (model.layers[layer].mixer for model in models)
        x = Subject("sparse_transformer").inputs(1, LENGTH, torch.float64)

        def formula(mixer, x, seen=seen):
            q, k, v = (heads_of(p(x[0]), 4) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
            logits = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~seen, -math.inf)
            return mixer.out_proj((logits.softmax(-1).nan_to_num(0) @ v).transpose(0, 1).flatten(1))

        wide, plain = formula(exact, x), formula(mixer, x.float())
        whole, state = mixer(x.float()[:, :-3])
        parts = [whole]
        for token in x.float()[:, -3:].split(1, dim=1):
            y, state = mixer(token, state)
            parts.append(y)
        assert_close(torch.cat(parts, dim=1)[0], plain, wide, "step by step")
        packed, _ = mixer(torch.cat([x[:, :9], x], dim=1).float(), packing=Packing.from_lengths([9, LENGTH]))
        assert_close(packed[0, 9:], plain, wide, "packed")
        assert mixer.operator_flops(LENGTH) == 4 * exact.keys * int(seen.sum())
