"""What differs between two configurations, for people who must make them the same."""

from __future__ import annotations

import json
from typing import Any


def differences(there: Any, here: Any, name: str = "") -> list[str]:
    """What differs between two JSON values, one readable line each."""
    if isinstance(there, dict) and isinstance(here, dict):
        names = [*there, *(key for key in here if key not in there)]
        inside = ((there.get(k, "(none)"), here.get(k, "(none)"), f"{name}.{k}") for k in names)
    elif isinstance(there, list) and isinstance(here, list) and len(there) == len(here):
        inside = ((a, b, f"{name}[{i}]") for i, (a, b) in enumerate(zip(there, here, strict=True)))
    elif there == here:
        return []
    else:
        return [f"{name.lstrip('.')}: {_short(there)} → {_short(here)}"]
    return [line for a, b, inner in inside for line in differences(a, b, inner)]


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 120 else text[:117] + "..."
