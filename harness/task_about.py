"""What a prepared task says of itself and of its questions: version, metrics, origin, digests, clusters. No lm_eval of its own."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from harness.errors import TaskError
from harness.evaluate import metric_names
from harness.prepared import Question, question_digest

TRAPS = {
    "mmmu": "lm-eval's scorer takes an option by chance where an answer names none, right one time in four; the task mmmu here does not",
    "pisa": "lm-eval's file gives an answer 256 tokens, and pisa_*_llm_judged asks a service over the network while it scores",
}
"""What to know of lm-eval's own tasks that show pictures, by how their names begin."""


def shuffles(name: object) -> str:
    """The note of a task whose documents come in another order each time."""
    return f"{name} shuffles without a seed of its own: one draw is kept here and scored, plain lm-eval may score another"


def question_of(
    task: Any,
    doc: int,
    given: dict[str, Any],
    fields: dict[str, Any],
    is_stock: bool,
    *,
    pictures: Sequence[str] = (),
    lacking: str | None = None,
) -> Question:
    """A document as a question. Of lm-eval's own tasks no field has a meaning to us, whatever a data set calls its columns.

    given: the document as the task's functions take it; fields: as plain data. pictures: digests of those that it asks about, which
    belong to the question; questions about one picture err together. lacking: why it cannot be asked.
    """
    said = {} if is_stock else fields
    source = said.get("source_question")
    if source is None:
        text = task.doc_to_decontamination_query(given) if task.should_decontaminate() else task.doc_to_text(given)
        source = " ".join([str(text), *pictures])
    return Question(
        doc=doc,
        subtask=str(task.config.task),
        question=question_digest(str(source)),
        cluster=str(said.get("cluster", pictures[0] if pictures else doc)),
        target=str(task.doc_to_target(given)),
        fields=fields,
        excluded=said.get("excluded") or lacking,
    )


def origin_of(task: Any) -> str:
    """Where the rows are from and how they were checked, by the word of our own tasks."""
    return str(getattr(getattr(task.eval_docs, "info", None), "description", None) or "")


def about_part(task: Any, chat: bool) -> dict[str, Any]:
    metadata = {k: v for k, v in (task.config.metadata or {}).items() if k not in ("pretrained", "tokenizer")}
    names = metric_names(task)
    primary = metadata.get("primary", names[0])
    if primary not in names:
        raise TaskError(f"task {task.config.task}: metadata.primary: found {primary!r}; allowed: {', '.join(names)}")
    if "stated" in metadata:
        try:
            re.compile(metadata["stated"])
        except (re.error, TypeError) as error:
            raise TaskError(
                f"task {task.config.task}: metadata.stated: {metadata['stated']!r} is no pattern ({error})"
            ) from error
    return {
        "name": str(task.config.task),
        "version": str(metadata.get("version", "unknown")),
        "output_type": task.OUTPUT_TYPE,
        "metrics": names,
        "primary": primary,
        "publishable": metadata.get("publishable") is True,
        "judge": metadata.get("judge") is True,
        "is_chat": chat,
        "metadata": metadata,
    }


def about_task(name: str, parts: list[dict[str, Any]]) -> dict[str, Any]:
    """What a group says of itself: a metric stands for it that all of its parts have, and it is published if all of them are."""
    primary = parts[0]["primary"]
    if any(primary not in part["metrics"] for part in parts):
        raise TaskError(f"task {name}: its parts have no metric {primary} in common; ask for them one by one")
    return {
        **parts[0],
        "name": name,
        "version": "+".join(sorted({part["version"] for part in parts})),
        "primary": primary,
        "publishable": all(part["publishable"] for part in parts),
        "parts": {part["name"]: part["version"] for part in parts},
    }
