"""Text in, ids out, and back again."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_tokenizers import BOS, EOS, byte_tokenizer

from raas_jax import tokenizer
from raas_jax.config import ModelConfig
from raas_jax.params import Params

VOCABULARY = 300
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'robot' %}"
    "{{ raise_exception('no robots') }}{% endif %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def config(vocab_size: int = VOCABULARY, **fields) -> ModelConfig:
    return ModelConfig(vocab_size, 4, 4, 1, 1, 1, 4, **fields)


def params_at(folder: Path | None, **fields) -> Params:
    return Params({}, config(**fields), None if folder is None else str(folder))


@pytest.fixture(scope="session")
def byte_folder(tmp_path_factory) -> Path:
    """A tokenizer with one token per byte, so that a character can be cut anywhere."""
    folder = tmp_path_factory.mktemp("bytes")
    byte_tokenizer(folder, chat_template=TEMPLATE)
    return folder


@pytest.fixture(scope="session")
def params(byte_folder) -> Params:
    return params_at(byte_folder)


def test_a_string_gets_what_its_tokenizer_adds(params):
    assert tokenizer.encode(params, "hi") == ([[BOS, *b"hi"]], True)
    assert tokenizer.encode(params, ["hi", "you"]) == ([[BOS, *b"hi"], [BOS, *b"you"]], False)
    assert tokenizer.encode(params, ["hi"]) == ([[BOS, *b"hi"]], False)


@pytest.mark.parametrize(
    ("around", "text", "ids"),
    [
        ("<s> $A", "<s>hi", [BOS, *b"hi"]),
        ("<s> $A </s>", "hi", [BOS, *b"hi"]),
        ("$A </s>", "hi", [*b"hi"]),
        ("<s> $A <|end|>", "hi", [BOS, *b"hi", 258]),
        ("<s> $A <|end|>", "<s>hi", [BOS, *b"hi"]),
        ("<|end|> <s> $A", "<|end|><s>hi", [258, BOS, *b"hi"]),
        ("$A", "<s>hi</s>", [BOS, *b"hi", EOS]),
        ("<s> $A", "hi<s>", [BOS, *b"hi", BOS]),
        ("<s> $A", " \n", [BOS, *b" \n"]),
        ("<s> $A", "a\0b", [BOS, *b"a\0b"]),
        ("<s> $A", np.str_("hi"), [BOS, *b"hi"]),
    ],
)
def test_special_tokens_around_a_string(tmp_path, around, text, ids):
    assert tokenizer.encode(byte_tokenizer(tmp_path, around), text) == ([ids], True)


def test_numpy_strings(params):
    hi, you = [BOS, *b"hi"], [BOS, *b"you"]
    for make in (lambda x: [np.str_(each) for each in x], np.array, lambda x: np.array(x, object)):
        assert tokenizer.encode(params, make(["hi", "you"])) == ([hi, you], False)


def test_a_chat_has_the_bos_of_its_template_and_no_other(params):
    pytest.importorskip("jinja2")
    chat = [{"role": "user", "content": "2+2?"}]
    expected = [BOS, *b"[user]2+2?[assistant]"]
    assert tokenizer.encode(params, chat) == ([expected], True)
    assert tokenizer.encode(params, [chat, chat]) == ([expected, expected], False)


def test_an_assistant_message_at_the_end_is_continued(params):
    pytest.importorskip("jinja2")
    chat = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "It is"}]
    assert tokenizer.encode(params, chat)[0] == [[BOS, *b"[user]2+2?[assistant]It is"]]


@pytest.mark.parametrize("make", [list, tuple, np.asarray, jnp.asarray])
def test_ids_pass_through(params, make):
    assert tokenizer.encode(params, make([1, 2, 299])) == ([[1, 2, 299]], True)


def test_lists_of_ids(params):
    rows = [[1, 2], [3, 4]]
    assert tokenizer.encode(params, rows) == (rows, False)
    assert tokenizer.encode(params, np.asarray(rows)) == (rows, False)
    assert tokenizer.encode(params, jnp.asarray(rows)) == (rows, False)
    ragged = [np.asarray([1]), jnp.asarray([2, 3])]
    assert tokenizer.encode(params, ragged) == ([[1], [2, 3]], False)


def test_ids_need_no_tokenizer():
    assert tokenizer.encode(params_at(None), [1, 2]) == ([[1, 2]], True)


@pytest.mark.parametrize(
    ("prompt", "error", "message"),
    [
        ("", ValueError, "prompt is an empty string"),
        ([], ValueError, "prompt is empty"),
        (np.zeros((0,), np.int32), ValueError, "prompt is empty"),
        (["a", ""], ValueError, r"prompt\[1\] is an empty string"),
        ([[1], []], ValueError, r"prompt\[1\] is empty"),
        ([1, 300], ValueError, r"prompt\[1\] is 300.*0 to 299"),
        ([-1], ValueError, r"prompt\[0\] is -1"),
        ([[1], [2, 999]], ValueError, r"prompt\[1\]\[1\] is 999"),
        ([1, 2.5], TypeError, r"prompt\[1\] is 2.5"),
        ([1.0], TypeError, r"prompt\[0\] is 1.0"),
        ([True], TypeError, r"prompt\[0\] is True"),
        (np.zeros((2,), np.float32), TypeError, "float32"),
        (None, TypeError, "prompt is a NoneType.*expected a string"),
        (7, TypeError, "prompt is a int"),
        ({"role": "user", "content": "x"}, TypeError, "prompt is a dict"),
        ([None], TypeError, r"prompt\[0\] is a NoneType"),
        (jax.random.key(0), TypeError, "prompt is a PRNGKeyArray"),
        (np.zeros((1, 1, 1), np.int32), TypeError, "prompt is a ndarray"),
        ([{"role": "user"}], TypeError, r"prompt\[0\] is .*'content'"),
        ([{"role": "robot", "content": "x"}], ValueError, "no robots"),
        ("a\udcff", ValueError, r"prompt is 'a\\udcff'.*character 1 is half.*UTF-8"),
        (["a", "\ud83d"], ValueError, r"prompt\[1\] is .*half"),
        ([{"role": "user", "content": "\udcff"}], ValueError, r"prompt\[0\]\['content'\] is"),
        ([{"role": "user", "content": [{"text": "x"}]}], TypeError, "list of parts.*join"),
    ],
)
def test_bad_prompts(params, prompt, error, message):
    if "robots" in message:
        pytest.importorskip("jinja2")
    with pytest.raises(error, match=message):
        tokenizer.encode(params, prompt)


def test_no_chat_template(byte_folder, tmp_path):
    shutil.copyfile(byte_folder / "tokenizer.json", tmp_path / "tokenizer.json")
    with pytest.raises(ValueError, match="no chat template.*plain string"):
        tokenizer.encode(params_at(tmp_path), [{"role": "user", "content": "x"}])


@pytest.mark.parametrize("make", ["nothing", "only a config", "no source"])
def test_no_tokenizer(tmp_path, make):
    if make == "only a config":
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    source = None if make == "no source" else tmp_path
    with pytest.raises(ValueError, match="params has no tokenizer.*token ids"):
        tokenizer.encode(params_at(source), "hello")


def test_a_damaged_tokenizer_is_named(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "mod')
    with pytest.raises(ValueError, match=f"tokenizer in {tmp_path} cannot be read"):
        tokenizer.encode(params_at(tmp_path), "hello")


def test_a_tokenizer_of_another_model(byte_folder):
    small = params_at(byte_folder, vocab_size=100)
    with pytest.raises(ValueError, match="becomes token 256.*another model"):
        tokenizer.encode(small, "hello")


def test_stop_tokens_are_a_union(byte_folder, tmp_path):
    shutil.copytree(byte_folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [11, 12]}))
    params = params_at(tmp_path, eos_token_ids=(5, 10**6))
    assert tokenizer.stop_token_ids(params) == (5, 11, 12, EOS)
    assert tokenizer.stop_token_ids(params, [3]) == (3, 5, 11, 12, EOS)
    assert tokenizer.stop_token_ids(params_at(None, eos_token_ids=(5,)), np.int64(7)) == (5, 7)
    for single in (np.array(7), jnp.int32(7)):
        assert tokenizer.stop_token_ids(params_at(None, eos_token_ids=()), single) == (7,)
    for wrong in ("", b"\7", None):
        with pytest.raises(TypeError, match=r"stop_token_ids\[0\] is "):
            tokenizer.stop_token_ids(params, wrong)
    with pytest.raises(ValueError, match=r"stop_token_ids\[0\] is 300"):
        tokenizer.stop_token_ids(params, [300])
    with pytest.raises(TypeError, match=r"stop_token_ids\[0\] is '</s>'"):
        tokenizer.stop_token_ids(params, ["</s>"])


def test_stop_strings():
    assert tokenizer.stop_strings(None) == ()
    assert tokenizer.stop_strings("ab") == ("ab",)
    for wrong in (b"ab", np.array("ab"), 3):
        with pytest.raises(TypeError, match="stop is .*expected a string"):
            tokenizer.stop_strings(wrong)
    assert tokenizer.stop_strings(["ab", "c"]) == ("ab", "c")
    with pytest.raises(ValueError, match=r"stop\[1\] is empty"):
        tokenizer.stop_strings(["a", ""])
    with pytest.raises(TypeError, match=r"stop\[0\] is 3"):
        tokenizer.stop_strings([3])
    with pytest.raises(TypeError, match=r"stop is 3"):
        tokenizer.stop_strings(3)
    with pytest.raises(ValueError, match=r"stop\[0\] is .*half"):
        tokenizer.stop_strings(["\udcff"])


def run(params: Params, ids: list[int], stop=None) -> tuple[list[str], tokenizer.Detokenizer]:
    detokenizer = tokenizer.Detokenizer(params, stop)
    pieces = [detokenizer.push([i]) for i in ids]
    return [*pieces, detokenizer.finish()], detokenizer


@given(st.text(max_size=12), st.lists(st.text("ab \u00e9\U0001f600", min_size=1, max_size=4)))
def test_streamed_text_is_the_text_cut_at_the_first_stop(params, string, stop):
    ids = list(string.encode())
    pieces, detokenizer = run(params, ids, stop)
    # The stop that is complete first counts, as it would for someone who reads along.
    ends = [(string.find(s) + len(s), -len(s), s) for s in stop if s in string]
    expected = string
    if ends:
        first = min(end for end, _, _ in ends)
        expected = string[: min(end - len(s) for end, _, s in ends if end == first)]
    assert "".join(pieces) == detokenizer.text == expected
    assert (detokenizer.stopped is not None) == bool(ends)
    if "\ufffd" not in string:
        assert all("\ufffd" not in piece for piece in pieces)
    whole = tokenizer.Detokenizer(params, stop)
    assert whole.push(ids) + whole.finish() == expected
    assert whole.count == detokenizer.count


def test_a_stop_string_across_tokens_is_held_back(params):
    pieces, detokenizer = run(params, list(b"ok</thi no</think>more"), "</think>")
    assert "".join(pieces) == "ok</thi no"
    assert pieces[2:7] == [""] * 5
    assert pieces[7] == "</thi "
    assert detokenizer.stopped == "</think>"
    assert detokenizer.count == len(b"ok</thi no</think>")
    assert detokenizer.push([65]) == "" and detokenizer.finish() == ""


def test_half_a_stop_string_comes_out_at_the_end(params):
    pieces, detokenizer = run(params, list(b"a</th"), "</think>")
    assert pieces[-1] == "</th" and detokenizer.text == "a</th" and detokenizer.stopped is None


def test_characters_come_whole(params):
    pieces, _ = run(params, list("é😀".encode()))
    assert pieces == ["", "é", "", "", "", "😀", ""]


def test_bytes_that_are_no_character_come_out_at_the_end(params):
    pieces, _ = run(params, [65, 0xC3])
    assert pieces == ["A", "", "\ufffd"]


def test_endless_broken_bytes_do_not_wait_for_ever(params):
    detokenizer = tokenizer.Detokenizer(params)
    detokenizer.push([0xFF] * 200)
    assert len(detokenizer.text) > 150


def test_special_tokens_are_not_text(params):
    pieces, detokenizer = run(params, [BOS, 65, EOS, 66])
    assert "".join(pieces) == "AB" == tokenizer.decode(params, [BOS, 65, EOS, 66])
    assert detokenizer.count == 4


def test_a_published_tokenizer(shared):
    params = params_at(shared / "configs" / "Qwen2.5-0.5B", vocab_size=151936)
    string = "Let x₁ = 3.\n\n    So 12 × 34 = 408 — 你好 👩‍👩‍👧 done.</think> Never."
    [ids], single = tokenizer.encode(params, string)
    assert single and tokenizer.decode(params, ids) == string
    pieces, _ = run(params, ids, "</think>")
    assert "".join(pieces) == string.split("</think>")[0]
    assert not any("\ufffd" in piece for piece in pieces)
    pytest.importorskip("jinja2")
    [chat], _ = tokenizer.encode(params, [{"role": "user", "content": "hi"}])
    rendered = tokenizer.load(params).decode(chat)
    assert rendered.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.stop_token_ids(params) == (151643,)
