"""Means over texts and their intervals, on sums that are known."""

from __future__ import annotations

import numpy as np
import pytest

from raas_jax.lab.fidelity.findings import Findings
from raas_jax.lab.fidelity.run import BLOCK, block_starts
from raas_jax.lab.runs.results import Results

PROMPT, LENGTH = 100, 1000
KINDS = ("a", "b")
STARTS = block_starts(PROMPT + 1, LENGTH)
TOKENS = np.diff([*STARTS, LENGTH])


def point(label):
    return {"label": label, "Policy": label.split()[0], "budget": 8, "own_budget": 8, "bytes": 1024}


def folder(path, losses):
    """A run in which policies have these losses per token, `[texts, blocks]`."""
    texts = [{"kind": kind, "name": f"{kind} {n}"} for n in range(3) for kind in KINDS]
    config = {
        "kind": "fidelity",
        "model": "m",
        "dtype": "float32",
        "reference": "one",
        "block": BLOCK,
        "prompt_tokens": PROMPT,
        "length": LENGTH,
        "texts": texts,
        "points": [point(label) for label in losses],
    }
    with Results.open(path, config, {}) as results:
        for label, loss in {"dense": np.zeros((6, len(STARTS))), **losses}.items():
            for text, row in zip(texts, loss * TOKENS, strict=True):
                sums = {"nll": (row + TOKENS).tolist(), "kl": row.tolist()}
                sums["agree"] = (TOKENS * 0.5).tolist()
                named = {"task": text["kind"], "policy": label, "item": text["name"], "sample": 0}
                span = {"span": [PROMPT + 1, LENGTH], "seconds": 1.0, "kv_bytes": 1}
                results.add({**named, **sums, **span})
    return Findings(Results.read(path))


@pytest.fixture(scope="module")
def losses():
    rng = np.random.default_rng(3)
    one = rng.gamma(2.0, 0.1, (6, len(STARTS)))
    return {"one 8": one, "two 8": one + 0.05 + rng.normal(0, 0.001, one.shape)}


def test_blocks_cover_every_position_once():
    assert STARTS[0] == PROMPT + 1 and TOKENS.sum() == LENGTH - PROMPT - 1
    assert (STARTS[1:] % BLOCK == 0).all() and TOKENS.max() == BLOCK
    np.testing.assert_array_equal(block_starts(64, 200), [64, 128, 192])
    np.testing.assert_array_equal(block_starts(65, 66), [65])


def test_means_and_intervals(losses, tmp_path):
    findings = folder(tmp_path / "run", losses)
    one, two = findings.points
    found = findings.estimate(one, "kl")
    mean = np.average(losses["one 8"].mean(0), weights=TOKENS)
    assert found.value == pytest.approx(mean)
    # Blocks are independent here, so that the interval is about that of a plain mean.
    wanted = 1.96 * losses["one 8"].std() / losses["one 8"].size ** 0.5
    assert wanted < found.high - found.value < 2.5 * wanted
    assert wanted < found.value - found.low < 2.5 * wanted
    assert findings.estimate(one, "excess").value == pytest.approx(mean)
    assert findings.estimate(one, "agree").value == pytest.approx(0.5)
    paired = findings.estimate(two, "kl", one)
    assert paired.value == pytest.approx(0.05, abs=1e-3)
    assert paired.high - paired.low < 0.002  # What both have in common does not widen it.
    assert [each.label for each in findings.ordered()] == ["one 8", "two 8"]


def test_parts(losses, tmp_path):
    findings = folder(tmp_path / "run", losses)
    one = findings.points[0]
    late = STARTS >= 512
    of_b = losses["one 8"][1::2]
    found = findings.estimate(one, "kl", kind="b", since=512)
    assert found.value == pytest.approx(np.average(of_b[:, late].mean(0), weights=TOKENS[late]))
    assert findings.estimate(one, "kl", kind="c") is None
    whole = (
        findings.estimate(one, "kl", since=0, until=512),
        findings.estimate(one, "kl", since=512),
    )
    assert all(whole)


def test_a_text_that_one_policy_lacks(losses, tmp_path):
    findings = folder(tmp_path / "run", losses)
    lines = (tmp_path / "run" / "samples.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "run" / "samples.jsonl").write_text("".join(lines[:-1]))
    findings = Findings(Results.read(tmp_path / "run"))
    one, two = findings.points
    assert len(one.texts) == 6 and len(two.texts) == 5
    paired = findings.estimate(two, "kl", one)
    assert paired.value == pytest.approx(0.05, abs=1e-3)
