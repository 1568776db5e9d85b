"""Whether an answer of free text is a short gold answer: a deterministic rule that needs no judge, and errs towards "no".

A gold answer is a name, a number or a short list. An answer counts where the whole of it, or its last paragraph if that is one
line and no item of a list, is the gold answer, or has the gold answer's numbers and no other (`_has_its_numbers`). What the rule
cannot see counts as wrong: another wording, another unit, a rounded number. It is a floor beneath a judge's figure, not a
substitute for it. The rule is this project's own.

Read alike: case, punctuation, Markdown marks, list numbers ("1. ", "- "), typographic quotes and dashes, a currency sign,
thousands commas, scale words ("1.5 million" and 1,500,000), "percent" and "%", an "Answer:" in front.
"""

from __future__ import annotations

import re
import unicodedata
from decimal import Decimal

_LIST_MARK = re.compile(r"^\s*(?:\d{1,2}[.)]|[-*•–])\s+", re.MULTILINE)
_INTRODUCTION = re.compile(r"^\W*(?:the\s+)?(?:final\s+|correct\s+)?answer(?:\s+is\b|\s*:)\W*", re.IGNORECASE)
_SCALES = {"thousand": 3, "million": 6, "billion": 9, "trillion": 12, "bn": 9}
_TOKEN = re.compile(
    r"(?P<sign>(?<![\w)])-)?[$€£¥]?(?<![\w.])(?P<number>\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?)(?!\w|\.\d|,\d{3})"
    rf"(?:\s*(?P<scale>{'|'.join(_SCALES)})\b)?(?P<percent>\s*%|\s+percent\b|\s+per\s+cent\b)?"
    r"|(?P<word>\w+(?:'\w+)*)",
    re.IGNORECASE,
)
_DASHES = str.maketrans("\u2010\u2011\u2012\u2013\u2014\u2212\u2018\u2019\u201c\u201d", "------''\"\"")

_Token = str | tuple[Decimal, bool]


def is_short_answer(gold: str, answer: str) -> bool:
    """Whether `answer` says `gold` and nothing else. False for an empty answer; a gold answer without word or number fits none."""
    wanted = _tokens(gold)
    spans = [_tokens(answer), _tokens(_conclusion(answer))]
    return bool(wanted) and any(span == wanted or _has_its_numbers(wanted, span) for span in spans)


def _conclusion(answer: str) -> str:
    """The last paragraph, if it is one line and no item of a list: an item is a part of what is answered."""
    last = re.split(r"\n\s*\n", _plain(answer).strip())[-1]
    return "" if "\n" in last or _LIST_MARK.match(last) else last


def _has_its_numbers(wanted: list[_Token], span: list[_Token]) -> bool:
    """The gold answer is numbers with at most one word: the span has these numbers in this order, none besides, and the word."""
    words = [token for token in wanted if isinstance(token, str)]
    numbers = [token for token in wanted if not isinstance(token, str)]
    found = [token for token in span if not isinstance(token, str)]
    return bool(numbers) and len(words) <= 1 and found == numbers and all(word in span for word in words)


def _plain(text: str) -> str:
    """Lines as they are read: escaped line ends of the source are line ends, typographic signs are plain ones."""
    return unicodedata.normalize("NFKC", text.replace("\\n", "\n")).translate(_DASHES).replace("`", "").replace("*", "")


def _tokens(text: str) -> list[_Token]:
    """Words in lower case and (value, whether it is a percentage), in order."""
    plain = _LIST_MARK.sub("", _INTRODUCTION.sub("", _plain(text).strip()))
    return [_token(match) for match in _TOKEN.finditer(plain)]


def _token(match: re.Match[str]) -> _Token:
    if match["word"] is not None:
        return match["word"].casefold()
    value = Decimal(match["number"].replace(",", ""))
    if match["scale"] is not None:
        value = value.scaleb(_SCALES[match["scale"].lower()])
    return (-value if match["sign"] else value, match["percent"] is not None)
