"""How much of its operands an instruction, or a fusion of many, reads.

A fusion computes what its results ask for and nothing else: where it takes one layer's slice out of
a stack, it reads the slice. So numbers are asked for from the results backwards, and what arrives
at a parameter is what is read of it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from raas_jax.aot.hlo import Instruction, Module

# These read of their first operand as many numbers as they give.
_SLICES = {"dynamic-slice", "slice", "gather"}
_WHOLE = float("inf")

Demand = dict[str, float]


def read_of_operands(
    module: Module, each: Instruction, named: Mapping[str, Instruction], in_place: Sequence[bool]
) -> list[float]:
    """Numbers that are read of each operand.

    Args:
      module: where it stands.
      each: a fusion or any other instruction that is run as one piece.
      named: the instructions beside it, by name.
      in_place: for each array of the result, whether it is written into the memory of an operand,
        whose other parts stay as they are.
    """
    if runs_inside(each):
        found = _of_parameters(module, each.called[0], in_place)
        return [found.get(number, 0.0) for number in range(len(each.operands))]
    demand: Demand = defaultdict(float)
    _ask(module, each, float(each.size), named, demand, bool(in_place) and all(in_place))
    return [demand[name] / each.operands.count(name) for name in each.operands]


def ends(module: Module, each: Instruction) -> list[tuple[Instruction, Mapping[str, Instruction]]]:
    """What makes each array of a result: an update, where that is what it is, and its siblings."""
    if not runs_inside(each):
        return [(each, {})] * len(each.arrays)
    inside = module.computations[each.called[0]]
    named = {one.name: one for one in inside}
    found = [one for one in inside if one.root]
    if found and found[0].op == "tuple":
        found = [named[name] for name in found[0].operands]
    return [(behind(one, named), named) for one in found]


def runs_inside(each: Instruction) -> bool:
    """Whether it stands for a computation that is run as one piece."""
    return each.op == "fusion" or (each.op.endswith("-start") and " calls=" in each.line)


def updates(end: Instruction, named: Mapping[str, Instruction]) -> list[Instruction]:
    """The updates of one buffer, last one first, that a result consists of; none if it is new."""
    found = []
    while end.op in ("dynamic-update-slice", "scatter"):
        found.append(end)
        if end.operands[0] not in named:
            break
        end = behind(named[end.operands[0]], named)
    return found


def behind(each: Instruction, named: Mapping[str, Instruction]) -> Instruction:
    """What lies behind other names and shapes of the same memory."""
    while each.operands and each.operands[0] in named and _is_renamed(each):
        each = named[each.operands[0]]
    return each


def _is_renamed(each: Instruction) -> bool:
    """Also where a TPU's compiler puts a fusion that stands for the memory of its operand."""
    aliased = "output_to_operand_aliasing={{}: (0, {})}" in each.line
    return each.op == "bitcast" or (each.op == "fusion" and aliased)


def _of_parameters(
    module: Module, name: str, in_place: Sequence[bool], asked: float = _WHOLE
) -> dict[int, float]:
    """Numbers that a computation reads of its parameters, by their number.

    `asked` are the numbers of its result that are wanted, if that is one array.
    """
    inside = module.computations[name]
    named = {one.name: one for one in inside}
    demand: Demand = defaultdict(float)
    written = set()
    [root] = [one for one in inside if one.root]
    outputs = [named[name] for name in root.operands] if root.op == "tuple" else [root]
    for output, inplace in zip(outputs, [*in_place, *[False] * len(outputs)], strict=False):
        demand[output.name] += output.size if root.op == "tuple" else min(asked, output.size)
        if inplace:
            written |= {one.name for one in updates(behind(output, named), named)}
    read: dict[int, float] = {}
    for one in reversed(inside):
        wanted = min(demand[one.name], float(one.size))
        if one.op == "parameter":
            read[int(one.attribute(r"parameter\((\d+)\)") or 0)] = wanted
        elif (wanted or one.name in written) and not (one.root and one.op == "tuple"):
            _ask(module, one, wanted, named, demand, one.name in written)
    return read


def _ask(
    module: Module,
    each: Instruction,
    asked: float,
    named: Mapping[str, Instruction],
    demand: Demand,
    in_place: bool,
) -> None:
    """Adds to `demand` what an instruction asks of its operands for `asked` numbers of its own."""
    sizes = [float(named[name].size) if name in named else 0.0 for name in each.operands]
    wanted = [size if size != each.size else asked for size in sizes]
    if each.op in _SLICES:
        wanted[0] = asked
    elif each.op == "dynamic-update-slice":
        wanted[0] = 0.0 if in_place else max(0.0, asked - sizes[1])
        wanted[1] = sizes[1] if in_place else min(sizes[1], asked)
    elif each.op == "scatter":
        buffers = len(sizes) // 3
        wanted[:buffers] = [0.0 if in_place else asked] * buffers
        wanted[buffers:] = sizes[buffers:]
    elif each.op in ("broadcast", "pad", "concatenate"):
        wanted = [min(size, asked) for size in sizes]
    elif each.op == "reduce":
        half = len(sizes) // 2
        part = asked / max(1, each.size)
        wanted[:half] = [size * part for size in sizes[:half]]
    elif each.op in ("fusion", "call"):
        inner = _of_parameters(module, each.called[0], (), asked)
        wanted = [inner.get(number, 0.0) for number in range(len(sizes))]
    elif each.op == "get-tuple-element":
        wanted = [_WHOLE]
    elif each.op in ("dot", "convolution", "sort", "reduce-window"):
        wanted = sizes
    for name, size in zip(each.operands, wanted, strict=True):
        demand[name] += size
