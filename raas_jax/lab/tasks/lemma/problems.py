"""A problem, its prompt and its derivation: what the model reads and what it should write.

    prompt      a = 4 ; b = 9 ; c = a + b ; ? c :
    derivation  a = 4 , a 4 ; b = 9 , b 9 ; c = a + b , a 4 b 9 , c 3 ; answer c 3

Every value stands right after its name, so each look-up is one hop: find the name, read on.
"""

import dataclasses

from raas_jax.lab.tasks.lemma.language import ANSWER, compute


@dataclasses.dataclass(frozen=True)
class Definition:
    """`name = left` (a literal, `left` a digit) or `name = left operator right` (names)."""

    name: str
    left: str
    operator: str = ""
    right: str = ""

    @property
    def is_literal(self) -> bool:
        return not self.operator

    @property
    def words(self) -> tuple[str, ...]:
        """The definition as words, without a sign at its end."""
        if self.is_literal:
            return (self.name, "=", self.left)
        return (self.name, "=", self.left, self.operator, self.right)


@dataclasses.dataclass(frozen=True)
class Problem:
    """Definitions in an order in which each uses only earlier ones, and the name asked for."""

    definitions: tuple[Definition, ...]
    question: str

    @property
    def prompt_words(self) -> tuple[str, ...]:
        words: list[str] = []
        for definition in self.definitions:
            words += (*definition.words, ";")
        return (*words, "?", self.question, ":")

    @property
    def prompt(self) -> str:
        return " ".join(self.prompt_words)

    def values(self) -> dict[str, int]:
        """The value of every name, in the order of the definitions."""
        values: dict[str, int] = {}
        for item in self.definitions:
            if item.is_literal:
                values[item.name] = int(item.left)
            else:
                values[item.name] = compute(values[item.left], item.operator, values[item.right])
        return values

    @property
    def answer(self) -> int:
        return self.values()[self.question]

    def lines(self) -> tuple[tuple[str, ...], ...]:
        """The derivation line by line, as words; the last line is the answer."""
        values = self.values()
        lines: list[tuple[str, ...]] = []
        for item in self.definitions:
            line = (*item.words, ",")
            if not item.is_literal:
                left, right = str(values[item.left]), str(values[item.right])
                line += (item.left, left, item.right, right, ",")
            lines.append((*line, item.name, str(values[item.name]), ";"))
        lines.append((ANSWER, self.question, str(values[self.question])))
        return tuple(lines)

    @property
    def derivation_words(self) -> tuple[str, ...]:
        return tuple(word for line in self.lines() for word in line)

    @property
    def derivation(self) -> str:
        return " ".join(self.derivation_words)
