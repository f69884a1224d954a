"""The command line, mostly in this process; a real one where signals and pipes matter."""

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import pytest

import raas_jax
from raas_jax.cli.main import COMMANDS, main
from raas_jax.cli.options import read_config, readable_bytes
from raas_jax.cli.prompts import parse_line
from raas_jax.lab.tasks.lemma.tokenizer import EOS_ID, save_tokenizer
from raas_jax.weights import save_hf

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
CONFIG = raas_jax.ModelConfig(
    vocab_size=128,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=100_000,
    tie_word_embeddings=True,
    qk_norm=True,
    model_type="qwen3",
    # No token ends an answer of random weights before its time.
    eos_token_ids=(127,),
)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Hugging Face folder with random weights and a word-level tokenizer."""
    folder = tmp_path_factory.mktemp("cli") / "model"
    save_hf(raas_jax.Params.random(CONFIG), folder)
    save_tokenizer(folder)
    settings = folder / "tokenizer_config.json"
    settings.write_text(settings.read_text().replace('"eos_token": "<eos>",', ""))
    return str(folder)


@pytest.fixture
def short(model: str) -> list[str]:
    """Options that keep a generation quick, and the same compiled program for all tests."""
    return ["--model", model, "--budget", "32", "--max-new-tokens", "80"]


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


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"raas-jax {raas_jax.__version__}\n"


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
        ('{"prompt": 3}', "expected text or a list of token ids"),
        ('{"prompt": [true]}', "expected text or a list of token ids"),
        ('{"messages": "x"}', '"messages" must be a list'),
        ('{"messages": [{"role": "user"}]}', '"messages" must be a list'),
    ],
)
def test_a_bad_line_is_named(line, said):
    with pytest.raises(ValueError, match="file, line 3") as caught:
        parse_line(line, "file, line 3")
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["generate"], "--prompt-file"),
        (["generate", "x", "--prompt-file", "-"], "not both"),
        (["generate", "--prompt-file", "/nowhere/prompts"], "no such file"),
        (["generate", PROMPT, "--model", "/nowhere/model"], "/nowhere/model"),
        (["generate", PROMPT, "--model", "MODEL", "--policy", "rass"], "raas"),
        (["generate", PROMPT, "--model", "MODEL", "--policy", "dense", "--alpha", "1"], "--alpha"),
        (["generate", PROMPT, "--model", "MODEL", "--budget", "33"], "budget"),
        (["generate", PROMPT, "--model", "MODEL", "--temperature", "-1"], "temperature"),
        (["generate", PROMPT, "--model", "MODEL", "--top-p", "0"], "top_p"),
        (["generate", PROMPT, "--model", "MODEL", "--max-new-tokens", "0"], "max_new_tokens"),
        (["generate", PROMPT, "--model", "MODEL", "--rows", "0"], "--rows"),
        (["generate", "", "--model", "MODEL", "--chat"], "template"),
        (["generate", "a = 1 / 2", "--model", "demo"], "problem: definition 1"),
        (["convert", "/nowhere/model", "OUT"], "/nowhere/model"),
        (["convert", "MODEL", "MODEL"], "exists"),
        (["memory"], "--config"),
        (["memory", "--config", "/nowhere/shape.yaml"], "no such file"),
        (["memory", "--config", "BROKEN"], "YAML"),
        (["memory", "--model", "MODEL", "--batch", "0"], "batch"),
        (["bench", "--config", "MODEL", "--lengths", "1k"], "--lengths"),
        (["bench", "--config", "MODEL", "--lengths", "8"], "lengths"),
        (["bench", "--config", "MODEL", "--against", "vllm"], "--against is 'vllm'"),
        (["bench", "--config", "MODEL", "--lengths", "200000"], "max_position_embeddings"),
        (["train", "/nowhere/lemma.yaml"], "/nowhere/lemma.yaml"),
    ],
)
def test_what_a_user_can_mend_is_one_line(args, said, model, tmp_path, capsys):
    (tmp_path / "broken.yaml").write_text("a: [")
    names = {
        "MODEL": model,
        "OUT": str(tmp_path / "out"),
        "BROKEN": str(tmp_path / "broken.yaml"),
    }
    assert main([names.get(arg, arg) for arg in args]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("raas-jax: error: ")
    assert said in printed.err
    assert "Traceback" not in printed.err
    assert printed.out == ""


def test_debug_shows_where_an_error_came_from():
    with pytest.raises(ValueError, match="prompt-file"):
        main(["generate", "--debug"])


def test_an_unknown_option_ends_with_code_2(capsys):
    with pytest.raises(SystemExit) as end:
        main(["generate", PROMPT, "--buget", "64"])
    assert end.value.code == 2
    assert "--budget" in capsys.readouterr().err


def test_convert_there_and_back_changes_no_byte(model, tmp_path):
    assert main(["convert", model, str(tmp_path / "orbax")]) == 0
    assert main(["convert", str(tmp_path / "orbax"), str(tmp_path / "hf")]) == 0
    name = "model.safetensors"
    assert (tmp_path / "hf" / name).read_bytes() == (Path(model) / name).read_bytes()


def test_memory_does_not_depend_on_the_length(model, capsys):
    accounts = []
    for tokens in ("1024", "65536"):
        args = ["memory", "--model", model, "--budget", "256", "-n", tokens, "--json"]
        assert main(args) == 0
        accounts.append(json.loads(capsys.readouterr().out))
    short, long = accounts
    assert short["dense"] < long["dense"]
    del short["dense"], long["dense"]
    assert short == long
    assert short["kv"] == sum(short[name] for name in ("prompt", "kept", "open", "metadata"))
    # Prompt, kept and current pages of two layers, two heads of 8, keys and values, float32.
    assert short["kept"] == 2 * 2 * 256 * 8 * 2 * 4
    assert short["decode"]["aliases"] >= short["kv"]


def test_memory_prints_a_table(model, capsys):
    assert main(["memory", "--model", model, "--policy", "dense", "-n", "1000"]) == 0
    text = capsys.readouterr().out
    for name in ("weights", "prompt", "kept", "open", "metadata", "padding", "dense", "decode"):
        assert name in text


def test_bench_measures_every_length(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG.to_hf()))
    args = ["bench", "--config", str(tmp_path), "--budget", "64", "--prompt-tokens", "20"]
    args += ["--lengths", "64,192", "--repetitions", "2", "--layers", "1"]
    assert main([*args, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [timing["generated"] for timing in report["timings"]] == [64, 192]
    for timing in report["timings"]:
        assert timing["over_floor"] == pytest.approx(timing["ms_per_token"] / timing["floor_ms"])
        assert timing["compile_seconds"] > 0
        assert timing["transformers_ms_per_token"] is None
    # Everything but the embedding table would be read; this one is tied.
    read = report["timings"][-1]["floor_ms"] / 1e3 * report["read_bandwidth"]
    assert report["weight_bytes"] < read < report["weight_bytes"] + 200 * 2 * 2 * 8 * 4
    assert main(args) == 0
    text = capsys.readouterr().out
    assert "| generated |" in text and "float32" in text


def test_bench_against_transformers(tmp_path, capsys):
    pytest.importorskip("torch", reason="the comparison runs transformers, which needs torch")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG.to_hf()))
    args = ["bench", "--config", str(tmp_path), "--budget", "64", "--prompt-tokens", "20"]
    args += ["--lengths", "64", "--repetitions", "1", "--against", "transformers", "--json"]
    assert main(args) == 0
    (timing,) = json.loads(capsys.readouterr().out)["timings"]
    theirs, ours = timing["transformers_ms_per_token"], timing["ms_per_token"]
    assert timing["speedup"] == pytest.approx(theirs / ours)
    assert timing["whole_run_speedup"] > 0


def test_bench_against_a_dense_cache_and_the_rows_that_fit(tmp_path, capsys, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG.to_hf()))
    asked = []

    def largest(account, together, limit):
        """Instead of the search, which the engine's tests have: the numbers in seven rows."""
        (program,) = account(7)
        asked.append(sum(leaf.size for leaf in jax.tree.leaves(program.in_avals)))
        return 7

    monkeypatch.setattr("raas_jax.engine.autosize.largest_batch", largest)
    args = ["bench", "--config", str(tmp_path), "--budget", "64", "--prompt-tokens", "20"]
    args += ["--lengths", "128", "--repetitions", "1", "--layers", "1", "--against", "dense"]
    assert main([*args, "--largest-batch", "--json"]) == 0
    (timing,) = json.loads(capsys.readouterr().out)["timings"]
    assert timing["over_dense"] == pytest.approx(
        timing["dense_ms_per_token"] / timing["ms_per_token"]
    )
    assert timing["dense_kv_bytes"] > timing["kv_bytes"]
    assert timing["largest_batch"] == timing["dense_largest_batch"] == 7
    ours, dense = asked
    assert ours < dense


def test_config_files_may_be_yaml(tmp_path):
    file = tmp_path / "shape.yaml"
    file.write_text(
        "model:\n" + "\n".join(f"  {k}: {json.dumps(v)}" for k, v in CONFIG.to_hf().items())
    )
    assert read_config(str(file)) == CONFIG
    assert read_config(str(file), layers=7).num_hidden_layers == 7
    shapes = Path(__file__).resolve().parents[2] / "configs"
    assert read_config(str(shapes / "bench_25m.yaml")).num_hidden_layers == 8


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1024, "1.0 KiB"), (150 * 2**20, "150 MiB"), (2**40, "1.0 TiB")],
)
def test_bytes_are_readable(count, text):
    assert readable_bytes(count) == text


# Where the tests run in the background Ctrl-C is ignored, and a new process inherits that.
LAUNCH = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from raas_jax.cli.main import main
sys.exit(main())
"""


def start(args: list[str]) -> subprocess.Popen:
    """The command line in a process of its own."""
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(
        [sys.executable, "-c", LAUNCH, *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
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
