"""lm-eval's tasks and metrics over one of our engines. The only module that imports lm_eval.

lm-eval builds the prompts and scores single samples; the engine answers, the journal keeps every answer, and the
aggregates and their errors are ours. One prompt is rendered once, by us, and travels as token ids.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import evaluate as lm_eval_evaluate
from lm_eval.tasks import TaskManager

from harness.engines import Answer, Engine, Likelihood, Request, Sampling
from harness.errors import EngineError
from harness.journal import Journal
from harness.numerics import versions
from harness.provenance import PACKAGES, device_kind, package_versions
from harness.stats import mean_with_stderr
from harness.suite import TASKS_FOLDER

SCHEMA = 1


@dataclass(frozen=True)
class Evaluation:
    """A row a question and repeat, and the aggregate of the task over them."""

    samples: list[dict[str, Any]]
    result: dict[str, Any]


def task_fingerprint(name: str) -> str:
    """sha256 of everything that makes a task: its YAML file and the code that generates and scores its questions."""
    digest = hashlib.sha256()
    for path in (TASKS_FOLDER / f"{name}.yaml", TASKS_FOLDER / "mini.py", TASKS_FOLDER / "world.py"):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def evaluate_task(
    name: str, engine: Engine, *, weights: str, journals: Path, limit: int | None, on_progress: Callable[[int, int], None]
) -> Evaluation:
    """Ask every question of the task and score the answers.

    Args:
        weights: fingerprint of what the engine serves; answers are never shared between weights.
        journals: folder in which answers are kept and found again.
        limit: the first questions only; the result is then marked as partial.
        on_progress: called with (requests answered, requests in all).
    Raises:
        EngineError: a prompt that does not fit the context.  StoreError: the journal cannot be read or written.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    task = TaskManager(include_path=str(TASKS_FOLDER), include_defaults=False).load([name])["tasks"][name]
    metadata = dict(task.config.metadata or {})
    scorer = f"{name}@{metadata['version']}:{task_fingerprint(name)[:12]}"
    protocol = {
        "weights": weights,
        "task": name,
        "version": metadata["version"],
        "chat": metadata["chat"],
        "kernels": engine.kernels,
        "numerics": versions()["evaluate"],
        "packages": package_versions(PACKAGES["evaluate"]),
        "device": device_kind(),
        **engine.protocol,
    }
    with Journal(journals, protocol) as journal:
        lm = JournaledLM(engine, journal, chat=metadata["chat"], on_progress=on_progress)
        found = lm_eval_evaluate(
            lm,
            {"tasks": {name: task}, "groups": {}, "group_map": {}},
            limit=limit,
            bootstrap_iters=0,
            apply_chat_template=metadata["chat"],
            fewshot_as_multiturn=metadata["chat"],
            log_samples=True,
        )
    samples = [_sample_row(name, scorer, sample, lm.asked[sample["doc_id"]]) for sample in found["samples"][name]]
    result = aggregate(samples, primary=metadata["primary"], n_total=len(samples), kernels=engine.kernels)
    result |= {"is_partial": limit is not None and limit < len(task.eval_docs), "version": metadata["version"]}
    return Evaluation(samples, result)


def aggregate(samples: list[dict[str, Any]], *, primary: str, n_total: int, kernels: dict[str, str]) -> dict[str, Any]:
    """Means and errors of every metric over the samples that were scored."""
    names = sorted({metric for sample in samples for metric in sample["metrics"]})
    metrics = {}
    for name in names:
        scored = [sample for sample in samples if sample["metrics"].get(name) is not None]
        value, stderr = mean_with_stderr([s["metrics"][name] for s in scored], [s["cluster"] for s in scored])
        metrics[name] = {"value": value, "stderr": stderr, "n_scored": len(scored), "n_total": n_total}
    incomplete = [sample["is_incomplete"] for sample in samples if sample["is_incomplete"] is not None]
    return {
        "primary": primary,
        "metrics": metrics,
        "incomplete_rate": sum(incomplete) / len(incomplete) if incomplete else None,
        "kernels": kernels,
    }


class JournaledLM(TemplateLM):
    """An lm-eval model that asks an engine for what the journal lacks, and answers from the journal.

    asked: by lm-eval's document number, the requests made for it and their answers, in order.
    """

    def __init__(self, engine: Engine, journal: Journal, *, chat: bool, on_progress: Callable[[int, int], None]) -> None:
        super().__init__()
        self.engine, self.journal, self.chat, self.on_progress = engine, journal, chat, on_progress
        self.tokenizer = engine.tokenizer
        self.asked: dict[int, list[tuple[Request, Answer | Likelihood]]] = {}

    @property
    def eot_token_id(self) -> int:
        return min(self.engine.eos_ids)

    @property
    def tokenizer_name(self) -> str:
        return str(self.engine.tokenizer.name_or_path)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return str(
            self.engine.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids; the chat template brings its own special tokens, plain text gets the tokenizer's."""
        special = not self.chat if add_special_tokens is None else add_special_tokens
        return list(self.engine.tokenizer(string, add_special_tokens=special)["input_ids"])

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        repeats: dict[int, int] = {}
        asked = []
        for instance in requests:
            prompt, options = instance.args
            repeat = repeats.get(id(instance), 0)
            repeats[id(instance)] = repeat + 1
            asked.append(Request(token_ids=tuple(self.tok_encode(prompt)), sampling=_sampling(options), repeat=repeat))
        answers = self._answers(requests, asked)
        return [answer.text for answer in answers if isinstance(answer, Answer)]

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        asked = [Request(token_ids=tuple(context), continuation=tuple(rest)) for _, context, rest in requests]
        answers = self._answers(self._instances, asked)
        return [(answer.logprob, answer.is_greedy) for answer in answers if isinstance(answer, Likelihood)]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        self._instances = requests
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        raise EngineError("tasks that score whole texts by rolling likelihood are not available in this version")

    def _answers(self, instances: list[Instance], asked: list[Request]) -> list[Answer | Likelihood]:
        for instance, request in zip(instances, asked, strict=True):
            self._require_fit(instance, request)
        answers: dict[int, Answer | Likelihood] = {}
        batches = self.engine.plan(asked)
        self.on_progress(0, len(asked))
        for members in batches:
            batch = [asked[i] for i in members]
            found = self.journal.find(batch)
            if found is None:
                found = self.engine.answer(batch)
                self.journal.append(batch, found)
            answers.update(zip(members, found, strict=True))
            self.on_progress(len(answers), len(asked))
        for index, instance in enumerate(instances):
            self.asked.setdefault(_doc_id(instance), []).append((asked[index], answers[index]))
        return [answers[index] for index in range(len(asked))]

    def _require_fit(self, instance: Instance, request: Request) -> None:
        room = request.sampling.max_tokens if request.sampling else len(request.continuation or ())
        needed = len(request.token_ids) + room
        if needed > self.engine.context_length:
            raise EngineError(
                f"{instance.task_name}, question {_doc_id(instance)}: {len(request.token_ids)} prompt tokens and {room} to answer "
                f"are more than the model's context of {self.engine.context_length}; prompts are never cut to fit"
            )


def _sampling(options: dict[str, Any]) -> Sampling:
    temperature = float(options["temperature"]) if options.get("do_sample") else 0.0
    return Sampling(max_tokens=int(options["max_gen_toks"]), until=tuple(options["until"]), temperature=temperature)


def _doc_id(instance: Instance) -> int:
    assert instance.doc_id is not None
    return int(instance.doc_id)


def _sample_row(
    task: str, scorer: str, sample: dict[str, Any], asked: list[tuple[Request, Answer | Likelihood]]
) -> dict[str, Any]:
    request, answer = asked[0]
    is_text = isinstance(answer, Answer)
    metrics = {name: float(sample[name]) for name in sample["metrics"]}
    unparsed = metrics.get("unparsed")
    truncated = isinstance(answer, Answer) and answer.finish_reason == "length"
    return {
        "schema": SCHEMA,
        "task": task,
        "question": sample["doc_id"],
        "requests": [r.hash for r, _ in asked],
        "cluster": sample["doc"].get("cluster", sample["doc_id"]),
        "repeat": request.repeat,
        "seed": request.seed,
        "prompt": sample["arguments"][0][0],
        "target": str(sample["target"]),
        "response": answer.text if isinstance(answer, Answer) else [a.logprob for _, a in asked if isinstance(a, Likelihood)],
        "metrics": metrics,
        "scorer": scorer,
        "finish_reason": answer.finish_reason if isinstance(answer, Answer) else None,
        "n_tokens": len(answer.token_ids) if isinstance(answer, Answer) else None,
        "is_incomplete": (truncated and bool(unparsed)) if is_text and unparsed is not None else None,
        "seconds": sum(a.seconds for _, a in asked),
    }
