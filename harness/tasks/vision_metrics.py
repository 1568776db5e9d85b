"""What an answer about a picture is worth: relaxed accuracy, ANLS, OCRBench points, VQA accuracy. Pure functions on text.

Each follows the definition of its benchmark; where a definition leaves something open, or the code around it has a slip, the docstring
says what holds here. Figures are exact where they are rational: no answer changes sides by a rounding of binary fractions.
What of a response is the answer is `answers.stated_answer`, and `mmmu` and `choices` for letters.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from functools import cache

RELAXED_TOLERANCE = Fraction(1, 20)
"""Share of the gold value by which a number may be off: 5 %, of Methani et al. 2020 (PlotQA)."""
ANLS_THRESHOLD = Fraction(1, 2)
"""Similarity below which an answer counts as another answer, not as a misread one."""

_VALUE = re.compile(
    r"(?P<sign>[-+]?)\s?[$€£¥]?(?P<value>(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?(?:e[-+]?\d{1,2})?|\.\d+)\s?(?P<percent>%?)",
    re.IGNORECASE,
)
_LONGEST_VALUE = 60
_MINUS = str.maketrans("\u2212\uff0d\ufe63", "---")
_QUOTES = ('"', "'")

_HARD_SIGNS = ';/[]"{}()=+\\_-><@`,?!'
"""The signs that the evaluation of VQA takes away; apostrophes, colons and others stay."""
_IDLE_PERIOD = re.compile(r"\.(?!\d)")
_NUMBER_WORDS = {
    word: str(value)
    for value, word in enumerate(("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"))
} | {"none": "0"}
_ARTICLES = ("a", "an", "the")
_CONTRACTED = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's how'd "
    "how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't not've o'clock oughtn't "
    "'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've "
    "someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's they'd they'd've "
    "they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd where's where've "
    "who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd "
    "you'd've you'll you're you've"
)


def relaxed_match(answer: str, gold: str) -> bool:
    """Whether an answer to a question about a chart is right: |answer − gold| <= 5 % of |gold| for numbers, else the same text.

    Source: Masry et al. 2022 (ChartQA), section 5.1. A number may have thousands commas, a currency sign in front, a percent sign and a
    full stop behind it. A gold value of 0 allows 0 alone. Where one of the two has a percent sign, 10% is 10 or 0.1, whichever fits;
    where both have one they are compared as they stand. Years are numbers, as the definition has it: 2015 passes for 2010.
    Texts are compared without case, white space at the ends and between words beyond one blank, quotes around them and a full stop.

    Departures from lmms-eval, which compares floats and plain lower case: a gold of 0 and its zeros ("0.0") match there as text
    alone; 10% is 0.1 there and fails against 10; "1,000", "$5" and "5." against 5,000, 5 and "five." are texts there; the border
    (1.05 for 1) fails there by a binary rounding.
    """
    wanted, found = _value(gold), _value(answer)
    if wanted is None or found is None:
        return _plain_text(answer) == _plain_text(gold)
    (value, is_percent), (target, is_target_percent) = found, wanted
    pairs = [(value, target)]
    if is_percent != is_target_percent:
        pairs.append((value / 100, target) if is_percent else (value, target / 100))
    return any(abs(each - against) <= RELAXED_TOLERANCE * abs(against) for each, against in pairs)


def anls(answer: str, golds: Sequence[str]) -> float:
    """Average normalised Levenshtein similarity of one question: the largest s of its gold answers, with those below 0.5 as 0.

    s = 1 − distance / max(length of answer, length of gold), both in lower case with white space collapsed; 1 for two empty texts.
    Source: Biten et al. 2019 (ST-VQA), Mathew et al. 2021 (DocVQA). s = 0.5 counts, as in the evaluation of the challenges (the
    formula of the paper would drop it). Departure from lmms-eval: lengths are those of the normalised texts that the distance is
    between; there they are of the texts as given, so that spaces around a wrong answer make it a better one.
    """
    return float(max(_similarity(_folded(answer), _folded(gold)) for gold in _some(golds)))


def ocr_point(answer: str, golds: Sequence[str], *, is_formula: bool = False) -> int:
    """The point of one question of OCRBench: 1 where a gold answer stands anywhere in the answer, else 0.

    Both in lower case, line ends as blanks, without white space at the ends. is_formula (the questions from HME100k): the case counts
    and no blank does. Source: Liu et al. 2024 (OCRBench) and its code. Departures from that: an empty gold answer is in no answer
    (a substring of all of them there). From lmms-eval: nothing is kept between questions or runs, full-width letters are not folded.
    """
    said = _read(answer, is_formula)
    return int(any(wanted in said for gold in _some(golds) if (wanted := _read(gold, is_formula))))


def vqa_accuracy(answer: str, golds: Sequence[str]) -> float:
    """VQA accuracy: the mean, over the gold answers, each left out in turn, of min(1, equal answers among the others / 3).

    With n gold answers, c of them equal to the answer after `normalized_answer`: (c min(1, (c − 1)/3) + (n − c) min(1, c/3)) / n;
    of ten: 0, 0.3, 0.6, 0.9, then 1. Source: Antol et al. 2015 (VQA), as Singh et al. 2019 (TextVQA) evaluate it.
    """
    said = normalized_answer(answer)
    n, equal = len(_some(golds)), sum(normalized_answer(gold) == said for gold in golds)
    one, third = Fraction(1), Fraction(1, 3)
    return float((equal * min(one, max(equal - 1, 0) * third) + (n - equal) * min(one, equal * third)) / n)


def normalized_answer(text: str) -> str:
    """An answer as the evaluation server of VQA and TextVQA compares it.

    In this order: lower case; no commas and question marks; "'s" a word of its own; each of ;/[]"{}()=+\\_-><@`! taken away everywhere
    if it stands beside a blank anywhere, else a blank in its place; no full stops but before a digit; number words to ten as digits,
    "none" as 0; no articles; apostrophes put back where one alone is missing ("dont"). What that spoils, it spoils on both sides:
    "3,5" is 35, "U.S." is "us".

    Departure from the code in circulation: it takes away 32 full stops at most, by a flag that stands where a count belongs.
    """
    lowered = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    lowered = lowered.replace("\n", " ").replace("\t", " ").strip()
    bare = lowered
    for sign in _HARD_SIGNS:
        bare = bare.replace(sign, "" if f"{sign} " in lowered or f" {sign}" in lowered else " ")
    words = (_NUMBER_WORDS.get(word, word) for word in _IDLE_PERIOD.sub("", bare).split())
    contractions = _contractions()
    return " ".join(contractions.get(word, word) for word in words if word not in _ARTICLES)


def edit_distance(first: str, second: str) -> int:
    """Levenshtein distance: the fewest insertions, deletions and replacements of a character that make one text the other."""
    short, long = sorted((first, second), key=len)
    row = list(range(len(short) + 1))
    for i, character in enumerate(long, start=1):
        above, row[0] = row[0], i
        for j, other in enumerate(short, start=1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (character != other))
    return row[-1]


def _some(golds: Sequence[str]) -> Sequence[str]:
    if isinstance(golds, str) or not golds:
        raise ValueError(f"gold answers: found {golds!r}; allowed: a list of one text or more")
    return golds


def _value(text: str) -> tuple[Fraction, bool] | None:
    """(value, whether it has a percent sign) of a text that is one number; else None."""
    bare = text.translate(_MINUS).strip().removesuffix(".")
    match = _VALUE.fullmatch(bare) if len(bare) <= _LONGEST_VALUE else None
    if match is None:
        return None
    value = Fraction(match["value"].replace(",", ""))
    return -value if match["sign"] == "-" else value, bool(match["percent"])


def _plain_text(text: str) -> str:
    bare = _folded(text).removesuffix(".")
    is_quoted = len(bare) > 1 and bare[0] == bare[-1] and bare[0] in _QUOTES
    return bare[1:-1] if is_quoted else bare


def _folded(text: str) -> str:
    return " ".join(text.lower().split())


def _similarity(answer: str, gold: str) -> Fraction:
    longest = max(len(answer), len(gold))
    if longest == 0:
        return Fraction(1)
    if 1 - Fraction(abs(len(answer) - len(gold)), longest) < ANLS_THRESHOLD:  # a distance is never below this difference
        return Fraction(0)
    similarity = 1 - Fraction(edit_distance(answer, gold), longest)
    return similarity if similarity >= ANLS_THRESHOLD else Fraction(0)


def _read(text: str, is_formula: bool) -> str:
    read = text.strip().replace("\n", " ")
    return read.replace(" ", "") if is_formula else read.lower()


@cache
def _contractions() -> dict[str, str]:
    """By each form that lacks one apostrophe, the full one; and the one entry of the table that takes an apostrophe away."""
    found = {"somebody'd": "somebodyd"}
    for full in _CONTRACTED.split():
        for place, character in enumerate(full):
            if character == "'":
                found[full[:place] + full[place + 1 :]] = full
    return found
