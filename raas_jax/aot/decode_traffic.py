"""What a decode step moves through the device's memory, against the least that it could."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import jax

from raas_jax import experts
from raas_jax.aot.traffic import ON_GPU, ON_TPU, Moved, account, total
from raas_jax.generation import TOKENS_PER_SYNC
from raas_jax.model import stages
from raas_jax.session import Session

# Beginnings of the names of arguments, see `Moved.sources`.
_WEIGHTS = "layers", "head", "embedding", "norm", *experts.BESIDE
_CACHE = "cache", "meta"

COPY = 1 << 20
"""Bytes from which a copy of weights or of the cache is listed."""


@dataclasses.dataclass(frozen=True)
class Part:
    """What some like instructions move, per step.

    Attributes:
      name: of the first of them.
      op: what they are; of kernels and library calls, the target.
      what: the place in the Python program that they come from, as far as it is known.
      of: the weight or the part of the state that most of what they read belongs to.
      reads, writes: bytes per step.
      times: how often one is run per step.
      copies: whether they do nothing but copy.
    """

    name: str
    op: str
    what: str
    of: str
    reads: float
    writes: float
    times: float
    copies: bool


@dataclasses.dataclass(frozen=True)
class DecodeTraffic:
    """Estimates for a token step of all rows, on each device; see `raas_jax.aot.traffic`.

    Attributes:
      platform: what was compiled for.
      devices: how many share the decode.
      rows: `B`, on all devices together.
      reads, writes: bytes per step; the boundary of a page and what is done once per call of
        `Session.advance` count with their share.
      least: bytes per step where conditions, which are those of the sampler, go the cheapest way.
      weights, cache: bytes of the weights, without the embeddings that are not looked up, and of
        all that is kept for attention; their sum is the floor.
      ratio: reads + writes over the floor.
      weights_read, cache_read: what of `reads` is of weights and of the cache, or of their copies;
        what is left, and most of `writes`, are activations, many of which a GPU's L2 may hold.
      layers, outside, boundary, call: bytes per step in the loops over layers, outside of them, at
        the boundaries of pages, and once per call.
      operations_per_layer: what is launched for one layer: fusions, kernels, library calls, copies.
        On a TPU it is one program that runs them in order, and arithmetic on scalars is left out.
      operations_outside: what is launched per step outside of the layers.
      operations_at_boundary: what is launched per page at its end.
      conditions: in a step; a GPU's runtime may wait for each.
      kernels: by name, how many of our kernels and of library calls a layer runs.
      collectives: by kind, how many a layer runs; what the network carries is not counted.
      copies: of weights or of the cache, from memory to memory, of at least `COPY` bytes each.
      largest: what moves most.
      unknown: loops whose passes the program does not tell, counted once.
    """

    platform: str
    devices: int
    rows: int
    reads: float
    writes: float
    least: float
    weights: int
    cache: int
    ratio: float
    weights_read: float
    cache_read: float
    layers: float
    outside: float
    boundary: float
    call: float
    operations_per_layer: float
    operations_outside: float
    operations_at_boundary: float
    conditions: int
    kernels: dict[str, float]
    collectives: dict[str, float]
    copies: list[Part]
    largest: list[Part]
    unknown: list[str]

    @property
    def floor(self) -> int:
        """Weights once and cache once, in bytes."""
        return self.weights + self.cache


def decode_traffic(session: Session, text: str | None = None, largest: int = 12) -> DecodeTraffic:
    """Compiles `Session.advance` as `generate` calls it, and accounts for it.

    Args:
      session: of shapes alone, see `raas_jax.aot.memory.abstract_session`, or a real one.
      text: optimised HLO of that program, if it is there already.
      largest: how many of the largest parts to give.

    Raises:
      jax.errors.JaxRuntimeError: the compiler refuses, for instance for want of memory.
    """
    pages = pages_per_call(session)
    text = text if text is not None else session.lower_advance(pages).compile().as_text()
    mesh, plan = session.mesh, session.plan
    device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
    on_tpu = device.platform == "tpu"
    counts = {session.params.config.num_hidden_layers, *(group.layers for group in plan.groups)}
    found = account(text, ON_TPU if on_tpu else ON_GPU, counts)
    steps, layers = pages * plan.page_size, session.params.config.num_hidden_layers
    of_layers = _layer_loops(found.moved, steps, [each.repeats for each in stages(plan.kinds)])

    def is_in_layers(each: Moved) -> bool:
        return any(each.loops[: len(loops)] == loops for loops in of_layers)

    inside = [each for each in found.moved if is_in_layers(each)]
    rest = [each for each in found.moved if not is_in_layers(each)]
    outside = [each for each in rest if each.times >= steps]
    boundary = [each for each in rest if pages <= each.times < steps]
    call = [each for each in rest if each.times < pages]
    if pages == 1:
        boundary, call = boundary + call, []
    weights, cache = floor(session)
    sources = [
        (origin, size * each.times / steps) for each in found.moved for origin, size in each.sources
    ]
    moved = total(found.moved) / steps

    def launched(some: list[Moved], runs: float) -> float:
        return sum(each.times for each in some if not (on_tpu and each.scalar)) / runs

    return DecodeTraffic(
        platform=device.device_kind,
        devices=1 if mesh is None else mesh.size,
        rows=session.rows,
        reads=sum(each.reads * each.times for each in found.moved) / steps,
        writes=sum(each.writes * each.times for each in found.moved) / steps,
        least=total(found.least) / steps,
        weights=weights,
        cache=cache,
        ratio=moved / (weights + cache),
        weights_read=sum(size for origin, size in sources if origin.startswith(_WEIGHTS)),
        cache_read=sum(size for origin, size in sources if origin.startswith(_CACHE)),
        layers=total(inside) / steps,
        outside=total(outside) / steps,
        boundary=total(boundary) / steps,
        call=total(call) / steps,
        operations_per_layer=launched(inside, steps * layers),
        operations_outside=launched(outside, steps),
        operations_at_boundary=launched(boundary, pages),
        conditions=sum(math.prod(t for _, t in loops) >= steps for loops in found.conditions),
        kernels=_kernels(inside, steps * layers),
        collectives=_collectives(inside, steps * layers),
        copies=_parts((each for each in found.moved if _is_costly_copy(each)), steps),
        largest=_parts(found.moved, steps)[:largest],
        unknown=list(found.unknown),
    )


def pages_per_call(session: Session) -> int:
    """Pages that `generate` advances by in one call."""
    return max(1, TOKENS_PER_SYNC // session.plan.page_size)


def floor(session: Session) -> tuple[int, int]:
    """Bytes on one device that a step cannot do without: of weights, and of the cache.

    Embeddings that are not the head's too are looked up, a row per token, never read whole; of
    experts no more are read than rows can choose.
    """
    weights, config = session.params.weights, session.params.config
    read = bytes_on_one_device(weights)
    share = experts.share_read(config.num_experts, config.num_experts_per_tok, session.rows)
    chosen = [weights[name] for name in experts.STACKS if name in weights]
    read -= round((1 - share) * bytes_on_one_device(chosen))
    if "head" in weights:
        table = weights["embedding"]
        row = table.shape[-1] * table.dtype.itemsize
        read += session.rows * row - bytes_on_one_device(table)
    return read, bytes_on_one_device((session.shape.cache, session.shape.meta))


def bytes_on_one_device(tree: Any) -> int:
    """Bytes of all arrays, those of a mesh as they lie on one of its devices."""
    size = 0
    for leaf in jax.tree.leaves(tree):
        sharding = getattr(leaf, "sharding", None)
        shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
        size += math.prod(shape) * leaf.dtype.itemsize
    return size


def _layer_loops(
    moved: Iterable[Moved], steps: int, layers: list[int]
) -> list[tuple[tuple[str, int], ...]]:
    """The loops over layers: of those that run as often, the ones that move most."""
    size: dict[tuple[tuple[str, int], ...], float] = {}
    for each in moved:
        times = 1
        for number, (_, trips) in enumerate(each.loops):
            if times == steps and trips in layers:
                loops = each.loops[: number + 1]
                size[loops] = size.get(loops, 0.0) + each.bytes * each.times
            times *= trips
    return sorted(size, key=lambda loops: -size[loops])[: len(layers)]


def _is_costly_copy(each: Moved) -> bool:
    """A copy from memory to memory, of a weight or of the cache."""
    ours = each.of.startswith((*_WEIGHTS, *_CACHE))
    return each.copies and ours and each.writes >= COPY and each.reads > 0


def _parts(moved: Iterable[Moved], steps: int) -> list[Part]:
    """Like ones together, those that move most first."""
    like: dict[Any, list[Moved]] = {}
    for each in moved:
        what = each.what, each.of or each.name
        like.setdefault((each.op, *what, each.copies, each.loops), []).append(each)
    parts = [
        Part(
            name=some[0].name,
            op=some[0].op,
            what=some[0].what,
            of=some[0].of,
            reads=sum(each.reads * each.times for each in some) / steps,
            writes=sum(each.writes * each.times for each in some) / steps,
            times=sum(each.times for each in some) / steps,
            copies=some[0].copies,
        )
        for some in like.values()
    ]
    return sorted(parts, key=lambda part: -(part.reads + part.writes))


def _kernels(moved: list[Moved], runs: int) -> dict[str, float]:
    count: dict[str, float] = {}
    for each in moved:
        if each.calls:
            name = each.what.split("/")[0] if "mosaic" in each.op or "tpu" in each.op else each.op
            count[name] = count.get(name, 0.0) + each.times / runs
    return count


def _collectives(moved: list[Moved], runs: int) -> dict[str, float]:
    count: dict[str, float] = {}
    for each in moved:
        if each.collective:
            count[each.collective] = count.get(each.collective, 0.0) + each.times / runs
    return count
