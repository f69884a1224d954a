"""Model configuration: one frozen dataclass for every supported architecture.

The fields keep Hugging Face's names. What differs between families of models is written out as
flags (`qkv_bias`, `qk_norm`, ...); `raas_jax.families` says what each means by its config.json.
A config.json means here what the classes of transformers mean by it, or is refused.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from raas_jax import checks
from raas_jax.checks import INT32_MAX
from raas_jax.families import FAMILIES, FOR_ALL, MULTIPLIERS, REFUSED, TEXT_HALVES, Family
from raas_jax.files import Fields, FileError, read_fields
from raas_jax.rope import Rope

DTYPES = ("float32", "float16", "bfloat16")
# The largest that is taken, far above any model, so that a damaged number costs no memory.
LARGEST = {
    "vocab_size": 2**24,
    "hidden_size": 2**20,
    "intermediate_size": 2**22,
    "num_hidden_layers": 2**10,
    "num_attention_heads": 2**14,
    "num_key_value_heads": 2**14,
    "head_dim": 2**14,
    "max_position_embeddings": INT32_MAX,
}
LARGEST_OF_EXPERTS = {
    "num_experts": 2**14,
    "num_experts_per_tok": 2**14,
    "moe_intermediate_size": 2**22,
}
NORMS = ("before", "after", "both")
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_pytorch_tanh"}
"""By their names in a config.json: ours."""
LEAST_ID = -1
"""Which some publishers write for a token that there is not."""
# Settings that change a model in transformers, with the values that are implemented here.
_ONLY: Mapping[str, tuple[Any, ...]] = {
    "is_causal": (True,),
    "per_layer_config": (None,),
    "kv_sharing_modes": (None,),
    "transformers_weights": (None,),
    "use_bidirectional_attention": (None, False),
    "attn_logit_softcapping": (None,),
}
# With the same name and meaning in a config.json.
_SHARED = (
    *("model_type", *LARGEST),
    *("rms_norm_eps", "tie_word_embeddings", "bos_token_id", "dtype"),
)


_LAYERS = ("unrotated_layers", "window_layers", "plain_layers")
"""Fields that are numbers of layers."""
BIASES = ("qkv_bias", "output_bias", "mlp_bias")


def _integer(least: int, most: int = INT32_MAX) -> Callable[[str, Any], int]:
    return lambda name, value: checks.integer(name, value, least, most)


def _real(wanted: str, least: float, most: float) -> Callable[[str, Any], float]:
    return lambda name, value: checks.real(name, value, wanted, least, most)


def _layer_numbers(layers: int) -> Callable[[str, Any], tuple[int, ...]]:
    def check(name: str, values: Any) -> tuple[int, ...]:
        given = checks.entries(name, values, "ints")
        return tuple(sorted({checks.integer(name, value, 0, layers - 1) for value in given}))

    return check


def _token_ids(name: str, values: Any) -> tuple[int, ...]:
    given = checks.entries(name, values, "ints")
    return tuple(checks.integer(name, value, LEAST_ID) for value in given)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape of a decoder-only transformer. Hashable, so it can be a static argument of a jit.

    Axis letters: `V` vocab_size, `D` hidden_size, `F` intermediate_size, `L` num_hidden_layers,
    `N` num_attention_heads, `K` num_key_value_heads, `H` head_dim, `G = N / K`. A value of a wrong
    type or out of range raises ValueError, which names the field.

    Attributes:
      unrotated_layers: numbers of the layers whose queries and keys are not rotated (NoPE).
      window: tokens, itself included, that a token sees in the layers `window_layers`; 0 without.
      window_rope: of these layers, where it is another.
      sinks: each query head has a logit of its own that joins its softmax and has no value.
      num_experts: perceptrons of each layer, of `moe_intermediate_size`, of which a token goes
        through `num_experts_per_tok`; 0 is one, of `intermediate_size`.
      plain_layers: numbers of the layers that have one perceptron, of `intermediate_size`, all the
        same.
      norm_topk_prob: the shares of a token's experts are made to add up to one.
      expert_bias: the router and every product of an expert have a bias.
      swiglu_limit: of numbers within an expert, whose gate is then another (see
        `raas_jax.experts.Limits`); None is none.
      swiglu_alpha: of that gate.
      embedding_multiplier: of embeddings.
      attention_multiplier: of products of queries with keys; None is `H ** -0.5`.
      residual_multiplier: of what attention and perceptrons add.
      logits_scaling: what logits are divided by.
      norms: whether what goes into attention and perceptrons is normalised, or what comes out.
      centred_norms: norms multiply by one more than their weights.
      qk_norm: the queries and keys of each head are normalised.
      joined_qk_norm: those of all heads together.
      hidden_act: "silu", or "gelu_pytorch_tanh".
      scaled_embeddings: embeddings are multiplied by `D ** 0.5`, in the dtype of the weights.
      final_logit_softcapping: logits go through `c * tanh(logits / c)`; None is as they are.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 2048
    rope: Rope = Rope()
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    unrotated_layers: tuple[int, ...] = ()
    window: int = 0
    window_layers: tuple[int, ...] = ()
    window_rope: Rope | None = None
    sinks: bool = False
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    norm_topk_prob: bool = False
    plain_layers: tuple[int, ...] = ()
    expert_bias: bool = False
    swiglu_limit: float | None = None
    swiglu_alpha: float = 1.702
    embedding_multiplier: float = 1.0
    attention_multiplier: float | None = None
    residual_multiplier: float = 1.0
    logits_scaling: float = 1.0
    norms: str = "before"
    centred_norms: bool = False
    joined_qk_norm: bool = False
    hidden_act: str = "silu"
    scaled_embeddings: bool = False
    final_logit_softcapping: float | None = None
    model_type: str = "llama"
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    dtype: str = "float32"

    def __post_init__(self) -> None:
        for name, most in LARGEST.items():
            checks.field(self, name, _integer(1, most))
        checks.field(self, "rms_norm_eps", _real("a number from 0 to 1", 0, 1))
        for field in dataclasses.fields(self):
            if field.type == "bool":
                checks.field(self, field.name, checks.flag)
        for name in ("rope", "window_rope"):
            value = getattr(self, name)
            if not isinstance(value, Rope) and (name == "rope" or value is not None):
                raise ValueError(f"{name} is {checks.short(value)}; it must be a Rope.")
        checks.choice("model_type", self.model_type, FAMILIES)
        checks.choice("dtype", self.dtype, DTYPES)
        checks.choice("norms", self.norms, NORMS)
        checks.choice("hidden_act", self.hidden_act, tuple(dict.fromkeys(ACTIVATIONS.values())))
        if self.bos_token_id is not None:
            checks.field(self, "bos_token_id", _integer(LEAST_ID))
        checks.field(self, "eos_token_ids", _token_ids)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads is {self.num_attention_heads}, which is not a multiple of "
                f"num_key_value_heads, {self.num_key_value_heads}."
            )
        for name in _LAYERS:
            checks.field(self, name, _layer_numbers(self.num_hidden_layers))
        checks.field(self, "window", _integer(1 if self.window_layers else 0))
        if not self.window_layers and (self.window or self.window_rope):
            raise ValueError(
                f"window is {self.window} and window_rope {self.window_rope}, but window_layers is "
                "(); name the layers that have it."
            )
        for rope in filter(None, (self.rope, self.window_rope)):
            rope.check_head(self.head_dim)
        for name in (*MULTIPLIERS, "final_logit_softcapping"):
            if getattr(self, name) is not None:
                checks.field(self, name, _real("a number from 1e-6 to 1e6", 1e-6, 1e6))
        least = 1 if self.num_experts else 0
        for name, most in LARGEST_OF_EXPERTS.items():
            checks.field(self, name, _integer(0 if name == "num_experts" else least, most))
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(
                f"num_experts_per_tok is {self.num_experts_per_tok}; it must be at most "
                f"num_experts, {self.num_experts}."
            )
        if self.qk_norm and self.joined_qk_norm:
            raise ValueError("qk_norm and joined_qk_norm are True; one of them must be False.")
        if self.plain_layers and not self.expert_layers:
            raise ValueError(
                f"plain_layers is {checks.short(self.plain_layers)}; it is for some layers of a "
                "model with experts, and not for all."
            )
        if self.num_experts and self.mlp_bias:
            raise ValueError("mlp_bias is True; of experts it is expert_bias that says so.")
        if self.expert_bias and not self.num_experts:
            raise ValueError("expert_bias is True, but num_experts is 0; it must be False.")
        for name in ("swiglu_limit", "swiglu_alpha"):
            if name != "swiglu_limit" or self.swiglu_limit is not None:
                checks.field(self, name, _real("a number from 1e-6 to 1e6", 1e-6, 1e6))
        if self.num_experts and self.hidden_act != "silu":
            raise ValueError(f"hidden_act is {self.hidden_act!r}; that of experts must be silu.")

    @property
    def layer_kinds(self) -> tuple[str, ...]:
        """The attention of every layer, "full" or "window"."""
        seen = frozenset(self.window_layers)
        return tuple("window" if n in seen else "full" for n in range(self.num_hidden_layers))

    @property
    def layer_places(self) -> tuple[tuple[str, int], ...]:
        """The attention of every layer, and the layer's place among those of its kind."""
        kinds = self.layer_kinds
        return tuple((kind, kinds[:number].count(kind)) for number, kind in enumerate(kinds))

    def with_layers(self, count: int) -> ModelConfig:
        """The same with its first layers alone, or with more of the plain kind."""
        kept: dict[str, Any] = {
            name: tuple(layer for layer in getattr(self, name) if layer < count) for name in _LAYERS
        }
        if not kept["window_layers"]:
            kept |= {"window": 0, "window_rope": None}
        return dataclasses.replace(self, num_hidden_layers=count, **kept)

    @property
    def expert_layers(self) -> tuple[int, ...]:
        """Numbers of the layers that have experts."""
        count = self.num_hidden_layers if self.num_experts else 0
        return tuple(n for n in range(count) if n not in self.plain_layers)

    @property
    def full_layers(self) -> int:
        """How many layers see everything; their pages are what policies are about."""
        return self.num_hidden_layers - len(self.window_layers)

    @property
    def context(self) -> int:
        """Tokens that the model can take: what its config.json says, or as far as its rope goes.

        A dynamic rope, and a yarn that was added by hand, stretch the context that is said.
        """
        said, rope = self.max_position_embeddings, self.rope
        if rope.kind == "dynamic":
            return max(said, int(said * rope.factor))
        if rope.kind == "yarn":
            return max(said, int(rope.original_max_position_embeddings * rope.factor))
        return said

    @classmethod
    def from_hf(
        cls, config: Mapping[str, Any], path: str | os.PathLike[str] = "config.json"
    ) -> ModelConfig:
        """Builds from the dictionary of a Hugging Face config.json, which errors call `path`.

        Raises FileError, a ValueError, for what lacks or is out of range, and for an architecture,
        activation or rope type that this library does not implement, naming the value and the
        supported ones.
        """
        given = Fields(config, path)
        if isinstance(said := config.get("model_type"), str) and said in REFUSED:
            raise given.error(
                f"model_type is {said!r}, which is not supported: {REFUSED[said]}. Supported are "
                f"{', '.join(FAMILIES)}"
            )
        if isinstance(said, str) and said in TEXT_HALVES:
            given = _text_half(given, TEXT_HALVES[said])
            config = given.values
        kind = given.choice("model_type", FAMILIES)
        family = FAMILIES[kind]
        said = {k: v for k, v in config.items() if v is not None or k not in family.left_if_null}
        meant = {**FOR_ALL, **family.left_out, **said}
        if meant.get("rope_parameters") is None:
            meant["rope_parameters"] = family.rope
        fields = Fields(meant, path)
        _refuse_changes(fields, family)
        activation = ACTIVATIONS[fields.choice(family.activation, ACTIVATIONS)]
        heads, hidden = (
            fields.integer(name, 1, LARGEST[name])
            for name in ("num_attention_heads", "hidden_size")
        )
        if family.whole_heads and hidden % heads:
            raise fields.error(
                f"hidden_size is {hidden}, no multiple of num_attention_heads, {heads}"
            )
        sizes = {"num_key_value_heads": heads, "head_dim": hidden // heads}
        for name in family.never_null:
            del sizes[name]
        for name, most in LARGEST.items():
            derived = name in sizes and fields.values.get(name) is None
            sizes[name] = sizes[name] if derived else fields.integer(name, 1, most)
        context = sizes["max_position_embeddings"]
        unrotated = _unrotated_layers(fields, family, sizes["num_hidden_layers"])
        windows: dict[str, Any] = _windows(
            fields, family, sizes["num_hidden_layers"], context, unrotated
        )
        if family.full_unrotated and fields.values.get("sliding_window") is not None:
            rotated = windows.get("window_layers", ())
            unrotated = tuple(i for i in range(sizes["num_hidden_layers"]) if i not in rotated)
        biases: dict[str, Any] = {
            name: said if isinstance(said, bool) else fields.flag(said, False)
            for name in BIASES
            for said in [getattr(family, name)]
        }
        multipliers = {}
        if family.multipliers:
            multipliers = {name: fields.real(name, default=1.0) for name in MULTIPLIERS}
        if family.query_scalar:
            # Integers, so that writing it back gives the same.
            scalar = fields.integer(family.query_scalar, 1)
            same = scalar == sizes["head_dim"]
            multipliers["attention_multiplier"] = None if same else scalar**-0.5
        ropes: dict[str, Any] = _ropes(fields, family, context, bool(windows))
        cap = fields.real("final_logit_softcapping", default=None) if family.caps_logits else None
        stored = fields.choice("dtype", DTYPES, None) or fields.choice("torch_dtype", DTYPES, None)
        try:
            return cls(
                **sizes,
                **ropes,
                rms_norm_eps=fields.values["rms_norm_eps"],
                tie_word_embeddings=fields.flag("tie_word_embeddings", False),
                **biases,
                **_experts(fields, family),
                **windows,
                **multipliers,
                qk_norm=family.qk_norm,
                sinks=family.sinks is not None,
                joined_qk_norm=family.joined_qk_norm,
                norms=family.norms,
                centred_norms=family.centred_norms,
                hidden_act=activation,
                scaled_embeddings=family.scaled_embeddings,
                final_logit_softcapping=cap,
                unrotated_layers=unrotated,
                model_type=kind,
                bos_token_id=fields.integer("bos_token_id", LEAST_ID, default=None),
                eos_token_ids=eos_token_ids(fields),
                dtype=stored or "float32",
            )
        except FileError:
            raise
        except ValueError as error:
            raise fields.error(str(error)) from None

    @classmethod
    def from_file(cls, path: str | Path) -> ModelConfig:
        """Reads a config.json, or the config.json in a folder.

        Raises FileNotFoundError where there is none, and whatever `from_hf` raises.
        """
        path = Path(path)
        path = path / "config.json" if path.is_dir() else path
        try:
            return cls.from_hf(read_fields(path), path)
        except FileNotFoundError:
            what = f"No model configuration at {path}; expected a config.json."
            raise FileNotFoundError(what) from None

    def to_hf(self) -> dict[str, Any]:
        """The dictionary of a config.json that transformers and `from_hf` read back alike."""
        family = FAMILIES[self.model_type]
        fields: dict[str, Any] = {
            "architectures": [family.architecture],
            family.activation: self.hidden_act,
            **{name: getattr(self, name) for name in _SHARED},
            "pad_token_id": None,  # Which some classes would take for one beyond the vocabulary.
            "rope_theta": self.rope.theta,
            "rope_scaling": self.rope.to_hf(),
            "eos_token_id": list(self.eos_token_ids)
            or ([] if "eos_token_id" in family.left_if_null else None),
        }
        if family.window_theta:
            del fields["rope_theta"], fields["rope_scaling"]
            fields["rope_parameters"] = {
                "full_attention": _of_rope(self.rope),
                "sliding_attention": _of_rope(self.window_rope or self.rope),
            }
        for name in BIASES:
            if isinstance(said := getattr(family, name), str):
                fields[said] = getattr(self, name)
        # Llama's class has no windows, but keeps what it does not know.
        if self.model_type != "llama":
            fields["sliding_window"] = self.window or None
        if family.windows == "listed":
            # Their classes make the mask of a window also where no layer has it.
            fields["sliding_window"] = self.window or self.max_position_embeddings
            if family.full_unrotated and not self.unrotated_layers:
                fields["sliding_window"] = self.window or None
        if family.windows == "listed" or (
            self.window and not (family.windows == "all" and family.asks_no_types)
        ):
            fields["layer_types"] = [
                "sliding_attention" if kind == "window" else "full_attention"
                for kind in self.layer_kinds
            ]
            if family.windows not in ("all", "listed"):
                fields["use_sliding_window"] = True
        if family.some_layers_rotate:
            plain = set(self.unrotated_layers)
            fields["no_rope_layers"] = [
                int(layer not in plain) for layer in range(self.num_hidden_layers)
            ]
        if family.experts is not None:
            fields[family.experts.number] = self.num_experts
            fields[family.experts.size] = self.moe_intermediate_size
            fields["num_experts_per_tok"] = self.num_experts_per_tok
            if not family.experts.normalised:
                fields["norm_topk_prob"] = self.norm_topk_prob
            if family.experts.some_layers:
                fields |= {"mlp_only_layers": list(self.plain_layers), "decoder_sparse_step": 1}
            if family.experts.limited:
                fields["swiglu_limit"] = self.swiglu_limit
                fields["swiglu_alpha"] = self.swiglu_alpha
        if family.rope and self.rope.kind == "default":
            fields["rope_parameters"] = {"rope_type": "default"}  # Else it would be the family's.
        if family.multipliers:
            fields |= {name: getattr(self, name) for name in MULTIPLIERS}
        if family.query_scalar:
            by = self.attention_multiplier or self.head_dim**-0.5
            fields[family.query_scalar] = round(by**-2)
        if family.caps_logits:
            fields["final_logit_softcapping"] = self.final_logit_softcapping
        if family.partial_rotary:
            fields["partial_rotary_factor"] = self.rope.partial
        if family.grows_queries:
            fields["rope_scaling"] |= {"llama_4_scaling_beta": self.rope.query_growth}
        if family.original_context:
            fields[family.original_context] = self.rope.original_max_position_embeddings
        return fields


def _of_rope(rope: Rope) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": rope.theta, **(rope.to_hf() or {})}


def _text_half(given: Fields, kinds: Sequence[str]) -> Fields:
    """The fields of the text model, and what is said of it beside them."""
    own = given.inner("text_config")
    own.choice("model_type", kinds)
    over = ("bos_token_id", "eos_token_id", "dtype", "torch_dtype", "quantization_config")
    outer = {name: given.values[name] for name in over if given.values.get(name) is not None}
    tied = "tie_word_embeddings"
    under = {tied: given.values[tied]} if tied in given.values else {}
    return Fields({**under, **own.values, **outer}, given.path)


def eos_token_ids(fields: Fields) -> tuple[int, ...]:
    """`eos_token_id` of a config.json or generation_config.json, which is one, several or none.

    Raises FileError.
    """
    found = fields.values.get("eos_token_id")
    try:
        several = found if isinstance(found, list) else [] if found is None else [found]
        return _token_ids("eos_token_id", several)
    except (TypeError, ValueError) as error:
        raise fields.error(str(error)) from None


def _refuse_changes(fields: Fields, family: Family) -> None:
    if method := fields.values.get("quantization_config"):
        named = method.get("quant_method") if isinstance(method, Mapping) else None
        if family.packed is None or named != family.packed:
            raise fields.error(quantised(checks.short(named or method)))
    for name, only in _ONLY.items():
        value = fields.values.get(name, only[0])
        if not any(value is each for each in only):
            raise fields.error(f"{name} is {checks.short(value)}, which is not supported")


def quantised(how: str) -> str:
    """What is said of a quantised model, and what to do."""
    return (
        f"the model is quantised ({how}), and only float32, float16 and bfloat16 weights are "
        "taken, and the mxfp4 of gpt_oss; load the model it was made from, or save it again after "
        "`dequantize()` of transformers"
    )


def _ropes(fields: Fields, family: Family, context: int, windows: bool) -> dict[str, Rope]:
    original = None
    if family.original_context:
        original = fields.integer(family.original_context, 1)
    read = functools.partial(
        Rope.from_hf,
        fields,
        context,
        partial=family.partial_rotary,
        original=original,
        names=family.ropes,
        window_theta=family.window_theta,
        grows_queries=family.grows_queries,
    )
    found = {"rope": read()}
    if family.window_theta and windows and (own := read(window=True)) != found["rope"]:
        found["window_rope"] = own
    return found


def _experts(fields: Fields, family: Family) -> dict[str, Any]:
    own = family.experts
    if own is None:
        return {}
    # Transformers reads, and writes, either name.
    spellings = {"num_experts", "num_local_experts"} - {own.number}
    number = next((name for name in spellings if name in fields.values), own.number)
    limits = {}
    if own.limited:
        wanted = "a number from 1e-6 to 1e6", 1e-6, 1e6
        limits = {name: fields.real(name, *wanted) for name in ("swiglu_limit", "swiglu_alpha")}
    return {
        "num_experts": fields.integer(number, 1, LARGEST_OF_EXPERTS["num_experts"]),
        "num_experts_per_tok": fields.integer("num_experts_per_tok", 1),
        "moe_intermediate_size": fields.integer(own.size, 1),
        "norm_topk_prob": own.normalised or fields.flag("norm_topk_prob", False),
        "plain_layers": _plain_layers(fields) if own.some_layers else (),
        "expert_bias": own.biases,
        **limits,
    }


def _plain_layers(fields: Fields) -> tuple[int, ...]:
    layers = fields.integer("num_hidden_layers", 1)
    every = fields.integer("decoder_sparse_step", 1, default=1)
    plain = fields.items("mlp_only_layers", None) or ()
    found = tuple(n for n in range(layers) if n in plain or (n + 1) % every)
    if len(found) == layers:
        raise fields.error(
            f"decoder_sparse_step is {every} and mlp_only_layers {checks.short(plain)}, so that no "
            "layer has experts"
        )
    return found


def _unrotated_layers(fields: Fields, family: Family, layers: int) -> tuple[int, ...]:
    if not family.some_layers_rotate:
        return ()
    if (rotates := fields.items("no_rope_layers", None)) is None:
        every = fields.integer("no_rope_layer_interval", 1)
        return tuple(range(every - 1, layers, every))
    if len(rotates) < layers or set(map(type, rotates)) != {int} or {*rotates} - {0, 1}:
        raise fields.error(
            f"no_rope_layers is {checks.short(rotates)}; it must have a 0 or 1 for each of the "
            f"{layers} layers"
        )
    return tuple(layer for layer in range(layers) if not rotates[layer])


def _windows(
    fields: Fields, family: Family, layers: int, context: int, unrotated: tuple[int, ...]
) -> dict[str, Any]:
    """The window and the layers that have it, if it is shorter than the context."""
    window = fields.integer("sliding_window", 0, default=None)
    if family.windows in ("switched", "late", "unrotated"):
        window = window if fields.flag("use_sliding_window", False) else None
    sliding: Sequence[int] = range(layers) if window is not None else ()
    if family.windows == "late":
        first = fields.integer("max_window_layers", -INT32_MAX)
        sliding = [layer for layer in sliding if layer >= first]
    elif family.windows == "unrotated":
        sliding = [layer for layer in sliding if layer in unrotated]
    elif family.windows == "listed" and fields.items("layer_types", None) is None:
        every = family.full_every or fields.integer("sliding_window_pattern", 1)
        sliding = [layer for layer in range(layers) if (layer + 1) % every]
    if (types := fields.items("layer_types", None)) is not None:
        known = ("full_attention", "attention", "sliding_attention")
        if odd := [each for each in types if each not in known]:
            raise fields.error(f"layer_types has {checks.short(odd[0])}, which is not supported")
        if len(types) != layers:
            raise fields.error(f"layer_types has {len(types)} entries for {layers} layers")
        listed = [layer for layer, each in enumerate(types) if each == "sliding_attention"]
        # Some classes do not ask the list: their window holds for every layer.
        sliding = sliding if family.asks_no_types and not listed else listed
        if family.asks_no_types and listed and len(listed) < layers:
            raise fields.error("layer_types mixes kinds, which this model_type does not")
    if not sliding:
        return {}
    if window is None:
        raise fields.error("layer_types has sliding layers, but there is no sliding_window")
    # The rope of such layers may be another, even if their window is never left.
    alike = family.window_theta is None and not family.full_unrotated
    if window >= context and alike:
        return {}
    if family.windows is None:
        raise fields.error(
            f"sliding_window is {window}, and {family.architecture} has no windows. Set it to null"
        )
    return {"window": window, "window_layers": tuple(sliding)}
