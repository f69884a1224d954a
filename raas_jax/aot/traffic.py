"""What a compiled program reads from and writes to the device's memory, and what it launches.

Read from the optimised HLO text, instruction by instruction: loops count as often as they run, a
fusion reads what its results ask for (`raas_jax.aot.demand`), an update in place writes the part
that is new, and a kernel of ours reads what it declares (`cost_estimate`, or its scope).
All are estimates by a reading of the program. What it takes for granted:

- Every result goes to memory and every operand comes from there. Caches are not modelled: what is
  written and read again at once may stay in a GPU's L2, and then the true figure is smaller; a
  product whose blocks read an operand more than once without finding it there moves more.
- On a TPU what lies in VMEM (memory space 1) or in scalar memory costs nothing; a copy to it is one
  read. Padding of layouts in tiles is not counted.
- A kernel that declares nothing reads its operands once; of one that a loop of L passes brings in
  from outside with L in front, one L-th in each pass, for such a stack is read by the layer's
  number; so it is with one that has another number of layers in front, where these are given, in
  the loop over tokens or within it. What it writes into the memory of an operand counts only where
  it is declared.
- Of the branches of a condition the one that moves most is taken, or the one that moves least
  (`Traffic.least`); of a loop whose passes are not known, one pass.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from raas_jax.aot.demand import behind, ends, read_of_operands, runs_inside, updates
from raas_jax.aot.hlo import Array, Instruction, Module, parse

ON_TPU = frozenset({0})
"""Memory spaces that are the device's large memory; others are on the chip, or the host's."""
ON_GPU = frozenset({0, 1})

_FREE = {
    "parameter", "get-tuple-element", "tuple", "bitcast", "constant", "after-all", "opt-barrier",
    "partition-id", "replica-id", "async-update", "add-dependency",
}  # fmt: skip
_FREE_CALLS = {
    "AllocateBuffer", "AssumeGatherIndicesInBound", "ConcatBitcast", "Sharding",
    "SPMDFullToShardShape", "SPMDShardToFullShape",
}  # fmt: skip
# Nothing but these, and the arithmetic of indices, makes a copy.
_MOVES = {
    "parameter", "constant", "bitcast", "reshape", "transpose", "copy", "slice", "dynamic-slice",
    "tuple", "get-tuple-element", "convert", "copy-start", "copy-done", "slice-start", "slice-done",
}  # fmt: skip
_COLLECTIVES = {
    "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute",
}  # fmt: skip
_UPDATE = ["dynamic-update-slice"]
_TARGET = r'custom_call_target="([^"]*)"'
_DECLARED = r'"bytes_accessed":"?(\d+)'
_SAID = r"reads_(\d+)_bytes"  # By kernels for GPUs: `pallas_kernels.hopper.says_it_reads`.
_AROUND = re.compile(rf"while|body|closed_call|cond|branch_\d+_fun|jit\(.*\)|{_SAID}")


@dataclasses.dataclass(frozen=True)
class Moved:
    """What one instruction moves each time that it is run.

    Attributes:
      name: the instruction's.
      op: what it is; of a custom call, its target.
      what: the place in the Python program that it comes from, as far as XLA kept it.
      sources: the program's arguments that what it reads belongs to, directly or as a copy, and the
        bytes of each, most first; '' is what is none's, such as activations.
      writes: bytes.
      copies: whether it does nothing but move numbers, at most converting them.
      calls: whether it is a kernel or a call of a library.
      scalar: whether it gives one number and is no fusion, kernel or library call.
      loops: the loops round it, outermost first: the name of each and how often it runs.
    """

    name: str
    op: str
    what: str
    sources: tuple[tuple[str, float], ...]
    writes: float
    copies: bool
    calls: bool
    scalar: bool
    loops: tuple[tuple[str, int], ...]

    @property
    def reads(self) -> float:
        """Bytes."""
        return sum(size for _, size in self.sources)

    @property
    def of(self) -> str:
        """The argument that most of what it reads belongs to, and how many more; '' if none."""
        if not self.sources:
            return ""
        largest, size = self.sources[0]
        more = sum(bool(name) and 10 * other > size for name, other in self.sources[1:])
        return f"{largest} +{more}" if largest and more else largest

    @property
    def bytes(self) -> float:
        """Read and written."""
        return self.reads + self.writes

    @property
    def collective(self) -> str:
        """The kind of collective that it is; '' if none."""
        kind = self.op.removesuffix("-start")
        return kind if kind in _COLLECTIVES else ""

    @property
    def times(self) -> int:
        """How often it is run."""
        product = 1
        for _, times in self.loops:
            product *= times
        return product


@dataclasses.dataclass(frozen=True)
class Account:
    """What a program moves.

    Attributes:
      moved: by each instruction that is run, of conditions the branch that moves most.
      least: the same, of conditions the branch that moves least.
      unknown: loops whose number of passes the program does not tell, taken to be one.
      conditions: the loops round each condition, on which a GPU's host may have to wait.
    """

    moved: tuple[Moved, ...]
    least: tuple[Moved, ...]
    unknown: tuple[str, ...]
    conditions: tuple[tuple[tuple[str, int], ...], ...]


def account(text: str, memory: Collection[int] = ON_TPU, layers: Collection[int] = ()) -> Account:
    """Accounts for a program.

    Args:
      text: optimised HLO, scheduled, as `compiled.as_text()` gives it.
      memory: memory spaces that count; `ON_TPU` or `ON_GPU`.
      layers: how many there are of each kind, and of all, where a loop's passes are others.

    Raises:
      ValueError: the text has no entry computation.
    """
    module = parse(text)
    if module.entry is None:
        raise ValueError("text has no ENTRY computation; give the text of an optimised program.")
    walk = _Walk(module, frozenset(memory), frozenset(layers))
    top = _Frame(module, module.entry)
    least = walk.run(top, (), min)
    walk.conditions.clear()
    most = walk.run(top, (), max)
    unknown, conditions = tuple(sorted(walk.unknown)), tuple(walk.conditions)
    return Account(tuple(most), tuple(least), unknown, conditions)


def total(moved: Iterable[Moved]) -> float:
    """Bytes of them all, each as often as it is run."""
    return sum(each.bytes * each.times for each in moved)


class _Frame:
    """A computation while it is run: who called it, and with what."""

    def __init__(
        self,
        module: Module,
        name: str,
        caller: _Frame | None = None,
        operands: Sequence[str] = (),
        trips: int | None = None,
    ):
        self.module, self.inside = module, module.computations[name]
        self.named = {one.name: one for one in self.inside}
        self.caller, self.operands, self.trips = caller, tuple(operands), trips
        self.last_use: dict[Any, int] = {}
        for number, each in enumerate(self.inside):
            for operand in each.operands:
                if each.op not in ("get-tuple-element", "bitcast"):
                    self.last_use[self.memory(operand)] = number

    def memory(self, name: str) -> Any:
        """The memory that a name stands for: what made it, and which part of that."""
        part: tuple[int, ...] = ()
        each = self.named.get(name)
        while each is not None and each.op in ("bitcast", "get-tuple-element"):
            if each.op == "get-tuple-element":
                part = (_index(each), *part)
            name = each.operands[0]
            each = self.named.get(name)
        return name, part

    def made(self, name: str) -> Instruction | None:
        """The instruction of that name; None where the text does not have it."""
        return self.named.get(name)


def _index(each: Instruction) -> int:
    return int(each.attribute(r"\bindex=(\d+)") or 0)


class _Walk:
    def __init__(self, module: Module, memory: frozenset[int], layers: frozenset[int]):
        self.module, self.memory, self.layers = module, memory, layers
        self.unknown: set[str] = set()
        self.conditions: list[tuple[tuple[str, int], ...]] = []

    def run(
        self, frame: _Frame, loops: tuple[tuple[str, int], ...], choose: Callable[..., Any]
    ) -> list[Moved]:
        """Runs a computation."""
        found: list[Moved] = []
        for number, each in enumerate(frame.inside):
            target = each.attribute(_TARGET) if each.op == "custom-call" else None
            if each.op in _FREE or each.op.endswith("-done") or target in _FREE_CALLS:
                continue
            if each.op == "while":
                trips = self._trips(frame, each)
                name = each.attribute(r"\bbody=%?([\w.\-]+)") or ""
                inner = _Frame(self.module, name, frame, each.operands, trips)
                found += self.run(inner, (*loops, (each.name, trips)), choose)
            elif each.op == "conditional":
                self.conditions.append(loops)
                branches = [
                    self.run(_Frame(self.module, name, frame, [operand]), loops, choose)
                    for name, operand in zip(each.called, each.operands[1:], strict=True)
                ]
                found += choose(branches, key=total)
            elif each.op == "call":
                inner = _Frame(self.module, each.called[0], frame, each.operands)
                found += self.run(inner, loops, choose)
            else:
                found.append(self._moved(frame, number, each, target, loops))
        return found

    def _moved(
        self,
        frame: _Frame,
        number: int,
        each: Instruction,
        target: str | None,
        loops: tuple[tuple[str, int], ...],
    ) -> Moved:
        operands = [frame.made(name) for name in each.operands]
        if each.op == "custom-call":
            reads, writes = self._of_call(frame, each, target or "", operands)
        elif each.op.endswith("-start") and not runs_inside(each):
            reads, writes = self._of_start(each, operands)
        else:
            reads, writes = self._of_fusion(frame, number, each, operands)
        sources: dict[str, float] = {}
        for size, name in zip(reads, each.operands, strict=True):
            if size:
                origin = _origin(frame, name)
                sources[origin] = sources.get(origin, 0.0) + size
        return Moved(
            name=each.name,
            op=target or each.op,
            what=_place(each),
            sources=tuple(sorted(sources.items(), key=lambda one: -one[1])),
            writes=writes,
            copies=_copies(self.module, each),
            calls=target is not None,
            scalar=each.size <= 1 and not each.called and target is None,
            loops=loops,
        )

    def _counts(self, array: Array) -> bool:
        return array.space in self.memory

    def _of_fusion(
        self, frame: _Frame, number: int, each: Instruction, operands: list[Instruction | None]
    ) -> tuple[list[float], float]:
        """Bytes read of each operand, and bytes written."""
        made = ends(self.module, each)
        in_place = [self._is_in_place(frame, number, each, *one) for one in made]
        sizes = read_of_operands(self.module, each, frame.named, in_place)
        reads = [
            0.0 if operand is None else self._part(operand, size)
            for operand, size in zip(operands, sizes, strict=True)
        ]
        first = 0
        if each.op != "fusion" and runs_inside(each):  # Its operands are part of its result.
            first = sum(len(one.arrays) for one in operands if one is not None)
        writes = 0.0
        for array, (end, named), inplace in zip(each.arrays[first:], made, in_place, strict=False):
            if self._counts(array):
                chain = updates(end, named) if named else [end]
                new = _new(chain, named or frame.named) if inplace else array.size
                writes += new * array.bytes / max(1, array.size)
        return reads, writes

    def _part(self, operand: Instruction, size: float) -> float:
        """Bytes of so many numbers of an operand, as far as they lie in memory."""
        whole = sum(array.bytes for array in operand.arrays if self._counts(array))
        return whole * min(1.0, size / max(1, operand.size))

    def _is_in_place(
        self, frame: _Frame, number: int, each: Instruction, end: Instruction, named: Any
    ) -> bool:
        """Whether a result is an update of an operand that nobody needs as it was."""
        chain = updates(end, named or {end.name: end})
        if not chain:
            return False
        operand = each.operands[0]
        if named:
            source = behind(named[chain[-1].operands[0]], named)
            if source.op != "parameter":
                return False
            operand = each.operands[int(source.attribute(r"parameter\((\d+)\)") or 0)]
        return frame.last_use.get(frame.memory(operand), number) <= number

    def _of_call(
        self,
        frame: _Frame,
        each: Instruction,
        target: str,
        operands: list[Instruction | None],
    ) -> tuple[list[float], float]:
        here = [0.0 if one is None else self._part(one, float(one.size)) for one in operands]
        aliased = _aliased(each)
        arrays = list(each.arrays)
        if target.startswith("__cu") and arrays[-1].dtype in ("s8", "u8") and len(arrays) > 1:
            arrays.pop()  # Room that the library works in.
        writes = sum(
            array.bytes
            for number, array in enumerate(arrays)
            if number not in aliased and self._counts(array)
        )
        declared = each.attribute(_DECLARED) or each.attribute(_SAID)
        if declared is not None and int(declared):
            # Split among the operands by their size, for those that are on the chip cost nothing.
            whole = sum(one.bytes for one in operands if one is not None)
            return [int(declared) * size / max(1, whole) for size in here], float(writes)
        reads = [
            size / self._passes(frame, name) for size, name in zip(here, each.operands, strict=True)
        ]
        return reads, float(writes)

    def _passes(self, frame: _Frame, name: str) -> int:
        """How many lie in a stack that a loop brings in from outside, one for each layer."""
        around: _Frame | None = frame
        loops: list[int] = []
        while around is not None:
            if around.trips is not None:
                loops.append(around.trips)
            around = around.caller
        counts = {*loops[:1], *(self.layers if len(loops) > 1 else ())}
        each, stacked = frame.made(name), 1
        while each is not None:
            found = [array.dims[0] for array in each.arrays[:1] if array.dims]
            stacked = found[0] if found and found[0] in counts else stacked
            if each.op not in ("bitcast", "dynamic-update-slice", "get-tuple-element", "fusion"):
                break
            if each.op == "fusion" and stacked == 1:
                break
            each = frame.made(each.operands[0])
        outside = each is not None and each.op == "parameter"
        return stacked if outside else 1

    def _of_start(
        self, each: Instruction, operands: list[Instruction | None]
    ) -> tuple[list[float], float]:
        """Of an asynchronous copy, slice or collective without a computation of its own."""
        count = len(operands)
        if each.op == "copy-start":
            result = each.arrays[:1]
        else:
            # A result that begins with the operands is followed by what is made of them.
            result = each.arrays[count : 2 * count] or each.arrays[:count]
        part = float(sum(array.size for array in result)) if "slice" in each.op else float("inf")
        reads = [0.0 if one is None else self._part(one, min(part, one.size)) for one in operands]
        return reads, float(sum(array.bytes for array in result if self._counts(array)))

    def _trips(self, frame: _Frame, each: Instruction) -> int:
        """How often a loop runs."""
        known = each.attribute(r'"known_trip_count":\{"n":"(\d+)"')
        if known is not None:
            return int(known)
        name = each.attribute(r"\bcondition=%?([\w.\-]+)") or ""
        inner = _Frame(self.module, name, frame, each.operands)
        [root] = [one for one in inner.inside if one.root]
        if root.op == "fusion":
            inner = _Frame(self.module, root.called[0], inner, root.operands)
            [root] = [one for one in inner.inside if one.root]
        if root.op == "compare" and "direction=LT" in root.line:
            first, last = (_constant(inner, name) for name in root.operands)
            if last is not None:
                return max(0, last - (first or 0))
        self.unknown.add(each.name)
        return 1


def _copies(module: Module, each: Instruction) -> bool:
    """Whether it does nothing but move numbers."""
    if runs_inside(each) or each.op == "call-start":
        return all(_copies(module, one) for one in module.computations[each.called[0]])
    return each.op in _MOVES or each.op == "call-done" or each.size <= 1


def _new(chain: Iterable[Instruction], named: Mapping[str, Instruction]) -> int:
    """Numbers that updates write."""
    size = 0
    for each in chain:
        new = each.operands[1:2]
        if each.op == "scatter":
            new = each.operands[len(each.operands) // 3 * 2 :]
        size += sum(named[name].size for name in new if name in named)
    return size


def _aliased(each: Instruction) -> set[int]:
    """Numbers of the results that lie in the memory of an operand."""
    text = each.attribute(r"output_to_operand_aliasing=\{(.*?\)\})")
    if text is None:
        return set()
    return {int(at.split(",")[0] or 0) for at in re.findall(r"\{([\d, ]*)\}: \(", text + "}")}


def _outside(frame: _Frame, name: str, part: tuple[int, ...]) -> tuple[_Frame, str, Any] | None:
    """What a computation's parameter is where it was called from."""
    each = frame.named.get(name)
    if each is None or each.op != "parameter" or frame.caller is None:
        return None
    number = int(each.attribute(r"parameter\((\d+)\)") or 0)
    if number >= len(frame.operands):
        return None
    return frame.caller, frame.operands[number], part


def _source(
    frame: _Frame, name: str, through: Callable[[Module, Instruction], bool]
) -> tuple[_Frame, str]:
    """Where a value comes from: past tuples, loops and calls, and what `through` says."""
    part: tuple[int, ...] = ()
    while True:
        each = frame.named.get(name)
        if each is None:
            return frame, name
        if each.op == "get-tuple-element":
            part, name = (_index(each), *part), each.operands[0]
        elif each.op == "tuple" and part:
            name, part = each.operands[part[0]], part[1:]
        elif each.operands and (
            each.op in ("bitcast", "opt-barrier", "while") or through(frame.module, each)
        ):
            part = () if each.op.endswith(("-done", "-start")) else part
            name = each.operands[0]
        elif (outer := _outside(frame, name, part)) is not None:
            frame, name, part = outer
        else:
            return frame, name


def _constant(frame: _Frame, name: str) -> int | None:
    """The value of an integer, if the program tells."""
    frame, name = _source(frame, name, _is_copy)
    each = frame.named.get(name)
    text = None if each is None else each.attribute(r"constant\((-?\d+)\)")
    return None if text is None else int(text)


def _origin(frame: _Frame, name: str) -> str:
    """The argument of the program that a value is, or is a part or a copy of; '' if none."""
    frame, name = _source(frame, name, _is_piece)
    each = frame.named.get(name)
    if each is None or each.op != "parameter":
        return ""
    found = (each.attribute(r'op_name="([^"]*)"') or "").replace("\\'", "'")
    found = re.sub(r"\['([^']*)'\]", r".\1", found)
    return re.sub(r"^(params\.weights|state)\.", "", found)


def _is_piece(module: Module, each: Instruction) -> bool:
    """Whether a result has the numbers of its first operand: a copy, a part, or an update of it."""
    if each.op == "custom-call":
        return each.attribute(_TARGET) in _FREE_CALLS
    if each.op == "fusion" and [end.op for end, _ in ends(module, each)] == _UPDATE:
        return True
    return each.op in (*_UPDATE, "async-done") or (each.size > 1 and _copies(module, each))


def _is_copy(module: Module, each: Instruction) -> bool:
    return each.op in ("copy", "copy-start", "copy-done")


def _place(each: Instruction) -> str:
    """The last parts of its name in the traced program: a kernel's and its operation's, or that."""
    found = each.attribute(r'op_name="([^"]*)"') or ""
    parts = [one for one in found.split("/") if not _AROUND.fullmatch(one)]
    return "/".join(parts[-2:] if each.op == "custom-call" else parts[-1:])
