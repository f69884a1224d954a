"""Everything that is read from disk or the command line: how it is made, how it is used."""

from __future__ import annotations

import contextlib
import io
import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import tiny
import tiny_lemma

import raas_jax
from raas_jax import Engine, ModelConfig, RaaS, Request, policies, tokenizer
from raas_jax.cli.main import main
from raas_jax.cli.options import read_config
from raas_jax.cli.prompts import read_prompts
from raas_jax.decode import RowRequest
from raas_jax.lab.runs import Asking, EngineDecoding, LemmaTask, run
from raas_jax.lab.runs.study import Study
from raas_jax.lab.tasks.benchmarks.lemma import lemma_benchmark
from raas_jax.lab.tasks.benchmarks.rows import from_jsonl
from raas_jax.lab.train.config import TrainConfig
from raas_jax.session import Session
from raas_jax.weights import save_hf, save_orbax

CONFIGS = Path(raas_jax.__file__).parents[1] / "configs"
POLICY = RaaS(8, page_size=4)


@dataclass(frozen=True)
class Target:
    """A kind of input.

    Attributes:
      make: writes a good one into a new folder.
      use: reads what is there, as a user would; raises for what cannot be used, and
        AssertionError for a wrong result.
      files: those that are damaged, as patterns.
    """

    make: Callable[[Path], object]
    use: Callable[[Path], object]
    files: tuple[str, ...]


def tiny_params() -> raas_jax.Params:
    return tiny.random_params(sharpness=3.0)


def answers(engine: Engine) -> list[list[int]]:
    requests = [Request(i, prompt) for i, prompt in enumerate(tiny.prompts_of([3, 5, 2, 4]))]
    return [result.tokens for result in sorted(engine.run(requests), key=lambda r: r.id)]


def make_engine(folder: Path) -> None:
    engine = Engine(tiny_params(), policy=POLICY, rows=2, max_new_tokens=20, max_prompt_tokens=8)
    wanted = answers(engine)
    engine = Engine(tiny_params(), policy=POLICY, rows=2, max_new_tokens=20, max_prompt_tokens=8)
    requests = [Request(i, prompt) for i, prompt in enumerate(tiny.prompts_of([3, 5, 2, 4]))]
    first = next(engine.run(requests))
    engine.save(folder / "saves")
    (folder / "wanted").write_text(json.dumps([wanted, first.id]))


def use_engine(folder: Path) -> None:
    wanted, given = json.loads((folder / "wanted").read_text())
    engine = Engine.restore(folder / "saves", tiny_params())
    found = {result.id: result.tokens for result in engine.run()}
    waiting = [Request(i, prompt) for i, prompt in enumerate(tiny.prompts_of([3, 5, 2, 4]))]
    found |= {result.id: result.tokens for result in engine.run(waiting)}
    assert found == {i: tokens for i, tokens in enumerate(wanted) if i != given}


def session_of(params: raas_jax.Params) -> tuple[Session, RowRequest]:
    return Session.create(params, POLICY, [3, 5], 20), RowRequest.create([20] * 2)


def make_state(folder: Path) -> None:
    session, request = session_of(tiny_params())
    state, _ = session.start(tiny.prompts_of([3, 5]), request)
    state, _ = session.advance(state, 2)
    session.save(state, folder / "state")
    _, progress = session.advance(state, 2)
    np.save(folder / "wanted.npy", session.read(progress).tokens)


def use_state(folder: Path) -> None:
    session, _ = session_of(tiny_params())
    _, progress = session.advance(session.restore(folder / "state"), 2)
    assert np.array_equal(session.read(progress).tokens, np.load(folder / "wanted.npy"))


def use_weights(folder: Path) -> None:
    params = raas_jax.load(folder / "model")
    assert all(bool(np.isfinite(leaf).all()) for leaf in jax.tree.leaves(params.weights))


def use_config(folder: Path) -> None:
    config = ModelConfig.from_file(folder / "model")
    assert ModelConfig.from_hf(config.to_hf()) == config


def use_tokenizer(folder: Path) -> None:
    # What is read once is kept by the name of the folder.
    params = raas_jax.Params(tiny_params().weights, tiny_lemma.CONFIG, str(folder / "model"))
    stops = tokenizer.stop_token_ids(params)
    ids, _ = tokenizer.encode(params, "a = 4 ; ? a")
    assert all(0 <= i < tiny_lemma.CONFIG.vocab_size for i in [*stops, *ids[0]])
    assert isinstance(tokenizer.decode(params, range(100)), str)


def make_run(folder: Path) -> None:
    tiny_lemma.save_tiny(folder / "model")
    params = raas_jax.load(folder / "model")
    task = lemma_benchmark(LemmaTask(problems=3, smallest=3, largest=3, max_new_tokens=8))
    decoding = EngineDecoding(Asking(), rows=4)
    run(params, task, [POLICY], folder / "run", model="m", decoding=decoding, progress=False)


def use_run(folder: Path) -> None:
    said = commanded(["report", str(folder / "run")])
    if said is not None:
        raise ValueError(said)


def make_study(folder: Path) -> None:
    shutil.copy(CONFIGS / "study_smoke.yaml", folder / "study.yaml")
    shutil.copy(CONFIGS / "lemma.yaml", folder / "training.yaml")
    shutil.copy(CONFIGS / "bench_25m.yaml", folder / "model.yaml")


def use_study(folder: Path) -> None:
    for file, read in (
        ("study.yaml", Study.from_file),
        ("training.yaml", TrainConfig.from_file),
        ("model.yaml", read_config),
    ):
        read(str(folder / file))


def make_lines(folder: Path) -> None:
    lines = ['{"prompt": "a = 4"}', '{"messages": [{"role": "user", "content": "x"}]}', "b = 5"]
    (folder / "prompts.jsonl").write_text("\n".join([*lines, '"c"', '{"prompt": [1, 2]}', ""]))
    rows = [{"question": "1 + 1?", "answer": "#### 2"}, {"question": "2?", "answer": "#### 3"}]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def use_lines(folder: Path) -> None:
    for prompt in read_prompts(str(folder / "prompts.jsonl")):
        assert isinstance(prompt, str | list) and prompt is not None
        str(prompt).encode()
    for row in from_jsonl(folder / "rows.jsonl", ("question", "answer")):
        assert {"question", "answer"} <= row.keys()


def make_calibration(folder: Path) -> None:
    shutil.copy(tiny.calibration(), folder / "centres.safetensors")


def use_calibration(folder: Path) -> None:
    policies.create("triattention", budget=256, calibration=str(folder / "centres.safetensors"))


def make_allotment(folder: Path) -> None:
    tiny.allotment_of().write(folder / "allotment.json")


def use_allotment(folder: Path) -> None:
    policy = RaaS(64, page_size=4, allotment=str(folder / "allotment.json"))
    assert isinstance(policy.allotment, policies.Allotment)
    for least in (1, 3):
        pages = policy.allotment.pages(16, 4, least)
        assert pages.mean() == 16 and pages.min() >= least


def make_arguments(folder: Path) -> None:
    tiny_lemma.save_tiny(folder / "model")


WORDS = (
    *("", "0", "-1", "1.5", "nan", "inf", "1e400", str(10**12), str(10**30), "9" * 5000, "none"),
    *("true", "[", "[" * 2000, "x" * 5000, "\udcff", "\x1b[2J", "/dev/zero", "/", "..", "1,2,,3"),
    *("5-2", "1-1000000000000", "data=0", "2x", "naïve", "raas:budget=-1", "h2o:recent=x", "4"),
)
COMMANDS = {
    "generate": (
        *("--budget", "--page-size", "--alpha", "--top-fraction", "--temperature", "--top-k"),
        *("--top-p", "--min-p", "--seed", "--stop", "--rows", "--prompt-file", "--policy", "-n"),
        *("--policy-option", "--model", "--granularity", "--prompt-pages", "--dense-layers"),
    ),
    "memory": ("--config", "--budget", "--rows", "--length", "--prompt-tokens", "--policy"),
    "report": (),
    "eval": ("--problems", "--definitions", "--budgets", "--policies", "--samples", "--rows"),
    "bench": ("--config", "--lengths", "--budget", "--layers", "--page-size"),
    "throughput": ("--problems", "--rows", "--budget", "--definitions"),
    "trace": ("--definitions", "--budget", "--out"),
    "convert": ("--to", "--dtype"),
    "calibrate": ("--prompts", "-n", "--out"),
    "train": ("--until",),
}


def use_arguments(folder: Path) -> None:
    draws = random.Random((folder / "case").read_text())
    command = draws.choice([*COMMANDS, "generate", "generate"])
    options = COMMANDS[command]
    given = [command, *(draws.choice(WORDS) for _ in range(draws.choice((0, 1, 1, 2))))]
    for flag in draws.sample(options, min(len(options), draws.choice((0, 1, 2)))):
        given += [flag, draws.choice(WORDS)]
    # What by chance is right should be short: nothing can be answered by this model.
    asks = command in ("generate", "eval", "throughput")
    given += ["--model", str(folder / "none")] if asks else []
    with contextlib.chdir(folder):
        said = commanded(given)
    if said is not None:
        raise ValueError(f"{folder}: {said}")


def commanded(arguments: list[str]) -> str | None:
    """The last line of the error that a command gave, None where there was none."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(arguments)
        except SystemExit as end:
            code = end.code
    assert code in (0, 2), (arguments, code, err.getvalue()[-500:])
    assert "Traceback" not in err.getvalue() and "internal error" not in err.getvalue(), arguments
    assert "\x1b[2J" not in err.getvalue(), "what a terminal obeys was printed"
    if not code:
        return None
    assert err.getvalue().strip(), arguments
    return err.getvalue().strip().splitlines()[-1]


def _model(save: Callable[..., None], **options: int) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        save(raas_jax.Params.random(tiny_lemma.CONFIG, seed=3), folder / "model", **options)

    return make


TARGETS = {
    "config": Target(_model(save_hf), use_config, ("model/config.json",)),
    "weights": Target(_model(save_hf), use_weights, ("model/config.json", "model/*.safetensors")),
    "shards": Target(
        _model(save_hf, shard_bytes=8000), use_weights, ("model/*.json", "model/*.safetensors")
    ),
    "orbax": Target(_model(save_orbax), use_weights, ("model/**/*",)),
    "tokenizer": Target(
        lambda folder: tiny_lemma.save_tiny(folder / "model"),
        use_tokenizer,
        ("model/tokenizer*", "model/generation_config.json", "model/special*"),
    ),
    "run": Target(make_run, use_run, ("run/run.json", "run/samples.jsonl")),
    "engine": Target(make_engine, use_engine, ("saves/**/*",)),
    "state": Target(make_state, use_state, ("state/**/*",)),
    "configurations": Target(make_study, use_study, ("*.yaml",)),
    "lines": Target(make_lines, use_lines, ("*.jsonl",)),
    "calibration": Target(make_calibration, use_calibration, ("*.safetensors",)),
    "allotment": Target(make_allotment, use_allotment, ("*.json",)),
    "arguments": Target(make_arguments, use_arguments, ()),
}
