"""A list of suites that `harness nightly` takes: closed keys, one group a night, and one failing suite does not stop the others."""

import json
import shlex
from pathlib import Path
from typing import get_args

import pytest
from typer.testing import CliRunner

from harness import nightly
from harness.cli import app
from harness.errors import SuiteError
from harness.hardware import GPUS
from harness.nightly_list import EXAMPLE, Group, load_list, suites_of
from harness.suite import load_suite
from tests.test_nightly import SUITE

REPOSITORY = Path(__file__).parent.parent
LIST = """
schema = 1
[[group]]
name = "small"
suites = ["a.toml", "b.toml"]
[[group]]
name = "node"
gpu = "h200"
count = 8
nodes = 2
suites = ["b.toml"]
"""


@pytest.fixture
def listed(tmp_path) -> Path:
    for name in ("a", "b"):
        (tmp_path / f"{name}.toml").write_text(SUITE.format(name=name))
    path = tmp_path / "list.toml"
    path.write_text(LIST)
    return path


def test_a_list_stands_for_the_suites_of_one_group_and_other_files_for_themselves(listed):
    folder = listed.parent
    assert suites_of([listed], "small") == [folder / "a.toml", folder / "b.toml"]
    assert suites_of([folder / "a.toml", listed], "node") == [folder / "a.toml", folder / "b.toml"]
    assert suites_of([folder / "a.toml", folder / "missing.toml"], None) == [folder / "a.toml", folder / "missing.toml"]
    listed.write_text(LIST[: LIST.index('[[group]]\nname = "node"')])
    assert suites_of([listed], None) == [folder / "a.toml", folder / "b.toml"]


@pytest.mark.parametrize(
    ("group", "message"),
    [
        (
            None,
            r"list\.toml: a night takes one group: give --group\. Groups: small \(2 suites, any machine\); node \(1 suites, 2 nodes of 8 × H200",
        ),
        ("nodes", r"list\.toml: --group nodes: there is no such group\. Groups: small"),
    ],
)
def test_a_group_has_to_be_named_where_there_are_several(listed, group, message):
    with pytest.raises(SuiteError, match=message):
        suites_of([listed], group)


def test_a_group_without_a_list_has_no_effect(listed):
    with pytest.raises(
        SuiteError, match=r"--group small: has no effect without a list of suites; give one, such as suites/nightly"
    ):
        suites_of([listed.parent / "a.toml"], "small")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("nodes = 2", "node = 2", r"group\[1\]\.node: unknown key; did you mean nodes\?"),
        ('gpu = "h200"', 'gpu = "h300"', r"group\[1\]\.gpu: "),
        ("count = 8", "", r"group\[1\]: count: missing; say how many GPUs a node has beside gpu h200"),
        ('gpu = "h200"', "", r"group\[1\]: count: has no effect without gpu"),
        ('"a.toml", "b.toml"', '"a.toml", "c.toml"', r"group\[0\]\.suites: c\.toml: there is no such file beside the list"),
        ('"a.toml", "b.toml"', '"a.toml", "a.toml"', r"group\[0\]\.suites: a\.toml: named twice"),
        ('"a.toml", "b.toml"', "", r"group\[0\]\.suites: "),
        ('name = "node"', 'name = "small"', r"group\[1\]\.name: small: another group is named so"),
        ("schema = 1", "", r"schema: missing"),
    ],
)
def test_a_list_with_mistakes_is_refused(listed, old, new, message):
    assert old in LIST
    listed.write_text(LIST.replace(old, new, 1))
    with pytest.raises(SuiteError, match=rf"list\.toml: {message}"):
        load_list(listed)


def test_one_failing_suite_of_a_list_does_not_stop_the_others_and_the_worst_status_is_that_of_the_night(listed, monkeypatch):
    results = listed.parent / "results"
    begun = listed.parent / "begun"

    def command(suite, results):
        return ["bash", "-c", f"echo {suite.stem} >> {shlex.quote(str(begun))}; echo 'harness: it broke'; exit 2"]

    monkeypatch.setattr(nightly, "command", command)
    done = CliRunner().invoke(app, ["nightly", str(listed), "--group", "small", "--results", str(results)])
    assert done.exit_code == 2 and "error: a: it broke" in done.output and "error: b: it broke" in done.output
    assert begun.read_text().split() == ["a", "b"]
    assert [json.loads(line)["suite"] for line in (results / "nightly.jsonl").read_text().splitlines()] == ["a", "b"]


def test_the_list_of_the_papers_suites_has_each_of_them_once_and_each_can_be_read():
    found = load_list(REPOSITORY / EXAMPLE)
    named = [(REPOSITORY / EXAMPLE).parent / suite for group in found.group for suite in group.suites]
    paths = [path.resolve() for path in named]
    folders = [REPOSITORY / "suites" / folder for folder in (".", "ablations", "ablations/small", "released")]
    assert sorted(paths) == sorted(path.resolve() for folder in folders for path in folder.glob("*.toml"))
    names = [load_suite(path).name for path in paths]
    assert len(set(names)) == len(names)
    assert all(group.machine for group in found.group)


def test_a_group_may_name_every_gpu_that_can_be_planned_for():
    allowed = get_args(get_args(Group.model_fields["gpu"].annotation)[0])
    assert set(allowed) == set(GPUS)
