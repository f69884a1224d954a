"""Chat templates with a limit of time and memory."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import subprocess
import sys
import threading
from typing import Any

from raas_jax.tokenizer import template_worker

_START_SECONDS = 120.0  # Importing transformers on a busy machine.
_lock = threading.Lock()


def render(**request: Any) -> str:
    """As `render_jinja_template` of transformers, for one chat.

    Raises:
      ValueError: the template refuses the chat, or takes too much; says so in its own words.
    """
    with _lock:
        pid = os.getpid()
        try:
            answer = _worker(pid).ask(request)
        except BaseException:  # Ctrl-C too: the next question must not get this one's answer.
            _worker.cache_clear()
            raise
    if "error" in answer:
        raise ValueError(answer["error"])
    return str(answer["text"])


@functools.lru_cache(maxsize=1)
def _worker(pid: int) -> _Worker:
    """The worker of this process; a forked one must not read its parent's answers."""
    return _Worker()


class _Worker:
    """A process of `template_worker`, which ends with its input."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", template_worker.__file__, str(template_worker.SECONDS)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the decoding.
        )
        try:
            self._read(_START_SECONDS)
        except BaseException as error:
            self.close()
            if isinstance(error, ValueError):
                raise ValueError("the process that renders it does not start") from None
            raise

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """The answer to a request. Raises ValueError; the process is of no use after an error."""
        try:
            assert self._process.stdin is not None
            # A broken pipe shows when the answer is read.
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.write(json.dumps(request).encode() + b"\n")
                self._process.stdin.flush()
            # By the clock three times as much: the processors may be busy.
            return self._read(3.0 * template_worker.SECONDS)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                if stream is not None:
                    stream.close()

    def _read(self, seconds: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        timer = threading.Timer(seconds, self._process.kill)
        timer.daemon = True
        timer.start()
        try:
            line = self._process.stdout.readline()
        finally:
            timer.cancel()
        if not line.endswith(b"\n"):
            raise ValueError(
                f"the process that renders it ended; it may take {template_worker.SECONDS} s and "
                f"{template_worker.MEMORY >> 30} GiB"
            )
        answer: dict[str, Any] = json.loads(line)
        return answer
