"""Reading and writing one safetensors file, tensor by tensor.

The format is eight bytes of header length, a JSON header, then the tensors' bytes. The library
`safetensors` checks a file; the bytes are read here, because its NumPy reader knows no bfloat16
and maps a whole file into memory, while a checkpoint should pass through one tensor at a time.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import mmap
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from raas_jax.files import FileError, opened

DTYPES: dict[str, np.dtype] = {
    "F32": jnp.dtype("float32"),
    "F16": jnp.dtype("float16"),
    "BF16": jnp.dtype("bfloat16"),
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
_BLOCK = 1 << 24


class Entry(NamedTuple):
    """Where a tensor lies: its file, its type code ("BF16"), shape and first and last byte."""

    file: Path
    code: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def size(self) -> int:
        """Bytes of the tensor."""
        return self.end - self.begin

    def parts(self) -> list[Entry]:
        """The tensors that it consists of along its first axis."""
        count, *rest = self.shape
        size = self.size // max(1, count)
        begins = range(self.begin, self.begin + count * size, max(1, size))
        return [Entry(self.file, self.code, tuple(rest), at, at + size) for at in begins]

    def read(self, dtype: np.dtype) -> np.ndarray:
        """The tensor as a new array of `dtype`; nothing else of the file is kept."""
        return read_tensor(self, dtype)


def read_header(file: Path) -> tuple[dict[str, Entry], list[str]]:
    """The tensors of a file, and the names which it holds more than once.

    Raises FileError for a file that is cut short or is not a safetensors file.
    """
    twice: list[str] = []

    def pairs(items: list[tuple[str, object]]) -> dict[str, object]:
        counts = Counter(name for name, _ in items)
        twice.extend(name for name, count in counts.items() if count > 1)
        return dict(items)

    try:
        with _open(file) as stream:
            with safe_open(file, framework="numpy"):
                pass  # Opening checks the header against the file: offsets, sizes and total length.
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length), object_pairs_hook=pairs)
        header.pop("__metadata__", None)
        entries: dict[str, Entry] = {}
        for name, tensor in header.items():
            begin, end = (8 + length + offset for offset in tensor["data_offsets"])
            entries[name] = Entry(file, tensor["dtype"], tuple(tensor["shape"]), begin, end)
    except FileError:
        raise
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise FileError(
            file, f"is not a whole safetensors file ({reason}): cut short or corrupt; copy it anew."
        ) from error
    return entries, twice


@contextlib.contextmanager
def _open(file: Path) -> Iterator[io.BufferedReader]:
    with opened(file) as descriptor, os.fdopen(os.dup(descriptor), "rb") as stream:
        yield stream


def read_tensor(entry: Entry, dtype: np.dtype) -> np.ndarray:
    """One tensor as a new array of `dtype`; nothing else of the file is kept."""
    values = _read(entry, DTYPES[entry.code])
    if values.dtype == dtype:
        return values
    cast = buffer(entry.shape, dtype)
    with np.errstate(over="ignore"):  # `check_finite` says it better.
        np.copyto(cast, values, casting="unsafe")
    return cast


def read_bytes(entry: Entry) -> np.ndarray:
    """The same of a tensor of type "U8"."""
    return _read(entry, np.dtype(np.uint8))


def _read(entry: Entry, dtype: np.dtype) -> np.ndarray:
    values = buffer(entry.shape, dtype)
    with _open(entry.file) as stream:
        stream.seek(entry.begin)
        if stream.readinto(values.reshape(-1).view(np.uint8).data) != entry.size:
            raise FileError(entry.file, "ended inside a tensor; it is being written, or cut.")
    return values


def buffer(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An empty array whose memory goes back to the system at once; the heap would keep some."""
    size = math.prod(shape)
    memory = mmap.mmap(-1, max(1, size * dtype.itemsize))
    return np.frombuffer(memory, dtype, size).reshape(shape)


def same_bytes(a: Entry, b: Entry) -> bool:
    """Whether two tensors are equal, compared a block at a time."""
    if (a.code, a.shape) != (b.code, b.shape):
        return False
    return all(x == y for x, y in zip(_blocks(a), _blocks(b), strict=True))


def _blocks(entry: Entry) -> Iterator[bytes]:
    with _open(entry.file) as stream:
        stream.seek(entry.begin)
        for offset in range(0, entry.size, _BLOCK):
            yield stream.read(min(_BLOCK, entry.size - offset))


def write_file(
    file: Path, shapes: dict[str, tuple[int, ...]], dtype: np.dtype, tensors: Iterable[np.ndarray]
) -> None:
    """Writes a file whose `tensors` come in the order of `shapes`, all of one dtype."""
    # transformers refuses a file that does not say which framework's layout it has.
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": CODES[dtype], "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("xb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for shape, tensor in zip(shapes.values(), tensors, strict=True):
            assert tensor.shape == shape and tensor.dtype == dtype
            stream.write(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data)
