"""`python -m raas_jax.lab.parity [FAMILY ...] [--out FILE]`: every family beside transformers.

On a CPU in float32, with eight devices that are virtual; it needs torch (the extra `dev`).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import sys
import time
from pathlib import Path

from raas_jax.families import FAMILIES

DEVICES = 8


def main(arguments: list[str] | None = None) -> int:
    """Prints a line for each variant and the table; 1 if anything differs, 2 if it cannot run."""
    parser = argparse.ArgumentParser("python -m raas_jax.lab.parity", description=__doc__)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help="all by default")
    parser.add_argument("--out", type=Path, metavar="FILE", help="a page with the marks, or a file")
    given = parser.parse_args(arguments)
    if unknown := set(given.families) - set(FAMILIES):
        known = ", ".join(sorted(FAMILIES))
        parser.error(f"no family is called {', '.join(sorted(unknown))}; there are {known}")
    for package in ("torch", "transformers"):
        if importlib.util.find_spec(package) is None:
            parser.error(
                f"{package} is not installed: in the checkout of raas_jax, pip install -e '.[dev]'"
            )

    prepare()
    import jax

    from raas_jax import make_mesh
    from raas_jax.lab.parity.measure import REFUSED, Parity, compare, made
    from raas_jax.lab.parity.models import CASES
    from raas_jax.lab.parity.table import table, write

    jax.config.update("jax_num_cpu_devices", DEVICES)
    mesh = make_mesh(data=4, model=2)
    began, found, bad = time.monotonic(), dict[str, list[Parity]](), []
    for family in sorted(given.families or FAMILIES):
        found[family], kinds = [], set[bool | None]()
        for variant in (name for name, (of, _) in CASES.items() if of == family):
            try:
                with made(variant) as model:
                    # The engine and policies are run once with windows, and once without.
                    windowed = bool(model.ours.config.window)
                    parity = compare(model, whole=windowed not in kinds, mesh=mesh)
            except ValueError as error:
                print(f"{variant} is refused: {error}", file=sys.stderr)
                windowed, parity = None, REFUSED
            kinds.add(windowed)
            found[family].append(parity)
            if not parity.holds:
                bad.append(variant)
            print(f"{time.monotonic() - began:6.0f} s  {variant}: {parity}", file=sys.stderr)
            jax.clear_caches()  # Each program takes memory mappings, of which there are so many.
        if not found[family]:
            bad.append(f"{family}, of which raas_jax/lab/parity/models.py has no variant")
        if given.out is not None:
            write(given.out, table(found))  # So that a run that is ended has left what it found.
    print(table(found))
    for each in bad:
        print(f"not as transformers: {each}", file=sys.stderr)
    return int(bool(bad))


def prepare() -> None:
    """Sets what jax reads as it starts: a CPU, on which little is computed and much compiled."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if importlib.metadata.version("jax") < "0.11":
        # Its code for CPUs can be made without MLIR, in a third of the time.
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_use_fusion_emitters=false"


if __name__ == "__main__":
    sys.exit(main())
