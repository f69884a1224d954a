"""Random damage: to bytes, and to values within JSON and YAML."""

from __future__ import annotations

import json
import random
from typing import Any

import yaml

# What no field expects: each is drawn in the place of a value.
NASTY: list[Any] = [
    *(None, True, False, 0, -1, 1.5, 1e-300, 1e308, float("nan"), float("inf"), 2**31, 2**63),
    *(10**9, 10**12, 10**30, -(10**30), 10**400, "", " ", "0", "x" * 5000, "\x1b[31m", "\0"),
    *("../../etc/passwd", "/dev/zero", "naïve \U0001f642", "{}", [], {}, [[]], [None], {"": 0}),
    *([1, "2", 3.0], {"type": "x"}, [0] * 3000),
]
DEEP = ["[" * 100_000, '{"a":' * 50_000, "[" * 900 + "]" * 900, "- " * 5000]


def damaged(data: bytes, draws: random.Random, name: str) -> bytes:
    """The contents of a file, a few of its bytes or values changed."""
    if name.endswith((".json", ".jsonl", ".yaml")) and draws.random() < 0.6:
        try:
            return _values_changed(data.decode(), draws, name).encode("utf-8", "surrogatepass")
        except (ValueError, yaml.YAMLError):
            pass  # It was damaged before.
    return _bytes_changed(data, draws)


def _values_changed(text: str, draws: random.Random, name: str) -> str:
    if name.endswith(".jsonl"):
        lines = text.splitlines()
        at = draws.randrange(len(lines))
        lines[at] = _values_changed(lines[at], draws, "line.json")
        return "\n".join(lines) + "\n"
    if draws.random() < 0.1:
        return draws.choice(DEEP)
    value = yaml.safe_load(text) if name.endswith(".yaml") else json.loads(text)
    for _ in range(draws.choice((1, 1, 2, 5))):
        value = _changed(value, draws)
    return yaml.safe_dump(value) if name.endswith(".yaml") else json.dumps(value)


def _changed(value: Any, draws: random.Random) -> Any:
    """The value, with one drawn from within it replaced, dropped, doubled or wrapped."""
    if not isinstance(value, dict | list) or not value or draws.random() < 0.05:
        return draws.choice([*NASTY, [value], {"value": value}, str(value)[:1000]])
    value = dict(value) if isinstance(value, dict) else list(value)
    keys = list(value) if isinstance(value, dict) else range(len(value))
    key = draws.choice(keys)
    way = draws.random()
    if way < 0.15:
        del value[key]
    elif way < 0.2 and isinstance(value, list):
        value += value
    elif way < 0.25 and isinstance(value, dict):
        value[draws.choice(["", "version", "type", "extra"])] = draws.choice(NASTY)
    else:
        value[key] = _changed(value[key], draws)
    return value


def _bytes_changed(data: bytes, draws: random.Random) -> bytes:
    found = bytearray(data)
    for _ in range(draws.choice((1, 1, 1, 3, 20))):
        at, way = draws.randrange(len(found) + 1), draws.randrange(7)
        if way == 0:
            del found[at:]  # Cut off.
        elif way == 1 and at < len(found):
            found[at] ^= 1 << draws.randrange(8)
        elif way == 2:
            found[at:at] = draws.randbytes(draws.choice((1, 8, 300)))
        elif way == 3:
            del found[at : at + draws.choice((1, 8, 300))]
        elif way == 4:
            found[at : at + 8] = draws.choice((b"\xff" * 8, b"\0" * 8, b"9" * 8))
        elif way == 5:
            found[:0] = draws.choice((b"\xef\xbb\xbf", b"\0", b"["))
        else:
            found[at:at] = found[: draws.choice((16, 4096))]
    return bytes(found)
