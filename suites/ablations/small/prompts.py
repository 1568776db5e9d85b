"""Write sums.jsonl: sums to ask a small model, with an example in the question so that it knows the form of an answer.

None of them is asked by the task mini_math. `python suites/ablations/small/prompts.py` writes the file that is committed.
"""

import json
import random
from pathlib import Path

from harness.tasks import mini

EXAMPLE = f"{mini.sum_question(31, 24)}\n{mini.worked_sum(31, 24)}"


def rows() -> list[dict[str, str]]:
    """Prompts and references, without repetition, in an order fixed by a seed."""
    terms = range(2, mini.LARGEST_TERM + 1)
    chosen = [(a, b) for a in terms for b in terms if not mini.is_evaluated_sum(a, b)]
    random.Random(0).shuffle(chosen)
    return [{"prompt": f"{EXAMPLE}\n\n{mini.sum_question(a, b)}", "response": mini.worked_sum(a, b)} for a, b in chosen]


if __name__ == "__main__":
    Path(__file__).with_name("sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
