"""Token ids of a chat, by the template that belongs to the tokenizer."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from raas_jax import checks
from raas_jax.params import Params
from raas_jax.tokenizer import renderer
from raas_jax.tokenizer.folder import load, text_ids

Message = Mapping[str, str]
"""One turn of a chat: its "role" and "content"."""


def encode_chat(params: Params, messages: Sequence[Any], name: str) -> list[int]:
    """Token ids of `chat_text`; raises as it does."""
    text = chat_text(params, messages, name)
    ids = text_ids(load(params), text)
    if not ids:
        raise ValueError(f"{name} has no tokens in the chat template of {params.source}.")
    return ids


def chat_text(params: Params, messages: Sequence[Any], name: str) -> str:
    """A chat in its template: the assistant's turn is begun, or, where it is the last, continued.

    Raises:
      TypeError, ValueError: name the message, or say why the template does not take it.
    """
    for i, message in enumerate(messages):
        _check_message(message, f"{name}[{i}]")
    renderer.start()
    tokenizer = load(params)
    if not tokenizer.chat_template:
        raise ValueError(
            f"{name} is a chat, but the tokenizer in {params.source} has no chat template. Give a "
            "plain string, or use an instruct model."
        )
    *before, last = messages
    continued = last["role"] == "assistant"
    # What is empty has no place in the rendered text: it follows the beginning of its turn.
    blank = continued and not last["content"].strip()
    try:
        rendered = renderer.render(
            **tokenizer.special_tokens_map,
            conversations=[[dict(each) for each in (before if blank else messages)]],
            chat_template=tokenizer.get_chat_template(),
            add_generation_prompt=blank or not continued,
            continue_final_message=continued and not blank,
        )
        text = checks.whole_text("what it makes of it", rendered)
    except Exception as error:  # Among them what a message with strange fields is to JSON.
        raise ValueError(
            f"{name} does not fit the chat template of {params.source}: {checks.first_line(error)}"
        ) from error
    for i, message in enumerate(messages):
        # A thought of an earlier turn is left out on purpose; a role that is unknown is not.
        if message["role"] != "assistant" and message["content"].strip() not in text:
            warnings.warn(
                f"{name}[{i}], of the role {checks.short(message['role'])}, is not as it was given "
                f"in what the chat template of {params.source} makes of it; see the model's card.",
                stacklevel=2,
            )
    return text + last["content"] if blank else text


def _check_message(message: Any, name: str) -> None:
    fields = message if isinstance(message, Mapping) else {}
    if isinstance(fields.get("content"), list | tuple):
        raise TypeError(
            f"{name} has a list of parts as its 'content'; only text is taken: join the parts "
            "into one string."
        )
    if not all(isinstance(fields.get(key), str) for key in ("role", "content")):
        raise TypeError(
            f"{name} is {checks.short(message)}; a message has the strings 'role' and 'content'."
        )
    for key in ("role", "content"):
        checks.whole_text(f"{name}[{key!r}]", fields[key])
