"""The suites of the wind tunnel ask the same of every variant, and their data suffice for their budgets."""

from pathlib import Path

import pytest

from harness.data import SPLITS
from harness.suite import load_suite

FOLDER = Path(__file__).parent.parent / "suites" / "windtunnel"
SUITES = {path.stem: load_suite(path) for path in sorted(FOLDER.glob("*.toml")) if path.stem != "claims"}


def test_there_is_a_suite_of_every_question():
    asked = {
        "data",
        "losses",
        "learning_rates",
        "learning_rates_sft",
        "teacher_size",
        "larger",
        "formats",
        "scales",
        "along",
        "learning_rates_merged",
    }
    assert set(SUITES) == {"tunnel", "sft", "rl", "merged"} | asked
    assert all(
        suite.name == ("windtunnel" if stem == "tunnel" else f"windtunnel-{stem}").replace("_", "-")
        for stem, suite in SUITES.items()
    )


@pytest.mark.parametrize("stem", SUITES)
def test_all_ask_the_same_questions_in_the_same_way(stem):
    suite, first = SUITES[stem], SUITES["tunnel"]
    assert [task.record for task in suite.tasks] == [task.record for task in first.tasks]
    assert (suite.engine, suite.diagnostics) == (first.engine, first.diagnostics)
    assert suite.data["corpus"] == first.data["corpus"]
    assert [variant.quantization for variant in suite.variants if variant.name == "ptq"] == [
        variant.quantization for variant in first.variants if variant.name == "ptq"
    ]


@pytest.mark.parametrize("stem", SUITES)
def test_every_recipe_is_trained_often_enough_and_on_data_that_suffice(stem):
    suite = SUITES[stem]
    trained = [variant for variant in suite.variants if variant.is_trained]
    for name in {variant.group for variant in trained}:
        assert len([variant for variant in trained if variant.group == name]) == (3 if stem == "tunnel" else 5)
    for variant in trained:
        tokens = getattr(suite.data[variant.data], "tokens", None)
        assert tokens is None or SPLITS["train"] * tokens > 100 * variant.training.tokens
