"""Damages what is read, at random, and sees whether it is used rightly or refused clearly.

    PYTHONPATH=tests python tests/fuzz/fuzz.py --seconds 600
    PYTHONPATH=tests python tests/fuzz/fuzz.py --only run engine --seed 7

Every case has a number, which with the seed makes it again. A failure is: an exception other than
one that names the file or its folder; a wrong result; more than 10 seconds; more than 1 GiB.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import shutil
import signal
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from damage import damaged
from targets import TARGETS, Target

SECONDS, MEMORY = 10, 1 << 30
OURS = (ValueError, OSError)  # `FileError` is a ValueError, `FileNotFoundError` an OSError.


class TooLong(BaseException):
    """Raised by the alarm; nothing that catches exceptions may catch it."""


def fuzz(name: str, seconds: float, seed: int, first: int = 0) -> tuple[Counter[str], list[str]]:
    """Tries cases of one target for some seconds: how they ended, and what failed."""
    target, ends, failures = TARGETS[name], Counter[str](), list[str]()
    with tempfile.TemporaryDirectory() as scratch:
        good = Path(scratch) / "good"
        good.mkdir()
        target.make(good)
        (good / "case").write_text("good")
        # What is compiled on the way is compiled once.
        said = attempt(target, good, seconds=300)
        assert said in (None, "refused"), f"{name}: the good one fails: {said}"
        began, number = time.monotonic(), first
        while time.monotonic() - began < seconds:
            case = f"{name} {seed} {number}"
            folder = Path(scratch) / f"case{number}"
            shutil.copytree(good, folder, symlinks=True)
            what = prepare(target, folder, case)
            said = attempt(target, folder)
            ends["used" if said is None else "refused" if said == "refused" else "failed"] += 1
            if said not in (None, "refused"):
                failures.append(f"{case} ({what}): {said}")
            shutil.rmtree(folder)
            number += 1
    return ends, failures


def prepare(target: Target, folder: Path, case: str) -> str:
    """Damages a file of the case, or puts something else in its place, and says which."""
    draws = random.Random(case)
    (folder / "case").write_text(case)
    found = sorted({file for pattern in target.files for file in folder.glob(pattern)})
    files = [file for file in found if file.is_file()]
    if not files:
        return "arguments"
    file, way = draws.choice(files), draws.random()
    said = str(file.relative_to(folder))
    if way < 0.9:
        file.write_bytes(damaged(file.read_bytes(), draws, file.name))
        return said
    file.unlink()
    if way < 0.92:
        file.mkdir()
    elif way < 0.94:
        os.mkfifo(file)
    elif way < 0.96:
        file.symlink_to(file)  # A circle.
    return f"{said} replaced"


def attempt(target: Target, folder: Path, seconds: float = SECONDS) -> str | None:
    """None for a right result, "refused" for a clear error, or what is wrong."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    signal.signal(signal.SIGALRM, _too_long)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        target.use(folder)
        said = None
    except OURS as error:
        names = str(folder) in str(error) or any(
            str(part) in str(error) for part in (getattr(error, "filename", None),) if part
        )
        said = "refused" if names else f"names no file: {type(error).__name__}: {error}"[:400]
    except TooLong:
        said = f"took more than {SECONDS} s: " + traceback.format_exc()[-600:]
    except Exception as error:
        said = f"{type(error).__name__}: {error}"[:300] + traceback.format_exc()[-900:]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
    return f"took {grown >> 20} MiB" if grown > MEMORY else said


def _too_long(*_: object) -> None:
    raise TooLong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60, help="for all targets together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--only", nargs="+", choices=TARGETS, default=list(TARGETS))
    given = parser.parse_args()
    failed = 0
    print("| input | tries | used rightly | refused clearly | failed |\n|---|---:|---:|---:|---:|")
    for name in given.only:
        ends, failures = fuzz(name, given.seconds / len(given.only), given.seed, given.first)
        counts = [ends.total(), *(ends[end] for end in ("used", "refused", "failed"))]
        print(f"| {name} | {' | '.join(map(str, counts))} |", flush=True)
        for failure in failures[:20]:
            print(f"  {failure}", flush=True)
        failed += len(failures)
    return bool(failed)


if __name__ == "__main__":
    raise SystemExit(main())
