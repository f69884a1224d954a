"""Prompts from a file or from standard input, one per line."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

Prompt = str | list[int] | list[dict[str, str]]
"""Text, token ids, or the messages of a chat."""


def read_prompts(file: str) -> list[Prompt]:
    """Reads every line before anything is computed; `-` is standard input, blank lines are skipped.

    A line that begins with `{` is a JSON object with "prompt" (text or token ids) or "messages"; a
    JSON string is its text; any other line is the prompt itself.

    Raises:
      FileNotFoundError, ValueError: the latter names the line and what to write instead.
    """
    if file == "-":
        data, name = sys.stdin.buffer.read(), "standard input"
    else:
        path, name = Path(file), file
        if not path.is_file():
            raise FileNotFoundError(f"--prompt-file is {file!r}; there is no such file.")
        data = path.read_bytes()
    try:
        lines = data.decode().split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 text ({error}).") from error
    prompts = [
        parse_line(line.strip(), f"{name}, line {number}")
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not prompts:
        raise ValueError(f"{name} holds no prompt; write one on each line.")
    return prompts


def parse_line(line: str, where: str) -> Prompt:
    """One prompt from a line that is not blank; `where` is for the error."""
    if line.startswith('"'):
        try:
            return _text(json.loads(line), where)
        except json.JSONDecodeError:
            return line  # A sentence may begin with a quotation mark.
    if not line.startswith("{"):
        return line
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(
            f'{where}: not valid JSON ({error}). Write {{"prompt": "..."}}; '
            "text that begins with a brace goes there too."
        ) from error
    if ("prompt" in fields) == ("messages" in fields):
        has = f"has the fields {', '.join(fields) or 'none'}"
        raise ValueError(f'{where}: {has}; give one of "prompt" and "messages".')
    if "messages" in fields:
        return _messages(fields["messages"], where)
    prompt = fields["prompt"]
    if isinstance(prompt, list) and all(type(item) is int for item in prompt):
        return prompt
    return _text(prompt, where)


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where}: the prompt is {value!r}; expected text or a list of token ids.")
    return value


def _messages(value: Any, where: str) -> list[dict[str, str]]:
    good = isinstance(value, list) and all(
        isinstance(message, dict)
        and all(isinstance(message.get(name), str) for name in ("role", "content"))
        for message in value
    )
    if not good:
        wanted = '{"role": "...", "content": "..."}'
        raise ValueError(f'{where}: "messages" must be a list of {wanted}.')
    messages: list[dict[str, str]] = value
    return messages
