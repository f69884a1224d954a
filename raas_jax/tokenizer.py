"""Everything between text and token ids, on the tokenizer that belongs to the weights."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar

import jax
import numpy as np

from raas_jax.config import eos_token_ids
from raas_jax.files import Fields, read_fields
from raas_jax.params import Params

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, str]
"""One turn of a chat: its "role" and "content"."""
Prompt = str | Sequence[Message] | Sequence[int] | jax.Array | np.ndarray
"""One prompt: text, a chat, or token ids, as integers or an integer array `[T]`."""
PromptT = TypeVar("PromptT", bound=Prompt)
Prompts = list[PromptT] | tuple[PromptT, ...]
"""Several prompts."""

# A folder has a tokenizer if it has one of these; transformers makes an empty one up otherwise.
VOCABULARIES = ("tokenizer.json", "vocab.json", "tokenizer.model")
# What a decoder writes for bytes that are not (or not yet) a whole character.
_BROKEN = "\ufffd"
# A character has at most four bytes; what is still broken after this many tokens stays broken.
_PATIENCE = 16


def has_tokenizer(params: Params) -> bool:
    """Whether a tokenizer lies beside the weights."""
    source = params.source
    return source is not None and any((Path(source) / name).is_file() for name in VOCABULARIES)


def load(params: Params) -> PreTrainedTokenizerBase:
    """The transformers tokenizer of `params.source`, read once.

    Raises:
      ValueError: there is none, or it cannot be read.
    """
    if not has_tokenizer(params):
        where = "weights without a source" if params.source is None else params.source
        raise ValueError(
            f"params has no tokenizer ({where}; looked for {', '.join(VOCABULARIES)}). Give "
            "`prompt` as token ids, or load from a folder that has the tokenizer's files."
        )
    return _tokenizer(str(params.source))


@functools.cache
def _tokenizer(folder: str) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, use_fast=True
        )
    except Exception as error:  # Each tokenizer class raises what its own parser raised.
        raise ValueError(
            f"The tokenizer in {folder} cannot be read ({_first_line(error)}). Save it as "
            "tokenizer.json, e.g. by save_pretrained of transformers; a tokenizer.model alone "
            "needs `pip install sentencepiece`. Or give `prompt` as token ids."
        ) from error


def encode(params: Params, prompt: Prompt | Sequence[Prompt]) -> tuple[list[list[int]], bool]:
    """Token ids of one prompt or of several.

    A plain string gets the special tokens that its tokenizer adds by itself (a BOS where the model
    wants one). A chat goes through the tokenizer's template, which writes its own: the assistant's
    turn is begun, or, where the last message is the assistant's, continued.

    Args:
      params: the weights, with the folder of their tokenizer; ids need none.
      prompt: one `Prompt`, a list of them, or token ids as an integer array `[B, T]`.

    Returns:
      One list of ids per prompt, and whether it was a single prompt.

    Raises:
      TypeError: something else, named with its place in the list.
      ValueError: an empty prompt, ids outside the vocabulary, or no tokenizer.
    """
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
    if not isinstance(text, str):
        return _checked_prompt_ids(params, text, name)
    ids = load(params)(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise ValueError(f"{name} is {text!r}, which has no tokens; give some text.")
    return [int(i) for i in ids]


def decode(params: Params, ids: Iterable[int]) -> str:
    """Text of token ids, without the special ones."""
    return _decode(load(params), list(ids))


def stop_token_ids(params: Params, extra: Iterable[int] = ()) -> tuple[int, ...]:
    """Ids that end a generation: those of the config, of the generation config, of the tokenizer
    and of the caller, sorted.

    Raises:
      ValueError: an id of `extra` outside the vocabulary. TypeError: not integers.
    """
    ids = set(params.config.eos_token_ids)
    file = Path(params.source or "") / "generation_config.json"
    if params.source is not None and file.is_file():
        ids.update(eos_token_ids(Fields(read_fields(file), file)))
    if has_tokenizer(params) and (eos := load(params).eos_token_id) is not None:
        ids.add(int(eos))
    # Published configs name ids beyond a cut vocabulary at times; such an id can never be drawn.
    ids = {i for i in ids if 0 <= i < params.config.vocab_size}
    extra = [extra] if isinstance(extra, int) else list(extra)
    return tuple(sorted(ids | set(_checked_ids(params, extra, "stop_token_ids"))))


def stop_strings(stop: str | Iterable[str] | None) -> tuple[str, ...]:
    """A caller's stop strings as a tuple.

    Raises:
      TypeError: not strings. ValueError: an empty one, which would stop at once.
    """
    found = (stop,) if isinstance(stop, str) else tuple(stop or ())
    for i, item in enumerate(found):
        if not isinstance(item, str):
            raise TypeError(f"stop[{i}] is {item!r}; expected a string.")
        if not item:
            raise ValueError(f"stop[{i}] is empty, which would stop at once; leave it out.")
    return found


class Detokenizer:
    """Token ids in, text out, as it becomes certain.

    A piece never ends inside a character, and text that may yet become a stop string is held back.
    All pieces together, with that of `finish`, are `text`: the text of the ids, cut before the
    first stop string.

    Attributes:
      text: what was given out so far.
      count: tokens taken so far, up to and with the one that completed a stop string.
      stopped: the stop string that was met, or None.
    """

    def __init__(self, params: Params, stop: str | Iterable[str] | None = None):
        self.text = ""
        self.count = 0
        self.stopped: str | None = None
        self._tokenizer = load(params)
        self._special = frozenset(self._tokenizer.all_special_ids)
        self._stop = stop_strings(stop)
        self._held = ""  # Certain, but perhaps the beginning of a stop string.
        # The window: ids given out already, which space the next ones right, then new ones.
        self._ids: list[int] = []
        self._known = 0

    def push(self, ids: Iterable[int]) -> str:
        """Takes more ids and returns the text that they make certain; nothing after a stop."""
        pieces: list[str] = []
        for index in ids:
            if self.stopped is not None:
                break
            self.count += 1
            if int(index) not in self._special:
                self._ids.append(int(index))
                pieces.append(self._release(self._advance(last=False)))
        return self._give("".join(pieces))

    def finish(self) -> str:
        """The rest, once no more ids will come."""
        if self.stopped is not None:
            return ""
        piece = self._release(self._advance(last=True))
        held, self._held = self._held, ""  # Nothing where a stop string was just met.
        return self._give(piece + held)

    def _advance(self, *, last: bool) -> str:
        """The new text of the window, or nothing while its last character is not whole."""
        before = _decode(self._tokenizer, self._ids[: self._known])
        after = _decode(self._tokenizer, self._ids)
        late = len(self._ids) - self._known > _PATIENCE
        if len(after) <= len(before) or (after.endswith(_BROKEN) and not (last or late)):
            return ""
        self._ids = self._ids[self._known :]
        self._known = len(self._ids)
        return after[len(before) :]

    def _release(self, new: str) -> str:
        """Adds to the held text and returns what of it cannot belong to a stop string."""
        self._held += new
        held = self._held
        found = [(held.find(stop), -len(stop), stop) for stop in self._stop if stop in held]
        if found:
            at, _, self.stopped = min(found)
            self._held = ""
            return held[:at]
        cut = len(held) - max((_overlap(held, stop) for stop in self._stop), default=0)
        self._held = held[cut:]
        return held[:cut]

    def _give(self, piece: str) -> str:
        self.text += piece
        return piece


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    lengths = range(min(len(text), len(stop) - 1), 0, -1)
    return next((n for n in lengths if text.endswith(stop[:n])), 0)


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    # Cleaning up spaces would change text that was already given out.
    text: str = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text


def _is_array(value: object) -> TypeGuard[jax.Array | np.ndarray]:
    return hasattr(value, "ndim") and hasattr(value, "dtype")


def _is_integer(value: object) -> bool:
    if _is_array(value):
        return np.issubdtype(value.dtype, np.integer)
    return isinstance(value, int) and not isinstance(value, bool)


def _is_one(prompt: object) -> bool:
    """Whether this is one prompt: a string, a chat, or ids (perhaps none); not a list of them."""
    if isinstance(prompt, str):
        return True
    if _is_array(prompt):
        return prompt.ndim == 1
    if not isinstance(prompt, list | tuple):
        return False
    first = prompt[0] if prompt else 0
    number = isinstance(first, int | float | np.generic) or (_is_array(first) and first.ndim == 0)
    return number or isinstance(first, Mapping)


def _encode_one(params: Params, prompt: Any, name: str) -> list[int]:
    if not _is_one(prompt):
        raise _wrong_type(name, prompt)
    if isinstance(prompt, str):
        if not prompt:
            raise ValueError(f"{name} is an empty string; give at least one character.")
        ids = load(params)(prompt)["input_ids"]
    elif len(prompt) and isinstance(prompt[0], Mapping):
        ids = _encode_chat(params, prompt, name)
    else:
        return _checked_prompt_ids(params, prompt, name)
    if not len(ids):
        raise ValueError(f"{name} is {prompt!r}, which has no tokens; give some text.")
    if max(ids) >= params.config.vocab_size:
        raise ValueError(
            f"{name} becomes token {max(ids)}, but the vocabulary has {params.config.vocab_size}; "
            f"the tokenizer in {params.source} belongs to another model."
        )
    return [int(i) for i in ids]


def _checked_prompt_ids(params: Params, prompt: Any, name: str) -> list[int]:
    if _is_array(prompt):
        if not _is_integer(prompt):
            raise TypeError(f"{name} is an array of {prompt.dtype}; token ids are integers.")
        prompt = np.asarray(prompt).tolist()
    if not prompt:
        raise ValueError(f"{name} is empty; give at least one message or token id.")
    return _checked_ids(params, prompt, name)


def _checked_ids(params: Params, ids: Sequence[Any], name: str) -> list[int]:
    size = params.config.vocab_size
    for i, value in enumerate(ids):
        if not _is_integer(value):
            raise TypeError(f"{name}[{i}] is {value!r}; token ids are integers.")
        if not 0 <= int(value) < size:
            raise ValueError(
                f"{name}[{i}] is {int(value)}, outside the vocabulary; token ids of this model are "
                f"0 to {size - 1}."
            )
    return [int(value) for value in ids]


def _encode_chat(params: Params, messages: Sequence[Any], name: str) -> list[int]:
    for i, message in enumerate(messages):
        fields = message if isinstance(message, Mapping) else {}
        if not all(isinstance(fields.get(key), str) for key in ("role", "content")):
            raise TypeError(
                f"{name}[{i}] is {message!r}; a message has the strings 'role' and 'content'."
            )
    found = load(params)
    if not found.chat_template:
        raise ValueError(
            f"{name} is a chat, but the tokenizer in {params.source} has no chat template. Give a "
            "plain string, or use an instruct model."
        )
    continued = messages[-1]["role"] == "assistant"
    try:
        ids: list[int] = found.apply_chat_template(
            list(messages),
            tokenize=True,
            add_generation_prompt=not continued,
            continue_final_message=continued,
            return_dict=False,
        )
    except Exception as error:  # A template raises whatever its author wrote.
        raise ValueError(
            f"{name} does not fit the chat template of {params.source}: {_first_line(error)}"
        ) from error
    return ids


def _wrong_type(name: str, value: object) -> TypeError:
    return TypeError(
        f"{name} is a {type(value).__name__} ({str(value)[:60]!r}); expected a string, a chat "
        "(list of {'role', 'content'} dictionaries) or token ids."
    )


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
