"""What do the loops of a compiled program write out in full? By its optimised HLO text."""

from __future__ import annotations

from raas_jax.aot.hlo import Instruction, parse

# These name memory that exists, or run a computation whose own instructions are looked at.
FREE = {
    "parameter", "get-tuple-element", "tuple", "bitcast", "while", "conditional", "call",
    "constant", "after-all", "opt-barrier", "async-start", "async-update", "async-done",
}  # fmt: skip
# These write a part of their first operand, in place: where the compiler cannot, it adds a `copy`.
IN_PLACE = {"dynamic-update-slice", "scatter"}


def computations(text: str) -> dict[str, list[Instruction]]:
    """Instructions of every computation of a module."""
    return parse(text).computations


def written_in_loops(text: str, size: int) -> list[str]:
    """Instructions inside loops that write out at least `size` bytes, other than in place."""
    found = computations(text)
    loops = [i for part in found.values() for i in part if i.op == "while"]
    assert loops, "no loop in this program: nothing was checked"
    todo, seen, out = [name for loop in loops for name in loop.called], set(), []
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        for each in found[name]:
            # What happens within a fusion stays in registers; its result is what is written.
            if each.op != "fusion":
                todo += each.called
            if each.bytes >= size and each.op not in FREE and not _in_place(each, found, size):
                out.append(f"{name}: {each.line}")
    return out


def collectives(text: str) -> dict[str, int]:
    """How often each kind of collective stands in a module; one in a loop counts once."""
    kinds = "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute"
    count = dict.fromkeys(kinds, 0)
    for part in computations(text).values():
        for each in part:
            kind = each.op.removesuffix("-start")
            if kind in count:
                count[kind] += 1
    return {kind: number for kind, number in count.items() if number}


def _in_place(each: Instruction, found: dict[str, list[Instruction]], size: int) -> bool:
    """Whether it, or all that a fusion puts out, writes less than `size` bytes into a buffer."""
    inside = next(part for part in found.values() if each in part)
    ends = [each]
    if each.op == "fusion":
        inside = found[each.called[0]]
        ends = [i for i in inside if i.root]
    if each.op == "custom-call" and "output_to_operand_aliasing={" in each.line:
        return True
    named = {i.name: i for i in inside}
    while ends and ends[0].op in ("bitcast", "tuple"):
        ends = [named[name] for end in ends for name in end.operands]
    return bool(ends) and all(
        end.op in IN_PLACE and sum(named[name].bytes for name in _written(end)) < size
        for end in ends
    )


def _written(each: Instruction) -> tuple[str, ...]:
    """Operands that hold the new part."""
    if each.op == "scatter":
        return each.operands[len(each.operands) // 3 * 2 :]
    return each.operands[1:2]
