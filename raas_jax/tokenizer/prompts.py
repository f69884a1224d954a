"""Token ids of prompts: text, chats, or ids that are checked."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar

import jax
import numpy as np

from raas_jax import checks
from raas_jax.params import Params
from raas_jax.tokenizer.chats import Message, encode_chat
from raas_jax.tokenizer.folder import checked_ids, load, text_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Prompt = str | Sequence[Message] | Sequence[int] | jax.Array | np.ndarray
"""One prompt: text, a chat, or token ids, as integers or an integer array `[T]`."""
PromptT = TypeVar("PromptT", bound=Prompt)
Prompts = list[PromptT] | tuple[PromptT, ...]
"""Several prompts."""


def encode(params: Params, prompt: Prompt | Sequence[Prompt]) -> tuple[list[list[int]], bool]:
    """Token ids of one prompt or of several.

    A plain string gets the special tokens that its tokenizer adds by itself (a BOS where the model
    wants one), unless it begins with them, and no EOS after it. A chat goes through the tokenizer's
    template, which writes its own: the assistant's turn is begun, or, where the last message is the
    assistant's, continued.

    Args:
      params: the weights, with the folder of their tokenizer; ids need none.
      prompt: one `Prompt`, a list of them, or token ids as an integer array `[B, T]`.

    Returns:
      One list of ids per prompt, and whether it was a single prompt.

    Raises:
      TypeError: something else, named with its place in the list.
      ValueError: an empty prompt, ids outside the vocabulary, or no tokenizer.
    """
    if _is_array(prompt) and prompt.dtype.kind in "UO":
        prompt = prompt.tolist()  # Strings, and lists of any kind.
    if _is_one(prompt):
        return [_encode_one(params, prompt, "prompt")], True
    if _is_array(prompt) and prompt.ndim == 2:
        rows: list[Any] = list(np.asarray(prompt))
    elif isinstance(prompt, list | tuple):
        rows = list(prompt)
    else:
        raise _wrong_type("prompt", prompt)
    if not rows:
        raise ValueError("prompt is empty; give at least one string, chat or token id.")
    return [_encode_one(params, row, f"prompt[{i}]") for i, row in enumerate(rows)], False


def encode_continuation(params: Params, text: str | Sequence[int], name: str) -> list[int]:
    """Token ids of what follows a prompt: text without special tokens, or ids that are checked.

    Raises:
      TypeError, ValueError: as `encode`, naming the argument `name`.
    """
    if isinstance(text, str):
        return _known(params, _bare(params, text, name), name)
    if not isinstance(text, list | tuple) and not (_is_array(text) and text.ndim == 1):
        raise TypeError(f"{name} is {checks.short(text)}; expected text or token ids.")
    return _checked_prompt_ids(params, text, name)


def _is_array(value: object) -> TypeGuard[jax.Array | np.ndarray]:
    # Random keys, too, are arrays, of no kind that NumPy knows.
    return hasattr(value, "ndim") and hasattr(getattr(value, "dtype", None), "kind")


def _is_one(prompt: object) -> bool:
    """Whether this is one prompt: a string, a chat, or ids (perhaps none); not a list of them."""
    if isinstance(prompt, str):
        return True
    if _is_array(prompt):
        return prompt.ndim == 1
    if not isinstance(prompt, list | tuple):
        return False
    first = prompt[0] if prompt else 0
    if isinstance(first, str):
        return False
    number = isinstance(first, int | float | np.generic) or (_is_array(first) and first.ndim == 0)
    return number or isinstance(first, Mapping)


def _encode_one(params: Params, prompt: Any, name: str) -> list[int]:
    if not _is_one(prompt):
        raise _wrong_type(name, prompt)
    if isinstance(prompt, str):
        return _known(params, _encode_text(params, prompt, name), name)
    if len(prompt) and isinstance(prompt[0], Mapping):
        return _known(params, encode_chat(params, prompt, name), name)
    return _checked_prompt_ids(params, prompt, name)


def _encode_text(params: Params, text: str, name: str) -> list[int]:
    bare = _bare(params, text, name)
    before, after = _added(load(params))
    # A text that brings its own special tokens, such as a chat's, needs no others.
    if before and bare[: len(before)] == before:
        return bare
    return before + bare + after


def _bare(params: Params, text: str, name: str) -> list[int]:
    """Token ids of text alone."""
    if not text:
        raise ValueError(f"{name} is an empty string; give at least one character.")
    if len(text) > checks.MOST_TOKENS:
        raise ValueError(f"{name} has {len(text)} characters; at most {checks.MOST_TOKENS}.")
    ids = text_ids(load(params), checks.whole_text(name, text))
    if not ids:
        raise ValueError(f"{name} is {checks.short(text)}, which has no tokens; give some text.")
    return [int(i) for i in ids]


@functools.lru_cache(maxsize=8)
def _added(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The special tokens that a tokenizer puts before a text, and after it."""
    bare, full = (text_ids(tokenizer, "a", special=add) for add in (False, True))
    places = range(len(full)) if bare else ()
    at = next((i for i in places if full[i : i + len(bare)] == bare), len(full))
    # After an EOS the model would begin something else; a prompt is to be continued.
    after = [i for i in full[at + len(bare) :] if i != tokenizer.eos_token_id]
    return full[:at], after


def _known(params: Params, ids: list[int], name: str) -> list[int]:
    """The ids, if the model has them."""
    if max(ids) >= params.config.vocab_size:
        raise ValueError(
            f"{name} becomes token {max(ids)}, but the vocabulary has {params.config.vocab_size}; "
            f"the tokenizer in {params.source} belongs to another model."
        )
    return ids


def _checked_prompt_ids(params: Params, prompt: Any, name: str) -> list[int]:
    if _is_array(prompt):
        if not np.issubdtype(prompt.dtype, np.integer):
            raise TypeError(f"{name} is an array of {prompt.dtype}; token ids are integers.")
        prompt = np.asarray(prompt).tolist()
    if not prompt:
        raise ValueError(f"{name} is empty; give at least one message or token id.")
    return checked_ids(params, prompt, name)


def _wrong_type(name: str, value: object) -> TypeError:
    return TypeError(
        f"{name} is a {type(value).__name__} ({checks.short(value)}); expected a string, a chat "
        "(list of {'role', 'content'} dictionaries) or token ids."
    )
