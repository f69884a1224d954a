"""Chat templates, rendered in a process of its own: they are programs, by whoever made the model.

Run as a file, it reads a request from each line of its input and writes an answer as a line.
"""

import contextlib
import json
import sys
from typing import Any

SECONDS = 10
MEMORY = 1 << 30
CHARACTERS = 1 << 24


def main(seconds: int) -> None:
    """Answers requests until its input ends; each may take so many seconds of a processor."""
    from transformers.utils.chat_template_utils import render_jinja_template

    _limit_memory()
    for line in sys.stdin.buffer:
        _limit_seconds(seconds)
        try:
            (text,), _ = render_jinja_template(**json.loads(line))
            answer = {"text": text}
            if len(text) > CHARACTERS:
                answer = {"error": f"it makes over {CHARACTERS >> 20} million characters"}
        except MemoryError:
            answer = {"error": f"it needs over {MEMORY >> 30} GiB of memory"}
        except Exception as error:  # A template raises whatever its author wrote.
            answer = {"error": (str(error) or type(error).__name__)[:10_000]}
        print(json.dumps(answer), flush=True)


def _limit_memory() -> None:
    with contextlib.suppress(ImportError, OSError, ValueError):  # Not on every system.
        import resource

        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))


def _limit_seconds(seconds: int) -> None:
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        usage: Any = resource.getrusage(resource.RUSAGE_SELF)
        _, most = resource.getrlimit(resource.RLIMIT_CPU)
        allowed = int(usage.ru_utime + usage.ru_stime) + seconds + 1
        resource.setrlimit(resource.RLIMIT_CPU, (allowed, most))


if __name__ == "__main__":
    main(int(sys.argv[1]))
