"""Frequencies and attention factors of every kind of rope, beside those of transformers."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from tiny import QWEN3, prompts_of, random_params

import raas_jax
from raas_jax import Dense, RaaS
from raas_jax.config import ModelConfig
from raas_jax.files import FileError
from raas_jax.rope import Rope
from raas_jax.rotation import frequencies, rope_rotation, rotate

HEAD_DIM, CONTEXT = 16, 256
SIZES = {
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 4 * HEAD_DIM,
    "intermediate_size": 72,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
    "rope_theta": 500.0,
}
SHORT, LONG = [1.0 + i / 8 for i in range(8)], [2.0 + i * i for i in range(8)]
SCALINGS = [
    {"rope_type": "linear", "factor": 3.0},
    {"rope_type": "dynamic", "factor": 4.0},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    | {"original_max_position_embeddings": 64},
    {"rope_type": "yarn", "factor": 4.0},
    {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 32},
    {"rope_type": "yarn", "factor": 0.5, "original_max_position_embeddings": 64},
    {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64}
    | {"attention_factor": 1.25, "beta_fast": 8, "beta_slow": 0.5},
    {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64}
    | {"truncate": False, "mscale": 0.7, "mscale_all_dim": 1.3, "beta_fast": None},
    {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64}
    | {"mscale": 0.7, "mscale_all_dim": 0, "beta_fast": 0},
    # Both ends on one pair.
    {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 4},
    {"rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG}
    | {"original_max_position_embeddings": 64},
    {"rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG, "factor": 2.0}
    | {"original_max_position_embeddings": 64},
    {"rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG}
    | {"attention_factor": 1.5, "original_max_position_embeddings": 64},
    {"rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG},
]


@pytest.mark.parametrize("scaling", SCALINGS, ids=str)
@pytest.mark.parametrize("length", [1, 64, 65, 256, 257, 1000])
def test_frequencies_are_those_of_transformers(scaling, length):
    torch = pytest.importorskip("torch", reason="transformers needs it for its rope")
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    fields = {**SIZES, "rope_scaling": dict(scaling)}
    rope = ModelConfig.from_hf(fields).rope
    theirs = LlamaConfig.from_dict({**SIZES, "rope_scaling": dict(scaling)})
    kind = scaling.get("rope_type", scaling.get("type"))
    expected, factor = ROPE_INIT_FUNCTIONS[kind](theirs, torch.device("cpu"), seq_len=length)
    seen = jnp.asarray([length])
    found = frequencies(rope, HEAD_DIM, seen, seen)
    found = found[0] if found.ndim == 2 else found
    np.testing.assert_allclose(found, expected.numpy(), rtol=2e-6)
    assert rope.attention_factor == pytest.approx(factor, rel=1e-12)
    # What is written for others means the same.
    again = {**ModelConfig.from_hf(fields).to_hf(), "model_type": "llama"}
    assert ModelConfig.from_hf(again).rope == rope


def test_lengths_count_row_by_row():
    """Each row by its own length; within the original context all kinds are as they were."""
    positions = jnp.broadcast_to(jnp.arange(6), (3, 6))
    rope = Rope(500.0, "dynamic", 4.0, original_max_position_embeddings=64)
    lengths = jnp.asarray([[6], [64], [200]])
    cos = rope_rotation(rope, HEAD_DIM, positions, seen=lengths)[0]
    plain = rope_rotation(Rope(500.0), HEAD_DIM, positions)[0]
    np.testing.assert_array_equal(cos[:2], plain[:2])
    assert np.abs(cos[2] - plain[2]).max() > 0.01
    alone = rope_rotation(rope, HEAD_DIM, positions[2:], seen=lengths[2:])[0]
    np.testing.assert_array_equal(cos[2:], alone)


def test_longrope_goes_by_what_a_text_may_become():
    own = {"short_factor": tuple(SHORT), "long_factor": tuple(LONG)}
    rope = Rope(500.0, "longrope", **own, original_max_position_embeddings=64)
    positions = jnp.arange(6)[None]

    def cos(**lengths):
        lengths = {name: jnp.asarray([[value]]) for name, value in lengths.items()}
        return np.asarray(rope_rotation(rope, HEAD_DIM, positions, **lengths)[0])

    np.testing.assert_array_equal(cos(seen=6, total=64), cos())
    np.testing.assert_array_equal(cos(seen=6, total=65), cos(seen=65))
    assert np.abs(cos(seen=6, total=65) - cos()).max() > 0.01


def test_a_part_of_a_head_is_rotated():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1, 5, 2, HEAD_DIM)).astype(np.float32)
    rope = Rope(500.0, partial=0.5)
    positions = jnp.arange(5)[None]
    found = rotate(jnp.asarray(x), rope_rotation(rope, HEAD_DIM, positions))
    whole = rope_rotation(Rope(500.0), HEAD_DIM // 2, positions)
    np.testing.assert_array_equal(found[..., :8], rotate(jnp.asarray(x[..., :8]), whole))
    np.testing.assert_array_equal(found[..., 8:], x[..., 8:])


@pytest.mark.parametrize(
    ("scaling", "named"),
    [
        ({"rope_type": "yarn"}, "lacks rope_scaling.factor"),
        ({"rope_type": "yarn", "factor": "4"}, "rope_scaling.factor is '4'"),
        ({"rope_type": "yarn", "factor": 4.0, "truncate": "no"}, "truncate is 'no'"),
        ({"rope_type": "longrope", "short_factor": SHORT}, "lacks rope_scaling.long_factor"),
        (
            {"rope_type": "longrope", "short_factor": SHORT[:7], "long_factor": LONG[:7]},
            "short_factor has 7 entries; one for each of the 8 pairs",
        ),
        (
            {"rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG[:7]},
            "short_factor has 8 entries, long_factor 7",
        ),
        (
            {"rope_type": "longrope", "short_factor": SHORT, "long_factor": [0.0] * 8},
            r"long_factor\[0\] is 0.0",
        ),
        ({"rope_type": "mrope", "factor": 1.0}, "rope_type is 'mrope'.*longrope"),
    ],
)
def test_what_is_no_rope_is_named(scaling, named):
    with pytest.raises(FileError, match=named):
        ModelConfig.from_hf({**SIZES, "rope_scaling": scaling})


@pytest.mark.parametrize(
    ("scaling", "context"),
    [
        (None, 256),
        ({"rope_type": "linear", "factor": 4.0}, 256),
        ({"rope_type": "dynamic", "factor": 4.0}, 1024),
        ({"rope_type": "yarn", "factor": 4.0}, 1024),
        # The context that is said was stretched already, or goes beyond.
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 256),
        ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}, 256),
    ],
)
def test_how_far_a_model_can_read(scaling, context):
    assert ModelConfig.from_hf({**SIZES, "rope_scaling": scaling}).context == context


ROPES = {
    "dynamic": Rope(100.0, "dynamic", 4.0, original_max_position_embeddings=12),
    "longrope": Rope(
        100.0,
        "longrope",
        short_factor=(1.0, 1.5),
        long_factor=(2.0, 9.0),
        original_max_position_embeddings=24,
    ),
}


@pytest.mark.parametrize(
    ("kind", "policy"), [("dynamic", Dense()), ("longrope", RaaS(8, page_size=4))], ids=str
)
def test_each_row_goes_by_its_own_length(kind, policy):
    """Beside a longer text, a short one says what it says alone; fed or sampled alike."""
    params = random_params(dataclasses.replace(QWEN3, rope=ROPES[kind], max_position_embeddings=64))
    prompts, limits = prompts_of([3, 20]), [8, 16]
    together = raas_jax.generate(params, prompts, policy=policy, max_new_tokens=16)
    for prompt, out, limit in zip(prompts, together, limits, strict=True):
        # By what the text may become, longrope is chosen: the same limit as beside the other.
        limit = 16 if kind == "longrope" else limit
        alone = raas_jax.generate(params, prompt, policy=policy, max_new_tokens=limit)
        assert list(alone.tokens) == list(out.tokens)[:limit]
        np.testing.assert_allclose(alone.logprobs, out.logprobs[:limit], atol=1e-5)
        scored = raas_jax.score(params, prompt, list(out.tokens), policy=policy)
        np.testing.assert_allclose(scored.logprobs, out.logprobs, atol=1e-4)


def test_what_a_model_is_known_by_stays():
    """Allotments, saved states and run folders of earlier days go by it."""
    first = "theta=10000.0, kind='default', factor=1.0, low_freq_factor=1.0, high_freq_factor=4.0"
    first = f"Rope({first}, original_max_position_embeddings=8192"
    assert repr(Rope()) == f"{first})"
    assert repr(Rope(partial=0.5, beta_slow=2)) == f"{first}, beta_slow=2.0, partial=0.5)"
