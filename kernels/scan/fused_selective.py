"""The selective scan in Triton. A thread has a channel and its N states in registers, which never leave the chip but at chunks' ends.

Forward: `walk` goes from token to token; where channels are too few to fill a GPU, sequences are cut into segments, of which a first
walk finds what they make of their state. Backward: one more walk forward leaves a state for every chunk and what reaches each
segment's start, then `gradients` goes back chunk after chunk, for one n after another, and has a chunk's states in registers again.
"""

import torch
import triton
from torch import Tensor
from triton import language as tl

from zoo.kernels.fused import INTERPRETED, segment_of
from zoo.kernels.launch import launch, rows
from zoo.kernels.packing import Packing
from zoo.kernels.scan.fused import chained, segment_length
from zoo.kernels.segments import Segments, cdiv

CHUNK = 16  # tokens whose states a thread holds
LANES = 32  # channels of a program that finds gradients; all programs are one warp
SHORTEST = 256  # tokens of a segment
FILLED = 2048  # programs that occupy a GPU
LOG2_E = tl.constexpr(1.4426950408889634)


def selective_scan(x, dt, A, B, C, D, state, packing: Packing | None = None) -> tuple[Tensor, Tensor]:
    """See `zoo.kernels.scan.selective.selective_scan`; A is real."""
    return _SelectiveScan.apply(x, dt, A, B, C, D, state, None if packing is None else packing.cu_seqlens)


def tile(states: int) -> tuple[int, int]:
    """Channels of a program that walks, two a thread where registers suffice, and tokens that it reads before the first is used."""
    return (64, 4) if states <= 16 else (32, 2)


class Problem:
    """Sizes and segments of one walk, and its launches."""

    def __init__(self, x: Tensor, A: Tensor, groups: int, cu_seqlens: Tensor | None):
        self.batch, self.length, self.width = x.shape
        self.states, self.groups, self.device = A.shape[1], groups, x.device
        self.block, self.ahead = tile(self.states)
        self.blocks = cdiv(self.width // groups, self.block)  # of a group
        size = segment_length(self.length, self.batch * groups * self.blocks, FILLED, SHORTEST)
        self.segments = Segments.of(self.batch, self.length, size, cu_seqlens, x.device)
        self.sequences, self.chunks = self.segments.first.numel() - 1, cdiv(size, CHUNK)
        self.programs = self.segments.count * groups * self.blocks
        self.sizes = groups, self.width // groups

    def empty(self, *count: int) -> Tensor:
        """That many states, laid out with channels side by side."""
        return torch.empty(*count, self.states, self.width, device=self.device)

    def walk(self, x, dt, A, pairs, D=None, out=None, start=None, end=None, totals=None, dy=None, fates=None, checks=None) -> None:
        launch(
            walk, self.programs,
            x, dt, A, pairs, D, out, start, end, totals, dy, fates, checks, self.segments.table, x.stride(0), x.stride(1), dt.stride(0),
            dt.stride(1), 0 if dy is None else dy.stride(0), 0 if dy is None else dy.stride(1), *self.sizes, self.length, self.chunks,
            AHEAD=self.ahead, BD=self.block, N=self.states, CHUNK=CHUNK, GROUPS=self.groups, num_warps=1,
        )  # fmt: skip


class _SelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dt, A, B, C, D, state, cu_seqlens):
        x, dt, A, B, C = rows(x), rows(dt), A.contiguous(), rows(B), rows(C)
        p, pairs = Problem(x, A, B.shape[2], cu_seqlens), paired(B, C)
        start = None if state is None else state.transpose(1, 2).contiguous()
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        if p.segments.split:
            bounds, totals = p.empty(p.segments.places), p.empty(p.segments.count)
            p.walk(x, dt, A, pairs, end=bounds, totals=totals)
            chained(bounds, totals, p.segments, start, reverse=False)
            start, last = bounds, bounds[p.segments.last]
            p.walk(x, dt, A, pairs, D, out, start)
        else:
            last = p.empty(p.sequences)
            p.walk(x, dt, A, pairs, D, out, start, last)
        ctx.save_for_backward(x, dt, A, B, C, D, pairs, start)
        ctx.problem = p
        ctx.set_materialize_grads(False)
        return out, last.transpose(1, 2).contiguous()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, dlast):
        x, dt, A, B, C, D, pairs, start = ctx.saved_tensors
        p, seg = ctx.problem, ctx.problem.segments
        dy = rows(torch.zeros(1, dtype=x.dtype, device=p.device).expand(x.shape) if dy is None else dy)
        dlast = None if dlast is None else dlast.transpose(1, 2).contiguous()
        checks = p.empty(seg.count, p.chunks)
        if seg.split:
            fates, totals = p.empty(seg.places), p.empty(seg.count)
            p.walk(x, dt, A, pairs, start=start, totals=totals, dy=dy, fates=fates, checks=checks)
            chained(fates, totals, seg, dlast, reverse=True)
        else:
            fates = p.empty(p.sequences).zero_() if dlast is None else dlast
            p.walk(x, dt, A, pairs, start=start, checks=checks)
        dx, ddt = torch.empty(x.shape, dtype=x.dtype, device=x.device), torch.empty(x.shape, dtype=x.dtype, device=x.device)
        dA = p.empty(seg.count)
        dD = None if D is None else torch.empty(seg.count, p.width, device=p.device)
        blocks = cdiv(p.width // p.groups, LANES)
        dpairs = torch.empty(blocks, p.batch, p.groups, p.states, 2, p.length, device=p.device)
        launch(
            gradients, seg.count * p.groups * blocks,
            x, dt, dy, A, D, pairs, checks, fates, dx, ddt, dA, dD, dpairs, seg.table, *x.stride()[:2], *dt.stride()[:2], *dy.stride()[:2],
            p.batch, *p.sizes, p.length, p.chunks, BD=LANES, N=p.states, CHUNK=CHUNK, GROUPS=p.groups,
            BITS=CHUNK.bit_length(), HALF=x.dtype == torch.bfloat16 and not INTERPRETED, num_warps=1,
        )  # fmt: skip
        dpairs = dpairs.sum(0)
        dB, dC = (dpairs[:, :, :, i].permute(0, 3, 1, 2).to(like.dtype) for i, like in enumerate((B, C)))
        dstate = (fates[seg.start] if seg.split else fates).transpose(1, 2) if ctx.needs_input_grad[6] else None
        dD = None if D is None else dD.sum(0).to(D.dtype)
        return dx, ddt, dA.sum(0).t().to(A.dtype), dB, dC, dD, dstate, None


def paired(B: Tensor, C: Tensor) -> Tensor:
    """`[B, T, G, N]` int64, each the bits of two float32, of B below and of C above, for one load to bring both."""
    out = torch.empty(*B.shape, 2, device=B.device)
    out[..., 0], out[..., 1] = B, C
    return out.view(torch.int64).squeeze(-1)


@triton.jit
def place_of(TABLE, segment, AFTER: tl.constexpr, N, W):
    """Where the state before or after a segment begins."""
    return tl.load(TABLE + segment * 5 + (4 if AFTER else 3)) * N * W


@triton.jit
def load_pair(PAIRS, u, left, STEP: tl.constexpr):
    """One number of B and one of C of token u. Behind the end those of the last token, where a step of 0 lets them change nothing."""
    pair = tl.load(PAIRS + tl.minimum(u, left - 1) * STEP)
    return pair.to(tl.uint32).to(tl.float32, bitcast=True), (pair >> 32).to(tl.uint32).to(tl.float32, bitcast=True)


@triton.jit
def load_rows(X, stride, real, left, COUNT: tl.constexpr):
    """A row's channels, COUNT tokens of which `left` exist."""
    xs = ()
    for u in tl.static_range(COUNT):
        xs += (tl.load(X + u * stride, mask=real & (u < left), other=0.0).to(tl.float32),)
    return xs


@triton.jit
def load_states(X, stride, real, N: tl.constexpr):
    xs = ()
    for n in tl.static_range(N):
        xs += (tl.load(X + n * stride, mask=real, other=0.0),)
    return xs


@triton.jit
def store_states(X, stride, real, xs, N: tl.constexpr):
    for n in tl.static_range(N):
        tl.store(X + n * stride, xs[n], mask=real)


@triton.jit
def one_token(x, dt, dy, rates, hs, ps, ks, PAIRS, u, left, BACK: tl.constexpr, N: tl.constexpr, STEP: tl.constexpr):
    """States behind a token and its C . h; with BACK also products of decays and what of all dy C reaches the beginning."""
    added, y, h_new, p_new, k_new = dt * x, tl.zeros_like(x), (), (), ()
    for n in tl.static_range(N):
        b, c = load_pair(PAIRS + n, u, left, STEP)
        a = tl.exp2(dt * rates[n])
        h_new += (a * hs[n] + added * b,)
        y += h_new[n] * c
        p_new += (ps[n] * a if BACK else ps[n],)
        k_new += (ks[n] + p_new[n] * (dy * c) if BACK else ks[n],)
    return y, h_new, p_new, k_new


@triton.jit
def walk(
    X, DT, A, PAIRS, D, OUT, START, END, TOTALS, DY, FATES, CHECKS, TABLE,
    x_b, x_t, dt_b, dt_t, dy_b, dy_t, G, W, T, CHUNKS,
    AHEAD: tl.constexpr, BD: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Along a segment, from its state at START or zeros: outputs into OUT, the last state into END, its decay into TOTALS, states
    before each chunk into CHECKS [segments, CHUNKS, N, D], and with DY what of the outputs' gradients reaches the segment's start
    into FATES; those of them that are given. States lie as [., N, D]. Reads x, dt, dy and 2 N numbers for all channels and writes y,
    for 4 N to 7 N FLOP and N exponentials. Programs: segments x groups x blocks of W channels."""
    blocks = tl.cdiv(W, BD)
    group, segment = tl.program_id(0) // blocks % G, (tl.program_id(0) // blocks // G).to(tl.int64)
    w = tl.program_id(0) % blocks * BD + tl.arange(0, BD)
    real, d, D_ALL = w < W, group * W + w, G * W
    row, start, stop = segment_of(TABLE, segment)
    count = (stop - start).to(tl.int32)
    X += row * x_b + start * x_t
    DT += row * dt_b + start * dt_t
    PAIRS += ((row * T + start) * GROUPS + group) * N
    rates, hs, ps, ks = (), (), (), ()
    for n in tl.static_range(N):
        rates += (tl.load(A + d * N + n, mask=real, other=0.0).to(tl.float32) * LOG2_E,)
        hs += (tl.zeros((BD,), tl.float32),)
        ps += (tl.full((BD,), 1.0, tl.float32),)
        ks += (tl.zeros((BD,), tl.float32),)
    before, after = place_of(TABLE, segment, False, N, D_ALL) + d, place_of(TABLE, segment, True, N, D_ALL) + d
    if START is not None:
        hs = load_states(START + before, D_ALL, real, N)
    if DY is not None:
        DY += row * dy_b + start * dy_t
    if OUT is not None:
        OUT += (row * T + start) * D_ALL
        skip = tl.load(D + d, mask=real, other=0.0).to(tl.float32) if D is not None else tl.zeros((BD,), tl.float32)
    total = tl.zeros((BD,), tl.float32)
    for i in range(0, count, AHEAD):
        if CHECKS is not None:  # noqa: SIM102 (the compiler looks at both sides of an `and`)
            if i % CHUNK == 0:
                store_states(CHECKS + (segment * CHUNKS + i // CHUNK) * N * D_ALL + d, D_ALL, real, hs, N)
        xs, dts = load_rows(X + d, x_t, real, count - i, AHEAD), load_rows(DT + d, dt_t, real, count - i, AHEAD)
        dys = load_rows(DY + d, dy_t, real, count - i, AHEAD) if DY is not None else xs
        for u in tl.static_range(AHEAD):
            y, hs, ps, ks = one_token(xs[u], dts[u], dys[u], rates, hs, ps, ks, PAIRS, u, count - i, DY is not None, N, GROUPS * N)
            total += dts[u]
            if OUT is not None:
                tl.store(OUT + u * D_ALL + d, (y + skip * xs[u]).to(OUT.dtype.element_ty), mask=real & (i + u < count))
        X += AHEAD * x_t
        DT += AHEAD * dt_t
        PAIRS += AHEAD * GROUPS * N
        if OUT is not None:
            OUT += AHEAD * D_ALL
        if DY is not None:
            DY += AHEAD * dy_t
    if END is not None:
        store_states(END + after, D_ALL, real, hs, N)
    if FATES is not None:
        store_states(FATES + before, D_ALL, real, ks, N)
    if TOTALS is not None:
        for n in tl.static_range(N):
            tl.store(TOTALS + (segment * N + n) * D_ALL + d, tl.exp2(total * rates[n]), mask=real)


@triton.jit
def summed(xs, BD: tl.constexpr, BITS: tl.constexpr, HALF: tl.constexpr):
    """Sums over all threads' channels, 2^BITS times `[BD]` -> `[16, 2^BITS]`, 16 times the same: a product with ones costs a tenth of
    passing every number from thread to thread."""
    for level in tl.static_range(BITS):
        joined = ()
        for i in tl.static_range(2 ** (BITS - 1 - level)):
            joined += (tl.join(xs[i], xs[i + 2 ** (BITS - 1 - level)]),)
        xs = joined
    x = tl.reshape(xs[0], (BD, 2**BITS))
    if HALF:
        return tl.dot(tl.full((16, BD), 1.0, tl.bfloat16), x.to(tl.bfloat16))
    else:
        ones, coarse = tl.full((16, BD), 1.0, tl.float32), (x.to(tl.uint32, bitcast=True) & 0xFFFFE000).to(tl.float32, bitcast=True)
        return tl.dot(ones, x - coarse, tl.dot(ones, coarse, input_precision="tf32"), input_precision="tf32")  # tf32 keeps 13 bits less


@triton.jit
def one_state(h, k, da, rate, dts, dys, added, dus, ddts, PAIRS, left, CHUNK: tl.constexpr, STEP: tl.constexpr):
    """A chunk forward from h, and back with k, for one n: k and da behind it, dus, ddts, and by channel what dB and dC sum up."""
    hs, decays, pairs = (h,), (), ()
    for u in tl.static_range(CHUNK):
        pairs += (load_pair(PAIRS, u, left, STEP),)
        decays += (tl.exp2(dts[u] * rate),)
        hs += (decays[u] * hs[u] + added[u] * pairs[u][0],)
    gs, backs = (), ()  # last token first
    for u in tl.static_range(CHUNK - 1, -1, -1):
        gs += (k + dys[u] * pairs[u][1],)
        k = decays[u] * gs[CHUNK - 1 - u]
        backs += (k * hs[u],)
        da += dts[u] * backs[CHUNK - 1 - u]
    dus_new, ddts_new, of_b, of_c = (), (), (), ()
    for u in tl.static_range(CHUNK):
        dus_new += (dus[u] + gs[CHUNK - 1 - u] * pairs[u][0],)
        ddts_new += (ddts[u] + rate * backs[CHUNK - 1 - u],)
        of_b += (gs[CHUNK - 1 - u] * added[u],)
        of_c += (dys[u] * hs[u + 1],)
    return k, da, dus_new, ddts_new, of_b + of_c


@triton.jit
def gradients(
    X, DT, DY, A, D, PAIRS, CHECKS, FATES, DX, DDT, DA, DD, DPAIRS, TABLE,
    x_b, x_t, dt_b, dt_t, dy_b, dy_t, ROWS, G, W, T, CHUNKS,
    BD: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr, BITS: tl.constexpr, GROUPS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Against time along a segment, chunk after chunk, for one n after another, k the gradient that reaches a state from beyond it:

        g = k + dy C        k <- a g        dC = sum_d dy h        dB = sum_d g dt x
        dx = dt sum_n g B + D dy            ddt = x sum_n g B + sum_n A k h_before        dA = sum_t dt k h_before

    FATES has k at the segment's end, and in the end at its start. DA [segments, N, D], DD [segments, D], DPAIRS [blocks, B, G, N, 2, T]
    hold parts of sums. Reads x, dt, dy and a state a chunk and channel, writes dx, ddt, 2 N numbers a block and token; about 14 N FLOP,
    N exponentials and two sums over channels. Programs: segments x groups x blocks of W channels."""
    blocks = tl.cdiv(W, BD)
    block, group, segment = tl.program_id(0) % blocks, tl.program_id(0) // blocks % G, (tl.program_id(0) // blocks // G).to(tl.int64)
    w = block * BD + tl.arange(0, BD)
    real, d, D_ALL = w < W, group * W + w, G * W
    row, start, stop = segment_of(TABLE, segment)
    count = (stop - start).to(tl.int32)
    FATES += place_of(TABLE, segment, True, N, D_ALL) + d
    DA += segment * N * D_ALL + d
    CHECKS += segment * CHUNKS * N * D_ALL + d
    DPAIRS += ((block.to(tl.int64) * ROWS + row) * G + group) * N * 2 * T
    which, token = tl.arange(0, 2 * CHUNK)[None, :] // CHUNK, tl.arange(0, 2 * CHUNK)[None, :] % CHUNK
    lead = tl.arange(0, 16)[:, None]  # of 16 times the same
    skip = tl.load(D + d, mask=real, other=0.0).to(tl.float32) if D is not None else tl.zeros((BD,), tl.float32)
    dskip = tl.zeros((BD,), tl.float32)
    chunks = tl.cdiv(count, CHUNK)
    if chunks == 0:
        for n in range(0, N):
            tl.store(DA + n * D_ALL, dskip, mask=real)
    for j in range(0, chunks):
        chunk = chunks - 1 - j
        t, left = start + chunk * CHUNK, count - chunk * CHUNK
        dts = load_rows(DT + row * dt_b + t * dt_t + d, dt_t, real, left, CHUNK)
        xs = load_rows(X + row * x_b + t * x_t + d, x_t, real, left, CHUNK)
        dys = load_rows(DY + row * dy_b + t * dy_t + d, dy_t, real, left, CHUNK)
        added, dus, ddts = (), (), ()
        for u in tl.static_range(CHUNK):
            added += (dts[u] * xs[u],)
            dskip += dys[u] * xs[u]
            dus += (tl.zeros((BD,), tl.float32),)
            ddts += (tl.zeros((BD,), tl.float32),)
        pairs = PAIRS + ((row * T + t) * GROUPS + group) * N
        for n in range(0, N):
            rate = tl.load(A + d * N + n, mask=real, other=0.0).to(tl.float32) * LOG2_E
            h = tl.load(CHECKS + (chunk * N + n).to(tl.int64) * D_ALL, mask=real, other=0.0)
            k = tl.load(FATES + n * D_ALL, mask=real, other=0.0)
            da = tl.load(DA + n * D_ALL, mask=real & (j > 0), other=0.0)
            k, da, dus, ddts, sums = one_state(h, k, da, rate, dts, dys, added, dus, ddts, pairs + n, left, CHUNK, GROUPS * N)
            tl.store(FATES + n * D_ALL, k, mask=real)
            tl.store(DA + n * D_ALL, da, mask=real)
            at = DPAIRS + (n * 2 + which) * T + t + token + lead
            tl.store(at, summed(sums, BD, BITS, HALF), mask=(lead == 0) & (token < left))
        at = (row * T + t) * D_ALL + d
        xs = load_rows(X + row * x_b + t * x_t + d, x_t, real, left, CHUNK)  # not kept: registers are few
        for u in tl.static_range(CHUNK):
            dx, ddt = dts[u] * dus[u] + skip * dys[u], xs[u] * dus[u] + ddts[u] * (1 / LOG2_E)
            tl.store(DX + at + u * D_ALL, dx.to(DX.dtype.element_ty), mask=real & (u < left))
            tl.store(DDT + at + u * D_ALL, ddt.to(DDT.dtype.element_ty), mask=real & (u < left))
    if DD is not None:
        tl.store(DD + segment * D_ALL + d, dskip, mask=real)
