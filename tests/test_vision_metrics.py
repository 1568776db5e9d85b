"""What answers about pictures are worth, case by case, each worked out by hand; and what holds of the metrics whatever the case."""

import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.tasks.answers import stated_answer
from harness.tasks.choices import chosen_letter
from harness.tasks.mmmu import is_open_match
from harness.tasks.vision_metrics import anls, edit_distance, normalized_answer, ocr_point, relaxed_match, vqa_accuracy
from tests import vision_cases


@pytest.mark.parametrize(("answer", "gold", "is_right"), vision_cases.RELAXED)
def test_numbers_on_charts_may_be_off_by_5_percent_and_texts_not_at_all(answer, gold, is_right):
    assert relaxed_match(answer, gold) is is_right


@pytest.mark.parametrize(("answer", "golds", "similarity"), vision_cases.ANLS)
def test_a_misread_answer_is_worth_its_similarity_and_another_one_nothing(answer, golds, similarity):
    assert anls(answer, golds) == float(Fraction(*similarity))


@pytest.mark.parametrize(("answer", "golds", "is_formula", "point"), vision_cases.OCR)
def test_a_point_is_given_where_the_text_was_read(answer, golds, is_formula, point):
    assert ocr_point(answer, golds, is_formula=is_formula) == point


@pytest.mark.parametrize(("text", "normalized"), vision_cases.NORMALIZED)
def test_answers_are_normalised_as_the_evaluation_of_vqa_does_it(text, normalized):
    assert normalized_answer(text) == normalized


@pytest.mark.parametrize(("answer", "golds", "accuracy"), vision_cases.VQA)
def test_vqa_accuracy_leaves_each_person_out_in_turn(answer, golds, accuracy):
    assert vqa_accuracy(answer, golds) == float(Fraction(*accuracy))


@pytest.mark.parametrize(("response", "options", "letter"), vision_cases.CHOICES)
def test_a_response_names_one_option_or_none(response, options, letter):
    assert chosen_letter(response, options) == letter


@pytest.mark.parametrize(("answer", "golds", "is_right"), vision_cases.OPEN)
def test_an_open_question_of_mmmu_is_answered_by_its_number_or_its_words(answer, golds, is_right):
    assert is_open_match(answer, golds) is is_right


@pytest.mark.parametrize(("response", "answer"), vision_cases.STATED)
def test_a_short_answer_is_what_a_response_states(response, answer):
    assert stated_answer(response) == answer


@pytest.mark.parametrize(
    "cases", ["RELAXED", "ANLS", "OCR", "NORMALIZED", "VQA", "CHOICES", "OPEN", "STATED"]
)  # fmt: skip
def test_every_rule_has_twenty_cases_or_more_and_none_twice(cases):
    found = getattr(vision_cases, cases)
    assert len(found) >= 20
    assert len({repr(case[:-1]) for case in found}) == len(found)


@pytest.mark.parametrize("golds", [[], "one text"])
@pytest.mark.parametrize("metric", [anls, ocr_point, vqa_accuracy])
def test_gold_answers_are_a_list_with_something_in_it(metric, golds):
    with pytest.raises(ValueError, match="gold answers: found .*; allowed: a list of one text or more"):
        metric("x", golds)


_TEXTS = st.text(alphabet="ab1 .,%-$'\n", max_size=8)


@given(_TEXTS, _TEXTS)
def test_the_distance_is_that_of_its_definition(first, second):
    def slow(a, b):
        if not a or not b:
            return len(a) + len(b)
        return min(slow(a[1:], b) + 1, slow(a, b[1:]) + 1, slow(a[1:], b[1:]) + (a[0] != b[0]))

    first, second = first[:5], second[:5]
    assert edit_distance(first, second) == slow(first, second)


@given(_TEXTS, st.lists(_TEXTS, min_size=1, max_size=4))
@settings(max_examples=200)
def test_what_an_answer_is_worth_lies_between_nothing_and_all_and_the_gold_answer_is_worth_all(answer, golds):
    assert 0 <= anls(answer, golds) <= 1
    assert 0 <= vqa_accuracy(answer, golds) <= 1
    assert anls(golds[-1], golds) == 1
    assert vqa_accuracy(golds[0], golds[:1] * 10) == 1
    assert relaxed_match(golds[0], golds[0])
    assert not golds[0].strip() or ocr_point(f"it says {golds[0]}!", golds) == 1


@given(_TEXTS, st.lists(_TEXTS, min_size=10, max_size=10))
def test_the_formula_of_vqa_accuracy_is_the_loop_of_its_definition(answer, golds):
    said = normalized_answer(answer)
    each = []
    for left_out in range(10):
        others = [normalized_answer(gold) for i, gold in enumerate(golds) if i != left_out]
        each.append(min(Fraction(1), Fraction(others.count(said), 3)))
    assert vqa_accuracy(answer, golds) == float(sum(each) / 10)


@pytest.mark.parametrize(
    "text", ["1" * 200_000, "-" * 200_000, "a " * 100_000, "1," * 100_000, "answer: " * 30_000, "(A" * 90_000]
)
def test_an_answer_that_repeats_itself_to_the_end_is_judged_in_no_time(text):
    began = time.monotonic()
    relaxed_match(text, "5")
    anls(text, ["a short one", "5"])
    ocr_point(text, ["x y z"])
    vqa_accuracy(text, ["x"] * 10)
    is_open_match(text, ["5", "x"])
    chosen_letter(text, vision_cases.NINE)
    stated_answer(text)
    assert time.monotonic() - began < 5
