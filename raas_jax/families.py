"""The families of models, one entry each: what their config.json and their tensors mean.

A family is what transformers calls a model type. What differs between families is written here as
data, and in `ModelConfig` as flags, so that no other file asks for a model type.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

FOR_ALL: Mapping[str, Any] = {"rms_norm_eps": 1e-6, "hidden_act": "silu", "rope_theta": 10_000.0}
"""What transformers means by a key that a config.json leaves out, where that is not null or false.
A family's own go before it."""

LAYER: Mapping[str, tuple[str, ...]] = {
    "input_layernorm": ("attention_norm",),
    "self_attn.q_proj": ("q",),
    "self_attn.q_norm": ("q_norm",),
    "self_attn.k_proj": ("k",),
    "self_attn.k_norm": ("k_norm",),
    "self_attn.v_proj": ("v",),
    "self_attn.o_proj": ("o",),
    "post_attention_layernorm": ("mlp_norm",),
    "mlp.gate_proj": ("gate",),
    "mlp.up_proj": ("up",),
    "mlp.down_proj": ("down",),
}
"""The tensors of a layer as most families have them."""

MULTIPLIERS = (
    *("embedding_multiplier", "attention_multiplier"),
    *("residual_multiplier", "logits_scaling"),
)
"""Factors by which a family may scale, by their names in a config.json and in `ModelConfig`."""


@dataclasses.dataclass(frozen=True)
class ExpertNames:
    """What files say of experts.

    Attributes:
      number, size: the fields with how many there are, and their width.
      tensors: of each expert, whose number stands for `{}`, by their names in the files: ours.
      together: tensors of all experts of a layer instead, `[E, in, out]`, along whose last axis
        ours take turns. A bias, `[E, out]`, has `_bias` behind the name.
      normalised: the shares always add up to one; else `norm_topk_prob` says it.
      biases: the router and the experts have them.
      some_layers: `decoder_sparse_step` and `mlp_only_layers` may leave layers plain.
      limited: `swiglu_limit` and `swiglu_alpha` say how numbers within an expert are limited.
    """

    number: str
    size: str
    tensors: Mapping[str, str] = dataclasses.field(default_factory=dict)
    together: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    normalised: bool = False
    biases: bool = False
    some_layers: bool = False
    limited: bool = False


PLAIN: Mapping[str, tuple[str, ...]] = {
    "mlp.gate_proj": ("plain_gate",),
    "mlp.up_proj": ("plain_up",),
    "mlp.down_proj": ("plain_down",),
}
"""The tensors of a plain layer's perceptron, among layers with experts."""


def with_experts(router: str) -> Mapping[str, tuple[str, ...]]:
    """`LAYER` with a router, called so, in the place of the multilayer perceptron."""
    plain = {theirs: ours for theirs, ours in LAYER.items() if not theirs.startswith("mlp.")}
    return {**plain, router: ("router",)}


def joined(
    *names: tuple[str, tuple[str, ...]], layer: Mapping[str, tuple[str, ...]] = LAYER
) -> Mapping[str, tuple[str, ...]]:
    """A layer with some of its arrays together in one tensor, each (their name, our names)."""
    together = {ours: (theirs, several) for theirs, several in names for ours in several}
    return dict(together.get(ours[0], (theirs, ours)) for theirs, ours in layer.items())


def with_norms(**names: str) -> Mapping[str, tuple[str, ...]]:
    """`LAYER` with other norms around its attention and perceptron: their names, and ours."""
    kept = {theirs: ours for theirs, ours in LAYER.items() if not theirs.endswith("_layernorm")}
    return {**kept, **{theirs: (ours,) for theirs, ours in names.items()}}


@dataclasses.dataclass(frozen=True)
class Family:
    """What is particular to a family.

    Attributes:
      architecture: the class of transformers.
      left_out: see `FOR_ALL`.
      qkv_bias, output_bias, mlp_bias: whether these products have a bias; or the field of the
        config.json that says so.
      qk_norm, joined_qk_norm, norms, centred_norms, scaled_embeddings: see `ModelConfig`.
      activation: the field of the config.json with the activation.
      query_scalar: the field of which products of queries and keys are divided by the root.
      caps_logits: there is a field `final_logit_softcapping`.
      left_if_null: fields of which null means the same as if they were left out.
      never_null: sizes that null does not leave to the others.
      whole_heads: hidden_size must be a multiple of the heads.
      partial_rotary: a part of each head may be rotated.
      full_unrotated: where there is a `sliding_window`, only layers that have it are rotated.
      some_layers_rotate: `no_rope_layers` has 0 for each layer whose heads are not rotated.
      pairs_side_by_side: in the files, the two numbers of a head that are rotated together are
        neighbours; here they are in two halves.
      layer: the tensors of a layer, by their names in the files: ours, of which several lie in one
        tensor, one after the other. A bias is `.bias` there and `_bias` here.
      windows: which layers see the last `sliding_window` tokens only. "all", where it is given;
        "switched", if `use_sliding_window` is true; "late", by the same switch, those from
        `max_window_layers` on; "unrotated", by the same, those that are not rotated; "listed",
        those that `layer_types` says, or all but each `full_every`-th, which may be left to the
        field `sliding_window_pattern`; None, there are none.
      window_theta: layers with a window have a rope of their own, in `rope_parameters`: the field
        outside of it with its base, or "", and what that is where it is left out.
      sinks: the tensor of a layer with a logit for each head that joins its softmax; None is none.
      asks_no_types: `layer_types`, which says it elsewhere, does not count.
      rope: what no rope at all in a config.json means; None is a plain one.
      ropes: the kinds of rope that it has, by their names in its files; None is all.
      experts: of mixtures of experts, how these are called.
      packed: the `quant_method` of files that are unpacked as they are read; None is none.
      multipliers: there are fields of the names of `MULTIPLIERS`, each 1 where it is left out.
      grows_queries: see `Rope.query_growth`.
      original_context: the field, outside the rope, that holds the context before it was stretched.
    """

    architecture: str
    left_out: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    qkv_bias: bool | str = False
    output_bias: bool | str = False
    mlp_bias: bool | str = False
    qk_norm: bool = False
    joined_qk_norm: bool = False
    norms: Literal["before", "after", "both"] = "before"
    centred_norms: bool = False
    scaled_embeddings: bool = False
    activation: str = "hidden_act"
    query_scalar: str | None = None
    caps_logits: bool = False
    left_if_null: tuple[str, ...] = ()
    never_null: tuple[str, ...] = ()
    whole_heads: bool = False
    partial_rotary: bool = False
    full_unrotated: bool = False
    some_layers_rotate: bool = False
    pairs_side_by_side: bool = False
    layer: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=lambda: LAYER)
    windows: Literal["all", "switched", "late", "unrotated", "listed"] | None = None
    full_every: int | None = None
    window_theta: tuple[str, float] | None = None
    sinks: str | None = None
    asks_no_types: bool = False
    rope: Mapping[str, Any] | None = None
    ropes: Mapping[str, str] | None = None
    grows_queries: bool = False
    original_context: str | None = None
    experts: ExpertNames | None = None
    packed: str | None = None
    multipliers: bool = False


_QWEN = {
    "num_key_value_heads": 32,
    "max_position_embeddings": 2**15,
    "sliding_window": 4096,
    "max_window_layers": 28,
}

_GLM = {
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 2**17,
    "rms_norm_eps": 1.5625e-7,
    "partial_rotary_factor": 0.5,
    "attention_bias": True,
    "eos_token_id": [151329, 151336, 151338],
}
_GATE_AND_UP = ("mlp.gate_up_proj", ("gate", "up"))

_OLMO = Family(
    "Olmo2ForCausalLM",
    {"max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "eos_token_id": 50279},
    qkv_bias="attention_bias",
    output_bias="attention_bias",
    joined_qk_norm=True,
    norms="after",
    layer=with_norms(
        post_attention_layernorm="attended_norm", post_feedforward_layernorm="mlp_out_norm"
    ),
)

FAMILIES: dict[str, Family] = {
    "exaone4": Family(
        "Exaone4ForCausalLM",
        {
            "num_key_value_heads": 32,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "sliding_window": 4096,
            "sliding_window_pattern": 4,
            "bos_token_id": 0,
            "eos_token_id": 2,
        },
        qk_norm=True,
        norms="after",
        never_null=("num_key_value_heads",),
        full_unrotated=True,
        layer=_OLMO.layer,
        windows="listed",
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        {
            "vocab_size": 262_208,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "hidden_activation": "gelu_pytorch_tanh",
            "max_position_embeddings": 2**17,
            "rope_theta": 1e6,
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
            "sliding_window_pattern": 6,
            "tie_word_embeddings": True,
            "bos_token_id": 2,
            "eos_token_id": 1,
        },
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        qk_norm=True,
        norms="both",
        centred_norms=True,
        scaled_embeddings=True,
        activation="hidden_activation",
        query_scalar="query_pre_attn_scalar",
        caps_logits=True,
        never_null=("num_key_value_heads", "head_dim"),
        whole_heads=True,
        layer=with_norms(
            input_layernorm="attention_norm",
            post_attention_layernorm="attended_norm",
            pre_feedforward_layernorm="mlp_norm",
            post_feedforward_layernorm="mlp_out_norm",
        ),
        windows="listed",
        window_theta=("rope_local_base_freq", 10_000.0),
    ),
    "glm": Family(
        "GlmForCausalLM",
        _GLM,
        qkv_bias="attention_bias",
        never_null=("num_key_value_heads",),
        left_if_null=("eos_token_id",),
        partial_rotary=True,
        pairs_side_by_side=True,
        layer=joined(_GATE_AND_UP),
    ),
    "glm4": Family(
        "Glm4ForCausalLM",
        _GLM,
        qkv_bias="attention_bias",
        norms="both",
        left_if_null=("eos_token_id",),
        never_null=("num_key_value_heads", "head_dim"),
        partial_rotary=True,
        pairs_side_by_side=True,
        layer=joined(
            _GATE_AND_UP,
            layer=with_norms(
                input_layernorm="attention_norm",
                post_self_attn_layernorm="attended_norm",
                post_attention_layernorm="mlp_norm",
                post_mlp_layernorm="mlp_out_norm",
            ),
        ),
    ),
    "gpt_oss": Family(
        "GptOssForCausalLM",
        {
            "num_key_value_heads": 8,
            "head_dim": 64,
            "max_position_embeddings": 2**17,
            "rms_norm_eps": 1e-5,
            "rope_theta": 150_000.0,
            "sliding_window": 128,
            "attention_bias": True,
            "num_local_experts": 128,
            "num_experts_per_tok": 4,
            "swiglu_limit": 7.0,
            "swiglu_alpha": 1.702,
        },
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        never_null=("num_key_value_heads", "head_dim"),
        layer=with_experts("mlp.router"),
        windows="listed",
        full_every=2,
        sinks="self_attn.sinks",
        rope={
            "rope_type": "yarn",
            "factor": 32.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
        experts=ExpertNames(
            "num_local_experts",
            "intermediate_size",
            together={
                "mlp.experts.gate_up_proj": ("expert_gate", "expert_up"),
                "mlp.experts.down_proj": ("expert_down",),
            },
            normalised=True,
            biases=True,
            limited=True,
        ),
        packed="mxfp4",
    ),
    "granite": Family(
        "GraniteForCausalLM",
        {"max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2},
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        mlp_bias="mlp_bias",
        multipliers=True,
    ),
    "llama": Family(
        "LlamaForCausalLM",
        {"max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2},
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        mlp_bias="mlp_bias",
        whole_heads=True,
    ),
    "ministral": Family(
        "MinistralForCausalLM",
        {
            "num_key_value_heads": 8,
            "max_position_embeddings": 2**17,
            "sliding_window": 4096,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        windows="all",
    ),
    "ministral3": Family(
        "Ministral3ForCausalLM",
        {
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 2**18,
            "rms_norm_eps": 1e-5,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        rope={
            "rope_type": "yarn",
            "rope_theta": 1e6,
            "factor": 16.0,
            "original_max_position_embeddings": 2**14,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.1,
        },
        never_null=("head_dim",),
        ropes={"yarn": "yarn"},
        grows_queries=True,
        windows="all",
        asks_no_types=True,
    ),
    "mistral": Family(
        "MistralForCausalLM",
        {
            "num_key_value_heads": 8,
            "max_position_embeddings": 2**17,
            "sliding_window": 4096,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        asks_no_types=True,
        windows="all",
    ),
    "mixtral": Family(
        "MixtralForCausalLM",
        {
            "num_key_value_heads": 8,
            "max_position_embeddings": 2**17,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        layer=with_experts("block_sparse_moe.gate"),
        experts=ExpertNames(
            "num_local_experts",
            "intermediate_size",
            {
                "block_sparse_moe.experts.{}.w1": "expert_gate",
                "block_sparse_moe.experts.{}.w2": "expert_down",
                "block_sparse_moe.experts.{}.w3": "expert_up",
            },
            normalised=True,
        ),
        asks_no_types=True,
        windows="all",
    ),
    "olmo2": _OLMO,
    "olmo3": dataclasses.replace(
        _OLMO,
        architecture="Olmo3ForCausalLM",
        left_out={**_OLMO.left_out, "rope_theta": 500_000.0, "sliding_window": 4096},
        windows="listed",
        full_every=4,
        window_theta=("", 500_000.0),
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        {
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "bos_token_id": 1,
            "eos_token_id": 32000,
        },
        partial_rotary=True,
        layer=joined(("self_attn.qkv_proj", ("q", "k", "v")), _GATE_AND_UP),
        asks_no_types=True,
        ropes={"default": "default", **dict.fromkeys(("longrope", "su", "yarn"), "longrope")},
        original_context="original_max_position_embeddings",
        windows="all",
    ),
    "qwen2": Family("Qwen2ForCausalLM", _QWEN, qkv_bias=True, windows="late"),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        {**_QWEN, "head_dim": 128},
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        qk_norm=True,
        never_null=("head_dim",),
        windows="late",
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        {
            "num_key_value_heads": 4,
            "max_position_embeddings": 2**15,
            "sliding_window": 4096,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
        },
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        qk_norm=True,
        never_null=("num_key_value_heads",),
        layer=with_experts("mlp.gate"),
        experts=ExpertNames(
            "num_experts",
            "moe_intermediate_size",
            {
                "mlp.experts.{}.gate_proj": "expert_gate",
                "mlp.experts.{}.up_proj": "expert_up",
                "mlp.experts.{}.down_proj": "expert_down",
            },
            some_layers=True,
        ),
        windows="switched",
        asks_no_types=True,
    ),
    "seed_oss": Family(
        "SeedOssForCausalLM",
        {
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 2**19,
            "attention_bias": True,
            "bos_token_id": 0,
            "eos_token_id": 2,
        },
        qkv_bias="attention_bias",
        output_bias="attention_out_bias",
        mlp_bias="mlp_bias",
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        {
            "num_key_value_heads": 4,
            "max_position_embeddings": 2**15,
            "rope_theta": 2_000_000.0,
            "no_rope_layer_interval": 4,
            "tie_word_embeddings": True,
            "bos_token_id": 128000,
            "eos_token_id": 128001,
        },
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        mlp_bias="mlp_bias",
        some_layers_rotate=True,
        windows="unrotated",
    ),
}

TEXT_HALVES: Mapping[str, tuple[str, ...]] = {
    "gemma3": ("gemma3_text",),
    "mistral3": ("ministral3", "mistral"),
}
"""Families that take more than text, of which the text model is run: what `text_config` may say."""

_LATENT = "its keys and values are kept as a latent vector (MLA)"
_RECURRENT = "some of its layers keep a recurrent state and no keys and values"
_SEVERAL = (
    "it takes more than text; its text model, saved on its own, may be of a family that is here"
)
_ENCODES = "it has an encoder beside its decoder"
REFUSED: dict[str, str] = {
    **dict.fromkeys(
        ("gemma3n", "gemma4"), "its layers have embeddings of their own, or share keys and values"
    ),
    "gemma2": "the scores of its attention are capped",
    "llama4": "some of its layers see chunks of the text only",
    "llama4_text": "some of its layers see chunks of the text only",
    **dict.fromkeys(
        (
            *("deepseek_v2", "deepseek_v3", "deepseek_v32", "kimi_k2", "glm4_moe_lite"),
            *("glm_moe_dsa", "minicpm3", "longcat_flash", "sarvam_mla"),
        ),
        _LATENT,
    ),
    **dict.fromkeys(
        (
            *("qwen3_next", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "mamba", "mamba2", "jamba"),
            *("bamba", "falcon_mamba", "falcon_h1", "zamba", "zamba2", "rwkv", "recurrent_gemma"),
            *("nemotron_h", "granitemoehybrid", "lfm2", "lfm2_moe", "minimax", "kimi_linear"),
            *("olmo_hybrid", "xlstm"),
        ),
        _RECURRENT,
    ),
    **dict.fromkeys(
        (
            *("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_omni_moe", "llava"),
            *("mllama", "idefics3", "smolvlm", "phi4_multimodal", "internvl"),
        ),
        _SEVERAL,
    ),
    **dict.fromkeys(("t5", "bart", "t5gemma", "mt5", "pegasus", "whisper", "marian"), _ENCODES),
    **dict.fromkeys(
        ("cohere2", "nemotron", "exaone", "starcoder2", "gpt_neox", "gpt2", "falcon", "phi"),
        "its layers are put together otherwise",
    ),
    **dict.fromkeys(
        (
            "qwen2_moe",
            "glm4_moe",
            "granitemoe",
            "minimax_m2",
            "olmoe",
            "ernie4_5_moe",
            "dots1",
            "hunyuan_v1_moe",
            "mimo_v2_flash",
        ),
        "its experts are chosen or joined in another way",
    ),
}
"""Families that are known, and why they are not run."""
