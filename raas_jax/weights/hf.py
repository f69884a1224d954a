"""Hugging Face checkpoints: safetensors in, safetensors out.

Every tensor is read on its own and goes straight into its array on the device, so the host never
holds a second copy of the model. Only safetensors is read: no pickle, no code from the checkpoint.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, Sharding
from jax.typing import DTypeLike

from raas_jax.config import ModelConfig
from raas_jax.model import abstract_weights
from raas_jax.params import Params
from raas_jax.sharding import weight_shardings
from raas_jax.weights import safetensors
from raas_jax.weights.files import new_folder, write_companions

Shape = tuple[int, ...]
# None: the default device. A mesh, on which the weights lie by their logical axes; one sharding for
# all arrays; a tree of them like `weights`; or a function from the config to any of these.
Shardings = Mesh | Sharding | Mapping[str, Any] | Callable[[ModelConfig], Any] | None

# Each named transform gives the Hugging Face shape of one layer's tensor from our shape of it.
# The order of the numbers in memory is the same in both, so reading and writing are reshapes.
TRANSFORMS: dict[str, Callable[[Shape], Shape]] = {
    "same": lambda shape: shape,
    # ours [heads, head_dim, ...], theirs [heads * head_dim, ...]
    "rows_to_heads": lambda shape: (shape[0] * shape[1], *shape[2:]),
}

# Hugging Face name → (our path, transform). `{layer}` numbers the leading axis of our array.
# In Hugging Face's order. A row counts only where the model has that array.
TABLE: dict[str, tuple[str, str]] = {
    "model.embed_tokens.weight": ("embedding", "same"),
    "model.layers.{layer}.input_layernorm.weight": ("layers.attention_norm", "same"),
    "model.layers.{layer}.self_attn.q_proj.weight": ("layers.q", "rows_to_heads"),
    "model.layers.{layer}.self_attn.q_proj.bias": ("layers.q_bias", "rows_to_heads"),
    "model.layers.{layer}.self_attn.q_norm.weight": ("layers.q_norm", "same"),
    "model.layers.{layer}.self_attn.k_proj.weight": ("layers.k", "rows_to_heads"),
    "model.layers.{layer}.self_attn.k_proj.bias": ("layers.k_bias", "rows_to_heads"),
    "model.layers.{layer}.self_attn.k_norm.weight": ("layers.k_norm", "same"),
    "model.layers.{layer}.self_attn.v_proj.weight": ("layers.v", "rows_to_heads"),
    "model.layers.{layer}.self_attn.v_proj.bias": ("layers.v_bias", "rows_to_heads"),
    "model.layers.{layer}.self_attn.o_proj.weight": ("layers.o", "same"),
    "model.layers.{layer}.self_attn.o_proj.bias": ("layers.o_bias", "same"),
    "model.layers.{layer}.post_attention_layernorm.weight": ("layers.mlp_norm", "same"),
    "model.layers.{layer}.mlp.gate_proj.weight": ("layers.gate", "same"),
    "model.layers.{layer}.mlp.gate_proj.bias": ("layers.gate_bias", "same"),
    "model.layers.{layer}.mlp.up_proj.weight": ("layers.up", "same"),
    "model.layers.{layer}.mlp.up_proj.bias": ("layers.up_bias", "same"),
    "model.layers.{layer}.mlp.down_proj.weight": ("layers.down", "same"),
    "model.layers.{layer}.mlp.down_proj.bias": ("layers.down_bias", "same"),
    "model.norm.weight": ("norm", "same"),
    "lm_head.weight": ("head", "same"),
}

# Constants that old checkpoints saved; they follow from the config.
IGNORED_ENDINGS = ("rotary_emb.inv_freq",)

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000


class Destination(NamedTuple):
    """Where a tensor goes: our path, the layer (None for an unstacked array), its HF shape."""

    path: str
    layer: int | None
    shape: Shape


def destinations(config: ModelConfig) -> dict[str, Destination]:
    """Every Hugging Face tensor name of a model → where it goes, in Hugging Face's order."""
    leaves = flat_shapes(config, "float32")
    rows = {name: rule for name, rule in TABLE.items() if rule[0] in leaves}
    assert {path for path, _ in rows.values()} == set(leaves), "TABLE lacks an array of the model"
    found: dict[str, Destination] = {}
    for per_layer, group in itertools.groupby(rows, lambda name: "{layer}" in name):
        layers: Iterable[int | None] = range(config.num_hidden_layers) if per_layer else (None,)
        for layer, name in itertools.product(layers, group):
            path, transform = rows[name]
            shape = leaves[path].shape[1:] if per_layer else leaves[path].shape
            place = Destination(path, layer, TRANSFORMS[transform](shape))
            found[name.format(layer=layer)] = place
    return found


def flat_shapes(config: ModelConfig, dtype: str) -> dict[str, jax.ShapeDtypeStruct]:
    """Dotted path → shape and dtype of every array of the model; nothing is allocated."""
    return flatten(abstract_weights(config, dtype))


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionary → dotted paths."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = value
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted paths → nested dictionary."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, name = path.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
    return tree


def flat_shardings(config: ModelConfig, sharding: Shardings) -> dict[str, Sharding | None]:
    """Dotted path → sharding of that array, from any form of the `sharding` argument."""
    tree: Any = sharding
    if callable(sharding) and not isinstance(sharding, Mesh | Sharding):
        tree = sharding(config)
    if isinstance(tree, Mesh):
        tree = weight_shardings(config, tree)
    paths = list(flat_shapes(config, "float32"))
    if tree is None or isinstance(tree, Sharding):
        return dict.fromkeys(paths, tree)
    flat = flatten(tree)
    if set(flat) != set(paths):
        odd = sorted(set(flat) ^ set(paths))
        raise ValueError(
            f"sharding does not have the structure of the weights; it differs in {', '.join(odd)}."
        )
    return flat


def wanted_dtype(dtype: DTypeLike | None, source: str) -> np.dtype:
    """The dtype to load in.

    None means bfloat16 on an accelerator and float32 on a CPU; "source" means that of the files.
    """
    if dtype is None:
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    elif isinstance(dtype, str) and dtype == "source":
        dtype = source
    with contextlib.suppress(TypeError):
        found: np.dtype = jnp.dtype(dtype)
        if found in safetensors.CODES:
            return found
    raise ValueError(f"dtype is {dtype!r}; expected float32, float16, bfloat16, 'source' or None.")


def load_hf(
    folder: str | Path, *, dtype: DTypeLike | None = None, sharding: Shardings = None
) -> Params:
    """Loads a Hugging Face folder: config.json with model.safetensors, whole or in shards.

    Args:
      folder: the local folder.
      dtype, sharding: as for `raas_jax.load`.

    Returns:
      `Params` whose `source` is the folder and whose config has the dtype that was loaded.

    Raises:
      FileNotFoundError: no config.json, no safetensors (also where there is only a pickle), or a
        missing shard.
      ValueError: an unsupported model, a corrupt file, an index that points outside the folder,
        or tensors that do not fit: all of them in one message.
    """
    folder = Path(folder).expanduser()
    config = ModelConfig.from_file(folder)
    entries = checked_entries(folder, config)
    stored = {safetensors.DTYPES[entry.code].name for entry in entries.values()}
    to = wanted_dtype(dtype, stored.pop() if len(stored) == 1 else "float32")
    places = destinations(config)
    shardings = flat_shardings(config, sharding)
    _check_layers_whole(shardings)
    leaves = flat_shapes(config, to.name)
    arrays = {
        path: jnp.zeros(leaf.shape, to, device=shardings[path])
        for path, leaf in leaves.items()
        if path.startswith("layers.")
    }
    for name, entry in entries.items():
        path, layer, _ = places[name]
        shape = leaves[path].shape
        if layer is None:
            arrays[path] = _to_device(entry, shape, to, shardings[path])
        else:
            tensor = _to_device(entry, (1, *shape[1:]), to, shardings[path])
            arrays[path] = _set_layer(arrays[path], tensor, jnp.int32(layer))
        # Waiting here keeps the host at one tensor; JAX would queue the next ones.
        arrays[path].block_until_ready()
    config = dataclasses.replace(config, dtype=to.name)
    return Params(unflatten(arrays), config, str(folder.absolute()))


def _to_device(
    entry: safetensors.Entry, shape: Shape, dtype: np.dtype, sharding: Sharding | None
) -> jax.Array:
    """One tensor, from its file to the device."""
    values = safetensors.read_tensor(entry, dtype).reshape(shape)
    if sharding is not None:
        return jax.make_array_from_callback(shape, sharding, lambda index: values[index])
    array: jax.Array = jax.device_put(values)
    return array


@functools.partial(jax.jit, donate_argnums=0)
def _set_layer(array: jax.Array, tensor: jax.Array, layer: jax.Array) -> jax.Array:
    # The stack is donated, so that a layer `[1, ...]` is written into it in place.
    return jax.lax.dynamic_update_slice_in_dim(array, tensor, layer, 0)


def _check_layers_whole(shardings: Mapping[str, Sharding | None]) -> None:
    """Raises ValueError for a stack that is split over layers, which are loaded one by one."""
    for path, sharding in shardings.items():
        if path.startswith("layers.") and isinstance(sharding, NamedSharding):
            over = next(iter(sharding.spec), None)
            if over is not None:
                raise ValueError(f"sharding splits the layers axis over {over!r}; keep it whole.")


def checked_entries(folder: Path, config: ModelConfig) -> dict[str, safetensors.Entry]:
    """The tensors of a folder, once all of them are known to fit the model.

    Raises:
      ValueError: one message that lists every unknown, missing, duplicate and misshapen tensor.
    """
    places = destinations(config)
    entries: dict[str, safetensors.Entry] = {}
    problems: list[str] = []
    for file in weight_files(folder):
        tensors, twice = safetensors.read_header(file)
        problems += [f"duplicate: {name} is twice in {file.name}" for name in twice]
        for name, entry in tensors.items():
            if name in entries:
                other = entries[name].file.name
                problems.append(f"duplicate: {name} is in {other} and in {file.name}")
            entries[name] = entry
    entries = {n: e for n, e in entries.items() if not n.endswith(IGNORED_ENDINGS)}
    head, table = entries.get("lm_head.weight"), entries.get("model.embed_tokens.weight")
    if config.tie_word_embeddings and head and table:
        # A tied head that was saved anyway is dropped, but only when dropping it changes nothing.
        if safetensors.same_bytes(head, table):
            del entries["lm_head.weight"]
        else:
            problems.append(
                "unknown: lm_head.weight differs from model.embed_tokens.weight, but config.json "
                "ties them; set tie_word_embeddings to false if the model has its own head"
            )
            del entries["lm_head.weight"]
    problems += [f"unknown: {name}" for name in sorted(entries.keys() - places.keys())]
    problems += [f"missing: {name}" for name in places if name not in entries]
    both = [(name, place, entries[name]) for name, place in places.items() if name in entries]
    problems += [
        f"misshapen: {name} is {list(entry.shape)}, expected {list(place.shape)}"
        for name, place, entry in both
        if entry.shape != place.shape
    ]
    problems += [
        f"unsupported dtype: {name} is {entry.code}, expected {', '.join(safetensors.DTYPES)}"
        for name, _, entry in both
        if entry.code not in safetensors.DTYPES
    ]
    if problems:
        raise ValueError(
            f"The weights in {folder} do not fit its config.json (model_type "
            f"{config.model_type}, {config.num_hidden_layers} layers):\n  " + "\n  ".join(problems)
        )
    return entries


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: `model.safetensors`, or the shards of its index."""
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if (folder / INDEX).is_file():
        return _shards(folder)
    pickles = sorted(file.name for file in folder.glob("*.bin"))
    if pickles:
        raise FileNotFoundError(
            f"{folder} has its weights only as a pickle ({pickles[0]}), which can run code when "
            f"it is read. Convert it to {SINGLE} first, e.g. by save_pretrained of transformers."
        )
    raise FileNotFoundError(f"No weights in {folder}; expected {SINGLE} or {INDEX}.")


def _shards(folder: Path) -> list[Path]:
    """The files named by an index, in its order; none of them outside the folder."""
    index = folder / INDEX
    try:
        names = json.loads(index.read_text())["weight_map"].values()
        unique = list(dict.fromkeys(names))
        assert unique and all(isinstance(name, str) for name in unique)
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
        raise ValueError(
            f"{index} is not an index of shards; expected a JSON object with a weight_map from "
            "tensor names to file names."
        ) from error
    outside = [name for name in unique if not _inside(folder, name)]
    if outside:
        raise ValueError(
            f"{index} points outside its folder: {', '.join(map(repr, outside))}. This is refused; "
            "the shards must lie beside the index."
        )
    absent = [name for name in unique if not (folder / name).is_file()]
    if absent:
        raise FileNotFoundError(
            f"{folder} lacks {len(absent)} of the {len(unique)} files in its index: "
            f"{', '.join(absent)}. Download or copy them again."
        )
    return [folder / name for name in unique]


def _inside(folder: Path, name: str) -> bool:
    """Whether a name of an index stays in its folder, also once links are followed."""
    if not name or "\0" in name or Path(name).is_absolute() or ".." in Path(name).parts:
        return False
    roots = [folder.resolve()]
    if folder.absolute().parent.name == "snapshots":
        # The cache of huggingface_hub keeps the bytes beside its snapshots, and links to them.
        roots.append(folder.absolute().parent.parent.resolve() / "blobs")
    real = (folder / name).resolve()
    return any(real.is_relative_to(root) for root in roots)


def save_hf(params: Params, folder: str | Path, *, shard_bytes: int = SHARD_BYTES) -> None:
    """Writes a Hugging Face folder: config.json, safetensors, and the tokenizer of the source.

    The folder appears only once it is complete. Above `shard_bytes` the weights are split into
    shards with an index. In an unchanged dtype every tensor has the bytes it was loaded from.

    Raises:
      FileExistsError: the folder is there and not empty.
      OSError: it cannot be written.
    """
    leaves = flatten(params.stacked().weights)
    dtype = np.dtype(leaves["embedding"].dtype)
    places = destinations(params.config)

    def tensor(place: Destination) -> np.ndarray:
        leaf = leaves[place.path]
        value = leaf if place.layer is None else leaf[place.layer]
        return np.asarray(value).reshape(place.shape)

    shards = _split({name: place.shape for name, place in places.items()}, dtype, shard_bytes)
    with new_folder(folder) as partial:
        write_companions(params, dtype, partial)
        weight_map: dict[str, str] = {}
        for number, shapes in enumerate(shards, start=1):
            several = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            file = SINGLE if len(shards) == 1 else several
            values: Iterator[np.ndarray] = (tensor(places[name]) for name in shapes)
            safetensors.write_file(partial / file, shapes, dtype, values)
            weight_map.update(dict.fromkeys(shapes, file))
        if len(shards) > 1:
            size = sum(leaf.nbytes for leaf in leaves.values())
            index = {"metadata": {"total_size": size}, "weight_map": weight_map}
            (partial / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _split(shapes: dict[str, Shape], dtype: np.dtype, limit: int) -> list[dict[str, Shape]]:
    """Cuts the tensors, in order, into groups of at most `limit` bytes, or one tensor."""
    groups: list[dict[str, Shape]] = [{}]
    size = 0
    for name, shape in shapes.items():
        more = math.prod(shape) * dtype.itemsize
        if groups[-1] and size + more > limit:
            groups.append({})
            size = 0
        groups[-1][name] = shape
        size += more
    return groups
