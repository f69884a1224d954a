"""The table of a device check: everything found, what is slow and by how much, what is missing."""

from __future__ import annotations

from raas_jax.lab.device_check.journal import Journal, read
from raas_jax.lab.device_check.table import line, table


def rows_of(tmp_path):
    def journal(section):
        return Journal(tmp_path / "results.jsonl", section)

    for what, value in {
        "device": "NVIDIA H100",
        "platform": "gpu",
        "devices": 8,
        "memory": 85_000_000_000,
        "jax": "0.10.2",
        "model": "Qwen3-8B",
        "dtype": "bfloat16",
    }.items():
        journal("device").fact(what, value)
    journal("device").write("status", "end", how="done", seconds=9.1, failed=False)
    kernels = journal("kernels")
    kernels.kernel("decode_attention, A", True, 3e-3)
    kernels.kernel("decode_attention, B", None, None, "H is 80")
    kernels.kernel("decode_attention, C", False, 0.5, "out")
    kernels.kernel("page_commit, A", True, 0.0)
    steps = journal("decode-1")
    steps.figure("quick", 5.0, "ms/step", floor=4.9)
    steps.figure("slow", 12.0, "ms/step", floor=4.0)
    steps.figure("slower", 0.0341, "ms/step", floor=0.01)
    steps.figure("bandwidth", 3012.4, "GB/s")
    with steps.attempt("dense"):
        raise MemoryError
    steps.write("status", "end", how="timed out after 60 s", seconds=60.0, failed=True)
    return read(tmp_path / "results.jsonl")


def test_the_table(tmp_path):
    text = table(rows_of(tmp_path))
    about, rest = text.split("\n\n", 2)[1:]
    assert about == "NVIDIA H100 (gpu), one of 8, 79.2 GiB, Qwen3-8B's shape, bfloat16, jax 0.10.2"
    cells = [
        [cell.strip() for cell in row.strip("|").split("|")]
        for row in rest.splitlines()
        if row.startswith("|")
    ]
    assert all(len(row) == 5 for row in cells)
    assert cells[2:] == [
        ["kernels", "decode_attention", "1 of 2 right, error 3e-03; 1 declined", "", ""],
        ["kernels", "decode_attention, C", "WRONG: out", "", ""],
        ["kernels", "page_commit", "1 of 1 right, to the bit", "", ""],
        ["decode-1", "quick", "5.00 ms/step", "4.90 ms/step", "1.02 x (98%)"],
        ["decode-1", "slow", "12.0 ms/step", "4.00 ms/step", "3.00 x (33%)"],
        ["decode-1", "slower", "0.0341 ms/step", "0.0100 ms/step", "3.41 x (29%)"],
        ["decode-1", "bandwidth", "3,012 GB/s", "", ""],
    ]
    slow = text.partition("Slower than the floor:\n")[2].splitlines()
    assert slow[:3] == [
        "- slower: 3.41 x, 0.0241 ms/step more than the floor",
        "- slow: 3.00 x, 8.00 ms/step more than the floor",
        "",
    ]
    missing = text.partition("Missing:\n")[2].splitlines()
    assert missing == ["- decode-1: timed out after 60 s", "- dense: out of memory"]


def test_lines_on_the_way(tmp_path):
    said = [line(row) for row in rows_of(tmp_path)]
    assert said[0] == "device: device NVIDIA H100"
    assert "device: done, 9 s" in said
    assert "kernels: decode_attention, B: no kernel: H is 80" in said
    assert "decode-1: slow: 12.0 ms/step, 3.00 x its floor" in said
    assert said[-2:] == ["decode-1: dense: out of memory", "decode-1: timed out after 60 s, 60 s"]


def test_nothing_was_found():
    assert table([]) == "### raas-jax device-check\n\nNothing is known of the device.\n"
