"""Prompts from a file or from standard input, one per line."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from raas_jax import checks, files

Prompt = str | list[int] | list[dict[str, str]]
"""Text, token ids, or the messages of a chat."""


def demo_prompts(count: int, smallest: int = 24, largest: int = 48) -> list[Prompt]:
    """Problems that the demo was not trained on, and that no table of it is made of.

    Of `smallest` to `largest` definitions.
    """
    from raas_jax.lab.tasks.lemma import Knobs, draw

    knobs = Knobs(smallest, largest)
    return [draw("validation", 0, index, knobs).prompt for index in range(count)]


def read_prompts(file: str) -> list[Prompt]:
    """Reads every line before anything is computed; `-` is standard input, blank lines are skipped.

    A line that begins with `{` is a JSON object with "prompt" (text or token ids) or "messages"; a
    JSON string is its text; any other line is the prompt itself.

    Raises:
      FileNotFoundError, ValueError: the latter names the line and what to write instead.
    """
    if file == "-":
        name, text = "standard input", _read_stdin()
    elif file and Path(file).exists():
        name, text = file, files.read_text(file)
    else:
        raise FileNotFoundError(f"--prompt-file is {file!r}; there is no such file.")
    prompts = [
        parse_line(line, f"{name}, line {number}")
        for number, each in enumerate(text.split("\n"), start=1)
        # Where files were put together, each may have begun with a byte order mark.
        if (line := each.lstrip("\ufeff").strip())
    ]
    if not prompts:
        raise ValueError(f"{name} holds no prompt; write one on each line.")
    return prompts


def _read_stdin() -> str:
    data = sys.stdin.buffer.read(files.MOST_BYTES + 1)
    if len(data) > files.MOST_BYTES:
        raise ValueError(f"standard input has over {files.MOST_BYTES} bytes; split it.")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"standard input is not UTF-8 text ({error}).") from None


def parse_line(line: str, where: str) -> Prompt:
    """One prompt from a line that is not blank; `where` is for the error."""
    if not line.startswith(('"', "{")):
        return line
    try:
        value = files.parse_json(line)
    except json.JSONDecodeError as error:
        if line.startswith('"'):
            return line  # A sentence may begin with a quotation mark.
        raise ValueError(
            f'{where}: not valid JSON ({error}). Write {{"prompt": "..."}}; '
            "text that begins with a brace goes there too."
        ) from error
    except ValueError as error:
        raise ValueError(f"{where}: {error}.") from error
    return _text(value, where) if isinstance(value, str) else _prompt(value, where)


def _prompt(fields: dict[str, Any], where: str) -> Prompt:
    if ("prompt" in fields) == ("messages" in fields):
        has = f"has the fields {checks.short(', '.join(fields)) if fields else 'none'}"
        raise ValueError(f'{where}: {has}; give one of "prompt" and "messages".')
    if fields.get("prompt", fields.get("messages")) in ("", []):
        raise ValueError(f"{where}: the prompt is empty; give some text, or leave the line out.")
    if "messages" in fields:
        return _messages(fields["messages"], where)
    prompt = fields["prompt"]
    if isinstance(prompt, list) and all(type(item) is int for item in prompt):
        return prompt
    return _text(prompt, where)


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise ValueError(
            f"{where}: the prompt is {checks.short(value)}; expected text or a list of token ids."
        )
    return value


def _messages(value: Any, where: str) -> list[dict[str, str]]:
    good = isinstance(value, list) and all(
        isinstance(message, dict)
        and all(isinstance(message.get(name), str) for name in ("role", "content"))
        for message in value
    )
    if not good:
        wanted = '{"role": "...", "content": "..."}'
        raise ValueError(f'{where}: "messages" must be a list of {wanted}, each of them text.')
    messages: list[dict[str, str]] = value
    return messages
