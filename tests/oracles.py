"""Engines that know the answers of the benchmarks, as functions of a document, and made-up rows: what tests and bench/oracle.py share."""

import csv
import random

from harness.schema_evaluation import Thinking
from harness.tasks import gpqa

THINKING = Thinking(open="<think>", close="</think>", expected=True)


def thinking(answer):
    """More than 2,000 tokens that reach wrong boxes, then the answer."""
    wrong = " ".join(["hmm, perhaps"] * 180 + [r"\boxed{-1}, Answer: Z, #### -1."] + ["or perhaps"] * 180)
    return f"<think>{wrong} (A) \\boxed{{B}} \\boxed{{17}}</think>{answer}"


def boxed(doc):
    """The gold answer of a document, in a box."""
    return f"It follows that\n\n$$\\boxed{{{doc['answer']}}}$$"


def wrong(doc):
    """What answers no question."""
    return r"\boxed{-987654321}"


_COLUMNS = ["Record ID", "Question", *gpqa._OPTIONS, "High-level domain", "Subdomain", "Explanation", "Canary String"]


def made_up_gpqa(folder, n):
    """Write a mirror with made-up rows of GPQA's schema: quotes, commas and line breaks within the values, as there."""
    path = folder / "Idavidrein" / "gpqa" / "gpqa_diamond.csv"
    path.parent.mkdir(parents=True)
    rng = random.Random(0)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, _COLUMNS)
        writer.writeheader()
        for i in range(n):
            values = rng.sample(range(1000), 4)
            writer.writerow(
                {"Record ID": f"rec{i}", "Question": f'A body, "number {i}",\nfalls. How far?\n', "High-level domain": "Physics",
                 "Subdomain": "Mechanics", "Explanation": "…", "Canary String": "canary"}
                | {option: f"{value} m, or\n{value}00 cm " for option, value in zip(gpqa._OPTIONS, values, strict=True)}
            )  # fmt: skip
    return path
