"""Tokenizers of every decoder there is, with vocabularies made to be cut at the worst places."""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from raas_jax.config import ModelConfig
from raas_jax.params import Params

VOCABULARY = 400
BOS, EOS = 256, 257  # Of byte_tokenizer.
BYTE_RUN = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
DECODERS = {
    "byte level": decoders.ByteLevel(),
    "llama": decoders.Sequence([*BYTE_RUN, decoders.Strip(" ", 1, 0)]),
    "gemma": decoders.Sequence(BYTE_RUN),
    "word piece": decoders.WordPiece(prefix="##", cleanup=True),
    "metaspace": decoders.Metaspace(),
    "none": None,
    "replaced at last": decoders.Sequence([decoders.Fuse(), decoders.Replace("ab", "é")]),
    "suffix": decoders.BPEDecoder(suffix="</w>"),
}


def byte_chars() -> list[str]:
    """GPT-2's printable stand-in for every byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in plain]
    return [chr(b) if b in plain else chr(256 + rest.index(b)) for b in range(256)]


def tokens_of(kind: str) -> list[str]:
    """The first 256 are bytes where the kind has such."""
    chars = byte_chars()
    if kind == "byte level":
        cut = [
            b"\xf0\x9f",
            b"\x98\x80",
            b"\x80a",
            b"ab",
            b" a",
            "é".encode(),
            b"\xff\xff",
            b"a\xc3",
        ]
        return [*chars, *("".join(chars[byte] for byte in each) for each in cut)]
    words = ["a", "b", "ab", "▁", "▁▁", "▁a", "é", " ", "a ", "##b", "##", ".", "'s", "b</w>", ""]
    return [*(f"<0x{byte:02X}>" for byte in range(256)), *words, "\ufffd", "▁.", "</w>"]


def tiny_tokenizer(folder: Path, kind: str, **fields) -> Params:
    """Weights that are none, beside a tokenizer of a kind of `DECODERS`."""
    tokens = tokens_of(kind)
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, "a"))
    if DECODERS[kind] is not None:
        tokenizer.decoder = DECODERS[kind]
    tokenizer.add_tokens([AddedToken("<think>"), AddedToken("<é>")])
    tokenizer.add_special_tokens(["<s>", "</s>", "<|end|>", "<|tool|>"])
    return _save(tokenizer, folder, **fields)


def byte_tokenizer(folder: Path, around: str = "<s> $A", **fields) -> Params:
    """One token per byte, so that a character can be cut anywhere; `around` a text is added."""
    vocabulary = {char: byte for byte, char in enumerate(byte_chars())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>", "<|end|>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=around, special_tokens=[("<s>", BOS), ("</s>", EOS), ("<|end|>", 258)]
    )
    return _save(tokenizer, folder, **fields)


def _save(tokenizer: Tokenizer, folder: Path, **fields) -> Params:
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {"bos_token": "<s>", "eos_token": "</s>", **fields}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **named}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return Params({}, ModelConfig(VOCABULARY, 4, 4, 1, 1, 1, 4), str(folder))
