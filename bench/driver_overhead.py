"""What our driver and journal cost beside bare lm-eval: the same task, the same engine that answers at once, in turns.

    python bench/driver_overhead.py [--requests 1000] [--rounds 7]

Ours: prepare (read the task, render, tokenize, write), answer (ask, journal each response, write), score (read back, filters
and metrics, aggregate). lm-eval: its own evaluation over a model that tokenizes and asks the same engine. Both build the task
from its files each time. Milliseconds a request; the asked-for difference is at most 2.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ["TQDM_DISABLE"] = "1"  # neither side is timed while it draws bars

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager

from harness import evaluation, prompts
from harness.engines import Answer, Outcome, Request, Sampling
from harness.engines.scripted import ScriptedEngine
from harness.prepared import read_prepared, read_questions, write_prepared
from harness.records import read_samples, write_samples
from harness.task_settings import ResolvedTask, plain_task

REPOSITORY = Path(__file__).resolve().parent.parent
TARGET_MS = 2.0
NAME = "null_sums"
YAML = """
task: null_sums
custom_dataset: !function null_sums.dataset
test_split: test
output_type: generate_until
doc_to_text: '{{question}}'
doc_to_target: '{{answer}}'
generation_kwargs: {until: [], do_sample: false, temperature: 0.0, max_gen_toks: 64}
filter_list:
  - name: boxed
    filter:
      - {function: regex, regex_pattern: 'boxed\\{(\\d+)\\}'}
      - {function: take_first}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
metadata: {version: 1, chat: true, primary: exact_match}
"""
CODE = """
import datasets

def dataset(**metadata):
    story = "A shop sells pens and paper. " * 12
    rows = [{"question": f"{story}How much is {i} and {i % 7}?", "answer": str(i + i % 7)} for i in range(N)]
    return {"test": datasets.Dataset.from_list(rows)}
"""


class NullEngine(ScriptedEngine):
    """The same response to everything, at once, each for itself."""

    def answer(self, batch: Sequence[Request]) -> Iterator[tuple[int, Outcome]]:
        for place in range(len(batch)):
            yield place, Answer("It is \\boxed{7}.", tuple(range(8)), "stop", 0.0)


class Bare(TemplateLM):
    """lm-eval's side: renders and tokenizes as a model of its own does, then asks the engine for all."""

    def __init__(self, engine: NullEngine) -> None:
        super().__init__()
        self.engine, self.tokenizer = engine, engine.tokenizer

    @property
    def eot_token_id(self) -> int:
        return min(self.engine.eos_ids)

    @property
    def tokenizer_name(self) -> str:
        return "null"

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return str(
            self.tokenizer.apply_chat_template(chat_history, tokenize=False, add_generation_prompt=add_generation_prompt)
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return list(self.tokenizer(string, add_special_tokens=False)["input_ids"])

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        sampling = Sampling(max_tokens=64, until=())
        batch = [Request(token_ids=tuple(self.tok_encode(r.args[0])), sampling=sampling) for r in requests]
        answers = dict(self.engine.answer(batch))
        return [answer.text for place in range(len(batch)) if isinstance(answer := answers[place], Answer)]

    def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
        raise NotImplementedError


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    if options.rounds < 3:
        parser.error("--rounds: at least 3, or there is no spread to print")
    with tempfile.TemporaryDirectory() as scratch:
        measure(Path(scratch), options.requests, options.rounds)


def measure(scratch: Path, n_requests: int, rounds: int) -> None:
    """Time both in turns, the first turn to warm up, and print them with their paired difference."""
    sys.path.insert(0, str(REPOSITORY / "tests"))
    from conftest import build_tiny_model
    from transformers import AutoTokenizer

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    engine = NullEngine(AutoTokenizer.from_pretrained(build_tiny_model(scratch / "model")), str, answers_depend_on_batch=False)
    tasks = scratch / "tasks"
    tasks.mkdir()
    (tasks / f"{NAME}.yaml").write_text(YAML)
    (tasks / f"{NAME}.py").write_text(CODE.replace("N)", f"{n_requests})"))
    task = replace(plain_task(NAME, None, None), path=tasks, chat=True)
    milliseconds: dict[str, list[float]] = {"lm-eval": [], "ours": []}
    for turn in range(-1, rounds):
        folder = scratch / f"turn{turn}"
        folder.mkdir()
        values = {}
        for name in milliseconds:
            began = time.perf_counter()
            values[name] = ours(task, engine, folder) if name == "ours" else bare(tasks, engine)
            if turn >= 0:
                milliseconds[name].append(1000 * (time.perf_counter() - began) / n_requests)
        if values["ours"] != values["lm-eval"]:
            raise SystemExit(f"the scores differ: {values}; nothing is worth timing")
    for name, found in milliseconds.items():
        print(f"{name:8} {_with_spread(found)} ms a request")
    differences = [a - b for a, b in zip(milliseconds["ours"], milliseconds["lm-eval"], strict=True)]
    print(f"more     {_with_spread(differences)} ms a request (target: at most {TARGET_MS}; {n_requests:,} requests)")


def _with_spread(values: list[float]) -> str:
    return f"{statistics.median(values):6.3f} (median of {len(values)}; {min(values):.3f} to {max(values):.3f})"


def bare(tasks: Path, engine: NullEngine) -> float:
    """The score of the task through lm-eval alone."""
    task = TaskManager(include_path=str(tasks), include_defaults=False).load([NAME])["tasks"][NAME]
    found = evaluate(
        Bare(engine), {"tasks": {NAME: task}, "groups": {}, "group_map": {}}, bootstrap_iters=0, apply_chat_template=True
    )
    return float(found["results"][NAME]["exact_match,boxed"])


def ours(task: ResolvedTask, engine: NullEngine, folder: Path) -> float:
    """The score of the task through all that our stages do."""
    write_prepared(folder, prompts.prepare(task, engine.tokenizer, folder))
    prepared = read_prepared(folder)
    answered = evaluation.answer_task(
        prepared,
        engine,
        weights="null",
        journals=folder / "journals",
        repeats=1,
        sampling_seed=0,
        on_progress=lambda done, total: None,
    )
    write_samples(folder / "responses.jsonl.zst", answered.rows)
    rows = read_samples(folder / "responses.jsonl.zst") or []
    samples, result = evaluation.score_task(task, prepared.about, read_questions(folder), rows, answered.about)
    write_samples(folder / "samples.jsonl.zst", samples)
    return float(result["metrics"][result["primary"]]["value"])


if __name__ == "__main__":
    main()
