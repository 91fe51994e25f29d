"""Which of the operations that were put off are done by the same programs, and which in the same launch."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor

from zoo.kernels.deferral.addresses import Layout, along_rows, in_order
from zoo.kernels.segments import power_of_two

PROLOGUE = 4096  # numbers of its input that a program of a product makes itself
SOURCES = 3  # tensors from which it makes them, at the most
REPEATED = 6  # steps that are taken again for each reader rather than handed on


@dataclass(eq=False)
class Operand:
    """A tensor that a node reads: its memory, how it lies over the node's elements, and who is still to write it."""

    tensor: Tensor
    lies: Layout
    writers: list["Node"]

    @property
    def source(self) -> "Node | None":
        """The one pending node whose elements these are, in whatever order."""
        one = self.writers[0] if len(self.writers) == 1 else None
        return one if one is not None and one.whole and one.out.dtype == self.tensor.dtype else None

    @property
    def is_whole(self) -> bool:
        """Whether element i is the source's element i."""
        return self.source is not None and self.lies == in_order(self.source.numel)

    @property
    def repeats(self) -> bool:
        """Whether it is made again for this reader: few steps from memory, value by value."""
        return self.source is not None and self.source.steps > 0


@dataclass(eq=False)
class Node:
    """One operation. kind: "value", `text` of its operands' elements {0}, {1}, ...; "sum", "mean" or "amax" along rows of `width`;
    "product" of its operand's rows of `width` with `weight` `[N, width]`, and `bias` `[N]`."""

    kind: str
    operands: list[Operand]
    out: Tensor
    text: str = ""
    width: int = 0
    weight: Tensor | None = None
    bias: Tensor | None = None
    needed: bool = False  # somebody reads it from memory
    inlined: bool = False  # every program of the product makes its operand itself
    lane: "Lane | None" = None

    def __post_init__(self):
        self.numel = self.out.numel()
        self.whole = self.out.is_contiguous() and self.out.untyped_storage().nbytes() == self.numel * self.out.itemsize
        taken = [one.source.steps if one.source else 0 for one in self.operands if one.writers]
        self.steps = 1 + sum(taken) if self.kind == "value" and all(taken) and sum(taken) < REPEATED else 0  # from memory, if few


@dataclass(eq=False)
class Lane:
    """Nodes that the same programs work on, of `count` elements in rows of `width` (0: whatever rows are); columns of products are
    rows too. Lanes of a level are one launch."""

    level: int
    count: int
    width: int = 0
    product: bool = False
    nodes: list[Node] = field(default_factory=list)

    def add(self, node: Node) -> None:
        self.nodes.append(node)
        node.lane = self

    def knows(self, one: Operand, numel: int) -> bool:
        """Whether a program that works on this lane holds the element that belongs to that of a node of so many elements."""
        if one.source is None:
            return False
        rows = 0 if self.product or not self.width else self.count // self.width
        if numel == self.count:
            return one.is_whole or (one.source.numel == rows and one.lies == along_rows(rows, self.width))
        return numel == rows and one.is_whole

    def has(self, one: Operand, node: Node) -> bool:
        """Whether the operand is made in this lane, and at hand for the node."""
        return one.source is not None and one.source.lane is self and self.knows(one, node.numel)

    def absorbs(self, other: "Lane") -> bool:
        """Whether programs of this lane can do the other's work too."""
        if self.level != other.level or self.count != other.count:
            return False
        return not other.width or (self.product == other.product and self.width in (0, other.width))


def launches(nodes: list[Node]) -> list[list[Lane]]:
    """Nodes on lanes, and these in launches. Nodes that are needed are marked."""
    order = {node: place for place, node in enumerate(nodes)}
    lanes: list[Lane] = []
    for node in nodes:
        if node.kind == "value":
            _place_value(node, lanes)
        elif node.kind == "product":
            _place_product(node, lanes)
        else:
            _place_reduction(node, lanes)
    some = [lane for lane in lanes if any(node.needed for node in lane.nodes)]
    for lane in some:
        lane.nodes.sort(key=order.__getitem__)
    levels = sorted({lane.level for lane in some})
    return [[lane for lane in some if lane.level == level] for level in levels]


def _wait(operands: Iterable[Operand]) -> int:
    """The level behind those that write these operands to memory."""
    writers = [writer for one in operands for writer in one.writers]
    for writer in writers:
        writer.needed = True
    return 1 + max((writer.lane.level for writer in writers), default=-1)


def _open(lanes: list[Lane], node: Node, level: int, count: int, **kind) -> None:
    lanes.append(Lane(level, count, **kind))
    lanes[-1].add(node)


def _place_value(node: Node, lanes: list[Lane]) -> None:
    """In a lane that has an operand at hand, if all others are there, or written before, or soon made again; else in its own."""
    pending = [one for one in node.operands if one.writers]
    near = dict.fromkeys(one.source.lane for one in pending if one.source is not None)
    for lane in sorted(near, key=lambda lane: (-lane.level, not lane.product)):
        own = [one for one in pending if lane.has(one, node)]
        guests = [one for one in pending if one not in own and _comes(one, node, lane)]
        before = [one for one in pending if one not in own + guests and not one.repeats]
        if own and all(writer.lane.level < lane.level for one in before for writer in one.writers):
            for guest in {one.source.lane for one in guests} - {lane}:
                lane.width = lane.width or guest.width
                lanes.remove(guest)
                for moved in guest.nodes:
                    lane.add(moved)
            _wait(before)
            lane.add(node)
            return
    _open(lanes, node, _wait(one for one in pending if not one.repeats), node.numel)


def _comes(one: Operand, node: Node, lane: Lane) -> bool:
    """Whether another lane, which makes this operand, can become a part of this one, which then has it at hand."""
    other = one.source.lane if one.source is not None else lane
    return other is not lane and lane.absorbs(other) and lane.knows(one, node.numel)


def _place_reduction(node: Node, lanes: list[Lane]) -> None:
    """In the lane that makes its rows, if they are whole rows of it."""
    (one,) = node.operands
    lane = one.source.lane if one.is_whole else None
    if lane is not None and not lane.product and lane.width in (0, node.width) and lane.count == node.numel * node.width:
        lane.width = node.width
        lane.add(node)
    else:
        _open(lanes, node, _wait([] if one.repeats else [one]), node.numel * node.width, width=node.width)


def _place_product(node: Node, lanes: list[Lane]) -> None:
    (one,), columns = node.operands, node.weight.shape[0]
    node.inlined = _makes_itself(node)
    level = one.source.lane.level if node.inlined else _wait([one])
    _open(lanes, node, level, node.numel, width=columns, product=True)


def _makes_itself(node: Node) -> bool:
    """Whether each program of a product makes x anew rather than wait for it: where x is small and comes from few tensors."""
    (one,) = node.operands
    if not one.is_whole:
        return False
    lane = one.source.lane
    if lane.product or lane.width not in (0, node.width) or one.source.numel != lane.count:
        return False
    rows = one.source.numel // node.width
    if power_of_two(rows) * power_of_two(node.width) > PROLOGUE:
        return False
    made = chain(one.source)
    return len({one.tensor.data_ptr() for part in made for one in part.operands if one.source not in made}) <= SOURCES


def chain(node: Node) -> list[Node]:
    """What a node is made of within its lane, the first first, and itself."""
    found: dict[Node, None] = {}

    def visit(part: Node) -> None:
        for one in part.operands:
            if node.lane.has(one, part) and one.source not in found:
                visit(one.source)
        found[part] = None

    visit(node)
    return list(found)
