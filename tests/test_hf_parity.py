"""Logits and greedy tokens against Hugging Face transformers, and against a real trained model."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import raas_jax.weights as weights
from raas_jax import Dense, RaaS, generate
from raas_jax.config import ModelConfig
from raas_jax.lab.parity import models
from raas_jax.lab.parity.models import BASE, CASES, GROWTH, LINEAR, LLAMA3, YARN
from raas_jax.model import abstract_weights, forward


def make_model(case):
    pytest.importorskip("torch", reason="torch is the reference of these tests")
    return models.make_model(case)


def reference_logits(model, tokens: np.ndarray) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.float().numpy()


def our_logits(params, tokens: np.ndarray) -> np.ndarray:
    run = jax.jit(lambda params, tokens: forward(params.config, params.weights, tokens))
    return np.asarray(run(params, jnp.asarray(tokens, jnp.int32)))


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case, tmp_path):
    model = make_model(case)
    model.save_pretrained(tmp_path)
    params = weights.load(tmp_path, dtype="float32")
    tokens = np.random.default_rng(0).integers(0, BASE["vocab_size"], (2, 40))
    expected = reference_logits(model, tokens)
    # Logits of order one: a tolerance means nothing against numbers near zero.
    assert 0.5 < expected.std() < 20
    np.testing.assert_allclose(our_logits(params, tokens), expected, atol=2e-4, rtol=0)


@pytest.mark.parametrize("case", ["llama", "qwen3"])
@pytest.mark.parametrize(
    "added",
    [
        {"rope_scaling": {"type": "linear", "factor": 4.0}},
        {"rope_scaling": LINEAR, "rope_theta": 70.0},
        {"rope_scaling": {**LLAMA3, "rope_theta": 50.0}, "dtype": "float16"},
    ],
    ids=["linear", "theta twice", "llama3"],
)
def test_a_scaling_added_by_hand(case, added, tmp_path):
    """Model cards tell to add `rope_scaling`, to a file that may have `rope_parameters`."""
    from transformers import AutoModelForCausalLM

    make_model(case).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    fields = json.loads(file.read_text())
    assert "rope_parameters" in fields
    file.write_text(json.dumps({**fields, **added}))
    tokens = np.random.default_rng(0).integers(0, BASE["vocab_size"], (2, 40))
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float32")
    logits = our_logits(weights.load(tmp_path, dtype="float32"), tokens)
    np.testing.assert_allclose(logits, reference_logits(model, tokens), atol=2e-4, rtol=0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_files_in_float32(dtype, tmp_path):
    torch = pytest.importorskip("torch", reason="torch is the reference of these tests")
    from transformers import AutoModelForCausalLM

    make_model("qwen3-biases").to(getattr(torch, dtype)).save_pretrained(tmp_path)
    params = weights.load(tmp_path, dtype="float32")
    tokens = np.arange(24).reshape(1, 24)
    # Read again, because `to` has rounded the frequencies of the rotary embedding as well.
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    expected = reference_logits(model, tokens)
    np.testing.assert_allclose(our_logits(params, tokens), expected, atol=2e-4, rtol=0)


WRITTEN = ["llama-biases", "mistral-head-dim-10", "qwen2-tied", "qwen3", "qwen3-yarn"]
WRITTEN += ["mixtral", "qwen3-moe-some-layers", "phi3-part-of-a-head", "phi3-longrope"]
WRITTEN += ["seed-oss-biases", "smollm3-biases", "granite-scaled"]
WRITTEN += ["gpt-oss", "gpt-oss-all-full", "gpt-oss-all-window"]
WRITTEN += ["exaone4", "exaone4-no-windows", "glm4-biases", "olmo2-biases", "gemma3-scaled"]
WRITTEN += ["olmo3-biases", "ministral3-windows"]


@pytest.mark.parametrize("case", WRITTEN)
def test_transformers_reads_what_we_write(case, tmp_path):
    model = make_model(case)
    model.save_pretrained(tmp_path / "theirs")
    weights.convert(tmp_path / "theirs", tmp_path / "ours", to="hf")
    theirs, ours = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "ours"))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].tobytes() == tensor.tobytes(), name
    from transformers import AutoModelForCausalLM

    again, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not any(report.values()), report
    tokens = np.arange(24).reshape(1, 24)
    np.testing.assert_array_equal(reference_logits(again, tokens), reference_logits(model, tokens))


VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "patch_size": 14}
VISION |= {"num_attention_heads": 2, "image_size": 28}


@pytest.mark.parametrize("kind", ["gemma3", "mistral3"])
def test_the_text_half_of_a_model_that_takes_images(kind, tmp_path):
    torch = pytest.importorskip("torch", reason="torch is the reference of these tests")
    from transformers import AutoConfig, AutoModelForImageTextToText

    own = {"model_type": "gemma3_text", "sliding_window": 7, "sliding_window_pattern": 3}
    if kind == "mistral3":
        own = {"model_type": "ministral3", "rope_parameters": {**YARN, **GROWTH}}
    config = AutoConfig.for_model(
        kind,
        text_config={**BASE, **own, "head_dim": 16, "tie_word_embeddings": kind == "gemma3"},
        vision_config={**VISION, "head_dim": 8} if kind == "mistral3" else VISION,
        tie_word_embeddings=kind == "gemma3",
        eos_token_id=[5, 6],
        **({"mm_tokens_per_image": 4} if kind == "gemma3" else {}),
    )
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    model.save_pretrained(tmp_path)
    params = weights.load(tmp_path, dtype="float32")
    assert params.config.eos_token_ids == (5, 6)
    tokens = np.random.default_rng(0).integers(0, BASE["vocab_size"], (2, 40))
    expected = reference_logits(model, tokens)
    assert 0.5 < expected.std() < 20
    np.testing.assert_allclose(our_logits(params, tokens), expected, atol=2e-4, rtol=0)


NEW_TOKENS = 64
# One of each family.
GREEDY = ["llama-llama3-scaling", "mistral-head-dim-10", "qwen2-seven-queries-per-kv", "qwen3"]
# Beyond the original context, a dynamic rope's growing with each token.
GREEDY += ["qwen3-yarn", "qwen2-dynamic", "phi3-longrope", "seed-oss", "smollm3"]
GREEDY += ["mixtral", "qwen3-moe", "qwen3-moe-some-layers", "granite-scaled"]
# A prompt of more tokens than a window has, in alternating layers and in all.
GREEDY += ["gpt-oss", "gpt-oss-all-full", "gpt-oss-all-window"]
GREEDY += ["gemma3-scaled", "olmo3", "ministral3-windows", "exaone4"]
GREEDY += ["glm4", "olmo2"]
# The budget covers the new tokens, so nothing may be lost.
POLICIES = [Dense(), RaaS(budget=NEW_TOKENS)]


@pytest.mark.parametrize("case", GREEDY)
def test_greedy_tokens_equal_transformers(case, tmp_path):
    torch = pytest.importorskip("torch", reason="torch is the reference of these tests")
    model = make_model(case)
    model.save_pretrained(tmp_path)
    params = weights.load(tmp_path, dtype="float32")
    prompt = np.random.default_rng(1).integers(2, BASE["vocab_size"], 21).tolist()
    with torch.no_grad():
        answer = model.generate(torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False)
    expected = answer[0, len(prompt) :].tolist()
    assert len(expected) == NEW_TOKENS
    # A prefill and a decode are compiled for each; a budget that covers all is as good as dense.
    policies = POLICIES if case == "qwen3" else POLICIES[1:]
    if window := params.config.window:
        # Pages are not longer than a window; some of these are no multiple of them.
        policies = [RaaS(budget=NEW_TOKENS, page_size=min(4, window))]
    for policy in policies:
        out = generate(params, prompt, policy=policy, max_new_tokens=NEW_TOKENS)
        assert list(out.tokens) == expected, policy
        assert out.stats.evicted_pages == 0


@pytest.mark.parametrize(
    "policy",
    [Dense(), RaaS(budget=208), RaaS.paper(budget=224)],
    ids=["dense", "beside the prompt", "the paper's"],
)
def test_a_real_model_generates_its_reference(shared, policy):
    folder = shared / "models" / "stories260K"
    ids = json.loads((folder / "greedy_ref.json").read_text())["greedy_ids"]
    params = weights.load(folder, dtype="float32")
    out = generate(params, ids[:1], policy=policy, max_new_tokens=len(ids) - 1)
    assert list(out.tokens) == ids[1:]
    assert out.stats.evicted_pages == 0


def test_a_real_model(shared):
    folder = shared / "models" / "stories260K"
    reference = json.loads((folder / "greedy_ref.json").read_text())
    ids = np.asarray(reference["greedy_ids"])
    logits = our_logits(weights.load(folder, dtype="float32"), ids[None])[0]
    np.testing.assert_allclose(logits[0, :16], reference["first_logits"], atol=2e-4, rtol=0)
    np.testing.assert_allclose(logits[-1, :16], reference["last_logits"], atol=2e-4, rtol=0)
    np.testing.assert_array_equal(logits[:-1].argmax(-1), ids[1:])


# Parameters of each model with its config in ../shared, counted from the publishers' tensors.
SIZES = {
    "DeepSeek-R1-Distill-Llama-8B": 8_030_261_248,
    "DeepSeek-R1-Distill-Qwen-1.5B": 1_777_088_000,
    "Llama-3.1-8B-Instruct": 8_030_261_248,
    "Mistral-7B-Instruct-v0.3": 7_248_023_552,
    "Qwen2.5-0.5B": 494_032_768,
    "Qwen2.5-7B-Instruct": 7_615_616_512,
    "Qwen3-32B": 32_762_123_264,
    "Qwen3-8B": 8_190_735_360,
}


@pytest.mark.parametrize("name", SIZES)
def test_published_configs_build(shared, name):
    config = ModelConfig.from_file(shared / "configs" / name)
    shapes = abstract_weights(config, "bfloat16")
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == SIZES[name]
    assert ModelConfig.from_hf(config.to_hf()) == config
    # Every array has a name in a checkpoint, and the other way round.
    shapes = {name: place.shape for name, place in weights.hf.destinations(config).items()}
    assert sum(np.prod(shape) for shape in shapes.values()) == SIZES[name]


@pytest.mark.parametrize("name", SIZES)
def test_published_configs_read_alike(shared, name):
    """transformers reads the config that we write as it reads the one that was published."""
    from transformers import AutoConfig

    published = AutoConfig.from_pretrained(shared / "configs" / name)
    fields = ModelConfig.from_file(shared / "configs" / name).to_hf()
    written = AutoConfig.for_model(**fields)
    same = (
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "rms_norm_eps"),
        *("num_attention_heads", "num_key_value_heads", "max_position_embeddings"),
        *("tie_word_embeddings", "bos_token_id", "rope_parameters"),
    )
    for field in same:
        assert getattr(written, field) == getattr(published, field), field


# What the publisher says of gpt-oss that is not what its class means anyway.
GPT_OSS = {
    "model_type": "gpt_oss",
    "vocab_size": 201088,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_attention_heads": 64,
    "eos_token_id": 200002,
    "quantization_config": {"quant_method": "mxfp4"},
    "rope_theta": 150000,
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "original_max_position_embeddings": 4096,
        "truncate": False,
    },
}


@pytest.mark.parametrize(
    ("layers", "experts", "size"), [(24, 32, 20_914_757_184), (36, 128, 116_829_156_672)]
)
def test_published_gpt_oss_builds(layers, experts, size):
    alternating = ["sliding_attention", "full_attention"] * (layers // 2)
    sizes = {"num_hidden_layers": layers, "num_local_experts": experts, "layer_types": alternating}
    config = ModelConfig.from_hf({**GPT_OSS, **sizes})
    shapes = jax.tree.leaves(abstract_weights(config, "bfloat16"))
    places = weights.hf.destinations(config).values()
    assert sum(leaf.size for leaf in shapes) == size == sum(np.prod(p.shape) for p in places)
    assert config.window == 128 and config.window_layers == tuple(range(0, layers, 2))
    assert ModelConfig.from_hf(config.to_hf()) == config


def test_every_published_config_is_tested(shared):
    assert {path.parent.name for path in (shared / "configs").glob("*/config.json")} == set(SIZES)
