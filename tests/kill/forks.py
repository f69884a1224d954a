"""Lives that may be killed at any moment: one is forked for each line that a program reads.

Importing takes most of a start, so that it is done once; the backend starts after the fork.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
from quick import environment

HERE = Path(__file__).parent
KILLS = int(os.environ.get("KILLS", "5"))


def serve(live: Callable[[str], None], cache: Path) -> None:
    """Forks `live` for each line of standard input, and says its number, and how it ended."""
    for line in sys.stdin:
        child = os.fork()
        if child:
            print(child, flush=True)
            os.waitpid(child, 0)
            print("gone", flush=True)
            continue
        jax.config.update("jax_compilation_cache_dir", str(cache))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
        live(line.rstrip("\n"))
        print("finished", flush=True)
        os._exit(0)


class Lives:
    """A program that calls `serve`, as a test sees it.

    Attributes:
      told: all that it said.
    """

    def __init__(self, program: str, *arguments: object):
        path = os.pathsep.join(map(str, [HERE.parent, *sys.path]))
        self.told: list[str] = []
        self.process = subprocess.Popen(
            [sys.executable, HERE / program, *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(PYTHONPATH=path),
        )

    def hear(self) -> str:
        """The next line that it says."""
        line = self.process.stdout.readline()
        assert line, f"it ended, and said {self.told[-3:]}"
        self.told.append(line.strip())
        return self.told[-1]

    def start(self, line: object = "") -> int:
        """Begins a life, and gives its process number."""
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()
        return int(self.hear())

    def finish(self, line: object = "") -> None:
        """A life that nobody kills."""
        self.start(line)
        assert self.rest()[-2:] == ["finished", "gone"]

    def rest(self) -> list[str]:
        """What it says until the life is over."""
        first = len(self.told)
        while self.hear() != "gone":
            pass
        return self.told[first:]

    def close(self) -> None:
        """Ends the program."""
        self.process.stdin.close()
        assert self.process.wait() == 0
