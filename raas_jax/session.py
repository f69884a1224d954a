"""One decode under way: the programs, and the few things that a host does between them.

    prompts ──start──► state ──advance──► state ──advance──► ...
                         │ read             │ read: tokens, log-probabilities, counters

Everything that decodes drives a `Session`: `generate`, `stream`, `score`, the engine, recordings,
benchmarks, and the account of memory ahead of time. States are pytrees that the caller holds; a
program that is given one writes into its memory, so that it must not be used again.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from raas_jax.accelerators import warn_if_unused
from raas_jax.admission import Admissions, admit, empty_admissions
from raas_jax.compiling import jit_for, on_one_device
from raas_jax.config import ModelConfig
from raas_jax.decode import (
    DecodeState,
    Probe,
    Progress,
    RowRequest,
    cache_bytes,
    decode_pages,
    empty_state,
    pad_prompts,
    prefill,
)
from raas_jax.feeding import feed_pages, feeds_pages
from raas_jax.params import Params
from raas_jax.plan import Plan
from raas_jax.policies import Policy
from raas_jax.saved_state import restore_state, save_state
from raas_jax.sharding import state_shardings, target_of
from raas_jax.suited import suited

_admit = partial(jax.jit, static_argnames=("plan", "mesh"), donate_argnames="state")(admit)


class Session:
    """Drives a decode of fixed shape, page by page.

    >>> session = Session.create(params, policy, [len(ids)], max_new_tokens=512)
    >>> state, progress = session.start([ids], RowRequest.create([512]))
    >>> while not session.read(progress).done.all():
    ...     state, progress = session.advance(state, pages=2)

    Attributes:
      params: the model, or shapes in its place for a compiler alone.
      plan: fixed shapes.
      rows: `B`.
      mesh: the devices that share the decode; None for the default one.
      shape: the state as `ShapeDtypeStruct`s, with their shardings on a mesh.
      called: the programs that were called so far, each of which is compiled once.
    """

    def __init__(
        self,
        params: Params,
        plan: Plan,
        rows: int,
        *,
        stop_tokens: Sequence[int] = (),
        mesh: Mesh | None = None,
    ):
        """Fixes the shapes; nothing is compiled before it is called.

        `rows` must be a multiple of the plan's samples and of the mesh's `data` axis; `stop_tokens`
        end the rows of an `empty` state.
        """
        self.params, self.plan, self.rows, self.mesh = params, plan, rows, mesh
        self._key = (params.config, params.dtype.name, plan, rows, tuple(stop_tokens), mesh)
        self.shape = _shape(*self._key)
        self.called: set[tuple[Any, ...]] = set()
        self._compiled: dict[Any, Any] = {}

    @classmethod
    def create(
        cls,
        params: Params,
        policy: Policy,
        prompt_tokens: Sequence[int],
        max_new_tokens: int,
        *,
        samples: int = 1,
        mesh: Mesh | None = None,
    ) -> Session:
        """A session for prompts of these lengths, each answered by `samples` rows.

        Raises:
          ValueError: the policy cannot take one of the prompts.
        """
        plan = Plan.create(
            params.config,
            suited(policy, params),
            prompt_tokens,
            max_new_tokens,
            samples,
            target_of(mesh),
        )
        return cls(params, plan, len(prompt_tokens) * samples, mesh=mesh)

    @property
    def row_bytes(self) -> int:
        """Bytes of keys, values and metadata that a row takes: all segments and padding."""
        return cache_bytes(self.shape) // self.rows

    def start(
        self,
        prompts: Sequence[Sequence[int]],
        request: RowRequest,
        *,
        force: Sequence[int] | jax.Array | None = None,
    ) -> tuple[DecodeState, Progress]:
        """Reads the prompts.

        Args:
          prompts: token ids of `B' = B / samples` prompts.
          request: what is asked of the `B` rows.
          force: int32 `[B]`, first tokens to take instead of sampling; -1 samples.

        Returns:
          The state at the start of the first page, and the first token of every row.
        """
        self._check_room()
        arguments = (self.params, *pad_prompts(prompts, self.plan), request)
        return self._call(("start",), prefill, *arguments, force=force)

    def empty(self) -> DecodeState:
        """A state in which no row runs, for rows that `admit` brings."""
        self._check_room()
        self.called.add(("empty",))
        state: DecodeState = _empty(*self._key)()
        return state

    def admit(self, state: DecodeState, admissions: Admissions) -> tuple[DecodeState, Progress]:
        """Starts rows in the place of others; compiled for each shape of admissions.

        Args:
          state: at a page boundary; its memory is given away.
          admissions: prompts, and the rows that answer them.

        Returns:
          The state, and the first tokens, `[1, n * samples]`.
        """
        name = ("admit", *admissions.tokens.shape)
        return self._call(name, _admit, self.params, state, admissions, mesh=self.mesh)

    def advance(
        self,
        state: DecodeState,
        pages: int = 1,
        *,
        force: Any = None,
        probe: Probe | None = None,
    ) -> tuple[DecodeState, Progress]:
        """Decodes the next pages, `pages * P` tokens of every row.

        Args:
          state: at a page boundary; its memory is given away.
          pages: how many.
          force: int32 `[pages * P, B]`, tokens to take instead of sampling (teacher forcing), of
            which `Progress.logprobs` has the log-probabilities; -1 samples.
          probe: what else to see of the state on the way.

        Returns:
          The state at the next boundary, and what happened.
        """
        options = {"pages": pages, **({} if probe is None else {"probe": probe})}
        name = ("advance", *options.values())
        return self._call(name, decode_pages, self.params, state, force=force, **options)

    def feed(self, state: DecodeState, tokens: Any) -> tuple[DecodeState, jax.Array]:
        """Feeds given tokens, whole pages of them, and gives what the model made of each.

        As `advance` with `force`, several times sooner: a page is read at once, unless the policy
        chooses pages by token. Every row must have room for all tokens.

        Args:
          state: at a page boundary; its memory is given away.
          tokens: int32 `[pages * P, B]`, what follows each token that is fed; the last stays unfed.

        Returns:
          The state at the next boundary, and the last layer's outputs `[pages * P, B, D]`, of which
          `scoring.of_outputs` makes log-probabilities.
        """
        tokens = jnp.asarray(tokens, jnp.int32)
        if feeds_pages(self.plan):
            self.called.add(("feed", *tokens.shape))
            found = self._program(feed_pages)(self.params, state, tokens, plan=self.plan)
            return found[0], found[1]
        pages = len(tokens) // self.plan.page_size
        state, progress = self.advance(state, pages, force=tokens, probe=_OUTPUTS)
        assert progress.probed is not None
        return state, progress.probed.hidden.reshape(*tokens.shape, -1)

    def read(self, progress: Any) -> Any:
        """Brings a `Progress`, or several in a list, to the host: one transfer, NumPy arrays."""
        return jax.device_get(progress)

    def stop(self, state: DecodeState, rows: np.ndarray) -> DecodeState:
        """Marks rows `[B]` as done, for reasons that only the host sees."""
        done = state.rows.done | jnp.asarray(rows)
        return dataclasses.replace(state, rows=dataclasses.replace(state.rows, done=done))

    def save(self, state: DecodeState, folder: str | Path) -> None:
        """Writes a state into a new folder. Raises OSError if it cannot be written."""
        save_state(state, folder, self.params, self.plan)

    def restore(self, folder: str | Path) -> DecodeState:
        """A state that `save` wrote, in a session of the same plan and rows, on any mesh.

        Raises:
          FileNotFoundError: there is none.
          FileError: it belongs to another model or plan, or is damaged.
        """
        return restore_state(folder, self.shape, self.params, self.plan)

    def compile(self, pages: int) -> None:
        """Compiles `start` and `advance(pages=pages)` now; they then use what was compiled."""
        self._compiled["start",] = self.lower_start().compile()
        self._compiled["advance", pages] = self.lower_advance(pages).compile()

    def lower_start(self) -> Any:
        """The program of `start`, lowered, to be compiled for devices that need not be there."""
        prompts = self.rows // self.plan.samples
        # No arrays: `raas-jax memory` asks for more prompts than this machine could hold.
        tokens, lengths = (
            jax.ShapeDtypeStruct(shape, jnp.int32)
            for shape in ((prompts, self.plan.prompt_slots * self.plan.page_size), (prompts,))
        )
        request = RowRequest.create([1] * self.rows, self.params.config.eos_token_ids)
        arguments = self._whole((tokens, lengths, request))
        return self._program(prefill).lower(self.params, *arguments, plan=self.plan)

    def lower_advance(self, pages: int = 1) -> Any:
        """The program of `advance`, likewise."""
        return self._program(decode_pages).lower(
            self.params, self.shape, plan=self.plan, pages=pages
        )

    def lower_admit(self, size: int, bucket: int) -> Any:
        """The program of `admit` for `size` prompts of `bucket` tokens, likewise."""
        admissions = empty_admissions(size, bucket, self.plan.samples)
        return self._program(_admit).lower(
            self.params, self.shape, admissions, plan=self.plan, mesh=self.mesh
        )

    def _check_room(self) -> None:
        """Raises ValueError where the cache cannot fit, before the system ends the process."""
        warn_if_unused()
        devices = 1 if self.mesh is None else self.mesh.size
        size, room = cache_bytes(self.shape), devices * device_memory()
        if size > room:
            raise ValueError(
                f"policy is {self.plan.policy!r}, whose cache for {self.rows} rows takes {size} "
                f"bytes, and there are {room}. Use fewer rows, a smaller budget or a smaller "
                "max_new_tokens; `raas-jax memory` says what a run takes."
            )

    def _program(self, function: Any) -> Any:
        if self.mesh is not None:
            return _on_mesh(function, *self._key)
        return on_one_device(function, self._device().device_kind)

    def _device(self) -> jax.Device:
        """Where it runs without a mesh: where the weights are, if they are arrays."""
        where = getattr(self.params.weights["embedding"], "sharding", None)
        return jax.local_devices()[0] if where is None else next(iter(where.device_set))

    def _call(
        self, name: tuple[Any, ...], program: Any, *given: Any, force: Any = None, **options: Any
    ) -> tuple[DecodeState, Progress]:
        if force is not None:
            name = (*name, "forced")
            options["force"] = jnp.asarray(force, jnp.int32)
        self.called.add(name)
        if name in self._compiled:
            state, progress = self._compiled[name](*given)
        else:
            state, progress = self._program(program)(*given, plan=self.plan, **options)
        return state, progress

    def _whole(self, tree: Any) -> Any:
        """Shapes with a sharding that keeps them whole on every device of a mesh."""
        whole = None if self.mesh is None else NamedSharding(self.mesh, PartitionSpec())

        def shape(leaf: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole)

        return jax.tree.map(shape, tree)


def _as_it_is(x: jax.Array) -> jax.Array:
    return x


_OUTPUTS = Probe(hidden=_as_it_is)


def device_memory() -> int:
    """Bytes of the first device's memory; on a CPU, of the machine's."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return int(stats.get("bytes_limit") or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


@functools.lru_cache(maxsize=64)
def _empty(
    config: ModelConfig,
    dtype: str,
    plan: Plan,
    rows: int,
    stop_tokens: tuple[int, ...],
    mesh: Mesh | None,
) -> Any:
    """The program of `Session.empty`."""
    make = partial(empty_state, config, plan, rows, jnp.dtype(dtype), stop_tokens)
    if mesh is None:
        return jax.jit(make)
    return jax.jit(make, out_shardings=state_shardings(jax.eval_shape(make), mesh))


@functools.lru_cache(maxsize=64)
def _shape(*key: Any) -> DecodeState:
    """The state as `ShapeDtypeStruct`s, with their shardings on a mesh."""
    shape: DecodeState = jax.eval_shape(_empty(*key))
    mesh: Mesh | None = key[-1]
    if mesh is None:
        return shape

    def placed(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    found: DecodeState = jax.tree.map(placed, shape, state_shardings(shape, mesh))
    return found


@functools.lru_cache(maxsize=64)
def _on_mesh(function: Any, *key: Any) -> Any:
    """A program whose state stays where it lies, and whose progress every process can read."""
    mesh: Mesh = key[-1]
    where = state_shardings(_shape(*key), mesh), NamedSharding(mesh, PartitionSpec())
    return jit_for(function, mesh.devices.flat[0].device_kind, out_shardings=where)
