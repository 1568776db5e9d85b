"""Whether training is worth it, by the gate's own rule."""

import json
import subprocess
import sys

import pytest
from sample_runs import sample, write_run
from typer.testing import CliRunner

from harness.accepted import invalidate
from harness.cli import app
from harness.schema_gate import Gate, GateTask

POLICY = """
schema = 1
kernels = ["w4a4_emulation"]

[[task]]
name = "maths"
margin = 3
tier = "critical"
"""


def a_run(tmp_path, *, ptq_right, n=400, gate=True, trained=("qad",), status="unfinished", only=None, **more):
    """A run that has BF16 (all right but one in ten) and PTQ scored, and trainings to come."""
    right = {"bf16": 9 * n // 10, "ptq": ptq_right}
    samples = {(name, "maths"): [sample(doc, 1.0 if doc < k else 0.0) for doc in range(n)] for name, k in right.items()}
    policy = Gate(kernels=("w4a4_emulation",), task=(GateTask(name="maths", margin=3, tier="critical"),))
    resolved = {"model": {"thinking": None}, "gate": policy.model_dump(mode="json") if gate else None}
    run = write_run(
        tmp_path / "results" / "hand" / "20260101-000000-aaaaaaaa",
        {key: rows for key, rows in samples.items() if only is None or key[0] in only},
        about_changes={"status": status, "resolved": resolved},
        **more,
    )
    about = json.loads((run / "run.json").read_text())
    known = {variant["name"] for variant in about["variants"]}
    about["variants"] += [{"name": name, "method": name} for name in ("bf16", "ptq") if name not in known]
    about["variants"] += [{"name": name, "method": name, "training": {"tokens": 24_000}} for name in trained]
    (run / "run.json").write_text(json.dumps(about))
    return run


def advise(*arguments):
    done = CliRunner().invoke(app, ["advise", *map(str, arguments)])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.output


def test_where_ptq_fails_the_gate_training_is_worth_it_and_the_task_is_named(tmp_path):
    status, printed = advise(a_run(tmp_path, ptq_right=300))
    assert status == 0
    first, *reasons = printed.splitlines()
    assert first == "worth training: ptq fails in maths, by its suite's [gate]"
    assert any("15.0" in reason for reason in reasons)
    assert reasons[-1] == "still to train: qad (24,000 tokens)"


def test_where_ptq_passes_training_is_not_worth_it(tmp_path):
    status, printed = advise(a_run(tmp_path, ptq_right=360))
    assert status == 0
    assert printed.splitlines()[0] == "not worth training: ptq passes untrained, by its suite's [gate]"


def test_where_the_evidence_does_not_tell_it_says_what_would(tmp_path):
    status, printed = advise(a_run(tmp_path, ptq_right=105, n=120))
    assert status == 3
    first, *reasons = printed.splitlines()
    assert first == "cannot tell yet whether training is worth it, by its suite's [gate]; open:"
    assert any("would decide" in reason for reason in reasons)


def test_that_trainings_are_to_come_is_no_reason_but_that_ptq_is_not_scored_is(tmp_path):
    assert "unfinished" not in advise(a_run(tmp_path / "a", ptq_right=360))[1]
    status, printed = advise(a_run(tmp_path / "b", ptq_right=360, only=("bf16",)))
    assert status == 3
    assert "ptq has no result in maths" in printed


def test_what_is_never_evidence_for_the_gate_is_none_for_advice(tmp_path):
    other_kernel = {"ptq": {"kernels": {"linear": "w4a16"}}}
    status, printed = advise(a_run(tmp_path / "a", ptq_right=360, row_changes=other_kernel))
    assert status == 3 and "w4a16" in printed
    run = a_run(tmp_path / "b", ptq_right=360)
    invalidate(run, reason="wrong prompts")
    status, printed = advise(run)
    assert status == 3 and "invalidated: wrong prompts" in printed
    (tmp_path / "latest").symlink_to(run)
    status, printed = advise(tmp_path / "latest")
    assert status == 3 and "invalidated: wrong prompts" in printed
    run = a_run(tmp_path / "c", ptq_right=360)
    about = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(about | {"rehearsal": True}))
    status, printed = advise(run)
    assert status == 3 and "rehearsal" in printed


def test_trainings_that_are_done_are_named_as_done(tmp_path):
    run = a_run(tmp_path, ptq_right=300, trained=())
    assert advise(run)[1].splitlines()[-1] == "its suite trains no variant"
    about = json.loads((run / "run.json").read_text())
    about["variants"] += [{"name": "qad", "method": "qad"}]
    (run / "run.json").write_text(json.dumps(about))
    rows = [json.loads(line) for line in (run / "tasks.jsonl").read_text().splitlines()]
    rows.append(rows[-1] | {"variant": "qad"})
    (run / "tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert advise(run)[1].splitlines()[-1] == "trained already: qad"


def test_a_policy_of_ones_own_decides_in_place_of_the_suites(tmp_path):
    run = a_run(tmp_path, ptq_right=300)
    policy = tmp_path / "policy.toml"
    policy.write_text(POLICY.replace("margin = 3", "margin = 25"))
    status, printed = advise(run, "--policy", policy)
    assert status == 0
    assert printed.splitlines()[0] == f"not worth training: ptq passes untrained, by the policy {policy}"


def test_ptq_with_other_seeds_is_no_second_untrained_variant(tmp_path):
    run = a_run(tmp_path, ptq_right=300)
    about = json.loads((run / "run.json").read_text())
    about["variants"].append({"name": "ptq-again", "method": "ptq", "sampling_seed": 7})
    (run / "run.json").write_text(json.dumps(about))
    assert advise(run)[1].splitlines()[0] == "worth training: ptq fails in maths, by its suite's [gate]"


def test_several_untrained_variants_have_to_be_told_apart(tmp_path):
    run = a_run(tmp_path, ptq_right=300)
    about = json.loads((run / "run.json").read_text())
    about["variants"].append({"name": "mse", "method": "ptq"})
    (run / "run.json").write_text(json.dumps(about))
    status, printed = advise(run)
    assert status == 2
    assert "its PTQ variants are ptq, mse; say with --candidate which variant the advice is about" in printed
    assert advise(run, "--candidate", "ptq")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--candidate", "ptqq"), "--candidate ptqq:"),
        (("--candidate", "qad"), "--candidate qad: is trained, and the advice is about whether to train"),
        (("--policy", "nowhere.toml"), "there is no such policy"),
    ],
)
def test_a_question_that_makes_no_sense_is_refused(tmp_path, arguments, message):
    status, printed = advise(a_run(tmp_path, ptq_right=300), *arguments)
    assert status == 2
    assert message in printed


def test_a_run_without_a_policy_or_that_is_none_is_refused(tmp_path):
    status, printed = advise(a_run(tmp_path, ptq_right=300, gate=False))
    assert status == 2
    assert "its suite has no [gate]; give a policy with --policy" in printed
    assert advise(tmp_path / "nowhere")[0] == 2


def test_advice_needs_no_torch(tmp_path):
    run = a_run(tmp_path, ptq_right=300)
    code = (
        "import sys; from harness import cli\n"
        f"sys.argv = ['harness', 'advise', {str(run)!r}]\n"
        "try: cli.main()\n"
        "finally: print(sorted({'torch', 'lm_eval', 'transformers', 'matplotlib', 'scipy.stats'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "worth training" in done.stdout
    assert done.stdout.strip().endswith("[]"), done.stdout + done.stderr
