"""What the Triton kernels of both operators share."""

import triton
from triton import language as tl

from zoo.kernels.fused import halves


@triton.jit
def unit_lower_inverse(a, i, C: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """(I + a)^-1 of a strictly lower triangular a `[C, C]`, i being `arange(0, C)`.

    Two neighbouring blocks on the diagonal become one, [[T1, 0], [-T2 a21 T1, T2]], for all pairs at once, block sizes doubling from
    one: `2 log2(C) - 2` products of whole matrices. No power of a is ever formed, whose entries may be huge where the inverse's are not.
    """
    row, column = i[:, None], i[None, :]
    t = tl.where(row == column, 1.0, 0.0).to(ACC) - tl.where((row // 2) == (column // 2), a, 0.0)
    half = 2
    while half < C:
        moved = tl.dot(tl.where(halves(row, column, half), a, 0.0), t, input_precision=PRECISION, out_dtype=ACC)
        t -= tl.dot(t, moved, input_precision=PRECISION, out_dtype=ACC)
        half *= 2
    return t
