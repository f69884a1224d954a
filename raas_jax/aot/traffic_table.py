"""The table of what decode steps move: models × targets × rows, each cell as soon as it is there.

    python -m raas_jax.aot.traffic_table --config FILE ... --out cells.jsonl
    python -m raas_jax.aot.traffic_table --table cells.jsonl [--before old.jsonl]

A cell that is in the file is not made again, so that a run that was ended goes on. Each is compiled
in a process of its own: compilers keep memory, and one that dies takes only its cell along.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TARGETS = ("h100", "v5e", "v6e", "tpu7x")
ROWS = (1, 8, 16, 64, 256)

MESHES: dict[str, tuple[tuple[str, int], ...]] = {
    "h100": (("h100", 1), ("h100:2", 2), ("h100:4", 4), ("h100:8", 8)),
    "v5e": (
        *(("v5e:2x2", devices) for devices in (1, 2, 4)),
        ("v5e:2x4", 8),
        ("v5e:4x4", 16),
        ("v5e:4x8", 32),
    ),
    "v6e": (
        *(("v6e:2x2", devices) for devices in (1, 2, 4)),
        ("v6e:2x4", 8),
        ("v6e:4x4", 16),
    ),
    "tpu7x": (
        *(("tpu7x:2x2x1", devices) for devices in (1, 2, 4, 8)),
        ("tpu7x:2x2x2", 16),
    ),
}
"""Meshes to try, smallest first: a slice, and on how many of its devices the decode runs."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """One compile.

    Attributes:
      model: its name, that of the folder of its configuration.
      chip: a key of `MESHES`.
      rows: `B`.
    """

    model: str
    chip: str
    rows: int


def made(path: Path) -> dict[Cell, dict[str, Any]]:
    """The cells of a file, the last one of each kind."""
    lines = path.read_text().splitlines() if path.exists() else []
    found = [json.loads(line) for line in lines if line.strip()]
    return {Cell(each["model"], each["chip"], each["rows"]): each for each in found}


def make(config: Path, cell: Cell, options: argparse.Namespace) -> dict[str, Any]:
    """Compiles for the smallest mesh on which the decode finds room.

    Where it finds none on the largest, that one is compiled for, if the compiler does not mind.
    """
    import jax

    from raas_jax.aot.decode_traffic import bytes_on_one_device, decode_traffic
    from raas_jax.aot.memory import abstract_session, target_mesh
    from raas_jax.aot.targets import DEVICE_MEMORY
    from raas_jax.config import ModelConfig
    from raas_jax.policies import create

    shape = ModelConfig.from_file(config)
    policy = create(options.policy, budget=options.budget)
    prompts = [options.prompt_tokens] * cell.rows
    refusal, meshes = "no mesh divides the rows", MESHES[cell.chip]
    for target, devices in meshes:
        ways = max(one for one in _divisors(devices) if shape.num_key_value_heads % one == 0)
        if cell.rows % (devices // ways):
            continue
        mesh = target_mesh(shape, target, devices // ways, ways)
        new, dtype = options.max_new_tokens, options.dtype
        session = abstract_session(shape, policy, prompts, new, dtype, mesh)
        room = DEVICE_MEMORY.get(mesh.devices.flat[0].device_kind)
        fits = room is None or bytes_on_one_device((session.params.weights, session.shape)) <= room
        if not fits and (target, devices) != meshes[-1]:
            continue
        try:
            found = decode_traffic(session)
        except jax.errors.JaxRuntimeError as error:
            refusal = str(error).splitlines()[0][:200]
            if "RESOURCE_EXHAUSTED" in str(error):
                continue
            break
        where = {"target": target, "data": devices // ways, "ways": ways, "fits": fits}
        account = {**dataclasses.asdict(found), "floor": found.floor}
        return {**account, **where, **dataclasses.asdict(cell)}
    return {**dataclasses.asdict(cell), "refusal": refusal}


def _divisors(number: int) -> list[int]:
    return [one for one in range(1, number + 1) if number % one == 0]


def table(cells: dict[Cell, dict[str, Any]], before: dict[Cell, dict[str, Any]]) -> str:
    """Markdown: a line for each cell, in order, the ratios of `before` beside those of now."""
    head = ["Model", "Target", "Rows", "Floor GB", "Moved GB", "Over the floor"]
    head += ["Copied GB", "Per layer", "Outside"]
    if before:
        head[5:6] = ["Before", "Now"]
    lines = ["| " + " | ".join(head) + " |", "|---|---|" + "--:|" * (len(head) - 2)]
    order = sorted(cells, key=lambda each: (each.model, TARGETS.index(each.chip), each.rows))
    for cell, found in ((each, cells[each]) for each in order):
        lines.append("| " + " | ".join(_line(cell, found, before)) + " |")
    return "\n".join(lines)


def _line(cell: Cell, found: dict[str, Any], before: dict[Cell, dict[str, Any]]) -> list[str]:
    was = [_ratio(before.get(cell, {}))] if before else []
    if "refusal" in found:
        return [cell.model, cell.chip, str(cell.rows), "", "does not compile", *was, "", "", "", ""]
    copied = sum(each["reads"] + each["writes"] for each in found["copies"])
    where = cell.chip if found["devices"] == 1 else f"{cell.chip} × {found['devices']}"
    return [
        cell.model,
        where if found["fits"] else f"{where}, too small",
        str(cell.rows),
        f"{found['floor'] / 1e9:.2f}",
        f"{(found['reads'] + found['writes']) / 1e9:.2f}",
        *was,
        _ratio(found),
        f"{copied / 1e9:.2f}" if copied else "0",
        f"{found['operations_per_layer']:.0f}",
        f"{found['operations_outside']:.0f}",
    ]


def _ratio(found: dict[str, Any]) -> str:
    if "ratio" not in found:
        return ""
    least = found["least"] / found["floor"]
    return f"{found['ratio']:.2f}" + (f" ({least:.2f})" if found["ratio"] - least > 0.005 else "")


def main(arguments: Sequence[str] | None = None) -> int:
    """Makes the cells that are missing, or prints the table of those that are there."""
    options = _parser().parse_args(arguments)
    if options.table is not None:
        before = made(options.before) if options.before else {}
        print(table(made(options.table), before))
        return 0
    configs = {
        path.parent.name if path.name == "config.json" else path.stem: path
        for path in options.config
    }
    if options.cell is not None:
        cell = Cell(**json.loads(options.cell))
        print(json.dumps(make(configs[cell.model], cell, options)))
        return 0
    cells = [
        Cell(model, chip, rows)
        for model in configs
        for chip in options.targets
        for rows in options.batch
    ]
    for cell in cells:
        if cell in made(options.out):
            continue
        found = _in_a_process(cell, configs[cell.model], options)
        with options.out.open("a") as file:
            file.write(json.dumps(found) + "\n")
        print(
            f"{cell.model} {cell.chip} {cell.rows}: {found.get('refusal') or _ratio(found)}",
            flush=True,
        )
    return 0


def _in_a_process(cell: Cell, config: Path, options: argparse.Namespace) -> dict[str, Any]:
    given = ["--config", str(config), "--cell", json.dumps(dataclasses.asdict(cell))]
    for name in ("prompt_tokens", "max_new_tokens", "policy", "budget", "dtype"):
        given += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    # Nothing is run, so no device is looked for.
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "raas_jax.aot.traffic_table", *given]
    ended = subprocess.run(command, env=environment, text=True, capture_output=True, check=False)
    if ended.returncode:
        last = (ended.stderr.strip().splitlines() or ["no word"])[-1]
        return {**dataclasses.asdict(cell), "refusal": f"{last[:200]} (exit {ended.returncode})"}
    found: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m raas_jax.aot.traffic_table",
        description="What decode steps read and write, by compiled programs: a table.",
    )
    add = parser.add_argument
    add("--config", type=Path, nargs="+", default=[], help="config.json of each model")
    add("--targets", nargs="+", default=TARGETS, choices=TARGETS)
    add("--batch", type=int, nargs="+", default=ROWS)
    add("--prompt-tokens", type=int, default=1024)
    add("--max-new-tokens", type=int, default=4096)
    add("--policy", default="raas")
    add("--budget", type=int, default=1024)
    add("--dtype", default="bfloat16")
    add("--out", type=Path, default=Path("traffic.jsonl"), help="where cells are added")
    add("--table", type=Path, help="print the table of this file, and make nothing")
    add("--before", type=Path, help="with --table: an earlier file, to compare with")
    add("--cell", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
