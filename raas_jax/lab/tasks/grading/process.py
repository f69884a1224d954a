"""The process that grades, so that a grader that hangs or eats memory can be killed.

`raas_jax.lab.tasks.grading.GraderPool` drives it: a JSON line `{"gold", "text"}` in, a JSON line of
`Verdict` out. It imports nothing heavy of the package: it starts in a second and without jax.
"""

import importlib.util
import json
import os
import signal
import sys
from typing import TextIO

from raas_jax.lab.tasks.grading.mathematics import Grader, Verdict, grade

# sympy can ask for more than a machine has; the process gets a MemoryError instead.
MEMORY_BYTES = 4 << 30
WAIT = 6
"""Times the limit of computing: how long whoever asked waits for a process that computes little."""


def own_grader(file: str) -> Grader | None:
    """The function `grade(gold, text)` of a task's Python file; None if it has none."""
    spec = importlib.util.spec_from_file_location("task_of_ones_own", file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: Grader | None = getattr(module, "grade", None)
    return found


def serve(requests: TextIO, answers: TextIO, grader: Grader, seconds: float) -> None:
    """Answers every request, until there are no more."""
    for line in requests:
        asked = json.loads(line)
        # Its own computing counts: on a busy machine an answer must not cost its mark. Whoever
        # asked kills a process that is late; if they are gone, it ends by itself.
        _limit(computing=seconds, clock=2 * WAIT * seconds)
        try:
            found = grader(asked["gold"], asked["text"])
            verdict = found if isinstance(found, tuple) else Verdict(bool(found))
        except Exception as error:  # Whatever it is, it is this answer's alone.
            verdict = Verdict(False, None, f"{type(error).__name__}: {error}"[:300])
        # The next request may be long in coming.
        _limit(computing=0, clock=0)
        answers.write(json.dumps(verdict._asdict()) + "\n")
        answers.flush()


def _limit(computing: float, clock: float) -> None:
    """Ends this process after so many seconds; 0 is never."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, computing)
        signal.setitimer(signal.ITIMER_REAL, clock)


def main() -> None:
    """Serves on standard input and output. Arguments: seconds, and the file of one's own task."""
    # What libraries print must not come between the answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    try:
        import resource

        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, hard))
    except (ImportError, ValueError, OSError):
        pass  # This system has no such limit; the time limit holds.
    import logging

    logging.disable(logging.CRITICAL)  # math-verify warns that we keep the time ourselves.
    grader = own_grader(sys.argv[2]) if len(sys.argv) > 2 else None
    if grader is None:
        import math_verify  # noqa: F401 - before the first answer's time begins

        grader = grade
    answers.write(json.dumps("ready") + "\n")
    answers.flush()
    serve(sys.stdin, answers, grader, float(sys.argv[1]))
