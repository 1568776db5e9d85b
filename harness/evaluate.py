"""What an answer is worth: lm-eval's tasks, filters and metrics over recorded answers. With `prompts`, all that imports lm_eval.

lm-eval scores one sample at a time; what is missing is left out before it, what is incomplete is set after it, aggregates and
errors are ours. A task's documents are those that were prepared: nothing is read or shuffled again.
"""

from __future__ import annotations

import glob
import logging
import math
import random
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import UndefinedError
from lm_eval.api.instance import Instance
from lm_eval.api.metrics import mean
from lm_eval.api.task import ConfigurableTask, Task
from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import Entry, Kind

from harness.errors import HarnessError, TaskError
from harness.hub import reading_hub
from harness.models import mirror_folder
from harness.picture_documents import leave_packed
from harness.prepared import Question, plain
from harness.stats import INVALID
from harness.task_files import TASKS_FOLDER, is_ours, metadata_of, strings_in
from harness.task_settings import ResolvedTask
from harness.thinking import Split, split_thinking

_CODE_BENCHMARKS = re.compile(r"live_?code_?bench|sci_?code|big_?code_?bench|humaneval|mbpp", re.IGNORECASE)
"""Names of benchmarks of code, also such as lm-eval has no task of."""
_FILE_FORMATS = ("json", "csv", "parquet", "text")
"""The dataset_path of a task whose rows are in files of its own."""
_LENGTHS = "aggregate_metrics"
"""The aggregation of ruler, for which a metric of -1 is a length that a question does not have."""


@dataclass(frozen=True)
class Scored:
    """A row a question and repeat; by metric, how a value for the task is made of those of samples, and whether more is better."""

    rows: list[dict[str, Any]]
    aggregations: dict[str, Callable[[list[Any]], Any] | None]
    higher_is_better: dict[str, bool | None]


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
    higher_is_better: dict[str, bool | None] = {}
    for name, task in tasks.items():
        mine = [row for row in answers if by_doc[row["doc"]].subtask == name]
        scored: list[dict[str, Any]] = []
        for repeat in sorted({row["repeat"] for row in mine}):
            with known_random_state():  # scorers that guess where an answer names no option
                scored += _score_repeat(task, asking, by_doc, [row for row in mine if row["repeat"] == repeat])
        given = dict.fromkeys(key for row in scored for key in row["metrics"]) or dict.fromkeys(metric_names(task))
        for row in scored:
            row["metrics"] = {key: row["metrics"].get(key) for key in given if row["metrics"] == {} or key in row["metrics"]}
        rows += scored
        for metric, function in task.aggregation().items():
            for key in {key for row in rows for key in row["metrics"] if key.partition(",")[0] == metric}:
                aggregations.setdefault(key, None if function is mean else function)
                higher_is_better.setdefault(key, _is_better(task, metric))
    rows.sort(key=lambda row: (row["doc"], row["repeat"]))
    return Scored(rows, aggregations, higher_is_better)


def _is_better(task: Task, metric: str) -> bool | None:
    """Whether more of a metric is better; None where the task does not say so with a plain yes or no."""
    said = task.higher_is_better().get(metric)
    return said if isinstance(said, bool) else None


def metric_names(task: Task) -> list[str]:
    """What the figures of a task are called: its metrics, with the filter where it has several."""
    filters = [each.name for each in task._filters]
    return [metric if len(filters) == 1 else f"{metric},{name}" for name in filters for metric in task.aggregation()]


def _score_repeat(
    task: Task, asking: ResolvedTask, by_doc: dict[int, Question], answers: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The rows of one repeat of one subtask."""
    found = [_unscored(task, asking, by_doc[row["doc"]], row) for row in answers]
    instances = {row["doc"]: _instances(task, asking, by_doc[row["doc"]], row) for row in answers if row["missing"] is None}
    task._instances = [instance for mine in instances.values() for instance in mine]
    if not task._instances:
        return found
    task.apply_filters()
    for scored in found:
        mine = instances.get(scored["doc"])
        if not mine:
            continue
        for name in mine[0].filtered_resps:
            _score_sample(task, asking, by_doc[scored["doc"]], scored, name, mine)
        if _is_text(task):
            stated = (task.config.metadata or {}).get("stated")
            texts = [str(response) for instance in mine for response in instance.resps]
            states_none = stated is not None and not any(re.search(stated, text) for text in texts)
            _settle_incomplete(scored, task.higher_is_better(), states_none)
    return found


def _is_text(task: Task) -> bool:
    return bool(task.OUTPUT_TYPE == "generate_until")


def _split(asking: ResolvedTask, row: dict[str, Any]) -> list[Split]:
    """The texts of an answer, each parted into thinking and answer."""
    return [split_thinking(text, asking.thinking, tuple(row["stops"])) for text in row["response"] or ()]


def _unscored(task: Task, asking: ResolvedTask, question: Question, row: dict[str, Any]) -> dict[str, Any]:
    """What is known of an answer before it is scored; of one that is missing, or no text, nothing of how it ended."""
    has_end = _is_text(task) and row["missing"] is None
    return {
        "doc": row["doc"],
        "subtask": question.subtask,
        "repeat": row["repeat"],
        "answer": {},
        "metrics": {},
        "is_truncated": "length" in (row["finish_reason"] or ()) if has_end else None,
        "is_incomplete": any(part.is_open for part in _split(asking, row)) if has_end else None,
    }


def _instances(task: Task, asking: ResolvedTask, question: Question, row: dict[str, Any]) -> list[Instance]:
    """lm-eval's requests of a question, with what was answered to each."""
    if _is_text(task):
        given: list[list[Any]] = [[part.answer for part in _split(asking, row)]]
    elif task.OUTPUT_TYPE == "loglikelihood_rolling":
        given = [[pair[0]] for pair in row["response"]]
    else:
        given = [[tuple(pair)] for pair in row["response"]]
    return [
        Instance(str(task.OUTPUT_TYPE), question.fields, ("", {}), index, (asking.name, row["doc"], 1), resps=values)
        for index, values in enumerate(given)
    ]


def _score_sample(
    task: Task, asking: ResolvedTask, question: Question, scored: dict[str, Any], name: str, instances: list[Instance]
) -> None:
    """Write into `scored` what the filter `name` extracted, and every metric of that; TaskError for a scorer that fails."""
    values = [instance.filtered_resps[name] for instance in instances]
    if _is_text(task):
        scored["answer"][name] = values[0] if isinstance(values[0], str) else plain(values[0])
    try:
        metrics = task.process_results(question.fields, values)
    except Exception as error:
        raise TaskError(
            f"task {asking.name}, question {scored['doc']}: its scorer failed ({type(error).__name__}); run it by hand on that "
            "question, with the response that harness inspect shows"
        ) from error
    for metric, value in metrics.items():
        if value == -1 and getattr(task.aggregation().get(metric), "__name__", "") == _LENGTHS:
            continue
        number = _number(value)
        if isinstance(number, float) and not math.isfinite(number):
            raise TaskError(f"task {asking.name}, question {scored['doc']}: its scorer gave {metric} = {value}")
        scored["metrics"][metric if len(instances[0].filtered_resps) == 1 else f"{metric},{name}"] = number


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
    ours = is_ours(asking.own_name) and asking.path is None
    folder = TASKS_FOLDER if asking.path is None else asking.path if asking.path.is_dir() else asking.path.parent
    spec = str(asking.path) if asking.path is not None and asking.path.is_file() else asking.own_name
    try:
        manager = TaskManager(include_path=[str(folder)], include_defaults=not ours and asking.path is None, metadata=metadata)
    except Exception as error:
        raise TaskError(
            f"task {asking.name}: {folder} cannot be read ({type(error).__name__}: {_first_line(error)})"
        ) from error
    _require_no_code(asking.own_name, manager.task_index)
    if spec == asking.own_name and asking.own_name not in manager.all_tasks:
        near = get_close_matches(asking.own_name, manager.all_tasks, n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        where = f"in {asking.path}" if asking.path else "here or in lm-eval"
        raise TaskError(f"task {asking.name}: there is no such task {where}{hint}")
    reads_hub = docs is None and not (ours and "dataset" not in metadata_of(asking.own_name))
    with known_random_state(), _data_given(docs) as begun:
        try:
            with reading_hub() if reads_hub else nullcontext():
                found = manager.load([spec])
        except HarnessError:
            raise
        except UndefinedError as error:
            raise TaskError(_missing_column(asking.name, error, begun)) from error
        except Exception as error:
            raise TaskError(f"task {asking.name}: cannot be read ({type(error).__name__}: {_first_line(error)})") from error
    names = [*found["tasks"], *found.get("groups", ())]
    if spec != asking.own_name and asking.own_name not in names:
        raise TaskError(
            f"task {asking.name}: there is no such task in {asking.path}; it holds {', '.join(map(str, names)) or 'none'}"
        )
    return dict(found["tasks"])


def runs_code(name: str) -> TaskError:
    """The error for a task that runs what a model wrote."""
    return TaskError(
        f"task {name}: runs code that a model wrote, which needs a sandbox that is not here; score it elsewhere and bring the "
        "results with `harness import`"
    )


def _require_no_code(name: str, index: Mapping[str, Entry]) -> None:
    """TaskError for a task that runs code of a model, or a group that has one: before its own code is imported, which may load a scorer."""
    entry = index.get(name)
    about = entry.cfg or {} if entry is not None else {}
    if about.get("unsafe_code") or (entry is None and _CODE_BENCHMARKS.search(name)):
        raise runs_code(name)
    members = about.get("task") if entry is not None and entry.kind is Kind.GROUP else None
    for member in [
        *(members if isinstance(members, list) else ()),
        *(entry.tags if entry is not None and entry.kind is Kind.TAG else ()),
    ]:
        _require_no_code(member if isinstance(member, str) else str(member.get("task") or member.get("group")), index)


def _missing_column(name: str, error: UndefinedError, begun: list[Task]) -> str:
    """What to say where the template of the task that was begun last names what its documents lack."""
    named = re.match("'(.+)' is undefined", _first_line(error))
    columns = ", ".join(next(iter(begun[-1].eval_docs), {})) if begun else ""
    if named is None or not columns:
        return f"task {name}: its template cannot be filled in ({_first_line(error)})"
    return f"task {name}: its template names {named[1]}, which no column is; columns: {columns}"


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
def _data_given(docs: dict[str, list[Question]] | None) -> Iterator[list[Task]]:
    """While tasks are built, give them their prepared documents; without any, let them read their data from the mirror before the hub.

    The list holds the tasks whose data were asked for so far.
    """
    download = ConfigurableTask.download
    begun: list[Task] = []

    def give(task: ConfigurableTask, docs: dict[str, list[Question]]) -> None:
        rows = [question.fields for question in docs.get(str(task.config.task), [])]
        config = task.config
        splits = {config.test_split, config.validation_split, config.training_split, config.fewshot_split} - {None}
        task.dataset = dict.fromkeys(splits, _Rows(rows))
        config.process_docs = None

    def read(task: ConfigurableTask, *arguments: Any, **options: Any) -> None:
        begun.append(task)
        if docs is not None:
            give(task, docs)
            return
        _require_files(task)
        mirror = mirror_folder(task.DATASET_PATH) if task.DATASET_PATH else None
        if mirror is not None:
            task.DATASET_PATH = str(mirror)
        download(task, *arguments, **options)
        leave_packed(task)

    ConfigurableTask.download = read
    try:
        yield begun
    finally:
        ConfigurableTask.download = download


def _require_files(task: ConfigurableTask) -> None:
    """TaskError for a file of rows that the task names and that is not there: where it was looked for is not in what datasets says."""
    for name in strings_in((task.config.dataset_kwargs or {}).get("data_files")):
        if (
            task.DATASET_PATH in _FILE_FORMATS
            and "://" not in name
            and not glob.glob(str(Path(name).expanduser()), recursive=True)
        ):
            raise TaskError(
                f"task {task.config.task}: dataset_kwargs.data_files: {name}: there is no such file; looked for {Path(name).absolute()} "
                "(relative paths are relative to the current directory)"
            )


class _Rows(list[dict[str, Any]]):
    """A list of documents where lm-eval looks for a datasets.Dataset."""

    @property
    def features(self) -> dict[str, None]:
        return dict.fromkeys(self[0]) if self else {}
