r"""Is the answer of this text that one? The process that grades, and the rules it follows.

It runs as a script, so that a grader that hangs or eats memory can be killed, and imports nothing
of the package, so that it starts in a second and without jax.
`raas_jax.lab.tasks.grading.GraderPool`
drives it: a JSON line `{"gold", "text"}` in, a JSON line of `Verdict` out.

What a text answers, the first of these that it has:
1. its last whole `\boxed{...}`, or all boxes of that line together (`\boxed{1}` and `\boxed{-2}`);
2. what follows its last `####`;
3. what follows its last "answer is" or "answer:", up to the end of the line;
4. the last expression that math-verify finds.
What was thought before a `</think>` does not count. A word is compared as a word; everything else
is read and compared by math-verify (https://github.com/huggingface/Math-Verify).
"""

import importlib.util
import json
import os
import re
import signal
import sys
from collections.abc import Callable
from typing import Any, NamedTuple, TextIO

# sympy can ask for more than a machine has; the process gets a MemoryError instead.
MEMORY_BYTES = 4 << 30
# Only the end can hold the answer, and some patterns take long on long texts.
TAIL_CHARACTERS = 4000

_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_PHRASE = re.compile(r"\banswer(?:\s+is|\s*:)(?:\**)\s*:?", re.IGNORECASE)
_WRAPPER = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}")
_BASE = re.compile(r"\d_\{?(\d+)\}?\$?$")
_SENTENCE_END = re.compile(r"\.(?=\s|\**$)")


class Verdict(NamedTuple):
    """A graded answer.

    Attributes:
      correct: whether it equals the reference.
      answer: what was taken for the answer; None if nothing was found.
      error: why it could not be graded; None if it was.
    """

    correct: bool
    answer: str | None = None
    error: str | None = None


Grader = Callable[[str, str], "bool | Verdict"]


def boxes(text: str) -> list[str]:
    """Contents of the boxes of the last line that has a whole one, with their braces matched."""
    found: list[tuple[int, str]] = []
    for start in _BOX.finditer(text):
        depth, at = 1, start.end()
        while at < len(text) and depth:
            step = text[at]
            if step == "\\":
                at += 1  # An escaped brace is no brace.
            depth += (step == "{") - (step == "}")
            at += 1
        if not depth:
            found.append((start.start(), text[start.end() : at - 1]))
    if not found:
        return []
    line = text.rfind("\n", 0, found[-1][0])
    return [inside for at, inside in found if at > line]


def stated(text: str) -> list[str]:
    """The readings of what a text states to be its answer; empty where it states none."""
    text = text.rpartition("</think>")[2]
    inside = boxes(text)
    if inside:
        return [inside[-1]] + ([", ".join(inside)] if len(inside) > 1 else [])
    if "####" in text:
        return [text.rpartition("####")[2].strip().split("\n")[0]]
    phrases = list(_PHRASE.finditer(text))
    if phrases:
        line = text[phrases[-1].end() :].strip().split("\n")[0]
        sentence = _SENTENCE_END.split(line.strip(" *"))[0].strip(" *")
        return [sentence] if sentence else []
    return []


def unwrap(text: str) -> str:
    r"""`(073)` for `\textbf{(073)}`: without commands that only choose a font."""
    text = text.strip()
    while found := _WRAPPER.fullmatch(text):
        text = found[1].strip()
    return text


def word(text: str) -> str | None:
    r"""`east` for `\text{East}`, `c` for `\textbf{(C)}`; None for what is not one plain word."""
    bare = unwrap(text.strip().strip("$")).strip(" .*")
    if bare.startswith("(") and bare.endswith(")"):
        bare = bare[1:-1]
    bare = " ".join(bare.split())
    return bare.casefold() if re.fullmatch(r"[^\W\d_]+(?:[ -][^\W\d_]+)*", bare) else None


def same(gold: str, answer: str) -> bool:
    """Whether an answer equals the reference. Raises what math-verify raises."""
    wanted, given = word(gold), word(answer)
    # Letter by letter, "sane" and "seen" are products; a single letter may be a variable.
    if wanted is not None and given is not None:
        return wanted == given
    if wanted is not None and len(wanted) > 1:
        return False
    in_base, given_base = _BASE.search(gold), _BASE.search(answer)
    if in_base and given_base and in_base[1] != given_base[1]:  # math-verify ignores the base.
        return False
    return _compare(gold, _read(answer))


def grade(gold: str, text: str) -> Verdict:
    """Marks a text against the reference answer."""
    readings = stated(text)
    if readings:
        return Verdict(any(same(gold, reading) for reading in readings), readings[-1].strip())
    from math_verify import parse

    end = text.rpartition("</think>")[2][-TAIL_CHARACTERS:]
    found = parse(end, parsing_timeout=None, raise_on_error=True)
    if not found:
        return Verdict(False)
    return Verdict(_compare(gold, found), str(found[-1]))


def _read(answer: str) -> list[Any]:
    from math_verify import parse

    answer = unwrap(answer)
    delimited = re.search(r"\$|\\\(|\\\[", answer.replace(r"\$", ""))
    wordy = "\\" not in answer and re.search(r"(?:^|\s)[A-Za-z]{3,}", answer)
    found: list[Any] = []
    if delimited or wordy:  # `42 apples` is a number; as a formula it would be a product.
        found = parse(answer, parsing_timeout=None, raise_on_error=True)
    return found or parse(f"${answer}$", parsing_timeout=None, raise_on_error=True)


def _compare(gold: str, answer: list[Any]) -> bool:
    from math_verify import verify

    # Six decimals, as math-verify has it; more where the reference has more.
    decimals = max(6, *map(len, re.findall(r"\.(\d+)", gold)), 0)
    failed: Exception | None = None
    for wanted in _read(gold):
        for given in answer:
            try:
                if verify(wanted, given, decimals, timeout_seconds=None, raise_on_error=True):
                    return True
            except Exception as error:  # sympy raises whatever its depths raised.
                failed = error
    if failed is not None:
        raise failed
    return False


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
        if hasattr(signal, "setitimer"):
            # Whoever asked kills a process that is late; if they are gone, it ends by itself.
            signal.setitimer(signal.ITIMER_REAL, 2 * seconds + 5)
        try:
            found = grader(asked["gold"], asked["text"])
            verdict = found if isinstance(found, tuple) else Verdict(bool(found))
        except Exception as error:  # Whatever it is, it is this answer's alone.
            verdict = Verdict(False, None, f"{type(error).__name__}: {error}"[:300])
        answers.write(json.dumps(verdict._asdict()) + "\n")
        answers.flush()


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


if __name__ == "__main__":
    main()
