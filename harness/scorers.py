"""Whether a response is correct, by the reference answer of its row. Pure functions, by the name of their task.

Each takes (reference, response) and returns True, False, or None where the reference holds no answer to compare with.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from decimal import Decimal

_NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?")
_BOX = re.compile(r"\\boxed\{([^{}]*)\}")
_MARK = "####"


def score_gsm8k(reference: str, response: str) -> bool | None:
    """The last number of the response, after its last #### if it has one, against the number after the reference's ####."""
    wanted = _last_number(reference.rpartition(_MARK)[2]) if _MARK in reference else None
    return None if wanted is None else _last_number(response.rpartition(_MARK)[2]) == wanted


def score_mini_math(reference: str, response: str) -> bool | None:
    """The last \\boxed{} of the response, as the task mini_math reads it, against the reference's: in a box, or a bare number."""
    from harness.tasks.mini import score_boxed

    boxes = _BOX.findall(reference)
    wanted = boxes[-1] if boxes else reference.strip()
    if not _NUMBER.fullmatch(wanted):
        return None
    return score_boxed({"answer": wanted}, [response])["exact_match"] == 1.0


def score_boxed(reference: str, response: str) -> bool | None:
    """The last \\boxed{} of the response against the reference's, character by character but for spaces around."""
    wanted, found = _BOX.findall(reference), _BOX.findall(response)
    return None if not wanted else bool(found) and found[-1].strip() == wanted[-1].strip()


SCORERS: dict[str, Callable[[str, str], bool | None]] = {
    "gsm8k": score_gsm8k,
    "mini_math": score_mini_math,
    "boxed": score_boxed,
}


def _last_number(text: str) -> Decimal | None:
    found = _NUMBER.findall(text)
    return Decimal(re.sub(r"[$,]", "", found[-1])) if found else None
