"""What a shell does to the command: streams that are closed, full or left, and Ctrl-C twice."""

import os
import signal
import subprocess
import sys
import time

import pytest
from quick import environment

pytestmark = pytest.mark.once

COMMAND = f"{sys.executable} -m raas_jax.cli"
PROBLEM = "'a=4; b=9; c=a+b; ? c'"


def shell(line, **changed):
    """Exit code, output and errors of a line of a shell, in which `raas-jax` is the command."""
    line = "set -o pipefail\n" + line.replace("raas-jax", COMMAND)
    given = {k: v for k, v in (environment() | changed).items() if v is not None}
    ran = subprocess.run(["bash", "-c", line], capture_output=True, text=True, env=given)
    assert "Traceback" not in ran.stderr and "Exception ignored" not in ran.stderr, ran.stderr
    return ran.returncode, ran.stdout, ran.stderr


@pytest.mark.parametrize("what", ["--help", "--version"])
def test_streams_that_are_not_there(what):
    code, full, _ = shell(f"raas-jax {what}")
    assert code == 0 and full
    assert shell(f"raas-jax {what} <&- 2>&-")[:2] == (0, full)
    assert shell(f"raas-jax {what} >&-") == (0, "", "")
    assert shell(f"raas-jax {what} > /dev/full") == (
        2,
        "",
        "raas-jax: error: no space left on device\n",
    )
    code, _, said = shell(f"raas-jax {what} | true")
    assert code in (0, 141) and said == ""  # It may be done before its reader is gone.


def test_errors_that_nobody_sees():
    assert shell("raas-jax train /nowhere --until 0 2> /dev/full")[0] == 2
    assert shell("raas-jax train /nowhere --until 0 2>&- >&- <&-")[0] == 2
    code, out, said = shell("raas-jax generate --prompt-file - <&-")
    assert (code, out) == (2, "") and "standard input holds no prompt" in said


def test_an_answer_without_streams_or_home(tmp_path):
    """One answer each, from another folder and with a home that is a file, or none."""
    (tmp_path / "home").write_text("")
    generate = f"cd {tmp_path}; raas-jax generate {PROBLEM} -n 2"
    paths = {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, filter(None, sys.path)))}
    # The first compiles for the others.
    paths |= {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    code, out, _ = shell(f"{generate} <&- 2>&-", HOME=None, **paths)
    assert code == 0 and out.startswith("a =")
    assert shell(f"{generate} >&-", HOME=str(tmp_path / "home"), **paths)[:2] == (0, "")
    code, out, said = shell(f"{generate} > /dev/full", **paths)
    assert (code, out) == (2, "") and said.endswith("error: no space left on device\n")


def test_a_platform_that_there_is_not():
    code, out, said = shell(f"raas-jax generate {PROBLEM}", JAX_PLATFORMS="nonsense")
    assert (code, out) == (2, "") and said.count("\n") == 1
    assert said.startswith("raas-jax: error: Unable to initialize backend 'nonsense'")


def test_without_the_extras(tmp_path):
    """As where `pip install raas-jax` brought none: each command names the one that it needs."""
    code = (
        "import sys\n"
        "from raas_jax.cli.main import main\n"
        "gone, *args = sys.argv[1:]\n"
        "for package in gone.split(','):\n"
        "    sys.modules[package] = None\n"
        "for each in ' '.join(args).split(' / '):\n"
        "    assert main(each.split()) == 2\n"
    )
    for gone, commands in {
        "optax,filelock": {"train x": ".[lab]", "eval gsm8k -o x": ".[eval]"},
        "matplotlib,datasets,lm_eval,math_verify": {
            "trace x -o x": ".[plots]",
            "eval gsm8k -o x": ".[eval]",
            "lm-eval": ".[eval]",
        },
    }.items():
        given = [sys.executable, "-c", code, gone, " / ".join(commands)]
        path = {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, filter(None, sys.path)))}
        ran = subprocess.run(
            given, capture_output=True, text=True, cwd=tmp_path, env=os.environ | path
        )
        said = ran.stderr.splitlines()
        assert ran.returncode == 0 and len(said) == len(commands), ran.stderr
        for line, extra in zip(said, commands.values(), strict=True):
            assert line.startswith("raas-jax: error: ") and extra in line
        assert not list(tmp_path.iterdir())


def test_ctrl_c_twice():
    """The first ends the work, the second, as Python ends, the process: neither is a traceback."""
    code = (
        "import atexit, signal, sys, time\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # A job of a script has none.
        "from raas_jax.cli.main import COMMANDS, main\n"
        "def wait(self):\n"
        "    atexit.register(time.sleep, 60)\n"
        "    print('began', flush=True)\n"
        "    time.sleep(60)\n"
        "COMMANDS['report'].run = wait\n"
        "sys.argv = ['raas-jax', 'report', 'x']\n"
        "sys.exit(main())\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "began\n"
    process.send_signal(signal.SIGINT)
    assert process.stderr.readline() == "raas-jax: interrupted\n"
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30)[1] == ""
    assert process.returncode in (130, -signal.SIGINT)
