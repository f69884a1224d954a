"""Counts what is compiled."""

from __future__ import annotations

import contextlib

import jax


@contextlib.contextmanager
def compiled():
    """Programs that the compiler was asked for meanwhile, those of jax itself included."""
    names = []

    def listener(event, duration, **kwargs):
        if event.endswith("backend_compile_duration"):
            names.append(kwargs.get("fun_name", event))

    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        yield names
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)
