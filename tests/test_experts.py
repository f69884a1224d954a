"""Mixtures of experts: every way to compute them, against NumPy, and models with them."""

import dataclasses
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec
from tiny import MOE, prompts_of, random_params

import raas_jax
from pallas_kernels import Target, grouped_product
from raas_jax import RaaS, experts, identity
from raas_jax.sharding import weight_shardings
from raas_jax.weights import load, save_hf, save_orbax


def oracle(x, logits, stacks, layer, k, normalise, limits=None):
    """The sum over the k likeliest experts of a row, in float64."""
    stacks = [np.asarray(stack[layer], np.float64) for stack in stacks]
    gate, up, down, *biases = stacks
    of_gate, of_up, of_down = biases or [0 * stack[..., 0] for stack in stacks]
    out = np.zeros(x.shape)
    for row, own in enumerate(np.asarray(x, np.float64)):
        share = np.exp(logits[row] - logits[row].max())
        share /= share.sum()
        best = np.argsort(-share, kind="stable")[:k]
        total = share[best].sum() if normalise else 1.0
        for expert in best:
            g, u = gate[expert] @ own + of_gate[expert], up[expert] @ own + of_up[expert]
            if limits is None:
                inner = g / (1 + np.exp(-g)) * u
            else:
                g, u = np.where(g > limits.most, limits.most, g), np.fmin(u, limits.most)
                u = np.where(u < -limits.most, -limits.most, u)
                inner = (u + 1) * g / (1 + np.exp(-limits.alpha * g))
            out[row] += share[expert] / total * (down[expert] @ inner + of_down[expert])
    return out


WAYS = [
    experts._one_by_one, experts._grouped, experts._in_blocks, experts._by_all, experts._by_kernel
]  # fmt: skip
LIMITS = experts.Limits(0.7, 1.702)


@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=8, deadline=None)
@given(
    rows=st.sampled_from([1, 3, 40]),
    # More than one block of an expert, and experts without a token.
    count=st.sampled_from([1, 2, 7]),
    most=st.integers(1, 3),
    normalise=st.booleans(),
    biased=st.booleans(),
    limits=st.sampled_from([None, LIMITS]),
    seed=st.integers(0, 99),
)
def test_every_way_is_the_sum_of_the_chosen(
    way, rows, count, most, normalise, biased, limits, seed
):
    k, (L, F, D) = min(most, count), (2, 5, 3)
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, D)).astype(np.float32)
    logits = (3 * rng.normal(size=(rows, count))).astype(np.float32)
    shapes = [(L, count, F, D), (L, count, F, D), (L, count, D, F)]
    shapes += [shape[:-1] for shape in shapes if biased]
    stacks = [rng.normal(size=shape).astype(np.float32) for shape in shapes]
    shares, chosen = experts.route(jnp.asarray(logits), k, normalise)
    assert chosen.shape == (rows, k)
    stacks = [jnp.asarray(stack).at[0].set(1e9) for stack in stacks]  # The other layer.
    own = experts.Experts(*stacks[:3], jnp.int32(1), *stacks[3:], limits=limits)
    with mock.patch.object(experts, "_mix_here", way):
        got = experts.mixture(jnp.asarray(x), shares, chosen, own)
    wanted = oracle(x, np.asarray(logits, np.float64), stacks, 1, k, normalise, limits)
    np.testing.assert_allclose(got, wanted, rtol=2e-5, atol=2e-5)


def test_all_ways_have_the_same_derivative():
    rng = np.random.default_rng(0)
    x, weights = rng.normal(size=(5, 3)), rng.normal(size=(5, 3))
    shapes = (1, 4, 6, 3), (1, 4, 6, 3), (1, 4, 3, 6)
    stacks = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]
    routed = experts.route(jnp.asarray(rng.normal(size=(5, 4)), jnp.float32), 2, True)

    def total(x, way):
        return jnp.sum(weights * way(x, *routed, experts.Experts(*stacks, jnp.int32(0))))

    found = [jax.grad(total)(jnp.asarray(x, jnp.float32), way) for way in WAYS]
    for each in found[1:]:
        np.testing.assert_allclose(each, found[0], rtol=1e-4, atol=1e-5)


def test_files_layouts_and_identity(tmp_path):
    """Out to files and back, in stacks or layer by layer, it is the same model."""
    params = random_params(MOE)
    save_hf(params, tmp_path / "hf")
    save_orbax(params, tmp_path / "orbax")
    ids = prompts_of([5, 17])
    wanted = [list(out.tokens) for out in raas_jax.generate(params, ids, max_new_tokens=12)]
    for folder in ("hf", "orbax"):
        found = load(tmp_path / folder, dtype="float32")
        for each in (found.stacked(), found.separate()):
            assert identity.of_model(each) == identity.of_model(params)
            assert identity.likeness(each) == identity.likeness(params)
            out = raas_jax.generate(each, ids, max_new_tokens=12)
            assert [list(each.tokens) for each in out] == wanted
    save_hf(load(tmp_path / "hf", dtype="float32"), tmp_path / "again")
    written = (tmp_path / "again" / "model.safetensors").read_bytes()
    assert written == (tmp_path / "hf" / "model.safetensors").read_bytes()


def test_rows_do_not_know_of_each_other():
    """Many rows are computed expert by expert, one row choice by choice."""
    params, prompts, policy = random_params(MOE), prompts_of([3, 20, 9, 1]), RaaS(8, page_size=4)
    together = raas_jax.generate(params, prompts, policy=policy, max_new_tokens=20)
    for prompt, out in zip(prompts, together, strict=True):
        alone = raas_jax.generate(params, prompt, policy=policy, max_new_tokens=20)
        assert list(alone.tokens) == list(out.tokens)
        np.testing.assert_allclose(alone.logprobs, out.logprobs, atol=1e-4)


@pytest.mark.parametrize(
    ("data", "model", "rows", "width", "sums"),
    [(2, 2, 8, 64, 1), (2, 1, 8, 128, 0), (1, 2, 16, 64, 1), (1, 3, 16, 128, 0)],
)
def test_on_a_mesh_of_gpus_each_has_its_part(monkeypatch, data, model, rows, width, sums):
    """Of the rows, and of the width of every expert where it can be split."""
    given = []

    def product(x, stacks, owner, layer, target):
        given.append(([stack.shape[2:] for stack in stacks], target.mesh is None))
        return grouped_product(x, stacks, owner, layer, implementation="xla")

    def mix(x, shares, chosen, own):
        given.append(x.shape)
        return way(x, shares, chosen, own)

    way = experts._by_kernel
    monkeypatch.setattr(experts, "grouped_product", product)
    monkeypatch.setattr(experts, "_by_kernel", mix)
    axes = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.sharding.AbstractMesh((data, model), ("data", "model"), axis_types=axes)
    target = Target("gpu", "NVIDIA H100 80GB HBM3", mesh)

    def layer(x, shares, chosen, *stacks):
        own = experts.Experts(*stacks, jnp.int32(0), target=target)
        return experts.mixture(x, shares, chosen, own)

    (R, k, E, F, D), dtype = (16, 2, 4, 128, 64), jnp.bfloat16
    shapes = [(R, D), (R, k), (R, k), (2, E, F, D), (2, E, F, D), (2, E, D, F)]
    kinds = [dtype, jnp.float32, jnp.int32, dtype, dtype, dtype]
    arrays = [jax.ShapeDtypeStruct(*each) for each in zip(shapes, kinds, strict=True)]
    found = jax.make_jaxpr(layer)(*arrays)
    cut = model < 3
    assert given == [(rows, D), ([(width, D)] * 2, cut), ([(D, width)], cut)]
    assert str(found).count("psum") == sums
    assert found.out_avals[0].shape == (R, D)


def test_what_experts_are_not():
    for changes, named in [
        ({"num_experts_per_tok": 7}, "num_experts_per_tok is 7"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok is 0"),
        ({"moe_intermediate_size": 0}, "moe_intermediate_size is 0"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"swiglu_limit": 0.0}, "swiglu_limit is 0"),
        ({"swiglu_alpha": None}, "swiglu_alpha is None"),
        ({"num_experts": 0, "num_experts_per_tok": 0, "expert_bias": True}, "expert_bias is True"),
    ]:
        with pytest.raises(ValueError, match=named):
            dataclasses.replace(MOE, **changes)


def test_widths_are_split_over_a_mesh():
    """Every device has a share of every expert, so that all of them work for each token."""
    mesh = jax.sharding.AbstractMesh((1, 2), ("data", "model"))
    found = weight_shardings(MOE, mesh)
    for name, spec in [
        ("gate", (None, None, "model", None)),
        ("down", (None, None, None, "model")),
    ]:
        assert found[f"expert_{name}"].spec == PartitionSpec(*spec)


def test_what_a_step_reads_of_experts():
    """One row reads those that it chose, many read all."""
    assert experts.share_read(128, 8, 1) == 1 / 16
    assert experts.share_read(128, 8, 16) == experts.share_read(128, 8, 64) == 1
    assert experts.share_read(0, 0, 4) == 1  # Nothing is left out where there are none.
