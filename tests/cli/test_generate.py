"""`raas-jax generate`, mostly in this process; a real one where signals and pipes matter."""

import io
import json
import signal
import subprocess
import sys
from pathlib import Path

import jax
from quick import environment

import raas_jax
from raas_jax.cli.main import main
from raas_jax.lab.tasks.lemma.tokenizer import EOS_ID

JSON_FIELDS = [
    "text",
    "token_ids",
    "finish_reason",
    "prompt_tokens",
    "generated_tokens",
    "kept_pages",
    "evicted_pages",
    "kv_bytes",
    "dense_kv_bytes",
]
PROMPT = "a = 4 ; b = 9 ; c = a + b ; ? c"


def test_json_is_what_the_library_gives(short, model, capsys):
    assert main(["generate", PROMPT, *short, "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    fields = json.loads(line)
    assert list(fields) == JSON_FIELDS
    params = raas_jax.load(model)
    out = raas_jax.generate(params, PROMPT, policy=raas_jax.RaaS(32), max_new_tokens=80)
    assert fields["text"] == out.text
    assert fields["token_ids"] == out.tokens
    assert fields["finish_reason"] == out.finish_reason == "length"
    for name in JSON_FIELDS[3:]:
        assert fields[name] == getattr(out.stats, name)
    assert fields["generated_tokens"] == 80
    assert fields["kept_pages"] == 2
    assert fields["evicted_pages"] > 0
    assert fields["kv_bytes"] < fields["dense_kv_bytes"] + 2048


def test_text_streams_to_stdout_and_the_summary_to_stderr(short, model, capsys):
    assert main(["generate", PROMPT, *short]) == 0
    streamed = capsys.readouterr()
    main(["generate", PROMPT, *short, "--json"])
    whole = json.loads(capsys.readouterr().out)["text"]
    assert streamed.out == whole + "\n"
    assert "80 tokens" in streamed.err and "tokens/s" in streamed.err
    assert "2 pages kept" in streamed.err and "dense" in streamed.err


def test_prompts_from_standard_input_keep_their_order(short, capsys, monkeypatch):
    lines = [PROMPT, json.dumps({"prompt": "a = 1 ; ? a"}), "", json.dumps("b = 2 ; ? b")]
    data = "\n".join([*lines, json.dumps({"prompt": [1, 5, 6]})])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data.encode())))
    assert main(["generate", "--prompt-file", "-", *short, "--json", "--rows", "3"]) == 0
    together = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [each["prompt_tokens"] for each in together] == [18, 8, 8, 3]
    main(["generate", "a = 1 ; ? a", *short, "--json"])
    alone = json.loads(capsys.readouterr().out)
    assert together[1]["token_ids"] == alone["token_ids"]


def test_sampling_options_reach_the_library(short, capsys):
    warm = ["--temperature", "1.5", "--top-k", "50", "--seed", "3"]
    texts = []
    for options in (warm, warm, [*warm, "--seed", "4"], []):
        main(["generate", PROMPT, *short, "--json", *options])
        texts.append(json.loads(capsys.readouterr().out)["text"])
    assert texts[0] == texts[1]
    assert len(set(texts)) == 3


def test_stop_text_ends_the_answer(short, capsys):
    main(["generate", PROMPT, *short, "--json"])
    words = json.loads(capsys.readouterr().out)["text"].split()
    stop = next(word for word in words[3:] if len(word) > 1)
    main(["generate", PROMPT, *short, "--json", "--stop", stop])
    stopped = json.loads(capsys.readouterr().out)
    assert stopped["finish_reason"] == "stop"
    assert stop not in stopped["text"]


# Where the tests run in the background Ctrl-C is ignored, and a new process inherits that.
LAUNCH = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from raas_jax.cli.main import main
sys.exit(main())
"""


def start(args: list[str]) -> subprocess.Popen:
    """The command line in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", LAUNCH, *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(PYTHONUNBUFFERED="1", JAX_PLATFORMS="cpu"),
        cwd=Path(__file__).resolve().parents[2],
    )


def test_ctrl_c_keeps_what_was_generated(model):
    process = start(["generate", PROMPT, "--model", model, "--budget", "32", "-n", "90000"])
    assert process.stdout is not None and process.stderr is not None
    begun = process.stdout.read(100)
    process.send_signal(signal.SIGINT)
    # Not by communicate, which would miss what the reader has buffered.
    with process.stdout, process.stderr:
        rest, errors = process.stdout.read(), process.stderr.read()
    assert process.wait(timeout=60) == 130
    assert len(begun + rest) > 100
    assert b"interrupted" in errors and b"pages kept" in errors
    assert b"Traceback" not in errors


def test_a_reader_that_leaves_ends_it_quietly(model):
    process = start(["generate", PROMPT, "--model", model, "--budget", "32", "-n", "90000"])
    assert process.stdout is not None and process.stderr is not None
    process.stdout.read(100)
    process.stdout.close()
    assert process.wait(timeout=60) == 141
    assert process.stderr.read() == b""
    process.stderr.close()


def test_the_eos_of_the_tokenizer_is_not_in_the_way(model):
    # Guards the fixture: random weights must run to the limit.
    assert EOS_ID not in jax.tree.leaves(raas_jax.load(model).config.eos_token_ids)
