"""Read the machine code of one kernel (SASS, as nvdisasm prints it): instructions, loops, what a loop's step holds."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

# large matrix products, by the unit that does them: a warp, a warpgroup, the tcgen05 unit
TENSOR_CORE = re.compile(r"^(HMMA|HGMMA|UTCHMMA|IMMA|IGMMA|QMMA|QGMMA|UTC[A-Z]*MMA|OMMA|BMMA)\b")
# a label, or: /*0040*/  @!P0 LDL.64 R2, [R1] ;
_LINE = re.compile(
    r"^(?:(?P<label>\.L\w+):|\s*/\*[0-9a-f]{4,}\*/\s+(?P<guard>@!?U?P\w+\s+)?(?P<opcode>[A-Z][\w.]*)(?P<rest>[^;\n]*))",
    re.MULTILINE,
)
_TARGET = re.compile(r"`\((\.L\w+)\)")
_ENDS = ("BRA", "EXIT", "RET", "BRX", "JMP", "JMX", "BREAK", "BRXU")  # may leave the block they stand in
_SHAPE = re.compile(r"^(?:HGMMA\.(\d+x\d+x\d+)|HMMA\.(\d+))")
# kinds of instructions that a step of a loop is made of, the first that matches; matrix products are apart
_KINDS = {
    "EX2": re.compile(r"^MUFU\.EX2\b"),
    "MUFU": re.compile(r"^MUFU\b"),
    "FMA": re.compile(r"^F(FMA|MUL)"),
    "ADD/MAX": re.compile(r"^F(ADD|MNMX)"),
    "LDGSTS": re.compile(r"^LDGSTS\b"),
    "TMA": re.compile(r"^(UTMALDG|UBLKCP)\b"),
    "BAR": re.compile(r"^BAR\b"),
    "WARPGROUP": re.compile(r"^WARPGROUP\.(ARRIVE|DEPBAR)\b"),
}


@dataclass(frozen=True)
class Instruction:
    """One instruction: its opcode with all suffixes, and its operands as text."""

    opcode: str
    operands: str = ""

    @property
    def is_product(self) -> bool:
        """True of a tensor-core product."""
        return bool(TENSOR_CORE.match(self.opcode))

    @property
    def shape(self) -> str:
        """Name of a product with its shape, "HGMMA.64x128x16" or "HMMA.16816"; the family alone without a shape."""
        found = _SHAPE.match(self.opcode)
        return found[0] if found else self.opcode.split(".")[0]

    @property
    def kind(self) -> str | None:
        """Kind of an instruction that the record counts, else None."""
        return next((name for name, pattern in _KINDS.items() if pattern.match(self.opcode)), None)


@dataclass
class Block:
    """A run of instructions that is entered at its start and left at its end, with the numbers of its successors."""

    instructions: list[Instruction] = field(default_factory=list)
    next: list[int] = field(default_factory=list)

    @property
    def has_chain(self) -> bool:
        """True if two products in a row work on the same accumulator."""
        targets = [i.operands.split(",")[0].strip() for i in self.instructions if i.is_product]
        return any(a == b for a, b in zip(targets, targets[1:], strict=False))


@dataclass(frozen=True)
class Loop:
    """One step of a loop: the instructions that every warp issues on the shortest way around it with all products.

    What a branch may skip is left out: a mask that few steps need, a second try to pass a barrier.
    """

    instructions: tuple[Instruction, ...]

    @property
    def products(self) -> dict[str, int]:
        """Number of tensor-core products by shape."""
        return dict(Counter(i.shape for i in self.instructions if i.is_product))

    @property
    def mix(self) -> dict[str, int]:
        """Numbers of all instructions, of products by shape, and of the other kinds that occur."""
        kinds = Counter(i.kind for i in self.instructions if i.kind)
        return {"all": len(self.instructions)} | self.products | {name: kinds[name] for name in _KINDS if kinds[name]}


def blocks(sass: str) -> list[Block]:
    """Return the basic blocks of a disassembly, the entry first."""
    found: list[Block] = [Block()]
    labels: dict[str, int] = {}
    jumps: list[tuple[int, str]] = []
    for line in _LINE.finditer(sass):
        if line["label"]:
            _begin(found)
            labels[line["label"]] = len(found) - 1
            continue
        opcode = line["opcode"]
        found[-1].instructions.append(Instruction(opcode, line["rest"].strip()))
        if opcode.split(".")[0] not in _ENDS:
            continue
        here = len(found) - 1
        jumps += [(here, label) for label in _TARGET.findall(line["rest"])]
        # a branch may depend on a predicate in front of it, or among its operands: BRA.U UP0, or BRA P0
        conditional = line["guard"] or re.match(r"^\s*!?U?P\d", line["rest"])
        found.append(Block())
        if conditional:
            found[here].next.append(here + 1)
    for here, label in jumps:
        if label in labels:  # a call's target may lie in another section
            found[here].next.append(labels[label])
    return found


def _begin(found: list[Block]) -> None:
    """Begin a block at a label: the block before falls through into it."""
    if found[-1].instructions:
        found[-1].next.append(len(found))
        found.append(Block())


def _dominators(found: list[Block]) -> list[set[int]]:
    """Return for each block those that every path to it passes, itself among them; empty for unreachable blocks."""
    before: list[list[int]] = [[] for _ in found]
    for here, block in enumerate(found):
        for after in block.next:
            if after < len(found):
                before[after].append(here)
    reached, todo = {0}, [0]
    while todo:
        for after in found[todo.pop()].next:
            if after < len(found) and after not in reached:
                reached.add(after)
                todo.append(after)
    result = [set(reached) if here in reached else set() for here in range(len(found))]
    result[0] = {0}
    changed = True
    while changed:
        changed = False
        for here in sorted(reached - {0}):
            now = set.intersection(*(result[b] for b in before[here] if b in reached)) | {here}
            changed |= now != result[here]
            result[here] = now
    return result


def _steps(found: list[Block]) -> Iterator[tuple[frozenset[int], tuple[Instruction, ...]]]:
    """Yield the blocks of every natural loop and the instructions of a step. Loops with the same header are one."""
    dominators = _dominators(found)
    before: Mapping[int, list[int]] = {
        here: [b for b, block in enumerate(found) if here in block.next and dominators[b]] for here in range(len(found))
    }
    headers: dict[int, set[int]] = {}
    for here, block in enumerate(found):
        for header in block.next:
            if header not in dominators[here]:
                continue
            body, todo = headers.setdefault(header, {header}), [here]
            while todo:
                inside = todo.pop()
                if inside not in body:
                    body.add(inside)
                    todo += before[inside]
    for header, body in headers.items():
        forward = {here: [b for b in found[here].next if b in body and b not in dominators[here]] for here in body}
        latches = {here for here in body if header in found[here].next}
        way = _shortest_way(found, forward, header, latches)
        everything = tuple(i for here in sorted(body) for i in found[here].instructions)
        step = tuple(i for here in sorted(way) for i in found[here].instructions)
        complete = sum(i.is_product for i in step) == sum(i.is_product for i in everything)
        yield frozenset(body), step if complete else everything


def _shortest_way(found: list[Block], forward: Mapping[int, list[int]], header: int, latches: set[int]) -> list[int]:
    """Return the blocks from the header to a latch with the most products and, of such ways, the fewest instructions.

    forward: the edges of the loop without those that go back.
    """
    after: list[int] = []  # blocks behind all blocks that they lead to
    entered: set[int] = set()
    todo = [(header, False)]
    while todo:
        here, left = todo.pop()
        if left:
            after.append(here)
        elif here not in entered:
            entered.add(here)
            todo += [(here, True), *((b, False) for b in forward[here])]
    best: dict[int, tuple[int, int, list[int]]] = {}  # products, minus instructions, the way from here on
    for here in after:
        ways = [best[b] for b in forward[here] if b in best] + ([(0, 0, [])] if here in latches else [])
        if ways:
            products, size, way = max(ways)
            own = found[here].instructions
            best[here] = (products + sum(i.is_product for i in own), size - len(own), [here, *way])
    return best[header][2] if header in best else []


def product_loops(found: list[Block]) -> list[Loop]:
    """Return a step of every loop with products, of nested ones only of the innermost."""
    loops = {body: Loop(step) for body, step in _steps(found)}
    with_products = {body: loop for body, loop in loops.items() if loop.products}
    return [loop for body, loop in with_products.items() if not any(other < body for other in with_products)]


def main_loop(loops: Sequence[Loop]) -> Loop | None:
    """Return the loop that holds the most products, None without loops.

    Of loops with the same products the shortest wins: the same step without masks.
    """
    return max(loops, key=lambda loop: (sum(loop.products.values()), -len(loop.instructions)), default=None)
