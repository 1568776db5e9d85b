"""The log of accepted and of withdrawn runs."""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading

import pytest
from sample_runs import sample, write_run
from typer.testing import CliRunner

from harness import accepted
from harness.cli import app
from harness.errors import StoreError


@pytest.fixture
def results(tmp_path):
    return tmp_path / "results"


def a_run(results, name="20260101-000000-aaaaaaaa", **changes):
    run = write_run(results / "hand" / name, {("bf16", "maths"): [sample(0)], ("ptq", "maths"): [sample(0, 0.0)]})
    about = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(about | changes))
    return run


def judge(folder, *verdicts, **changes):
    candidates = [{"candidate": name, "baseline": "bf16", "verdict": verdict} for name, verdict in verdicts]
    record = {"schema": 1, "suite": "hand", "run": folder.name, "verdict": "GO", "candidates": candidates}
    record |= {"digest": accepted.run_digest(folder), "policy": {"kernels": ["native"], "source": "suite"}}
    (folder / "verdict.json").write_text(json.dumps(record | changes))


def harness(*arguments):
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.output


def refusal(*arguments):
    status, printed = harness(*arguments)
    assert status == 2
    return printed


def log(results):
    return [json.loads(line) for line in (results / "releases.jsonl").read_text().splitlines()]


def test_an_accepted_run_is_one_line_that_says_who_when_what_and_why(results, monkeypatch):
    monkeypatch.setenv("LOGNAME", "ada")
    run = a_run(results)
    judge(run, ("ptq", "GO"))
    status, printed = harness("accept", run, "--reason", " shipped as 1.0 ")
    assert status == 0
    assert printed == f"accepted hand/{run.name} ptq (verdict GO); the next runs of hand are compared with it\n"
    (entry,) = log(results)
    assert entry.pop("when").endswith("+00:00")
    assert len(entry.pop("digest")) == 64
    assert set(entry.pop("git")) == {"revision", "is_dirty"}
    assert entry.pop("policy") == hashlib.sha256(b'{"kernels": ["native"]}').hexdigest()
    assert entry == {
        "schema": 1,
        "who": "ada",
        "kind": "accepted",
        "suite": "hand",
        "run": run.name,
        "candidate": "ptq",
        "reason": "shipped as 1.0",
        "verdict": "GO",
        "is_despite_verdict": False,
    }


def test_the_last_accepted_run_of_a_suite_is_the_newest_that_stands(results):
    first, second = a_run(results, "first"), a_run(results, "second")
    assert accepted.last_accepted(results, "hand") is None
    for run in (first, second):
        accepted.accept(run, reason="ships")
    assert accepted.last_accepted(results, "hand")["run"] == "second"
    assert accepted.last_accepted(results, "other") is None
    accepted.accept(first, reason="rolled back")
    assert accepted.last_accepted(results, "hand")["run"] == "first"
    assert [entry["run"] for entry in log(results)] == ["first", "second", "first"]


def test_a_withdrawn_run_is_no_baseline_any_more_and_the_one_before_is(results):
    first, second = a_run(results, "first"), a_run(results, "second")
    for run in (first, second):
        accepted.accept(run, reason="ships")
    status, printed = harness("invalidate", second, "--reason", "the judge was down")
    assert (status, printed) == (0, "invalidated hand/second; the last accepted run is first\n")
    assert accepted.last_accepted(results, "hand")["run"] == "first"
    assert accepted.invalidated(results) == {("hand", "second"): "the judge was down"}
    assert harness("invalidate", first, "--reason", "too")[1] == "invalidated hand/first; hand has no accepted run\n"
    assert accepted.last_accepted(results, "hand") is None
    assert "was invalidated (the judge was down); an invalidated run is never" in refusal("accept", second, "--reason", "again")
    assert "is invalidated already: the judge was down" in refusal("invalidate", second, "--reason", "again")


def test_a_run_with_damaged_records_can_be_withdrawn(results):
    run = a_run(results)
    (run / "run.json").write_text('{"schema":')
    assert harness("invalidate", run, "--reason", "disk failure") == (0, f"invalidated hand/{run.name}\n")
    assert accepted.invalidated(results) == {("hand", run.name): "disk failure"}


@pytest.mark.parametrize("record", ["run.json", "tasks.jsonl", "diagnostics.jsonl", "scores/ptq.maths.jsonl"])
def test_a_run_whose_records_changed_after_it_was_accepted_is_named_and_not_trusted(results, record):
    older, run = a_run(results, "older"), a_run(results, "newer")
    for each in (older, run):
        accepted.accept(each, reason="ships")
    assert accepted.untrusted(results, "hand") is None
    path = run / record
    path.write_text(path.read_text() + "\n")
    assert accepted.last_accepted(results, "hand") is None
    assert "the accepted run newer is not trusted: its records were changed" in accepted.untrusted(results, "hand")
    accepted.accept(run, reason="scored again, the same figures")
    assert accepted.last_accepted(results, "hand")["reason"] == "scored again, the same figures"


def test_what_is_generated_from_a_run_may_change(results):
    run = a_run(results)
    accepted.accept(run, reason="ships")
    for name in ("table.md", "verdict.json", "verdict.md"):
        (run / name).write_text("new")
    assert accepted.last_accepted(results, "hand")["run"] == run.name


def test_an_accepted_run_that_is_gone_is_named(results):
    run = a_run(results)
    accepted.accept(run, reason="ships")
    (run / "run.json").unlink()
    assert accepted.last_accepted(results, "hand") is None
    assert f"the accepted run {run.name} is not in {results} any more" in accepted.untrusted(results, "hand")


@pytest.mark.parametrize("verdict", ["NO-GO", "INCONCLUSIVE"])
def test_a_verdict_other_than_go_is_accepted_only_when_told_and_the_log_says_so(results, verdict):
    run = a_run(results)
    judge(run, ("ptq", verdict))
    printed = refusal("accept", run, "--reason", "we need it")
    assert f"its verdict on ptq is {verdict}; --despite-verdict accepts it all the same, and the log says so" in printed
    assert accepted.last_accepted(results, "hand") is None
    assert harness("accept", run, "--reason", "we need it", "--despite-verdict")[0] == 0
    (entry,) = log(results)
    assert (entry["verdict"], entry["is_despite_verdict"], entry["reason"]) == (verdict, True, "we need it")


def test_despite_verdict_does_not_mark_a_run_that_is_go(results):
    run = a_run(results)
    judge(run, ("ptq", "GO"))
    assert harness("accept", run, "--reason", "ships", "--despite-verdict")[0] == 0
    assert log(results)[0]["is_despite_verdict"] is False


def test_of_several_candidates_the_verdict_on_the_named_one_counts(results):
    run = a_run(results)
    about = json.loads((run / "run.json").read_text())
    about["variants"].append({"name": "qad", "method": "qad"})
    (run / "run.json").write_text(json.dumps(about))
    judge(run, ("qad", "NO-GO"), ("ptq", "GO"))
    assert "judges ptq, qad; say with --candidate which" in refusal("accept", run, "--reason", "ships")
    assert "its verdict on qad is NO-GO" in refusal("accept", run, "--reason", "ships", "--candidate", "qad")
    assert harness("accept", run, "--reason", "ships", "--candidate", "ptq")[0] == 0
    assert log(results)[0]["verdict"] == "GO"


def test_bf16_itself_is_never_accepted(results):
    run = a_run(results)
    assert "bf16 is the BF16 model itself, which is no release" in refusal(
        "accept", run, "--reason", "x", "--candidate", "bf16"
    )
    judge(run, ("bf16", "GO"))
    assert "bf16 is the BF16 model itself, which is no release" in refusal("accept", run, "--reason", "x")


def test_a_run_that_nobody_judged_is_accepted_as_not_judged(results):
    run = a_run(results)
    status, printed = harness("accept", run, "--reason", "ships", "--candidate", "ptq")
    assert status == 0
    assert "(not judged: no verdict.json on it beside the run)" in printed
    assert (log(results)[0]["candidate"], log(results)[0]["verdict"]) == ("ptq", None)


def test_the_same_acceptance_twice_is_refused(results):
    run = a_run(results)
    accepted.accept(run, reason="ships")
    assert "is the last accepted run of hand already" in refusal("accept", run, "--reason", "ships")
    assert len(log(results)) == 1
    judge(run, ("ptq", "GO"))  # what was not judged then is now
    assert harness("accept", run, "--reason", "ships")[0] == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"status": "unfinished"}, "the run is unfinished; only a complete one is accepted"),
        ({"rehearsal": True}, "a rehearsal is never accepted"),
        ({"suite": "other"}, "its run.json says suite other, run 20260101"),
        ({"run": "other"}, "its run.json says suite hand, run other; the log names a run by its folders"),
        ({"schema": 99}, "schema 99, this version reads 1"),
    ],
)
def test_a_run_that_cannot_be_a_release_is_refused(results, changes, message):
    run = a_run(results, **changes)
    assert message in refusal("accept", run, "--reason", "ships")
    assert not (results / "releases.jsonl").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--reason", "  "), "--reason: is empty; say why"),
        (("--reason", "ships", "--candidate", "pqt"), "has no such variant. Known: bf16, ptq"),
    ],
)
def test_an_acceptance_with_a_mistake_is_refused(results, arguments, message):
    assert message in refusal("accept", a_run(results), *arguments)


@pytest.mark.parametrize("verb", ["accept", "invalidate"])
def test_a_run_that_does_not_exist_is_refused_and_nothing_is_written(results, verb):
    results.mkdir()
    printed = refusal(verb, results / "hand" / "nobody", "--reason", "x")
    assert "there is no run (no run.json in it); give a run folder, such as results/quickstart/<run id>" in printed
    assert not list(results.iterdir())


def test_a_withdrawal_needs_a_reason_and_the_place_where_the_run_was_made(results, tmp_path):
    run = a_run(results)
    assert "--reason: is empty" in refusal("invalidate", run, "--reason", "")
    copy = tmp_path / "copy"
    run.rename(copy)
    assert "give it where it was made" in refusal("invalidate", copy, "--reason", "x")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"run": "another"}, "is about hand/another; judge this run again: harness gate"),
        ({"digest": "0" * 64}, "is older than the records of the run, which were changed since; judge this run again"),
        ({"candidates": [{"verdict": "GO"}]}, "a record lacks 'candidate'"),
        ({"candidates": [{"candidate": "ptq", "verdict": "SHIP"}]}, "has a verdict 'SHIP', none of GO, NO-GO, INCONCLUSIVE"),
        ({"schema": 2}, "schema 2, this version reads 1"),
    ],
)
def test_a_verdict_that_is_not_this_runs_or_cannot_be_read_is_refused(results, changes, message):
    run = a_run(results)
    judge(run, ("ptq", "GO"), **changes)
    assert message in refusal("accept", run, "--reason", "ships")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda whole: whole[:-20], "line 2 is cut short"),
        (lambda whole: whole[:-1], "line 2 is cut short"),
        (lambda whole: whole + b'{"schema": 2}\n', "line 3 has schema 2, this version reads 1"),
        (lambda whole: whole + b'{"schema": 1}\n', "line 3 is damaged ('kind')"),
        (lambda whole: whole.replace(b'"ships"', b"7", 1), "line 1 is damaged (reason is no text)"),
        (lambda whole: b"nonsense\n" + whole, "line 1 is damaged"),
        (
            lambda whole: whole.replace(b'"accepted"', b'"blessed"', 1),
            "line 1 has kind 'blessed'. Known: accepted, invalidated",
        ),
    ],
)
def test_a_damaged_log_is_refused_by_whoever_reads_it_and_nothing_is_appended(results, damage, message):
    run = a_run(results, "second")
    accepted.accept(a_run(results, "first"), reason="ships")
    accepted.accept(run, reason="ships")
    path = results / "releases.jsonl"
    damaged = damage(path.read_bytes())
    path.write_bytes(damaged)
    for read in (accepted.invalidated, lambda each: accepted.last_accepted(each, "hand")):
        with pytest.raises(StoreError) as raised:
            read(results)
        assert str(raised.value).startswith(f"{path}: {message}")
    assert message in refusal("invalidate", run, "--reason", "x")
    assert path.read_bytes() == damaged


def test_without_a_log_nothing_is_accepted_or_withdrawn(tmp_path):
    assert accepted.last_accepted(tmp_path, "hand") is None
    assert accepted.untrusted(tmp_path, "hand") is None
    assert accepted.invalidated(tmp_path) == {}


def test_a_second_writer_waits_for_the_first_and_sees_what_it_wrote(results):
    run = a_run(results)
    accepted.accept(run, reason="ships")
    told = []

    def second():
        try:
            accepted.invalidate(run, reason="second")
        except StoreError as error:
            told.append(str(error))

    writer = threading.Thread(target=second)
    with (results / "releases.jsonl").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        writer.start()
        writer.join(1.0)  # it is at the lock long before that
        assert writer.is_alive()
        file.write(json.dumps(log(results)[0] | {"kind": "invalidated", "reason": "first"}) + "\n")
    writer.join(30)
    assert told == [f"{run}: the run is invalidated already: first"]
    assert [entry["reason"] for entry in log(results)] == ["ships", "first"]


def test_a_full_disk_leaves_no_half_line(results, monkeypatch):
    accepted.accept(a_run(results, "first"), reason="ships")
    before = (results / "releases.jsonl").read_bytes()

    def refuse(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("harness.append_only.os.fsync", refuse)
    with pytest.raises(StoreError, match="the disk is full"):
        accepted.invalidate(results / "hand" / "first", reason="x")
    assert (results / "releases.jsonl").read_bytes() == before


def test_the_log_is_kept_without_torch(results):
    run = a_run(results)
    code = (
        "import sys; from harness import cli\n"
        f"sys.argv = ['harness', 'accept', {str(run)!r}, '--reason', 'ships']\n"
        "try: cli.main()\n"
        "finally: print(sorted({'torch', 'lm_eval', 'transformers', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip().endswith("[]"), done.stdout + done.stderr


def test_a_withdrawn_run_is_found_through_a_link_and_under_either_of_its_names(results, tmp_path):
    run = a_run(results)
    about = json.loads((run / "run.json").read_text())
    assert accepted.withdrawn_reason(run, about) is None
    accepted.invalidate(run, reason="wrong prompts")
    latest = tmp_path / "latest"
    latest.symlink_to(run)
    copy = results / "hand" / "copy"
    shutil.copytree(run, copy)
    for folder, told in ((run, about), (latest, about), (copy, about), (run, {}), (latest, about | {"run": "renamed"})):
        assert accepted.withdrawn_reason(folder, told) == "wrong prompts"
    assert accepted.withdrawn_reason(copy, about | {"run": "copy"}) is None


def test_a_run_given_by_a_link_is_accepted_as_what_the_link_leads_to(results, tmp_path):
    (tmp_path / "latest").symlink_to(a_run(results))
    assert harness("accept", tmp_path / "latest", "--reason", "ships")[0] == 0
    assert [entry["run"] for entry in log(results)] == ["20260101-000000-aaaaaaaa"]
