"""The word-level tokenizer, as the ordinary files that transformers reads.

One word is one token and its id is its place in `language.WORDS`, so no library is needed to
encode; `save_tokenizer` writes the same mapping for everybody else. There a text is a prompt: it
gets `<bos>` before it and `:` after it, if it has none, and needs no spaces.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from raas_jax import files
from raas_jax.lab.tasks.lemma.language import BOS, EOS, PAD, SPECIAL, UNKNOWN, WORDS

IDS = {word: index for index, word in enumerate(WORDS)}
PAD_ID, BOS_ID, EOS_ID, UNKNOWN_ID = (IDS[word] for word in (PAD, BOS, EOS, UNKNOWN))


def encode(words: Iterable[str]) -> list[int]:
    """Token ids of words, one each, with nothing put before or after them."""
    return [IDS[word] for word in words]


def decode(ids: Sequence[int]) -> str:
    """Text of token ids, special tokens left out."""
    # A model's padded vocabulary may hold ids that are no word.
    words = (WORDS[index] if index < len(WORDS) else UNKNOWN for index in map(int, ids))
    return " ".join(word for word in words if word not in SPECIAL)


def save_tokenizer(folder: Path) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json` for transformers into `folder`."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [
        {"id": index, "content": word, **flags, "special": True}
        for index, word in enumerate(SPECIAL)
    ]
    word = {"Regex": "[a-z]+|[0-9]|[^a-z0-9]"}
    whole = {"Sequence": {"id": "A", "type_id": 0}}
    begin = {"SpecialToken": {"id": BOS, "type_id": 0}}
    end = {"SpecialToken": {"id": ":", "type_id": 0}}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        # The post-processor writes the colon, so one that was typed goes.
        "normalizer": {"type": "Replace", "pattern": {"Regex": r"[\s:]+$"}, "content": ""},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "WhitespaceSplit"},
                {"type": "Split", "pattern": word, "behavior": "Isolated", "invert": False},
            ],
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [begin, whole, end],
            "pair": [begin, whole, end, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {
                each: {"id": each, "ids": [IDS[each]], "tokens": [each]} for each in (BOS, ":")
            },
        },
        "decoder": None,  # without one, words are joined by single spaces
        "model": {"type": "WordLevel", "vocab": IDS, "unk_token": UNKNOWN},
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "unk_token": UNKNOWN,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2048,
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in (("tokenizer.json", tokenizer), ("tokenizer_config.json", settings)):
        files.replace_text(folder / name, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
