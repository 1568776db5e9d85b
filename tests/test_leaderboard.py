"""The leaderboard: what is ranked, what is named and left out, what the site holds, and that it is the same each time."""

import hashlib
import importlib.util
import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from harness import accepted
from harness.cli import app
from harness.errors import StoreError
from harness.evidence import open_run_evidence
from harness.gate import as_record, judge_run
from harness.gate_sanity import sanity_checks
from harness.leaderboard.build import build_leaderboard
from harness.leaderboard.index import NAME
from harness.leaderboard.ranking import interval, mean_interval
from harness.leaderboard.site import ASSETS, run_id
from harness.schema_gate import Gate, GateTask

REPOSITORY = Path(__file__).parent.parent


def load(folder, name):
    spec = importlib.util.spec_from_file_location(name, REPOSITORY / folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make_run = load("bench", "leaderboard_scale").make_run


def change(path, edit):
    """Edit a JSON file, or each row of a JSON lines file, in place."""
    if path.suffix == ".json":
        value = json.loads(path.read_text())
        edit(value)
        path.write_text(json.dumps(value))
    else:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for row in rows:
            edit(row)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def with_values(run, values, *, stderr=0.01, n=1000):
    """Give every task of a variant one value."""

    def edit(row):
        if row["variant"] in values:
            row |= {"value": values[row["variant"]], "stderr": stderr, "n_scored": n, "n_total": n, "n_questions": n}

    change(run / "tasks.jsonl", edit)
    return run


@pytest.fixture
def results(tmp_path):
    folder = tmp_path / "results"
    folder.mkdir()
    return folder


def build(results):
    return build_leaderboard(results, results / "site")


def states(built):
    return {(row.summary["run"], row.variant["name"]): (row.state, row.rank) for board in built.boards for row in board.rows}


def reasons(built, variant):
    return [reason for board in built.boards for row in board.rows if row.variant["name"] == variant for reason in row.reasons]


def page_of(results, run):
    """What the page of a run is made of."""
    page = (results / "site" / "data" / "runs" / f"{run_id(f'nightly/{run.name}')}.js").read_text()
    return json.loads(json.loads(page[page.index(", ") + 2 : -3]))


def files(site):
    return {
        str(path.relative_to(site)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(site.rglob("*"))
        if path.is_file() and path.name != NAME
    }


def test_rows_rank_by_their_mean_and_ties_share_a_rank(results):
    run = with_values(make_run(results, 1, tasks=2), {"ptq": 0.50, "qat": 0.595, "qad": 0.60, "bf16": 0.7})
    found = states(build(results))
    assert found[run.name, "qad"] == ("ranked", 1)
    assert found[run.name, "qat"] == ("ranked", 1)
    assert found[run.name, "ptq"] == ("ranked", 3)
    assert found[run.name, "bf16"] == ("baseline", None)


def test_a_variant_stands_with_its_newest_run_and_not_with_its_best(results):
    old = with_values(make_run(results, 1, tasks=2), {"qad": 0.9})
    new = with_values(make_run(results, 2, tasks=2), {"qad": 0.6})
    found = states(build(results))
    assert found[old.name, "qad"] == ("older", None)
    assert found[new.name, "qad"][0] == "ranked"


@pytest.mark.parametrize(
    ("where", "edit"),
    [
        (
            "tasks.jsonl",
            lambda row: row | {"kernels": {"linear": "w4a16", "kv_cache": "bf16"}} if row["variant"] != "bf16" else row,
        ),
        ("tasks.jsonl", lambda row: row | {"version": 2}),
        ("tasks.jsonl", lambda row: row | {"scorer": "another@1:def"}),
        ("tasks.jsonl", lambda row: row | {"repeats": 4}),
        ("run.json", lambda about: about | {"model": about["model"] | {"fingerprint": "hub:other"}}),
        ("run.json", lambda about: about | {"resolved": about["resolved"] | {"engine": {"kind": "vllm", "args": {}}}}),
        (
            "run.json",
            lambda about: about | {"resolved": about["resolved"] | {"engine": {"kind": "hf", "args": {"batch_size": 9}}}},
        ),
        (
            "run.json",
            lambda about: (
                about
                | {
                    "resolved": about["resolved"]
                    | {"tasks": [t | {"sampling": {"temperature": 1.0}} for t in about["resolved"]["tasks"]]}
                }
            ),
        ),
        (
            "run.json",
            lambda about: (
                about | {"stages": json.loads(json.dumps(about["stages"]).replace('"torch": "1.0"', '"torch": "2.0"'))}
            ),
        ),
    ],
    ids=["kernels", "version", "scorer", "repeats", "model", "engine", "engine arguments", "sampling", "engine version"],
)
def test_runs_that_differ_in_what_makes_scores_comparable_are_never_on_one_board(results, where, edit):
    make_run(results, 1, tasks=2)
    other = make_run(results, 2, tasks=2)
    assert len(build(results).boards) == 1
    change(other / where, lambda value: value.update(edit(value)))
    boards = build(results).boards
    assert len(boards) == 2
    assert all(len({row.summary["run"] for row in board.rows if row.state == "ranked"}) == 1 for board in boards)


@pytest.mark.parametrize(
    ("edit_run", "edit_row", "reason"),
    [
        ({"status": "unfinished"}, {}, "incomplete: the run is unfinished"),
        ({"gaps": [{"variant": "qad", "task": "task_0", "n_missing": 3}]}, {}, "incomplete: responses are missing in 1 places"),
        ({"rehearsal": True}, {}, "rehearsal"),
        ({}, {"is_partial": True}, "task_0: partial, the suite limits it to its first questions"),
        ({}, {"n_scored": 17}, "task_0: 3 of 20 answers are missing"),
        ({}, {"flags": ["imported"]}, "task_0: imported"),
        ({}, {"flags": ["unverified"]}, "task_0: unverified"),
        ({}, {"kernels": None}, "task_0: unknown kernels"),
        ({}, {"value": None}, "task_0: no score"),
    ],
)
def test_what_may_not_be_ranked_is_shown_with_its_reason(results, edit_run, edit_row, reason):
    run = make_run(results, 1, tasks=2)
    change(run / "run.json", lambda about: about.update(edit_run))
    change(run / "tasks.jsonl", lambda row: row.update(edit_row) if row["task"] == "task_0" else None)
    built = build(results)
    assert reason in reasons(built, "qad")
    assert {state for (_, variant), (state, _) in states(built).items() if variant == "qad"} == {"not ranked"}
    assert built.left_out == []


def test_a_control_with_grey_pictures_is_on_the_page_of_its_run_and_takes_nothing_off_the_leaderboard(results):
    run = with_values(make_run(results, 1, tasks=2), {"ptq": 0.5, "qat": 0.55, "qad": 0.6, "bf16": 0.7})

    def as_control(row):
        if row["task"] == "task_1":
            row |= {"flags": ["grey pictures"], "value": 0.1}

    change(run / "tasks.jsonl", as_control)
    change(run / "run.json", lambda about: about["resolved"]["tasks"][1].update(pictures="grey"))
    built = build(results)
    assert reasons(built, "qad") == [] and states(built)[run.name, "qad"] == ("ranked", 1)
    (board,) = built.boards
    assert board.tasks == ("task_0",)
    assert next(row.mean for row in board.rows if row.variant["name"] == "qad") == pytest.approx(0.6)
    page = page_of(results, run)
    shown = [row for row in page["tasks"] if row["variant"] == "qad"]
    assert [(row["task"], row.get("flags")) for row in shown] == [("task_0", []), ("task_1", ["grey pictures"])]
    assert {each["task"] for each in page["flips"]} == {"task_0"}


def test_a_control_that_a_variant_still_lacks_is_no_missing_score(results):
    run = make_run(results, 1, tasks=2)
    kept = [line for line in (run / "tasks.jsonl").read_text().splitlines() if json.loads(line)["task"] != "task_1"]
    (run / "tasks.jsonl").write_text("".join(f"{line}\n" for line in kept))
    change(run / "run.json", lambda about: about["resolved"]["tasks"][1].update(pictures="grey"))
    assert reasons(build(results), "qad") == []


def test_a_run_whose_baseline_is_outside_the_published_band_is_suspect_and_not_ranked(results):
    run = with_values(make_run(results, 1, tasks=2), {"bf16": 0.6})
    figure = {"variant": "bf16", "task": "task_0", "value": 70.0}
    reference = {"source": "a paper", "band": 5.0, "figure": [figure]}
    change(run / "run.json", lambda about: about["resolved"].update(reference=reference))
    assert "suspect: bf16 has 60.0 in task_0, published are 70.0, and the band is 5 points" in reasons(build(results), "qad")
    figure["value"] = 64.0
    change(run / "run.json", lambda about: about["resolved"].update(reference=reference))
    assert states(build(results))[run.name, "qad"][0] == "ranked"


def test_an_invalidated_run_is_shown_and_never_ranked_and_an_older_one_stands_again(results):
    old, new = make_run(results, 1, tasks=2), make_run(results, 2, tasks=2)
    assert states(build(results))[new.name, "qad"][0] == "ranked"
    accepted.invalidate(new, reason="the wrong weights")
    built = build(results)
    assert states(built)[new.name, "qad"] == ("not ranked", None)
    assert states(built)[old.name, "qad"][0] == "ranked"
    assert "invalidated: the wrong weights" in reasons(built, "qad")


def test_nothing_is_ranked_while_the_log_of_withdrawn_runs_cannot_be_read(results):
    make_run(results, 1, tasks=2)
    (results / "releases.jsonl").write_text('{"schema": 1, "ki')
    with pytest.raises(StoreError, match=r"releases\.jsonl"):
        build(results)


def test_a_checkpoint_that_a_task_selected_is_not_ranked(results):
    run = make_run(results, 1, tasks=2)
    selection = {"select": "best_of_k", "tasks": ["task_1"]}
    change(run / "run.json", lambda about: about["variants"][3].update(selection=selection))
    built = build(results)
    assert reasons(built, "qad") == ["task_1 chose this checkpoint among several"]
    assert states(built)[run.name, "qat"][0] == "ranked"


def test_a_variant_that_lacks_a_task_is_not_ranked_and_stands_beside_its_peers(results):
    run = make_run(results, 1, tasks=2)
    rows = (run / "tasks.jsonl").read_text().splitlines(keepends=True)
    (run / "tasks.jsonl").write_text("".join(row for row in rows if not ('"qad"' in row and '"task_1"' in row)))
    built = build(results)
    assert len(built.boards) == 1
    assert reasons(built, "qad") == ["no score in task_1"]
    assert next(row for row in built.boards[0].rows if row.variant["name"] == "qad").mean is None


def test_bf16_asked_again_is_neither_ranked_nor_the_baseline(results):
    run = make_run(results, 1, tasks=2)
    again = {"name": "bf16-again", "method": "bf16", "sampling_seed": 7}
    change(run / "run.json", lambda about: about["variants"].insert(0, again))
    rows = [json.loads(row) for row in (run / "tasks.jsonl").read_text().splitlines()]
    rows += [row | {"variant": "bf16-again"} for row in rows if row["variant"] == "bf16"]
    (run / "tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = build(results)
    assert states(found)[run.name, "bf16-again"] == ("null", None)
    assert states(found)[run.name, "bf16"] == ("baseline", None)


@pytest.mark.parametrize("published", [50.0, 54.9, 55.0, 60.0, 65.0, 65.1])
@pytest.mark.parametrize("metric", [None, "exact_match", "another"])
@pytest.mark.parametrize("changes", [{}, {"is_partial": True}, {"unit": "nats"}])
def test_a_baseline_is_suspect_here_where_the_gate_calls_it_so(results, published, changes, metric):
    """But for one whose answers are missing, which is incomplete here, and never ranked for that alone."""
    run = with_values(make_run(results, 1, tasks=1), {"bf16": 0.6})
    figure = {"variant": "bf16", "task": "task_0", "metric": metric, "value": published}
    reference = {"source": "a paper", "band": 5.0, "figure": [figure]}
    change(run / "run.json", lambda about: about["resolved"].update(reference=reference))
    change(run / "tasks.jsonl", lambda row: row.update(changes) if row["variant"] == "bf16" else None)
    theirs = [check for check in sanity_checks(open_run_evidence(run), "bf16") if check.tier == "critical"]
    ours = [reason for reason in reasons(build(results), "bf16") if reason.startswith("suspect")]
    assert bool(ours) == any(check.verdict != "PASS" for check in theirs)


def test_the_verdict_of_the_gate_stands_beside_its_candidate(results):
    run = make_run(results, 1, tasks=1, questions=40)
    policy = Gate(kernels=("w4a4_emulation",), task=(GateTask(name="task_0", margin=3.0, tier="critical"),))
    evidence = open_run_evidence(run)
    verdict = judge_run(evidence, policy, candidate="qad", baseline="bf16")
    (run / "verdict.json").write_text(json.dumps(as_record([verdict], evidence)))
    [summary] = {row.summary["place"]: row.summary for board in build(results).boards for row in board.rows}.values()
    assert summary["verdict"] == {"": verdict.verdict, "qad": verdict.verdict}
    details = page_of(results, run)
    assert [check["name"] for check in details["verdicts"][0]["checks"]] == [check.name for check in verdict.checks]


def truncated(run):
    (run / "run.json").write_text((run / "run.json").read_text()[:500])


def truncated_rows(run):
    (run / "tasks.jsonl").write_text((run / "tasks.jsonl").read_text()[:-30])


def truncated_scores(run):
    path = run / "scores" / "qad.task_0.jsonl"
    path.write_text(path.read_text()[:-30])


def truncated_training(run):
    path = run / "training" / "qad.jsonl"
    path.write_text(path.read_text()[:-30])


def truncated_verdict(run):
    (run / "verdict.json").write_text('{"schema": 1, "verd')


def verdict_of_another_run(run):
    (run / "verdict.json").write_text('{"schema": 1, "suite": "nightly", "run": "other", "verdict": "GO", "candidates": []}')


def of_the_future(run):
    change(run / "run.json", lambda about: about.update(schema=99))


def without_record(run):
    (run / "run.json").unlink()


def without_variants(run):
    change(run / "run.json", lambda about: about.update(variants=[]))


def with_a_variant_twice(run):
    change(run / "run.json", lambda about: about["variants"].append(about["variants"][1]))


def not_a_number(run):
    change(run / "tasks.jsonl", lambda row: row.update(value=float("nan")))


def no_share(run):
    change(run / "tasks.jsonl", lambda row: row.update(value=61.5))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (truncated, r"run\.json: cannot be read"),
        (truncated_rows, r"tasks\.jsonl: line 8 is damaged"),
        (truncated_scores, r"qad\.task_0\.jsonl: line 20 is damaged"),
        (truncated_training, r"qad\.jsonl: line 100 is damaged"),
        (truncated_verdict, r"verdict\.json: cannot be read"),
        (verdict_of_another_run, r"verdict\.json: is about nightly/other; judge this run"),
        (of_the_future, "schema 99, this version reads 1"),
        (without_record, "no run.json: it is still being written"),
        (without_variants, "lists no variant; run its suite again"),
        (with_a_variant_twice, "lists the variant ptq twice"),
        (not_a_number, "NaN is no figure"),
        (no_share, "which is no share"),
    ],
)
def test_a_damaged_run_is_named_on_the_page_and_on_the_terminal_and_left_out(results, spoil, said):
    good, bad = make_run(results, 1, tasks=2), make_run(results, 2, tasks=2)
    spoil(bad)
    done = CliRunner().invoke(app, ["leaderboard", str(results)])
    assert done.exit_code == 0
    built = build(results)
    [(place, reason)] = built.left_out
    assert place == f"nightly/{bad.name}"
    assert re.search(said, reason)
    assert {run for run, _ in states(built)} == {good.name}
    assert f"left out {place}: {reason}" in done.output
    assert place in (results / "site" / "data" / "leaderboard.js").read_text()
    assert place.split("/")[1] in (results / "LEADERBOARD.md").read_text()


ODD = [None, -1, 2, 1e400, 10**400, "", "x", "\ud800", [], {}, [None], {"a": 1}, True, float("nan")]


def places(value, path=()):
    """Every place in nested records."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in items:
        yield from places(each, (*path, key))


@pytest.mark.parametrize("seed", range(40))
def test_whatever_a_record_holds_the_other_runs_are_ranked_and_the_site_is_whole(results, seed):
    good, odd = make_run(results, 1, tasks=1, questions=2), make_run(results, 2, tasks=1, questions=2)
    draw = random.Random(seed)
    for _ in range(3):
        name = draw.choice(["run.json", "tasks.jsonl", "diagnostics.jsonl", "scores/qad.task_0.jsonl", "training/qad.jsonl"])
        path = odd / name
        records = (
            [json.loads(line) for line in path.read_text().splitlines()] if name != "run.json" else json.loads(path.read_text())
        )
        where = draw.choice([place for place in places(records) if place])
        inner = records
        for key in where[:-1]:
            inner = inner[key]
        inner[where[-1]] = draw.choice(ODD)
        path.write_text("".join(json.dumps(row) + "\n" for row in records) if name != "run.json" else json.dumps(records))
    built = build(results)
    assert len({run for run, _ in states(built)}) + len(built.left_out) == 2
    assert states(built)[good.name, "qad"][0] in ("ranked", "older")
    for path in (results / "site" / "data").rglob("*.js"):
        text = path.read_text(encoding="ascii")
        json.loads(json.loads(text[text.index(", ") + 2 : -3]), parse_constant=pytest.fail)
    shown = json.dumps([row.summary["run"] for board in built.boards for row in board.rows])
    assert good.name in shown


def test_a_link_to_a_run_beside_it_is_no_second_run(results):
    run = make_run(results, 1, tasks=1)
    (run.parent / "latest").symlink_to(run.name)
    built = build(results)
    assert (built.n_runs, built.left_out) == (1, [])


def test_of_two_folders_with_one_run_id_the_copy_is_left_out(results):
    run = make_run(results, 1, tasks=2)
    shutil.copytree(run, run.with_name("copy"))
    built = build(results)
    assert built.left_out == [
        ("nightly/copy", f"duplicate run id nightly/{run.name}, which nightly/{run.name} has too; take the copy away")
    ]
    assert states(built)[run.name, "qad"][0] == "ranked"


def test_a_run_that_changes_while_it_is_read_is_left_out(results, monkeypatch):
    run = make_run(results, 1, tasks=2)
    from harness.leaderboard import collect

    real = collect.details_of

    def meanwhile(*given):
        (run / "tasks.jsonl").write_text((run / "tasks.jsonl").read_text() + "\n")
        return real(*given)

    monkeypatch.setattr(collect, "details_of", meanwhile)
    built = build(results)
    assert built.left_out == [
        (f"nightly/{run.name}", "it changed while it was read: it is still being written; build the leaderboard again")
    ]


def test_the_same_results_give_the_same_bytes_with_and_without_the_index(results):
    for number in range(3):
        make_run(results, number, tasks=2)
    build(results)
    first, text = files(results / "site"), (results / "LEADERBOARD.md").read_bytes()
    assert build(results).n_read == 0
    assert files(results / "site") == first
    shutil.rmtree(results / "site")
    for path in results.rglob("*.jsonl"):
        os.utime(path, (1, 1))
    assert build(results).n_read == 3
    assert files(results / "site") == first
    assert (results / "LEADERBOARD.md").read_bytes() == text


def test_many_runs_are_read_by_several_processes_with_the_same_bytes(results, monkeypatch):
    from harness.leaderboard import build as module

    for number in range(4):
        make_run(results, number, tasks=1)
    build(results)
    first = files(results / "site")
    shutil.rmtree(results / "site")
    monkeypatch.setattr(module, "_MANY", 2)
    monkeypatch.setattr(module.os, "cpu_count", lambda: 2)
    assert build(results).n_read == 4
    assert files(results / "site") == first


def test_one_more_run_is_the_only_one_that_is_read_and_one_that_is_gone_leaves_no_page(results):
    for number in range(3):
        make_run(results, number, tasks=2)
    assert build(results).n_read == 3
    new = make_run(results, 3, tasks=2)
    assert build(results).n_read == 1
    page = results / "site" / "data" / "runs" / f"{run_id(f'nightly/{new.name}')}.js"
    assert page.is_file()
    shutil.rmtree(new)
    assert build(results).n_runs == 3
    assert not page.exists()


def test_a_changed_run_a_damaged_index_and_a_lost_page_are_mended(results):
    run = make_run(results, 1, tasks=2)
    build(results)
    first = files(results / "site")
    (results / "site" / NAME).write_text("{")
    assert build(results).n_read == 1
    page = results / "site" / "data" / "runs" / f"{run_id(f'nightly/{run.name}')}.js"
    page.unlink()
    assert build(results).n_read == 1
    assert files(results / "site") == first
    with_values(run, {"qad": 0.99})
    assert build(results).n_read == 1
    assert files(results / "site") != first


def test_a_folder_that_holds_something_else_is_refused_and_a_results_folder_that_is_missing_too(results, tmp_path):
    make_run(results, 1, tasks=1)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.jpg").write_text("")
    with pytest.raises(StoreError, match=r"not empty and not a leaderboard of this harness; give another folder"):
        build_leaderboard(results, tmp_path / "photos")
    with pytest.raises(StoreError, match=r"give a folder"):
        build_leaderboard(results, tmp_path / "photos" / "one.jpg")
    done = CliRunner().invoke(app, ["leaderboard", str(tmp_path / "nowhere")])
    assert done.exit_code == 2
    assert "is no folder; give a results folder" in done.output


def test_an_empty_results_folder_gives_a_page_that_says_so(results):
    built = build(results)
    assert built.n_runs == 0
    assert "No run yet." in (results / "LEADERBOARD.md").read_text()


def test_flips_are_counted_and_named_by_digests_alone(results):
    run = make_run(results, 1, tasks=1, questions=4)

    def scores(variant, values):
        values = iter(values)
        change(run / "scores" / f"{variant}.task_0.jsonl", lambda row: row.update(scores=next(values)))

    scores("bf16", [[1.0, 1.0], [1.0, 0.0], [0.0, None], [None, None]])
    scores("qad", [[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [1.0, 1.0]])
    build(results)
    flips = next(each for each in page_of(results, run)["flips"] if each["variant"] == "qad")
    digests = [hashlib.sha256(f"task_0 {doc}".encode()).hexdigest()[:12] for doc in range(4)]
    assert (flips["n"], flips["worse"], flips["better"]) == (3, 1, 1)
    assert flips["worse_questions"] == [digests[0]]
    assert flips["better_questions"] == [digests[2]]


def test_scores_read_by_their_pattern_are_those_read_as_json(results, monkeypatch):
    from harness.leaderboard import flips

    run = make_run(results, 1, tasks=1, questions=30)
    draw = random.Random(0)
    change(
        run / "scores" / "qad.task_0.jsonl",
        lambda row: row.update(scores=[draw.choice([0.0, 0.5, 1.0, None]) for _ in range(3)]),
    )
    given = (run, "bf16", ["bf16", "ptq", "qad"], ["task_0"])
    parsed = flips.flips_of(*given)  # `change` writes keys in another order
    monkeypatch.setattr(flips, "_as_json", lambda path, *whose: pytest.fail(f"{path} was parsed"))
    path = run / "scores" / "qad.task_0.jsonl"
    path.write_text("".join(json.dumps(json.loads(line), sort_keys=True) + "\n" for line in path.read_text().splitlines()))
    assert flips.flips_of(*given) == parsed
    assert sum(each["worse"] + each["better"] for each in parsed) > 10


def test_scores_of_another_variant_in_a_file_of_its_name_are_no_flips(results):
    from harness.leaderboard import flips

    run = make_run(results, 1, tasks=1, questions=4)
    shutil.copy(run / "scores" / "bf16.task_0.jsonl", run / "scores" / "qad.task_0.jsonl")
    with pytest.raises(StoreError, match=r"qad\.task_0\.jsonl: damaged \(has the scores of bf16 in task_0\)"):
        flips.flips_of(run, "bf16", ["bf16", "qad"], ["task_0"])


def test_questions_that_were_asked_differently_are_no_flips(results):
    run = make_run(results, 1, tasks=1, questions=4)
    change(run / "scores" / "qad.task_0.jsonl", lambda row: row.update(requests=["another"]))
    build(results)
    assert next(each for each in page_of(results, run)["flips"] if each["variant"] == "qad")["n"] == 0


def test_names_are_nothing_but_text_in_markdown_and_no_path_leads_out(results):
    hostile = "<img src=x onerror=alert(1)>|[a](javascript:x)"
    run = make_run(results, 1, tasks=1)
    change(run / "run.json", lambda about: about["variants"][3].update(name=hostile, method="../../etc"))
    change(run / "tasks.jsonl", lambda row: row.update(variant=hostile) if row["variant"] == "qad" else None)
    build(results)
    text = (results / "LEADERBOARD.md").read_text()
    assert r"\<img src=x onerror=alert\(1\)\>\|\[a\]\(javascript:x\)" in text
    assert "<img" not in text.replace(r"\<img", "")
    made = {path.name for path in (results / "site" / "data" / "runs").iterdir()}
    assert made == {f"{run_id(f'nightly/{run.name}')}.js"}


def test_the_interval_of_a_share_is_never_empty_and_at_least_wilsons():
    square = 1.959963984540054**2
    assert interval(1.0, 0.0, 30) == pytest.approx((30 / (30 + square), 1.0))
    assert interval(0.0, 0.0, 30) == pytest.approx((0.0, square / (30 + square)))
    low, high = interval(0.5, 0.1, 100)
    assert (low, high) == pytest.approx((0.5 - 0.195996, 0.5 + 0.195996), abs=1e-5)
    assert interval(0.5, None, 0) == (0.0, 1.0)


def test_the_interval_of_a_mean_of_equal_tasks_is_narrower_by_the_root_of_their_number():
    one = mean_interval([{"value": 0.5, "stderr": 0.05, "n": 100}])
    four = mean_interval([{"value": 0.5, "stderr": 0.05, "n": 100}] * 4)
    assert four[2] - four[1] == pytest.approx((one[2] - one[1]) / 2)


def test_vendored_libraries_are_the_recorded_ones_with_licences_and_all_is_small():
    vendor = ASSETS / "vendor"
    record = json.loads((vendor / "libraries.json").read_text())
    listed = {name: each["sha256"] for library in record["libraries"] for name, each in library["files"].items()}
    assert listed == {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in vendor.iterdir() if path.name != "libraries.json"
    }
    for library in record["libraries"]:
        assert library["licence"] in ("MIT", "Apache-2.0", "BSD-3-Clause")
        assert any("LICENSE" in name for name in library["files"])
        assert library["version"]
    assert sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file()) < 1_500_000


def test_vendoring_writes_what_is_committed_and_asks_for_exact_versions():
    libraries = load("docs", "vendor_leaderboard").LIBRARIES
    record = json.loads((ASSETS / "vendor" / "libraries.json").read_text())
    assert [(each["name"], each["version"]) for each in libraries] == [
        (each["name"], each["version"]) for each in record["libraries"]
    ]


def test_scripts_and_styles_of_our_own_stay_readable():
    long = {path.name: n for path in ASSETS.glob("*.*") if (n := len(path.read_text().splitlines())) > 400}
    assert not long


def test_the_page_asks_for_nothing_that_does_not_lie_beside_it():
    page = (ASSETS / "index.html").read_text()
    asked = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert all((ASSETS / each).is_file() or each.startswith(("#", "data:", "data/")) for each in asked)
    own = [path.read_text() for path in ASSETS.glob("*.js")]
    assert not any(
        word in text for text in own for word in ("innerHTML", "insertAdjacentHTML", "document.write", "fetch(", "import(")
    )


def test_the_benchmark_times_a_cold_build_a_repeated_one_and_one_more_run(monkeypatch, capsys):
    module = load("bench", "leaderboard_scale")
    monkeypatch.setattr(sys, "argv", ["leaderboard_scale.py", "--runs", "2", "--tasks", "1"])
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    module.main()
    said = capsys.readouterr().out
    assert [line.split(" | ")[0] for line in said.splitlines()[3:]] == ["| cold", "| nothing new", "| one more run"]


def test_torch_is_not_imported(results):
    make_run(results, 1, tasks=1)
    code = (
        "import sys; from pathlib import Path; from harness.leaderboard.build import build_leaderboard; "
        f"build_leaderboard(Path({str(results)!r}), Path({str(results / 'site')!r})); "
        "print(sorted({'torch', 'matplotlib', 'lm_eval', 'scipy', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, check=True)
    assert done.stdout.strip() == "[]"
