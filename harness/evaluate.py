"""What an answer is worth: lm-eval's tasks, filters and metrics over recorded answers. With `prompts`, all that imports lm_eval.

lm-eval scores one sample at a time; what is missing is left out before it, what is incomplete is set after it, aggregates and
errors are ours. A task's documents are those that were prepared: nothing is read or shuffled again.
"""

from __future__ import annotations

import logging
import math
import random
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.metrics import mean
from lm_eval.api.task import ConfigurableTask, Task
from lm_eval.tasks import TaskManager

from harness.errors import HarnessError, TaskError
from harness.models import mirror_folder
from harness.prepared import Question, plain
from harness.stats import INVALID
from harness.task_files import TASKS_FOLDER, is_ours
from harness.task_settings import ResolvedTask
from harness.thinking import split_thinking

_LENGTHS = "aggregate_metrics"
"""The aggregation of ruler, for which a metric of -1 is a length that a question does not have."""


@dataclass(frozen=True)
class Scored:
    """A row a question and repeat; by metric, whether more is better, and how a value for the task is made of those of samples."""

    rows: list[dict[str, Any]]
    aggregations: dict[str, Callable[[list[Any]], Any] | None]


def score(asking: ResolvedTask, about: dict[str, Any], questions: list[Question], answers: list[dict[str, Any]]) -> Scored:
    """Score the recorded answers of a prepared task.

    Args:
        answers: a row a (question, repeat), with "doc", "repeat", "response": texts or [log probability, is greedy] pairs in the
            order of the question's requests (`draws` texts for each of them), "finish_reason", and "missing": why there is none.
    """
    tasks = load_tasks(asking, asking.metadata, {name: [q for q in questions if q.subtask == name] for name in about["draws"]})
    by_doc = {question.doc: question for question in questions}
    rows: list[dict[str, Any]] = []
    aggregations: dict[str, Callable[[list[Any]], Any] | None] = {}
    for name, task in tasks.items():
        mine = [row for row in answers if by_doc[row["doc"]].subtask == name]
        scored: list[dict[str, Any]] = []
        for repeat in sorted({row["repeat"] for row in mine}):
            scored += _score_repeat(task, asking, by_doc, [row for row in mine if row["repeat"] == repeat])
        given = dict.fromkeys(key for row in scored for key in row["metrics"]) or dict.fromkeys(metric_names(task))
        for row in scored:
            row["metrics"] = {key: row["metrics"].get(key) for key in given if row["metrics"] == {} or key in row["metrics"]}
        rows += scored
        for metric, function in task.aggregation().items():
            for key in {key for row in rows for key in row["metrics"] if key.partition(",")[0] == metric}:
                aggregations.setdefault(key, None if function is mean else function)
    rows.sort(key=lambda row: (row["doc"], row["repeat"]))
    return Scored(rows, aggregations)


def metric_names(task: Task) -> list[str]:
    """What the figures of a task are called: its metrics, with the filter where it has several."""
    filters = [each.name for each in task._filters]
    return [metric if len(filters) == 1 else f"{metric},{name}" for name in filters for metric in task.aggregation()]


def _score_repeat(
    task: Task, asking: ResolvedTask, by_doc: dict[int, Question], answers: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The rows of one repeat of one subtask."""
    is_text = task.OUTPUT_TYPE == "generate_until"
    better = task.higher_is_better()
    stated = (task.config.metadata or {}).get("stated")
    found: list[dict[str, Any]] = []
    instances: list[Instance] = []
    members: dict[int, list[Instance]] = {}
    for row in answers:
        question = by_doc[row["doc"]]
        split = (
            [split_thinking(text, asking.thinking, tuple(row["stops"])) for text in row["response"] or ()] if is_text else []
        )
        scored = {
            "doc": row["doc"],
            "subtask": question.subtask,
            "repeat": row["repeat"],
            "answer": {},
            "metrics": {},
            "is_truncated": "length" in (row["finish_reason"] or ()) if is_text else None,
            "is_incomplete": any(part.is_open for part in split) if is_text else None,
        }
        found.append(scored)
        if row["missing"] is not None:
            scored |= {"is_truncated": None, "is_incomplete": None}
            continue
        given = [[part.answer for part in split]] if is_text else [[tuple(pair)] for pair in row["response"]]
        if task.OUTPUT_TYPE == "loglikelihood_rolling":
            given = [[pair[0] for pair in values] for values in given]
        members[row["doc"]] = [
            Instance(str(task.OUTPUT_TYPE), question.fields, ("", {}), index, (asking.name, row["doc"], 1), resps=values)
            for index, values in enumerate(given)
        ]
        instances += members[row["doc"]]
    if not instances:
        return found
    task._instances = instances
    task.apply_filters()
    filters = list(instances[0].filtered_resps)
    for scored in found:
        mine = members.get(scored["doc"], [])
        for name in filters if mine else ():
            values = [instance.filtered_resps[name] for instance in mine]
            if is_text:
                scored["answer"][name] = values[0] if isinstance(values[0], str) else plain(values[0])
            try:
                metrics = task.process_results(by_doc[scored["doc"]].fields, values)
            except Exception as error:
                raise TaskError(
                    f"task {asking.name}, question {scored['doc']}: its scorer failed ({type(error).__name__}); run it by hand on that "
                    "question, with the response that harness inspect shows"
                ) from error
            for metric, value in metrics.items():
                key = metric if len(filters) == 1 else f"{metric},{name}"
                if value == -1 and getattr(task.aggregation().get(metric), "__name__", "") == _LENGTHS:
                    continue
                scored["metrics"][key] = _number(value)
                if isinstance(scored["metrics"][key], float) and not math.isfinite(scored["metrics"][key]):
                    raise TaskError(f"task {asking.name}, question {scored['doc']}: its scorer gave {metric} = {value}")
        if is_text and mine:
            given_answers = [str(response) for instance in mine for response in instance.resps]
            states_none = stated is not None and not any(re.search(stated, each) for each in given_answers)
            _settle_incomplete(scored, better, states_none)
    return found


def _settle_incomplete(row: dict[str, Any], better: dict[str, bool], states_none: bool) -> None:
    """Thinking that never closed, and an answer that was cut before it came, score 0 in whatever is better when higher.

    states_none: the text lacks what the task's metadata call `stated`, how an answer is given that is more than the last number or
    letter in sight: of a text that was cut, that one was read in the midst of its reasoning.
    """
    invalid = states_none or (bool(row["answer"]) and all(answer == INVALID for answer in row["answer"].values()))
    row["is_incomplete"] |= row["is_truncated"] and (invalid or row["metrics"].get("unparsed") == 1.0)
    if row["is_incomplete"]:
        for key in row["metrics"]:
            if better.get(key.partition(",")[0], True):
                row["metrics"][key] = _zeroed(row["metrics"][key])


def _zeroed(value: Any) -> Any:
    """0 for every number of a figure, such as those of each instruction of one question; texts stay what was scored."""
    if isinstance(value, list):
        return [_zeroed(each) for each in value]
    return 0.0 if isinstance(value, float) else value


def _number(value: Any) -> Any:
    """A sample's figure as JSON: numbers and booleans as float, what an aggregation of lm-eval's takes as lists."""
    if isinstance(value, bool | int | float | np.number | np.bool_):
        return float(value)
    if isinstance(value, np.ndarray):
        return value.tolist()
    return [_number(each) for each in value] if isinstance(value, list | tuple) else value


def load_tasks(
    asking: ResolvedTask, metadata: dict[str, Any], docs: dict[str, list[Question]] | None = None
) -> dict[str, Task]:
    """The task, or the tasks of a group, by name; with `docs`, those are their documents and no data are read."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    ours = is_ours(asking.name) and asking.path is None
    folder = TASKS_FOLDER if asking.path is None else asking.path if asking.path.is_dir() else asking.path.parent
    spec = str(asking.path) if asking.path is not None and asking.path.is_file() else asking.name
    try:
        manager = TaskManager(include_path=[str(folder)], include_defaults=not ours and asking.path is None, metadata=metadata)
    except Exception as error:
        raise TaskError(
            f"task {asking.name}: {folder} cannot be read ({type(error).__name__}: {_first_line(error)})"
        ) from error
    if spec == asking.name and asking.name not in manager.all_tasks:
        near = get_close_matches(asking.name, manager.all_tasks, n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        where = f"in {asking.path}" if asking.path else "here or in lm-eval"
        raise TaskError(f"task {asking.name}: there is no such task {where}{hint}")
    with known_random_state(), _data_given(docs):
        try:
            found = manager.load([spec])
        except HarnessError:
            raise
        except Exception as error:
            raise TaskError(f"task {asking.name}: cannot be read ({type(error).__name__}: {_first_line(error)})") from error
    names = [*found["tasks"], *found.get("groups", ())]
    if spec != asking.name and asking.name not in names:
        raise TaskError(
            f"task {asking.name}: there is no such task in {asking.path}; it holds {', '.join(map(str, names)) or 'none'}"
        )
    return dict(found["tasks"])


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]


@contextmanager
def known_random_state() -> Iterator[None]:
    """lm-eval's tasks may draw from the global generators: they find the same state everywhere, and leave none behind."""
    states = random.getstate(), np.random.get_state()
    random.seed(0)
    np.random.seed(1234)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


@contextmanager
def _data_given(docs: dict[str, list[Question]] | None) -> Iterator[None]:
    """While tasks are built, give them their prepared documents; without any, let them read their data from the mirror before the hub."""
    download = ConfigurableTask.download

    def give(task: ConfigurableTask, docs: dict[str, list[Question]]) -> None:
        rows = [question.fields for question in docs.get(str(task.config.task), [])]
        config = task.config
        splits = {config.test_split, config.validation_split, config.training_split, config.fewshot_split} - {None}
        task.dataset = dict.fromkeys(splits, _Rows(rows))
        config.process_docs = None

    def read(task: ConfigurableTask, *arguments: Any, **options: Any) -> None:
        if docs is not None:
            give(task, docs)
            return
        mirror = mirror_folder(task.DATASET_PATH) if task.DATASET_PATH else None
        if mirror is not None:
            task.DATASET_PATH = str(mirror)
        download(task, *arguments, **options)

    ConfigurableTask.download = read
    try:
        yield
    finally:
        ConfigurableTask.download = download


class _Rows(list[dict[str, Any]]):
    """A list of documents where lm-eval looks for a datasets.Dataset."""

    @property
    def features(self) -> dict[str, None]:
        return dict.fromkeys(self[0]) if self else {}
