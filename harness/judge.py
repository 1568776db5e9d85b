"""A judge: a model that says whether an answer in free words agrees with the gold one. Requests, verdicts and their journal.

The prompt is the equality check that AA-LCR publishes (its first release), with nothing around it but the judge's own chat
template. A verdict is exactly CORRECT or INCORRECT, once white space and the judge's own thinking are taken away. Anything else is
unparsable: the judge failed and not the candidate, so that sample's figure is missing and never 0, and it is counted; a judge of
which many verdicts are unparsable is an error.

An answer that was never finished, or is empty, is wrong without asking. Equal answers to a question are judged once, whatever
variant gave them: each verdict is asked for alone, so it depends on nothing but the judge, the prompt and the answer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.answering import answer_requests, require_fit
from harness.engines import Answer, Engine, Failure, Outcome, Request, Sampling
from harness.errors import TaskError
from harness.journal import Journal
from harness.judge_prompt import PROMPT, prompt_hash
from harness.numerics import versions
from harness.prepared import Question
from harness.provenance import PACKAGES, device_kind, package_versions
from harness.schema_evaluation import Thinking
from harness.thinking import split_thinking

METRIC = "judge_correct"
UNPARSABLE = "unparsable"
MOST_UNPARSABLE = 0.1
"""Share of verdicts that may be unparsable."""
_VALUES = {"CORRECT": 1.0, "INCORRECT": 0.0}
_WRONG_UNASKED = ("incomplete", "empty")


@dataclass(frozen=True)
class Candidate:
    """An answer that the judge is asked about. doc, repeat: of the answer's row."""

    doc: int
    repeat: int
    question: str
    gold: str
    answer: str

    @property
    def prompt(self) -> str:
        return PROMPT.format(question=self.question, official_answer=self.gold, candidate_answer=self.answer)


@dataclass(frozen=True)
class Judgement:
    """rows: a verdict for every row of answers. about: the judge, and how many verdicts are unparsable or missing."""

    rows: list[dict[str, Any]]
    about: dict[str, Any]


def parse_verdict(text: str, thinking: Thinking | None = None) -> bool | None:
    """True for CORRECT, False for INCORRECT, None for everything else; strict in case, marks and punctuation."""
    split = split_thinking(text, thinking)
    verdict = None if split.is_open else _VALUES.get(split.answer.strip())
    return None if verdict is None else bool(verdict)


def judge_answers(
    task: str,
    questions: Sequence[Question],
    answers: Sequence[dict[str, Any]],
    engine: Engine,
    *,
    weights: str,
    journals: Path,
    max_tokens: int,
    thinking: Thinking | None = None,
    model_thinking: Thinking | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Judgement:
    """Judge the recorded answers of a task.

    Args:
        questions: with the question under `source_question` of their fields, and the gold answer as target.
        answers: a row a (question, repeat), as `evaluation.answer_task` makes them.
        weights: fingerprint of the judge. journals: folder in which verdicts are kept and found again.
        max_tokens: of a verdict. thinking: how the judge marks its thinking; model_thinking: how the judged model does.
        on_progress: called with (verdicts settled, verdicts in all).
    Raises:
        TaskError: a judge without a chat template, or with too many unparsable verdicts.  EngineError: an answer that does not fit the
            judge's context.  StoreError: the journal cannot be read or written.
    """
    by_doc = {question.doc: question for question in questions}
    rows = [_unjudged(by_doc[row["doc"]], row, model_thinking) for row in answers]
    asked = [row["candidate"] for row in rows if row["candidate"] is not None]
    requests = judge_requests(asked, engine.tokenizer, max_tokens=max_tokens, thinking=thinking)
    for candidate, request in zip(asked, requests, strict=True):
        name = f"{task}, question {candidate.doc}: its answer and the judge's prompt around it"
        require_fit(name, len(request.token_ids), max_tokens, engine.context_length)
    distinct = list({request.hash: request for request in requests}.values())
    began = time.monotonic()
    with Journal(journals, _protocol(engine, weights)) as journal:
        outcomes = answer_requests(_OneByOne(engine), journal, distinct, on_progress)
    by_hash = {request.hash: outcome for request, outcome in zip(distinct, outcomes, strict=True)}
    pairs = iter(requests)
    found = [_judged(row, next(pairs), by_hash, thinking) if row["candidate"] else _without_candidate(row) for row in rows]
    about = _about(found, engine, journal, weights=weights, n_asked=len(asked), n_distinct=len(distinct))
    about["seconds_answering"] = time.monotonic() - began
    unparsable = [row for row in found if row["verdict"] == UNPARSABLE]
    _require_verdicts(task, unparsable, len(asked) - about["n_missing"], about["journal"])
    return Judgement(found, about)


def judge_requests(
    candidates: Sequence[Candidate], tokenizer: Any, *, max_tokens: int, thinking: Thinking | None = None
) -> list[Request]:
    """The greedy requests for the verdicts, rendered with the judge's own chat template."""
    if tokenizer.chat_template is None:
        raise TaskError("judge.path: the judge has no chat template; choose a model that answers in chat")
    given = thinking.template_args if thinking else {}
    sampling = Sampling(max_tokens=max_tokens, until=())
    requests = []
    for candidate in candidates:
        chat = [{"role": "user", "content": candidate.prompt}]
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True, **given)
        token_ids = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
        requests.append(Request(token_ids=token_ids, sampling=sampling))
    return requests


def with_verdicts(answers: Sequence[dict[str, Any]], verdicts: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of answers that carry what the judge said of each, as sample rows do."""
    by_row = {(row["doc"], row["repeat"]): row for row in verdicts}
    kept = ("verdict", "text", "unasked", "missing", "request")
    return [row | {"judged": {key: by_row[row["doc"], row["repeat"]][key] for key in kept}} for row in answers]


def value_of(judged: dict[str, Any]) -> float | None:
    """The metric of one sample: 1 for CORRECT, 0 for INCORRECT and for answers that are wrong unasked, else missing."""
    return 0.0 if judged["unasked"] in _WRONG_UNASKED else _VALUES.get(judged["verdict"])


def _protocol(engine: Engine, weights: str) -> dict[str, Any]:
    """What verdicts depend on beside their prompts: they are found again where it is the same."""
    return {
        "weights": weights,
        "task": "judge",
        "prompt": prompt_hash(),
        "kernels": engine.kernels,
        "numerics": versions()["judge"],
        "packages": package_versions(PACKAGES["judge"]),
        "device": device_kind(),
        **engine.protocol,
    }


def _about(
    found: Sequence[dict[str, Any]], engine: Engine, journal: Journal, *, weights: str, n_asked: int, n_distinct: int
) -> dict[str, Any]:
    """Who judged by what, and how many verdicts came to nothing."""
    missing = [row["missing"] for row in found if row["missing"] is not None]
    return {
        "prompt": prompt_hash(),
        "weights": weights,
        "engine": engine.protocol,
        "kernels": engine.kernels,
        "flags": list(engine.flags),
        "journal": f"{journal.path.parent.parent.name}/{journal.path.parent.name}/{journal.path.name}",
        "n_asked": n_asked,
        "n_distinct": n_distinct,
        "n_unparsable": sum(row["verdict"] == UNPARSABLE for row in found),
        "n_missing": len(missing),
        "missing_reasons": sorted(set(missing))[:5],
    }


def _unjudged(question: Question, row: dict[str, Any], thinking: Thinking | None) -> dict[str, Any]:
    """A row with what there is to judge, or why there is nothing."""
    found: dict[str, Any] = {"doc": row["doc"], "repeat": row["repeat"], "candidate": None, "unasked": None}
    if row["missing"] is not None:
        return found | {"unasked": "missing"}
    split = split_thinking(row["response"][0], thinking, tuple(row["stops"]))
    if split.is_open:
        return found | {"unasked": "incomplete"}
    if not split.answer.strip():
        return found | {"unasked": "empty"}
    asked = str(question.fields["source_question"])
    return found | {"candidate": Candidate(row["doc"], row["repeat"], asked, question.target, split.answer.strip())}


def _without_candidate(row: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in row.items() if key != "candidate"}
    return kept | {"request": None, "text": None, "verdict": None, "missing": None}


def _judged(row: dict[str, Any], request: Request, by_hash: dict[str, Outcome], thinking: Thinking | None) -> dict[str, Any]:
    outcome = by_hash[request.hash]
    found = _without_candidate(row) | {"request": request.hash}
    if isinstance(outcome, Failure):
        return found | {"missing": outcome.reason}
    assert isinstance(outcome, Answer)
    verdict = parse_verdict(outcome.text, thinking) if outcome.finish_reason == "stop" else None
    named = UNPARSABLE if verdict is None else "CORRECT" if verdict else "INCORRECT"
    return found | {"text": outcome.text, "verdict": named}


def _require_verdicts(task: str, unparsable: list[dict[str, Any]], n_verdicts: int, journal: str) -> None:
    """TaskError where too many verdicts are unparsable; it quotes no text, which may not be published."""
    n = len(unparsable)
    if not n or (n < n_verdicts and n <= max(1, MOST_UNPARSABLE * n_verdicts)):
        return
    first = unparsable[0]
    raise TaskError(
        f"task {task}: {n} of {n_verdicts} verdicts of the judge are neither CORRECT nor INCORRECT, more than {MOST_UNPARSABLE:.0%}; the "
        f"first is on question {first['doc']}, repeat {first['repeat']} (request {first['request'][:16]} in journals/{journal}). Set "
        "judge.thinking if the judge thinks, raise judge.max_tokens if its replies are cut, or choose another judge; answers and verdicts are kept"
    )


class _OneByOne:
    """An engine that is asked for single verdicts where its answers depend on their batch: equal answers get equal verdicts."""

    def __init__(self, engine: Engine) -> None:
        self.tokenizer, self.eos_ids, self.context_length = engine.tokenizer, engine.eos_ids, engine.context_length
        self.kernels, self.protocol, self.backend, self.flags = engine.kernels, engine.protocol, engine.backend, engine.flags
        self.answers_depend_on_batch = False
        self._engine = engine

    def plan(self, requests: Sequence[Request]) -> list[list[int]]:
        if self._engine.answers_depend_on_batch:
            return [[index] for index in range(len(requests))]
        return self._engine.plan(requests)

    def answer(self, batch: Sequence[Request]) -> Iterator[tuple[int, Outcome]]:
        return self._engine.answer(batch)
