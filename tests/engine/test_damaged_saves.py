"""Saves of an engine that were cut, changed, or written by somebody else."""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import replace

import pytest
from tiny import QWEN3, allotment_of, prompts_of, random_params

from raas_jax import Engine, RaaS, Request, identity
from raas_jax.files import FileError

pytestmark = pytest.mark.once

OPTIONS = {"policy": RaaS(16, page_size=4), "rows": 2, "max_new_tokens": 24, "max_prompt_tokens": 8}


@pytest.fixture(scope="module")
def params():
    return random_params(sharpness=3.0)


@pytest.fixture(scope="module")
def saved(params, tmp_path_factory):
    """A save in the middle of a run."""
    folder = tmp_path_factory.mktemp("engine") / "saves"
    engine = Engine(params, **OPTIONS)
    assert next(engine.run(requests())).id == 0
    engine.save(folder)
    return folder


def requests():
    return [Request(i, ids) for i, ids in enumerate(prompts_of([3, 5, 4]))]


def goes_on(folder, params):
    """Whether the save gives what was not given out before it."""
    engine = Engine.restore(folder, params)
    return sorted(result.id for result in engine.run(requests())) == [1, 2]


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "saves")


def book_of(folder):
    return folder / "1" / "book" / "metadata"


def cut(file):
    file.write_bytes(file.read_bytes()[:-7])


def rewritten(change):
    """What changes the book and signs it anew, as somebody hostile would."""

    def damage(folder):
        values = json.loads(book_of(folder).read_text())
        change(values)
        del values["digest"]
        book_of(folder).write_text(json.dumps({**values, "digest": identity.of_json(values)}))

    return damage


def allotted(value):
    return rewritten(lambda values: values["policy"]["options"].update(allotment=value))


def one_bit(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def a_pipe(folder):
    book_of(folder).unlink()
    os.mkfifo(book_of(folder))


DAMAGE = {
    "cut book": (lambda folder: cut(book_of(folder)), "not valid JSON"),
    "deep book": (lambda folder: book_of(folder).write_text("[" * 100_000), "nested more than"),
    "book that is a list": (lambda folder: book_of(folder).write_text("[1]"), "named fields"),
    "no book": (lambda folder: shutil.rmtree(folder / "1" / "book"), "no such file"),
    "a pipe": (a_pipe, "regular file"),
    "no state": (lambda folder: shutil.rmtree(folder / "1" / "state"), "damaged"),
    "another token": (
        lambda folder: book_of(folder).write_text(
            book_of(folder).read_text().replace('"max_new_tokens": 24', '"max_new_tokens": 25')
        ),
        "digest",
    ),
    "no version": (rewritten(lambda values: values.pop("version")), "another version"),
    "version that is a text": (rewritten(lambda v: v.update(version="3")), "must be an int"),
    "endless rows": (rewritten(lambda v: v["options"].update(rows=10**9)), "at most 65536"),
    "other rows": (rewritten(lambda v: v["options"].update(rows=4)), "other shapes"),
    "endless answers": (
        rewritten(lambda v: v["options"].update(max_new_tokens=10**12)),
        "at most",
    ),
    "rows of nobody": (rewritten(lambda v: v["schedule"]["rows"].append({"job": 99})), "damaged"),
    "no schedule": (rewritten(lambda v: v.pop("schedule")), "lacks schedule"),
    "no options": (rewritten(lambda v: v.pop("options")), "lacks options"),
    "no model": (rewritten(lambda v: v.pop("model")), "lacks model"),
    "no arrays": (rewritten(lambda v: v.pop("arrays")), "lacks arrays"),
    "odd option": (rewritten(lambda v: v["options"].update(mesh=3)), "options have mesh"),
    "policy of nobody": (rewritten(lambda v: v["policy"].update(kind="Mine")), "give policy=Mine"),
    "policy that is a text": (rewritten(lambda v: v["policy"].update(options="x")), "damaged"),
    "odd allotment": (allotted({"version": 1}), "damaged save .*'model' is missing"),
    "allotment that is a text": (allotted("/dev/zero"), "damaged"),
    "allotment that is a number": (allotted(3), "damaged"),
    "allotment of another shape": (
        allotted(allotment_of(replace(QWEN3, num_hidden_layers=3)).described()),
        "damaged save .*model with 3 layers",
    ),
    "allotment of another model": (
        allotted(allotment_of(model="0123").described()),
        "damaged save .*likeness 0123",
    ),
    "other pools": (rewritten(lambda v: v.update(pools=[{"counts": [[1]]}])), "splits the heads"),
    "odd policy": (rewritten(lambda v: v["policy"].update(options={"x": 1})), "damaged"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_said(name, params, folder):
    damage, said = DAMAGE[name]
    damage(folder)
    began = time.monotonic()
    with pytest.raises((FileError, ValueError), match=said) as error:
        Engine.restore(folder, params)
    assert str(folder) in str(error.value)
    assert time.monotonic() - began < 10


def test_one_bit_of_the_arrays_is_noticed(params, saved, tmp_path):
    """In whatever file: it is said, or lay in bytes that hold nothing of the state."""
    files = [each for each in (saved / "1" / "state").rglob("*") if each.is_file()]
    assert sum(is_said(file.relative_to(saved), params, saved, tmp_path) for file in files) > 2


def is_said(name, params, saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / str(name).replace("/", "_"))
    one_bit(folder / name)
    try:
        Engine.restore(folder, params)  # Which compares the digest of all arrays.
    except FileError as error:
        assert "damaged" in str(error)
        return True
    return False


def test_what_was_begun_is_not_a_save(params, folder):
    """A killed process leaves it under another name, and the last whole save counts."""
    shutil.copytree(folder / "1", folder / "2.orbax-checkpoint-tmp-3")
    (folder / "notes.txt").write_text("mine")
    assert goes_on(folder, params)


def test_without_the_newest_the_one_before_goes_on(params, folder):
    shutil.copytree(folder / "1", folder / "2")
    cut(folder / "2" / "book" / "metadata")
    with pytest.raises(FileError, match=r"saves/2 is a damaged save.*remove it to go on"):
        Engine.restore(folder, params)
    shutil.rmtree(folder / "2")
    assert goes_on(folder, params)
