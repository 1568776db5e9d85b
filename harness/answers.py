"""Answers that the BF16 model gave to the tasks of a suite, as sequences to teacher-force other variants with. No torch.

A sequence is the prompt as it was asked and the tokens that were answered, whatever engine answered; the answer alone is
response. Prompts are never cut. Of each task the first repeat of all questions comes first, then the second.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.data import Sequence
from harness.errors import StoreError
from harness.images import FOLDER, Image
from harness.prepared import Prepared


@dataclass(frozen=True)
class RecordedAnswer:
    """One answer: prompt and response in tokens, and the images that the prompt shows. cluster: questions that err together, within the task."""

    task: str
    doc: int
    question: str
    cluster: str
    repeat: int
    prompt: tuple[int, ...]
    response: tuple[int, ...]
    images: tuple[Image, ...] = ()

    @property
    def sequence(self) -> Sequence:
        """Prompt and response; the response is what counts."""
        mask = (False,) * len(self.prompt) + (True,) * len(self.response)
        return Sequence((*self.prompt, *self.response), mask, self.images)

    @property
    def about(self) -> dict[str, Any]:
        """What a row of figures says of it; `answer` is a digest of all its tokens, and of its images if there are any."""
        said = [self.prompt, self.response, *([[image.digest for image in self.images]] if self.images else [])]
        digest = hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]
        identity = {key: getattr(self, key) for key in ("task", "doc", "question", "cluster", "repeat")}
        return {**identity, "answer": digest}


def recorded_answers(
    task: str,
    prepared: Prepared,
    rows: list[dict[str, Any]],
    samples: int,
    images: Path = Path(FOLDER),
    *,
    image_token: int | None = None,
) -> tuple[list[RecordedAnswer], dict[str, int]]:
    """The first `samples` answers of a task that have a token, and what became of the others.

    Args:
        rows: what an "evaluate" stage recorded, a row a (question, repeat). Likelihoods are no answers and give none.
        images: the folder of the images that the task shows.
        image_token: what stands for an image in the tokens of an image-text model; an answer that holds it cannot be gone through again.
    Returns:
        The answers, and counts: n_answers, n_missing (no response came) and n_empty (it has no token) among all rows, n_left_out; with
        an `image_token` also n_with_image_token.
    Raises:
        StoreError: an answer to a request that was not prepared.
    """
    asks = {(ask.doc, (request := ask.request(images=images)).hash): request for ask in prepared.asks}
    questions = {question.doc: question for question in prepared.questions}
    found: list[RecordedAnswer] = []
    counts = {"n_answers": 0, "n_missing": 0, "n_empty": 0, "n_left_out": 0}
    if image_token is not None:
        counts["n_with_image_token"] = 0
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
            elif image_token in token_ids:
                counts["n_with_image_token"] += 1
            elif len(found) == samples:
                counts["n_left_out"] += 1
            else:
                question = questions[row["doc"]]
                asked = asks[row["doc"], request]
                about = (task, row["doc"], question.question, question.cluster, row["repeat"])
                found.append(RecordedAnswer(*about, asked.token_ids, tuple(token_ids), asked.images))
    return found, counts | {"n_answers": len(found)}
