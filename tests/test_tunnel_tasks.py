"""The generator of the wind tunnel and its four tasks: what is held out, what is right, what is a slip."""

import re
from itertools import islice
from pathlib import Path

import pytest
from lm_eval.api.model import LM
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager

from harness.tasks import tunnel, tunnel_tasks, tunnel_words
from harness.tasks.tunnel import DOMAINS, DRILLS, MATHS, RECITALS, Style, corpus, held_out, lesson, training_problem
from harness.tasks.tunnel_tasks import N_QUESTIONS, TASKS, questions

N = 200


def some(domain):
    return [training_problem(0, number, [domain]) for number in range(N)]


def box(solution):
    (content,) = re.findall(r"\\boxed\{([^{}]*)\}", solution)
    assert solution.endswith(f"\\boxed{{{content}}}")
    return content


def reached(solution):
    """What the lines of a solution come to, read as a reader would: each line calculated anew."""
    values = []
    for line in solution.split("\n")[:-1]:
        left, op, right, result = re.fullmatch(r"(?:[a-z]=)?(\d+)([-+*/])(\d+)=(\d+)", line).groups()
        value = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__, "/": int.__floordiv__}[op](int(left), int(right))
        values.append((value, int(result)))
    return values


@pytest.mark.parametrize("domain", DOMAINS)
def test_the_answer_is_in_the_box_of_every_right_solution_and_not_of_a_slipped_one(domain):
    for problem in some(domain):
        assert box(problem.worked) == box(problem.terse) == problem.answer
        assert box(problem.slipped) != problem.answer


@pytest.mark.parametrize("domain", MATHS)
def test_every_line_of_a_worked_solution_is_right_and_exactly_one_of_a_slipped_one_is_not(domain):
    for problem in some(domain):
        right, slipped = reached(problem.worked), reached(problem.slipped)
        assert all(value == result for value, result in right) and right[-1][1] == int(problem.answer)
        assert sum(value != result for value, result in slipped) == 1 and len(slipped) == len(right)
        assert all(0 <= result <= tunnel.LARGEST for _, result in right + slipped)


def test_a_chain_is_what_python_makes_of_it_from_left_to_right():
    for problem in some("arithmetic"):
        start, *steps = re.findall(r"[-+*]?\d+", problem.question)
        value = int(start)
        for step in steps:
            value = eval(f"{value}{step}")
        assert str(value) == problem.answer


def test_x_put_into_its_chain_and_letters_put_in_turn_give_the_answer():
    for problem in some("algebra"):
        if "=?" in problem.question:
            known = {}
            *given, asked = problem.question.split("\n")
            for line in given:
                exec(line, {}, known)
            assert str(known[asked.removesuffix("=?")]) == problem.answer
        else:
            chain, result = re.fullmatch(r"What is x if x(.*) = (\d+), left to right\?", problem.question).groups()
            value = int(problem.answer)
            for step in chain.split():
                value = eval(f"{value}{step}")
            assert value == int(result)


def test_a_story_told_again_gives_the_answer():
    for problem in some("word"):
        first, *told, _ = re.split(r"(?<=[.?]) ", problem.question)
        value = int(re.search(r"\d+", first)[0])
        hero = first.split()[0]
        for sentence in told:
            n = int(re.search(r"\d+", sentence)[0])
            loses = re.search(r"loses|sells", sentence) or sentence.startswith(f"{hero} gives")
            value = value * n if "times" in sentence else value - n if loses else value + n
        assert str(value) == problem.answer


def test_the_letter_is_the_option_that_the_made_up_world_has_there():
    world = {fact.question: fact.value for fact in tunnel_words.facts()}
    for problem in some("knowledge"):
        question, *options = problem.question.split("\n")
        assert options["ABCD".index(problem.answer)] == f"{problem.answer}: {world[question]}"
        assert len({option[3:] for option in options}) == 4
        place, *known = problem.worked.split("\n")[0].split()
        assert known == list(tunnel_words.known_of(place).values())


def test_the_world_has_200_facts_that_no_seed_changes():
    facts = tunnel_words.facts()
    assert len({(fact.relation, fact.place) for fact in facts}) == len(facts) == 200
    assert facts[0] == tunnel_words.Fact("river", "Abnor", "Olin")
    assert tunnel_words.known_of("Abnor")["river"] == "Olin" and len(tunnel_words.known_of("Abnor")) == 5


def test_a_question_about_a_context_has_one_answer_in_it():
    for problem in some("context"):
        _, *told, asked = problem.question.split("\n")
        record = problem.worked.split("\n")[0]
        name = record.split()[0]
        assert told.count(record) == 1 and f" {name}" in asked and problem.answer in record
        assert sum(line.startswith(f"{name} ") for line in told) == 1 and len(set(told)) == len(told)


def test_training_never_asks_what_a_task_asks_whatever_the_seed():
    asked = {problem.question for task in TASKS for problem in questions(task)}
    assert len(asked) == len(TASKS) * N_QUESTIONS
    for seed in (0, "evaluation"):
        for solved in islice(corpus(seed), 1500):
            assert not solved.problem.is_held_out and solved.problem.question not in asked
    assert all(problem.is_held_out for task in TASKS for problem in questions(task))


def test_questions_of_validation_are_of_the_tasks_kind_and_not_theirs():
    for task in TASKS:
        own = {problem.question for problem in questions(task)}
        others = questions(task, "validation", 50)
        assert {problem.domain for problem in others} == set(TASKS[task][0])
        assert sum(problem.question in own for problem in others) <= 1


def test_a_seed_gives_the_same_corpus_from_wherever_it_is_read_and_another_seed_another():
    first, again, later = list(islice(corpus(3), 60)), list(islice(corpus(3), 60)), list(islice(corpus(3, start=40), 20))
    assert first == again and first[40:] == later
    assert first != list(islice(corpus(4), 60))


def test_the_corpus_has_the_styles_and_domains_that_are_stated():
    written = list(islice(corpus(0), 4000))
    share = {style: sum(each.style == style for each in written) / len(written) for style in ("terse", "worked", "slipped")}
    assert share == pytest.approx({"terse": 0.6, "worked": 0.28, "slipped": 0.12}, abs=0.03)
    for domain, parts in tunnel.SHARES.items():
        assert sum(each.problem.domain == domain for each in written) / len(written) == pytest.approx(parts / 20, abs=0.03)
    assert all(each.style == "worked" for each in islice(corpus(0, style=Style(terse=0, slips=0)), 100))


def test_lessons_are_drills_then_recitals_then_right_solutions_and_ask_nothing_held_out():
    asked = {problem.question for task in TASKS for problem in questions(task)}
    for number in range(50):
        words, told = lesson(0, number)
        assert told == f"{words}\n{words}" and 3 <= len(words.split()) <= 14
        question, told = lesson(0, DRILLS + number)
        register, lines = question.split("\n")[1:], told.split("\n")
        assert "?" not in question and sorted(lines) == sorted(register * (3 if len(register) <= 4 else 1))
    interviews = 0
    for number in range(DRILLS + RECITALS, DRILLS + RECITALS + 600):
        question, told = lesson(0, number)
        assert question not in asked and lesson(0, number) == (question, told)
        assert told.split("\n")[-1].startswith("\\boxed{")
        if question.count("?") > 1:
            interviews += 1
            *people, last = question.split("\n")
            who, value = last.rstrip("?").split(), told.split("{")[-1].rstrip("}")
            assert any(line.split()[0] in who and value in line.split() for line in people)
            assert told.count("boxed") == question.count("?") <= 6
    assert 60 < interviews < 120


@pytest.mark.parametrize("shares", [{"terse": 1.2}, {"slips": -0.1}])
def test_a_share_that_is_none_is_refused(shares):
    with pytest.raises(ValueError, match=r"(terse|slips): found .*; allowed is a share of 0 to 1"):
        Style(**shares)


def test_every_text_is_made_of_pieces_of_the_vocabulary():
    known = set(tunnel_words.vocabulary(tunnel.SENTENCES))
    assert len(known) < 500
    for solved in islice(corpus(0), 2000):
        for text in (solved.problem.question, solved.problem.worked, solved.problem.slipped):
            pieces = tunnel_words.tokens(text)
            assert "".join(pieces) == text and set(pieces) <= known


def test_sizes_are_the_steps_or_people_of_the_problems():
    assert {len(problem.worked.split("\n")) - 1 for problem in held_out("sizes", 60, MATHS, [6])} == {6}
    assert {problem.question.count("\n") - 1 for problem in held_out("sizes", 20, ["context"], [7])} == {7}


class Answering(LM):
    """Gives every document of a task what `answer` makes of it."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def generate_until(self, requests, disable_tqdm=False):
        return [self.answer(request.doc) for request in requests]

    def loglikelihood(self, requests, disable_tqdm=False):
        raise NotImplementedError

    loglikelihood_rolling = loglikelihood


@pytest.mark.parametrize("task", TASKS)
def test_whoever_knows_the_answers_gets_all_and_whoever_does_not_gets_none(task):
    manager = TaskManager(include_path=str(Path(tunnel_tasks.__file__).parent), include_defaults=False)

    def metrics(answer):
        done = simple_evaluate(Answering(answer), tasks=[task], task_manager=manager, bootstrap_iters=0, verbosity="ERROR")
        return {name.split(",")[0]: value for name, value in done["results"][task].items()}

    solutions = {problem.question: problem for problem in questions(task)}
    right = metrics(lambda doc: solutions[doc["question"]].worked)
    assert right["exact_match"] == 1.0 and right["unparsed"] == 0.0
    wrong = metrics(lambda doc: solutions[doc["question"]].slipped)
    assert wrong["exact_match"] == 0.0 and wrong["unparsed"] == 0.0
    assert metrics(lambda doc: doc["answer"])["unparsed"] == 1.0


@pytest.mark.parametrize(
    ("response", "named", "letter"),
    [
        ("Lusk tin\nC: sun\n\\boxed{C}", 1.0, 1.0),
        ("Lusk tin\nA: sun\n\\boxed{A}", 1.0, 0.0),
        ("C: moon\n\\boxed{C}", 0.0, 1.0),
        ("\\boxed{C}", 1.0, 1.0),
        ("\\boxed{B}", 0.0, 0.0),
        ("sun", 0.0, 0.0),
    ],
)
def test_an_option_is_named_by_its_text_or_else_by_its_letter(response, named, letter):
    doc = {"question": "Which sign is on the flag of Lusk?\nA: moon\nB: crown\nC: sun\nD: rose", "answer": "C"}
    scored = tunnel_tasks.score_option(doc, [response])
    assert (scored["exact_match"], scored["letter_match"]) == (named, letter)
