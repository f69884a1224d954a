"""Prompts, one per line, and the options that go with them."""

import io
import json
import sys

import pytest

import raas_jax
from raas_jax.cli import streams
from raas_jax.cli.generate import Generate
from raas_jax.cli.main import main
from raas_jax.cli.options import SamplingOptions
from raas_jax.cli.prompts import parse_line, read_prompts


@pytest.mark.parametrize(
    ("line", "prompt"),
    [
        ("How many?", "How many?"),
        ('"How\\nmany?"', "How\nmany?"),
        ('"Yes", he said', '"Yes", he said'),
        ('{"prompt": "x"}', "x"),
        ('{"prompt": [1, 2], "id": 7}', [1, 2]),
        (
            '{"messages": [{"role": "user", "content": "x"}]}',
            [{"role": "user", "content": "x"}],
        ),
        ("[1, 2]", "[1, 2]"),
    ],
)
def test_a_line_is_text_or_json(line, prompt):
    assert parse_line(line, "here") == prompt


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{not json", "not valid JSON"),
        ("{}", 'give one of "prompt" and "messages"'),
        ('{"prompt": "x", "messages": []}', 'give one of "prompt" and "messages"'),
        ('{"prompt": []}', "the prompt is empty"),
        ('{"messages": []}', "the prompt is empty"),
        ('{"prompt": 3}', "expected text or a list of token ids"),
        ('{"prompt": [true]}', "expected text or a list of token ids"),
        ('{"prompt": "\\ud800"}', "half of a character"),
        ('"\\ud800"', "half of a character"),
        ('{"prompt": ' + "[" * 70 + "]" * 70 + "}", "nested more than 64 deep"),
        ('{"messages": "x"}', '"messages" must be a list'),
        ('{"messages": [{"role": "user"}]}', '"messages" must be a list'),
    ],
)
def test_a_bad_line_is_named(line, said):
    with pytest.raises(ValueError, match="file, line 3") as caught:
        parse_line(line, "file, line 3")
    assert said in str(caught.value)


MARK = "\ufeff".encode()


@pytest.mark.parametrize("source", ["a file", "standard input"])
def test_byte_order_marks_are_no_text(tmp_path, monkeypatch, source):
    data = MARK + b'{"prompt": [1, 2]}\r\n \r\n' + MARK + b'"x"\n' + MARK
    file = tmp_path / "prompts"
    file.write_bytes(data)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    assert read_prompts("-" if source == "standard input" else str(file)) == [[1, 2], "x"]


@pytest.mark.parametrize("data", ["x".encode("utf-16"), b"caf\xe9"])
def test_other_encodings_are_refused(tmp_path, monkeypatch, data):
    (tmp_path / "prompts").write_bytes(data)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    for file in (str(tmp_path / "prompts"), "-"):
        with pytest.raises(ValueError, match="is not UTF-8 text"):
            read_prompts(file)


def test_what_was_typed_where_the_locale_knows_only_ascii():
    assert streams.typed("\udcc3\udca9 = 4") == streams.typed("é = 4") == "é = 4"
    assert streams.typed("a\udcff\ud83d") == "a\udcff\ud83d"


def test_a_folder_of_prompts_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="--prompt-file is ''"):
        read_prompts("")
    with pytest.raises(ValueError, match="expected a regular file"):
        read_prompts(str(tmp_path))


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["a\udcff"], "error: PROMPT is 'a\\udcff', which is no Unicode text"),
        (["a = 1 ; ? a", "--stop", "\udcff"], "error: --stop[0] is '\\udcff', which is no Unicode"),
    ],
)
def test_an_argument_that_is_no_text_is_named(capsys, args, said):
    assert main(["generate", *args]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line and "UTF-8" in line


def test_flags_without_effect_are_named():
    drawn = SamplingOptions(top_k=5, seed=2)
    command = Generate(prompt_file="x", rows=3, chat=True, sampling=drawn)
    flags = [flag for flag, _ in command._idle([[1, 2]])]
    assert flags == ["--rows", "--chat", "--top-k", "--seed"]
    drawn = SamplingOptions(temperature=1.0, top_k=5, seed=2)
    assert not list(Generate(prompt="x", chat=True, sampling=drawn)._idle(["x"]))


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "utf-8"])
def test_what_a_terminal_cannot_show_is_replaced(monkeypatch, encoding):
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding=encoding))
    main(["--version"])
    print("😀", flush=True)
    assert shown.getvalue().splitlines()[1] == ("😀" if encoding == "utf-8" else "?").encode()


@pytest.mark.parametrize("encoding", ["latin-1", "utf-8"])
def test_json_is_whole_in_every_encoding(monkeypatch, encoding):
    stats = raas_jax.Stats(1, 1, 0, 0, 1, 1, 0.0, 0.0)
    output = raas_jax.Output("é😀", [1], "stop", [0.0], stats)
    monkeypatch.setattr(raas_jax, "generate", lambda *_, **__: [output])
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding=encoding))
    assert Generate(prompt="x")._print_json(None, ["x"], {}) == {"stop"}
    assert json.loads(shown.getvalue().decode(encoding))["text"] == "é😀"
