"""The scan in Triton, one token after another: what a thread needs for its channels never leaves its registers.

Rows are read many tokens ahead of the multiplications that wait for one another. Where channels are too few to fill a GPU, sequences
are cut into segments: a first walk finds what each makes of its state, `chain` the states between them, a second walk the outputs.
"""

import torch
import triton
from torch import Tensor
from triton import language as tl

from zoo.kernels.fused import segment_of
from zoo.kernels.launch import launch, rows
from zoo.kernels.packing import Packing
from zoo.kernels.scan.reference import carried_dtype
from zoo.kernels.segments import Segments, cdiv, padded_size

AHEAD = 8  # tokens read before the first is used
WIDTH, WARPS = 256, 4  # channels of a program
SHORTEST = 64  # tokens of a segment
FILLED = 1024  # programs that occupy a GPU


def scan(x: Tensor, log_decay: Tensor, state: Tensor | None, reverse: bool, packing: Packing | None = None) -> tuple[Tensor, Tensor]:
    """See `zoo.kernels.scan.scan`."""
    return _Scan.apply(x, log_decay, state, reverse, None if packing is None else packing.cu_seqlens)


def segment_length(length: int, programs: int, filled: int, shortest: int) -> int:
    """So long that `filled` programs have one each, where there is so much to do."""
    return min(length, max(shortest, cdiv(cdiv(length, cdiv(filled, programs)), shortest) * shortest))


def chained(bounds: Tensor, totals: Tensor, segments: Segments, initial: Tensor | None, reverse: bool) -> None:
    """Make of `bounds` `[places, ...]`, where each segment left what it adds, the states, with each segment's decay in `totals`."""
    width = totals[0].numel()
    block = min(256, padded_size(width))
    launch(
        chain, cdiv(width, block) * (segments.first.numel() - 1),
        parts(bounds), parts(totals), segments.first, parts(initial), width, BLOCK=block, AHEAD=AHEAD, COMPLEX=totals.is_complex(),
        REVERSE=reverse, num_warps=max(1, block // 64),
    )  # fmt: skip


def parts(x: Tensor | None) -> Tensor | None:
    """Complex numbers as kernels read them, real and imaginary parts in turn."""
    return torch.view_as_real(x) if x is not None and x.is_complex() else x


def reals(x: Tensor) -> tuple[int, int]:
    """How many real numbers lie between rows, and between tokens; per channel there are only channels."""
    size = 1 + x.is_complex()
    return (size * x.stride(0), size * x.stride(1)) if x.ndim == 3 else (0, 0)


class Problem:
    """Sizes and segments of one call, and its launches."""

    def __init__(self, x: Tensor, log_decay: Tensor, reverse: bool, cu_seqlens: Tensor | None):
        self.batch, self.length, self.width = x.shape
        self.block = min(WIDTH, padded_size(self.width))
        self.warps = cdiv(self.block * WARPS, WIDTH)
        self.blocks = cdiv(self.width, self.block)
        size = segment_length(self.length, self.batch * self.blocks, FILLED, SHORTEST)
        self.segments = Segments.of(self.batch, self.length, size, cu_seqlens, x.device)
        self.sequences = self.segments.first.numel() - 1
        self.reverse, self.carried, self.device = reverse, carried_dtype(x.dtype, x, log_decay), x.device
        self.log_decay, self.per_token = log_decay, log_decay.ndim == 3

    def empty(self, count: int) -> Tensor:
        return torch.empty(count, self.width, dtype=self.carried, device=self.device)

    def flags(self, x: Tensor) -> dict:
        return {
            "AHEAD": AHEAD, "BD": self.block, "PER_TOKEN": self.per_token, "COMPLEX": self.carried.is_complex,
            "X_COMPLEX": x.is_complex(), "G_COMPLEX": self.log_decay.is_complex(),
        }  # fmt: skip

    def walk(self, x: Tensor, out=None, start=None, end=None, totals=None, *, adjoint: bool = False) -> None:
        launch(
            walk, self.segments.count * self.blocks,
            parts(x), parts(self.log_decay), parts(out), parts(start), parts(end), parts(totals), self.segments.table,
            *reals(x), *reals(self.log_decay), *((0, 0) if out is None else reals(out)), self.width, **self.flags(x),
            REVERSE=self.reverse != adjoint, ADJOINT=adjoint, num_warps=self.warps,
        )  # fmt: skip

    def bounds(self, x: Tensor, initial: Tensor | None, adjoint: bool) -> Tensor:
        """The states at every boundary of segments, `[places, D]`, or the gradients that reach them."""
        bounds, totals = self.empty(self.segments.places), self.empty(self.segments.count)
        self.walk(x, end=bounds, totals=totals, adjoint=adjoint)
        chained(bounds, totals, self.segments, initial, self.reverse != adjoint)
        return bounds


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, log_decay, state, reverse, cu_seqlens):
        x, log_decay = rows(x.resolve_conj()), rows(log_decay.resolve_conj())
        p = Problem(x, log_decay, reverse, cu_seqlens)
        state = None if state is None else state.resolve_conj().contiguous()
        out = torch.empty(x.shape, dtype=p.carried if p.carried.is_complex else x.dtype, device=x.device)
        if p.segments.split:
            start = p.bounds(x, state, adjoint=False)
            p.walk(x, out, start)
            last = start[p.segments.start if reverse else p.segments.last]
        else:
            start, last = state, p.empty(p.sequences)
            p.walk(x, out, start, last)
        ctx.save_for_backward(log_decay, out, start)
        ctx.problem, ctx.of = p, x.dtype
        ctx.set_materialize_grads(False)
        return out, last

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout, dlast):
        log_decay, out, start = ctx.saved_tensors
        p, seg = ctx.problem, ctx.problem.segments
        dout = rows(torch.zeros(1, dtype=out.dtype, device=p.device).expand(out.shape) if dout is None else dout.resolve_conj())
        dlast = None if dlast is None else dlast.resolve_conj().contiguous()
        fates = p.bounds(dout, dlast, adjoint=True) if seg.split else dlast
        dstate = None if seg.split else p.empty(p.sequences)
        dx = torch.empty(out.shape, dtype=ctx.of, device=p.device)
        shape = log_decay.shape if p.per_token else (seg.count, p.width)
        dg = torch.empty(shape, dtype=log_decay.dtype if p.per_token else carried_dtype(torch.float32, log_decay), device=p.device)
        launch(
            gradients, seg.count * p.blocks,
            parts(dout), parts(log_decay), parts(out), parts(dx), parts(dg), parts(start), parts(fates), parts(dstate), seg.table,
            *reals(dout), *reals(log_decay), p.width, p.length, **p.flags(dx), REVERSE=not p.reverse, num_warps=p.warps,
        )  # fmt: skip
        if dstate is None:
            dstate = fates[seg.last if p.reverse else seg.start]
        dstate = dstate if ctx.needs_input_grad[2] else None
        return dx, dg if p.per_token else dg.sum(0).to(log_decay.dtype), dstate, None, None


@triton.jit
def load_pair(X, d, inside, COMPLEX: tl.constexpr):
    """Channels d of the row that begins at X: real and imaginary parts."""
    if COMPLEX:
        return tl.load(X + 2 * d, mask=inside, other=0.0), tl.load(X + 2 * d + 1, mask=inside, other=0.0)
    x = tl.load(X + d, mask=inside, other=0.0)
    return x, tl.zeros_like(x)


@triton.jit
def store_pair(X, d, inside, re, im, COMPLEX: tl.constexpr):
    if COMPLEX:
        tl.store(X + 2 * d, re, mask=inside)
        tl.store(X + 2 * d + 1, im, mask=inside)
    else:
        tl.store(X + d, re.to(X.dtype.element_ty), mask=inside)


@triton.jit
def times(a_re, a_im, b_re, b_im, COMPLEX: tl.constexpr):
    """`a b`; imaginary parts of real numbers are not looked at."""
    if COMPLEX:
        return a_re * b_re - a_im * b_im, a_re * b_im + a_im * b_re
    return a_re * b_re, b_im


@triton.jit
def decay_near_one(x):
    """exp of a number that is not positive. Near zero the error of one is that of all tokens which follow, and a GPU's own exp errs by
    more than a rounding: six terms of its series do not."""
    near = 1 + x * (1 + x * (1 / 2 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x * (1 / 720))))))
    return tl.where(x > -0.25, near, tl.exp(x))


@triton.jit
def decay_of(re, im, COMPLEX: tl.constexpr, ADJOINT: tl.constexpr):
    """exp of a log-decay, or of its conjugate."""
    size = decay_near_one(re.to(tl.float32))
    if COMPLEX:
        angle = -im.to(tl.float32) if ADJOINT else im.to(tl.float32)
        return size * tl.cos(angle), size * tl.sin(angle)
    return size, tl.zeros_like(size)


@triton.jit
def row_of(TABLE, segment, AFTER: tl.constexpr, D, COMPLEX: tl.constexpr):
    """Where the state before or after a segment begins."""
    return tl.load(TABLE + segment * 5 + (4 if AFTER else 3)) * D * (2 if COMPLEX else 1)


@triton.jit
def walk(
    X, G, OUT, START, END, TOTALS, TABLE, x_b, x_t, g_b, g_t, out_b, out_t, D,
    AHEAD: tl.constexpr, BD: tl.constexpr, PER_TOKEN: tl.constexpr, COMPLEX: tl.constexpr, X_COMPLEX: tl.constexpr,
    G_COMPLEX: tl.constexpr, REVERSE: tl.constexpr, ADJOINT: tl.constexpr,
):  # fmt: skip
    """h = a h + x along a segment from START to END, h of all tokens into OUT, the product of all a into TOTALS; those of them that
    are given. ADJOINT: h = conj(a) (h + x). Reads two numbers a token and channel and writes one, for 2 FLOP and an exponential.
    Programs: segments x blocks of D."""
    blocks = tl.cdiv(D, BD)
    segment, d = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks * BD + tl.arange(0, BD)
    row, first, stop = segment_of(TABLE, segment)
    count, step, first = (stop - first).to(tl.int32), -1 if REVERSE else 1, (stop - 1) if REVERSE else first
    X += row * x_b + first * x_t
    G += row * g_b + first * g_t
    h_re, h_im = tl.zeros((BD,), tl.float32), tl.zeros((BD,), tl.float32)
    if START is not None:
        h_re, h_im = load_pair(START + row_of(TABLE, segment, REVERSE, D, COMPLEX), d, d < D, COMPLEX)
    sum_re, sum_im = tl.zeros((BD,), tl.float32), tl.zeros((BD,), tl.float32)
    g = load_pair(G, d, (d < D) & (count > 0), G_COMPLEX)
    for i in range(0, count, AHEAD):
        xs, gs = (), ()
        for u in tl.static_range(AHEAD):
            inside = (d < D) & (i + u < count)
            xs += (load_pair(X + u * step * x_t, d, inside, X_COMPLEX),)
            gs += (load_pair(G + u * step * g_t, d, inside, G_COMPLEX) if PER_TOKEN else g,)
        for u in tl.static_range(AHEAD):
            a_re, a_im = decay_of(gs[u][0], gs[u][1], G_COMPLEX, ADJOINT)
            if not PER_TOKEN:  # what stands behind the end decays nothing, as the zeros read there do
                a_re, a_im = tl.where(i + u < count, a_re, 1.0), tl.where(i + u < count, a_im, 0.0)
            x_re, x_im = xs[u][0].to(tl.float32), xs[u][1].to(tl.float32)
            if ADJOINT:
                h_re, h_im = times(a_re, a_im, h_re + x_re, h_im + x_im, COMPLEX)
            else:
                h_re, h_im = times(a_re, a_im, h_re, h_im, COMPLEX)
                h_re, h_im = h_re + x_re, h_im + x_im
            sum_re, sum_im = sum_re + gs[u][0].to(tl.float32), sum_im + gs[u][1].to(tl.float32)
            if OUT is not None:
                at = OUT + row * out_b + (first + (i + u) * step) * out_t
                store_pair(at, d, (d < D) & (i + u < count), h_re, h_im, COMPLEX)
        X += AHEAD * step * x_t
        G += AHEAD * step * g_t
    if END is not None:
        store_pair(END + row_of(TABLE, segment, not REVERSE, D, COMPLEX), d, d < D, h_re, h_im, COMPLEX)
    if TOTALS is not None:
        if not PER_TOKEN:
            sum_re, sum_im = g[0].to(tl.float32) * count, g[1].to(tl.float32) * count
        a_re, a_im = decay_of(sum_re, sum_im, G_COMPLEX, ADJOINT)
        store_pair(TOTALS + segment * D * (2 if COMPLEX else 1), d, d < D, a_re, a_im, COMPLEX)


@triton.jit
def chain(
    BOUNDS, TOTALS, FIRST, INIT, W,
    BLOCK: tl.constexpr, AHEAD: tl.constexpr, COMPLEX: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """BOUNDS [places, W] from what each segment adds to what the state is at each boundary, with decays TOTALS [segments, W]. FIRST
    [sequences + 1]: their first segments; segment s of sequence n lies between the boundaries s + n and s + n + 1.
    Programs: sequences x blocks of W."""
    blocks, unit = tl.cdiv(W, BLOCK), 2 if COMPLEX else 1
    n, w = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    begin, end = tl.load(FIRST + n), tl.load(FIRST + n + 1)
    count, step, first = (end - begin).to(tl.int32), -1 if REVERSE else 1, (end - 1) if REVERSE else begin
    h_re, h_im = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    if INIT is not None:
        h_re, h_im = load_pair(INIT + n * W * unit, w, w < W, COMPLEX)
    BOUNDS += n * W * unit
    store_pair(BOUNDS + (end if REVERSE else begin) * W * unit, w, w < W, h_re, h_im, COMPLEX)
    for i in range(0, count, AHEAD):
        xs, decays = (), ()
        for u in tl.static_range(AHEAD):
            segment, inside = first + (i + u) * step, (w < W) & (i + u < count)
            xs += (load_pair(BOUNDS + (segment + (0 if REVERSE else 1)) * W * unit, w, inside, COMPLEX),)
            decays += (load_pair(TOTALS + segment * W * unit, w, inside, COMPLEX),)
        for u in tl.static_range(AHEAD):
            segment, inside = first + (i + u) * step, (w < W) & (i + u < count)
            h_re, h_im = times(decays[u][0], decays[u][1], h_re, h_im, COMPLEX)
            h_re, h_im = h_re + xs[u][0], h_im + xs[u][1]
            store_pair(BOUNDS + (segment + (0 if REVERSE else 1)) * W * unit, w, inside, h_re, h_im, COMPLEX)


@triton.jit
def gradients(
    DH, G, H, DX, DG, START, FATES, FIRST, TABLE, dh_b, dh_t, g_b, g_t, D, T,
    AHEAD: tl.constexpr, BD: tl.constexpr, PER_TOKEN: tl.constexpr, COMPLEX: tl.constexpr, X_COMPLEX: tl.constexpr,
    G_COMPLEX: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Along a segment from FATES to FIRST, k the gradient that reaches a token's state from beyond it:

        DX = k + DH        k <- conj(a) DX        DG = k conj(h of the token the state came from)

    H, DX and a DG per token are contiguous, the other DG is [segments, D]. Reads three numbers a token and channel and writes two.
    Programs: segments x blocks of D."""
    blocks = tl.cdiv(D, BD)
    segment, d = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks * BD + tl.arange(0, BD)
    row, first, stop = segment_of(TABLE, segment)
    count, step, first = (stop - first).to(tl.int32), -1 if REVERSE else 1, (stop - 1) if REVERSE else first
    DH += row * dh_b + first * dh_t
    G += row * g_b + first * g_t
    at = (row * T + first) * D  # of contiguous rows
    unit: tl.constexpr = 2 if COMPLEX else 1
    x_unit: tl.constexpr = 2 if X_COMPLEX else 1
    g_unit: tl.constexpr = 2 if G_COMPLEX else 1
    k_re, k_im = tl.zeros((BD,), tl.float32), tl.zeros((BD,), tl.float32)
    if FATES is not None:
        k_re, k_im = load_pair(FATES + row_of(TABLE, segment, REVERSE, D, COMPLEX), d, d < D, COMPLEX)
    s_re, s_im = tl.zeros((BD,), tl.float32), tl.zeros((BD,), tl.float32)
    if START is not None:
        s_re, s_im = load_pair(START + row_of(TABLE, segment, not REVERSE, D, COMPLEX), d, d < D, COMPLEX)
    sum_re, sum_im = tl.zeros((BD,), tl.float32), tl.zeros((BD,), tl.float32)
    g = load_pair(G, d, (d < D) & (count > 0), G_COMPLEX)
    for i in range(0, count, AHEAD):
        dhs, gs, hs = (), (), ()
        for u in tl.static_range(AHEAD):
            inside = (d < D) & (i + u < count)
            dhs += (load_pair(DH + u * step * dh_t, d, inside, COMPLEX),)
            gs += (load_pair(G + u * step * g_t, d, inside, G_COMPLEX) if PER_TOKEN else g,)
            hs += (load_pair(H + (at + (u + 1) * step * D) * unit, d, inside & (i + u + 1 < count), COMPLEX),)
        for u in tl.static_range(AHEAD):
            here, inside, last = at + u * step * D, (d < D) & (i + u < count), i + u + 1 == count
            x_re, x_im = k_re + dhs[u][0].to(tl.float32), k_im + dhs[u][1].to(tl.float32)
            store_pair(DX + here * x_unit, d, inside, x_re, x_im, X_COMPLEX)
            a_re, a_im = decay_of(gs[u][0], gs[u][1], G_COMPLEX, True)
            if not PER_TOKEN:
                a_re, a_im = tl.where(i + u < count, a_re, 1.0), tl.where(i + u < count, a_im, 0.0)
            k_re, k_im = times(a_re, a_im, x_re, x_im, COMPLEX)
            h_re, h_im = tl.where(last, s_re, hs[u][0].to(tl.float32)), tl.where(last, s_im, hs[u][1].to(tl.float32))
            dg_re, dg_im = times(h_re, -h_im, k_re, k_im, COMPLEX)
            if PER_TOKEN:
                store_pair(DG + here * g_unit, d, inside, dg_re, dg_im, G_COMPLEX)
            else:
                sum_re, sum_im = sum_re + dg_re, sum_im + dg_im
        DH += AHEAD * step * dh_t
        G += AHEAD * step * g_t
        at += AHEAD * step * D
    if FIRST is not None:
        store_pair(FIRST + row_of(TABLE, segment, not REVERSE, D, COMPLEX), d, d < D, k_re, k_im, COMPLEX)
    if not PER_TOKEN:
        store_pair(DG + segment * D * g_unit, d, d < D, sum_re, sum_im, G_COMPLEX)
