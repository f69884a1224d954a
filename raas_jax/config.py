"""Model configuration: one frozen dataclass for every supported architecture.

The fields keep Hugging Face's names. What differs between Llama, Mistral, Qwen2 and Qwen3 is
written out as flags (`qkv_bias`, `qk_norm`, ...), so that no other file asks for a model type.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import yaml

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
DTYPES = ("float32", "float16", "bfloat16")
# Each with the fields that are its own, by their names in a config.json and in `Rope`.
ROPE_TYPES: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": (
        *("factor", "low_freq_factor", "high_freq_factor"),
        "original_max_position_embeddings",
    ),
}
_REQUIRED = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    "num_attention_heads",
)
# With the same name and meaning in a config.json.
_SHARED = (
    *("model_type", *_REQUIRED, "num_key_value_heads", "head_dim", "max_position_embeddings"),
    *("rms_norm_eps", "tie_word_embeddings", "bos_token_id", "dtype"),
)


def read_yaml(file: str | Path) -> dict[str, Any]:
    """Named fields of a configuration, from its YAML file.

    Raises:
      FileNotFoundError: there is no such file. ValueError: it holds something else.
    """
    if not Path(file).is_file():
        raise FileNotFoundError(f"config is {str(file)!r}; there is no such file.")
    return _named_fields(Path(file), yaml.safe_load, "YAML")


def read_json(file: Path) -> dict[str, Any]:
    """The fields of the JSON object in a file; ValueError for anything else."""
    return _named_fields(file, json.loads, "JSON")


def _named_fields(file: Path, parse: Callable[[str], object], language: str) -> dict[str, Any]:
    try:
        fields = parse(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{file} is not valid {language} ({error}).") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{file} holds a {type(fields).__name__}; expected named fields.")
    return fields


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position embedding: base `theta` and, for long contexts, a frequency scaling.

    `kind` is one of `ROPE_TYPES`. `linear` divides every frequency by `factor`; `llama3` divides
    only the low ones and blends in between (Llama 3.1 report, section 3.4.2 and the published
    configuration fields of the same names).
    """

    theta: float = 10_000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Rope:
        """Reads `rope_theta` + `rope_scaling` (transformers 4) or `rope_parameters` (5)."""
        fields: dict[str, Any] = {}
        for name in ("rope_scaling", "rope_parameters"):
            fields.update(config.get(name) or {})
        kind = fields.get("rope_type", fields.get("type", "default"))
        _one_of(ROPE_TYPES, "rope_type", kind)
        theta = float(fields.get("rope_theta", config.get("rope_theta") or 10_000.0))
        own = {name: type(getattr(cls, name))(fields[name]) for name in ROPE_TYPES[kind]}
        return cls(theta, kind, **own)

    def to_hf(self) -> dict[str, Any] | None:
        """The `rope_scaling` entry of a config.json, or None where there is no scaling."""
        if self.kind == "default":
            return None
        own = {name: getattr(self, name) for name in ROPE_TYPES[self.kind]}
        return {"rope_type": self.kind, **own}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape of a decoder-only transformer. Hashable, so it can be a static argument of a jit.

    Axis letters: `V` vocab_size, `D` hidden_size, `F` intermediate_size, `L` num_hidden_layers,
    `N` num_attention_heads, `K` num_key_value_heads, `H` head_dim, `G = N / K`.
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
    model_type: str = "llama"
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    dtype: str = "float32"

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type == "int" and not (isinstance(value, int) and value > 0):
                raise ValueError(f"ModelConfig.{field.name} is {value!r}; it must be an int > 0.")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"ModelConfig.num_attention_heads is {self.num_attention_heads}, which is not a "
                f"multiple of num_key_value_heads = {self.num_key_value_heads}."
            )
        if self.head_dim % 2:
            raise ValueError(f"ModelConfig.head_dim is {self.head_dim}; rotation needs it even.")

    @property
    def layer_pattern(self) -> tuple[str, ...]:
        """Kinds of layers, repeated `L / len(layer_pattern)` times; there is one kind today."""
        return ("full",)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> ModelConfig:
        """Builds from the dictionary of a Hugging Face config.json.

        Raises ValueError for an architecture, activation, rope type or attention window that this
        library does not implement, naming the value and the supported ones.
        """
        kind = _one_of(ARCHITECTURES, "model_type", config.get("model_type"))
        _one_of(["silu"], "hidden_act", config.get("hidden_act", "silu"))
        dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32")
        _refuse_sliding_window(config)
        missing = [name for name in _REQUIRED if config.get(name) is None]
        if missing:
            raise ValueError(f"config.json lacks {', '.join(missing)}; the file is not complete.")
        shape = {name: int(config[name]) for name in _REQUIRED}
        heads, hidden = shape["num_attention_heads"], shape["hidden_size"]
        attention_bias = bool(config.get("attention_bias", False))
        return cls(
            **shape,
            num_key_value_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or (128 if kind == "qwen3" else hidden // heads)),
            max_position_embeddings=int(config.get("max_position_embeddings") or 2048),
            rope=Rope.from_hf(config),
            rms_norm_eps=float(config.get("rms_norm_eps") or 1e-6),
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=kind == "qwen2" or attention_bias,
            output_bias=kind != "qwen2" and attention_bias,
            mlp_bias=kind == "llama" and bool(config.get("mlp_bias", False)),
            qk_norm=kind == "qwen3",
            model_type=kind,
            bos_token_id=config.get("bos_token_id"),
            eos_token_ids=eos_token_ids(config),
            dtype=_one_of(DTYPES, "dtype", dtype.removeprefix("torch.")),
        )

    @classmethod
    def from_file(cls, path: str | Path) -> ModelConfig:
        """Reads a config.json, or the config.json in a folder."""
        path = Path(path)
        path = path / "config.json" if path.is_dir() else path
        if not path.is_file():
            raise FileNotFoundError(f"No model configuration at {path}; expected a config.json.")
        return cls.from_hf(read_json(path))

    def to_hf(self) -> dict[str, Any]:
        """The dictionary of a config.json that transformers and `from_hf` read back alike."""
        fields: dict[str, Any] = {
            "architectures": [ARCHITECTURES[self.model_type]],
            "hidden_act": "silu",
            **{name: getattr(self, name) for name in _SHARED},
            "rope_theta": self.rope.theta,
            "rope_scaling": self.rope.to_hf(),
            "eos_token_id": list(self.eos_token_ids) or None,
        }
        if self.model_type != "qwen2":
            fields["attention_bias"] = self.qkv_bias
        if self.model_type == "llama":
            fields["mlp_bias"] = self.mlp_bias
        else:
            fields["sliding_window"] = None
        return fields


def eos_token_ids(fields: Mapping[str, Any]) -> tuple[int, ...]:
    """`eos_token_id` of a config.json or generation_config.json, which is one, several or none."""
    found = fields.get("eos_token_id")
    return tuple(found) if isinstance(found, list) else () if found is None else (found,)


def _one_of(supported: Collection[str], name: str, value: Any) -> str:
    """The value, if it is supported; else raises ValueError."""
    if value in supported:
        return str(value)
    raise ValueError(f"config.json: {name} is {value!r}; supported are {', '.join(supported)}.")


def _refuse_sliding_window(config: Mapping[str, Any]) -> None:
    """A window shorter than the context changes attention; running without it would be wrong."""
    window = config.get("sliding_window")
    if not window or not config.get("use_sliding_window", config["model_type"] == "mistral"):
        return
    if window < (config.get("max_position_embeddings") or 2048):
        raise ValueError(
            f"config.json: sliding_window is {window}, and sliding-window attention is not "
            "supported. Set sliding_window to null only if the model was trained without it."
        )
