"""Chat templates with a limit of time and memory."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import threading
from typing import Any

from raas_jax.tokenizer import template_worker

# By the clock, with what a start takes on a busy machine; of a processor it is much less.
_DEADLINE = 120.0
_lock = threading.Lock()


def start() -> None:
    """Begins what takes a second at first, while the caller does something else."""
    with _lock:
        _process(os.getpid())


def render(**request: Any) -> str:
    """As `render_jinja_template` of transformers, for one chat.

    Raises:
      ValueError: the template refuses the chat, or takes too much; says so in its own words.
    """
    line = json.dumps(request).encode() + b"\n"
    with _lock:
        process = _process(os.getpid())
        if process.poll() is not None:  # It was killed, as where memory was short, while it waited.
            _process.cache_clear()
            process = _process(os.getpid())
        try:
            answer = json.loads(_ask(process, line))
        except BaseException:  # Ctrl-C too: the next question must not get this one's answer.
            _process.cache_clear()
            process.kill()
            process.communicate()
            raise
    if "error" in answer:
        raise ValueError(answer["error"])
    return str(answer["text"])


@functools.lru_cache(maxsize=1)
def _process(pid: int) -> subprocess.Popen[bytes]:
    """The worker of this process, which ends with its input; a fork must not share its parent's."""
    return subprocess.Popen(
        [sys.executable, "-P", template_worker.__file__, str(template_worker.SECONDS)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is for the decoding.
    )


def _ask(process: subprocess.Popen[bytes], line: bytes) -> bytes:
    assert process.stdin is not None and process.stdout is not None
    timer = threading.Timer(_DEADLINE, process.kill)
    timer.start()
    try:
        process.stdin.write(line)
        process.stdin.flush()
        answer = process.stdout.readline()
    except BrokenPipeError:
        answer = b""
    finally:
        timer.cancel()
    if not answer.endswith(b"\n"):
        raise ValueError(
            f"the process that renders it ended; it may take {template_worker.SECONDS} s and "
            f"{template_worker.MEMORY >> 30} GiB"
        )
    return answer
