"""Rotary position embedding: its settings, which `raas_jax.rotation` carries out.

The kinds are those of transformers, by the same names: what a config.json says means the same.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from raas_jax import checks
from raas_jax.files import Fields

# Each with the fields that are its own, by their names in a config.json and in `Rope`.
ROPE_TYPES: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": (
        *("factor", "low_freq_factor", "high_freq_factor"),
        "original_max_position_embeddings",
    ),
    "yarn": (
        *("factor", "original_max_position_embeddings", "attention_factor"),
        *("beta_fast", "beta_slow", "truncate"),
    ),
    "longrope": (
        *("short_factor", "long_factor"),
        *("original_max_position_embeddings", "attention_factor"),
    ),
}
_THETA = ("a number from 1 to 1e30", 1, 1e30)
_POSITIVE = ("a number from 1e-6 to 1e9", 1e-6, 1e9)
_GROWTH = ("a number from 0 to 1000", 0, 1000)
_PARTIAL = ("a number above 0, at most 1", 1e-3, 1)


@dataclasses.dataclass(frozen=True)
class Rope:
    """Settings of a rotary position embedding; a value out of range raises ValueError.

    `kind` is one of `ROPE_TYPES`: "linear" divides every frequency by `factor`; "llama3" divides
    only the low ones and blends in between (Llama 3.1 report, section 3.4.2); "yarn" blends between
    the pairs that turn `beta_fast` and `beta_slow` times within the original context (YaRN, arXiv
    2309.00071); "dynamic" raises the base with the number of tokens beyond the original context
    (NTK-aware scaling, there); "longrope" divides each frequency by its own factor, one list up to
    the original context and one beyond (LongRoPE, arXiv 2402.13753).

    Attributes:
      theta: base of the frequencies.
      kind: how they are scaled.
      factor: by how much the context was stretched.
      low_freq_factor, high_freq_factor: turns within the original context between which llama3
        blends.
      original_max_position_embeddings: the context before it was stretched, in tokens.
      attention_factor: multiplies cosines and sines.
      beta_fast, beta_slow: see above.
      truncate: yarn blends between whole pairs.
      short_factor, long_factor: of longrope, for each pair.
      partial: the share of the head dim, from its beginning, that is rotated at all.
      query_growth: queries are multiplied by `1 + query_growth * log(1 + n)` where the original
        context has gone by n times (Llama 4's temperature).
    """

    theta: float = 10_000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    partial: float = 1.0
    query_growth: float = 0.0

    def __post_init__(self) -> None:
        checks.choice("rope_type", self.kind, ROPE_TYPES)
        checks.field(self, "theta", lambda name, x: checks.real(name, x, *_THETA))
        positive = ("factor", "low_freq_factor", "high_freq_factor")
        for each in (*positive, "attention_factor", "beta_fast", "beta_slow"):
            checks.field(self, each, lambda name, x: checks.real(name, x, *_POSITIVE))
        checks.field(self, "partial", lambda name, x: checks.real(name, x, *_PARTIAL))
        checks.field(self, "query_growth", lambda name, x: checks.real(name, x, *_GROWTH))
        length = "original_max_position_embeddings"
        checks.field(self, length, lambda name, x: checks.integer(name, x, 1))
        for each in ("short_factor", "long_factor"):
            checks.field(self, each, _factors)
        checks.field(self, "truncate", checks.flag)
        if self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"low_freq_factor is {self.low_freq_factor}; it must be less than "
                f"high_freq_factor, {self.high_freq_factor}."
            )
        if len(self.short_factor) != len(self.long_factor):
            raise ValueError(
                f"short_factor has {len(self.short_factor)} entries, long_factor "
                f"{len(self.long_factor)}; they must have as many."
            )

    def __repr__(self) -> str:
        """By the fields that all ropes had first, and of the others those that are set.

        Models are known again by it, so that it must not change where another kind comes.
        """
        fields = dataclasses.fields(self)
        kept = [
            f"{field.name}={getattr(self, field.name)!r}"
            for number, field in enumerate(fields)
            if number < 6 or getattr(self, field.name) != field.default
        ]
        return f"Rope({', '.join(kept)})"

    def rotated(self, head_dim: int) -> int:
        """How many of the numbers of a head are rotated."""
        return int(head_dim * self.partial)

    def check_head(self, head_dim: int) -> None:
        """Raises ValueError where heads of this dim cannot be rotated so."""
        size = self.rotated(head_dim)
        if size % 2 or not size:
            part = f" of which {self.partial} are rotated" if self.partial < 1 else ""
            raise ValueError(f"head_dim is {head_dim}{part}; rotation needs it even.")
        if self.kind == "dynamic" and size < 4:
            raise ValueError(f"head_dim is {head_dim}; a dynamic rope needs at least 4.")
        if self.kind == "longrope" and len(self.short_factor) != size // 2:
            raise ValueError(
                f"short_factor has {len(self.short_factor)} entries; one for each of the "
                f"{size // 2} pairs is needed."
            )

    @classmethod
    def from_hf(
        cls,
        fields: Fields,
        context: int,
        *,
        partial: bool = False,
        original: int | None = None,
        names: Mapping[str, str] | None = None,
        window_theta: tuple[str, float] | None = None,
        window: bool = False,
        grows_queries: bool = False,
    ) -> Rope:
        """Reads `rope_theta` + `rope_scaling` (transformers 4) or `rope_parameters` (5).

        Where there are both, `rope_scaling` is taken alone: it is what people add by hand. But
        where layers with a window have a rope of their own, it is added to that of the others.

        Args:
          fields: of a config.json.
          context: its max_position_embeddings.
          partial: whether models of this family may rotate a part of a head.
          original: of families that say so outside the rope, the context before it was stretched.
          names: the kinds that a family has, by their names in its files; None is all.
          window_theta: of families whose layers with a window have a rope of their own, the field
            with its base, and what that is where it is left out.
          window: this one is wanted.
          grows_queries: there is a field for `query_growth`.
        """
        if window_theta:
            rope = _fields_of_layers(fields, window_theta, window)
        else:
            rope = _own_fields(fields)
        names = names or {name: name for name in ROPE_TYPES}
        kind = names[rope.choice("rope_type", names)]
        share = 1.0
        if partial:
            share = rope.real("partial_rotary_factor", *_PARTIAL, default=1.0)
        elif kind != "default":
            rope.real("partial_rotary_factor", "1", 1, 1, default=None)
        theta = rope.real("rope_theta", *_THETA)
        # Transformers takes the context where the file has no such length.
        length = "original_max_position_embeddings"
        before = original or (
            rope.integer(length, 1) if length in rope.values and kind != "dynamic" else context
        )
        growth = rope.real("llama_4_scaling_beta", *_GROWTH) if grows_queries else 0.0
        own: dict[str, Any]
        if kind == "yarn":
            own = _yarn(rope, context / before)
        elif kind == "longrope":
            own = _longrope(rope, context / before, before)
        else:
            own = {name: rope.real(name) for name in ROPE_TYPES[kind] if name != length}
        if length in ROPE_TYPES[kind] or kind == "dynamic":
            own[length] = before
        try:
            return cls(theta, kind, partial=share, query_growth=growth, **own)
        except (TypeError, ValueError) as error:
            raise fields.error(str(error)) from None

    def to_hf(self) -> dict[str, Any] | None:
        """The `rope_scaling` entry of a config.json, or None where there is no scaling."""
        if self.kind == "default":
            return None
        own = {name: getattr(self, name) for name in ROPE_TYPES[self.kind]}
        return {
            "rope_type": self.kind,
            **{name: list(x) if isinstance(x, tuple) else x for name, x in own.items()},
        }


def _factors(name: str, values: Any) -> tuple[float, ...]:
    given = checks.entries(name, values, "numbers")
    return tuple(checks.real(f"{name}[{i}]", x, *_POSITIVE) for i, x in enumerate(given))


def _own_fields(fields: Fields) -> Fields:
    """What a config.json says of its rope, whichever way it says it."""
    both = ("rope_scaling", "rope_parameters")
    present = [name for name in both if fields.values.get(name) is not None]
    found = {name: fields.inner(name).values for name in present}
    place, given = next(((name, each) for name, each in found.items() if each), ("", {}))
    if nested := [name for name, value in given.items() if isinstance(value, Mapping)]:
        raise fields.error(f"{place} has values of their own for {', '.join(nested)}")
    outside = ("rope_theta", "partial_rotary_factor")
    values = {name: fields.values[name] for name in outside if name in fields.values}
    return Fields(
        {**values, "rope_type": given.get("type", "default"), **given}, fields.path, place
    )


def _fields_of_layers(fields: Fields, window_theta: tuple[str, float], window: bool) -> Fields:
    """What it says of the rope of layers with a window, or of those without."""
    # `rope_scaling` is added to this: transformers goes by its `rope_type` then, not by `type`.
    both: Mapping[str, Any] = {"full_attention": {"rope_type": "default"}}
    if (given := fields.values.get("rope_parameters")) is not None:
        both = fields.inner("rope_parameters").values

    def own(kind: str) -> Fields:
        values = both.get(kind)
        return Fields({} if values is None else values, fields.path, f"rope_parameters.{kind}")

    full, theta = own("full_attention"), fields.values["rope_theta"]
    if fields.values.get("rope_scaling") is not None:
        if both.get("full_attention") is None:
            raise fields.error(f"rope_scaling is beside rope_parameters, {checks.short(given)}")
        added = {**full.values, **fields.inner("rope_scaling").values}
        full = Fields(added, fields.path, "rope_scaling")
    found = full
    if window:
        name, theta = window_theta
        theta, found = fields.values.get(name, theta), own("sliding_attention")
    kind = found.values.get("type", "default")
    return found.over({"rope_theta": theta, "rope_type": kind})


def _yarn(rope: Fields, stretched: float) -> dict[str, Any]:
    # Null is allowed, and means the ratio of the contexts; left out it is not.
    given = rope.values.get("factor", 0) is not None
    factor = rope.real("factor", *_POSITIVE) if given else stretched

    def scale(by: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * by * math.log(factor) + 1.0

    attention = rope.real("attention_factor", *_POSITIVE, default=None)
    if attention is None:
        own, all_dims = (rope.real(name, default=None) for name in ("mscale", "mscale_all_dim"))
        attention = scale(own) / scale(all_dims) if own and all_dims else scale(1.0)
    return {
        "factor": factor,
        "attention_factor": attention,
        "beta_fast": rope.real("beta_fast", default=None) or 32.0,
        "beta_slow": rope.real("beta_slow", default=None) or 1.0,
        "truncate": rope.flag("truncate", True),
    }


def _longrope(rope: Fields, stretched: float, original: int) -> dict[str, Any]:
    factor = rope.real("factor", *_POSITIVE, default=None) or stretched
    attention = rope.real("attention_factor", *_POSITIVE, default=None)
    if attention is None and factor > 1:
        if original < 2:
            raise rope.error(f"original_max_position_embeddings is {original}; it must be above 1")
        attention = math.sqrt(1 + math.log(factor) / math.log(original))
    lists = {name: tuple(rope.reals(name, *_POSITIVE)) for name in ("short_factor", "long_factor")}
    return {**lists, "attention_factor": attention or 1.0}
