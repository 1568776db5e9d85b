"""Which of the options of a question a response names: by letter, else by the words of the option. Never by chance."""

from __future__ import annotations

import re
from collections.abc import Sequence

from harness.stats import INVALID
from harness.tasks.answers import extract_letter, stated_answer

LETTERS = "ABCDEFGHI"
_WORD = re.compile(r"[^\W_]+")


def lettered(options: Sequence[str], form: str) -> str:
    """The options a line each, in the form "({letter}) {option}" or another."""
    return "\n".join(form.format(letter=letter, option=option) for letter, option in zip(LETTERS, options, strict=False))


def chosen_letter(response: str, options: Sequence[str]) -> str:
    """The letter of the option that a response names, "[invalid]" if it names none or several.

    A letter counts before words: alone ("b", "(B)."), else as `extract_letter` finds it among the letters that the question has. Then
    the option that is the answer word by word; then the one option whose words occur in the response (of two that overlap, "red" in
    "dark red", the longer).
    """
    letters = LETTERS[: len(options)]
    alone = re.fullmatch(rf"[\s(*\[]*([{letters}])[\s).:*\]]*", response, re.IGNORECASE)
    if alone:
        return alone[1].upper()
    found = extract_letter(response, letters)
    return found if found != INVALID else _letter_of_words(response, options)


def _letter_of_words(response: str, options: Sequence[str]) -> str:
    words = [_words(option) for option in options]
    for said, is_whole in ((stated_answer(response), True), (response, False)):
        text = _words(said)
        named = {each for each in words if each.strip() and (each == text if is_whole else each in text)}
        longest = {each for each in named if not any(each != other and each in other for other in named)}
        if len(longest) == 1:
            only = longest.pop()
            return LETTERS[words.index(only)] if words.count(only) == 1 else INVALID
    return INVALID


def _words(text: str) -> str:
    """Words and numbers alone, in lower case, each between blanks."""
    return f" {' '.join(_WORD.findall(text.lower()))} "
