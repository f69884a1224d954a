"""`raas-jax lm-eval`: the command line of lm-evaluation-harness, which then knows `raas_jax`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

NAME = "lm-eval"


def run(arguments: Sequence[str]) -> int:
    """Registers the model and hands everything over.

    Raises ValueError if the harness is not installed.
    """
    try:
        from lm_eval.__main__ import cli_evaluate
        from lm_eval.api.registry import model_registry
    except ImportError as error:
        raise ValueError(
            f"raas-jax {NAME} needs lm-evaluation-harness ({error}): in the checkout of raas_jax, "
            "pip install -e '.[eval]'."
        ) from error
    import lm_eval.models  # noqa: F401 - registers the harness's own models

    if "raas_jax" not in model_registry:  # Newer versions have found it as a plugin.
        model_registry.register("raas_jax", target="raas_jax.lab.tasks.harness:RaasLM")
    before = sys.argv
    sys.argv = ["lm-eval", *arguments]
    try:
        cli_evaluate()
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        raise
    finally:
        sys.argv = before
    return 0
