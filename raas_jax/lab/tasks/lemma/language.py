"""The words of the task: names, digits, signs, and the arithmetic modulo ten.

A text of the task is words with one space between them; one word is one token.
"""

MODULUS = 10
LETTERS = tuple("abcdefghijklmnopqrstuvwxyz")
SYLLABLES = tuple(consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou")
NAMES = LETTERS + SYLLABLES
"""The 96 names a definition may carry: `a`, `b`, ... `z`, `ba`, `be`, ... `zu`."""

DIGITS = tuple(str(digit) for digit in range(MODULUS))
OPERATORS = ("+", "-", "*")
SIGNS = ("=", ",", ";", "?", ":")
ANSWER = "answer"

PAD, BOS, EOS, UNKNOWN = "<pad>", "<bos>", "<eos>", "<unk>"
SPECIAL = (PAD, BOS, EOS, UNKNOWN)
WORDS = SPECIAL + SIGNS + OPERATORS + (ANSWER,) + DIGITS + NAMES
"""Every word, at the index that is its token id."""


def compute(left: int, operator: str, right: int) -> int:
    """`left operator right` modulo ten, a value in [0, 10)."""
    if operator == "+":
        return (left + right) % MODULUS
    if operator == "-":
        return (left - right) % MODULUS
    if operator == "*":
        return (left * right) % MODULUS
    raise ValueError(f"operator={operator!r}: wanted one of {' '.join(OPERATORS)}")
