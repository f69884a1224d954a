"""Compiling for CPUs in a hurry, where little is computed and the programs are not looked at."""

from __future__ import annotations

import os

import jax

# Newer compilers make all code by way of MLIR; the one of jax 0.10 can do without, in a third of
# the time: 0.7 s and not 2.4 s for a decode.
FLAG = "xla_cpu_use_fusion_emitters"
CAN_BE_QUICK = jax.__version_info__ < (0, 11)


def environment(**more: str) -> dict[str, str]:
    """This process's, and `more`, for a program that is to compile in a hurry."""
    flags = os.environ.get("XLA_FLAGS", "") + (f" --{FLAG}=false" if CAN_BE_QUICK else "")
    quick = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "XLA_FLAGS": flags}
    return {**os.environ, **quick, **more}


def quickly(quick: bool) -> None:
    """Whether what is compiled from here on, in this process and on CPUs, is done in a hurry."""
    jax.config.update("jax_disable_most_optimizations", quick)
    if CAN_BE_QUICK:
        _without_mlir(quick)


def _without_mlir(quick: bool) -> None:
    # No public option reaches all that a process compiles and can be taken back.
    from jax._src import compiler

    given = getattr(compiler.get_compile_options, "given", compiler.get_compile_options)

    def get_compile_options(*arguments, env_options_overrides=None, backend=None, **others):
        overrides = dict(env_options_overrides or {})
        if backend is not None and backend.platform == "cpu":
            overrides.setdefault(FLAG, False)
        return given(*arguments, env_options_overrides=overrides, backend=backend, **others)

    get_compile_options.given = given
    compiler.get_compile_options = get_compile_options if quick else given
