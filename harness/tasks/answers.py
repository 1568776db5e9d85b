r"""What a response gives as its answer: the last box, a letter, a number. Pure functions on text; thinking was stripped before.

"[invalid]" stands for a response that holds no answer. Of several answers the last one counts, as everywhere in the field; one that
was never finished (`\boxed{12`) or is empty (`\boxed{}`, the instruction repeated) is none.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from decimal import Decimal
from functools import cache

from harness.stats import INVALID

_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_BARE = re.compile(r"[^\s${}\\]+")
_MINUS = str.maketrans("\u2212\uff0d\ufe63", "---")
_MARKUP = re.compile(
    r"\\(?:text|textbf|textit|textrm|textnormal|mathrm|mathbf|mathit|mathsf|boldsymbol|bf|rm)(?![A-Za-z])|\\?\$|[{}*_`]"
)

_STATING = r"(?:\\(?:boxed|fbox)\s*|(?i:\b(?:answers?|option|choice)\s*(?::|=|\bis\b))[\s:]*)(?i:(?:option|choice)\s*)?"
_LINE_BEGINS = r"(?i:(?:the\s+)?(?:(?:correct|final|best)\s+)?(?:answer|option|choice)\s+)?"
_WORDS = "AI"
"""Letters that are words too, the article and the pronoun: where they stand before a word, they name no option."""
_ANSWER_LINE = re.compile(
    r"\W*(?:the\s+)?(?:(?:final|correct)\s+)?answer(?:\s+is\b|\s*:)\W*?(?P<answer>[^\s*_`:].*)", re.IGNORECASE
)

_THOUSANDS = re.compile(r"(?<=\d)(?:\\,|\\!|,\\!|\{,\})(?=\d{3}(?!\d))")
_SPACED_THOUSANDS = re.compile(r"(?<=\d)[ \u00a0\u202f](?=\d{3}(?!\d))")
_NUMBER = re.compile(r"(?<!\w)(?<!\d\.)-?(?:(?:\d{1,3}(?:,\d{3})+(?!\d|,\d)|\d+)(?:\.\d+)?|(?<!\.)\.\d+)")
_AFTER_NUMBER = re.compile(r"(?:\\%|%|\^\s*\\circ|\s+[A-Za-z][A-Za-z .%]*|[A-Za-z]{2}[A-Za-z .]*)?\s*\.?\s*")


def first_of_each(extract: Callable[[str], str]) -> Callable[[Iterable[Sequence[str]], object], list[list[str]]]:
    """`extract` for lm-eval's filter "custom": over all responses of every document, of which "take_first" takes one afterwards."""

    def apply(responses: Iterable[Sequence[str]], documents: object) -> list[list[str]]:
        return [[extract(response) for response in each] for each in responses]

    return apply


def last_box(text: str) -> str | None:
    r"""Content of the last \boxed{} or \fbox{} that is closed and not empty, with the braces inside; None if there is none.

    Without braces (`\boxed 5`) it is what follows, up to white space or a dollar sign. Linear in the text, whatever it repeats.
    """
    closed = _closing_braces(text)
    for match in reversed(list(_BOX.finditer(text))):
        start = match.end()
        content = text[start + 1 : closed.get(start, start)] if text.startswith("{", start) else _bare(text, start)
        if content.strip():
            return content.strip().translate(_MINUS)
    return None


def extract_box(text: str) -> str:
    """The content of the last box, or "[invalid]"."""
    return last_box(text) or INVALID


def extract_integer(text: str) -> str:
    """The content of the last box: as plain digits where it is an integer of 0 to 999 ("012" is "12"), else as it stands."""
    content = last_box(text)
    if content is None:
        return INVALID
    value = whole_number(content.rpartition("=")[2])
    return plain(value) if value is not None and 0 <= value <= 999 and value == int(value) else content


def extract_number(text: str) -> str:
    r"""A number in plain form ("18" for "\$18.00"): of the last box, else the first one after the last "####", else the last of all."""
    content = last_box(text)
    if content is not None:
        value = whole_number(content)
        value = _number_at(content, -1) if value is None else value
        return content if value is None else plain(value)
    value = _number_at(text.rpartition("####")[2], 0) if "####" in text else None
    value = _number_at(text, -1) if value is None else value
    return INVALID if value is None else plain(value)


def extract_letter(text: str, letters: str = "ABCD") -> str:
    r"""One of `letters`: what the last `\boxed{C}`, "Answer: C" or "the answer is (C)" says; else the last line; else the last "(C)"."""
    stated_letter, last_line, parenthesised = _letter_patterns(letters)
    bare = _MARKUP.sub(lambda match: " " * len(match[0]), text)
    stated = stated_letter.findall(bare)
    if stated:
        return "".join(stated[-1]).upper()
    lines = [stripped for line in bare.splitlines() if (stripped := line.strip(" \t#>-"))]
    last = last_line.match(lines[-1]) if lines else None
    if last:
        return last[1]
    found = parenthesised.findall(bare)
    return found[-1] if found else INVALID


def stated_answer(text: str) -> str:
    r"""A short answer: the last `\boxed{}` without its markup; else the last line after "Answer:" or "The answer is"; else the whole.

    Less what only marks it: asterisks and backticks around it, and behind "Answer:" and in a box a full stop. "[invalid]" for none.
    """
    content = last_box(text)
    lines = [line for line in text.splitlines() if line.strip()]
    said = _ANSWER_LINE.fullmatch(lines[-1].strip()) if lines else None
    if content is not None:
        answer = _without_markup(content.replace(r"\%", "%")).strip().removesuffix(".")
    elif said is not None:
        answer = said["answer"].strip("*`_ ").removesuffix(".")
    else:
        answer = text
    return answer.strip().strip("*`").strip() or INVALID


def whole_number(text: str) -> Decimal | None:
    """The value of a text that is one number, with markup, a currency sign, a unit or a full stop at most; else None."""
    bare = re.sub(r"^-\s+", "-", _SPACED_THOUSANDS.sub("", _without_markup(text)).strip())
    match = _NUMBER.match(bare)
    return _decimal(match[0]) if match and _AFTER_NUMBER.fullmatch(bare, match.end()) else None


def plain(value: Decimal) -> str:
    """A number in its one plain form: no exponent, no zeros at the end, no negative zero."""
    text = f"{value:f}"
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if text == "-0" else text


@cache
def _letter_patterns(letters: str) -> tuple[re.Pattern[str], re.Pattern[str], re.Pattern[str]]:
    """How a response names one of `letters`: states it, begins its last line with it, has it in parentheses."""
    words, others = ("".join(c for c in letters if (c in _WORDS) is is_word) for is_word in (True, False))
    either, lower = letters + letters.lower(), letters.lower()
    one = (
        rf"(?:\([ \t]{{0,9}}([{either}])[ \t]{{0,9}}\)"
        rf"|([{others}])(?![\w'-])"
        rf"|([{words}])(?![\w'-])(?![ \t]+(?!(?:is|because|since|as)\b)[a-z])"  # not the article: "Answer: A catalyst …"
        rf"|([{lower}])(?=[ \t]{{0,9}}[).]?[ \t]{{0,9}}$))"
    )
    return (
        re.compile(_STATING + one, re.MULTILINE),
        re.compile(rf"{_LINE_BEGINS}\(?([{letters}])(?:[).:,]|$)"),
        re.compile(rf"\(([{letters}])\)"),
    )


def _closing_braces(text: str) -> dict[int, int]:
    """Where every brace that is closed is closed; an escaped brace is no brace."""
    found: dict[int, int] = {}
    opened: list[int] = []
    for match in _BRACE.finditer(text):
        if match[0] == "{":
            opened.append(match.start())
        elif match[0] == "}" and opened:
            found[opened.pop()] = match.start()
    return found


def _bare(text: str, start: int) -> str:
    match = _BARE.match(text, start)
    return match[0].rstrip(".,;") if match else ""


def _without_markup(text: str) -> str:
    return _MARKUP.sub("", _THOUSANDS.sub("", text.translate(_MINUS)))


def _number_at(text: str, place: int) -> Decimal | None:
    found = _NUMBER.findall(_without_markup(text))
    return _decimal(found[place]) if found else None


def _decimal(text: str) -> Decimal:
    return Decimal(text.replace(",", ""))
