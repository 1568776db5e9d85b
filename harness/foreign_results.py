"""Per-question results as other tools write them, row by row, in one form. No torch, no lm_eval.

lm-eval         samples_<task>_<date>.jsonl: a row a (document, filter), a field a metric
nemo-skills     output-rs<seed>.jsonl, output.jsonl: a row a question, a file a repeat
nemo-evaluator  results.jsonl: a row a (problem, repeat) with its reward
vlmevalkit      .xlsx, .tsv, .csv or .jsonl of a scored run: a row a question, with `hit`
"""

from __future__ import annotations

import csv
import json
import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.errors import DataError
from harness.xlsx import read_xlsx

_STATED = ("problem_statement", "goal")
_TEXT_FIELDS = ("source_question", "question", "problem", "query", "question_content", "Question", "Problem", *_STATED)
"""Where tools put the source question."""
_ID_FIELDS = ("id", "task_id", "question_id", "problem_id", "problem_idx", "index", "doc_id")
_JUDGED = re.compile(r"\*{0,2}Judgement\*{0,2}\s*:\s*\**\s*(yes|no)\b", re.IGNORECASE)


@dataclass(frozen=True)
class ForeignRow:
    """One response as another tool scored it.

    where: file and line. text: the source question. identity: what the tool knows the question by. scores: by metric, None where no
    score was given. cluster: questions that err together.
    """

    where: str
    text: str | None
    identity: str | None
    scores: dict[str, float | None]
    cluster: str | None = None
    repeat: int = 0
    seed: int | None = None
    prompt: str | None = None
    response: str | None = None
    target: str | None = None
    answer: dict[str, str] = field(default_factory=dict)
    finish_reason: str | None = None
    n_tokens: int | None = None
    seconds: float | None = None
    missing: str | None = None


@dataclass(frozen=True)
class Foreign:
    """All rows of some files of one tool.

    primary: its own headline metric. about: versions, model and date where they are known. is_partial: whether it says that it asked the
    first questions only. higher_is_better: of the metrics of which it says so.
    """

    tool: str
    rows: list[ForeignRow]
    primary: str
    about: dict[str, str]
    is_partial: bool = False
    higher_is_better: dict[str, bool] = field(default_factory=dict)


def read_foreign(paths: list[Path], tool: str = "auto") -> Foreign:
    """The results in these files. DataError that names file and line of what is missing, damaged or not understood."""
    tables = {path: _table(path) for path in sorted(paths, key=_in_order)}
    for path, table in tables.items():
        if not table:
            raise DataError(f"{path}: holds no row; give the per-question results of a finished evaluation")
    found = {path: _tool_of(path, table[0][1]) if tool == "auto" else tool for path, table in tables.items()}
    if len(set(found.values())) > 1:
        kinds = ", ".join(f"{path.name} of {kind}" for path, kind in found.items())
        raise DataError(f"files of several tools: {kinds}; import one tool's at a time")
    tool = next(iter(found.values()))
    seeds = list(dict.fromkeys(_seed(path) for path in tables))  # chunks of one repeat share its seed
    rows = [row for path, table in tables.items() for row in _READERS[tool](path, seeds.index(_seed(path)), table)]
    names = list(dict.fromkeys(name for row in rows for name in row.scores))
    for row in rows:
        lacking = [name for name in names if name not in row.scores]
        if lacking and row.missing is None:
            raise DataError(f"{row.where}: has no {lacking[0]}, which other rows have; was the scoring interrupted?")
    preferred = [name for name in _PRIMARY.get(tool, ()) if name in names]
    about, is_partial, better = _about(tool, next(iter(tables)))
    known = {name: better[metric] for name in names if (metric := name.partition(",")[0]) in better}
    return Foreign(tool, rows, (preferred or names)[0], about, is_partial, known)


def _table(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """(where, row) of a file of any of the forms."""
    try:
        if path.suffix == ".xlsx":
            return [(f"{path}: row {n}", row) for n, row in enumerate(read_xlsx(path), start=2)]
        if path.suffix in (".tsv", ".csv"):
            csv.field_size_limit(sys.maxsize)
            with path.open(encoding="utf-8-sig", newline="") as file:
                reader = csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ",")
                return [(f"{path}: row {n}", _typed(row)) for n, row in enumerate(reader, start=2)]
        with path.open(encoding="utf-8") as file:
            return [(f"{path}: line {n}", _json(path, n, line)) for n, line in enumerate(file, start=1) if line.strip()]
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); give the file with per-question results") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read ({error}); give the file with per-question results") from error


def _json(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{path}: line {number} is no JSON ({error}); is the file cut short?") from error
    if not isinstance(row, dict):
        raise DataError(f"{path}: line {number} is no JSON object; give the file with per-question results")
    return row


def _typed(row: dict[str, Any]) -> dict[str, Any]:
    """Cells of a text table: empty ones are left out; those with a score are read as numbers or truth values."""
    kept = {name: value for name, value in row.items() if name is not None and value not in (None, "")}
    for name in {"hit", "eval_score"} & kept.keys():
        lowered = str(kept[name]).lower()
        if lowered in ("true", "false"):
            kept[name] = lowered == "true"
        elif re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", lowered):
            kept[name] = float(lowered)
    return kept


def _tool_of(path: Path, row: dict[str, Any]) -> str:
    keys = row.keys()
    if {"doc_id", "doc", "resps"} <= keys:
        return "lm-eval"
    if {"problem_idx", "reward"} <= keys:
        return "nemo-evaluator"
    if "generation" in keys:
        return "nemo-skills"
    if "prediction" in keys and keys & {"hit", "eval_score"}:
        return "vlmevalkit"
    known = ", ".join(_READERS)
    raise DataError(
        f"{path}: not per-question results of a known tool, its first row has {', '.join(list(keys)[:12]) or 'nothing'}; say which with "
        f"--format. Known: {known}"
    )


def _lm_eval(path: Path, number: int, table: list[tuple[str, dict[str, Any]]]) -> list[ForeignRow]:
    """One row a document, its metrics of all filters together, named as lm-eval names them where there are several."""
    filters = list(dict.fromkeys(str(row.get("filter", "none")) for _, row in table))
    found: dict[str, ForeignRow] = {}
    seen: set[tuple[str, str]] = set()
    for where, row in table:
        name, identity = str(row.get("filter", "none")), str(_need(row, "doc_id", where))
        if (identity, name) in seen:
            raise DataError(f"{where}: document {identity} is there a second time; give one run's file")
        seen.add((identity, name))
        doc, metrics = row.get("doc"), _list(row, "metrics", str, where)
        texts = _texts(row.get("resps"))
        first = found.setdefault(
            identity,
            ForeignRow(
                where=where,
                text=_first_text(doc if isinstance(doc, dict) else {}),
                identity=str(row.get("doc_hash", identity)),
                scores={},
                cluster=_cluster(doc if isinstance(doc, dict) else {}),
                prompt=_prompt(row.get("arguments"), where),
                response=texts[0] if len(texts) == 1 else None,
                target=_string(row.get("target")),
            ),
        )
        extracted = _texts(row.get("filtered_resps"))
        if len(extracted) == 1:
            first.answer[name] = extracted[0]
        for metric in metrics:
            key = metric if len(filters) == 1 else f"{metric},{name}"
            first.scores[key] = _score(_need(row, metric, where), metric, where)
    return list(found.values())


def _prompt(arguments: Any, where: str) -> str | None:
    if not isinstance(arguments, dict) or not arguments:
        return None
    first = arguments.get("gen_args_0")
    if not isinstance(first, dict):
        raise DataError(f"{where}: arguments.gen_args_0 is {str(first)[:40]!r}, no object; give the file as lm-eval wrote it")
    return _string(first.get("arg_0"))


def _nemo_skills(path: Path, number: int, table: list[tuple[str, dict[str, Any]]]) -> list[ForeignRow]:
    return [
        ForeignRow(
            where=where,
            text=_first_text(row),
            identity=_first_id(row),
            scores=_skills_scores(row, where),
            cluster=_cluster(row),
            repeat=number,
            seed=_seed(path),
            response=_string(row.get("generation")),
            target=_string(row.get("expected_answer")),
            answer=_extracted(row, "predicted_answer"),
            finish_reason=_string(row.get("finish_reason")),
            n_tokens=row["num_generated_tokens"] if isinstance(row.get("num_generated_tokens"), int) else None,
        )
        for where, row in table
    ]


def _skills_scores(row: dict[str, Any], where: str) -> dict[str, float | None]:
    scores: dict[str, float | None] = {}
    if isinstance(row.get("judgement"), str):
        scores["judge_correct"] = _judged(row["judgement"], where)
    for name in ("symbolic_correct", "is_correct", "is_correct-plus", "passed"):
        if row.get(name) is not None:
            scores[name] = _score(row[name], name, where)
    if row.get("graded_list"):
        scores["accuracy"] = _score(_list(row, "graded_list", object, where)[0], "graded_list", where)
    if row.get("eval_status"):
        solved = [part.get("process_status") == "completed" for part in _list(row, "eval_status", dict, where)]
        scores |= {"problem_accuracy": float(all(solved)), "subtask_share": sum(solved) / len(solved)}
    if not scores:
        raise DataError(
            f"{where}: holds no score (judgement, symbolic_correct, is_correct, graded_list, eval_status, passed); "
            "give the file that the evaluation wrote, not the one of the generation alone"
        )
    return scores


def _judged(judgement: str, where: str) -> float:
    found = _JUDGED.search(judgement)
    verdict = found.group(1).lower() if found else judgement.strip().rstrip(".").upper()
    known = {"yes": 1.0, "no": 0.0, "CORRECT": 1.0, "INCORRECT": 0.0}
    if verdict not in known:
        raise DataError(
            f"{where}: judgement is neither Yes nor No, CORRECT nor INCORRECT: {judgement.strip()[:60]!r}; judge it again, or remove it"
        )
    return known[verdict]


def _nemo_evaluator(path: Path, number: int, table: list[tuple[str, dict[str, Any]]]) -> list[ForeignRow]:
    found = []
    for where, row in table:
        details = row.get("scoring_details") if isinstance(row.get("scoring_details"), dict) else {}
        failure = details.get("error_category") if details else None
        metadata = row.get("metadata") if isinstance(row.get("metadata"), dict) else {}
        is_missing = failure in ("infra_error", "system")  # it writes reward 0 for a response that never came
        latency = row.get("latency_ms")
        found.append(
            ForeignRow(
                where=where,
                text=_first_text({**(metadata or {}), **row}),
                identity=str(_need(row, "problem_idx", where)),
                scores={"reward": None if is_missing else _score(_need(row, "reward", where), "reward", where)},
                cluster=_cluster(metadata or {}),
                repeat=_count(row.get("repeat", 0), "repeat", where),
                response=_string(row.get("model_response")),
                target=_string(row.get("expected_answer")),
                answer=_extracted(row, "extracted_answer"),
                seconds=latency / 1000 if isinstance(latency, int | float) and latency else None,
                missing=f"{failure} in NeMo Evaluator" if is_missing else None,
            )
        )
    return found


def _vlmevalkit(path: Path, number: int, table: list[tuple[str, dict[str, Any]]]) -> list[ForeignRow]:
    metric = "hit" if "hit" in table[0][1] else "eval_score"
    return [
        ForeignRow(
            where=where,
            text=_first_text(row),
            identity=_first_id(row),
            scores={metric: _score(_need(row, metric, where), metric, where)},
            response=_string(row.get("prediction")),
            target=_string(row.get("answer")),
        )
        for where, row in table
    ]


_READERS: dict[str, Callable[[Path, int, list[tuple[str, dict[str, Any]]]], list[ForeignRow]]] = {
    "lm-eval": _lm_eval,
    "nemo-skills": _nemo_skills,
    "nemo-evaluator": _nemo_evaluator,
    "vlmevalkit": _vlmevalkit,
}
TOOLS = tuple(_READERS)
_PRIMARY = {"nemo-skills": ("judge_correct", "symbolic_correct", "accuracy", "problem_accuracy", "is_correct", "passed")}


def _about(tool: str, path: Path) -> tuple[dict[str, str], bool, dict[str, bool]]:
    """What lies beside the results and says which version made them; whether they are partial; and which metrics are better when higher."""
    date = re.search(r"_(\d{4}-\d\d-\d\dT[\d:.-]+)\.jsonl$", path.name)
    found: dict[str, Any] = {}
    is_partial = False
    better: dict[str, Any] = {}
    if tool == "lm-eval" and date:
        record = _beside(path.with_name(f"results_{date.group(1)}.json"))
        task = path.name.removeprefix("samples_").removesuffix(date.group())
        sizes = (record.get("n-samples") or {}).get(task) or {}
        better = (record.get("higher_is_better") or {}).get(task) or {}
        is_partial = sizes.get("effective", 0) < sizes.get("original", 0)
        found = {
            "tool_version": record.get("lm_eval_version"),
            "model": record.get("model_name"),
            "task_version": (record.get("versions") or {}).get(task),
            "date": re.sub(r"T(\d\d)-(\d\d)-(\d\d).*", r"T\1:\2:\3", date.group(1)),
        }
    elif tool == "nemo-evaluator":
        record = next((_beside(file) for file in sorted(path.parent.glob("eval-*.json"))), {})
        config = record.get("config") or {}
        is_partial = config.get("max_problems") is not None
        found = {"tool_version": record.get("sdk_version"), "model": config.get("model"), "date": record.get("timestamp")}
    about = {key: str(value) for key, value in found.items() if value is not None}
    return about, is_partial, {metric: said for metric, said in better.items() if isinstance(said, bool)}


def _beside(path: Path) -> dict[str, Any]:
    """A JSON object that may lie beside the results; empty where it does not."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _in_order(path: Path) -> tuple[int, str]:
    """output-rs2 before output-rs10."""
    seed = _seed(path)
    return (-1 if seed is None else seed, str(path))


def _seed(path: Path) -> int | None:
    """The seed that NeMo-Skills names a file by."""
    found = re.search(r"-rs(\d+)", path.name)
    return int(found.group(1)) if found else None


def _need(row: dict[str, Any], key: str, where: str) -> Any:
    if row.get(key) is None:
        raise DataError(f"{where}: has no {key}; it has {', '.join(list(row)[:12])}")
    return row[key]


def _list(row: dict[str, Any], key: str, kind: type, where: str) -> list[Any]:
    value = _need(row, key, where)
    if not isinstance(value, list) or not value or not all(isinstance(each, kind) for each in value):
        what = "names" if kind is str else "objects" if kind is dict else "scores"
        raise DataError(f"{where}: {key} is {str(value)[:40]!r}, no list of {what}; give the file as the evaluation wrote it")
    return value


def _score(value: Any, name: str, where: str) -> float:
    if not isinstance(value, bool | int | float) or not math.isfinite(value):
        raise DataError(f"{where}: {name} is {str(value)[:40]!r}, no number and no truth value; a score a question is needed")
    return float(value)


def _count(value: Any, name: str, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise DataError(f"{where}: {name} is {value!r}; it has to be a number from 0")
    return value


def _first_text(row: dict[str, Any]) -> str | None:
    return next((row[name] for name in _TEXT_FIELDS if isinstance(row.get(name), str) and row[name].strip()), None)


def _first_id(row: dict[str, Any]) -> str | None:
    return next((str(row[name]) for name in _ID_FIELDS if isinstance(row.get(name), str | int | float)), None)


def _cluster(row: dict[str, Any]) -> str | None:
    """What a question shares its error with, where the benchmark says so."""
    return next((str(row[name]) for name in ("cluster", "document_set_id") if row.get(name) is not None), None)


def _extracted(row: dict[str, Any], key: str) -> dict[str, str]:
    return {"extracted": "[invalid]" if row[key] is None else str(row[key])} if key in row else {}


def _string(value: Any) -> str | None:
    return None if value is None else value if isinstance(value, str) else str(value)


def _texts(value: Any) -> list[str]:
    """The texts in what lm-eval nests; log-likelihoods are none."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and not any(isinstance(each, bool | int | float) for each in value):
        return [text for each in value for text in _texts(each)]
    return []
