"""MXFP4: numbers of four bits, of which 32 in a row have one scale, as gpt-oss keeps its experts.

The format is that of the OCP Microscaling Formats (MX) Specification 1.0: numbers are e2m1, scales
are e8m0, a power of two. They are read as transformers unpacks them.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from raas_jax.weights.safetensors import Entry, buffer, read_bytes

BLOCKS, SCALES = "_blocks", "_scales"
"""What the names of the two tensors end in that are in the place of one."""
_OF_ONE_SCALE = 16
"""Bytes, of two numbers each."""
_AT_A_TIME = 1 << 12
"""Blocks that are unpacked at once."""
# Numbers are doubled and powers halved, of which the last would be infinite.
_POSITIVE = 2 * np.asarray([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], np.float32)
_NUMBERS = np.concatenate([_POSITIVE, -_POSITIVE])
_BYTES = np.arange(256)
# The low half of a byte comes first.
_PAIRS = np.stack([_NUMBERS[_BYTES & 15], _NUMBERS[_BYTES >> 4]], axis=-1)
_POWERS = np.ldexp(np.float32(1), _BYTES - 128)


def unpack(blocks: np.ndarray, scales: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """uint8 `[..., G, 16]` and their scales, uint8 `[..., G]` → `[..., 32 G]` of `dtype`."""
    out = buffer((*scales.shape[:-1], 32 * scales.shape[-1]), dtype)
    flat, rows, powers = out.reshape(-1, 32), blocks.reshape(-1, 16), scales.reshape(-1)
    # So few at a time stay in a processor's cache.
    for start in range(0, len(rows), _AT_A_TIME):
        part = slice(start, start + _AT_A_TIME)
        numbers = np.take(_PAIRS.view(np.float64), rows[part]).view(np.float32)
        with np.errstate(over="ignore"):  # `check_finite` says it better.
            numbers *= np.take(_POWERS, powers[part])[:, None]
            flat[part] = numbers.astype(dtype, copy=False)
    return out


class Packed(NamedTuple):
    """A tensor of which a file has blocks `[..., out, G, 16]` and scales `[..., out, G]`.

    It is `[..., 32 G, out]`: files of gpt-oss have the weights of experts the other way round when
    they are not packed.
    """

    blocks: Entry
    scales: Entry

    @property
    def file(self) -> Path:
        """Where the blocks are."""
        return self.blocks.file

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor, once it is unpacked."""
        *lead, out, groups = self.scales.shape
        return *lead, 2 * _OF_ONE_SCALE * groups, out

    def parts(self) -> list[Packed]:
        """Those that it consists of along the first axis."""
        both = zip(self.blocks.parts(), self.scales.parts(), strict=True)
        return [Packed(*part) for part in both]

    def read(self, dtype: np.dtype) -> np.ndarray:
        """As `Entry.read`."""
        blocks, scales = (read_bytes(entry) for entry in self)
        return np.swapaxes(unpack(blocks, scales, dtype), -1, -2)


def paired(
    entries: dict[str, Entry], names: Iterable[str]
) -> tuple[dict[str, Entry | Packed], list[str]]:
    """The same with the tensors of these names for those that are in their place.

    And a line for each pair that does not fit together, which is left out.
    """
    found: dict[str, Entry | Packed] = dict(entries)
    problems = []
    for name in names:
        pair = [entries.get(f"{name}{ending}") for ending in (BLOCKS, SCALES)]
        blocks, scales = pair
        if name in entries or blocks is None or scales is None:
            continue
        for ending in (BLOCKS, SCALES):
            del found[f"{name}{ending}"]
        fits = blocks.shape == (*scales.shape, _OF_ONE_SCALE)
        if fits and blocks.code == scales.code == "U8":
            found[name] = Packed(blocks, scales)
        else:
            own = " and ".join(f"{each.code} {list(each.shape)}" for each in (blocks, scales))
            what = f"expected U8, and [..., {_OF_ONE_SCALE}] for [...]"
            problems.append(f"misshapen: {name}{BLOCKS} and {SCALES} are {own}, {what}")
    return found, problems
