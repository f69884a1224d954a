r"""From a stated answer to what math-verify can read: typography, and words around the maths.

`quantity("£1 234.50 (about 1,235)")` is `("1234.50", "")`. What a number means is math-verify's
business; here marks of other alphabets become LaTeX, and the words before and after go. Where a
word changes what is meant ("more than 5", "5 to 6", "5 minutes 6 seconds") there is no answer.
"""

import re
import unicodedata

_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n")
_SIGNS = {
    **dict.fromkeys("−–‒", "-"),
    **dict.fromkeys("·⋅∙", r"\cdot "),
    **dict.fromkeys("’‘", "'"),
    "÷": "/",
    "×": r"\times ",
    "±": r"\pm ",
    "π": r"\pi ",
    "∞": r"\infty ",
    "°": r"^\circ ",
    "≤": r"\le ",
    "≥": r"\ge ",
    "≠": r"\ne ",
    "≈": r"\approx ",
    "∪": r"\cup ",
    "或": " or ",
}
_SCALES = {"thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_SPACE = r"(?:\\[,;:! ]|~|\s|\\q?quad\b)"
_FONTS = r"\\(?:text(?:bf|it|rm|normal)?|math(?:rm|bf|it)|mbox|operatorname)\s*"
# Tried in this order on every answer and reference.
_REWRITES = [
    (re.compile(pattern), to)
    for pattern, to in (
        (r"~~.*?~~", ""),  # Crossed out.
        (r"</?(?:b|i|u|em|strong|code|answer|span)>|[`\"“”]|\*\*|__", ""),
        (r"\\(?:[hv]space\*?|phantom)\s*\{[^{}]*\}", ""),
        (r"\\(?:displaystyle|large|Large|bf|rm)\b|\\color\s*\{[^{}]*\}", ""),
        (r"\\textcolor\s*\{[^{}]*\}|\\underline(?=\s*\{)", ""),
        (r"\$|\\[()\[\]$]|\\pounds\b|\\euro\b|\\text\s*\{\s*[€£¥₹]\s*\}|[€£¥₹₽₩]", ""),
        (r"\b(?:US|USD|EUR|GBP|Rs\.?)\s*(?=\d)", ""),
        (rf"{_FONTS}\{{(\s*(?:and|or)\s*)\}}", r"\1"),
        (rf"\\d?frac\s*\{{\s*{_FONTS}\{{([^{{}}]*)\}}\s*\}}\s*\{{\s*{_FONTS}\{{([^{{}}]*)\}}\s*\}}",
         r"\\text{\1/\2}"),
        (r"(?<![\\])%", r"\\%"),
        (rf"(?<=\d){_SPACE}+(?=\\%)", ""),
        (r"\b(?:minus|negative)\s+(?=\d)", "-"),
        (r"\bpi\b(?<!\\pi)", r"\\pi"),
        (r"√\s*(\d+|[a-z]\b)", r"\\sqrt{\1}"),
        (r"√\s*\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"(\^\s*\{?\\circ\}?\s*)[CF]\b", r"\1"),
        (r"(?<![\d/.\w])(\d+)\s+(\d+)\s*/\s*(\d+)(?![\d/])", r"\1\\frac{\2}{\3}"),
        (r"(?<![\w.])(\d+(?:\.\d+)?)[eE]([+-]?\d+)\b", r"\1 \\times 10^{\2}"),
        (r"(?<=\d)\s*x\s*(?=10\s*\^)", r"\\times "),
        (r"\^\s*(-\d+|\\frac\{[^{}]*\}\{[^{}]*\})", r"^{\1}"),
    )
]  # fmt: skip

# 1 234 567 with any separator but a comma, which math-verify knows; 12,34,567.
_GROUPED = (
    re.compile(rf"(?<![\d.,])\d{{1,3}}(?:(?:{_SPACE}|['_]|\{{,\}}|,\\!)\d{{3}})+(?![\d,])"),
    re.compile(r"(?<![\d.,])\d{1,2}(?:,\d\d)+,\d{3}(?![\d,])"),
)

_FUNCTIONS = "sin|cos|tan|cot|sec|csc|log|ln|exp|sqrt|pi|lim|and|or"
_WORD = re.compile(
    rf"{_FONTS}\{{[^{{}}]*[^\W\d_][^{{}}]*\}}"
    rf"|(?<![\\{{])(?<![^\W\d_])(?!(?:{_FUNCTIONS})\b)"
    r"(?:[^\W\d_]{3,}|(?<=[\d ])(?:[^\W\d_]{2}|[mglsLVWJN])(?=$|[\s/^.])"
    r"|(?<=[\d ])[ap]\.m\b|[\u3040-\uffff])"
)
_REASON = re.compile(
    r"(?:[,;]?\s+(?:because|since|as|which|where|so|when|car)\b|[,;]?\s+and\s+[a-z]{2}|;|，).*$",
    re.DOTALL,
)
_LISTED = re.compile(r"\s*,?\s*\b(?:and|or)\b\s*(?=[-\d\\(.]|[a-z]\s*=)")
_RESTATED = re.compile(r"(?<=[^\s,(=+*/^-])\s+[(\[]([^()\[\]]*)[)\]]\s*$")
_LEAD = re.compile(
    r"\A(?:(?:exactly|simply|just|only|approximately|about|roughly|around|equal to|option|choice|"
    r"either)\s+|\.{3}\s*)+",
    re.IGNORECASE,
)
_NAMED = re.compile(rf"(?:{_FONTS}\{{[^{{}}]*\}}|[A-Za-z ]{{3,}})\s*=\s*")
_RELATION = re.compile(r"\s*(?:[<>]|\\(?:neq?|le|leq|ge|geq|approx)\b)")
# No value: a congruence, a limit, a list that goes on; or said to be no answer.
_REJECTED = re.compile(
    r"\\(?:equiv|to|rightarrow|[lc]?dots)\b|\b(?:wrong|incorrect|contradiction|thought)\b"
)
_CHANGES = re.compile(
    r"\A(?:to|or|and|not|but|below|above|th\s+\w)\b|[万億亿千百]|\b(?:off|squared|cubed|factorial|times|"
    r"plus|minus|divided|more|less|fewer|most|least|hundreds?|dozens?|score|half|halves|thirds?|"
    r"quarters?|tenths?|\w+dths?|only|if|unless|except)\b"
)
_HEDGES = re.compile(
    r"\b(?:not|no|nor|cannot|least|most|than|between|half|twice|thrice|double|triple|times|"
    r"multiple|factor|divisor|root|square|digits?|ends?|starts?|if|step|problem|question|part|case|"
    r"theorem|lemma|equation|contradict\w*|exceeds?|over|under|above|below|mod(?:ulo)?|remainder|"
    r"(?:should|would|could|might)\s+have|divided|suppose|assume|given|let|know|first|never|nicht|kein|pas|wrong|contains?)\b"
    r"|n't|不|没|[<>]|\\(?:neq?|leq?|geq?|approx)\b",
    re.IGNORECASE,
)


def typeset(text: str) -> str:
    """The same in the LaTeX that math-verify knows: signs, separators, without fonts and money."""
    text = re.sub(
        "[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+", lambda raised: f"^{{{raised[0].translate(_SUPERSCRIPTS)}}}", text
    )
    text = "".join(_SIGNS.get(sign) or _folded(sign) for sign in text)
    for pattern, to in _REWRITES:
        text = pattern.sub(to, text)
    for grouped in _GROUPED:
        text = grouped.sub(lambda number: re.sub(r"\D", "", number[0]), text)
    return re.sub(rf"^{_SPACE}+|{_SPACE}+$", "", text).strip(" *_")


def _folded(sign: str) -> str:
    r"""`½` as `\frac{1}{2}`, a wide digit as a digit, any space as a space."""
    plain = unicodedata.normalize("NFKC", sign) if ord(sign) > 127 else sign
    fraction = re.fullmatch(r"(\d)\u2044(\d+)", plain)
    return rf"\frac{{{fraction[1]}}}{{{fraction[2]}}}" if fraction else plain


def quantity(stated: str, exact: bool = True) -> tuple[str, str] | None:
    """The maths of an answer, and the unit after it; None where it is no single answer.

    Args:
      stated: the text of the answer.
      exact: False where a sentence may stand before it.
    """
    text = typeset(stated)
    if "?" in text or _RELATION.match(text) or _REJECTED.search(text):
        return None
    text = _LEAD.sub("", _restatement_apart(_REASON.sub("", text)))
    text = _NAMED.sub("", _LISTED.sub(", ", text), 1)
    if not exact:
        begun = re.search(r"(?<![\w.])(?:[a-z]\s*=|[-\d\\({.])", text)
        if begun is None or _HEDGES.search(text):
            return None
        text = text[begun.start() :]
    text = text.strip().removesuffix(".").strip()
    if re.fullmatch(r"\{.*,.*\}", text):
        text = rf"\{{{text[1:-1]}\}}"
    word = _WORD.search(text)
    if word is None:
        return text, ""
    head = re.sub(rf"{_SPACE}+(?:an?{_SPACE}+)?$", "", text[: word.start()])
    unit = re.sub(rf"{_FONTS}|[{{}}]", " ", text[word.start() :]).strip()
    scale = re.match("|".join(_SCALES), unit)
    if scale:
        head, unit = rf"{head} \times 10^{{{_SCALES[scale[0]]}}}", unit[scale.end() :].strip()
    other_numbers = re.search(r"\d|\\", re.sub(r"\^\s*\d", "", unit))
    if not re.search(r"[\w\\][^-+*/^]*$", head) or _CHANGES.search(unit) or other_numbers:
        return None
    return head.rstrip(", "), unit


def _restatement_apart(text: str) -> str:
    """`42` for `42 (forty-two)`, `forty-two (42)` and `42 (6 times 7)`."""
    restated = _RESTATED.search(text)
    if not restated or not (_WORD.search(restated[1]) or re.fullmatch(r"[\d./\\%^]+", restated[1])):
        return text
    before = text[: restated.start()]
    in_words = not re.search(r"\d|\\", before) and re.search(r"\d", restated[1])
    return restated[1] if in_words else before
