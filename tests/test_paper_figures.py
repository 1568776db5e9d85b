"""The file of the paper's figures: what is in it, and what its loader refuses."""

from collections import Counter
from pathlib import Path

import pytest

from harness.errors import SuiteError
from harness.paper_figures import load_paper_figures

FILE = Path(__file__).parent.parent / "docs" / "paper-figures.toml"
LEGAL = """
schema = 1

[[table]]
id = "T3b"
source = "arXiv 2601.20088v3, T3b: a table"
unit = "percent"
figure = [
  { model = "m", variant = "bf16", task = "aime24", value = 73.0, verified = "cross-checked" },
  { model = "m", variant = "qad", task = "aime24", metric = "loose", value = 71.7, verified = "single translation" },
  { model = "m", variant = "qad", task = "ocrbench", value = 857, verified = "first-hand", unit = "points of 1000", source = "arXiv 2511.03929, Table 8" },
]
"""


def load(folder: Path, text: str):
    path = folder / "figures.toml"
    path.write_text(text)
    return load_paper_figures(path)


def refused(folder: Path, old: str, new: str) -> str:
    assert old in LEGAL
    with pytest.raises(SuiteError) as caught:
        load(folder, LEGAL.replace(old, new, 1))
    return str(caught.value).replace(f"{folder / 'figures.toml'}: ", "")


def test_a_figure_is_found_by_table_model_variant_task_and_metric_with_its_source(tmp_path):
    found = load(tmp_path, LEGAL)
    bf16, qad = ("T3b", "m", "bf16"), ("T3b", "m", "qad")
    assert list(found) == [(*bf16, "aime24", None), (*qad, "aime24", "loose"), (*qad, "ocrbench", None)]
    first, _, last = found.values()
    assert (first.value, first.value_in_suite, first.unit, first.verified) == (73.0, 73.0, "percent", "cross-checked")
    assert first.source == "arXiv 2601.20088v3, T3b: a table"
    assert (last.value, last.value_in_suite, last.source) == (857.0, 85.7, "arXiv 2511.03929, Table 8")


def test_a_figure_in_nats_is_one_of_the_diagnostics_and_stays_in_nats(tmp_path):
    cell = '"bf16", task = "diagnostics", metric = "kl", unit = "nats", value = 0.311'
    figure = next(iter(load(tmp_path, LEGAL.replace('"bf16", task = "aime24", value = 73.0', cell, 1)).values()))
    assert (figure.key, figure.value_in_suite) == (("T3b", "m", "bf16", "diagnostics", "kl"), 0.311)


def test_a_figure_without_a_source_is_an_error_with_its_place(tmp_path):
    lines = refused(tmp_path, 'source = "arXiv 2601.20088v3, T3b: a table"\n', "").splitlines()
    assert [line.split(":")[0] for line in lines] == ["table[0].figure[0] (T3b m)", "table[0].figure[1] (T3b m)"]
    assert all("no source; give one to the figure or to its table" in line for line in lines)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("value = 73.0", "valeu = 73.0", "table[0].figure[0].valeu: unknown key; did you mean value?"),
        ("value = 73.0", "value = 173.0", "found 173; allowed: at most 100, as its unit is percent"),
        ("value = 73.0", "value = -1.0", "table[0].figure[0].value: found -1.0; input should be greater than or equal to 0"),
        ("value = 73.0", "value = nan", "table[0].figure[0].value: found nan"),
        ('"cross-checked"', '"crosschecked"', "found 'crosschecked'; did you mean cross-checked?"),
        (', verified = "cross-checked"', "", "table[0].figure[0].verified: missing"),
        (
            'task = "ocrbench"',
            'task = "aime24", metric = "loose"',
            "T3b m qad aime24 loose stands there twice, first as table[0].figure[1] (T3b m); remove one",
        ),
        (
            'task = "aime24", value = 73.0',
            'task = "diagnostics", value = 73.0',
            'found the unit percent of task = "diagnostics"; nats are of task = "diagnostics"',
        ),
        ("value = 73.0", 'value = 73.0, unit = "nats"', 'found the unit nats of task = "aime24"'),
        ('id = "T3b"', 'id = "Table 3"', "table[0].id: found 'Table 3'"),
        ("arXiv 2601.20088v3, T3b: a table", "a table", "table[0].source: found 'a table'"),
        ("value = 857", "value = 1857", "found 1857; allowed: at most 1000, as its unit is points of 1000"),
    ],
)
def test_a_mistake_is_named_with_its_place(tmp_path, old, new, said):
    assert said in refused(tmp_path, old, new)


def test_a_file_that_is_missing_or_not_toml_is_named(tmp_path):
    with pytest.raises(SuiteError, match="there is no such file of published figures"):
        load_paper_figures(tmp_path / "paper.toml")
    with pytest.raises(SuiteError, match="not TOML"):
        load(tmp_path, "figure = [")


def test_the_file_of_the_repository_has_every_table_and_says_how_sure_it_is():
    found = load_paper_figures(FILE)
    assert Counter(figure.table for figure in found.values()) == {
        "T1": 6, "T2": 32, "T3a": 20, "T3b": 12, "T4": 9, "T5": 18, "T6": 24, "T7": 18, "T8": 14, "T9": 6, "T10": 24, "T11": 15, "T12": 14,
    }  # fmt: skip
    assert {figure.verified for figure in found.values()} == {"cross-checked", "single translation"}


def test_figures_that_the_paper_prints_in_two_tables_agree():
    found = {key[:4]: figure for key, figure in load_paper_figures(FILE).items()}
    mix, code, nano3 = "acereason-nemotron-1.1-7b", "livecodebench", "nemotron-3-nano-30b-a3b"
    for task in ("aime24", "aime25", "livecodebench_v6"):
        value = found["T3b", mix, "qad", task].value
        plain = task.removesuffix("_v6")
        assert value == found["T4", mix, "qad-maths-code", task].value == found["T5", mix, "qad-sft", task].value
        assert value == found["T6", mix, "qad-lr-1e-5", plain].value == found["T8", mix, "qad-kl", plain].value
        assert found["T3b", mix, "ptq", task].value == found["T5", mix, "ptq", task].value
    for task in ("aa_lcr", "aime25", "gpqa_diamond", "livecodebench_v5", "scicode"):
        assert found["T3a", nano3, "qad", task].value == found["T11", nano3, "qad-sft-rl", task].value
    nano9 = "nemotron-nano-9b-v2"
    for task in ("aime24", "aime25", code):
        value = found["T6", nano9, "qad-lr-1e-6", task].value
        assert value == found["T8", nano9, "qad-kl", task].value == found["T9", nano9, "qad-teacher-9b", task].value
    for task in ("aime25", "gpqa_diamond"):
        assert found["T2", nano9, "qad", task].value == found["T8", nano9, "qad-kl", task].value
