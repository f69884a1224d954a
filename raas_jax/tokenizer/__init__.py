"""Everything between text and token ids, on the tokenizer that belongs to the weights."""

from raas_jax.tokenizer.chats import Message, chat_text
from raas_jax.tokenizer.detokenizer import Detokenizer
from raas_jax.tokenizer.folder import (
    VOCABULARIES,
    checked_stops,
    decode,
    has_tokenizer,
    load,
    stop_token_ids,
)
from raas_jax.tokenizer.prompts import Prompt, Prompts, PromptT, encode, encode_continuation
from raas_jax.tokenizer.stops import stop_strings

__all__ = [
    "VOCABULARIES",
    "Detokenizer",
    "Message",
    "Prompt",
    "PromptT",
    "Prompts",
    "chat_text",
    "checked_stops",
    "decode",
    "encode",
    "encode_continuation",
    "has_tokenizer",
    "load",
    "stop_strings",
    "stop_token_ids",
]
