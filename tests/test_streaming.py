"""Text that comes in pieces is the text of all ids, whatever the ids and the decoder."""

import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny_tokenizers import DECODERS, tiny_tokenizer, tokens_of

from raas_jax import tokenizer
from raas_jax.outputs import Answer

pytestmark = pytest.mark.once

EMOJI = list("😀".encode())


@pytest.fixture(scope="module")
def all_params(tmp_path_factory):
    return {kind: tiny_tokenizer(tmp_path_factory.mktemp("tiny"), kind) for kind in DECODERS}


def streamed(params, ids, stop=(), chunks=(1,)):
    detokenizer = tokenizer.Detokenizer(params, stop)
    pieces, at, turn = [], 0, 0
    while at < len(ids):
        size = chunks[turn % len(chunks)]
        pieces.append(detokenizer.push(ids[at : at + size]))
        at, turn = at + size, turn + 1
    pieces.append(detokenizer.finish())
    assert "".join(pieces) == detokenizer.text
    return detokenizer


# A run of one character's bytes, of bytes that are none, of words, of anything.
RUNS = st.one_of(
    st.sampled_from([EMOJI, EMOJI[:2], list("é".encode()), [0x20], [0x0A]]),
    st.lists(st.integers(0x80, 0xFF), max_size=6),
    st.lists(st.integers(256, 290), max_size=3),
    st.lists(st.integers(0, 399), max_size=3),
)


@pytest.mark.parametrize("kind", DECODERS)
@settings(max_examples=150)
@given(
    ids=st.lists(RUNS, max_size=8).map(lambda runs: [i for run in runs for i in run]),
    stop=st.lists(st.text("ab é😀.\n", min_size=1, max_size=3), max_size=2),
    chunks=st.lists(st.integers(1, 7), min_size=1, max_size=3),
)
@example(ids=[0xFF] * 5 + EMOJI + [0x41] * 20, stop=[], chunks=[1])
@example(ids=[0xE2, 0x82, 0xAC, 0xFF, 256], stop=[], chunks=[1])
def test_pieces_are_the_text_of_all_ids(all_params, kind, ids, stop, chunks):
    params = all_params[kind]
    got = streamed(params, ids, stop, chunks)
    if got.stopped is None:
        assert got.text == tokenizer.decode(params, ids)
        assert not any(each in got.text for each in stop)
    else:
        # It ends with the id that completes the first stop string, in the eyes of a reader.
        assert tokenizer.decode(params, ids[: got.count]).startswith(got.text + got.stopped)
        before = tokenizer.decode(params, ids[: got.count - 1])
        assert not any(each in before for each in stop)


@pytest.mark.parametrize("kind", DECODERS)
def test_every_id_by_itself_and_twice(all_params, kind):
    params = all_params[kind]
    for index in range(len(tokens_of(kind)) + 8):
        for ids in ([index], [index, index], [256, index, 0x41, index]):
            assert streamed(params, ids).text == tokenizer.decode(params, ids)


@pytest.mark.parametrize("kind", ["byte level", "llama", "word piece", "metaspace", "none"])
@pytest.mark.parametrize("ids", [[0x61], [0xFF], [256]])
def test_a_token_costs_the_same_at_any_place(all_params, kind, ids):
    began = time.process_time()
    streamed(all_params[kind], ids * 20_000, ["never"])
    assert time.process_time() - began < 20  # Seconds; a decode of all ids each time takes minutes.


def ids_of(params, text):
    """Ids of single characters and of added tokens, which < begins."""
    loaded = tokenizer.load(params)
    parts = text.replace("<", "\0<").replace(">", ">\0").split("\0")
    names = [name for part in parts for name in ([part] if part[:1] == "<" else part)]
    return [loaded.convert_tokens_to_ids(name) for name in names]


@pytest.mark.parametrize(
    ("given_text", "stop", "text"),
    [
        ("ab<|end|>ab", "<|end|>", "ab"),
        ("ab<|tool|>ba<|end|>b", ["<|end|>"], "abba"),
        ("ab<|end|>b", "b<|end|>", "a"),
        ("a<|end|>ab", "<|end|>b", "aab"),
        ("a<|end|>ba", "<|end|>b", "a"),
        ("a<|tool|><|end|>ba", "<|tool|><|end|>", "a"),
        ("ab<|end|>", "<|end", "ab"),
        ("a<|tool|>ba", "ab", ""),
        ("bab<|end|>", ["ab<|tool|>", "<|end|>"], "bab"),
        ("ab<think>ab", "<think>", "ab"),
        ("<|end|>", "<|end|>", ""),
        ("ab</s>ab", "</s>", "ab"),
    ],
)
def test_a_stop_string_may_name_special_tokens(all_params, given_text, stop, text):
    params = all_params["byte level"]
    got = streamed(params, ids_of(params, given_text), stop)
    assert got.text == text
    assert (got.stopped is None) == (given_text == "a<|end|>ab")


def test_a_special_token_stops_within_a_run_of_bytes(all_params):
    params = all_params["llama"]
    (end,) = ids_of(params, "<|end|>")
    got = streamed(params, [256, *EMOJI, end, 0xFF], "<|end|>")
    assert (got.text, got.stopped, got.count) == ("a😀", "<|end|>", 6)
    assert streamed(params, [256, *EMOJI, end, 0xFF]).text == "a" + "\ufffd" * 5


def test_an_answer_ends_at_a_special_stop_string(all_params):
    params = all_params["byte level"]
    answer = Answer([1], 10, frozenset(), tokenizer.Detokenizer(params, "<|end|>"))
    ids = ids_of(params, "ab<|end|>ab")
    answer.add(ids, [0.0] * len(ids))
    assert (answer.text, answer.tokens, answer.finish_reason) == ("ab", ids[:3], "stop")
