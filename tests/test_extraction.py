r"""What is taken for the answer of a response, case by case, each worked out by hand."""

import time
from decimal import Decimal

import pytest

from harness.stats import INVALID
from harness.tasks import math500
from harness.tasks.answers import (
    extract_box,
    extract_integer,
    extract_letter,
    extract_number,
    first_of_each,
    last_box,
    plain,
    whole_number,
)


@pytest.mark.parametrize(
    ("text", "box"),
    [
        (r"So \boxed{7}.", "7"),
        (r"First \boxed{3}, no: \boxed{4}. That is all, see page 5.", "4"),
        (r"\boxed{\frac{1}{\sqrt{2}}}", r"\frac{1}{\sqrt{2}}"),
        (r"$\boxed{ \left\{ 1, 2 \right\} }$", r"\left\{ 1, 2 \right\}"),
        (r"\boxed{\{1, 2\}} is the set", r"\{1, 2\}"),
        (r"\boxed{\left\{ x \right.} and on", r"\left\{ x \right."),
        (r"\fbox{11}", "11"),
        (r"\boxed {12}", "12"),
        (r"thus $\boxed 5$.", "5"),
        (r"thus \boxed 5.", "5"),
        (r"\boxed{\boxed{9}}", "9"),
        (r"\boxed{4}, written in \boxed{} as asked", "4"),
        (r"\boxed{4} and then \boxed{12", "4"),
        (r"\boxed{12", None),
        (r"\boxedsomething{3}", None),
        ("\\boxed{\u22125}", "-5"),
        ("The answer is 7.", None),
        ("", None),
    ],
)
def test_the_last_finished_box_counts(text, box):
    assert last_box(text) == box
    assert extract_box(text) == (box or INVALID)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{204}", "204"),
        (r"\boxed{012}", "12"),
        (r"\boxed{000}", "0"),
        (r"\boxed{m+n = 113}", "113"),
        (r"\boxed{\text{73}}", "73"),
        (r"\boxed{\textbf{(73)}}", r"\textbf{(73)}"),
        (r"\boxed{$540$}", "540"),
        (r"\boxed{60^\circ}", "60"),
        (r"\boxed{60^{\circ}}", "60"),
        (r"\boxed{33.0}", "33"),
        (r"\boxed{1,000}", "1,000"),
        ("\\boxed{\u2212204}", "-204"),
        (r"\boxed{\frac{24}{2}}", r"\frac{24}{2}"),
        (r"\boxed{2^{5}}", "2^{5}"),
        (r"\boxed{3x}", "3x"),
        (r"\boxed{3\pi}", r"3\pi"),
        (r"\boxed{12, 13}", "12, 13"),
        ("It is 204.", INVALID),
    ],
)
def test_an_integer_of_0_to_999_is_read_from_the_last_box(text, answer):
    assert extract_integer(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{18}", "18"),
        (r"\boxed{\$18.00}", "18"),
        (r"She makes $\boxed{\$1,000}$ a day", "1000"),
        (r"\boxed{1\,250}", "1250"),
        (r"\boxed{32,\!348}", "32348"),
        (r"\boxed{1{,}000{,}000}", "1000000"),
        (r"\boxed{10 000}", "10000"),
        (r"\boxed{5\text{ dollars}}", "5"),
        (r"\boxed{50\%}", "50"),
        (r"\boxed{x = 7}", "7"),
        (r"\boxed{-3}", "-3"),
        ("\\boxed{\u22123}", "-3"),
        (r"\boxed{- 3}", "-3"),
        (r"\boxed{0.50}", "0.5"),
        (r"\boxed{\text{none}}", r"\text{none}"),
        ("3 + 4 = 7\n#### 7", "7"),
        ("#### 5 was wrong.\n#### $1,080 for 12 months", "1080"),
        ("He has 3 of 12 left, so 12 - 3 = 9.", "9"),
        ("That is 10-7", "7"),
        ("It costs $18.00.", "18"),
        ("The total is **1,450,000** dollars.", "1450000"),
        ("It costs 1,000, which is much.", "1000"),
        ("They are 1,2,3", "3"),
        ("Water is H2O", INVALID),
        ("", INVALID),
    ],
)
def test_a_number_is_read_from_the_box_or_the_mark_or_the_end(text, answer):
    assert extract_number(text) == answer


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("Answer: C", "C"),
        ("**Answer:** C", "C"),
        ("**Answer: (C)**", "C"),
        ("Answer: $C$", "C"),
        ("answer: c", "C"),
        ("Answer:\n\nB", "B"),
        ("Answer: B, since energy is conserved.", "B"),
        ("Answer: A because it is warm", "A"),
        ("The answer is (D).", "D"),
        ("The correct option is B.", "B"),
        (r"The answer is $\boxed{\text{C}}$.", "C"),
        (r"\boxed{C}", "C"),
        (r"\boxed{\textbf{(B)}}", "B"),
        (r"\boxed{\mathrm{D}}", "D"),
        (r"\boxed{C) 5 m}", "C"),
        (r"\boxed{\text{Answer: A}}", "A"),
        (r"\fbox{B}", "B"),
        (r"\boxed{A}? No. Answer: D", "D"),
        (r"Answer: D? No: \boxed{A}", "A"),
        ("Answer: B\nWait.\nAnswer: C", "C"),
        (r"\boxed{42} m, so Answer: B", "B"),
        (r"Answer: B, that is \boxed{42} m", "B"),
        ("(A) and (B) are out.\nC", "C"),
        ("Some words.\n**C**", "C"),
        ("Some words.\n(B) the second", "B"),
        ("Some words.\nC. the third\n\n", "C"),
        ("Answer D", "D"),
        ("I rule out (A) and (D), which leaves (B), I think", "B"),
        ("Answer: A catalyst lowers the barrier, so it is (C)", "C"),
        ("Answer: D-glucose is formed: (B)", "B"),
        ("Options: A) 1 B) 2 C) 3\n\nC", "C"),
        ("Answer: E", INVALID),
        ("A catalyst lowers the barrier", INVALID),
        ("AB", INVALID),
        ("", INVALID),
    ],
)
def test_a_letter_is_read_from_what_is_said_last(text, letter):
    assert extract_letter(text) == letter


def test_a_filter_reads_every_response_of_every_document():
    found = first_of_each(extract_box)([[r"\boxed{1}", r"\boxed{2}"], ["none"]], [{}, {}])
    assert found == [["1", "2"], [INVALID]]


@pytest.mark.parametrize(
    ("value", "text"), [("1E+3", "1000"), ("10.50", "10.5"), ("-0", "0"), ("-0.0", "0"), ("007", "7"), ("100", "100")]
)
def test_a_number_has_one_plain_form(value, text):
    assert plain(Decimal(value)) == text


@pytest.mark.parametrize("text", ["2 or 3", "1/2", "3x", "five", "", "1.2.3", "12:30"])
def test_what_is_more_or_less_than_one_number_is_none(text):
    assert whole_number(text) is None


@pytest.mark.parametrize(
    ("extract", "text", "answer"),
    [
        (extract_box, r"\boxed{7} " + r"\boxed{" * 30_000, "7"),
        (extract_box, r"\boxed{" * 30_000 + "7" + "}" * 30_000, "7"),
        (extract_letter, "Answer: " + "*" * 200_000, INVALID),
        (extract_letter, "Answer: a" + " " * 200_000 + "x", INVALID),
        (extract_number, "9" * 200_000 + "x 5", "5"),
    ],
)
def test_a_response_that_repeats_itself_to_the_end_is_read_in_no_time(extract, text, answer):
    began = time.process_time()
    assert extract(text) == answer
    assert time.process_time() - began < 5


@pytest.mark.parametrize(
    ("written", "vote"),
    [
        (r"\boxed{\left(3, \dfrac{\pi}{2}\right)}", r"(3,\frac{\pi}{2})"),
        (r"\boxed{$( 3,\tfrac{\pi}{2} )$}", r"(3,\frac{\pi}{2})"),
        (r"\boxed{p - q}", "p-q"),
        (r"\boxed{\pi x}", r"\pi x"),
        (r"\boxed{10,\!080}", "10,080"),
        (r"\boxed{11,\! 111}", "11,111"),
        (r"\boxed{1, 200}", "1, 200"),
        (r"\boxed{5\ \text{cm}}", r"5\ \text{cm}"),
        (r"\boxed{\$32}", r"\$32"),
        (r"\boxed{\leftarrow}", r"\leftarrow"),
        ("no box", INVALID),
    ],
)
def test_answers_that_differ_in_their_look_alone_vote_alike(written, vote):
    assert math500.extract([[written]], None) == [[vote]]
