"""GraderPool in processes of their own: one that hangs or dies costs one answer its mark."""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue

from raas_jax.lab.tasks.grading.mathematics import Verdict
from raas_jax.lab.tasks.grading.process import WAIT

START_SECONDS = 120.0  # Importing sympy on a busy machine.
# The package may lie where only this process looks for it.
_MAIN = (
    "import sys; sys.path.append(sys.argv.pop(1)); "
    "from raas_jax.lab.tasks.grading.process import main; main()"
)
_ROOT = str(Path(__file__).resolve().parents[4])


class GraderPool:
    """Marks answers beside the decoding, each in a process with a time limit.

    A process that runs out of time or dies is replaced; its answer counts as wrong and
    `Verdict.error` says why. Use it in a `with`, or `close` it.
    """

    def __init__(self, workers: int = 2, time_limit: float = 10.0, file: Path | None = None):
        """Starts the first process, the others when they are needed.

        Args:
          workers: processes at most.
          time_limit: seconds of computing for each answer; six times that by the clock, and a
            second try then, since a stopped or starved machine says nothing of the answer.
          file: a task of one's own, whose `grade(gold, text)` is used if it has one.

        Raises:
          ValueError: a wrong argument, or a file that fails. ImportError: math-verify is missing.
        """
        if workers < 1 or not time_limit > 0:
            raise ValueError(
                f"workers={workers}, time_limit={time_limit}: give at least 1 worker, and a limit "
                "above 0 seconds."
            )
        if file is None and importlib.util.find_spec("math_verify") is None:
            raise ImportError(
                "grading needs math-verify: in the checkout of raas_jax, pip install -e '.[eval]'."
            )
        self.time_limit = time_limit
        self._command = [
            *(sys.executable, "-P", "-c", _MAIN, _ROOT, str(time_limit)),
            *([] if file is None else [str(file)]),
        ]
        # One for each worker: its process, or None where it must first be started.
        self._idle: SimpleQueue[_Process | None] = SimpleQueue()
        for process in (_Process(self._command, self.time_limit), *[None] * (workers - 1)):
            self._idle.put(process)
        self._threads = ThreadPoolExecutor(workers, "grader")

    def submit(self, gold: str, text: str) -> Future[Verdict]:
        """The mark of a text against the reference answer, once it is there."""
        return self._threads.submit(self._grade, gold, text)

    def close(self) -> None:
        """Waits for what was submitted, then ends the processes."""
        self._threads.shutdown()
        while not self._idle.empty():
            if (process := self._idle.get()) is not None:
                process.kill()

    def __enter__(self) -> GraderPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _grade(self, gold: str, text: str) -> Verdict:
        try:
            return self._ask(gold, text)
        except _LateError:
            with suppress(_LateError):
                return self._ask(gold, text)
            return Verdict(False, None, f"no mark within {WAIT * self.time_limit:g} s, twice")

    def _ask(self, gold: str, text: str) -> Verdict:
        """The mark from a process that waits for work. Raises _LateError."""
        process = self._idle.get()
        try:
            process = process or _Process(self._command, self.time_limit)
            return process.ask({"gold": gold, "text": text})
        except (_LostError, ValueError, OSError) as lost:
            if process is not None:
                process.kill()
                process = None
            if isinstance(lost, _LateError):
                raise
            return Verdict(False, None, str(lost))
        finally:
            self._idle.put(process)


class _LostError(Exception):
    """The process is gone, with the reason."""


class _LateError(_LostError):
    """It was ended since the clock ran out, whatever it had computed."""


class _Process:
    """One process of `process.main`."""

    def __init__(self, command: list[str], seconds: float):
        """Starts it; `seconds` is the limit that the command gives it. Raises ValueError."""
        self._seconds = seconds
        # A file, since nobody reads a pipe while the process runs.
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            start_new_session=True,  # Ctrl-C ends the decoding; what is decoded is still graded.
        )
        try:
            self._read(START_SECONDS)
        except _LostError as lost:
            self._errors.seek(0)
            lines = self._errors.read().decode(errors="replace").strip().splitlines()
            self.kill()
            raise ValueError(f"the grader does not start: {(lines or [str(lost)])[-1]}") from None

    def ask(self, request: dict[str, str]) -> Verdict:
        """The answer to a request. Raises _LostError."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            raise self._lost() from None
        return Verdict(**json.loads(self._read(WAIT * self._seconds)))

    def kill(self) -> None:
        """Ends the process; more than once does no harm."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            # What was still to be written has no reader any more.
            with suppress(OSError):
                if stream is not None:
                    stream.close()

    def _read(self, seconds: float) -> bytes:
        assert self._process.stdout is not None
        late = threading.Event()

        def stop() -> None:
            late.set()
            self._process.kill()

        timer = threading.Timer(seconds, stop)
        timer.start()
        try:
            line = self._process.stdout.readline()
        finally:
            timer.cancel()
        if not line.endswith(b"\n"):
            raise _LateError(f"not ready within {seconds:g} s") if late.is_set() else self._lost()
        return line

    def _lost(self) -> _LostError:
        code = self._process.wait()
        if code < 0 and -code == getattr(signal, "SIGPROF", None):
            return _LostError(f"no mark within {self._seconds:g} s of computing")
        how = f"was ended by signal {-code}" if code < 0 else f"ended with code {code}"
        return _LostError(f"the grading process {how}")
