"""The contract of shapes, dtypes and devices, stated once and refused in words."""

from functools import lru_cache

import torch
from torch import Tensor


@lru_cache
def _letters(layout: str) -> tuple[str, ...]:
    return tuple(layout.split())


def letters_of(layout: str) -> tuple[str, ...]:
    """What a layout names; remembered, except by the compiler, which warns of memories."""
    return tuple(layout.split()) if torch.compiler.is_compiling() else _letters(layout)


class Shapes:
    """Binds the letters of layouts such as `"B T H K"` to sizes, tensor after tensor.

    >>> shapes = Shapes("linear_attention")
    >>> shapes("q", q, "B T H K")
    >>> shapes("log_decay", log_decay, "H", "B T H", "B T H K")   # any of several layouts, None is skipped
    """

    def __init__(self, op: str, **sizes: int):
        self.op = op
        self.sizes = sizes
        self.device: torch.device | None = None

    def __getitem__(self, letter: str) -> int:
        return self.sizes[letter]

    def __call__(self, name: str, tensor: Tensor | None, *layouts: str, dtype: torch.dtype | None = None) -> None:
        if tensor is None:
            return
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{self.op}: {name} must be a tensor, got {type(tensor).__name__}")
        shape = tensor.shape
        for layout in layouts:
            letters = letters_of(layout)
            if len(letters) == len(shape) and self._fits(shape, letters):
                break
        else:
            wanted = " or ".join(self._describe(layout) for layout in layouts)
            raise ValueError(f"{self.op}: {name} is {list(shape)}, expected {wanted}")
        if dtype is not None and tensor.dtype != dtype:
            raise ValueError(f"{self.op}: {name} is {tensor.dtype}, expected {dtype}")
        if self.device is None:
            self.device = tensor.device
        elif tensor.device != self.device:
            raise ValueError(f"{self.op}: {name} is on {tensor.device}, the other arguments on {self.device}")
        for letter, size in zip(letters, shape, strict=True):
            self.sizes.setdefault(letter, size)

    def _fits(self, shape: torch.Size, letters: tuple[str, ...]) -> bool:
        for size, x in zip(shape, letters, strict=True):
            want = self.sizes.get(x)
            if want is None:
                want = int(x) if x.isdigit() else size
            if size != want:
                return False
        return True

    def _describe(self, layout: str) -> str:
        known = " ".join(f"{x}={self.sizes[x]}" if x in self.sizes else x for x in layout.split())
        return f"[{known}]"

    def divides(self, small: str, large: str, name: str) -> None:
        """Raise unless the number of groups `small` divides the number of heads `large`."""
        if self[large] % self[small]:
            raise ValueError(f"{self.op}: {name} has {self[small]} heads, which does not divide the {self[large]} heads")

    def not_empty(self, *letters: str) -> None:
        """Raise if one of the named dimensions is zero."""
        for letter in letters:
            if self[letter] == 0:
                raise ValueError(f"{self.op}: dimension {letter} is empty; there is nothing to compute")


def float_dtype(op: str, **tensors: Tensor) -> torch.dtype:
    """The one floating (or complex) dtype of these tensors; raises, naming the odd one, if they differ."""
    (first, tensor), *rest = tensors.items()
    dtype = tensor.dtype
    if not (dtype.is_floating_point or dtype.is_complex):
        raise ValueError(f"{op}: {first} is {dtype}, expected a floating dtype")
    for name, other in rest:
        if other.dtype != dtype:
            raise ValueError(f"{op}: {name} is {other.dtype} but {first} is {dtype}; cast one of them")
    return dtype


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Dtype of states and sums: float64 stays, everything narrower is float32."""
    return torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32
