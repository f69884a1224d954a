"""Hugging Face checkpoints: safetensors in, safetensors out.

Every tensor is read on its own and goes straight into its array on the device, so the host never
holds a second copy of the model. Only safetensors is read: no pickle, no code from the checkpoint.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding
from jax.typing import DTypeLike

from raas_jax.checks import short
from raas_jax.config import ModelConfig, quantised
from raas_jax.families import FAMILIES, PLAIN, TEXT_HALVES, ExpertNames
from raas_jax.files import Fields, FileError, read_fields
from raas_jax.model import abstract_weights
from raas_jax.params import Params
from raas_jax.sharding import weight_shardings
from raas_jax.weights import mxfp4, safetensors
from raas_jax.weights.files import Shape, listed, misfits, new_folder, write_companions
from raas_jax.weights.mxfp4 import Packed
from raas_jax.weights.safetensors import Entry

# None: the default device. A mesh, on which the weights lie by their logical axes; one sharding for
# all arrays; a tree of them like `weights`; or a function from the config to any of these.
Shardings = Mesh | Sharding | Mapping[str, Any] | Callable[[ModelConfig], Any] | None

# Ours are [heads, head_dim, ...], theirs [heads * head_dim, ...]. The numbers lie in memory in the
# same order, so reading and writing are reshapes; but see `_in_halves`.
JOINED = ("layers.q", "layers.k", "layers.v", "layers.q_norm", "layers.k_norm")

# What quantisation puts beside a weight, or in its place: GPTQ and AWQ, fp8, bitsandbytes.
QUANTISED_ENDINGS = (
    *(".qweight", ".qzeros", ".weight_scale", ".weight_scale_inv", ".weight_packed"),
    *(".absmax", ".SCB"),
)
# Constants that old checkpoints saved; they follow from the config.
IGNORED_ENDINGS = ("rotary_emb.inv_freq",)

# What names of the text model begin with in a model that takes more than text: what they do here;
# and of what else it has, which is left out.
TEXT_PREFIXES = {
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "model.language_model.": "model.",
}
OTHER_PREFIXES = (
    *("vision_tower.", "multi_modal_projector."),
    *("model.vision_tower.", "model.multi_modal_projector."),
)

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
SHARD_BYTES = 5_000_000_000


class Destination(NamedTuple):
    """Where a tensor goes.

    Attributes:
      paths: ours, of which several lie in one tensor, one after the other.
      at: where in the stack: its layer, and its expert; () for an array that is no stack.
      shape: of the tensor.
      rows: how long its first axis is for each path.
      takes_turns: the tensor is of all experts of a layer, of each `[in, out]`, or the bias
        `[out]`, and along its last axis the paths take turns.
    """

    paths: tuple[str, ...]
    at: tuple[int, ...]
    shape: Shape
    rows: tuple[int, ...]
    takes_turns: bool = False

    def pieces(self, entry: Entry | Packed) -> list[tuple[tuple[int, ...], Entry | Packed]]:
        """What of a tensor is read at a time, and where in the stack it goes."""
        if not self.takes_turns:
            return [(self.at, entry)]
        parts: Sequence[Entry | Packed] = entry.parts()
        return [((*self.at, expert), part) for expert, part in enumerate(parts)]

    def apart(self, values: np.ndarray) -> list[np.ndarray]:
        """What of such a piece each path has; nothing is copied."""
        if not self.takes_turns:
            return np.split(values, np.cumsum(self.rows)[:-1])
        return [values.T[first :: len(self.paths)] for first in range(len(self.paths))]

    def together(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        """The tensor, of what each path has at `at`."""
        if self.takes_turns:
            several = np.stack(arrays, axis=2)
            joined = several.reshape(several.shape[0], -1, *several.shape[3:])
            return np.swapaxes(joined, 1, -1)
        parts = [
            array.reshape(count, *self.shape[1:])
            for array, count in zip(arrays, self.rows, strict=True)
        ]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


def destinations(config: ModelConfig) -> dict[str, Destination]:
    """Every Hugging Face tensor name of a model → where it goes, in Hugging Face's order."""
    names: list[tuple[str, tuple[str, ...], tuple[int, ...]]] = []
    names.append(("model.embed_tokens.weight", ("embedding",), ()))
    turning = set()
    family = FAMILIES[config.model_type]
    own = family.experts or ExpertNames("", "")
    plain, sparse = (
        {layer: place for place, layer in enumerate(of)}
        for of in (config.plain_layers, config.expert_layers)
    )
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}"
        for theirs, paths in (PLAIN if i in plain else {}).items():
            names.append((f"{layer}.{theirs}.weight", paths, (plain[i], 0)))
        for theirs, ours in family.layer.items():
            if i in plain and ours == ("router",):
                continue
            paths = tuple(f"layers.{each}" for each in ours)
            names.append((f"{layer}.{theirs}.weight", paths, (i,)))
            names.append((f"{layer}.{theirs}.bias", tuple(f"{path}_bias" for path in paths), (i,)))
        names.append((f"{layer}.{family.sinks}", ("layers.sink",), (i,)))
        for expert in range(config.num_experts if i in sparse else 0):
            for theirs, path in own.tensors.items():
                at = sparse[i], expert
                names.append((f"{layer}.{theirs.format(expert)}.weight", (path,), at))
        for theirs, paths in own.together.items():
            names.append((f"{layer}.{theirs}", paths, (i,)))
            names.append((f"{layer}.{theirs}_bias", tuple(f"{path}_bias" for path in paths), (i,)))
            turning |= {name for name, _, _ in names[-2:]}
    names += [("model.norm.weight", ("norm",), ()), ("lm_head.weight", ("head",), ())]
    leaves = flat_shapes(config, "float32")
    found: dict[str, Destination] = {}
    for name, paths, index in names:
        if paths[0] not in leaves:
            continue
        if name in turning:
            shapes = [leaves[path].shape[1:] for path in paths]
            rows = tuple(shape[1] for shape in shapes)
            whole = shapes[0][0], *shapes[0][2:], sum(rows)
            found[name] = Destination(paths, index, whole, rows, takes_turns=True)
        else:
            shapes = [_their_shape(path, leaves[path].shape[len(index) :]) for path in paths]
            rows = tuple(shape[0] for shape in shapes)
            found[name] = Destination(paths, index, (sum(rows), *shapes[0][1:]), rows)
    assert {path for place in found.values() for path in place.paths} == set(leaves), (
        "an array without a name"
    )
    return found


def _their_shape(path: str, own: Shape) -> Shape:
    if path.removesuffix("_bias") in JOINED and len(own) > 1:
        return own[0] * own[1], *own[2:]
    return own


def flat_shapes(config: ModelConfig, dtype: str) -> dict[str, jax.ShapeDtypeStruct]:
    """Dotted path → shape and dtype of every array of the model; nothing is allocated."""
    return flatten(abstract_weights(config, dtype))


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dictionary → dotted paths."""
    if not isinstance(tree, Mapping):
        return {prefix.removesuffix("."): tree}
    parts = (flatten(value, f"{prefix}{name}.") for name, value in tree.items())
    return {path: leaf for part in parts for path, leaf in part.items()}


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
    paths = flat_shapes(config, "float32").keys()
    if tree is None or isinstance(tree, Sharding):
        return dict.fromkeys(paths, tree)
    flat = flatten(tree)
    if odd := ", ".join(sorted(flat.keys() ^ paths)):
        raise ValueError(f"sharding has another structure than the weights; it differs in {odd}.")
    return flat


def wanted_dtype(dtype: DTypeLike | None, source: str) -> np.dtype:
    """The dtype to load in, as `raas_jax.load` takes it; `source` is that of the files."""
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
    folder: str | Path,
    *,
    dtype: DTypeLike | None = None,
    sharding: Shardings = None,
    layers: Literal["stacked", "separate"] = "stacked",
) -> Params:
    """Loads a local Hugging Face folder: config.json with model.safetensors, whole or in shards.

    `dtype`, `sharding` and `layers` are those of `raas_jax.load`. The config has the dtype that was
    loaded.

    Raises:
      FileNotFoundError: no config.json, no safetensors (also where there is only a pickle), or a
        missing shard.
      FileError: an unsupported model, one that is quantised otherwise than gpt-oss, an adapter, a
        corrupt file, or an index that points outside the folder.
      ValueError: tensors that do not fit: all of them in one message.
    """
    folder = Path(folder).expanduser()
    if adapter := next((name for name in ADAPTER if (folder / name).exists()), None):
        raise FileError(
            folder / adapter,
            "is an adapter (LoRA), which transformers would apply to its base model. Merge it into "
            "the base by merge_and_unload() of peft, and save the result by save_pretrained().",
        )
    config = ModelConfig.from_file(folder)
    entries = checked_entries(folder, config)
    codes = {entry.code for entry in entries.values() if isinstance(entry, Entry)}
    stored = {safetensors.DTYPES[code].name for code in codes}
    to = wanted_dtype(dtype, stored.pop() if len(stored) == 1 else "float32")
    places = destinations(config)
    shardings = flat_shardings(config, sharding)
    shapes = {path: leaf.shape for path, leaf in flat_shapes(config, to.name).items()}
    stacks = {path for place in places.values() if place.at for path in place.paths}
    for path in stacks:
        where = shardings[path]
        if isinstance(where, NamedSharding) and (over := next(iter(where.spec), None)):
            raise ValueError(f"sharding splits the layers axis over {over!r}; keep it whole.")
    apart: list[dict[str, jax.Array]] = []
    if layers == "separate":
        apart = [{} for _ in range(config.num_hidden_layers)]
    arrays: dict[str, Any]
    whole = {path for path in stacks if not (apart and path.startswith("layers."))}
    arrays = {path: jnp.zeros(shapes[path], to, device=shardings[path]) for path in whole}
    pieces = (
        (places[name], at, piece)
        for name, entry in entries.items()
        for at, piece in places[name].pieces(entry)
    )
    for place, at, piece in pieces:
        for path, part in zip(place.paths, place.apart(piece.read(to)), strict=True):
            part = _in_halves(part, path, config)
            shape = shapes[path]
            if path in whole:
                one = (1,) * len(at)
                tensor = _to_device(part, (*one, *shape[len(at) :]), shardings[path])
                array = arrays[path] = _set(arrays[path], tensor, jnp.asarray(at, jnp.int32))
            elif at:
                array = _to_device(part, shape[1:], _of_one_layer(shardings[path]))
                apart[at[0]][path.removeprefix("layers.")] = array
            else:
                array = arrays[path] = _to_device(part, shape, shardings[path])
            # Waiting here keeps the host at one piece; JAX would queue the next ones.
            array.block_until_ready()
    if apart:
        # A layer without a choice has no router, where the others have one.
        for own in apart:
            for path in stacks - whole:
                name, shape = path.removeprefix("layers."), shapes[path][1:]
                if name not in own:
                    own[name] = jnp.zeros(shape, to, device=_of_one_layer(shardings[path]))
        arrays["layers"] = tuple(apart)
    config = dataclasses.replace(config, dtype=to.name)
    return Params(unflatten(arrays), config, str(folder.absolute()))


def _in_halves(
    values: np.ndarray, path: str, config: ModelConfig, *, back: bool = False
) -> np.ndarray:
    """Queries and keys `[heads * H, ...]`, the pairs that are rotated in two halves of each head.

    Products of queries with keys do not depend on the order of a head's numbers, so that it is
    changed once, here, for the families whose pairs are neighbours; and `back`, of our
    `[heads, H, ...]`, when it is written.
    """
    name = path.removesuffix("_bias")
    if not FAMILIES[config.model_type].pairs_side_by_side or name not in ("layers.q", "layers.k"):
        return values
    heads = values if back else values.reshape(-1, config.head_dim, *values.shape[1:])
    size, rest = config.rope.rotated(config.head_dim), heads.shape[2:]
    grid = (2, size // 2) if back else (size // 2, 2)
    turned = heads[:, :size].reshape(-1, *grid, *rest).swapaxes(1, 2).reshape(-1, size, *rest)
    return np.concatenate([turned, heads[:, size:]], axis=1).reshape(values.shape)


def _of_one_layer(sharding: Sharding | None) -> Sharding | None:
    if not isinstance(sharding, NamedSharding):
        return sharding
    return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))


def _to_device(values: np.ndarray, shape: Shape, sharding: Sharding | None) -> jax.Array:
    """One array, from the host to the device."""
    values = values.reshape(shape)
    if sharding is not None:
        return jax.make_array_from_callback(shape, sharding, lambda index: values[index])
    array: jax.Array = jax.device_put(values)
    return array


@functools.partial(jax.jit, donate_argnums=0)
def _set(array: jax.Array, tensor: jax.Array, index: jax.Array) -> jax.Array:
    # The stack is donated, so that a layer `[1, ...]`, or an expert, is written into it in place.
    start = (*index, *[jnp.int32(0)] * (array.ndim - len(index)))
    return jax.lax.dynamic_update_slice(array, tensor, start)


def checked_entries(folder: Path, config: ModelConfig) -> dict[str, Entry | Packed]:
    """The tensors of a folder, once all of them are known to fit the model.

    Raises:
      ValueError: one message that lists every unknown, missing, duplicate and misshapen tensor.
      FileError: a quantised model, a config of a far larger model, or a damaged file.
    """
    known = safetensors.DTYPES
    entries: dict[str, Entry] = {}
    problems: list[str] = []
    half = read_fields(folder / "config.json").get("model_type") in TEXT_HALVES
    for file in weight_files(folder):
        tensors, twice = safetensors.read_header(file)
        problems += [f"duplicate: {name} is twice in {file.name}" for name in twice]
        if half:
            tensors = _of_text(tensors)
        for name, entry in tensors.items():
            if name in entries:
                other = entries[name].file.name
                problems.append(f"duplicate: {name} is in {other} and in {file.name}")
            entries[name] = entry
    entries = {n: e for n, e in entries.items() if not n.endswith(IGNORED_ENDINGS)}
    for name, entry in entries.items():
        if name.endswith(QUANTISED_ENDINGS) or entry.code.startswith(("F8_", "F6_", "F4")):
            raise FileError(entry.file, f"cannot be used: {quantised(short(name))}.")
    stored = sum(entry.size for entry in entries.values())
    wanted = sum(math.prod(leaf.shape) for leaf in flat_shapes(config, "float32").values())
    if wanted > 2 * stored:  # Of four bits, the smallest, there are two in a byte.
        what = f"describes a model of {wanted} numbers, but its weights are {stored} bytes in all"
        raise FileError(folder / "config.json", f"{what}; it belongs to another model.")
    places = destinations(config)
    head, table = entries.get("lm_head.weight"), entries.get("model.embed_tokens.weight")
    if config.tie_word_embeddings and head and table:
        # A tied head that was saved anyway is dropped, but only when dropping it changes nothing.
        if not safetensors.same_bytes(head, table):
            problems.append(
                "unknown: lm_head.weight differs from model.embed_tokens.weight, but config.json "
                "ties them; set tie_word_embeddings to false if the model has its own head"
            )
        del entries["lm_head.weight"]
    packing = [name for name, place in places.items() if place.takes_turns]
    found, unfit = mxfp4.paired(entries, packing)
    problems += unfit + misfits(
        {name: entry.shape for name, entry in found.items()},
        {name: place.shape for name, place in places.items()},
    )
    codes = {name: entry.code for name, entry in found.items() if isinstance(entry, Entry)}
    problems += [
        f"unsupported dtype: {name} is {codes[name]}, expected {', '.join(known)}"
        for name in places
        if codes.get(name, "F32") not in known
    ]
    if problems:
        raise ValueError(
            f"The weights in {folder} do not fit its config.json (model_type "
            f"{config.model_type}, {config.num_hidden_layers} layers):{listed(problems)}"
        )
    return found


def _of_text(tensors: Mapping[str, safetensors.Entry]) -> dict[str, safetensors.Entry]:
    found = {}
    for name, entry in tensors.items():
        prefix = next((each for each in TEXT_PREFIXES if name.startswith(each)), "")
        if not name.startswith(OTHER_PREFIXES):
            found[TEXT_PREFIXES.get(prefix, "") + name.removeprefix(prefix)] = entry
    return found


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: `model.safetensors`, or the shards of its index."""
    # A link to nothing is there as well: reading it says which file is missing.
    if os.path.lexists(folder / SINGLE):
        return [folder / SINGLE]
    if os.path.lexists(folder / INDEX):
        return _shards(folder)
    if pickles := sorted(file.name for file in folder.glob("*.bin")):
        raise FileNotFoundError(
            f"{folder} has its weights only as a pickle ({pickles[0]}), which can run code when "
            f"it is read. Convert it to {SINGLE} first, e.g. by save_pretrained of transformers."
        )
    raise FileNotFoundError(f"No weights in {folder}; expected {SINGLE} or {INDEX}.")


def _shards(folder: Path) -> list[Path]:
    """The files named by an index, in its order; no name leads out of the folder."""
    index = folder / INDEX
    remedy = (
        "It is not an index of shards: a JSON object with a weight_map from tensor names to file "
        "names. Download or copy it again."
    )
    fields = Fields(read_fields(index, remedy), index, remedy=remedy)
    named = list(fields.inner("weight_map").values.values())
    if not named:
        raise fields.error("weight_map is empty")
    for name in named:
        if not _stays_below(name):
            raise fields.error(f"{short(name)} in weight_map is no name of a file in its folder")
    unique = list(dict.fromkeys(named))
    if absent := [name for name in unique if not os.path.exists(folder / name)]:
        raise FileNotFoundError(
            f"{folder} lacks {len(absent)} of the {len(unique)} files in its index: "
            f"{short(absent)}. Download or copy them again."
        )
    return [folder / name for name in unique]


def _stays_below(name: object) -> bool:
    """Whether it names a file in the folder or below. Links are the user's, and are followed."""
    if not isinstance(name, str) or not name or set(name) & set("\\\0"):
        return False
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts


def save_hf(params: Params, folder: str | Path, *, shard_bytes: int = SHARD_BYTES) -> None:
    """Writes a Hugging Face folder: config.json, safetensors, and the tokenizer of the source.

    The folder appears only once it is complete. Above `shard_bytes` the weights are split into
    shards with an index. In an unchanged dtype every tensor has the bytes it was loaded from.

    Raises:
      FileExistsError: the folder is there and not empty.
      OSError: it cannot be written.
    """
    leaves = flatten(params.stacked().weights)
    dtype = np.dtype(params.dtype)
    places = destinations(params.config)

    def tensor(name: str) -> np.ndarray:
        place = places[name]
        arrays = {path: np.asarray(leaves[path][place.at]) for path in place.paths}
        return place.together(
            [_in_halves(x, path, params.config, back=True) for path, x in arrays.items()]
        )

    shards = _split({name: place.shape for name, place in places.items()}, dtype, shard_bytes)
    with new_folder(folder) as partial:
        write_companions(params, dtype, partial)
        weight_map: dict[str, str] = {}
        for number, shapes in enumerate(shards, start=1):
            several = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            file = SINGLE if len(shards) == 1 else several
            safetensors.write_file(partial / file, shapes, dtype, map(tensor, shapes))
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
