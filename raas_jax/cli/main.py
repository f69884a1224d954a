"""The command line: `raas-jax generate`, `convert`, `memory`, `bench`, `train`, `eval`, ..."""

from __future__ import annotations

import io
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Annotated, Any, Protocol, Union

import tyro

import raas_jax
from raas_jax import checks
from raas_jax.cli import lm_eval
from raas_jax.cli.bench import Bench
from raas_jax.cli.calibrate import Calibrate
from raas_jax.cli.convert import Convert
from raas_jax.cli.errors import in_flags
from raas_jax.cli.eval import Eval, Report
from raas_jax.cli.generate import Generate
from raas_jax.cli.memory import Memory
from raas_jax.cli.throughput import Throughput
from raas_jax.cli.trace import Trace
from raas_jax.cli.train import Train

COMMANDS: dict[str, type[Command]] = {
    "generate": Generate,
    "convert": Convert,
    "memory": Memory,
    "bench": Bench,
    "throughput": Throughput,
    "train": Train,
    "calibrate": Calibrate,
    "eval": Eval,
    "report": Report,
    "trace": Trace,
}
DESCRIPTION = """Decode long chains of thought in constant memory.
  raas-jax generate "a=4; b=9; c=a+b; ? c" --policy raas --budget 128
  raas-jax COMMAND --help   explains a command
  raas-jax lm-eval ...      is lm-evaluation-harness, which then knows this library
  raas-jax --version        says which one this is

With --debug, anywhere, an error shows where it came from."""
FAILED, INTERRUPTED, BROKEN_PIPE = 2, 130, 141


class Command(Protocol):
    """A dataclass of options that runs."""

    def run(self) -> int:
        """Does the work and returns the exit code. User errors are ValueError or OSError."""
        ...


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code.

    Errors that a user can mend are one line on stderr and exit code 2, `--debug` (anywhere) shows
    where they came from. Wrong options end the process with code 2, as argparse does.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal that lacks a character shows that it does; the answer goes on.
        sys.stdout.reconfigure(errors="replace")
    args = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in args
    args = [arg for arg in args if arg != "--debug"]
    if args in (["--version"], ["-V"]):
        print(f"raas-jax {raas_jax.__version__}")
        return 0
    # Where no framework of its own is installed, transformers says so at length.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    command: Command | None = None
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            if args[:1] == [lm_eval.NAME]:
                # Its options are those of another program.
                return lm_eval.run(args[1:])
            command = parse(args or ["--help"])
            code = command.run()
            sys.stdout.flush()
            return code
        except KeyboardInterrupt:
            print("raas-jax: interrupted", file=sys.stderr)
            return INTERRUPTED
        except BrokenPipeError:
            # Whoever read our output has enough; Python would complain when it flushes at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return BROKEN_PIPE
        except (ValueError, TypeError, OSError) as error:
            return _explain(error, in_flags(str(error), type(command)), debug)
        except RuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            what = "the device is out of memory; `raas-jax memory` says what a run takes"
            return _explain(error, what, debug)


def _explain(error: Exception, what: str, debug: bool) -> int:
    if debug:
        raise error
    print(f"raas-jax: error: {checks.printable(what)}", file=sys.stderr)
    return FAILED


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"raas-jax: warning: {checks.printable(str(message))}", file=sys.stderr)


def parse(args: Sequence[str]) -> Command:
    """The command with its options. Wrong ones are explained on stderr, and end the process."""
    choices: Any = Union[  # noqa: UP007 - made of a list
        tuple(Annotated[kind, tyro.conf.subcommand(name)] for name, kind in COMMANDS.items())
    ]
    command: Command = tyro.cli(
        choices,
        prog="raas-jax",
        description=DESCRIPTION,
        args=args,
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
    )
    return command
