"""Real weights beside transformers on torch, in float32.

SmolLM2-135M-Instruct is made by a script beside the checkout, where there is one. Other models are
tried where REAL_MODELS is a folder of Hugging Face folders; those with windows on a text of three.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path
from pydoc_data import topics

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import raas_jax
from raas_jax import RaaS, RowRequest, Session, tokenizer
from raas_jax.model import forward

torch = pytest.importorskip("torch", reason="torch is the reference")
pytestmark = pytest.mark.once

TEXT = (
    "A train leaves at nine and runs at 60 miles an hour. Another leaves an hour later and runs at "
    "80 miles an hour on the same track. To find when the second reaches the first, we"
)
TOKENS = 200
GIVEN = os.environ.get("REAL_MODELS")
NAMES = sorted(each.name for each in Path(GIVEN).iterdir()) if GIVEN else ["smollm2"]


@pytest.fixture(scope="module", params=NAMES)
def folder(request, tmp_path_factory):
    if GIVEN:
        return Path(GIVEN) / request.param
    script = request.getfixturevalue("shared") / "models" / "real_models.py"
    pytest.importorskip("gguf", reason="the script reads GGUF: pip install gguf")
    out = tmp_path_factory.mktemp("real") / request.param
    done = subprocess.run(
        [sys.executable, str(script), request.param, str(out)], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"{script.name} made no {request.param}: {done.stderr.splitlines()[-1:]}")
    return out


@pytest.fixture(scope="module")
def ids(folder):
    params = raas_jax.load(folder)
    if not (window := params.config.window):
        return tokenizer.encode(params, TEXT)[0][0]
    manual = "\n".join(topics.topics.values())
    return tokenizer.encode(params, manual[: 20 * window])[0][0][: 3 * window]


@pytest.fixture(scope="module")
def reference(folder, ids):
    """Logits `[T, V]` of the text, and the greedy tokens after it, by transformers."""
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        out = network(torch.tensor([ids]), use_cache=True)
        logits, tokens = out.logits[0].numpy(), []
        for _ in range(TOKENS):
            tokens.append(int(out.logits[0, -1].argmax()))
            out = network(torch.tensor([tokens[-1:]]), past_key_values=out.past_key_values)
    del network, out
    gc.collect()
    return logits, tokens


@pytest.fixture(scope="module")
def params(folder, reference):
    return raas_jax.load(folder, dtype="float32")


def test_logits(params, ids, reference):
    got = jax.jit(forward, static_argnums=0)(params.config, params.weights, jnp.asarray([ids]))[0]
    np.testing.assert_allclose(got, reference[0], atol=1e-3, rtol=0)


def test_greedy_tokens(params, ids, reference):
    """Whatever they are: no stop token ends a row. The budget holds all of them."""
    session = Session.create(params, RaaS(2 * TOKENS), [len(ids)], TOKENS)
    state, progress = session.start([ids], RowRequest.create([TOKENS]))
    seen = [session.read(progress)]
    while not seen[-1].done.all():
        state, progress = session.advance(state, 2)
        seen.append(session.read(progress))
    tokens = np.concatenate([each.tokens[:, 0] for each in seen])[:TOKENS]
    assert tokens.tolist() == reference[1]
