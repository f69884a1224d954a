"""Reads optimised HLO text: computations, their instructions, and how large each result is."""

from __future__ import annotations

import dataclasses
import math
import re

SIZES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "f32": 4, "s32": 4}
SIZES |= {"u32": 4, "f64": 8, "s64": 8, "u64": 8, "token": 0}
SIZES |= {"f8e4m3fn": 1, "f8e5m2": 1, "f8e4m3": 1, "s4": 1, "u4": 1}

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\((.*)$")
_ARRAY = re.compile(r"\b([a-z]+[0-9]*(?:e[0-9]m[0-9][a-z]*)?)\[([0-9,]*)\](?:\{([^}]*)\})?")
_SPACE = re.compile(r"S\((\d+)\)")
_CALLED = re.compile(
    r"\b(?:body|condition|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of a result.

    Attributes:
      dtype: as HLO writes it, such as `bf16`.
      dims: its shape.
      space: number of the memory that it lies in; 0 is the device's large one.
    """

    dtype: str
    dims: tuple[int, ...]
    space: int = 0

    @property
    def size(self) -> int:
        """Numbers in it."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """Bytes of the numbers, without the padding of a layout in tiles."""
        return self.size * SIZES.get(self.dtype, 8)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      name: of the result.
      op: what is done, such as `fusion`.
      arrays: the result; of a tuple all arrays in it, in order.
      operands: names of the results that it takes.
      called: names of the computations that it runs.
      root: whether it is the computation's result.
      line: the text.
    """

    name: str
    op: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    called: tuple[str, ...]
    root: bool
    line: str

    @property
    def bytes(self) -> int:
        """Of the whole result."""
        return sum(array.bytes for array in self.arrays)

    @property
    def size(self) -> int:
        """Numbers in the whole result."""
        return sum(array.size for array in self.arrays)

    def attribute(self, pattern: str) -> str | None:
        """What the first group of a pattern finds in the line."""
        found = re.search(pattern, self.line)
        return None if found is None else found[1]


@dataclasses.dataclass(frozen=True)
class Module:
    """A program.

    Attributes:
      computations: by name; instructions in the order of the text, which is that of execution.
      entry: the name of the one that is run; None in a piece of a program.
    """

    computations: dict[str, list[Instruction]]
    entry: str | None


def parse(text: str) -> Module:
    """A module from its text."""
    found: dict[str, list[Instruction]] = {}
    current: list[Instruction] = []
    entry = None
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            current = found.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif part := _INSTRUCTION.match(line):
            current.append(_instruction(line, *part.groups()))
    return Module(found, entry)


def _instruction(
    line: str, root: str | None, name: str, shape: str, op: str, rest: str
) -> Instruction:
    called = _CALLED.findall(rest)
    for branches in _BRANCHES.findall(rest):
        called += [one.strip().lstrip("%") for one in branches.split(",")]
    return Instruction(
        name=name,
        op=op,
        arrays=tuple(_array(*found) for found in _ARRAY.findall(shape)),
        operands=tuple(re.findall(r"%([\w.\-]+)", rest.split(")")[0])),
        called=tuple(called),
        root=bool(root),
        line=line.strip(),
    )


def _array(dtype: str, dims: str, layout: str) -> Array:
    space = _SPACE.search(layout)
    shape = tuple(int(d) for d in dims.split(",") if d)
    return Array(dtype, shape, int(space[1]) if space else 0)
