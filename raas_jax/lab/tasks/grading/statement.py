r"""Where a text states its final answer: the last of these marks that is one.

A whole `\boxed{...}` (or several joined by "and"), what follows `####`, what follows "answer is"
or "answer:" in many languages, `<answer>...</answer>`; without any mark, the last sentence with
maths in it. Thoughts before `</think>` do not count, and neither does what is taken back after it
was stated.
"""

import re
from typing import NamedTuple

# Only the end can hold the answer, and some patterns take long on long texts.
TAIL_CHARACTERS = 4000

_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
# What may lie between two boxes that are one answer: `$, $y = $`.
_JOINED = re.compile(
    r"[\s$,;&]*(?:\\\\|\\[()\[\]])?[\s$]*(?:\\text\s*\{)?\s*(?:and|or)?\s*\}?[\s$]*"
    r"(?:\\[(\[])?(?:[A-Za-z]\w*\s*=)?[\s$]*"
)
_ANSWER = (
    r"(?:(?<![A-Za-z])(?:final\s+result|answers?|ans|antwort|réponse|respuesta|risposta|resposta|"
    r"ответ|cevap|odpowiedź)(?![A-Za-z])|答案|答え|答|정답|답|الجواب|उत्तर)"
)
_LINK = (
    r"[:：=]|-\s|\s(?:is|are|was|equals|(?:should|must|would|will)\s+be|ist|est|es|è|é)\b"
    r"|是|为|為|は|\s(?=\d)|\n"
)
_MARK = re.compile(
    rf"####|<answer>|{_ANSWER}[*_\"]*(?:\s+to\s(?!part\b)[^.:\n]{{0,80}}?)?\s*?(?:{_LINK})"
    r"[*_\s]*[:：]?(?:[\s,]*\b(?:therefore|thus|then|hence|indeed|of\s+course)\b,?)*",
    re.IGNORECASE,
)
_SUPPOSED = re.compile(
    r"\b(?:if|suppose|assume|thought|whether|maybe|perhaps|is)\b[^.!?\n]*\Z"
    r"|\b(?:wrong|incorrect|first|initial|previous|earlier)\s\Z",
    re.IGNORECASE,
)
_DISPLAY = re.compile(r"[*_\s]*(?:\\\[(.*?)\\\]|\$\$(.*?)\$\$)", re.DOTALL)
_IN_WORDS = re.compile(r"[*_\s]*[A-Z][a-z]*,?\s+[a-z]+\s")
_SENTENCE_END = re.compile(r"(?<!Rs)(?<!\\)[.!](?=\s|[*_`\"]*$|[*_`\"]+\s)|。|</")
_MATHS = re.compile(r"(?<![A-Za-z\d])\d|[$\\½⅓¼¾∞π√]")
_OVER = re.compile(r"</s>|<\|\w+\|>|\n[ \t]*(?:Question|Problem|Q):")
_CHECK = re.compile(r"\b(?:Check|Verification|Let (?:me|us) (?:double[- ]?)?(?:check|verify))\b")
_TAKEN_BACK = re.compile(
    r"\A[\s$.*)\]\\]*(?:(?:is|are|does|do)\s*(?:not|n't)|cannot|can't|would|could|might)\b|\A[\s$*)\]\\]*\?\s*No\b"
    r"|\bWait\b|\bwait[.,!:]|\A\W*no,|\b[Cc]orrection\b|\bI\s+(?:made|misread|forgot|was\s+wrong)\b"
    r"|\b(?:this|that|it)(?:['’]s|\s+(?:is|was))\s+(?:wrong|incorrect|not\s+(?:right|correct))\b"
    r"|\b(?:this|that|it)\s+(?:is|was)n['’]t\s+(?:right|correct)\b"
    r"|\b(?:Oops|Hold on|[Ss]cratch that|[Oo]n second thoughts?|[Mm]y mistake|reconsider)\b"
    r"|\b(?:Actually|Sorry|But|However)\b[^.\n]*\b(?:is|are|be|so|meant)\s[\s$\\(]*-?\d"
)


class Statement(NamedTuple):
    """The text that states an answer, and where it begins and ends, with its mark.

    `exact` is False where other words may stand before the answer, as in a sentence.
    """

    text: str
    start: int
    end: int
    exact: bool = True


def after_thought(text: str) -> str:
    """The text without its thoughts, a thought without an end included."""
    text = text.rpartition("</think>")[2].partition("<think>")[0]
    return _OVER.split(text)[0]


def boxes(text: str) -> list[str]:
    """Contents of the last whole box and of those joined to it, with their braces matched."""
    return [text[start:end] for start, end in _boxes(text)]


def _boxes(text: str) -> list[tuple[int, int]]:
    found: list[tuple[int, int, int]] = []
    for begun in _BOX.finditer(text):
        depth, at = 1, begun.end()
        while at < len(text) and depth:
            step = text[at]
            if step == "\\":
                at += 1  # An escaped brace is no brace.
            depth += (step == "{") - (step == "}")
            at += 1
        if not depth:
            found.append((begun.start(), begun.end(), at - 1))
    joined = found[-1:]
    for box in reversed(found[:-1]):
        between = text[box[2] + 1 : joined[0][0]]
        if "\n\n" in between or not _JOINED.fullmatch(between):
            break
        joined.insert(0, box)
    return [(start, end) for _, start, end in joined]


def marked(text: str) -> list[Statement]:
    """All that follows a mark, the last first."""
    found = []
    for mark in reversed(list(_MARK.finditer(text))):
        if _SUPPOSED.search(text, max(0, mark.start() - 80), mark.start()):
            found.append(Statement("", mark.start(), mark.end()))
            continue
        shown = _DISPLAY.match(text, mark.end())
        if shown:
            found.append(Statement(shown[1] or shown[2] or "", mark.start(), shown.end()))
            continue
        rest = text[mark.end() :].lstrip()
        line = rest.split("\n")[0]
        sentence = _SENTENCE_END.split(line)[0]
        # Under a heading may stand a whole sentence.
        exact = not (mark[0].endswith("\n") and _IN_WORDS.match(sentence))
        end = len(text) - len(rest) + len(sentence)
        found.append(Statement(sentence, mark.start(), end, exact))
    return found


def last_sentence(text: str) -> Statement | None:
    """The last sentence with maths in it; None if there is none, or it asks or announces."""
    text = _CHECK.split(text)[0].rstrip()[-TAIL_CHARACTERS:]
    ended = re.search(r"(?:\\\[|\$\$)((?:(?!\\\[|\$\$).)*)(?:\\\]|\$\$)[.\s]*\Z", text, re.DOTALL)
    if ended:
        return Statement(ended[1], ended.start(), len(text))
    for sentence in reversed(re.split(r"(?<=[.?。])\s|(?<=[^\\]!)\s|\n", text)):
        bare = sentence.strip(" *")
        if _MATHS.search(bare):
            unfit = bare.endswith(("?", ":", "{")) or re.fullmatch(r"\d+[.)]", bare)
            alone = re.fullmatch(r"\$[^$]+\$[.*]*", bare)
            return None if unfit else Statement(bare, 0, len(text), bool(alone))
        if re.search(r"\A[^-~].*[^.!?。]\Z", bare):  # A name may sign it.
            return None  # Cut off in a sentence.
    return None


def taken_back(text: str, statement: Statement) -> bool:
    """Whether the text goes on to say that this is not the answer."""
    return bool(_TAKEN_BACK.search(text[statement.end :]))


def boxed(text: str) -> Statement | None:
    """The last box with those joined to it; an empty one if the only box has no end."""
    inside = _boxes(text)
    if inside:
        joined = ", ".join(text[start:end] for start, end in inside)
        return Statement(joined, inside[0][0], inside[-1][1] + 1)
    begun = _BOX.search(text)
    return Statement("", begun.start(), begun.end()) if begun else None
