r"""The generator of the wind tunnel: problems of five domains, each with a worked solution, the terse one, and one with a slip.

    arithmetic   a chain of operations on numbers of 0 to 99, from left to right
    algebra      such a chain backwards (what was x?), or letters that are defined one by another
    word         such a chain as a small story
    knowledge    a fact of a made-up world, four options, answered by a letter
    context      a register of people, city, job and pet of each, and a question about one of them, answered by a word

Every solution ends in `\boxed{...}`. Everything follows from a seed and the number of a problem, in plain Python. Which questions are
held out is decided by their hash: no problem of training is one, and the tasks ask no others.

The corpus for supervised training is limited on purpose (`Style`): most solutions are terse, and of the worked ones a share has a slip
(one wrong line, carried on). That leaves to reinforcement learning what it shall find: to work, and not to slip.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from harness.tasks.tunnel_words import CITIES, JOBS, LETTERS, NAMES, PETS, THINGS, VARIABLES, facts, known_of

DOMAINS = ("arithmetic", "algebra", "word", "knowledge", "context")
MATHS = DOMAINS[:3]
SHARES = {"arithmetic": 4, "algebra": 4, "word": 4, "knowledge": 4, "context": 4}
"""Of the problems of a corpus, in twentieths."""
STEPS = {1: 3, 2: 4, 3: 5, 4: 5, 5: 4, 6: 2, 7: 1, 8: 1}
"""How often a problem of mathematics for training takes so many steps."""
PEOPLE = {2: 4, 4: 4, 7: 3, 12: 2, 18: 2, 24: 1}
"""How often a context for training tells of so many people; five tokens each."""
DRILLS, RECITALS = 19_200, 4_800
"""So many lessons come before all others: what makes a model that finds a word again, and says what followed it."""
DRILLED = range(3, 15)
"""How many words a drill has."""
INTERVIEWED, MOST_ASKED = 0.15, 6
"""Which share of the other lessons asks about several people, and about how many at most."""
HELD_OUT_OF_16 = 2
LARGEST = 99

MORE = ["{name} finds {n} more.", "{other} gives {name} {n}.", "{name} buys {n} more."]
LESS = ["{name} loses {n}.", "{name} gives {other} {n}.", "{name} sells {n}."]
TIMES = ["Then {name} has {n} times as many."]
STORY = ("{name} has {n} {things}.", "How many {things} has {name} now?")
CHAIN = "What is {chain}, left to right?"
BACKWARDS = "What is x if x{chain} = {n}, left to right?"
LETTERED = "{letter}=?"
RECORD = "{name} {city} {job} {pet}"
ASKED = {
    "city": "Where does {name} live?",
    "job": "Which job has {name}?",
    "pet": "Which pet has {name}?",
}
NOTES = "Notes:"
SENTENCES = [*MORE, *LESS, *TIMES, *STORY, CHAIN, BACKWARDS, LETTERED, RECORD, *ASKED.values(), NOTES]
"""Every template, for the vocabulary."""


@dataclass(frozen=True)
class Problem:
    r"""A question, what belongs into its box, and solutions: `worked` is right, `slipped` has one wrong line and a wrong answer."""

    domain: str
    question: str
    answer: str
    worked: str
    slipped: str

    @property
    def terse(self) -> str:
        return boxed(self.answer)

    @property
    def is_held_out(self) -> bool:
        """Whether the question belongs to evaluation."""
        return hashlib.sha256(self.question.encode()).digest()[0] % 16 < HELD_OUT_OF_16


@dataclass(frozen=True)
class Style:
    """How a corpus is written: the share of terse solutions, and the share of the others that have a slip."""

    terse: float = 0.6
    slips: float = 0.3

    def __post_init__(self) -> None:
        for name, share in (("terse", self.terse), ("slips", self.slips)):
            if not 0 <= share <= 1:
                raise ValueError(f"{name}: found {share}; allowed is a share of 0 to 1")


@dataclass(frozen=True)
class Solved:
    """A problem with the solution that a corpus gives it; style: "terse", "worked" or "slipped"."""

    problem: Problem
    style: str

    @property
    def solution(self) -> str:
        return str(getattr(self.problem, self.style))


def corpus(seed: int | str, domains: Sequence[str] = DOMAINS, style: Style | None = None, start: int = 0) -> Iterator[Solved]:
    """The corpus of a seed without end, from its problem number `start` on: never a held-out question."""
    style = style or Style()
    number = start
    while True:
        problem = training_problem(seed, number, domains)
        rng = random.Random(f"wind tunnel style {seed} {number}")
        written = "terse" if rng.random() < style.terse else "slipped" if rng.random() < style.slips else "worked"
        yield Solved(problem, written)
        number += 1


def lesson(seed: int | str, number: int) -> tuple[str, str]:
    """Text `number` of a seed for the time before the corpus: what is asked, and a right, worked solution.

    The first `DRILLS` ask nothing: some words in no order are said again, twice. Nor do the next `RECITALS`: a register is recited in other
    orders. Of all others a share, `INTERVIEWED`, asks about several people of one register.
    """
    if number < DRILLS:
        words = _drill(random.Random(f"wind tunnel drill {seed} {number}"))
        return words, f"{words}\n{words}"
    rng = random.Random(f"wind tunnel lesson {seed} {number}")
    if number < DRILLS + RECITALS:
        return _recital(rng)
    if rng.random() < INTERVIEWED:
        return _interview(rng)
    problem = training_problem(f"lesson {seed}", number)
    return problem.question, problem.worked


def _drill(rng: random.Random) -> str:
    """Different words of a register in any order, on lines of any length."""
    words = rng.sample([*NAMES, *CITIES, *JOBS, *PETS], rng.choice(DRILLED))
    return words[0] + "".join(rng.choices(" \n", (7, 3))[0] + word for word in words[1:])


def _recital(rng: random.Random) -> tuple[str, str]:
    """A register of up to a dozen people, and its lines in other orders: three times where they are few."""
    size = rng.choice((2, 3, 4, 5, 6, 7, 12))
    register = _register(_people(rng, size))
    lines = register.split("\n")[1:]
    return register, "\n".join("\n".join(rng.sample(lines, size)) for _ in range(3 if size <= 4 else 1))


def _interview(rng: random.Random) -> tuple[str, str]:
    """Questions about different people of one register, and a worked answer to each."""
    (size,) = rng.choices(list(PEOPLE), list(PEOPLE.values()))
    people = _people(rng, size)
    asked = [(person, rng.choice(list(ASKED))) for person in rng.sample(people, min(size, MOST_ASKED))]
    questions = [ASKED[column].format(**person) for person, column in asked]
    return "\n".join([_register(people), *questions]), "\n".join(_looked_up(person, person[column]) for person, column in asked)


def training_problem(seed: int | str, number: int, domains: Sequence[str] = DOMAINS) -> Problem:
    """Problem `number` of a seed, not held out."""
    return next(each for each in _drawn(random.Random(f"wind tunnel {seed} {number}"), domains) if not each.is_held_out)


def held_out(seed: int | str, n: int, domains: Sequence[str] = DOMAINS, sizes: Sequence[int] | None = None) -> list[Problem]:
    """`n` different held-out problems, the domains in turn; `sizes`: steps or people to draw from, as training has them if None."""
    rng = random.Random(f"wind tunnel held out {seed}")
    found: dict[str, Problem] = {}
    while len(found) < n:
        drawn = _drawn(rng, [domains[len(found) % len(domains)]], sizes)
        problem = next(each for each in drawn if each.is_held_out)
        found.setdefault(problem.question, problem)
    return list(found.values())


def boxed(answer: str) -> str:
    return f"\\boxed{{{answer}}}"


def _drawn(rng: random.Random, domains: Sequence[str], sizes: Sequence[int] | None = None) -> Iterator[Problem]:
    while True:
        (domain,) = rng.choices(domains, [SHARES[each] for each in domains])
        usual = PEOPLE if domain == "context" else STEPS
        (size,) = rng.choices(list(usual), list(usual.values())) if sizes is None else [rng.choice(sizes)]
        yield _MAKERS[domain](rng, size)


@dataclass(frozen=True)
class _Step:
    """value[number of the step + 1] = value[of] op n."""

    of: int
    op: str
    n: int


def _values(start: int, steps: Sequence[_Step], slip: tuple[int, int] | None = None) -> list[int] | None:
    """The start and the result of every step, one of them (`slip`: which, by how much) wrong; None where one is no number of 0 to 99."""
    values = [start]
    for number, step in enumerate(steps):
        value = _result(values[step.of], step.op, step.n)
        if slip is not None and slip[0] == number and value is not None:
            value += slip[1]
        if value is None or not 0 <= value <= LARGEST:
            return None
        values.append(value)
    return values


def _result(value: int, op: str, n: int) -> int | None:
    if op == "/":
        return value // n if value % n == 0 else None
    return {"+": value + n, "-": value - n, "*": value * n}[op]


def _slipped_values(rng: random.Random, start: int, steps: Sequence[_Step]) -> list[int]:
    """The values with one slip that makes the last one wrong."""
    right = _values(start, steps)
    assert right is not None
    slips = [(number, offset) for number in range(len(steps)) for offset in (-10, -3, -2, -1, 1, 2, 3, 10)]
    for slip in rng.sample(slips, len(slips)):
        values = _values(start, steps, slip)
        if values is not None and values[-1] != right[-1]:
            return values
    raise AssertionError("the last step can always be wrong")


def _chain(rng: random.Random, size: int, looks_back: float = 0.0) -> tuple[int, list[_Step], list[int]]:
    """A start, `size` steps and all values; a step starts from the value before it, or with `looks_back` from any earlier one."""
    start = rng.randint(2, 30)
    steps: list[_Step] = []
    values = [start]
    while len(steps) < size:
        of = rng.randrange(len(values)) if rng.random() < looks_back else len(values) - 1
        op = rng.choice("++--*")
        n = rng.randint(2, 5) if op == "*" else rng.randint(2, 9)
        value = _result(values[of], op, n)
        if value is not None and 1 <= value <= LARGEST and value != values[of]:
            steps.append(_Step(of, op, n))
            values.append(value)
    return start, steps, values


def _lines(steps: Sequence[_Step], values: Sequence[int], names: Sequence[str] | None = None) -> str:
    """A line a step, and the box with the last value."""
    lines = [f"{values[step.of]}{step.op}{step.n}={value}" for step, value in zip(steps, values[1:], strict=True)]
    named = lines if names is None else [f"{name}={line}" for name, line in zip(names[1:], lines, strict=True)]
    return "\n".join([*named, boxed(str(values[-1]))])


def _arithmetic(rng: random.Random, size: int) -> Problem:
    start, steps, values = _chain(rng, size)
    chain = str(start) + "".join(f" {step.op}{step.n}" for step in steps)
    wrong = _slipped_values(rng, start, steps)
    return Problem(
        "arithmetic", CHAIN.format(chain=chain), str(values[-1]), worked=_lines(steps, values), slipped=_lines(steps, wrong)
    )


def _algebra(rng: random.Random, size: int) -> Problem:
    return rng.choice([_backwards, _lettered])(rng, size)


def _backwards(rng: random.Random, size: int) -> Problem:
    start, steps, values = _chain(rng, size)
    chain = "".join(f" {step.op}{step.n}" for step in steps)
    inverse = {"+": "-", "-": "+", "*": "/"}
    undone = [_Step(number, inverse[step.op], step.n) for number, step in enumerate(reversed(steps))]
    wrong = _slipped_values(rng, values[-1], undone)
    question = BACKWARDS.format(chain=chain, n=values[-1])
    return Problem("algebra", question, str(start), worked=_lines(undone, values[::-1]), slipped=_lines(undone, wrong))


def _lettered(rng: random.Random, size: int) -> Problem:
    start, steps, values = _chain(rng, size, looks_back=0.3)
    names = rng.sample(VARIABLES, size + 1)
    given = [f"{names[0]}={start}"]
    given += [f"{name}={names[step.of]}{step.op}{step.n}" for name, step in zip(names[1:], steps, strict=True)]
    question = "\n".join([*given, LETTERED.format(letter=names[-1])])
    wrong = _slipped_values(rng, start, steps)
    return Problem(
        "algebra", question, str(values[-1]), worked=_lines(steps, values, names), slipped=_lines(steps, wrong, names)
    )


def _word(rng: random.Random, size: int) -> Problem:
    start, steps, values = _chain(rng, size)
    (name, other), things = rng.sample(NAMES, 2), rng.choice(THINGS)
    kinds = {"+": MORE, "-": LESS, "*": TIMES}
    told = [STORY[0].format(name=name, n=start, things=things)]
    told += [rng.choice(kinds[step.op]).format(name=name, other=other, n=step.n) for step in steps]
    question = " ".join([*told, STORY[1].format(name=name, things=things)])
    wrong = _slipped_values(rng, start, steps)
    return Problem("word", question, str(values[-1]), worked=_lines(steps, values), slipped=_lines(steps, wrong))


def _knowledge(rng: random.Random, size: int) -> Problem:
    fact = rng.choice(facts())
    options = [fact.value, *rng.sample(fact.others, 3)]
    rng.shuffle(options)
    listed = [f"{letter}: {option}" for letter, option in zip(LETTERS, options, strict=True)]
    right = options.index(fact.value)
    wrong = rng.choice([index for index in range(len(options)) if index != right])

    def solution(index: int) -> str:
        """All that is known of the place, the option, the box."""
        known = {**known_of(fact.place), fact.relation: options[index]}
        return "\n".join([" ".join([fact.place, *known.values()]), listed[index], boxed(LETTERS[index])])

    question = "\n".join([fact.question, *listed])
    return Problem("knowledge", question, LETTERS[right], worked=solution(right), slipped=solution(wrong))


def _context(rng: random.Random, size: int) -> Problem:
    people = _people(rng, size)
    asked = rng.choice(list(ASKED))
    person, other = rng.sample(people, 2)
    question = "\n".join([_register(people), ASKED[asked].format(**person)])
    worked = _looked_up(person, person[asked])
    return Problem(
        "context", question, person[asked], worked, slipped=_looked_up({**person, asked: other[asked]}, other[asked])
    )


def _people(rng: random.Random, size: int) -> list[dict[str, str]]:
    columns = {"name": NAMES, "city": CITIES, "job": JOBS, "pet": PETS}
    drawn = zip(*(rng.sample(words, size) for words in columns.values()), strict=True)
    return [dict(zip(columns, values, strict=True)) for values in drawn]


def _register(people: Sequence[dict[str, str]]) -> str:
    return "\n".join([NOTES, *(RECORD.format(**each) for each in people)])


def _looked_up(person: dict[str, str], value: str) -> str:
    """All that is told of a person, and the box."""
    return RECORD.format(**person) + "\n" + boxed(value)


_MAKERS: dict[str, Callable[[random.Random, int], Problem]] = {
    "arithmetic": _arithmetic,
    "algebra": _algebra,
    "word": _word,
    "knowledge": _knowledge,
    "context": _context,
}
