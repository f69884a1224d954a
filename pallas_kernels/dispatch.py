"""Choice of backend, the same for every operation, and how a call is split over a mesh.

A backend that cannot serve the given arguments raises `NotImplementedError`, and the next in order
is asked. If none can, one `ValueError` lists what each of them said. What is compiled for is an
argument, `Target`: a program that is compiled ahead of time has no device to ask.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeVar

import jax
from jax.sharding import Mesh, PartitionSpec

Implementation = Literal["xla", "cpu", "tpu", "gpu"] | None
Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True)
class Target:
    """What a program is compiled for; static and hashable.

    Attributes:
      platform: "cpu", "tpu" or "gpu".
      device_kind: as `jax.Device.device_kind` says it, for instance "TPU v5 lite"; block sizes
        depend on it.
      mesh: where given, kernels are called through `jax.shard_map` over its axes.
      rows: mesh axis over which rows (`B`) are split.
      heads: mesh axis over which key/value heads (`K`), and with them query heads, are split.
    """

    platform: str
    device_kind: str = ""
    mesh: Mesh | None = None
    rows: str = "data"
    heads: str = "model"

    @classmethod
    def of(cls, devices: jax.Device | Mesh | None = None) -> Target:
        """For a device, a mesh, or the first device of the default backend."""
        if isinstance(devices, Mesh):
            return dataclasses.replace(cls.of(devices.devices.flat[0]), mesh=devices)
        device = devices or jax.devices()[0]
        platform = {"cuda": "gpu", "rocm": "gpu"}.get(device.platform, device.platform)
        return cls(platform, device.device_kind)

    @property
    def head_ways(self) -> int:
        """Over how many devices the mesh would split heads."""
        return 1 if self.mesh is None else int(self.mesh.shape.get(self.heads, 1))

    def in_parts(self, parts: int) -> Target:
        """The same, whose mesh splits heads into just so many parts, or not at all."""
        return self if self.head_ways == parts else dataclasses.replace(self, heads="")


def load(module: str, name: str) -> Callable[..., Any]:
    """A backend that is imported when it is first called: what is not used costs nothing."""

    def backend(*args: Any, **kwargs: Any) -> Any:
        try:
            function = getattr(importlib.import_module(module), name)
        except ImportError as error:
            raise NotImplementedError(f"{module} cannot be imported here ({error})") from error
        return function(*args, **kwargs)

    return backend


def dispatch(
    operation: str,
    backends: Mapping[str, Callable[..., Result]],
    implementation: Implementation,
    target: Target | None,
    arrays: Sequence[jax.Array | None],
    axes: tuple[Sequence[str], Any],
    prefers_xla: Callable[[Target], bool] = lambda target: False,
    summed: bool = False,
    **options: Any,
) -> Result:
    """Calls the backend that `implementation` names, or the best one for the target.

    Args:
      operation: its name, for errors.
      backends: the functions, by name. All take `arrays` and `options`; those other than "xla"
        also take `device_kind`.
      implementation: None: the target's platform first, then "xla".
      target: None: the default backend.
      arrays: the operands.
      axes: the axis letters of every operand and of the results ("BNH" for `[B, N, H]`), the
        latter in the structure of what is returned.
      prefers_xla: whether "xla" is the better choice on a target for these shapes; not asked where
        `implementation` names one.
      summed: whether results are sums over heads, so that what devices find is added up.
      **options: static arguments.

    Raises:
      ValueError: the name is unknown, or every backend that was asked declined.
    """
    target = Target.of() if target is None else target
    if implementation is None:
        first = () if prefers_xla(target) else (target.platform,)
        order = [name for name in (*first, "xla") if name in backends]
    elif implementation in backends:
        order = [implementation]
    else:
        raise ValueError(
            f"implementation is {implementation!r}; {operation} has {', '.join(sorted(backends))}."
        )
    declined = []
    for name in order:
        try:
            if name == "xla":
                return backends[name](*arrays, **options)
            backend = functools.partial(backends[name], device_kind=target.device_kind, **options)
            return split(backend, target, arrays, axes, summed)
        except NotImplementedError as reason:
            declined.append(f"{name}: {reason}")
    raise ValueError(f"{operation}: no backend serves these arguments. " + "; ".join(declined))


def split(
    backend: Callable[..., Result],
    target: Target,
    arrays: Sequence[jax.Array | None],
    axes: tuple[Sequence[str], Any],
    summed: bool = False,
) -> Result:
    """Calls `backend` on each device's rows and heads; they do not need each other's.

    An axis that the mesh does not divide evenly is not split: every device then does all of it. The
    pages of a pool (`T`) go with the heads that own them. With `summed`, results are added up over
    the devices that split heads.
    """
    mesh = target.mesh
    if mesh is None or mesh.size == 1:
        return backend(*arrays)
    operands, results = axes
    sizes: dict[str, list[int]] = {"B": [], "K": [], "N": [], "T": []}
    for array, letters in zip(arrays, operands, strict=True):
        for letter, size in zip(letters, () if array is None else array.shape, strict=False):
            sizes.get(letter, []).append(size)

    def divides(axis: str, *letters: str) -> bool:
        ways = mesh.shape.get(axis, 1)
        return ways > 1 and all(size % ways == 0 for each in letters for size in sizes[each])

    split_rows = target.rows if divides(target.rows, "B") else None
    split_heads = target.heads if divides(target.heads, "K", "N", "T") else None
    of_letter = {"B": split_rows, "K": split_heads, "N": split_heads, "T": split_heads}

    def spec(letters: str) -> PartitionSpec:
        parts = map(of_letter.get, letters)
        return PartitionSpec(*parts)

    def summing(*arrays: jax.Array | None) -> Result:
        added: Result = jax.lax.psum(backend(*arrays), split_heads)
        return added

    return jax.shard_map(
        summing if summed and split_heads else backend,
        mesh=mesh,
        in_specs=tuple(map(spec, operands)),
        out_specs=jax.tree.map(spec, results),
        # A kernel says nothing about which mesh axes its results vary over.
        check_vma=False,
    )(*arrays)
