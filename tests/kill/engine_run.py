"""A run of the engine that may be killed at any moment; see `forks`."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import orbax.checkpoint  # noqa: F401 - imported before the fork
from forks import serve
from tiny import prompts_of, random_params

from raas_jax import Engine, RaaS, Request, Sampling

REQUESTS = [
    Request(
        f"{index}",
        prompt,
        Sampling(temperature=1.0 if index % 3 else 0.0),
        seed=index,
        max_new_tokens=5 + 7 * index % 40,
        n=2 if index % 5 == 0 else 1,
    )
    for index, prompt in enumerate(prompts_of([3 + index % 6 for index in range(50)]))
] + [Request("bad", "")]
OPTIONS = {
    "policy": RaaS(16, alpha=0.12, page_size=4),
    "rows": 4,
    "max_new_tokens": 44,
    "max_prompt_tokens": 8,
    "prefill_rows": 1,
    "samples": 2,
}


def finished(file: Path) -> dict:
    """Results by (id, sample); a line that a kill has cut is taken off."""
    data = file.read_bytes() if file.exists() else b""
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        os.truncate(file, whole)
    lines = [json.loads(line) for line in data[:whole].splitlines()]
    found = {(line["id"], line["sample"]): line for line in lines}
    assert len(found) == len(lines), "a result is there twice"
    return found


def live(folder: Path, say=lambda word: None, pause: float = 0.0) -> None:
    """Goes on with the run in `folder`, from where it was, to its end."""
    done = finished(folder / "results.jsonl")
    saves, params = folder / "saves", random_params(sharpness=3.0)
    saving = {"save_to": saves, "save_every": 0.05}
    try:
        engine = Engine.restore(saves, params, **saving)
        word = "restored"
    except FileNotFoundError:
        engine = Engine(params, **OPTIONS, **saving)
        word = "new"
    with (folder / "results.jsonl").open("a") as stream:
        for number, result in enumerate(engine.run(REQUESTS, done=done)):
            if not number:
                say(word)
            time.sleep(pause)
            stream.write(json.dumps(result.to_json()) + "\n")
            stream.flush()


if __name__ == "__main__":
    FOLDER = Path(sys.argv[1])
    serve(
        lambda pause: live(FOLDER, lambda word: print(word, flush=True), float(pause)),
        FOLDER / "compiled",
    )
