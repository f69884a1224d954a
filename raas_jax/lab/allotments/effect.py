"""What it really does to a model's next tokens that one head, or one layer, has few pages.

    python -m raas_jax.lab.allotments.effect MODEL allotment.json --out effect.jsonl --heads 20

The reference for measures that are cheap: all heads keep everything but those of one place, which
are held to a few pages, and KL(dense || changed) is what comes out at the end of the model. Each
file's losses at that size are then ranked against it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from raas_jax import load
from raas_jax.decode import DecodeState
from raas_jax.lab.fidelity.measure import Followed, dense_outputs, follow
from raas_jax.lab.fidelity.texts import texts_in_turns
from raas_jax.params import Params
from raas_jax.policies import Allotment, Boundary, Evidence, Page, RaaS
from raas_jax.policies.base import Metadata

Place = tuple[int, int | None]
"""A layer, and a key/value head of it; None for all."""


class Held(NamedTuple):
    """Metadata: RaaS's own, and how many slots each head may use, int32 `[L, B, K]`."""

    inner: Metadata
    slots: jax.Array


@dataclasses.dataclass(frozen=True)
class Narrowed(RaaS):
    """RaaS where each row's heads may use fewer slots than there are, by data."""

    def init(self, shape: tuple[int, int, int, int]) -> Any:
        return Held(super().init(shape), jnp.full(shape[:3], shape[3], jnp.int32))

    def observe(self, meta: Any, evidence: Evidence, now: jax.Array) -> Any:
        return meta._replace(inner=super().observe(meta.inner, evidence, now))

    def commit(self, meta: Any, slot: jax.Array, page: Page, now: jax.Array) -> Any:
        return meta._replace(inner=super().commit(meta.inner, slot, page, now))

    def victim(self, meta: Any, boundary: Boundary) -> jax.Array:
        within = jnp.arange(boundary.fill.shape[-1]) < meta.slots[..., None]
        narrowed = boundary._replace(allowed=boundary.allowed & within)
        return super().victim(meta.inner, narrowed)

    def stamps(self, meta: Any) -> jax.Array | None:
        return super().stamps(meta.inner)


def effects(
    params: Params,
    texts: Sequence[Sequence[int]],
    places: Sequence[Place],
    *,
    pages: int,
    page_size: int,
    prompt_tokens: int,
    rows: int,
) -> Iterator[tuple[Place, int, float]]:
    """For each place and text: their numbers, and the mean KL over the tokens after the prompt.

    Args:
      params: the model.
      texts: of one length.
      places: which heads are held to so many `pages` of `page_size` tokens, one place at a time.
      prompt_tokens: how many of the first tokens are kept whatever happens.
      rows: pairs of a place and a text that are fed at once.
    """
    ample = -(-len(texts[0]) // page_size) * page_size
    policy = Narrowed(ample, page_size=page_size)
    outputs = [dense_outputs(params, text) for text in texts]
    pairs = [(place, number) for place in places for number in range(len(texts))]
    for first in range(0, len(pairs), rows):
        batch = pairs[first : first + rows]
        full = batch + [batch[-1]] * (rows - len(batch))  # One shape, one program.
        narrowing = _narrowing([place for place, _ in full], pages)
        fed = [texts[number] for _, number in full], [outputs[number] for _, number in full]
        for step in follow(params, policy, *fed, prompt_tokens, prepare=narrowing):
            if isinstance(step, list):
                yield from _of_batch(batch, step)


def _of_batch(
    batch: Sequence[tuple[Place, int]], found: Sequence[Followed]
) -> Iterator[tuple[Place, int, float]]:
    for (place, number), followed in zip(batch, found, strict=False):
        yield place, number, float(np.mean(followed.differences.kl, dtype=np.float64))


def _narrowing(places: Sequence[Place], pages: int) -> Any:
    def prepare(state: DecodeState) -> DecodeState:
        (held,) = state.meta
        slots = np.array(held.slots)
        for row, (layer, head) in enumerate(places):
            slots[layer, row, slice(None) if head is None else head] = pages
        return dataclasses.replace(state, meta=(held._replace(slots=jnp.asarray(slots)),))

    return prepare


def ranked(found: dict[Place, float], allotment: Allotment, tokens: int) -> tuple[float, float]:
    """Spearman's rank correlation of losses at a size with the effects: of heads, and of layers.

    NaN where there are fewer than three.
    """
    losses = losses_at(allotment, tokens)
    heads = [(losses[layer, head], kl) for (layer, head), kl in found.items() if head is not None]
    layers = [(losses[layer].sum(), kl) for (layer, head), kl in found.items() if head is None]
    return _spearman(heads), _spearman(layers)


def losses_at(allotment: Allotment, tokens: int) -> np.ndarray:
    """What each head loses with so many tokens, `[L, K]`."""
    curves = allotment.losses.reshape(-1, len(allotment.sizes))
    at = [np.interp(tokens, allotment.sizes, curve) for curve in curves]
    return np.asarray(at).reshape(allotment.losses.shape[:2])


def _spearman(pairs: Sequence[tuple[float, float]]) -> float:
    if len(pairs) < 3:
        return float("nan")
    ranks = np.argsort(np.argsort(np.asarray(pairs), axis=0), axis=0)
    return float(np.corrcoef(ranks[:, 0], ranks[:, 1])[0, 1])


def main() -> None:
    """The command line; a file of effects that was begun goes on."""
    parser = argparse.ArgumentParser(description="Hold one place to few pages at a time.")
    parser.add_argument("model", metavar="MODEL", help="as for raas-jax generate")
    parser.add_argument("files", nargs="+", metavar="FILE", help="allotments, ranked in the end")
    parser.add_argument("--out", required=True, metavar="FILE", help="lines of JSON, added to")
    parser.add_argument("--pages", type=int, default=4)
    parser.add_argument("--heads", type=int, default=20, help="evenly by the first file's losses")
    parser.add_argument("--text", nargs="*", default=[], metavar="[KIND=]FILE")
    parser.add_argument("--texts", type=int, default=1, help="texts of each kind")
    parser.add_argument("--skip", type=int, default=4, help="texts of each kind to pass over")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a text")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--rows", type=int, default=16)
    given = parser.parse_args()
    params, page_size = load(given.model), 16
    files = {file: Allotment.read(file) for file in given.files}
    texts = texts_in_turns(params, given.text, given.length, given.texts, given.skip)
    out, known = Path(given.out), {}
    if out.exists():
        known = dict(map(_read, out.read_text(encoding="utf-8").splitlines()))
    places = _places(files[given.files[0]], given.heads, given.pages * page_size)
    left = [place for place in places if not all((place, n) in known for n in range(len(texts)))]
    asked = effects(
        params,
        [text.tokens for text in texts],
        left,
        pages=given.pages,
        page_size=page_size,
        prompt_tokens=given.prompt_tokens,
        rows=given.rows,
    )
    for place, number, kl in asked:
        known[place, number] = kl
        with out.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps([*place, number, kl]) + "\n")
    found = {
        place: float(np.mean([known[place, n] for n in range(len(texts))])) for place in places
    }
    print("| File | Heads | Layers |\n|---|---:|---:|")
    for file, allotment in files.items():
        heads, layers = ranked(found, allotment, given.pages * page_size)
        print(f"| {file} | {heads:.2f} | {layers:.2f} |")


def _read(line: str) -> tuple[tuple[Place, int], float]:
    layer, head, number, kl = json.loads(line)
    return ((layer, head), number), kl


def _places(allotment: Allotment, heads: int, tokens: int) -> list[Place]:
    """All layers, and heads spread evenly over the order of their losses."""
    order = np.argsort(losses_at(allotment, tokens), axis=None, kind="stable")
    some = order[np.unique(np.linspace(0, len(order) - 1, heads).round().astype(int))]
    chosen: list[Place] = [(int(n) // allotment.heads, int(n) % allotment.heads) for n in some]
    return [*chosen, *((layer, None) for layer in range(allotment.layers))]


if __name__ == "__main__":
    main()
