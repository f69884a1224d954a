"""Writes allotments by other rules, to be compared at equal bytes with one that was found.

    python -m raas_jax.lab.allotments.rivals MODEL allotment.json --out DIR --text gsm8k=test.jsonl

`raas-jax eval fidelity MODEL --policies raas,raas:allotment=DIR/pyramid.json` then compares them.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from raas_jax import load
from raas_jax.lab.allotments import rules
from raas_jax.lab.allotments.attention import copying, most_attended
from raas_jax.lab.fidelity.texts import texts_in_turns
from raas_jax.params import Params
from raas_jax.policies import Allotment, RaaS
from raas_jax.suited import suited

PAGE_SIZE = 16
PAGES = 16
"""Of a layer's head, on average, where its attention is counted."""


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Write allotments by other rules.")
    parser.add_argument("model", metavar="MODEL", help="as for raas-jax generate")
    parser.add_argument("found", metavar="FILE", help="an allotment of that model")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the files")
    parser.add_argument("--text", nargs="*", default=[], metavar="[KIND=]FILE")
    parser.add_argument("--texts", type=int, default=1, help="texts of each kind")
    parser.add_argument("--skip", type=int, default=12, help="texts of each kind to pass over")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a text")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    params = load(given.model, layers="stacked")
    found = Allotment.read(given.found)
    suited(RaaS(allotment=found), params)  # Is it this model's?
    texts = texts_in_turns(params, given.text, given.length, given.texts, given.skip)
    folder = Path(given.out)
    folder.mkdir(parents=True, exist_ok=True)
    for allotment in rivals(params, found, [list(text.tokens) for text in texts], given.seed):
        file = folder / f"{allotment.made['rule'].replace(' ', '_')}.json"
        allotment.write(file)
        print(f"{file}: {allotment.digest[:8]}", flush=True)


def rivals(
    params: Params, found: Allotment, texts: list[list[int]], seed: int
) -> Iterator[Allotment]:
    """One by each rule, of the model that `found` is of."""
    yield rules.shuffled(found, seed)
    yield rules.at_random(found, seed)
    yield rules.pyramid(found)
    yield rules.two_kinds(found)
    count = most_attended(params, texts, PAGES, PAGE_SIZE)
    yield rules.by_concentration(count, found.model)
    yield rules.by_copying(copying(params, texts), found.model)


if __name__ == "__main__":
    main()
