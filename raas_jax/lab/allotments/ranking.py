"""How well cheap measures rank heads and layers, against what shrinking them really does.

    python -m raas_jax.lab.allotments.ranking MODEL allotment.json --out effect.jsonl --heads 20

Each file's losses at a size are ranked against the effects of that size, of some heads and of all
layers.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from raas_jax import load
from raas_jax.lab.allotments.effect import Place, effects
from raas_jax.lab.fidelity.texts import texts_in_turns
from raas_jax.policies import Allotment, RaaS


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
    return allotment.lost(np.full((allotment.layers, allotment.heads), tokens))


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
    params, policy = load(given.model), RaaS()
    tokens = given.pages * policy.page_size
    files = {file: Allotment.read(file) for file in given.files}
    texts = texts_in_turns(params, given.text, given.length, given.texts, given.skip)
    out, known = Path(given.out), {}
    if out.exists():
        known = dict(map(_read, out.read_text(encoding="utf-8").splitlines()))
    places = _places(files[given.files[0]], given.heads, tokens)
    left = [place for place in places if not all((place, n) in known for n in range(len(texts)))]
    asked = effects(
        params,
        [text.tokens for text in texts],
        left,
        policy,
        given.pages,
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
        heads, layers = ranked(found, allotment, tokens)
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
