"""Traces: the replayed attention against the decode, the pictures' numbers, and the files."""

import dataclasses
import json
import re

import numpy as np
import pytest
from tiny import QWEN3, WINDOWS, prompts_of, random_params
from tiny_lemma import save_tiny

import raas_jax
from raas_jax.cli.main import main
from raas_jax.lab.inspect.replay import replay
from raas_jax.lab.runs import record
from raas_jax.lab.tasks.lemma.milestones import written
from raas_jax.lab.trace import draw_milestones, trace
from raas_jax.lab.trace.draw import forgotten, held_over_time, line_labels, live_pages, stamp_ages
from raas_jax.policies import RaaS

PROMPT = "a = 4; b = 9; c = a + b; d = c - a; ? d"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def params(model):
    return raas_jax.load(model)


@pytest.mark.parametrize(
    ("policy", "config"),
    [
        (RaaS(8, page_size=4, alpha=0.05), QWEN3),
        (RaaS(4, page_size=2, dense_layers=1), QWEN3),
        (RaaS(8, page_size=4, alpha=0.05), WINDOWS),
    ],
    ids=["raas", "dense layer", "windows"],
)
def test_replay_draws_the_tokens_of_the_decode(policy, config):
    params = random_params(config)
    prompt = prompts_of([6])[0]
    ((_, recording),) = record(params, [prompt], [40], policy, stop_tokens=(), every_step=True)
    drawn = []
    layers = dict(replay(params, prompt, recording, drawn))
    assert drawn == recording.tokens and list(layers) == [0, 1]
    assert len(set(drawn)) > 3
    for layer, attention in layers.items():
        K, G, T = attention.shape
        assert (K, G, T) == (2, 40, 6 + 39)
        for g in range(1, G):
            held = recording.present[(g - 1) // policy.page_size, layer]
            page = np.arange(T - 6) // policy.page_size
            gone = ~held[:, page] | (np.arange(T - 6) >= g)
            assert (attention[:, g, 6:][gone] == 0).all()
            assert (attention[:, g, 6:][~gone] > 0).all()


def test_stamps_are_the_last_step_with_enough_attention():
    """The replayed mass, compared with alpha, gives the stamps that the decode recorded."""
    # One query head for each key/value head, so that the page's mass is the sum of its tokens'.
    config = raas_jax.ModelConfig(19, 8, 10, 2, 2, 2, 4, qk_norm=True, model_type="qwen3")
    params, prompt = random_params(config), prompts_of([5])[0]
    policy = RaaS(12, page_size=4, alpha=0.12)
    ((_, recording),) = record(params, [prompt], [33], policy, stop_tokens=(), every_step=True)
    compared = 0
    for layer, attention in replay(params, prompt, recording):
        for step in range(32):
            open_page = step // 4
            for page in range(open_page):
                tokens = slice(5 + 4 * page, 9 + 4 * page)
                mass = attention[:, step + 1, tokens].sum(-1)
                kept = recording.present[open_page, layer, :, page]
                # A page is stamped too when it is written, for the step after it.
                fresh = step == 4 * (page + 1)
                sure = kept & (np.abs(mass - policy.alpha) > 1e-4) & (not fresh)
                stamped = recording.stamps[step, layer, :, page] == step + 1
                np.testing.assert_array_equal(stamped[sure], (mass > policy.alpha)[sure])
                compared += sure.sum()
    assert compared > 100


def test_a_trace_of_a_problem(params):
    found = trace(params, PROMPT, RaaS(8, page_size=4), max_new_tokens=30)
    assert found.words[0] == "<bos>" and len(found.generated) == len(found.recording.tokens)
    assert list(found.attention) and len(found.attention) == 2
    assert found.first_error is not None  # Random weights do not reason.
    assert 0 < found.evicted() < found.pages
    head = next(iter(found.attention))
    gone = forgotten(found, head)
    assert gone.shape == found.attention[head].shape
    assert (found.attention[head][gone] == 0).all() and gone.any()
    ages = stamp_ages(found, head)
    assert ages.shape == (29, found.pages) and np.nanmin(ages) == 0
    assert line_labels(found)[0][0] == 0


def with_right_answer(found):
    """The trace, as if its tokens were the right derivation, for what is computed from words."""
    words = found.problem.derivation_words[: len(found.generated)]
    first = found.prompt_tokens
    return dataclasses.replace(
        found, words=(*found.words[:first], *words), milestones=written(first, words)
    )


def test_what_the_pictures_say_about_milestones(params):
    found = with_right_answer(trace(params, PROMPT, RaaS(8, page_size=4), max_new_tokens=54))
    assert found.first_error is None or found.first_error == len(found.generated)
    names, held = held_over_time(found)
    assert names == ["a", "b", "c", "d"][: len(names)] and len(names) >= 3
    assert np.nanmin(held) < 1  # Two pages cannot hold it all.
    for lookup in found.milestones.lookups:
        token = lookup.position - found.prompt_tokens
        row = names.index(lookup.name)
        assert held[row, token] == found.share_held(token, lookup.sources)
    live = live_pages(found)
    for lookup in found.milestones.lookups:
        token, source = (p - found.prompt_tokens for p in (lookup.position, lookup.sources[-1]))
        assert live[token - 1, source // 4]
    assert [text for _, text in line_labels(found)][:3] == ["a = 4", "b = 9", "c = a + b"]


def test_heads_and_prompts_are_checked(params):
    with pytest.raises(ValueError, match="heads has 2.0, which does not exist; layers are 0 to 1"):
        trace(params, PROMPT, RaaS(8, page_size=4), heads=[(2, 0)], max_new_tokens=8)
    plain = trace(params, "a a a", RaaS(8, page_size=4), heads=[(1, 1)], max_new_tokens=20)
    assert plain.milestones is None and list(plain.attention) == [(1, 1)]
    with pytest.raises(ValueError, match="no milestones"):
        draw_milestones(plain)


def test_the_command_writes_pictures_and_one_page(model, tmp_path, capsys):
    out = tmp_path / "out"
    args = ["trace", PROMPT, "-m", model, "-o", str(out), "--budget", "8", "--page-size", "4"]
    assert main([*args, "-n", "40"]) == 0
    printed = capsys.readouterr().out
    assert "RaaS, 8 tokens in pages of 4" in printed and "first wrong token" in printed
    for picture in ("waterfall.png", "pages.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")
    page = (out / "index.html").read_text()
    data = json.loads(page.split('id="data">')[1].split("</script>")[0])
    assert set(re.findall(r"\bD\.(\w+)", page)) <= set(data)
    # Nothing is fetched: every source is inlined, and there is no address in it.
    assert "http://" not in page and "https://" not in page and "{{" not in page
    sources = re.findall(r'(?:src|href)="([^"]{0,22})', page)
    assert len(sources) >= 2 and set(sources) == {"data:image/png;base64,"}


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("a = 4; b = x + a; ? b", "before it is defined"),
        ("a = 4; b = 2; c = a / b; ? c", "no division"),
        ("a = 4; a = 2; ? a", "repeats 'a'"),
    ],
)
def test_typed_problems_are_checked(prompt, said, tmp_path, capsys):
    for command in (["generate", prompt], ["trace", prompt, "--out", str(tmp_path / "out")]):
        assert main([*command, "--model", "demo"]) == 2
        assert said in capsys.readouterr().err


def test_wrong_options(tmp_path, capsys):
    out = ["--out", str(tmp_path / "out")]
    assert main(["trace", PROMPT, "--heads", "1,2", *out]) == 2
    assert "layer.head" in capsys.readouterr().err
    assert main(["trace", *out]) == 2
    assert "--definitions" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
