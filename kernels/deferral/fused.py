"""Kernels for what a `Deferral` has put off: one a launch, written in Triton for the lanes of one level.

Programs of a lane of values hold some rows whole; those of a lane of products hold some columns of all rows, for which they read as
many rows of each matrix. All sizes are written into the kernel: a step of another batch size is another recording anyway.

Floor: what the lanes read and write, which in a decode step is the matrices.
"""

import linecache
from functools import cache
from itertools import count

import torch
import triton
from torch import Tensor
from triton import language as tl

from zoo.kernels.deferral.addresses import Place, address, layout
from zoo.kernels.deferral.fused_numbers import expm1, gelu_none, gelu_tanh, largest, products, tanh
from zoo.kernels.deferral.plan import Lane, Node, Operand, chain
from zoo.kernels.fused import log1p, sigmoid, softplus
from zoo.kernels.launch import launch
from zoo.kernels.segments import cdiv, power_of_two

TYPES = {torch.float32: "tl.float32", torch.bfloat16: "tl.bfloat16", torch.float16: "tl.float16", torch.bool: "tl.int1"}
NUMBERS = 512  # of each value that a program of short rows holds
TILE = 8192  # numbers that a program multiplies at once where it makes its input itself
COLUMNS = 4  # of a product, for which it then makes it
TALLEST = 8  # rows of a product
DEEPEST = 2048  # channels that a program multiplies at once
LONG = 4096  # numbers of a row that twice as many warps hold


class Writer:
    """The source of a kernel, and the tensors that it takes."""

    def __init__(self):
        self.lines: list[str] = []
        self.tensors: dict[tuple, tuple[str, Tensor]] = {}
        self.programs = self.count = 0
        self.warps = 4

    def add(self, lane: Lane) -> None:
        """A lane's programs, behind those of the lanes before."""
        made = {part: None for node in lane.nodes if node.needed for part in chain(node)}
        nodes = [node for node in lane.nodes if node in made]
        start, self.lines = len(self.lines), [*self.lines, ""]
        programs = self.columns(lane, nodes) if any(node.kind == "product" for node in nodes) else self.rows(lane, nodes)
        self.lines[start] = f"    if (program >= {self.programs}) & (program < {self.programs + programs}):"
        self.programs += programs

    def line(self, text: str) -> None:
        self.lines.append(f"        {text}")

    def name(self, text: str) -> str:
        """A variable with this value."""
        self.count += 1
        self.line(f"v{self.count} = {text}")
        return f"v{self.count}"

    def tensor(self, x: Tensor) -> str:
        key = x.data_ptr(), x.dtype
        return self.tensors.setdefault(key, (f"T{len(self.tensors)}", x))[0]

    # -- lanes ---------------------------------------------------------------------------------------------------------

    def rows(self, lane: Lane, nodes: list[Node]) -> int:
        """Programs that hold rows of values, or elements in no rows."""
        width = lane.width or lane.count
        count, block = lane.count // width, min(power_of_two(width), 1 << 30 if lane.width else NUMBERS)
        height = 1 if not lane.width else min(power_of_two(count), max(1, NUMBERS // block))
        self.warps = max(self.warps, 8 if block >= LONG else 4)
        first = self.name(f"program - {self.programs}")
        if not lane.width:
            flat = self.name(f"{first} * {block} + tl.arange(0, {block})[None, :]")
            self.values(lane, nodes, Place(flat, self.name(f"{flat} < {width}")), None)
            return cdiv(width, block)
        r, c = self.name(f"{first} * {height} + tl.arange(0, {height})[:, None]"), self.name(f"tl.arange(0, {block})[None, :]")
        inside = self.name(f"{r} < {count}")
        whole = Place(self.name(f"{r} * {width} + {c}"), self.name(f"{inside} & ({c} < {width})"), r, c, width)
        self.values(lane, nodes, whole, Place(r, inside))
        return cdiv(count, height)

    def columns(self, lane: Lane, nodes: list[Node]) -> int:
        """Programs that hold all rows of some columns of products."""
        width, count = lane.width, lane.count // lane.width
        mine = [node for node in nodes if node.kind == "product"]
        height = power_of_two(count)
        columns = min(breadth(node, height, len(mine)) for node in mine)
        m, n = self.name(f"tl.arange(0, {height})"), self.name(f"(program - {self.programs}) * {columns} + tl.arange(0, {columns})")
        place = Place(
            self.name(f"{m}[:, None] * {width} + {n}[None, :]"), self.name(f"({m} < {count})[:, None] & ({n} < {width})[None, :]"),
            f"{m}[:, None]", f"{n}[None, :]", width,
        )  # fmt: skip
        known = self.products(mine, m, n, place, (height, columns, count))
        self.values(lane, nodes, place, None, known)
        return cdiv(width, columns)

    def products(self, nodes: list[Node], m: str, n: str, place: Place, sizes: tuple[int, int, int]) -> dict[Node, str]:
        """The sums, without what follows them. Matrices are asked for before the rows that meet them are made."""
        height, columns, count = sizes
        row = f"{n} < {place.width}"
        matrices = {node: self.matrix(node, n, row) for node in nodes if node.inlined}
        known, made = {}, {}
        for node in nodes:
            (one,) = node.operands
            if node.inlined:
                d, weight = matrices[node]
                if one.source not in made:
                    made[one.source] = self.input(one.source, m, d, count, node.width)
                total = f"tl.sum({made[one.source]} * {weight}.to(tl.float32), 2)"
            else:
                x, weight = self.tensor(one.tensor), self.tensor(node.weight)
                strides = f"{one.tensor.stride(0)}, {node.weight.stride(0)}, {node.width}"
                block = depth(node, height)
                total = f"products({x}, {weight}, {strides}, {m}, {n}.to(tl.int64), {m} < {count}, {row}, {height}, {columns}, {block})"
            if node.bias is not None:
                total += f" + tl.load({self.tensor(node.bias)} + {n}, mask={row}, other=0.0).to(tl.float32)[None, :]"
            known[node] = self.rounded(self.name(total), node)
        return known

    def matrix(self, node: Node, n: str, row: str) -> tuple[str, str]:
        """All channels, and rows n of what a product multiplies with."""
        d = self.name(f"tl.arange(0, {power_of_two(node.width)})")
        start = f"{self.tensor(node.weight)} + {n}.to(tl.int64)[:, None] * {node.weight.stride(0)}"
        return d, self.name(f"tl.load({start} + {d}[None, :], mask=({row})[:, None] & ({d} < {node.width})[None, :], other=0.0)")

    def input(self, source: Node, m: str, d: str, count: int, width: int) -> str:
        """What a product multiplies, made of what it comes from."""
        m = self.name(f"{m}[:, None, None]")
        inside = self.name(f"{m} < {count}")
        place = Place(self.name(f"{m} * {width} + {d}"), self.name(f"{inside} & ({d} < {width})"), m, d, width, axis=2)
        known = self.values(source.lane, chain(source), place, Place(m, inside), store=False)
        return self.name(f"tl.where({place.mask}, {known[source]}, 0.0)")

    # -- nodes ---------------------------------------------------------------------------------------------------------

    def values(
        self, lane: Lane, nodes: list[Node], place: Place, rows: Place | None, known: dict | None = None, store: bool = True
    ) -> dict:
        """All nodes of a lane but products, and what is needed of them in memory."""
        known = known or {}
        for node in nodes:
            at = place if node.numel == lane.count or rows is None else rows
            if node.kind == "value":
                known[node] = self.expression(node, [self.operand(one, node, lane, at, known) for one in node.operands])
            elif node.kind != "product":
                (one,) = node.operands
                x = self.operand(one, node, lane, place, known)
                known[node] = self.rounded(self.name(reduced(node, x, place)), node)
            if node.needed and store:
                where = address(layout(node.out, node.out.shape), at)
                self.line(f"tl.store({self.tensor(node.out)} + {where}, {known[node]}.to({TYPES[node.out.dtype]}), mask={at.mask})")
        return known

    def operand(self, one: Operand, node: Node, lane: Lane | None, place: Place, known: dict[Node, str]) -> str:
        """From where it is at hand, or made again of what it comes from, or loaded."""
        if lane is not None and lane.has(one, node):
            return known[one.source]
        if one.repeats:
            at = Place(self.name(f"{address(one.lies, place)} + {one.tensor.storage_offset()}"), place.mask)
            return self.expression(one.source, [self.operand(inner, one.source, None, at, known) for inner in one.source.operands])
        load = self.name(f"tl.load({self.tensor(one.tensor)} + {address(one.lies, place)}, mask={place.mask}, other=0)")
        return load if one.tensor.dtype == torch.bool else self.name(f"{load}.to(tl.float32)")

    def expression(self, node: Node, operands: list[str]) -> str:
        return self.rounded(self.name(node.text.format(*operands)), node)

    def rounded(self, name: str, node: Node) -> str:
        """As memory would have kept it."""
        dtype = node.out.dtype
        return name if dtype in (torch.float32, torch.bool) else self.name(f"{name}.to({TYPES[dtype]}).to(tl.float32)")


def reduced(node: Node, x: str, place: Place) -> str:
    if node.kind == "amax":
        return f"largest({x}, {place.mask}, {place.axis})"
    total = f"tl.sum(tl.where({place.mask}, {x}, 0.0), {place.axis}, keep_dims=True)"
    return total if node.kind == "sum" else f"{total} / {float(node.width)}"


def breadth(node: Node, height: int, together: int) -> int:
    """Columns of a product that a program takes."""
    if node.inlined:
        return max(1, min(COLUMNS, TILE // (height * power_of_two(node.width) * power_of_two(together))))
    if node.width <= DEEPEST // (2 if height > 2 else 1):
        return min(16, DEEPEST // (2 if height > 2 else 1) // power_of_two(node.width))
    return 1 if node.width <= DEEPEST or height == TALLEST else 2


def depth(node: Node, height: int) -> int:
    """Channels of it that a program multiplies at once."""
    return min(power_of_two(node.width), DEEPEST // 2 if height > 2 or (node.width > DEEPEST and node.width % DEEPEST) else DEEPEST)


HELPERS = {
    "tl": tl, "products": products, "sigmoid": sigmoid, "softplus": softplus, "expm1": expm1, "log1p": log1p, "tanh": tanh,
    "gelu_none": gelu_none, "gelu_tanh": gelu_tanh, "largest": largest,
}  # fmt: skip
_files = count()


@cache
def compiled(name: str, text: str):
    """The kernel of this source, which Triton looks up as that of a file."""
    file = f"<deferred {next(_files)}>"
    linecache.cache[file] = len(text), None, text.splitlines(keepends=True), file
    space = dict(HELPERS)
    exec(compile(text, file, "exec"), space)
    return triton.jit(space[name])


def run(levels: list[list[Lane]]) -> None:
    """One launch a level, by the name of its products."""
    for lanes in levels:
        writer = Writer()
        for lane in lanes:
            writer.add(lane)
        matrices = [node.weight.shape for lane in lanes for node in lane.nodes if node.kind == "product"]
        name = "_".join(["deferred", *(f"{columns}x{width}" for columns, width in matrices)])
        names, tensors = zip(*writer.tensors.values(), strict=True)
        text = "\n".join([f"def {name}({', '.join(names)}):", "    program = tl.program_id(0)", *writer.lines, ""])
        launch(compiled(name, text), writer.programs, *tensors, num_warps=writer.warps)
