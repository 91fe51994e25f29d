"""The general delta rule in Triton: the host's side. Chunks and tiles are fixed per dtype and head size, there is no tuning at run time."""

from typing import NamedTuple

import torch
from torch import Tensor
from triton import language as tl

from zoo.kernels.delta_rule import fused_general_kernels as kernels
from zoo.kernels.fused import numbers
from zoo.kernels.launch import launch, rows, strides, zero
from zoo.kernels.packing import Packing
from zoo.kernels.segments import Segments, padded_size


class Tiles(NamedTuple):
    """Tokens of a chunk; value channels of a program of `chain` and its stages; the warps of `transitions`; the channels of a program of
    the others, or of its steps."""

    chunk: int
    slice: int
    stages: int
    warps: int
    block: int


def tiles(keys: int, dtype: torch.dtype) -> Tiles:
    """For padded keys of a head."""
    if dtype == torch.bfloat16:
        return Tiles(64, 32, 3, 4, 64) if keys <= 64 else Tiles(64, 64, 2, 8, 64)
    return Tiles(32, 32 if dtype == torch.float16 else 16, 1, 4 if keys <= 64 else 8, 32)


def general_delta_rule(q, k, v, a, b, log_decay, state, scale: float, packing: Packing | None = None):
    """See `zoo.kernels.delta_rule.general.general_delta_rule`; all have as many heads."""
    return _General.apply(q, k, v, a, b, log_decay, state, scale, None if packing is None else packing.cu_seqlens)


class Problem:
    """Sizes and chunks of one call, and its launches."""

    def __init__(self, q: Tensor, v: Tensor, scale: float, cu_seqlens: Tensor | None):
        self.batch, self.length, self.heads, self.keys = q.shape
        self.values, self.device, self.dtype, self.scale = v.shape[3], q.device, q.dtype, scale
        self.sequences = self.batch if cu_seqlens is None else cu_seqlens.numel() - 1
        type_, precision = numbers(q.dtype)
        self.exact = torch.float64 if q.dtype == torch.float32 else torch.float32  # what kernels sum up in
        self.wide = torch.bfloat16 if q.dtype == torch.bfloat16 else self.exact  # of matrices and states between kernels
        self.kp, self.vp = padded_size(self.keys), padded_size(self.values)
        self.tiles = tiles(self.kp, q.dtype)
        self.chunk = self.tiles.chunk
        self.segments = Segments.of(self.batch, self.length, self.chunk, cu_seqlens, q.device)
        self.kinds = {"TYPE": type_, "ACC": tl.float64 if self.exact == torch.float64 else tl.float32, "PRECISION": precision}
        self.even_keys, self.even_values = self.kp == self.keys, self.vp == self.values
        self.programs = self.segments.count * self.heads

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """For each chunk and head."""
        return torch.empty(self.segments.count, self.heads, *shape, dtype=dtype or self.wide, device=self.device)

    def inverses(self, a, b, log_decay) -> tuple[Tensor, Tensor]:
        """T, and which chunks are safe."""
        t, safes = self.empty(self.chunk, self.chunk, dtype=self.exact), self.empty(dtype=torch.int32)
        for exact in (False, True):
            launch(
                kernels.inverses, self.programs,
                a, b, log_decay, t, safes, self.segments.table, *strides(a), *strides(b), *strides(log_decay), self.heads, self.keys,
                C=self.chunk, DP=self.kp, EVEN=self.even_keys, EXACT=exact, **self.kinds, num_warps=4,
            )  # fmt: skip
        return t, safes

    def transitions(self, q, k, a, b, log_decay, t: Tensor, safes: Tensor, backward: bool) -> dict[str, Tensor]:
        """The matrices of all chunks by name, see the kernels."""
        c, d = self.chunk, self.kp
        shapes = {"P": (d, d), "YT": (d, c), "R": (c, d), "M": (c, c), "Z": (c, d), "L": (c, c), "XT": (d, c), "N": (c, c)}
        shapes |= {"QA": (2 * c, d), "KB": (2 * c, d)}
        m = {"E": self.empty(3, d, dtype=self.exact)}
        for n, (name, shape) in enumerate(shapes.items()):  # the latter are not written forward, and only stand there
            m[name] = self.empty(*shape) if n < 4 or backward else m["P"]
        for exact in (False, True):
            launch(
                kernels.transitions, self.programs,
                q, k, a, b, log_decay, t, *m.values(), safes, self.segments.table, *strides(q), *strides(k), *strides(a), *strides(b),
                *strides(log_decay), self.scale, c if backward else 0, self.heads, self.keys,
                C=c, DP=d, EVEN=self.even_keys, EXACT=exact, **self.kinds, num_warps=self.tiles.warps,
            )  # fmt: skip
        return m

    def chain(self, m: dict, v: Tensor, initial: Tensor | None, reverse: bool) -> tuple[Tensor, Tensor]:
        """The states that each chunk meets, and the last of each sequence."""
        at_first = (0, 0, 0) if initial is None else (self.values, 1, self.keys * self.values)
        initial = zero(self.device, self.exact) if initial is None else initial
        states = self.empty(self.kp, self.vp)
        final = torch.empty(self.sequences, self.heads, self.keys, self.values, dtype=self.exact, device=self.device)
        part = min(self.tiles.slice, self.vp)
        launch(
            kernels.chain, self.sequences * self.heads * (self.vp // part),
            m["E"], m["P"], m["R" if reverse else "YT"], v, initial, states, final, self.segments.first, self.segments.table,
            *strides(v), *at_first, self.heads, self.keys, self.values,
            DP=self.kp, BW=part, WP=self.vp, C=self.chunk, EVEN=self.even_values, REVERSE=reverse, **self.kinds,
            num_warps=4, num_stages=self.tiles.stages,
        )  # fmt: skip
        return states, final

    def outputs(self, m: dict, states: Tensor, v: Tensor) -> Tensor:
        out = torch.empty(*v.shape, dtype=v.dtype, device=self.device)
        launch(
            kernels.outputs, self.programs,
            m["R"], m["M"], states, v, out, self.segments.table, *strides(v), *strides(out), self.heads, self.values,
            C=self.chunk, DP=self.kp, WP=self.vp, BW=min(self.tiles.block, self.vp), EVEN=self.even_values, **self.kinds, num_warps=4,
        )  # fmt: skip
        return out

    def value_gradients(self, m: dict, states: Tensor, fates: Tensor, v: Tensor, do: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """dv, values of all keys and cotangents of all queries."""
        dv = torch.empty(*v.shape, dtype=v.dtype, device=self.device)
        values, cotangents = self.empty(2 * self.chunk, self.vp), self.empty(2 * self.chunk, self.vp)
        launch(
            kernels.value_gradients, self.programs,
            *(m[n] for n in ("Z", "L", "XT", "N", "YT", "M")), states, fates, v, do, dv, values, cotangents, self.segments.table,
            *strides(v), *strides(do), *strides(dv), self.heads, self.values,
            C=self.chunk, DP=self.kp, WP=self.vp, BW=min(self.tiles.block, self.vp), EVEN=self.even_values, **self.kinds, num_warps=4,
        )  # fmt: skip
        return dv, values, cotangents

    def key_gradients(self, qa, kb, e, log_decay, values, cotangents, states, fates, safes) -> tuple[Tensor, Tensor]:
        """Of q, a, k and b, `[4, B, T, H, K]`, and the decay."""
        grads = torch.empty(4, self.batch, self.length, self.heads, self.keys, dtype=self.wide, device=self.device)
        later, dg = self.empty(self.kp, dtype=self.exact), torch.empty(grads.shape[1:], dtype=log_decay.dtype, device=self.device)
        block = min(self.tiles.block, self.kp)
        places = *strides(log_decay), grads.stride(0), *strides(dg)
        for exact in (False, True):
            launch(
                kernels.key_gradients, 2 * self.programs * (self.kp // block),
                qa, kb, log_decay, e, values, cotangents, states, fates, grads, later, safes, self.segments.table, *places,
                self.heads, self.keys, C=self.chunk, DP=self.kp, BD=block, WP=self.vp, EVEN=self.even_keys, EXACT=exact, **self.kinds,
                num_warps=4,
            )  # fmt: skip
        launch(
            kernels.finish, self.programs * (self.kp // block),
            qa, kb, log_decay, grads, dg, later, safes, self.segments.table, *places, self.scale, self.heads, self.keys,
            C=self.chunk, DP=self.kp, BD=block, EVEN=self.even_keys, ACC=self.kinds["ACC"], num_warps=4,
        )  # fmt: skip
        return grads, dg


class _General(torch.autograd.Function):
    """The backward makes matrices and states anew: between the passes only the inputs and T are kept."""

    @staticmethod
    def forward(ctx, q, k, v, a, b, log_decay, state, scale, cu_seqlens):
        q, k, v, a, b, log_decay = (rows(x) for x in (q, k, v, a, b, log_decay))
        p = Problem(q, v, scale, cu_seqlens)
        state = None if state is None else state.contiguous()
        t, safes = p.inverses(a, b, log_decay)
        m = p.transitions(q, k, a, b, log_decay, t, safes, backward=False)
        states, last = p.chain(m, v, state, reverse=False)
        ctx.save_for_backward(q, k, v, a, b, log_decay, state, t, safes)
        ctx.problem = p
        ctx.set_materialize_grads(False)
        return p.outputs(m, states, v), last.float()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do, dlast):
        q, k, v, a, b, log_decay, state, t, safes = ctx.saved_tensors
        p = ctx.problem
        do = rows(torch.zeros(1, dtype=v.dtype, device=v.device).expand(v.shape) if do is None else do)
        m = p.transitions(q, k, a, b, log_decay, t, safes, backward=True)
        states, _ = p.chain(m, v, state, reverse=False)
        fates, dstate = p.chain(m, do, None if dlast is None else dlast.contiguous(), reverse=True)
        dv, values, cotangents = p.value_gradients(m, states, fates, v, do)
        qa, kb, e = m["QA"], m["KB"], m["E"]
        del m  # room for the gradients
        grads, dg = p.key_gradients(qa, kb, e, log_decay, values, cotangents, states, fates, safes)
        dq, da, dk, db = grads.to(q.dtype)
        return dq, dk, dv, da, db, dg, dstate.float() if ctx.needs_input_grad[6] else None, None, None
