"""A task made ready: its questions as they will be scored, and every request that they make, as token ids. No lm_eval.

task.json           what the task is, and what to know of it
docs.jsonl.zst      a line a question
requests.jsonl.zst  a line a request
images/             the images that they show, by digest
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from harness.engines import Request, Sampling
from harness.images import FOLDER, Image
from harness.records import SCHEMA, read_json, read_samples, write_samples
from harness.store import write_json


@dataclass(frozen=True)
class Question:
    """One document of a task.

    doc: its number, over all subtasks. question: sha256 of the source question, whatever the prompt around it, to pair results that
    were made elsewhere. cluster: questions that err together. fields: what lm-eval's scorer is given. excluded: why it is not asked.
    """

    doc: int
    subtask: str
    question: str
    cluster: str
    target: str
    fields: dict[str, Any]
    excluded: str | None = None


@dataclass(frozen=True)
class Ask:
    """One request of a question: `index` counts what lm-eval asks of it, `part` the windows of one long text.

    stops: strings that end the answer; they are looked for after the thinking, where there is any. option: the text behind the prompt
    whose likelihood is asked, to be shown; None of a generated answer, and of a text that is scored whole.
    images: digests, in order; the files lie beside the task. With images, unexpanded_ids, messages and template_args as in `Request`, and
    image_sizes: (width, height) of each.
    """

    doc: int
    index: int
    part: int
    prompt: str
    token_ids: tuple[int, ...]
    continuation: tuple[int, ...] | None = None
    sampling: Sampling | None = None
    stops: tuple[str, ...] = ()
    option: str | None = None
    images: tuple[str, ...] = ()
    unexpanded_ids: tuple[int, ...] = ()
    messages: tuple[dict[str, Any], ...] = ()
    template_args: dict[str, Any] = field(default_factory=dict, hash=False)
    image_sizes: tuple[tuple[int, int], ...] = ()

    @property
    def room(self) -> int:
        """Tokens that it needs beside its prompt."""
        return self.sampling.max_tokens if self.sampling is not None else len(self.continuation or ())

    def request(self, repeat: int = 0, seed: int | None = None, *, images: Path = Path(FOLDER)) -> Request:
        """images: the folder of their files, which only an engine reads."""
        return Request(
            token_ids=self.token_ids,
            sampling=self.sampling,
            continuation=self.continuation,
            repeat=repeat,
            seed=seed,
            images=tuple(Image(digest, images / digest) for digest in self.images),
            unexpanded_ids=self.unexpanded_ids,
            messages=self.messages,
            template_args=self.template_args,
        )


@dataclass(frozen=True)
class Prepared:
    """about: what task.json says. questions: in order. asks: of those that are not excluded, in order of their questions."""

    about: dict[str, Any]
    questions: list[Question]
    asks: list[Ask]


def question_digest(text: str) -> str:
    """The digest of a source question: of its text, white space collapsed. Results of other tools are paired by it."""
    return hashlib.sha256(" ".join(text.split()).encode()).hexdigest()


def write_prepared(folder: Path, prepared: Prepared) -> None:
    """Write the three files."""
    write_json(folder / "task.json", {"schema": SCHEMA, **prepared.about})
    write_samples(folder / "docs.jsonl.zst", map(vars, prepared.questions))  # no asdict: it copies every token id
    write_samples(folder / "requests.jsonl.zst", map(_row, prepared.asks))


def read_prepared(folder: Path) -> Prepared:
    """What `write_prepared` wrote; StoreError if it is missing or damaged."""
    asks = []
    for row in read_samples(folder / "requests.jsonl.zst") or []:
        sampling = row.pop("sampling")
        continuation, stops = row.pop("continuation"), tuple(row.pop("stops"))
        token_ids = tuple(row.pop("token_ids"))
        shown: dict[str, Any] = {key: tuple(row.pop(key, ())) for key in ("images", "unexpanded_ids", "messages")}
        shown["image_sizes"] = tuple(tuple(size) for size in row.pop("image_sizes", ()))
        asks.append(
            Ask(
                **row,
                **shown,
                token_ids=token_ids,
                stops=stops,
                continuation=None if continuation is None else tuple(continuation),
                sampling=None if sampling is None else Sampling(**{**sampling, "until": tuple(sampling["until"])}),
            )
        )
    return Prepared(read_json(folder / "task.json"), read_questions(folder), asks)


def _row(ask: Ask) -> dict[str, Any]:
    return vars(ask) | {"sampling": None if ask.sampling is None else asdict(ask.sampling)}


def read_questions(folder: Path) -> list[Question]:
    """The questions alone."""
    return [Question(**row) for row in read_samples(folder / "docs.jsonl.zst") or []]


def plain(value: Any) -> Any:
    """`value` as JSON knows it; TypeError for what it does not."""
    return json.loads(json.dumps(value, allow_nan=False))
