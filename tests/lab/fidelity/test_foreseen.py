"""The oracle's victims: what will be looked at least, told by attention that is computed here."""

from __future__ import annotations

import csv
import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import written_out
from tiny import WINDOWS, allotment_of, prompts_of, random_params

import raas_jax
from raas_jax import RaaS, policies
from raas_jax.allotting import dense
from raas_jax.cli.main import main
from raas_jax.decode import RowRequest
from raas_jax.lab.fidelity import measure, oracle, run
from raas_jax.lab.inspect.recording import Recorded
from raas_jax.policies import RandomEviction
from raas_jax.session import Session

P, PROMPT, BUDGET = 4, 6, 16
L, K, G = 2, 2, 2
LENGTHS = [54, 45, 54]
ALLOTMENT = allotment_of(seed=4, most=6)


@pytest.fixture(scope="module")
def params():
    return random_params(sharpness=3.0)


@pytest.fixture(scope="module")
def texts():
    first, second, _ = prompts_of(LENGTHS, 3)
    return [first, second, first]


def attention(params, ids):
    """All shares of a text at once: float64 `[L, K, G, T, T]`, of layers that see everything."""
    _, found = jax.jit(partial(written_out.run, params, attended=written_out.plainly))(ids)
    return np.float64(found).reshape(L, K, G, len(ids), len(ids))


def by_hand(shares, slots):
    """For each page the pages that can be read beside it, of one head's shares `[G, T, T]`."""
    held, found = [], []
    for page in range(-(-(shares.shape[-1] - PROMPT) // P)):
        found.append(set(held))
        end = PROMPT + (page + 1) * P
        if len(held) == slots:
            to_come = [
                shares[:, end:, PROMPT + old * P : PROMPT + (old + 1) * P].sum() for old in held
            ]
            held.pop(int(np.argmin(to_come)))  # Of equal ones the first, which is the oldest.
        held.append(page)
    return found


def fed(params, policy, texts):
    """Numbers of the pages in the slots as each page is fed, for each row, layer and head."""
    longest, prompts = max(map(len, texts)), [ids[:PROMPT] for ids in texts]
    lengths = [PROMPT] * len(texts), longest - PROMPT
    plain = Session.create(params, policy, *lengths)
    state, _ = plain.start(prompts, RowRequest.create([99] * len(texts)))
    scripted = oracle.foresee(params, plain.plan, state, texts, PROMPT).meta
    session = Session.create(params, Recorded(policy), *lengths)
    tokens = np.zeros((longest - PROMPT + P + 1, len(texts)), np.int32)
    for row, ids in enumerate(texts):
        tokens[: len(ids) - PROMPT, row] = ids[PROMPT:]
    state, _ = session.start(prompts, RowRequest.create([99] * len(texts)), force=tokens[0])
    count = len(state.meta) - bool(params.config.window_layers)  # The ring has no diary.
    diaries = zip(state.meta[:count], scripted[:count], strict=True)
    meta = tuple(diary._replace(inner=script) for diary, script in diaries)
    state = dataclasses.replace(state, meta=(*meta, *state.meta[count:]))
    found = []
    for page in range(-(-(longest - PROMPT) // P)):
        tables = [np.asarray(diary.page) for diary in state.meta[:count]]
        found.append([table[layer] for table in tables for layer in range(len(table))])
        state, _ = session.feed(state, tokens[page * P + 1 :][:P])
    return found


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"granularity": "layer"},
        {"allotment": ALLOTMENT},
        {"allotment": ALLOTMENT, "granularity": "layer"},
        {"allotment": ALLOTMENT, "budget": 24, "prompt": "included", "dense_layers": 1},
        {"config": WINDOWS},
    ],
    ids=str,
)
def test_what_will_be_looked_at_least_is_gone(params, texts, options):
    """The pages in the cache, throughout the feed."""
    if config := options.get("config"):
        params = random_params(config, sharpness=3.0)
    options = {name: each for name, each in options.items() if name != "config"}
    policy = oracle.Oracle(**{"budget": BUDGET, "page_size": P} | options)
    pages = policy.budget // P - (-(-PROMPT // P) if policy.prompt == "included" else 0)
    slots = np.full((L, K), pages)
    if policy.allotment:
        allotment = ALLOTMENT.last(L - policy.dense_layers)
        if policy.granularity == "layer":
            allotment = allotment.by_layer()
        slots[policy.dense_layers :] = allotment.pages(pages, P)
        assert len(np.unique(slots)) > 1
    slots[: policy.dense_layers] = 99
    found, others = fed(params, policy, texts), 0
    for row, ids in enumerate(texts):
        shares = attention(params, ids)
        for layer, head in np.ndindex(L, K):
            own = shares[layer, head]
            if policy.granularity == "layer":
                own = shares[layer].reshape(-1, *own.shape[1:])
            for page, held in enumerate(by_hand(own, slots[layer, head])):
                assert set(found[page][layer][row, head].tolist()) - {-1} == held
                others += set(range(page - len(held), page)) != held
    assert others > 9  # It is often not the oldest that goes.


def test_attention_comes_in_blocks_of_any_size(params, monkeypatch):
    """Beside the pages' own ends, and with tokens that are on no page."""
    monkeypatch.setattr(dense, "QUERIES", 7)
    (ids,) = prompts_of([41])
    page = np.arange(41) // 3 - 2
    page[:5] = page[37:] = -1
    member = np.arange(11) == page[:, None]
    x = dense.embed(params, jnp.asarray(ids))
    for layer, shares in enumerate(attention(params, ids)):
        number = jnp.int32(layer)
        after, found = dense.look(
            params, x, number, oracle.between_pages, jnp.asarray(member, float)
        )
        mass = sum(found)
        wanted = np.einsum("kgts,ti,sj->kij", shares, member, member)
        np.testing.assert_allclose(mass, wanted, atol=1e-5)
        np.testing.assert_allclose(after, dense.forward(params, x, number), atol=1e-6)
        x = after


def test_ties_and_slots_by_head():
    """Whole numbers that often tie, against a loop; heads of one slot keep the newest page."""
    n = 9
    mass = np.random.default_rng(0).integers(0, 2, (3, n, n)) * np.tri(n)
    slots = np.asarray([1, 3, 4])
    found = oracle.least_to_come(mass, slots)
    assert found.dtype == np.int32 and found[0].tolist() == [0] * n
    ties = 0
    for head, size in enumerate(slots):
        held = {}
        for page in range(n):
            slot = page
            if page >= size:
                to_come = {old: mass[head, page + 1 :, old].sum() for old in held}
                least = [old for old, sum_ in to_come.items() if sum_ == min(to_come.values())]
                ties += len(least) > 1
                slot = held.pop(min(least))
            held[page] = slot
            assert found[head, page] == slot
    assert ties > 3


def loss(params, policy, texts):
    """Mean KL from dense over the texts."""
    outputs = [measure.dense_outputs(params, ids) for ids in texts]
    *_, found = measure.follow(params, policy, texts, outputs, PROMPT)
    return np.mean([each.differences.kl.mean() for each in found])


@pytest.mark.parametrize("allotment", [None, ALLOTMENT])
def test_it_loses_less_than_chance(params, allotment):
    texts, given = prompts_of([54] * 8, 7), {"page_size": P, "allotment": allotment}
    mine = loss(params, oracle.Oracle(BUDGET, **given), texts)
    chance = loss(params, RandomEviction(BUDGET - P, every=P, recent=P, **given), texts)
    assert 0 < mine < 0.9 * chance


def test_with_room_for_all_it_is_dense(params):
    assert loss(params, oracle.Oracle(64, page_size=P), prompts_of([54], 7)) < 1e-6


def test_it_has_the_bytes_of_the_reference(params):
    """The same budget, by an allotment too, and its name in tables."""
    tried = [RaaS(64), oracle.Oracle(64), oracle.Oracle(64, allotment=allotment_of(page_size=16))]
    reference, uniform, ragged = run.plan_points(params, tried, PROMPT, 2000)
    assert uniform.policy.budget == ragged.policy.budget == 64
    assert uniform.described["bytes"] <= reference.described["bytes"]
    assert uniform.label == "oracle 64"
    assert ragged.label == f"oracle (allotment={ragged.policy.allotment.digest[:8]}) 64"


def test_the_command(tmp_path, capsys):
    source, file, out = (tmp_path / name for name in ("sums.txt", "allotment.json", "run"))
    source.write_text("".join(f"a = {n} ; b = a + {n} ;\n" for n in range(200)))
    config = raas_jax.load("demo").config
    allotment_of(config).write(file)
    arguments = ["eval", "fidelity", "demo", "--out", str(out), "--text", f"sums={source}"]
    arguments += ["--length", "120", "--prompt-tokens", "20", "--page-sizes", str(P)]
    arguments += ["--texts", "1", "--budgets", "32"]
    assert main([*arguments, "--policies", f"recent,oracle:allotment={file}"]) == 0
    assert "| oracle (page_size=4, allotment=" in capsys.readouterr().out
    rows = list(csv.DictReader((out / "table.csv").open()))
    mine = [row for row in rows if row["policy"].startswith("oracle")]
    assert len(mine) == len(rows) / 2 and {row["own_budget"] for row in rows} == {"32"}
    assert all(float(row["kl"]) >= 0 for row in mine)
    assert main([*arguments, "--policies", "recent,orcale"]) == 2
    assert "Did you mean oracle" in capsys.readouterr().err
    assert main([*arguments, "--policies", "recent,oracle:Mine"]) == 2
    assert "write its options as NAME:OPTION=VALUE" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [["generate", "a = 1 ;", "--policy", "oracle"], ["eval", "lemma", "--policies", "oracle"]],
)
def test_it_is_no_policy_for_users(command, tmp_path, capsys):
    out = ["--out", str(tmp_path / "run")] if command[0] == "eval" else []
    assert main([*command, *out]) == 2
    assert f"policy is 'oracle'; there are {', '.join(policies.available())}." in (
        capsys.readouterr().err
    )
    assert "oracle" not in policies.available()
