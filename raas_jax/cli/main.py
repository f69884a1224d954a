"""The command line: `raas-jax generate`, `convert`, `memory`, `bench`, `train`, `eval`, ..."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Protocol, Union

import tyro

import raas_jax
from raas_jax import checks
from raas_jax.cli import lm_eval, streams
from raas_jax.cli.allot import Allot
from raas_jax.cli.bench import Bench
from raas_jax.cli.calibrate import Calibrate
from raas_jax.cli.convert import Convert
from raas_jax.cli.device_check import DeviceCheck
from raas_jax.cli.errors import INTERRUPTED, explain
from raas_jax.cli.eval import Eval, Report
from raas_jax.cli.fidelity import Fidelity
from raas_jax.cli.generate import Generate
from raas_jax.cli.memory import Memory
from raas_jax.cli.options import check_ranges
from raas_jax.cli.throughput import Throughput
from raas_jax.cli.trace import Trace
from raas_jax.cli.train import Train

COMMANDS: dict[str, type[Command]] = {
    "generate": Generate,
    "convert": Convert,
    "memory": Memory,
    "bench": Bench,
    "device-check": DeviceCheck,
    "throughput": Throughput,
    "train": Train,
    "allot": Allot,
    "calibrate": Calibrate,
    "eval": Eval,
    "report": Report,
    "trace": Trace,
}
WITHIN: dict[tuple[str, str], type[Command]] = {("eval", "fidelity"): Fidelity}
"""Commands that are named by two words."""
DESCRIPTION = """Decode long chains of thought in constant memory.
  raas-jax generate "a=4; b=9; c=a+b; ? c" --policy raas --budget 128
  raas-jax COMMAND --help   explains a command
  raas-jax lm-eval ...      is lm-evaluation-harness, which then knows this library
  raas-jax --version        says which one this is

With --debug, anywhere, an error shows where it came from."""
BROKEN_PIPE = 141
MOST_KEPT = 2**30
"""Bytes of compiled programs on disk; the oldest go first."""


class Command(Protocol):
    """A dataclass of options that runs."""

    def run(self) -> int:
        """Does the work and returns the exit code. User errors are ValueError or OSError."""
        ...


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code.

    An error is one line on stderr: exit code 2 where a user can mend it, 1 where not; `--debug`
    (anywhere) shows where it came from. Wrong options end the process with code 2, as argparse
    does.
    """
    streams.prepare()
    args = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in args
    args = [arg for arg in args if arg != "--debug"]
    # Where no framework of its own is installed, transformers says so at length.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    _keep_programs()
    command: Command | None = None
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            try:
                if args[:1] == [lm_eval.NAME]:
                    # Its options are those of another program.
                    return lm_eval.run(args[1:])
                if args in (["--version"], ["-V"]):
                    print(f"raas-jax {raas_jax.__version__}")
                    return 0
                command = parse(args or ["--help"])
                check_ranges(command)
                return command.run()
            finally:
                sys.stdout.flush()
        except KeyboardInterrupt:
            streams.say("interrupted")
            return INTERRUPTED
        except BrokenPipeError:
            # Whoever read our output has enough.
            streams.drop_output()
            return BROKEN_PIPE
        except Exception as error:
            streams.drop_output()
            if debug:
                raise
            return explain(error, type(command))
        finally:
            if argv is None:
                # The work is over: Ctrl-C ends what is left of the process, without a traceback.
                with contextlib.suppress(ValueError):  # No signals in another thread.
                    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _keep_programs() -> None:
    """Lets JAX keep what took over a second to compile, so that a second start need not."""
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    try:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(home) / "raas_jax" / "programs"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):
        return  # Nowhere to keep them.
    if os.access(folder, os.W_OK):
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
        os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(MOST_KEPT))


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    streams.say(f"warning: {message}")


def parse(args: Sequence[str]) -> Command:
    """The command with its options. Wrong ones are explained on stderr, and end the process."""
    two = WITHIN.get((args[0], args[1])) if len(args) > 1 else None
    choices: Any = (
        two
        or Union[  # noqa: UP007 - made of a list
            tuple(Annotated[kind, tyro.conf.subcommand(name)] for name, kind in COMMANDS.items())
        ]
    )

    def parsed() -> Command:
        command: Command = tyro.cli(
            choices,
            prog=" ".join(["raas-jax", *(args[:2] if two else [])]),
            description=None if two else DESCRIPTION,
            args=args[2:] if two else args,
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
        )
        return command

    if all(arg == checks.printable(arg) for arg in args):
        return parsed()
    # An option that is wrong is repeated, with what a terminal would obey.
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return parsed()
    finally:
        print(checks.printable(said.getvalue()), end="", file=sys.stderr)
