"""The door between the library and the disk: everything that is read or replaced passes it.

What is read may be damaged, cut, enormous, of another version, or made by somebody hostile. One
error, `FileError`, says which file it is, what was found, what was wanted and what to do.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import math
import os
import re
import secrets
import stat
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, TypeVar, cast

import yaml

from raas_jax import checks

T = TypeVar("T")
MOST_BYTES: Final = 1 << 27
"""Of a file that is read whole; the index of the largest model takes a tenth of it."""
MOST_DEPTH: Final = 64
"""Of values within values."""
_REQUIRED: Final = object()
_LEFTOVER = re.compile(r"\..+\.[0-9a-f]{16}\.tmp")


class FileError(ValueError):
    """A file or folder that cannot be taken for what it should be.

    Attributes:
      path: which one.
    """

    def __init__(self, path: str | os.PathLike[str], what: str):
        self.path = Path(path)
        super().__init__(checks.printable(f"{path} {what}"))


def read_bytes(file: str | os.PathLike[str], most: int = MOST_BYTES) -> bytes:
    """The bytes of a regular file.

    Raises:
      FileNotFoundError: there is none. OSError: it cannot be read.
      FileError: it is a folder, a pipe or a device, or larger than `most` bytes.
    """
    with opened(file) as descriptor:
        size = os.fstat(descriptor).st_size
        if size > most:
            raise FileError(file, f"has {size} bytes; at most {most} are read. Is it another file?")
        with os.fdopen(os.dup(descriptor), "rb") as stream:
            return stream.read(most)


@contextlib.contextmanager
def opened(file: str | os.PathLike[str]) -> Iterator[int]:
    """A descriptor of a regular file, to be read; what else it is raises `FileError`."""
    # A pipe without a writer would block for ever; this does not, and changes nothing for files.
    try:
        descriptor = os.open(file, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except FileNotFoundError as error:
        raise FileNotFoundError(error.errno, "there is no such file", os.fspath(file)) from None
    except ValueError as error:  # A null byte in the name.
        raise FileError(os.fspath(file), f"is no name of a file ({error}).") from None
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise FileError(file, "is a folder, a pipe or a device; expected a regular file.")
        yield descriptor
    finally:
        os.close(descriptor)


def read_text(file: str | os.PathLike[str], most: int = MOST_BYTES) -> str:
    """The text of a regular UTF-8 file, without a byte order mark; raises as `read_bytes`."""
    try:
        return read_bytes(file, most).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise FileError(file, f"is not UTF-8 text ({error}); save it as UTF-8.") from None


def lines(file: str | os.PathLike[str], most: int = MOST_BYTES) -> Iterator[str]:
    """The lines of a regular file of any size, with their ends; bytes that are no UTF-8 become �.

    Raises as `read_bytes`; `most` is the length of a line.
    """
    with opened(file) as descriptor:
        stream = os.fdopen(os.dup(descriptor), "r", encoding="utf-8-sig", errors="replace")
        with stream:
            while line := stream.readline(most):
                if len(line) == most:
                    raise FileError(file, f"has a line of over {most} characters.")
                yield line


def parse_json(text: str) -> Any:
    """The value of a JSON text: of bounded depth, its strings without halves of a character.

    Raises:
      ValueError: says what is wrong with it.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError(f"it is nested more than {MOST_DEPTH} deep") from None
    _check_value(value)
    return value


def read_json(file: str | os.PathLike[str], remedy: str = "") -> Any:
    """The value in a JSON file; raises as `read_bytes`, and `FileError` for what is no JSON."""
    return _parsed(file, parse_json, "JSON", remedy)


def read_fields(file: str | os.PathLike[str], remedy: str = "") -> dict[str, Any]:
    """As `read_json`, of a file that holds one object."""
    return _named(file, read_json(file, remedy), remedy)


def read_yaml(file: str | os.PathLike[str], remedy: str = "") -> dict[str, Any]:
    """The named fields in a YAML file; raises as `read_json`. References are refused."""
    return _named(file, _parsed(file, _parse_yaml, "YAML", remedy), remedy)


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """Takes 1e-6 for a number, as YAML 1.2 and JSON do; for PyYAML it is text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), None
)


def _parse_yaml(text: str) -> Any:
    try:
        depth = 0
        for event in yaml.parse(text, yaml.SafeLoader):
            # Nine lines of references to references are a billion values.
            if isinstance(event, yaml.AliasEvent):
                raise ValueError("it has references (*name), which are not taken; write them out")
            # PyYAML's time grows with the square of the depth.
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            if depth > MOST_DEPTH:
                raise ValueError(f"it is nested more than {MOST_DEPTH} deep")
        value = yaml.load(text, _Loader)
    except RecursionError:
        raise ValueError(f"it is nested more than {MOST_DEPTH} deep") from None
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
    _check_value(value)
    return value


def _parsed(
    file: str | os.PathLike[str], parse: Callable[[str], Any], language: str, remedy: str
) -> Any:
    text = read_text(file)
    try:
        return parse(text)
    except ValueError as error:
        raise FileError(file, _sentences(f"is not valid {language} ({error})", remedy)) from None


def _named(file: str | os.PathLike[str], value: Any, remedy: str) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        what = f"holds a {type(value).__name__}; expected named fields"
        raise FileError(file, _sentences(what, remedy))
    return value


def _sentences(first: str, second: str) -> str:
    return f"{first}. {second}".strip()


def _check_value(value: Any) -> None:
    """Raises ValueError for what is too deep, and for text that no file can hold."""
    level, depth = [value], 0
    while level:
        if depth > MOST_DEPTH:
            raise ValueError(f"it is nested more than {MOST_DEPTH} deep")
        inner: list[Any] = []
        for each in level:
            if isinstance(each, dict):
                inner += [*each, *each.values()]
            elif isinstance(each, list | tuple):
                inner += each
            elif isinstance(each, str) and not each.isascii():
                try:
                    each.encode()
                except UnicodeEncodeError:
                    raise ValueError(f"it holds half of a character ({each[:40]!a})") from None
        level, depth = inner, depth + 1


class Fields:
    """Named values from a file, each taken with its type and its range.

    A missing field without a default, a wrong type and a value out of range raise `FileError`. A
    default stands for a field that is missing; where it is None, also for one that is null.
    """

    def __init__(
        self, values: Any, path: str | os.PathLike[str], place: str = "", remedy: str = ""
    ):
        """`place` is where in the file the values are, such as "rows[3]"; `remedy` a sentence."""
        self.path, self._place, self._remedy = path, place, remedy
        if not isinstance(values, Mapping):
            raise self.error(f"{place or 'it'} is {checks.short(values)}; expected named fields")
        self.values: Mapping[str, Any] = values

    def error(self, what: str) -> FileError:
        """The error that says `what` of this file."""
        return FileError(self.path, _sentences(f"cannot be used: {what.rstrip('.')}", self._remedy))

    def integer(
        self, name: str, least: int, most: int = checks.INT32_MAX, default: Any = _REQUIRED
    ) -> Any:
        """An int in a range."""
        return self._take(name, default, lambda at, x: checks.integer(at, x, least, most))

    def real(
        self,
        name: str,
        wanted: str = "a finite number",
        least: float = -math.inf,
        most: float = math.inf,
        default: Any = _REQUIRED,
    ) -> Any:
        """A finite number in a range, which `wanted` puts in words."""
        return self._take(name, default, lambda at, x: checks.real(at, x, wanted, least, most))

    def flag(self, name: str, default: Any = _REQUIRED) -> Any:
        """True or false."""
        return self._typed(name, default, bool, "true or false")

    def text(self, name: str, default: Any = _REQUIRED) -> Any:
        """A string."""
        return self._typed(name, default, str, "text")

    def choice(self, name: str, choices: Collection[str], default: Any = _REQUIRED) -> Any:
        """One of some strings."""
        return self._take(name, default, lambda at, x: checks.choice(at, x, choices))

    def items(self, name: str, default: Any = _REQUIRED) -> Any:
        """A list, of whatever."""
        return self._typed(name, default, list, "a list")

    def texts(self, name: str, default: Any = _REQUIRED) -> Any:
        """A list of strings."""

        def check(at: str, value: Any) -> list[str]:
            if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
                raise TypeError(f"{at} is {checks.short(value)}; it must be a list of texts.")
            return value

        return self._take(name, default, check)

    def integers(self, name: str, least: int, most: int = checks.INT32_MAX) -> Any:
        """A list of ints in a range, at least one."""
        return self._list(name, lambda at, x: checks.integer(at, x, least, most))

    def reals(self, name: str, wanted: str, least: float, most: float = math.inf) -> Any:
        """A list of finite numbers in a range, at least one."""
        return self._list(name, lambda at, x: checks.real(at, x, wanted, least, most))

    def without(self, *names: str) -> Fields:
        """The same but for some names."""
        left = {name: value for name, value in self.values.items() if name not in names}
        return Fields(left, self.path, self._place, self._remedy)

    def over(self, others: Mapping[str, Any]) -> Fields:
        """The same, and what others say where these say nothing."""
        return Fields({**others, **self.values}, self.path, self._place, self._remedy)

    def inner(self, name: str) -> Fields:
        """Named fields within these."""
        value = self._take(name, _REQUIRED, lambda _, x: x)
        return Fields(value, self.path, self._at(name), self._remedy)

    def each(self, name: str) -> list[Fields]:
        """A list of named fields."""
        at = self._at(name)
        return [
            Fields(value, self.path, f"{at}[{i}]", self._remedy)
            for i, value in enumerate(self.items(name))
        ]

    def build(self, kind: Callable[..., T]) -> T:
        """A dataclass made of these fields; what it lacks, does not know or refuses is an error."""
        known = {each.name: each for each in dataclasses.fields(cast(Any, kind)) if each.init}
        for name in self.values:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f" (did you mean {near[0]}?)" if near else ""
                raise self.error(f"{self._at(name)} is not a field of it{hint}")
        for name, field in known.items():
            unset = field.default is field.default_factory is dataclasses.MISSING
            if unset and name not in self.values:
                raise self.error(f"it lacks {self._at(name)}")
        try:
            return kind(**self.values)
        except (TypeError, ValueError) as error:
            raise self.error(f"{self._place}: {error}" if self._place else str(error)) from None

    def _at(self, name: str) -> str:
        return f"{self._place}.{name}" if self._place else name

    def _typed(self, name: str, default: Any, kind: type, wanted: str) -> Any:
        def check(at: str, value: Any) -> Any:
            if not isinstance(value, kind):
                raise TypeError(f"{at} is {checks.short(value)}; it must be {wanted}.")
            return value

        return self._take(name, default, check)

    def _list(self, name: str, check: Callable[[str, Any], Any]) -> Any:
        def check_all(at: str, value: Any) -> list[Any]:
            if not isinstance(value, list) or not value:
                raise TypeError(f"{at} is {checks.short(value)}; it must be a list of numbers.")
            return [check(f"{at}[{i}]", each) for i, each in enumerate(value)]

        return self._take(name, _REQUIRED, check_all)

    def _take(self, name: str, default: Any, check: Callable[[str, Any], Any]) -> Any:
        value = self.values.get(name, default)
        if value is _REQUIRED:
            raise self.error(f"it lacks {self._at(name)}")
        if value is default or (value is None and default is None):
            return default
        try:
            return check(self._at(name), value)
        except (TypeError, ValueError) as error:
            raise self.error(str(error)) from None


def replace_text(file: str | os.PathLike[str], text: str) -> None:
    """As `replace_bytes`, with the text as UTF-8."""
    replace_bytes(file, text.encode())


def replace_bytes(file: str | os.PathLike[str], data: bytes) -> None:
    """Writes a file that is the old or the new one, whole, after a kill or on a full disk.

    Raises OSError; nothing is left behind then.
    """
    path = Path(file)
    fresh = path.with_name(temporary_name(path.name))
    try:
        # Made anew, so that a link which lies in wait under this name is not followed.
        with open(fresh, "xb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(fresh, path)
    except BaseException:
        with contextlib.suppress(OSError):
            fresh.unlink()
        raise


def temporary_name(name: str) -> str:
    """A name that nobody can foresee, for what will be called `name` once it is whole."""
    return f".{name[:200]}.{secrets.token_hex(8)}.tmp"


def is_leftover(name: str) -> bool:
    """Whether a file or folder of this name is what a killed process had begun to write."""
    return _LEFTOVER.fullmatch(name) is not None
