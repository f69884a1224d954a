"""The command line as a whole: help, errors, and what a shell sees of it."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Annotated, get_args, get_origin, get_type_hints

import pytest

import raas_jax
from raas_jax.cli.errors import flags, in_flags
from raas_jax.cli.main import COMMANDS, main
from raas_jax.cli.options import Within

SHAPE = str(Path(__file__).parents[2] / "configs" / "bench_25m.yaml")
PROMPT = "a = 4 ; b = 9 ; c = a + b ; ? c"


def test_help_is_short_and_names_every_command(capsys):
    for args in ([], ["--help"]):
        with pytest.raises(SystemExit) as end:
            main(args)
        assert end.value.code == 0
        text = capsys.readouterr().out
        assert len(text.splitlines()) <= 30
        for name in COMMANDS:
            assert f"• {name}" in text


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_its_options(name, capsys):
    with pytest.raises(SystemExit) as end:
        main([name, "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: raas-jax {name}")
    assert "None" not in text  # A default of None says nothing to a user.


def options_of(name, capsys, monkeypatch):
    """Help text of every option and argument of a command, by what stands before it."""
    monkeypatch.setenv("COLUMNS", "400")
    with pytest.raises(SystemExit):
        main([name, "--help"])
    text = re.sub("[│╭╮╰╯─]", " ", capsys.readouterr().out)
    entry = r"^ +([-[A-Z]\S*(?: \S+)*)(?: {2,}| *\n {8,})(\S.*?) *$"
    found = dict(re.findall(entry, text, re.MULTILINE))
    return {what: said for what, said in found.items() if not what.startswith("-h,")}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_help_text_stands_by_itself(name, capsys, monkeypatch):
    found = options_of(name, capsys, monkeypatch)
    shown = {flag for what in found for flag in re.findall(r"--[\w-]+", what)}
    assert shown == set(flags(COMMANDS[name]).values())
    for what, text in found.items():
        sentence = r"(?!(Of|As|Instead|Also|And|Or)\b)[A-Z].*\.( \((default|re).*\))?"
        assert re.fullmatch(sentence, text), f"{what}: {text}"


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_every_number_has_a_range(command):
    """Checked before the command begins; what policy and sampling take, the library checks."""
    for name, hint in get_type_hints(command, include_extras=True).items():
        # For example Annotated[int | None, ...].
        plain = get_args(hint)[:1] if get_origin(hint) is Annotated else (hint,)
        if {int, float} & {*plain, *get_args(plain[0])}:
            assert any(isinstance(each, Within) for each in get_args(hint)), name


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (
            ["generate", "x", "--rows", "1000000000"],
            "--rows is 1000000000; it must be",
        ),
        (["generate", "x", "-n", "1000000000000"], "--max-new-tokens is 1000000000000;"),
        (["generate", "x", "--seed", "1" + "0" * 30], "--seed is 1000000000000000000000000000000;"),
        (["memory", "--layers", "1000000000"], "--layers is 1000000000;"),
        (["bench", "--config", "x", "--repetitions", "0"], "--repetitions is 0;"),
        (["bench", "--config", SHAPE, "--lengths", "9" * 5000], "--lengths is '999"),
        (["bench", "--config", SHAPE, "--lengths", "64,1000000000000"], "--lengths is 10000"),
        (["throughput", "--problems", "1000000000000"], "--problems is 1000000000000;"),
        (["throughput", "--definitions", "1-1000000000000"], "--definitions is '1-1000000000000';"),
        (["throughput", "--turns", "-1"], "--turns is -1;"),
        (["trace", "--definitions", "97", "-o", "x"], "--definitions is 97;"),
        (
            ["trace", "x", "--model", "y", "-o", "x", "--heads", "9999999.1"],
            "--heads is '9999999.1'",
        ),
        (["train", "x", "--until", "0"], "--until is 0;"),
        (["calibrate", "-o", "x", "-n", "-1"], "--max-new-tokens is -1;"),
        (["calibrate", "-o", "/nowhere/x"], "--out is '/nowhere/x'; give a file in a folder that"),
        (["eval", "lemma", "-o", "x", "--samples", "1000000000000"], "--samples is 1000000000000;"),
        (["eval", "lemma", "-o", "x", "--late-facts", "-1"], "--late-facts is -1;"),
        (["eval", "lemma", "-o", "x", "--budgets", "1000000000000"], "--budgets is 1000000000000;"),
        (["eval", "gsm8k", "-o", "x", "--grading-seconds", "nan"], "--grading-seconds is nan;"),
        (["eval", "gsm8k", "-o", "x", "--grading-seconds", "inf"], "--grading-seconds is inf;"),
        (["eval", "gsm8k", "-o", "x", "--graders", "1000000000"], "--graders is 1000000000;"),
        (["eval", "gsm8k", "-o", "x", "--limit", "-3"], "--limit is -3;"),
    ],
)
def test_numbers_out_of_range(args, said, capsys):
    assert main(args) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_errors_name_the_flags_of_the_command(command):
    known = flags(command)
    for name, flag in known.items():
        rest = "is 0; it must be at least 1."
        assert in_flags(f"{name} {rest}", command) == f"{flag} {rest}"
        assert in_flags(f"It is. Use {name}=1, or {name}=2.", command) == (
            f"It is. Use {flag}=1, or {name}=2."
        )
    for said in (
        "unheard_of is 0; it must be at least 1.",
        "prompt is empty; give at least one token id.",  # An argument that is no option.
        "data=4 and model=2 ask for 8 devices; there are 1.",
        "config.json: dtype is 'int4'; expected float32, float16 or bfloat16.",
        "rows of the batch are 3.",
    ):
        assert in_flags(said, command) == said


def test_groups_of_options_have_flags_too():
    known = flags(COMMANDS["generate"])
    assert known["page_size"] == "--page-size" and known["top_p"] == "--top-p"
    assert "prompt" not in known and "policy" in known and "sampling" not in known


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"raas-jax {raas_jax.__version__}\n"


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["generate"], "--prompt-file"),
        (["generate", "x", "--prompt-file", "-"], "not both"),
        (["generate", "--prompt-file", "/nowhere/prompts"], "no such file"),
        (["generate", PROMPT, "--model", "/nowhere/model"], "--model is '/nowhere/model'"),
        (["generate", PROMPT, "--model", "MODEL", "--policy", "rass"], "--policy is 'rass'; there"),
        (["generate", PROMPT, "--model", "MODEL", "--policy", "dense", "--alpha", "1"], "--alpha"),
        (["generate", PROMPT, "--model", "MODEL", "--budget", "33"], "--budget is 33,"),
        (
            ["generate", PROMPT, "--model", "MODEL", "--allotment", "/no/a"],
            "--allotment is '/no/a'",
        ),
        (["generate", PROMPT, "--model", "MODEL", "--allotment", "BROKEN"], "is not valid JSON"),
        (["generate", PROMPT, "--model", "MODEL", "--allotment", "auto"], "no allotment.json ("),
        (["generate", PROMPT, "--model", "MODEL", "--temperature", "-1"], "--temperature is -1.0;"),
        (["generate", PROMPT, "--model", "MODEL", "--top-p", "0"], "--top-p is 0.0;"),
        (
            ["generate", PROMPT, "--model", "MODEL", "--max-new-tokens", "0"],
            "--max-new-tokens is 0;",
        ),
        (["generate", PROMPT, "--model", "MODEL", "--rows", "0"], "--rows"),
        (["generate", "", "--model", "MODEL", "--chat"], "template"),
        (["generate", "a = 1 / 2", "--model", "demo"], "problem: definition 1"),
        (["convert", "/nowhere/model", "OUT"], "/nowhere/model"),
        (["convert", "MODEL", "MODEL"], "exists"),
        (["memory"], "--config"),
        (["memory", "--config", "/nowhere/shape.yaml"], "no such file"),
        (["memory", "--config", "BROKEN"], "YAML"),
        (["memory", "--config", "DEEP"], "nested more than 64 deep"),
        (["memory", "--model", "MODEL", "--batch", "0"], "--batch is 0;"),
        (["bench", "--config", "MODEL", "--lengths", "1k"], "--lengths"),
        (["bench", "--config", "MODEL", "--lengths", "8"], "--lengths are [8]"),
        (["bench", "--config", "MODEL", "--against", "vllm"], "--against is 'vllm'"),
        (["bench", "--config", "MODEL", "--lengths", "200000"], "max_position_embeddings"),
        (["train", "/nowhere/lemma.yaml"], "/nowhere/lemma.yaml"),
    ],
)
def test_what_a_user_can_mend_is_one_line(args, said, model, tmp_path, capsys):
    (tmp_path / "broken.yaml").write_text("a: [")
    (tmp_path / "deep.yaml").write_text("a: " + "[" * 100_000)
    names = {
        "MODEL": model,
        "OUT": str(tmp_path / "out"),
        "BROKEN": str(tmp_path / "broken.yaml"),
        "DEEP": str(tmp_path / "deep.yaml"),
    }
    assert main([names.get(arg, arg) for arg in args]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("raas-jax: error: ")
    assert said in printed.err
    assert "Traceback" not in printed.err
    assert printed.out == ""


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (KeyError("x"), 1, "internal error: KeyError: 'x' (run with --debug for where; please rep"),
        (AssertionError("a\nb"), 1, "internal error: AssertionError: a b (run"),
        (RuntimeError("odd"), 1, "internal error: RuntimeError: odd (run"),
        (ImportError("cannot import name", name="raas_jax.gone"), 1, "internal error: ImportError"),
        (MemoryError(), 2, "error: this machine is out of memory"),
        (RuntimeError("RESOURCE_EXHAUSTED: 9"), 2, "error: the device is out of memory; `raas-jax"),
        (RecursionError("maximum"), 2, "error: what was given is nested too deep"),
        (OSError(28, "No space left", "/a"), 2, "error: /a: no space left"),
        (ValueError("a \x1b[31mred\x07\r\nline\ttab"), 2, r"error: a \x1b[31mred\x07\r" "\nline"),
        (
            ModuleNotFoundError("", name="filelock"),
            2,
            "pip install -e '.[lab]', or '.[eval]' for",
        ),
        (
            ModuleNotFoundError("", name="optax.contrib"),
            2,
            "optax is not installed: in the",
        ),
        (ModuleNotFoundError("", name="matplotlib"), 2, "pip install -e '.[plots]'"),
        (ModuleNotFoundError("", name="datasets"), 2, "pip install -e '.[eval]'\n"),
        (ModuleNotFoundError("", name="torch"), 2, "torch is not installed: pip install torch"),
    ],
)
def test_whatever_goes_wrong_is_one_line(error, code, said, monkeypatch, capsys):
    def fail(self):
        raise error

    monkeypatch.setattr(COMMANDS["report"], "run", fail)
    assert main(["report", "x"]) == code
    printed = capsys.readouterr().err
    assert printed.startswith("raas-jax: ") and said in printed and "Traceback" not in printed
    with pytest.raises(type(error)):
        main(["report", "x", "--debug"])


def test_debug_shows_where_an_error_came_from():
    with pytest.raises(ValueError, match="prompt-file"):
        main(["generate", "--debug"])


def test_an_unknown_option_ends_with_code_2(capsys):
    with pytest.raises(SystemExit) as end:
        main(["generate", PROMPT, "--buget", "64"])
    assert end.value.code == 2
    assert "--budget" in capsys.readouterr().err


def test_a_wrong_option_does_not_obey_its_terminal(capsys):
    for args in (["generate", "--rows", "\x1b[2J"], ["memory", "--\x1b[2J", "1"]):
        with pytest.raises(SystemExit):
            main(args)
        said = capsys.readouterr().err
        assert "\x1b" not in said and "\\x1b[2J" in said


def test_a_folder_that_is_gone(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tmp_path.rmdir()
    assert main(["generate", PROMPT, "--model", "x"]) == 2
    assert capsys.readouterr().err == (
        "raas-jax: error: the current folder is no longer there; change to another\n"
    )


def test_what_cannot_be_held_is_accounted_for(model, capsys):
    """Prompts of terabytes, which a program is lowered for and nothing is run with."""
    huge = ["--batch", "4096", "--prompt-tokens", str(2**27), "-n", "16", "--policy", "dense"]
    assert main(["memory", "--model", model, *huge]) == 0
    assert "128.0 TiB" in capsys.readouterr().out


def test_help_and_version_import_no_framework():
    """Beyond what `import raas_jax` itself does."""
    code = """
import sys, raas_jax
before = set(sys.modules)
from raas_jax.cli.main import main
assert main(["--version"]) == 0
try:
    main(["--help"])
except SystemExit:
    print(*{"flax", "jax", "orbax", "transformers"} & (set(sys.modules) - before))
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines()[-1] == ""


def test_it_runs_as_a_module():
    ran = subprocess.run([sys.executable, "-m", "raas_jax.cli", "-V"], capture_output=True)
    assert ran.returncode == 0 and ran.stdout.startswith(b"raas-jax ")
