"""How much a plan asks and generates: requests, tokens of answers at most. No torch."""

from __future__ import annotations

from typing import Any

from harness.done import find_done
from harness.outline import n_requests as of_mini_task
from harness.plan import Stage
from harness.records import read_json
from harness.store import Store
from harness.task_files import config_of, gives_answers, is_ours, metadata_of
from harness.task_settings import ResolvedTask
from harness.tasks.sizes import MINI_TASKS

PROMPT_TOKENS = 1024
"""Tokens of a prompt. Assumed: prompts are rendered only when a task is prepared."""
LONG_PROMPTS = {"aa_lcr": 113_300}
"""Tasks whose prompts are longer than that by far: tokens of one, the mean as counted of all its rows (LOG.md)."""


def n_requests(prepared: Stage, store: Store) -> int | None:
    """How many requests a task makes once: as prepared, by its file, or None where nothing says it yet."""
    task = prepared.task
    assert task is not None
    found = find_done(prepared, store)
    if found is not None:
        return int(read_json(found.folder / "task.json")["n_requests"])
    if task.path is not None:
        return None
    if task.name in MINI_TASKS:
        return of_mini_task(task.name, task.limit)
    rows = metadata_of(task.name).get("n_rows")
    return None if rows is None else min(int(rows), task.limit or int(rows))


def new_tokens(task: ResolvedTask) -> int | None:
    """Tokens of an answer at most; 0 where likelihoods are compared, None where only the task's own file in another place says it."""
    if gives_answers(task.name, task.path) is False:
        return 0
    given: Any = task.sampling.get("max_tokens")
    if given is None and task.path is None and is_ours(task.name):
        given = (config_of(task.name).get("generation_kwargs") or {}).get("max_gen_toks")
    return None if given is None else int(given)


def prompt_tokens(task: ResolvedTask) -> int:
    """Tokens of a prompt of a task, as far as they are known before it is prepared."""
    return PROMPT_TOKENS if task.path is not None else LONG_PROMPTS.get(task.own_name, PROMPT_TOKENS)
