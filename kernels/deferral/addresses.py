"""Where elements lie in memory, and how kernels write that."""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

Layout = tuple[tuple[int, int], ...]  # sizes and strides, the outer first


def layout(x: Tensor, shape: Iterable[int]) -> Layout:
    """Where the elements of x, broadcast to `shape`, lie, in as few dimensions as possible."""
    found: list[tuple[int, int]] = []
    for size, stride in zip(shape, x.expand(tuple(shape)).stride(), strict=True):
        if size == 1:
            continue
        if found and found[-1][1] == stride * size:
            found[-1] = found[-1][0] * size, stride
        else:
            found.append((size, stride))
    return tuple(found)


def in_order(numel: int) -> Layout:
    return ((numel, 1),) if numel > 1 else ()


def along_rows(count: int, width: int) -> Layout:
    """Of one number for each of so many rows."""
    return tuple((size, stride) for size, stride in ((count, 1), (width, 0)) if size > 1)


@dataclass
class Place:
    """Where a program's elements are: `flat` among all, or in row `high` at `low` of rows of `width`; `mask`: which exist; `axis`: along
    which rows lie."""

    flat: str
    mask: str
    high: str = ""
    low: str = ""
    width: int = 0
    axis: int = 1


def address(lies: Layout, place: Place) -> str:
    """Of the elements at a place, in memory that lies so over them."""
    cut = divided(lies, place.width) if place.width else None
    parts = [(lies, place.flat)] if cut is None else zip(cut, (place.high, place.low), strict=True)
    far = sum((size - 1) * stride for size, stride in lies) >= 2**31
    found = [terms(part, f"{at}.to(tl.int64)" if far else at) for part, at in parts]
    return " + ".join([*filter(None, found), f"0 * {place.flat}"])  # which makes it as large as the place


def divided(lies: Layout, width: int) -> tuple[Layout, Layout] | None:
    """Outer and inner dimensions, the inner ones being rows of this width, if they end with dimensions."""
    outer, inner = list(lies), []
    while width > 1:
        size, stride = outer.pop()
        if width % size == 0:
            inner.insert(0, (size, stride))
            width //= size
        elif size % width == 0:
            inner.insert(0, (width, stride))
            outer.append((size // width, stride * width))
            width = 1
        else:
            return None
    return tuple(outer), tuple(inner)


def terms(lies: Layout, at: str) -> str:
    """The sum of indices times strides, for the elements whose places in order are `at`."""
    found, inner = [], 1
    for place, (size, stride) in enumerate(reversed(lies), start=1):
        if stride:
            index = at if inner == 1 else f"({at} // {inner})"
            index = index if place == len(lies) else f"({index} % {size})"
            found.append(index if stride == 1 else f"{index} * {stride}")
        inner *= size
    return " + ".join(found)
