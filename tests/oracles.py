"""Engines that know the answers of the benchmarks, as functions of a document, and made-up rows: what tests and bench/oracle.py share."""

from harness.rehearsal_rows import gpqa as made_up_gpqa
from harness.schema_evaluation import Thinking

__all__ = ["THINKING", "boxed", "made_up_gpqa", "thinking", "wrong"]

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
