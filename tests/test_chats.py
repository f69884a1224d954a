"""Chat templates: what they make, and what they may not do."""

import json
import os
import warnings

import pytest
from tiny_tokenizers import BOS, byte_tokenizer

from raas_jax import checks, tokenizer
from raas_jax.config import ModelConfig
from raas_jax.params import Params
from raas_jax.tokenizer import renderer, template_worker

pytestmark = pytest.mark.once

USER = {"role": "user", "content": "2+2?"}
LOOP = (
    "{{ bos_token }}{% for m in messages %}{% if m.role in ('user', 'assistant') %}"
    "[{{ m.role }}]\n{{ m.content TRIM }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n{% endif %}"
)
PLAIN, TRIMMED = LOOP.replace("TRIM", ""), LOOP.replace("TRIM", "| trim")


def ids_with(folder, template, chat):
    return tokenizer.encode(byte_tokenizer(folder, chat_template=template), chat)[0][0]


@pytest.mark.parametrize("template", [PLAIN, TRIMMED])
@pytest.mark.parametrize("content", ["", "\n", " ", "It is", "It is four.\nSo"])
def test_a_turn_is_continued_after_its_beginning(tmp_path, template, content):
    ids = ids_with(tmp_path, template, [USER, {"role": "assistant", "content": content}])
    begun = ids_with(tmp_path, template, [USER])
    assert ids == begun + list(content.encode())


@pytest.mark.parametrize("template", [PLAIN, TRIMMED])
def test_a_template_applied_by_hand_gives_the_ids_of_the_chat(tmp_path, template):
    params = byte_tokenizer(tmp_path, chat_template=template)
    loaded = tokenizer.load(params)
    for chat in ([USER], [USER, {"role": "assistant", "content": "4"}, USER]):
        text = loaded.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        assert tokenizer.encode(params, text) == tokenizer.encode(params, chat)
        assert tokenizer.encode(params, text)[0][0].count(BOS) == 1


def test_a_message_that_a_template_leaves_out_is_named(tmp_path):
    with pytest.warns(UserWarning, match=r"prompt\[0\], of the role 'robot', is not as"):
        ids_with(tmp_path, PLAIN, [{"role": "robot", "content": "beep"}, USER])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ids_with(tmp_path, TRIMMED, [{"role": "user", "content": " 2+2? "}])


def test_what_a_template_says_is_cleaned(tmp_path):
    template = "{{ raise_exception('\x1b[31mred\x07 ' + 'long ' * 1000) }}"
    with pytest.raises(ValueError, match="prompt does not fit the chat template") as caught:
        ids_with(tmp_path, template, [USER])
    message = str(caught.value)
    assert r"\x1b[31mred\x07 long" in message and message.endswith("...")
    assert message.isprintable() and len(message) < 600


@pytest.fixture
def short_limits(monkeypatch):
    """A worker that may take one second, and the ordinary one afterwards."""
    monkeypatch.setattr(template_worker, "SECONDS", 1)
    renderer._process.cache_clear()
    yield
    renderer._process.cache_clear()


def test_a_template_has_a_limit_of_time_and_memory(tmp_path, short_limits):
    many = "range(90000)"
    endless = f"{{% for a in {many} %}}{{% for b in {many} %}}{{% endfor %}}{{% endfor %}}"
    for name, template, said in (
        ("time", endless, "may take 1 s and 1 GiB"),
        ("memory", "{{ 'a' * 3000000000 }}", "over 1 GiB of memory"),
        ("length", "{{ 'a' * 20000000 }}", "over 16 million characters"),
    ):
        (tmp_path / name).mkdir()
        with pytest.raises(ValueError, match=f"does not fit the chat template.*{said}"):
            ids_with(tmp_path / name, template, [USER])
    (tmp_path / "good").mkdir()
    assert ids_with(tmp_path / "good", PLAIN, [USER])[0] == BOS


def test_an_interrupted_question_does_not_get_the_next_answer(tmp_path, monkeypatch):
    params = byte_tokenizer(tmp_path, chat_template=PLAIN)
    expected = tokenizer.encode(params, [USER])

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(renderer, "_ask", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tokenizer.encode(params, [{"role": "user", "content": "another"}])
    assert tokenizer.encode(params, [USER]) == expected


def test_a_worker_that_was_killed_while_it_waited(tmp_path):
    template = "{{ messages[0]['content'] }}"
    wanted = ids_with(tmp_path, template, [{"role": "user", "content": "x"}])
    process = renderer._process(os.getpid())
    process.kill()
    process.wait()
    assert ids_with(tmp_path, template, [{"role": "user", "content": "x"}]) == wanted


def test_half_a_character_from_a_template(tmp_path):
    with pytest.raises(ValueError, match="no Unicode text"):
        ids_with(tmp_path, r"{{ 'x\ud83d' }}", [{"role": "user", "content": "x"}])


def test_published_templates(shared):
    """Each chat is what transformers itself makes of it."""
    files = list(shared.glob("configs/*/tokenizer_config.json"))
    files = [file for file in files if "chat_template" in json.loads(file.read_text())]
    system, answer = ({"role": role, "content": "ok."} for role in ("system", "assistant"))
    for file in files:
        params = Params({}, ModelConfig(200_000, 4, 4, 1, 1, 1, 4), str(file.parent))
        for chat in ([USER], [system, USER], [USER, answer, USER], [USER, answer]):
            last = chat[-1] is answer
            options = {"add_generation_prompt": not last, "continue_final_message": last}
            expected = tokenizer.load(params).apply_chat_template(
                chat, return_dict=False, **options
            )
            assert tokenizer.encode(params, chat) == ([expected], True)
    assert files


def test_printable():
    assert checks.printable("a\x1b[0m\u202e\x9b é\n") == "a\\x1b[0m\\u202e\\x9b é\n"
    assert checks.first_line(ValueError("\n")) == "ValueError"
