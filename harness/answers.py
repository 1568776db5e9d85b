"""Answers that the BF16 model gave to the tasks of a suite, as sequences to teacher-force other variants with. No torch.

A sequence is the prompt as it was asked and the tokens that were answered, whatever engine answered; the answer alone is
response. Prompts are never cut. Of each task the first repeat of all questions comes first, then the second.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from harness.data import Sequence
from harness.errors import StoreError
from harness.prepared import Prepared


@dataclass(frozen=True)
class RecordedAnswer:
    """One answer: prompt and response in tokens. cluster: questions that err together, within the task."""

    task: str
    doc: int
    question: str
    cluster: str
    repeat: int
    prompt: tuple[int, ...]
    response: tuple[int, ...]

    @property
    def sequence(self) -> Sequence:
        """Prompt and response; the response is what counts."""
        mask = (False,) * len(self.prompt) + (True,) * len(self.response)
        return Sequence((*self.prompt, *self.response), mask)

    @property
    def about(self) -> dict[str, Any]:
        """What a row of figures says of it; `answer` is a digest of all its tokens."""
        digest = hashlib.sha256(json.dumps([self.prompt, self.response]).encode()).hexdigest()[:16]
        identity = {key: getattr(self, key) for key in ("task", "doc", "question", "cluster", "repeat")}
        return {**identity, "answer": digest}


def recorded_answers(
    task: str, prepared: Prepared, rows: list[dict[str, Any]], samples: int
) -> tuple[list[RecordedAnswer], dict[str, int]]:
    """The first `samples` answers of a task that have a token, and what became of the others.

    Args:
        rows: what an "evaluate" stage recorded, a row a (question, repeat). Likelihoods are no answers and give none.
    Returns:
        The answers, and counts: n_answers, n_missing (no response came) and n_empty (it has no token) among all rows, n_left_out.
    Raises:
        StoreError: an answer to a request that was not prepared.
    """
    asks = {(ask.doc, ask.request().hash): ask for ask in prepared.asks}
    questions = {question.doc: question for question in prepared.questions}
    found: list[RecordedAnswer] = []
    counts = {"n_answers": 0, "n_missing": 0, "n_empty": 0, "n_left_out": 0}
    for row in sorted(rows, key=lambda row: (row["repeat"], row["doc"])):
        counts["n_missing"] += row["missing"] is not None
        if row["token_ids"] is None:
            continue
        for request, token_ids in zip(row["requests"], row["token_ids"], strict=True):
            if (row["doc"], request) not in asks:
                raise StoreError(
                    f"task {task}, question {row['doc']}: an answer to another prompt than the prepared one; delete the stage "
                    "of its answers from the cache and run again"
                )
            if not token_ids:
                counts["n_empty"] += 1
            elif len(found) == samples:
                counts["n_left_out"] += 1
            else:
                question = questions[row["doc"]]
                prompt = asks[row["doc"], request].token_ids
                found.append(
                    RecordedAnswer(
                        task, row["doc"], question.question, question.cluster, row["repeat"], prompt, tuple(token_ids)
                    )
                )
    return found, counts | {"n_answers": len(found)}
