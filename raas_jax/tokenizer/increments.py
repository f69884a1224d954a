"""The text of token ids that come one by one, given out as soon as no later id can change it."""

from __future__ import annotations

import codecs
import functools
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Stands for text before the tokens, which decoders treat otherwise than a text's beginning.
_ANCHOR = "x"
# Runs of bytes are looked at after each byte up to this many, so that the cost is not quadratic.
_LOOKED_AT = 64


class Increments(Protocol):
    """Token ids in, certain text out; all of it and `rest` are the text of all ids."""

    def push(self, index: int) -> str:
        """The text that one more id, not of a special token, makes certain."""
        ...

    def rest(self) -> str:
        """The text after the certain one, if no more ids come; changes nothing."""
        ...

    def likely(self) -> str:
        """As `rest`, or nothing where that is not whole characters or costs too much."""
        ...


def increments(tokenizer: PreTrainedTokenizerBase) -> Increments:
    """The text of one answer, in the way that the tokenizer's decoder allows."""
    return _maker(tokenizer)()


@functools.lru_cache(maxsize=8)
def special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The ids that decoding skips."""
    found = set(tokenizer.all_special_ids)
    if tokenizer.is_fast:
        added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
        found |= {index for index, token in added.items() if token.special}
    return frozenset(found)


@functools.lru_cache(maxsize=8)
def _maker(tokenizer: PreTrainedTokenizerBase) -> Callable[[], Increments]:
    if not tokenizer.is_fast:
        return lambda: _Whole(tokenizer)
    backend = tokenizer.backend_tokenizer
    decoder = backend.decoder
    parts = [] if decoder is None else _parts(json.loads(decoder.__getstate__()))
    decode = " ".join if decoder is None else decoder.decode
    if [part["type"] for part in parts] == ["ByteLevel"]:
        return lambda: _Bytes(backend.id_to_token)
    if _by_token(parts) and decode([_ANCHOR]) == _ANCHOR:
        return lambda: _Tokens(backend.id_to_token, decode)
    return lambda: _Whole(tokenizer)


def _parts(decoder: dict[str, Any]) -> list[dict[str, Any]]:
    if decoder["type"] != "Sequence":
        return [decoder]
    return [part for inner in decoder["decoders"] for part in _parts(inner)]


def _by_token(parts: list[dict[str, Any]]) -> bool:
    """Whether tokens decode each by itself, but for runs of bytes and the text's beginning."""
    fused = False
    for part in parts:
        kind = part["type"]
        if kind == "Fuse":
            fused = True
        elif kind == "Strip":
            if fused and part["stop"]:
                return False
        elif kind == "Replace":
            if fused and len(part["pattern"].get("String", "")) != 1:
                return False
        elif fused or kind not in ("ByteFallback", "Metaspace", "WordPiece"):
            return False
    return True


class _Bytes:
    """Each token is some bytes, written as GPT-2's printable characters (Llama 3, Qwen)."""

    def __init__(self, token_of: Callable[[int], str | None]):
        self._token_of = token_of
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, index: int) -> str:
        token = self._token_of(index) or ""
        try:
            return self._utf8.decode(bytes(_BYTES[character] for character in token))
        except KeyError:  # An added token, which is text.
            return self._utf8.decode(token.encode())

    def rest(self) -> str:
        return "\ufffd" if self._utf8.getstate()[0] else ""

    def likely(self) -> str:
        return ""


class _Tokens:
    """Tokens are text, runs of byte tokens characters only if all of them are (Llama 2, BERT)."""

    def __init__(self, token_of: Callable[[int], str | None], decode: Callable[[list[str]], str]):
        self._token_of = token_of
        self._decode = decode
        self._begun = False
        self._waiting: list[str] = []

    def push(self, index: int) -> str:
        token = self._token_of(index)
        if token is None:
            return ""
        self._waiting.append(token)
        if len(token) == 6 and token.startswith("<0x"):
            return ""  # A later byte may break the whole run.
        text = self.rest()
        # What takes a space from the beginning of a text has done so once there is some text.
        self._begun = self._begun or bool(text)
        if self._begun:
            self._waiting.clear()
        return text

    def rest(self) -> str:
        if not self._waiting:
            return ""
        if self._begun:
            return self._decode([_ANCHOR, *self._waiting])[len(_ANCHOR) :]
        return self._decode(self._waiting)

    def likely(self) -> str:
        return _unbroken(self.rest()) if len(self._waiting) <= _LOOKED_AT else ""


class _Whole:
    """A decoder of which nothing is known: any id may change all of the text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        self._ids: list[int] = []

    def push(self, index: int) -> str:
        self._ids.append(index)
        return ""

    def rest(self) -> str:
        return decode_ids(self._tokenizer, self._ids)

    def likely(self) -> str:
        return _unbroken(self.rest())


def decode_ids(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """Text of ids, special ones left out. Cleaning up spaces would change text given out before."""
    text: str = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text


def _unbroken(text: str) -> str:
    return "" if text.endswith("\ufffd") else text


def _byte_of_character() -> dict[str, int]:
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): b for i, b in enumerate(rest)}


_BYTES = _byte_of_character()
