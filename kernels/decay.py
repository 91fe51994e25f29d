"""Products of decays over a chunk: only ever multiplied, never divided, so that no factor is above one.

A plain product of `q exp(g)` and `k exp(-g)`, g the cumulative log-decay, overflows. Here each pair of neighbouring blocks
meets at the boundary between them: queries of the right block carry the decays from there to themselves, keys of the left
block the decays from themselves to there. Then two blocks become one: the right queries take on the decay of all the left
block, the left keys that of all the right. Blocks double in size, so a chunk of C costs `2 log2(C) C K` multiplications
beside the matrix products, and each decay is exponentiated once. What the queries and keys carry in the end is what they
need to meet the states at the chunk's two ends.
"""

import torch
from torch import Tensor


def decayed_scores(q: Tensor, k: Tensor, decay: Tensor, own: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What every query reads of every key before it in the chunk, and both as they meet the states outside.

        scores[t, s] = sum_c q[t, c] k[s, c] prod_{s < r < t} decay[r, c] for s < t, own[t] for s = t, else 0

    A query that reads after its own token's decay comes multiplied by it. A token may have J queries and I keys.
    q and k are written over where no gradient is asked for.

    Args:
        q: `[..., C, J, K]`, C a power of two; k: `[..., C, I, K]`; decay: `[..., C, K]`, from 0 to 1.
        own: `[..., C, J, I]`, what is read of the token itself.

    Returns:
        scores `[..., C, J, C, I]`; q times the decays since the chunk's start; k times the decays until its end; and the
        decay over all the chunk, `[..., K]`.
    """
    chunk, queries, keys = q.shape[-3], q.shape[-2], k.shape[-2]
    scores = q.new_zeros(*own.shape[:-3], chunk * queries, chunk * keys)
    _write(scores, own, (queries, keys), 1, 0)
    q, k, total, block = q.flatten(-3, -2), k.flatten(-3, -2), decay, 1
    while block < chunk:
        left, right = total.unflatten(-2, (-1, 2)).unbind(-2)
        later = q.unflatten(-2, (-1, 2, block * queries))[..., 1, :, :]
        earlier = k.unflatten(-2, (-1, 2, block * keys))[..., 0, :, :]
        single = queries * keys * block == 1  # as products of matrices these would be a call for every number
        blocks = (later * earlier).sum(-1, keepdim=True) if single else later @ earlier.transpose(-1, -2)
        _write(scores, blocks, (queries, keys), 2 * block, block)
        q = _multiply_half(q, 1, left.unsqueeze(-2), 2 * block * queries)
        k = _multiply_half(k, 0, right.unsqueeze(-2), 2 * block * keys)
        total, block = left * right, 2 * block
    scores = scores.unflatten(-1, (chunk, keys)).unflatten(-3, (chunk, queries))
    return scores, q.unflatten(-2, (chunk, queries)), k.unflatten(-2, (chunk, keys)), total.squeeze(-2)


def decay_matrix(decay: Tensor, *, inclusive: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same for decays without channels, by which scores, queries and keys are then multiplied.

    Args:
        decay: `[..., C]`, from 0 to 1.
        inclusive: a token reads after its own decay, itself too; otherwise before it, and not itself.

    Returns:
        `[..., C, C]` decays between tokens, zero above the diagonal; `[..., C, 1]` since the chunk's start;
        `[..., C, 1]` until its end; `[..., 1]` over all of it.
    """
    decay = decay.unsqueeze(-1)
    one = torch.ones_like(decay).unsqueeze(-2)
    since = decay.unsqueeze(-2).clone() if inclusive else one.clone()
    between, since, until, total = decayed_scores(since, one.clone(), decay, one * inclusive)
    return between[..., 0, :, 0], since.squeeze(-2), until.squeeze(-2), total


def decayed_sums(scores: Tensor, v: Tensor, decay: Tensor, *, inclusive: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What every token reads of the values up to itself, where these decay channel by channel.

        out[t, c] = sum_{s <= t} scores[t, s] v[s, c] prod_{s < r <= t} decay[r, c]

    v is written over where no gradient is asked for.

    Args:
        scores: `[..., C, C]`, C a power of two; v: `[..., C, V]`; decay: `[..., C, V]`, from 0 to 1.
        inclusive: a token reads after its own decay; otherwise before it, so that the product ends at t - 1.

    Returns:
        out `[..., C, V]`; the decays since the chunk's start, `[..., C, V]`; v times the decays until its end; and the decay
        over all the chunk, `[..., V]`.
    """
    out = scores.diagonal(dim1=-2, dim2=-1).unsqueeze(-1) * v
    since, total, block = decay.clone() if inclusive else torch.ones_like(decay), decay, 1
    while block < scores.shape[-1]:
        left, right = total.unflatten(-2, (-1, 2)).unbind(-2)
        tiles = scores.unflatten(-1, (-1, 2 * block)).unflatten(-3, (-1, 2 * block)).diagonal(dim1=-4, dim2=-2).movedim(-1, -3)
        earlier = v.unflatten(-2, (-1, 2, block))[..., 0, :, :]
        later = since.unflatten(-2, (-1, 2, block))[..., 1, :, :]
        read = later * (tiles[..., block:, :block] @ earlier)
        out = out + torch.stack([torch.zeros_like(read), read], dim=-3).flatten(-4, -2)
        since = _multiply_half(since, 1, left.unsqueeze(-2), 2 * block)
        v = _multiply_half(v, 0, right.unsqueeze(-2), 2 * block)
        total, block = left * right, 2 * block
    return out, since, v, total.squeeze(-2)


def _multiply_half(x: Tensor, half: int, factor: Tensor, rows: int) -> Tensor:
    """x `[..., R, K]` with one half of every block of `rows` multiplied, in place unless a gradient needs what it was."""
    pair = list(x.unflatten(-2, (-1, 2, rows // 2)).unbind(-3))
    if not torch.is_grad_enabled():
        pair[half].mul_(factor)
        return x
    pair[half] = pair[half] * factor
    return torch.stack(pair, dim=-3).flatten(-4, -2)


def _write(scores: Tensor, blocks: Tensor, cell: tuple[int, int], size: int, row: int) -> None:
    """Write `blocks` `[..., C / size, b J, b I]` at token (row, 0) inside each diagonal block of `size` tokens."""
    height, width = size * cell[0], size * cell[1]
    tiles = scores.unflatten(-1, (-1, width)).unflatten(-3, (-1, height)).diagonal(dim1=-4, dim2=-2)
    top = row * cell[0]
    tiles[..., top : top + blocks.shape[-2], : blocks.shape[-1], :] = blocks.movedim(-3, -1)
