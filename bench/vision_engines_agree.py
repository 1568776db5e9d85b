"""Whether vLLM scores pictures as hf does: the embedded vision-language model, BF16 and PTQ, on its four tasks.

    python bench/vision_engines_agree.py [--questions 200] [--results DIR]

The same suite through each engine by the product's own command. For each variant and task both scores, the difference, paired over
questions, and its standard error. Asked for: every difference within three of them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from engine_runs import REPOSITORY, run_suite, too_far

from harness.evidence import RunEvidence, open_run_evidence, pair
from harness.paired import paired_difference

MODEL = REPOSITORY / "suites" / "models" / "embedded_vlm"
TASKS = ("mini_chart", "mini_document", "mini_diagram", "mini_ocr")
ENGINES = {
    "hf": 'kind = "hf"\nargs = { batch_size = 40 }',
    "vllm": 'kind = "vllm"\nkernels = "w4a4_emulation"\nargs = { max_model_len = 512, max_num_seqs = 16, kv_cache_memory_gib = 0.25 }',
}
SUITE = """
schema = 1
name = "vision-agree-{engine}"

[model]
path = "{model}"
kind = "image-text"

[quantization]
activations = true
exclude = ["lm_head"]
calibration = {{ data = "drawings", samples = 64, headroom = 4.0 }}

[data.drawings]
source = "drawings"
pictures = 1_000
seq_len = 256

[[variant]]
name = "bf16"
method = "bf16"

[[variant]]
name = "ptq"
method = "ptq"

{tasks}
[engine]
{settings}
"""


class Agreement(NamedTuple):
    """One variant in one task. first, second: scores as shares; difference: second less first, with its paired standard error."""

    variant: str
    task: str
    n: int
    first: float
    second: float
    difference: float
    stderr: float

    @property
    def is_within(self) -> bool:
        return not too_far(self.difference, self.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=200, help="of each task, 200 at most")
    parser.add_argument("--results", type=Path, default=Path("results"))
    given = parser.parse_args()
    runs = [ask(engine, given.questions, given.results) for engine in ENGINES]
    sys.exit(0 if report(agreements(*map(open_run_evidence, runs))) else 1)


def ask(engine: str, questions: int, results: Path) -> Path:
    """Run the suite with one engine; the folder of its run."""
    tasks = "".join(f'[[task]]\nname = "{task}"\nlimit = {questions}\n\n' for task in TASKS)
    text = SUITE.format(engine=engine, model=MODEL, tasks=tasks, settings=ENGINES[engine])
    return run_suite(text, f"vision-agree-{engine}", results)


def agreements(first: RunEvidence, second: RunEvidence) -> list[Agreement]:
    """Every variant in every task that the first run has; SystemExit where the second was asked otherwise or lacks an answer."""
    found = []
    for variant, task in first.rows:
        ours, theirs = first.answers(variant, task), second.answers(variant, task)
        pairing = None if ours is None or theirs is None else pair(ours, theirs)
        if pairing is None or pairing.paired_by != "request" or pairing.coverage < 1:
            raise SystemExit(f"{variant} {task}: the engines did not answer the same questions; run it again")
        pairs = pairing.pairs
        before, after = (sum(getattr(each, side) for each in pairs) / len(pairs) for side in ("baseline", "candidate"))
        difference = paired_difference(pairs)
        found.append(Agreement(variant, task, len(pairs), before, after, difference.delta, difference.stderr or 0.0))
    return found


def report(found: Sequence[Agreement]) -> bool:
    """Print every figure in percent; whether all are within three standard errors."""
    first, second = ENGINES
    for each in found:
        print(
            f"{each.variant:5} {each.task:14} {each.n} questions: {first} {100 * each.first:.1f}, {second} {100 * each.second:.1f}, "
            f"{100 * each.difference:+.1f} ± {100 * each.stderr:.1f}{too_far(each.difference, each.stderr)}"
        )
    return bool(found) and all(each.is_within for each in found)


if __name__ == "__main__":
    main()
