"""Texts on which policies are compared: windows of equal length out of files of several kinds."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from raas_jax import files, tokenizer
from raas_jax.files import FileError
from raas_jax.params import Params

QUESTIONS, ANSWERS = ("question", "problem", "prompt"), ("solution", "answer", "text")
"""Fields of a JSONL file whose texts are joined, the first of each that a line has."""
CHARACTERS_PER_TOKEN = 16
"""More than any text has on average; what lies beyond is not tokenised."""
# Long modules that every Python brings, of different authors and styles.
_MODULES = ("argparse", "_pydecimal", "typing", "tarfile", "inspect", "difflib", "ast", "zipfile")


@dataclasses.dataclass(frozen=True)
class Text:
    """One window of text.

    Attributes:
      kind: what tables group it by.
      name: its name within the run.
      tokens: ids, of which the first are the prompt.
    """

    kind: str
    name: str
    tokens: tuple[int, ...]

    def config(self) -> dict[str, Any]:
        """What tells it from another, as JSON values."""
        ids = np.asarray(self.tokens, np.int32).tobytes()
        digest = hashlib.blake2b(ids, digest_size=8).hexdigest()
        return {"kind": self.kind, "name": self.name, "tokens": len(self.tokens), "digest": digest}


def default_sources() -> list[tuple[str, list[Path]]]:
    """What every machine with Python has: its library's sources, and the text of its manual."""
    library = Path(sysconfig.get_path("stdlib"))
    sources = [library / f"{name}.py" for name in _MODULES]
    return [
        ("python", [file for file in sources if file.is_file()]),
        ("manual", [library / "pydoc_data" / "topics.py"]),
    ]


def given_sources(texts: Sequence[str]) -> list[tuple[str, list[Path]]]:
    """Sources of `[KIND=]FILE`; the kind is by default the name of the file, or of its folder.

    Raises ValueError for an empty name, and FileNotFoundError for a file that is not there.
    """
    found: dict[str, list[Path]] = {}
    for text in texts:
        kind, named, file = text.rpartition("=")
        if not file or (named and not kind):
            raise ValueError(f"text is {text!r}; write FILE or KIND=FILE.")
        path = Path(file).expanduser()
        if not path.exists():
            raise FileNotFoundError(2, "there is no such file", file)
        # The data sets that people have lie in folders of their name.
        plain = path.stem not in ("test", "train", "validation")
        found.setdefault(kind or (path.stem if plain else path.resolve().parent.name), []).append(
            path
        )
    return list(found.items())


def windows(
    params: Params, kind: str, sources: Sequence[Path], length: int, count: int, skip: int = 0
) -> list[Text]:
    """The next `count` windows of `length` tokens of a kind, after the first `skip`.

    A window lies within one file, and files take turns, so that a few windows see many. Of a JSONL
    file each line is a question and its answer, and a window begins with a line.

    Raises:
      ValueError: the files have too little text. FileError: one of them is no text.
    """
    wanted, found = skip + count, []
    turns = [_of_file(params, source, length) for source in sources]
    in_turns = (text for turn in itertools.zip_longest(*turns) for text in turn if text is not None)
    for number, tokens in enumerate(itertools.islice(in_turns, wanted)):
        if number >= skip:
            found.append(Text(kind, f"{kind} {number}", tuple(tokens)))
    if len(found) < count:
        passed = f", {skip} of them to be passed over" if skip else ""
        raise ValueError(
            f"text of the kind {kind!r} has {skip + len(found)} windows of {length} tokens; "
            f"{wanted} are wanted{passed}. Give more files, fewer texts or a smaller length."
        )
    return found


def texts_in_turns(
    params: Params, given: Sequence[str], length: int, count: int, skip: int = 0
) -> list[Text]:
    """`count` windows of every kind of the given sources, or of the default ones; kinds in turn.

    So a run that is stopped has seen all kinds. Raises as `given_sources` and `windows`.
    """
    sources = given_sources(given) if given else default_sources()
    by_kind = [windows(params, kind, found, length, count, skip) for kind, found in sources]
    return [text for same_place in zip(*by_kind, strict=True) for text in same_place]


def _of_file(params: Params, file: Path, length: int) -> Iterator[list[int]]:
    # What the tokenizer puts before a text: a BOS, where the model wants one.
    before = tokenizer.encode(params, "a")[0][0]
    before = before[: len(before) - len(tokenizer.encode_continuation(params, "a", "text"))]
    room, most = length - len(before), CHARACTERS_PER_TOKEN * length
    for passage in _passages(file, most):
        ids = tokenizer.encode_continuation(params, passage, "text")
        if file.suffix == ".jsonl":
            # Begins with a line, so that what is left of the last one is dropped.
            if len(ids) >= room:
                yield [*before, *ids[:room]]
            continue
        for start in range(0, len(ids) - room + 1, room):
            yield [*before, *ids[start : start + room]]


def _passages(file: Path, most: int) -> Iterator[str]:
    """Texts to cut windows from: of JSONL, as many lines as surely fill one."""
    if file.suffix != ".jsonl":
        yield files.read_text(file)
        return
    lines = filter(str.strip, files.lines(file))
    passage: list[str] = []
    for number, line in enumerate(lines, start=1):
        passage.append(_joined(file, number, line))
        if sum(map(len, passage)) >= most // 3:
            yield "\n\n".join(passage)
            passage = []


def _joined(file: Path, number: int, line: str) -> str:
    try:
        values = files.parse_json(line)
        fields = [next(name for name in names if name in values) for names in (QUESTIONS, ANSWERS)]
        return "\n".join(str(values[name]) for name in fields)
    except (ValueError, TypeError, StopIteration):
        raise FileError(
            file,
            f"line {number} is no question with its answer; a line is a JSON object with one of "
            f"{', '.join(QUESTIONS)} and one of {', '.join(ANSWERS)}.",
        ) from None
