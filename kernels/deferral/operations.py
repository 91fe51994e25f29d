"""What is put off: how kernels write each of torch's operations for one element, given those of its operands and its numbers."""

import math
from collections.abc import Callable

from torch import Tensor


def number(x: float) -> str:
    """As kernels write it."""
    return repr(float(x)) if math.isfinite(x) else f'float("{x}")'


def comparison(sign: str) -> Callable:
    return lambda a, b: f"({a} {sign} {b})"


def larger(a: str, b: str) -> str:
    return f"tl.maximum({a}, {b}, propagate_nan=tl.PropagateNan.ALL)"


def smaller(a: str, b: str) -> str:
    return f"tl.minimum({a}, {b}, propagate_nan=tl.PropagateNan.ALL)"


def clamped(x: str, low: str | None = None, high: str | None = None) -> str:
    x = x if low is None else larger(x, low)
    return x if high is None else smaller(x, high)


def power(x: str, exponent: str) -> str | None:
    return {"2.0": f"({x} * {x})", "0.5": f"tl.sqrt({x})", "-0.5": f"tl.rsqrt({x})", "3.0": f"({x} * {x} * {x})"}.get(exponent)


def mixed(a: str, b: str, share: str) -> str:
    """From the nearer of both ends, as torch has it."""
    return f"tl.where(({share} < 0.5) & ({share} > -0.5), {a} + {share} * ({b} - {a}), {b} - ({b} - {a}) * (1.0 - {share}))"


# By torch's names. None: not with these arguments.
VALUES: dict[str, Callable[..., str | None]] = {
    "add": lambda a, b, alpha="1.0": f"({a} + {b})" if alpha == "1.0" else f"({a} + {alpha} * {b})",
    "sub": lambda a, b, alpha="1.0": f"({a} - {b})" if alpha == "1.0" else f"({a} - {alpha} * {b})",
    "rsub": lambda a, b, alpha="1.0": f"({b} - {a})" if alpha == "1.0" else f"({b} - {alpha} * {a})",
    "mul": lambda a, b: f"({a} * {b})",
    "div": lambda a, b: f"({a} / {b})",
    "neg": lambda a: f"(-{a})",
    "abs": lambda a: f"tl.abs({a})",
    "exp": lambda a: f"tl.exp({a})",
    "expm1": lambda a: f"expm1({a})",
    "log": lambda a: f"tl.log({a})",
    "log1p": lambda a: f"log1p({a})",
    "sqrt": lambda a: f"tl.sqrt({a})",
    "rsqrt": lambda a: f"tl.rsqrt({a})",
    "reciprocal": lambda a: f"(1.0 / {a})",
    "sin": lambda a: f"tl.sin({a})",
    "cos": lambda a: f"tl.cos({a})",
    "pow": power,
    "sigmoid": lambda a: f"sigmoid({a})",
    "silu": lambda a: f"({a} * sigmoid({a}))",
    "tanh": lambda a: f"tanh({a})",
    "relu": lambda a: larger(a, "0.0"),
    "gelu": lambda a, approximate="none": f"gelu_{approximate}({a})",
    "softplus": lambda a, beta="1.0", threshold="20.0": f"softplus({a})" if (beta, threshold) == ("1.0", "20.0") else None,
    "log_sigmoid_forward": lambda a: f"(-softplus(-{a}))",
    "maximum": larger,
    "minimum": smaller,
    "clamp": clamped,
    "clamp_min": larger,
    "clamp_max": smaller,
    "where": lambda c, a, b: f"tl.where({c}, {a}, {b})",
    "addcmul": lambda a, b, c, value="1.0": f"({a} + {b} * {c})" if value == "1.0" else f"({a} + {value} * {b} * {c})",
    "lerp": mixed,
    "eq": comparison("=="), "ne": comparison("!="), "lt": comparison("<"), "le": comparison("<="), "gt": comparison(">"),
    "ge": comparison(">="),
    "_to_copy": lambda a: a,
    "clone": lambda a: a,
}  # fmt: skip
REDUCTIONS = {"sum", "mean", "amax"}
IGNORED = ("memory_format", "layout", "non_blocking", "pin_memory", "device", "dtype")  # what the result's dtype and place say already


def expression(name: str, args: tuple, kwargs: dict) -> str | None:
    """Of an element of the result, where {0}, {1}, ... stand for those of the tensors among the arguments, in their order."""
    places = iter(range(len(args) + len(kwargs)))

    def word(x):
        if isinstance(x, Tensor):
            return f"{{{next(places)}}}"
        return number(x) if isinstance(x, int | float) else x

    words = [word(x) for x in args]
    return VALUES[name](*words, **{key: word(x) for key, x in kwargs.items() if key not in IGNORED})
