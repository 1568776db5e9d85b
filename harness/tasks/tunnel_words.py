r"""The closed vocabulary of the wind tunnel and its made-up world of facts. Nothing here depends on a seed.

`tokens` cuts a text into what its small tokenizer has a token for: `\boxed{`, a word with the space before it, an operator with or
without one, a single digit, any other single character. The pieces joined are the text again.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from functools import cache

PIECES = r"\\boxed\{| ?[A-Za-z]+| ?[-+*/=]|[0-9]|[^A-Za-z0-9]"
"""A regular expression that matches one piece; every text is a row of such pieces."""


def _words(text: str) -> list[str]:
    return text.split()


NAMES = _words("""Ada Amir Anna Ben Boris Cara Carl Dana Dora Eli Emma Eva Finn Fred Gina Hana Hugo Ida Igor Ines Ivan Jack Jana Joe
Karl Kim Lara Leo Lina Luca Mara Max Mia Nils Nora Omar Otto Paul Pia Rosa Ruth Sam Sara Tara Tim Tom Uma Vera""")
CITIES = _words("""Bern Bonn Brest Cairo Delhi Dover Dublin Genoa Kyiv Leeds Lima Lyon Malmo Nice Oslo Paris Porto Riga Rome Seoul
Tokyo Turin Vigo Wien""")
JOBS = _words("""baker barber brewer butcher carver clerk cook dancer diver doctor driver farmer fisher guard hunter judge lawyer miner
nurse painter pilot potter singer tailor""")
PETS = _words("""bat beetle camel cat cow crab crow dog dove duck fox frog goat goose hare hen horse lizard monkey mouse parrot pig
rabbit snake""")
THINGS = _words("apples beads books boxes cards coins cups eggs keys nuts pens shells stamps stones toys")
LETTERS = "ABCD"
VARIABLES = "abcdefghkmnp"

PLACES = _words("""Abnor Adrim Belto Bosk Caldor Cheva Dolm Drisk Elvar Esmo Fando Felk Gorva Grim Halvo Hestu Irsk Jolm Jutra Kesto
Lemba Lusk Mabru Morvo Nalto Nimsk Olvet Pesko Prud Quilm Ramto Salvu Skorn Tarvo Udrek Vasko Wanto Wesk Yalmo Zelt""")
RELATIONS = {
    "river": ("Which river runs through {}?", _words("Alm Bresk Dorn Eltu Fyr Garn Ilk Lorn Mesk Nuth Olin Vash")),
    "metal": ("Which metal is mined in {}?", _words("brass cobalt copper gold iron lead nickel silver steel tin zinc bronze")),
    "fruit": (
        "Which fruit grows in {}?",
        _words("dates figs grapes lemons limes mangos melons olives pears plums quinces cherries"),
    ),
    "flag": ("Which sign is on the flag of {}?", _words("anchor arrow bell crown cross harp key moon rose star sun tree")),
    "craft": (
        "Which craft is old in {}?",
        _words("carpets candles clocks dolls drums flutes lace masks paper pots ropes sails"),
    ),
}


@dataclass(frozen=True)
class Fact:
    """What is known of a place of the made-up world."""

    relation: str
    place: str
    value: str

    @property
    def question(self) -> str:
        return RELATIONS[self.relation][0].format(self.place)

    @property
    def others(self) -> list[str]:
        """What else the relation could be, in the order of the table."""
        return [value for value in RELATIONS[self.relation][1] if value != self.value]


@cache
def facts() -> tuple[Fact, ...]:
    """Every fact of the made-up world, the same for every seed."""
    return tuple(
        Fact(relation, place, random.Random(f"wind tunnel {relation} {place}").choice(values))
        for relation, (_, values) in RELATIONS.items()
        for place in PLACES
    )


def known_of(place: str) -> dict[str, str]:
    """The value of every relation of a place."""
    return {fact.relation: fact.value for fact in facts() if fact.place == place}


def tokens(text: str) -> list[str]:
    return re.findall(PIECES, text, flags=re.DOTALL)


def vocabulary(sentences: list[str]) -> list[str]:
    """Every piece that a text of the wind tunnel can hold, sorted: those of the templates, and of the tables as they are used."""
    after_a_space = [*NAMES, *CITIES, *JOBS, *PETS, *THINGS, *PLACES]
    after_a_space += [value for _, values in RELATIONS.values() for value in values]
    at_the_start = [*NAMES, *CITIES, *JOBS, *PETS, *PLACES, *LETTERS, *VARIABLES]
    fixed = [*"0123456789+-*/=", *(f" {op}" for op in "+-*/="), " ", "\n", ".", ",", ":", "?", "}", "\\boxed{"]
    questions = [question for question, _ in RELATIONS.values()]
    bare = [re.sub(r"\{[a-z]*\}", "", sentence) for sentence in sentences + questions]
    from_templates = [piece for sentence in bare for piece in tokens(sentence) + tokens(f" {sentence}")]
    return sorted({*(f" {word}" for word in after_a_space), *at_the_start, *fixed, *from_templates})
