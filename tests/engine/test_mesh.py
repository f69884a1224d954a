"""On a mesh, and in two processes, the engine answers what it answers on one device."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import on_mesh
from quick import environment
from tiny import random_params

from raas_jax import Engine

HERE = Path(__file__).parent


def start(*arguments):
    path = os.pathsep.join([str(HERE.parent), *sys.path])
    return subprocess.Popen(
        [sys.executable, HERE / "on_mesh.py", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(PYTHONPATH=path),
    )


def end(process):
    """What it printed; stopped for good if it hangs."""
    try:
        out, err = process.communicate(timeout=600)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
    assert process.returncode == 0, err
    return out


def test_eight_devices(tmp_path):
    assert end(start("virtual", tmp_path / "save")) == "same\n"


def test_two_processes():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    both = [start("process", port, number) for number in range(2)]
    # The library that connects them says so, too.
    said = [end(process).splitlines() for process in both]
    lines = [[line for line in found if line.startswith("{")] for found in said]
    policy = on_mesh.POLICIES["raas"]
    alone = on_mesh.answers(Engine(random_params(sharpness=3.0), policy=policy, **on_mesh.OPTIONS))
    assert [len(found) for found in lines] == [2, 2]
    for found in lines:
        for line in found:
            assert {int(id_): tokens for id_, tokens in json.loads(line).items()} == alone
