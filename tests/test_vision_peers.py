"""Our metrics of pictures beside other people's, on the hand-worked cases: equal but for the listed cases, each with their figure.

lm-eval is always here. lmms-eval is not: `pip install --no-deps --target FOLDER lmms-eval` and FOLDER on PYTHONPATH run those tests
(0.7.3 was compared). Of its files single functions are taken, since importing them takes packages that no metric needs.
"""

import ast
import importlib.util
import random
import re
import statistics
from fractions import Fraction
from pathlib import Path

import pytest

from harness.stats import INVALID
from harness.tasks.vision_metrics import normalized_answer
from tests import vision_cases

LMMS = importlib.util.find_spec("lmms_eval")
needs_lmms = pytest.mark.skipif(LMMS is None, reason="lmms-eval is not installed (see the head of the file)")


def lmms(path, *names):
    """Functions and classes of a file of lmms-eval, without its imports and decorators."""
    source = (Path(LMMS.origin).parent / path).read_text(encoding="utf-8")
    kept = [node for node in ast.parse(source).body if getattr(node, "name", None) in names]
    for node in kept:
        node.decorator_list = []
    known = {"re": re, "random": random, "statistics": statistics}
    exec(compile(ast.Module(kept, []), path, "exec"), known)
    return [known[name] for name in names]


def differing(cases, theirs):
    """By case, what they give where it is not what was worked out by hand."""
    found = {}
    for *asked, value in cases:
        given = theirs(*asked)
        if given != (pytest.approx(value) if isinstance(value, float) else value):
            found[tuple(map(str, asked))] = given
    return found


def as_float(cases):
    return [(*case[:-1], float(Fraction(*case[-1]))) for case in cases]


def listed(*differences):
    """Cases that differ, by case; each part is a reason and what they give."""
    return {case: given for reason, cases in differences for case, given in cases.items()}


BORDER = (
    "binary fractions decide at the border of 5 %",
    dict.fromkeys([("44.1", "42"), ("39.9", "42"), ("1.05", "1")], False),
)
RELAXED_LMMS = listed(
    BORDER,
    ("a gold of 0 is taken for none", dict.fromkeys([("0.0", "0"), ("-0", "0"), ("0%", "0")], False)),
    ("10% is 0.1 and nothing else", dict.fromkeys([("10%", "10"), ("10", "10%"), ("5 %", "5")], False)),
    (
        "commas, currency signs and another minus make a text of a number",
        dict.fromkeys([("1,000", "1000"), ("1000", "1,000"), ("1,234,567", "1234567")], False)
        | dict.fromkeys([("$5.1", "5"), ("-$5", "-5"), ("−5", "-5")], False),
    ),
    (
        "texts are compared with their white space, quotes and full stop",
        dict.fromkeys([(" yes. ", "Yes"), ('"Asia"', "Asia"), ("North  America", "North America")], False),
    ),
    ("nan is a number, equal to none", {("nan", "nan"): False}),
)
RELAXED_LM_EVAL = listed(
    BORDER,
    ("a percentage is divided by 100 even where the gold is one too", {("0.1%", "10%"): True}),
    ("every comma goes, wherever it stands", {("1,00", "100"): True}),
    ("another minus makes a text of a number", {("\u22125", "-5"): False}),
    (
        "texts are compared with their white space",
        dict.fromkeys([(" yes. ", "Yes"), ("North  America", "North America")], False),
    ),
    ("nan is a number, equal to none", {("nan", "nan"): False}),
)
ANLS_LMMS = listed(
    ("lengths are those of the texts as given", {("    a    ", "['ab']"): 8 / 9, ("    a    ", "['bc']"): 7 / 9}),
)
OCR_LMMS = listed(
    ("an empty gold is in every answer", {("a", "['']", "False"): 1, ("x", "[' ']", "True"): 1}),
    ("full-width letters are folded, which the benchmark's own code does not do", {("ＡＢ", "['AB']", "False"): 1}),
)
CHOICES_LM_EVAL = listed(
    (
        "a guess, where we read a letter",
        dict.fromkeys(["b", "a", "B. dark red", "**D**", "**Answer:** **A**", "The answer is (b).", r"\boxed{A}"], INVALID),
    ),
    (
        "a guess, since the words of an option count in longer responses alone",
        dict.fromkeys(["blue", "Dark red", "red", "Answer: blue"], INVALID),
    ),
    ("the first of two options that overlap", {"The colour of the leaf is dark red.": "A"}),
    ("a lone capital anywhere is an option", {"A catalyst lowers the barrier": "A", "B and C": "C"}),
)
OPEN_LM_EVAL = listed(
    ("any number of the answer counts", {("7 of 9", "['7']"): True, ("e5", "['5']"): True}),
    ("any part of a word counts, and nothing at all", {("unknown", "['no']"): True, ("x", "['']"): True}),
    (
        'sentences with "is" count before the last one, and the last one where there is none',
        {("It is red.\n\nParis", "['paris']"): False, ("Paris\n\nBut London", "['paris']"): True},
    ),
    ("white space is compared", {("New  York", "['new york']"): False}),
)


@needs_lmms
def test_relaxed_accuracy_beside_lmms_eval():
    (theirs,) = lmms("tasks/chartqa/utils.py", "relaxed_correctness")
    assert differing(vision_cases.RELAXED, theirs) == RELAXED_LMMS


@needs_lmms
def test_anls_beside_lmms_eval():
    (theirs, _) = lmms("api/metrics.py", "anls", "levenshtein_distance")
    found = differing(as_float(vision_cases.ANLS), lambda answer, golds: theirs(golds, [answer])["anls"])
    assert found == pytest.approx(ANLS_LMMS)


@needs_lmms
def test_points_of_ocrbench_beside_lmms_eval():
    (theirs, _) = lmms("tasks/ocrbench/utils.py", "ocrbench_process_results", "_fold_fullwidth_ascii")

    def point(answer, golds, is_formula):
        doc = {"answer": golds, "dataset": "HME100k" if is_formula else "IIIT5K", "question_type": "…"}
        return theirs(doc, [answer])["ocrbench_accuracy"]["score"]

    assert differing(vision_cases.OCR, point) == OCR_LMMS


@needs_lmms
def test_vqa_accuracy_and_its_normalisation_beside_lmms_eval():
    (processor,) = lmms("tasks/_task_utils/vqa_eval_metric.py", "EvalAIAnswerProcessor")
    assert differing(vision_cases.NORMALIZED, processor()) == {}
    rng = random.Random(0)
    texts = ["".join(rng.choice("ab1 .,'-/?!()\"s$%&:;_+=\n\tTenoeh") for _ in range(rng.randint(0, 14))) for _ in range(5000)]
    assert [processor()(text) for text in texts] == [normalized_answer(text) for text in texts]
    for form, full in processor.CONTRACTIONS.items():
        assert normalized_answer(form) == processor()(form), full
    (theirs,) = lmms("tasks/textvqa/utils.py", "textvqa_process_results")
    theirs.__globals__["EvalAIAnswerProcessor"] = processor
    given = differing(
        as_float(vision_cases.VQA),
        lambda answer, golds: theirs({"answers": [*golds], "question_id": 0}, [answer])["exact_match"],
    )
    assert given == {}


def test_relaxed_accuracy_beside_lm_eval():
    theirs = importlib.import_module("lm_eval.tasks.chartqa.utils").RelaxedCorrectness()
    assert differing(vision_cases.RELAXED, lambda answer, gold: bool(theirs.score(answer, gold))) == RELAXED_LM_EVAL


@pytest.fixture
def mmmu():
    """lm-eval's MMMU; its import seeds the global generator, which is put back."""
    state = random.getstate()
    yield importlib.import_module("lm_eval.tasks.mmmu.utils")
    random.setstate(state)


def test_letters_beside_lm_evals_mmmu(mmmu, monkeypatch):
    monkeypatch.setattr(mmmu.random, "choice", lambda letters: INVALID)  # where they guess, we say that there is none

    def theirs(response, options):
        letters = list("ABCDEFGHI"[: len(options)])
        return mmmu.parse_multi_choice_response(response, letters, dict(zip(letters, options, strict=True)))

    found = differing(vision_cases.CHOICES, theirs)
    assert {response: letter for (response, options), letter in found.items()} == CHOICES_LM_EVAL
    assert {options for _, options in found} == {str(vision_cases.COLOURS)}


def test_open_questions_beside_lm_evals_mmmu(mmmu):
    def theirs(answer, golds):
        return mmmu.eval_open(golds, mmmu.parse_open_response(answer))

    assert differing(vision_cases.OPEN, theirs) == OPEN_LM_EVAL
