"""A config.json means what the classes of transformers mean by it, or it is refused by name."""

import copy
import dataclasses
import json
import math
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raas_jax.config import LARGEST, ModelConfig
from raas_jax.families import FAMILIES, MULTIPLIERS, REFUSED
from raas_jax.files import FileError
from raas_jax.rope import ROPE_TYPES, Rope

SIZES = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
FULL = {
    **SIZES,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "attention_bias": True,
    "mlp_bias": True,
    "bos_token_id": 3,
    "eos_token_id": [4, 5],
    "rope_theta": 500.0,
    "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    "rope_parameters": {"rope_type": "default", "rope_theta": 700.0},
    "partial_rotary_factor": 1.0,
    "dtype": "float16",
    "torch_dtype": "bfloat16",
    "sliding_window": 256,
    "use_sliding_window": True,
    "max_window_layers": 1,
    "layer_types": ["full_attention"] * 3,
}


def full(kind: str, **changes) -> dict:
    fields = {"model_type": kind, **copy.deepcopy(FULL), **changes}
    if kind == "phi3" and "rope_scaling" not in changes:
        del fields["rope_scaling"]  # Of the kinds in these tests it takes the plain one only.
    if kind == "ministral3":  # Takes yarn alone, and that is what it means by nothing.
        fields |= {"rope_scaling": None, "rope_parameters": None, **changes}
    if kind in BY_LAYER and "rope_parameters" not in changes:
        del fields["rope_parameters"]  # To which it would be added; the other test has it.
    return fields


NO_BIAS = ("exaone4", "ministral", "ministral3", "mistral", "mixtral", "phi3")
BY_LAYER = ("gemma3_text", "olmo3")
"""With a rope of each kind of layer."""
PARTIAL = ("glm", "glm4", "phi3")


def experts_of(config) -> dict:
    """What differs of a mixture of experts, of which transformers calls the number in two ways."""
    if config.model_type not in ("gpt_oss", "mixtral", "qwen3_moe"):
        return {}
    own = {"num_experts": config.num_experts, "num_experts_per_tok": config.num_experts_per_tok}
    if config.model_type == "qwen3_moe":
        own["moe_intermediate_size"] = config.moe_intermediate_size
        layers, every = range(config.num_hidden_layers), config.decoder_sparse_step
        plain = [n for n in layers if n in config.mlp_only_layers or (n + 1) % every]
        own["plain_layers"] = tuple(plain)
        return {**own, "norm_topk_prob": config.norm_topk_prob}
    own |= {"moe_intermediate_size": config.intermediate_size, "norm_topk_prob": True}
    if config.model_type == "gpt_oss":
        own |= {"swiglu_limit": config.swiglu_limit, "swiglu_alpha": config.swiglu_alpha}
        own |= {"expert_bias": True, "sinks": True}
    return own


def windows_of(config) -> dict:
    """The layers that see a window, if it is shorter than the context; raises where none should."""
    from transformers.cache_utils import get_layer_types_and_kwargs

    types, _ = get_layer_types_and_kwargs(config)
    if {*types} - {"full_attention", "sliding_attention"}:
        raise ValueError("a layer is of another kind")
    slide = tuple(i for i, each in enumerate(types) if each == "sliding_attention")
    if config.model_type in ("ministral3", "mistral", "mixtral", "phi3", "qwen3_moe"):
        # Their masks go by the window alone.
        if 0 < len(slide) < len(types):
            raise ValueError("the cache forgets in some layers")
        slide = tuple(range(len(types))) if config.sliding_window is not None else slide
    if slide and config.model_type == "smollm3" and not config.use_sliding_window:
        raise ValueError("the mask has a window that is switched off")
    # Where their rope is another, too, they are told apart even if the window is never left.
    own_rope = config.model_type in (*BY_LAYER, "exaone4")
    context = math.inf if own_rope else config.max_position_embeddings
    if not slide or config.sliding_window >= context:
        return {}
    if config.model_type in ("glm", "glm4", "granite", "llama", "olmo2", "seed_oss"):
        raise ValueError("the cache forgets, but attention has no window")
    return {"window": config.sliding_window, "window_layers": slide}


def norms_of(config) -> dict:
    olmo = {"norms": "after", "joined_qk_norm": True}
    exaone = {"norms": "after", "qk_norm": True}
    kind = config.model_type
    if kind == "gemma3_text":
        scalar, capped = config.query_pre_attn_scalar, config.final_logit_softcapping
        own = {"norms": "both", "centred_norms": True, "qk_norm": True, "scaled_embeddings": True}
        if scalar != config.head_dim:
            own["attention_multiplier"] = scalar**-0.5
        return {**own, "final_logit_softcapping": capped}
    return {"glm4": {"norms": "both"}, "exaone4": exaone, "olmo2": olmo, "olmo3": olmo}.get(
        kind, {}
    )


def ropes_of(config, windows) -> dict:
    rope = config.rope_parameters
    if config.model_type not in BY_LAYER:
        if any(isinstance(each, dict) for each in rope.values()):
            raise ValueError("some classes do not ask for it, others break")
        own = own_of_rope(config, rope)
        whole = config.model_type not in PARTIAL
        partial = rope.get("partial_rotary_factor", 1.0) if own or not whole else 1.0
        if whole and partial != 1.0:
            raise ValueError("a part of each head is rotated")
        if config.model_type == "ministral3":
            if rope["rope_type"] != "yarn":
                raise ValueError("there is no original context")
            own["query_growth"] = rope["llama_4_scaling_beta"]
        return {"rope": Rope(rope["rope_theta"], rope["rope_type"], partial=partial, **own)}
    for each in rope.values():
        if isinstance(each, dict):
            each.setdefault("rope_type", each.get("type", "default"))
            each.setdefault("original_max_position_embeddings", config.max_position_embeddings)
    full, window = (
        Rope(own["rope_theta"], own["rope_type"], **own_of_rope(config, own))
        for own in (rope["full_attention"], rope["sliding_attention"])
    )
    return {"rope": full, "window_rope": window if windows and window != full else None}


def multipliers_of(config) -> dict:
    if config.model_type != "granite":
        return {}
    return {name: getattr(config, name) for name in MULTIPLIERS}


def own_of_rope(config, rope) -> dict:
    """What is its own of the rope of a config of transformers."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = dict(rope)
    kind = rope["rope_type"]
    if kind == "yarn":
        if getattr(config, "head_dim", 0) is None:
            config.head_dim = config.hidden_size // config.num_attention_heads
        rope["attention_factor"] = ROPE_INIT_FUNCTIONS[kind](config, "cpu")[1]
        rope = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True, **rope}
    return {name: rope[name] for name in ROPE_TYPES[kind]}


def theirs(fields: dict) -> ModelConfig | None:
    """What transformers makes of it; None where it refuses, or means more than it says."""
    pytest.importorskip("torch", reason="transformers needs it to say what slides")
    from transformers import logging
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    logging.set_verbosity_error()
    kind = fields["model_type"]
    fields = copy.deepcopy(fields)
    # Two values that its classes are written for, and its check of types refuses.
    if (
        kind in ("ministral", "ministral3", "mistral", "mixtral")
        and fields.get("num_key_value_heads", 8) is None
    ):
        fields["num_key_value_heads"] = fields["num_attention_heads"]
    if type(fields.get("rms_norm_eps")) is int:
        fields["rms_norm_eps"] = float(fields["rms_norm_eps"])
    try:
        c = CONFIG_MAPPING[kind].from_dict(fields)
        windows = windows_of(c)
        rotates = getattr(c, "no_rope_layers", None) or [1] * c.num_hidden_layers
        if kind == "exaone4" and c.sliding_window is not None:
            rotates = [each == "sliding_attention" for each in c.layer_types]
        eos = c.eos_token_id
        activation = c.hidden_activation if kind == "gemma3_text" else c.hidden_act
        return ModelConfig(
            **{name: getattr(c, name) for name in SIZES},
            num_key_value_heads=c.num_key_value_heads,
            head_dim=getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads,
            max_position_embeddings=c.max_position_embeddings,
            **windows,
            **ropes_of(c, windows),
            rms_norm_eps=c.rms_norm_eps,
            tie_word_embeddings=c.tie_word_embeddings,
            qkv_bias=kind == "qwen2" or (kind not in NO_BIAS and c.attention_bias),
            output_bias=c.attention_out_bias
            if kind == "seed_oss"
            else kind not in (*NO_BIAS, "qwen2", "glm", "glm4") and c.attention_bias,
            mlp_bias=kind in ("granite", "llama", "seed_oss", "smollm3") and c.mlp_bias,
            **{"qk_norm": kind in ("qwen3", "qwen3_moe"), **norms_of(c)},
            hidden_act=activation.replace("swish", "silu"),
            **experts_of(c),
            **multipliers_of(c),
            unrotated_layers=tuple(i for i, turns in enumerate(rotates) if not turns),
            model_type=kind,
            bos_token_id=c.bos_token_id,
            eos_token_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
            dtype="float32" if c.dtype is None else str(c.dtype).removeprefix("torch."),
        )
    except Exception:
        return None


def ours(fields: dict) -> ModelConfig | None:
    try:
        return ModelConfig.from_hf(fields, "some/config.json")
    except FileError as error:
        assert str(error).startswith("some/config.json cannot be used: ")
        return None


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("key", FULL)
def test_what_is_left_out_or_null_means_the_same(kind, key):
    assert ours(full(kind)) == theirs(full(kind)) is not None
    without = full(kind)
    without.pop(key, None)
    if key in SIZES and key not in FAMILIES[kind].left_out:
        with pytest.raises(FileError, match=f"it lacks {key}"):
            ModelConfig.from_hf(without)
    else:
        assert ours(without) == theirs(without)
    null = full(kind, **{key: None})
    if key == "partial_rotary_factor" and kind in PARTIAL:
        assert ours(null) is None  # Some classes break, others rotate all of a head.
    else:
        assert ours(null) == theirs(null)


@pytest.mark.parametrize("kind", FAMILIES)
def test_all_defaults_at_once(kind):
    """Heads by which the key/value heads that are meant divide."""
    fields = {**SIZES, "hidden_size": 128, "num_attention_heads": 32, "model_type": kind}
    assert ours(fields) == theirs(fields) is not None


LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1, "high_freq_factor": 4}
LINEAR = {"rope_type": "linear", "factor": 4.0}
DEFAULT = {"rope_type": "default", "rope_theta": 700.0}
BY_KIND = {
    "full_attention": {"rope_type": "linear", "factor": 4.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
}


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_theta": 500.0},
        {"rope_theta": 500.0, "rope_parameters": DEFAULT},
        {"rope_theta": 500.0, "rope_parameters": LINEAR},
        {"rope_parameters": DEFAULT, "rope_scaling": LINEAR},
        {"rope_parameters": DEFAULT, "rope_scaling": {**LINEAR, "rope_theta": 700.0}},
        {"rope_theta": 500.0, "rope_parameters": DEFAULT, "rope_scaling": LINEAR},
        {"rope_parameters": DEFAULT, "rope_scaling": {"type": "yarn", "factor": 4.0}},
        {"rope_parameters": DEFAULT, "rope_scaling": {}},
        {"rope_parameters": DEFAULT, "rope_scaling": None},
        {"rope_scaling": {"type": "linear", "factor": 4.0}},
        {"rope_scaling": {"type": "linear", "rope_type": "default", "factor": 4.0}},
        {"rope_scaling": {"type": "default", "rope_type": "linear", "factor": 4.0}},
        {"rope_scaling": {"type": "linear", "rope_type": None, "factor": 4.0}},
        {"rope_scaling": {"type": "linear"}},
        {"rope_scaling": {"factor": 4.0}},
        {"rope_scaling": LLAMA3},
        {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 64}},
        {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": None}},
        {"rope_scaling": LLAMA3, "original_max_position_embeddings": 64},
        {"rope_theta": 500.0, "rope_scaling": {**LINEAR, "rope_theta": None}},
        {"rope_parameters": BY_KIND},
        {"rope_parameters": BY_KIND, "rope_theta": 30.0, "rope_local_base_freq": 20.0},
        {"rope_parameters": BY_KIND, "rope_scaling": {"factor": 3.0}},
        {"rope_parameters": {**BY_KIND, "sliding_attention": None}, "rope_theta": 30.0},
        {"rope_parameters": {**BY_KIND, "full_attention": None}, "rope_scaling": LINEAR},
        {"rope_parameters": {**BY_KIND, "sliding_attention": 7}},
        {"rope_parameters": {"full_attention": DEFAULT}, "rope_theta": 30.0},
        {"rope_theta": 30.0, "rope_local_base_freq": 20.0, "rope_scaling": LINEAR},
        {"rope_scaling": LLAMA3, "layer_types": ["sliding_attention"] * 3, "sliding_window": 5},
        {"partial_rotary_factor": 0.5},
        {"partial_rotary_factor": 0.5, "rope_scaling": LINEAR},
        {"dtype": "float16", "torch_dtype": "bfloat16"},
        {"dtype": None, "torch_dtype": "bfloat16"},
        {"torch_dtype": "bfloat16"},
        {"torch_dtype": "torch.bfloat16"},
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3},
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
        {"use_sliding_window": True, "sliding_window": 8, "layer_types": ["full_attention"] * 3},
        {"sliding_window": 8, "layer_types": ["full_attention"] * 3},
        {"sliding_window": 8, "layer_types": ["sliding_attention"] * 3},
        {"sliding_window": None, "layer_types": ["sliding_attention"] * 3},
        {"sliding_window": None, "layer_types": ["attention"] * 3},
        {"sliding_window": None, "layer_types": ["full_attention"] * 2},
        {"sliding_window": None, "layer_types": ["chunked_attention"] * 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", FAMILIES)
def test_two_spellings_mean_the_same(kind, spelling):
    fields = {**SIZES, "model_type": kind, "num_key_value_heads": 2, "max_position_embeddings": 256}
    fields |= copy.deepcopy(spelling)
    assert ours(fields) == theirs(fields)


VALID = {
    "num_key_value_heads": [1, 2, 4, None],
    "head_dim": [8, 10],
    "max_position_embeddings": [64, 4096],
    "rms_norm_eps": [1e-5, 1e-6],
    "hidden_act": ["silu", "swish", "gelu_pytorch_tanh"],
    "tie_word_embeddings": [True, False],
    "attention_bias": [True, False],
    "mlp_bias": [True, False],
    "bos_token_id": [None, 0, 5, -1],
    "eos_token_id": [None, 0, -1, [], [1, 2]],
    "rope_theta": [100, 1e6],
    "rope_scaling": [None, {}, LINEAR, {**LLAMA3, "rope_theta": 10.0}],
    "rope_parameters": [None, {}, DEFAULT, {"rope_type": "linear", "factor": 3}, BY_KIND],
    "dtype": [None, "float32", "bfloat16"],
    "torch_dtype": [None, "float16"],
    "sliding_window": [None, 4096, 16],
    "use_sliding_window": [True, False],
    "max_window_layers": [0, 2, 3],
    "layer_types": [None, ["full_attention"] * 3, ["sliding_attention", "full_attention"] * 2],
    "decoder_sparse_step": [1, 2],
    "mlp_only_layers": [None, [], [0], [2, 1]],
    "num_hidden_layers": [3, 4],
    "sliding_window_pattern": [2, 3],
    "rope_local_base_freq": [20.0],
    "query_pre_attn_scalar": [8, 25],
    "final_logit_softcapping": [None, 20.0],
    "unknown_to_all": [1],
}
ODD = [None, -1, 0, 7, 3.5, math.nan, math.inf, 10**9, 10**30, True, "", "7", [], [0], {}, {"a": 1}]
CONFIGS = st.fixed_dictionaries(
    {
        "model_type": st.sampled_from(sorted(FAMILIES)),
        **{name: st.just(value) for name, value in SIZES.items() if name not in VALID},
        "num_hidden_layers": st.sampled_from(VALID["num_hidden_layers"]),
    },
    optional={name: st.sampled_from(VALID[name]) for name in VALID.keys() - SIZES.keys()},
)
CHANGES = st.dictionaries(
    st.sampled_from(sorted({*SIZES, *VALID} - {"unknown_to_all"})), st.sampled_from(ODD), max_size=2
)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"sliding_window": 16, "max_position_embeddings": 64},
        {"sliding_window": None},
        {"layer_types": ["full_attention", "sliding_attention", "sliding_attention"]},
        {"layer_types": ["full_attention"] * 3, "sliding_window": None},
        {"rope_parameters": None},
        {"rope_parameters": {}},
        {"rope_parameters": {"rope_type": "default"}},
        {"rope_scaling": {}},
        {"rope_theta": 500.0},
        {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "truncate": False}},
        {"swiglu_limit": 3.0, "swiglu_alpha": 1.0},
        {"swiglu_limit": None},
        {"swiglu_alpha": None},
        {"num_local_experts": 7, "num_experts_per_tok": 7},
        {"num_experts": 9},
        {"num_local_experts": None},
        {"num_experts_per_tok": None},
        {"attention_bias": None},
        {"tie_word_embeddings": None},
    ],
    ids=str,
)
def test_what_gpt_oss_means(fields):
    """Its windows, rope and experts, where they are said and where they are not."""
    found = ours({**SIZES, "model_type": "gpt_oss", "num_key_value_heads": 2, **fields})
    wanted = theirs({**SIZES, "model_type": "gpt_oss", "num_key_value_heads": 2, **fields})
    assert found == wanted
    if found is not None:
        assert ModelConfig.from_hf(found.to_hf()) == found == theirs(found.to_hf())


@settings(max_examples=300)
@given(fields=CONFIGS)
def test_valid_configs_mean_the_same(fields):
    assert ours(fields) == theirs(fields)


@settings(max_examples=300)
@given(fields=CONFIGS, changes=CHANGES)
def test_odd_configs_are_refused_or_mean_the_same(fields, changes):
    found = ours({**fields, **changes})
    assert found is None or found == theirs({**fields, **changes})
    if found is not None:
        assert ModelConfig.from_hf(found.to_hf()) == found


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"rope_theta": -1}, "^config.json cannot be used: [a-z_.]+ is -1"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor is 0"),
        ({"rope_scaling": {"type": "linear"}}, "lacks rope_scaling.factor"),
        ({"rope_scaling": {**LLAMA3, "low_freq_factor": 4}}, "low_freq_factor is 4"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps is nan"),
        ({"hidden_size": 32.7}, "hidden_size is 32.7"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ({"vocab_size": 10**5000}, "vocab_size is a number of too many digits"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'.*'silu'"),
        ({"model_type": "gpt9"}, "model_type is 'gpt9'.*llama.*qwen3"),
        ({"model_type": "deepseek_v3"}, "'deepseek_v3'.*latent vector.*Supported are .*llama"),
        ({"is_causal": False}, "is_causal is False, which is not supported"),
        ({"per_layer_config": {"0": {"head_dim": 4}}}, "per_layer_config is .* not supported"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised .'gptq'.*dequantize"),
        ({"quantization_config": {"load_in_4bit": True}}, "quantised .*load_in_4bit"),
        # Llama's class would drop it with a warning; the others break.
        ({"rope_scaling": {"full_attention": DEFAULT}}, "values of their own for full_attention"),
        ({"eos_token_id": [1, "2"]}, "eos_token_id is '2'"),
    ],
)
def test_what_is_refused_is_named(change, named, tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(full("qwen3", **change)) if "vocab_size" not in change else "{}")
    with pytest.raises(FileError, match=named):
        ModelConfig.from_hf(full("qwen3", **change))
    with pytest.raises(FileError, match=str(file)):
        ModelConfig.from_file(tmp_path)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": ' * 100_000, "[]", "{", "\ud800", "7"])
def test_a_file_that_is_no_config_is_named(text, tmp_path):
    file = tmp_path / "config.json"
    file.write_bytes(text.encode(errors="surrogatepass"))
    with pytest.raises(FileError, match=str(file)):
        ModelConfig.from_file(file)


def test_a_pipe_or_a_folder_is_no_config(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(FileError, match="expected a regular file"):
        ModelConfig.from_file(tmp_path)
    with pytest.raises(FileNotFoundError, match="No model configuration"):
        ModelConfig.from_file(tmp_path / "nothing")


GOOD = ModelConfig(97, 48, 72, 3, 4, 2, 12)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, value) for name in LARGEST for value in (0, 2.0, True, None, 2**31)),
        *(("rms_norm_eps", value) for value in (-1.0, math.nan, "x", None, True)),
        *((name, 1) for name in ("tie_word_embeddings", "qkv_bias", "qk_norm")),
        *(("head_dim", 7), ("num_key_value_heads", 3), ("rope", None), ("model_type", "gpt2")),
        *(("dtype", "int8"), ("bos_token_id", 1.5), ("eos_token_ids", ("a",))),
        ("eos_token_ids", 7),
    ],
)
def test_a_config_checks_itself(name, value):
    with pytest.raises(ValueError, match=name):
        dataclasses.replace(GOOD, **{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("theta", value) for value in (0, -1, math.nan, math.inf, "x", None)),
        *(("factor", value) for value in (0, -2.0, math.inf, True)),
        *(("low_freq_factor", 4.0), ("high_freq_factor", 0), ("kind", "mrope")),
        ("original_max_position_embeddings", 0),
    ],
)
def test_a_rope_checks_itself(name, value):
    with pytest.raises(ValueError, match="rope_type" if name == "kind" else name):
        Rope(**{name: value})


def test_numbers_of_numpy_are_made_pythons():
    config = dataclasses.replace(GOOD, vocab_size=np.int64(97), rms_norm_eps=np.float64(1e-6))
    assert config == GOOD
    assert type(config.vocab_size) is int and type(config.rms_norm_eps) is float


def test_refused_families_are_families_of_transformers():
    """By the names that it has for them, but for one that only its publisher has; none is ours."""
    pytest.importorskip("torch", reason="transformers needs it")
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    assert not REFUSED.keys() & FAMILIES.keys()
    assert REFUSED.keys() - CONFIG_MAPPING_NAMES.keys() <= {"kimi_k2"}
