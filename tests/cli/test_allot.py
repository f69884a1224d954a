"""`raas-jax allot`: the file, what is said of it, its picture, and what is refused."""

import json
import sys
from pathlib import Path

import pytest

import raas_jax
from raas_jax import files
from raas_jax.cli import allot
from raas_jax.cli.main import main
from raas_jax.cli.prompts import demo_prompts
from raas_jax.suited import suited

PROMPT = "a = 4 ; b = 9 ; c = a + b ; ? c"
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def text(tmp_path, monkeypatch):
    """Some 1,500 tokens in an empty folder, which is the current one."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    file = tmp_path / "sums.txt"
    file.write_text(" ; ".join(f"{name} = {n % 10}" for n in range(47) for name in "abcdefgh"))
    return str(file)


@pytest.fixture
def small(model, text):
    """Texts that are read in a moment."""
    given = ["--text", f"sums={text}", "--texts", "2", "--skip", "0"]
    return [model, *given, "--length", "144", "--prompt-tokens", "16"]


def test_the_file_serves_a_generation(small, model, short, tmp_path, capsys):
    assert main(["allot", *small, "--picture", "p.png"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    first, *table, last = filter(None, out.splitlines())
    assert first.startswith(
        "allotment.json: 2 layers x 2 heads, 2 texts of 144 tokens (sums), "
    ) and first.endswith(" s")
    assert [int(row.split("|")[1]) for row in table[2:7]] == list(allot.BUDGETS)
    assert last == "p.png: pages by layer and head"
    found = raas_jax.Allotment.read("allotment.json")
    assert (found.layers, found.heads) == (2, 2) and found.sizes[-1] == 128
    assert found.made["kinds"] == ["sums"] and found.made["prompt_tokens"] == 16
    assert (tmp_path / "work" / "p.png").read_bytes().startswith(PNG)

    assert main(["generate", PROMPT, *short, "--allotment", "allotment.json", "--json"]) == 0
    with_it = json.loads(capsys.readouterr().out)
    policy = raas_jax.RaaS(32, allotment="allotment.json")
    out = raas_jax.generate(raas_jax.load(model), PROMPT, policy=policy, max_new_tokens=80)
    assert with_it["token_ids"] == out.tokens
    assert out.stats.allotment is not None and found.digest.startswith(out.stats.allotment[:8])


def test_answers_of_the_model_itself(model, text, tmp_path, capsys):
    """Those that are long enough; a prompt's tokens count."""
    file = tmp_path / "prompts.txt"
    file.write_text("a = 4 ; b = 9 ; ? b\na = 2 ; ? a\n")
    asked = [model, "--prompts", str(file), "--prompt-tokens", "8", "--policy", "raas:page_size=4"]
    assert main(["allot", *asked, "--length", "40"]) == 0
    assert "of 40 tokens (answers), " in capsys.readouterr().out
    assert raas_jax.Allotment.read("allotment.json").made["texts"] in (1, 2)
    assert main(["allot", *asked, "--length", "40", "--skip", "3"]) == 2
    assert "skip is 3, but --prompts says what is read." in capsys.readouterr().err
    assert main(["allot", "demo", *asked[1:], "--length", "300"]) == 2
    assert "length is 300, but no prompt with its answer" in capsys.readouterr().err


def test_refined_for_a_budget(small, capsys):
    """What is said, and drawn, is of that budget alone."""
    refining = [*small, "--policy", "raas:page_size=8", "--budget", "32", "--picture", "p.png"]
    assert main(["allot", *refining]) == 0
    out = capsys.readouterr().out
    made = raas_jax.Allotment.read("allotment.json").made
    assert made["budget"] == 32 and made["refined"] <= made["evenly"]
    assert "Budget 32: " in out and f"{made['evenly']:.3g} if all have the same" in out
    assert "Expected" not in out and Path("p.png").read_bytes().startswith(PNG)
    assert main(["allot", *small, "--budget", "40"]) == 2
    assert "budget is 40" in capsys.readouterr().err


def test_a_table_is_of_whole_pages_that_a_policy_takes(small, capsys):
    larger = ["--length", "512", "--texts", "1", "--policy", "raas:page_size=48:budget=96"]
    assert main(["allot", *small, *larger, "--picture", "pages.of.48"]) == 0
    rows = [line.split("|")[1:5] for line in capsys.readouterr().out.splitlines() if "|" in line]
    assert [int(row[0]) for row in rows[2:]] == [96, 240, 480, 1008]
    for row in rows[2:]:
        raas_jax.RaaS(int(row[0]), page_size=48, allotment="allotment.json")  # Or refused.
        assert all(int(tokens) % 48 == 0 for tokens in row[3].split("-"))
    assert files.read_bytes("pages.of.48").startswith(PNG)  # Whatever it is called.


def test_the_demo_has_texts_of_its_own(text, monkeypatch, capsys):
    """Fewer problems than the 32 of its own, so that it takes a moment."""
    monkeypatch.setattr(allot, "demo_prompts", lambda count, *of: demo_prompts(6, *of))
    assert main(["allot", "demo"]) == 0
    assert " texts of 212 tokens (derivations), " in capsys.readouterr().out
    found = raas_jax.Allotment.read("allotment.json")
    assert found.made["prompt_tokens"] == 80 and 1 <= found.made["texts"] <= 6
    suited(raas_jax.RaaS(64, allotment=found), raas_jax.load("demo"))  # Or refused.


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--length", "63"], "texts have 2 pages of 16 tokens after the prompt; give longer ones,"),
        (["--length", "8"], "texts have 0 pages of 16 tokens after the prompt; give longer ones,"),
        (["--length", "1024"], "1 windows of 1024 tokens; 2 are wanted. Give more files, fewer"),
        (["--skip", "50"], "52 are wanted, 50 of them to be passed over. Give more files,"),
        (["--text", "gone.txt"], "gone.txt: there is no such file"),
        (["--text", "."], ". is a folder, a pipe or a device; expected a regular file."),
        (["--text", "=x"], "text is '=x'; write FILE or KIND=FILE."),
        (["--policy", "rass"], "--policy is 'rass'; there are"),
        (["--policy", "quest"], "which has no budget to share out; use raas."),
        (["--policy", "raas_quest"], "which looks at more than attention, keys and values."),
        (["--policy", "raas:page_size=64:budget=128"], "of a length of at least 256, or use a"),
        (["--policy", "raas:recent=4000:budget=8192"], "which never evicts 250 pages of a head;"),
        (["--out", "gone/a.json"], "--out is 'gone/a.json'; give a file in a folder that is there"),
        (["--out", "."], "--out is '.'; give a file in a folder that is there."),
        (["--picture", "gone/a.png"], "--picture is 'gone/a.png'; give a file in a folder that is"),
        (["--picture", "./allotment.json"], "--picture is './allotment.json', as is --out;"),
        (["--texts", "0"], "--texts is 0;"),
    ],
)
def test_what_is_refused_leaves_nothing_behind(small, args, said, tmp_path, capsys):
    assert main(["allot", *small, *args]) == 2
    assert_one_line(capsys.readouterr(), said)
    assert list((tmp_path / "work").iterdir()) == []


@pytest.mark.parametrize("flag", ["--out", "--picture"])
def test_a_folder_that_takes_no_files(small, flag, tmp_path, monkeypatch, capsys):
    """Is known before the model is read, which takes long."""
    monkeypatch.setattr(raas_jax, "load", lambda *_, **__: pytest.fail("read the model"))
    if sys.platform == "linux":
        file = "/proc/x"  # Takes none of the superuser either, as whom tests may run.
    else:
        (tmp_path / "kept").mkdir(mode=0o555)
        file = str(tmp_path / "kept" / "x")
    assert main(["allot", *small, flag, file]) == 2
    said = f"{flag} is {file!r}, but nothing can be written into its folder ("
    assert_one_line(capsys.readouterr(), said)
    assert list((tmp_path / "work").iterdir()) == []


def test_a_picture_is_not_found_impossible_at_the_end(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(raas_jax, "load", lambda *_, **__: pytest.fail("read the model"))
    monkeypatch.delitem(sys.modules, "raas_jax.lab.allotments.picture", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["allot", *small, "--picture", "p.png"]) == 2
    assert_one_line(capsys.readouterr(), "matplotlib is not installed: in the checkout")
    assert list((tmp_path / "work").iterdir()) == []


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--texts", "3"], "--texts is 3, but without --text the demo reads derivations of its"),
        (["--prompt-tokens", "64"], "--prompt-tokens is 64, but without --text the demo"),
        (["--policy", "raas:page_size=128:budget=256"], "texts have 0 pages of 128 tokens"),
    ],
)
def test_what_the_demo_would_not_heed_is_refused(text, args, said, tmp_path, capsys):
    assert main(["allot", "demo", *args]) == 2
    assert_one_line(capsys.readouterr(), said)
    assert list((tmp_path / "work").iterdir()) == []


def assert_one_line(printed, said):
    assert printed.err.startswith("raas-jax: error: ") and printed.err.count("\n") == 1
    assert said in printed.err and printed.out == ""
