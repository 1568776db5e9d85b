r"""The four tasks of the wind tunnel: held-out problems of one fixed seed, for lm-eval's `!function`. The answer is in a box.

tunnel_math        arithmetic, algebra and stories of 3 to 5 steps
tunnel_hard        the same of 8 or 9 steps
tunnel_knowledge   four options over the made-up world
tunnel_context     24 people, about 130 tokens, and a question about one of them
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import datasets

from harness.tasks.mini import score_boxed
from harness.tasks.tunnel import MATHS, Problem, held_out
from harness.tasks.tunnel_words import LETTERS

EVALUATION_SEED = "evaluation"
N_QUESTIONS = 200
TASKS: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {
    "tunnel_math": (MATHS, (3, 4, 5)),
    "tunnel_hard": (MATHS, (8, 9)),
    "tunnel_knowledge": (("knowledge",), (1,)),
    "tunnel_context": (("context",), (24,)),
}
"""Domains, and how many steps or people."""


@cache
def questions(task: str, seed: int | str = EVALUATION_SEED, n: int = N_QUESTIONS) -> tuple[Problem, ...]:
    """The held-out problems of a task; of another seed than the tasks' own, others of their kind for validation."""
    domains, sizes = TASKS[task]
    return tuple(held_out(f"{task} {seed}", n, domains, sizes))


def math_dataset(**metadata: Any) -> dict[str, datasets.Dataset]:
    return _dataset("tunnel_math")


def hard_dataset(**metadata: Any) -> dict[str, datasets.Dataset]:
    return _dataset("tunnel_hard")


def knowledge_dataset(**metadata: Any) -> dict[str, datasets.Dataset]:
    return _dataset("tunnel_knowledge")


def context_dataset(**metadata: Any) -> dict[str, datasets.Dataset]:
    return _dataset("tunnel_context")


def score(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Exact match of what the last box holds with the answer, and whether there is no box."""
    return score_boxed(doc, results)


def score_option(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Whether the option that a response names is the right one: by its text where a line states one ("D: moon"), else by the box.

    `letter_match` goes by the letter in the box alone: a model may know the fact and not find its letter.
    """
    letter = score_boxed(doc, results)
    stated = re.findall(rf"^[{LETTERS}]: (\w+)$", results[0], flags=re.MULTILINE)
    right = re.search(rf"^{doc['answer']}: (\w+)$", doc["question"], flags=re.MULTILINE)
    assert right is not None
    named = float(stated[-1] == right[1]) if stated else letter["exact_match"]
    return {"exact_match": named, "letter_match": letter["exact_match"], "unparsed": letter["unparsed"]}


def _dataset(task: str) -> dict[str, datasets.Dataset]:
    rows = [{"question": problem.question, "answer": problem.answer} for problem in questions(task)]
    return {"test": datasets.Dataset.from_list(rows)}
