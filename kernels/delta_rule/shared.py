"""What the contracts of both operators have in common."""

import torch
from torch import Tensor

from zoo.kernels.checks import accumulator


def meta(tensors: dict, options: dict, sequences: int) -> tuple[Tensor, Tensor]:
    """Empty output and state."""
    q, v = tensors["q"], tensors["v"]
    heads = max(tensors[name].shape[2] for name in "qkv")
    return v.new_empty(*v.shape[:2], heads, v.shape[3]), q.new_empty((sequences, heads, q.shape[3], v.shape[3]), dtype=accumulator(q.dtype))


def identity_beside(v: Tensor, keys: int) -> tuple[Tensor, Tensor]:
    """Values `[B, T, H, K + V]` and state `[B, H, K, K + V]` whose evolution is a segment's transition beside its contribution.

    The columns of a state evolve apart: those that start from the identity and receive no value become the transition.
    """
    eye = torch.eye(keys, dtype=accumulator(v.dtype), device=v.device).expand(v.shape[0], v.shape[2], keys, keys)
    state = torch.cat([eye, eye.new_zeros(*eye.shape[:-1], v.shape[-1])], dim=-1)
    return torch.cat([v.new_zeros(*v.shape[:-1], keys), v], dim=-1), state
