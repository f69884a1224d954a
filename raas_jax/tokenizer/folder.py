"""The tokenizer beside the weights, and what its files say."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raas_jax import checks, files
from raas_jax.config import eos_token_ids
from raas_jax.files import Fields
from raas_jax.params import Params
from raas_jax.tokenizer.increments import decode_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A folder has a tokenizer if it has one of these; transformers makes an empty one up otherwise.
VOCABULARIES = ("tokenizer.json", "vocab.json", "tokenizer.model")


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
    except BaseException as error:  # Each tokenizer class raises what its own parser raised.
        if not (isinstance(error, Exception) or _is_panic(error)):
            raise
        raise ValueError(
            f"The tokenizer in {folder} cannot be read ({checks.first_line(error)}). Save it as "
            "tokenizer.json, e.g. by save_pretrained of transformers; a tokenizer.model alone "
            "needs `pip install sentencepiece`. Or give `prompt` as token ids."
        ) from error


@contextlib.contextmanager
def sound(tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """What a tokenizer of damaged files raises as it is used becomes a ValueError."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, ValueError) or not (isinstance(error, Exception) or _is_panic(error)):
            raise
        raise ValueError(
            f"The tokenizer in {tokenizer.name_or_path} fails ({checks.first_line(error)}): its "
            "files are damaged, or do not belong together. Copy them anew."
        ) from error


def _is_panic(error: BaseException) -> bool:
    """Whether Rust gave up, which is no Exception, so that nothing would catch it."""
    return type(error).__name__ == "PanicException"


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool = False) -> list[int]:
    """Token ids of a text, by itself or with the special tokens that the tokenizer adds."""
    with sound(tokenizer):
        ids: list[int] = tokenizer(text, add_special_tokens=special)["input_ids"]
    return ids


def decode(params: Params, ids: Iterable[int]) -> str:
    """Text of token ids, without the special ones."""
    tokenizer = load(params)
    with sound(tokenizer):
        return decode_ids(tokenizer, [int(i) for i in ids])


def stop_token_ids(params: Params, extra: int | Iterable[int] = ()) -> tuple[int, ...]:
    """Ids that end a generation: those of the config, of the generation config, of the tokenizer
    and of the caller, sorted.

    Raises:
      ValueError: an id of `extra` outside the vocabulary. TypeError: not integers.
    """
    ids = set(params.config.eos_token_ids)
    file = Path(params.source or "") / "generation_config.json"
    # A link to nothing is there as well: without its ids an answer would not end.
    if params.source is not None and os.path.lexists(file):
        ids.update(eos_token_ids(Fields(files.read_fields(file), file)))
    if has_tokenizer(params) and (eos := load(params).eos_token_id) is not None:
        ids.add(int(eos))
    # Published configs name ids beyond a cut vocabulary at times; such an id can never be drawn.
    ids = {i for i in ids if 0 <= i < params.config.vocab_size}
    return tuple(sorted(ids | set(checked_stops(params, extra))))


def checked_stops(params: Params, given: Any) -> list[int]:
    """A caller's `stop_token_ids`, or a single one; raises as `checked_ids`."""
    many = given if checks.is_many(given) else [given]
    return checked_ids(params, many, "stop_token_ids")


def checked_ids(params: Params, ids: Iterable[Any], name: str) -> list[int]:
    """Ids from outside as ints; TypeError and ValueError name the one that is none of the model."""
    size = params.config.vocab_size
    found = []
    for i, value in enumerate(ids):
        try:
            found.append(checks.integer(f"{name}[{i}]", value, 0, size - 1))
        except ValueError:
            raise ValueError(
                f"{name}[{i}] is {checks.short(value)}, outside the vocabulary; token ids of this "
                f"model are 0 to {size - 1}."
            ) from None
    return found
