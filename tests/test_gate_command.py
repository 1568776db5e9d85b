"""`harness gate` as it is called: exit statuses, files, bad input, no torch."""

import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from sample_runs import sample, write_run
from typer.testing import CliRunner

from harness.accepted import accept, invalidate
from harness.cli import app
from harness.plan_power import Asked, gate_outlook
from harness.policy import load_policy

POLICY = """
schema = 1
kernels = ["w4a4_emulation"]
[[task]]
name = "maths"
margin = 5.0
tier = "critical"
"""
N_RIGHT = {"bf16": 160, "ptq": 160, "qat": 155, "qad": 40}
GATE = {
    "kernels": ["w4a4_emulation"],
    "candidate": "ptq",
    "task": [{"name": "maths", "margin": 5.0, "tier": "critical"}],
}


def made_run(folder, n_right=None, **changes):
    """A run of 200 questions, of which each variant has so many right."""
    counts = N_RIGHT if n_right is None else n_right
    samples = {(name, "maths"): [sample(i, float(i < n)) for i in range(200)] for name, n in counts.items()}
    return write_run(folder, samples, **changes)


@pytest.fixture
def run(tmp_path):
    return made_run(tmp_path / "results" / "hand" / "r1")


@pytest.fixture
def policy(tmp_path):
    path = tmp_path / "policy.toml"
    path.write_text(POLICY)
    return path


def gate(*arguments):
    return CliRunner().invoke(app, ["gate", *map(str, arguments)])


@pytest.mark.parametrize(
    ("candidate", "status", "verdict"), [("ptq", 0, "GO"), ("qad", 1, "NO-GO"), ("qat", 3, "INCONCLUSIVE")]
)
def test_the_exit_status_is_the_verdict(run, policy, candidate, status, verdict):
    done = gate(run, "--policy", policy, "--candidate", candidate)
    assert done.exit_code == status, done.output
    assert f"{candidate}: {verdict}" in done.output
    record = json.loads((run / "verdict.json").read_text())
    assert (record["schema"], record["suite"], record["run"], record["verdict"]) == (1, "hand", "r1", verdict)
    assert record["policy"]["source"] == str(policy) and record["policy"]["task"][0]["margin"] == 5.0
    (each,) = record["candidates"]
    assert (each["candidate"], each["baseline"], each["verdict"]) == (candidate, "bf16", verdict)
    assert [check["name"] for check in each["checks"]] == ["the run", "the variants", "maths"]


def test_the_same_evidence_gives_the_same_bytes(run, policy):
    gate(run, "--policy", policy, "--candidate", "qad")
    before = {path.name: path.read_bytes() for path in run.glob("verdict.*")}
    gate(run, "--policy", policy, "--candidate", "qad")
    assert {path.name: path.read_bytes() for path in run.glob("verdict.*")} == before and len(before) == 3


def test_bf16_against_itself_is_not_no_go(run, policy):
    assert gate(run, "--policy", policy, "--candidate", "bf16").exit_code == 3


def test_several_candidates_need_each_and_end_with_the_worst(run, policy):
    done = gate(run, "--policy", policy, "--candidate", "ptq,qat")
    assert done.exit_code == 2 and "several candidates are judged one by one with --each" in done.output
    assert gate(run, "--policy", policy, "--candidate", "ptq,qat", "--each").exit_code == 3
    assert gate(run, "--policy", policy, "--each").exit_code == 1
    record = json.loads((run / "verdict.json").read_text())
    assert [(each["candidate"], each["verdict"]) for each in record["candidates"]] == [
        ("ptq", "GO"),
        ("qat", "INCONCLUSIVE"),
        ("qad", "NO-GO"),
    ]
    assert record["verdict"] == "NO-GO"


def test_no_candidate_anywhere_is_an_error_that_names_them(run, policy):
    done = gate(run, "--policy", policy)
    assert done.exit_code == 2
    assert "no candidate is named; give --candidate, or --each for all that are quantized: ptq, qat, qad" in done.output


def test_each_of_a_run_without_a_quantized_variant_is_an_error(tmp_path, policy):
    run = made_run(tmp_path / "r", {"bf16": 160})
    done = gate(run, "--policy", policy, "--each")
    assert done.exit_code == 2 and "no variant is quantized, so there is no candidate" in done.output


def test_the_gate_of_the_suite_is_what_the_run_recorded(tmp_path):
    run = made_run(tmp_path / "r", about_changes={"resolved": {"gate": GATE}})
    done = gate(run)
    assert done.exit_code == 0 and "Policy: [gate] of the suite" in done.output
    assert json.loads((run / "verdict.json").read_text())["policy"]["source"] == "suite"


def test_without_any_policy_it_is_an_error_that_says_what_to_do(run):
    done = gate(run, "--candidate", "ptq")
    assert done.exit_code == 2 and "its suite has no [gate]; give a policy with --policy" in done.output


def test_a_variant_or_task_that_is_not_there_is_inconclusive_with_its_reason(run, policy):
    done = gate(run, "--policy", policy, "--candidate", "qats")
    assert done.exit_code == 3 and "did you mean qat?" in " ".join(done.output.split())
    done = gate(run, "--policy", policy, "--candidate", "ptq", "--baseline", "fp16")
    assert done.exit_code == 3 and "the run has no variant fp16" in " ".join(done.output.split())
    policy.write_text(POLICY.replace('"maths"', '"math"'))
    done = gate(run, "--policy", policy, "--candidate", "ptq")
    assert done.exit_code == 3 and "the run has no task math; did you mean maths?" in " ".join(done.output.split())
    assert "Not in the policy: maths." in done.output


def test_all_mistakes_of_a_policy_are_named_at_once(run, policy):
    text = POLICY.replace("margin = 5.0", "margin = -5.0").replace('"critical"', '"critcal"') + "min_question = 3\n"
    policy.write_text(text.replace("schema = 1", "schema = 2\nalfa = 0.1"))
    done = gate(run, "--policy", policy, "--candidate", "ptq")
    assert done.exit_code == 2
    for message in (
        "task[0].margin: found -5.0; input should be greater than 0 (a margin is how much damage is allowed, in points)",
        "task[0].tier: found 'critcal'; did you mean critical? Allowed: advisory, critical, supporting",
        "task[0].min_question: unknown key; did you mean min_questions?",
        "schema: found 2. Allowed: 1",
        "alfa: unknown key; did you mean alpha?",
    ):
        assert f"{policy}: {message}" in done.output
    assert not (run / "verdict.json").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            POLICY.replace('tier = "critical"', 'tier = "advisory"'),
            'the file: task: none is "critical", so nothing could ever be GO',
        ),
        (
            POLICY.replace('kernels = ["w4a4_emulation"]', 'kernels = "native"'),
            "kernels: found 'native'; input should be a valid list",
        ),
        (POLICY.replace('kernels = ["w4a4_emulation"]', "kernels = []"), "kernels: found []; list should have at least 1 item"),
        (POLICY.split("[[task]]")[0], "task: missing; it is required"),
        ("schema = ", "not TOML"),
    ],
)
def test_a_policy_that_could_decide_nothing_is_refused(run, policy, text, message):
    policy.write_text(text)
    done = gate(run, "--policy", policy, "--candidate", "ptq")
    assert done.exit_code == 2 and message in done.output


def test_a_policy_that_is_not_there_is_an_error_with_the_nearest_name(run, policy):
    done = gate(run, "--policy", policy.with_name("polcy.toml"), "--candidate", "ptq")
    assert done.exit_code == 2 and f"there is no such policy; did you mean {policy}?" in done.output


def test_a_recorded_gate_of_another_version_is_named(tmp_path):
    run = made_run(tmp_path / "r", about_changes={"resolved": {"gate": GATE | {"max_surprise": 1}}})
    done = gate(run)
    assert done.exit_code == 2 and "run.json: resolved.gate.max_surprise: unknown key" in done.output


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("run.json", lambda text: text[:100], "run.json: cannot be read"),
        ("run.json", lambda text: text.replace('"schema": 1', '"schema": 7'), "run.json: schema 7, this version reads 1"),
        ("tasks.jsonl", lambda text: text[:-30], "tasks.jsonl: line 4 is damaged"),
        ("tasks.jsonl", lambda text: text + text, "stands there twice"),
        ("scores/ptq.maths.jsonl", lambda text: text[:-30], "line 200 is damaged"),
        ("scores/ptq.maths.jsonl", None, "missing; runs made by an older version have no scores"),
        ("run.json", None, "this is no run folder"),
    ],
)
def test_a_damaged_run_is_an_error_and_leaves_no_older_verdict(run, policy, name, damage, message):
    assert gate(run, "--policy", policy, "--candidate", "ptq").exit_code == 0
    path = run / name
    if damage is None:
        path.unlink()
    else:
        path.write_text(damage(path.read_text()))
    done = gate(run, "--policy", policy, "--candidate", "ptq")
    assert done.exit_code == 2 and message in done.output, done.output
    assert not list(run.glob("verdict.*"))


def test_a_run_that_is_still_written_is_inconclusive(tmp_path, policy):
    run = made_run(tmp_path / "r", about_changes={"status": "unfinished"})
    assert gate(run, "--policy", policy, "--candidate", "ptq").exit_code == 3


def test_out_takes_the_verdict_and_the_run_stays_as_it_was(run, policy, tmp_path):
    before = sorted(path.name for path in run.iterdir())
    done = gate(run, "--policy", policy, "--candidate", "ptq", "--out", tmp_path / "deep" / "er")
    assert done.exit_code == 0
    assert sorted(path.name for path in (tmp_path / "deep" / "er").iterdir()) == ["verdict.json", "verdict.md", "verdict.xml"]
    assert sorted(path.name for path in run.iterdir()) == before


def test_out_that_is_a_file_is_an_error(run, policy):
    done = gate(run, "--policy", policy, "--candidate", "ptq", "--out", policy)
    assert done.exit_code == 2 and "the folder of the verdict" in done.output


def cases(run):
    root = ElementTree.parse(run / "verdict.xml").getroot()
    assert root.tag == "testsuites"
    found = {}
    for suite in root:
        tests = list(suite)
        kinds = [child.tag for case in tests for child in case]
        assert {key: int(suite.get(key)) for key in ("tests", "failures", "errors", "skipped")} == {
            "tests": len(tests),
            "failures": kinds.count("failure"),
            "errors": kinds.count("error"),
            "skipped": kinds.count("skipped"),
        }
        found |= {(suite.get("name"), case.get("name")): next(iter(case)).tag for case in tests}
    assert all(int(root.get(key)) == sum(int(suite.get(key)) for suite in root) for key in ("tests", "failures", "errors"))
    return found


def test_junit_is_green_for_go_alone(run, policy):
    gate(run, "--policy", policy, "--each")
    found = cases(run)
    assert found["hand.ptq", "verdict"] == found["hand.ptq", "maths (critical)"] == "system-out"
    assert found["hand.qad", "verdict"] == found["hand.qad", "maths (critical)"] == "failure"
    assert found["hand.qat", "verdict"] == found["hand.qat", "maths (critical)"] == "error"


def test_junit_skips_what_decides_nothing(run, policy):
    policy.write_text(POLICY + '[[task]]\nname = "spare"\nmargin = 5.0\ntier = "advisory"\n')
    assert gate(run, "--policy", policy, "--candidate", "ptq").exit_code == 0
    assert cases(run)["hand.ptq", "spare (advisory)"] == "skipped"
    policy.write_text(POLICY + '[[task]]\nname = "spare"\nmargin = 5.0\ntier = "supporting"\n')
    assert gate(run, "--policy", policy, "--candidate", "ptq").exit_code == 3
    assert cases(run)["hand.ptq", "spare (supporting)"] == "error"


def test_hostile_names_break_neither_xml_nor_markdown(run, policy):
    name = 'x|<img onerror=alert(1)>\\u0001`"&'
    policy.write_text(POLICY.replace('"maths"', f'"{name}"'.replace('`"&', "`&")))
    assert gate(run, "--policy", policy, "--candidate", "ptq").exit_code == 3
    assert any("onerror" in case for _, case in cases(run))
    text = (run / "verdict.md").read_text()
    (row,) = [line for line in text.splitlines() if line.startswith("| x")]
    assert "<img" not in row.replace("\\<img", "") and row.replace("\\|", "").count("|") == 5


def test_markdown_leads_with_the_verdict_and_the_reasons(run, policy):
    gate(run, "--policy", policy, "--candidate", "qad")
    lines = (run / "verdict.md").read_text().splitlines()
    assert lines[0] == "## hand: NO-GO" and lines[4] == "### qad against bf16: NO-GO"
    assert lines[6].startswith("- maths: 60.0 points worse (20.0 against 80.0); with 95 % confidence at least")


def test_a_withdrawn_run_is_never_go(run, policy):
    invalidate(run, reason="a wrong prompt")
    done = gate(run, "--policy", policy, "--candidate", "ptq")
    assert done.exit_code == 3 and "the run was invalidated: a wrong prompt" in done.output


def test_a_withdrawn_run_is_never_go_through_a_link_either(run, policy, tmp_path):
    invalidate(run, reason="a wrong prompt")
    (tmp_path / "latest").symlink_to(run)
    done = gate(tmp_path / "latest", "--policy", policy, "--candidate", "ptq")
    assert done.exit_code == 3 and "the run was invalidated: a wrong prompt" in done.output


def drift(run):
    record = json.loads((run / "verdict.json").read_text())
    return next(
        (check for check in record["candidates"][0]["checks"] if check["name"] == "against the last accepted run"), None
    )


def sequences(kl):
    return [
        {"variant": "ptq", "sequence": i, "n_tokens": 50, "kl_sum": 50 * (kl + 0.01 * (i % 3)), "ce_sum": 1.0, "top1_sum": 1.0}
        for i in range(30)
    ]


@pytest.mark.parametrize(
    ("n_right", "kl", "verdict", "reason"),
    [
        (160, 0.1, "PASS", "2 figures within the noise"),
        (80, 0.1, "FAIL", "ptq maths -40.0"),
        (160, 0.05, "PASS", "ptq KL -0.050"),
        (160, 0.3, "FAIL", "ptq KL +0.200"),
    ],
)
def test_a_candidate_is_shown_beside_the_last_accepted_run(run, policy, n_right, kl, verdict, reason):
    before = made_run(run.parent / "r0", sequences=sequences(0.1))
    assert gate(before, "--policy", policy, "--candidate", "ptq").exit_code == 0
    assert drift(before) is None
    accept(before, reason="shipped")
    now = made_run(run.parent / "r2", N_RIGHT | {"ptq": n_right, "bf16": n_right}, sequences=sequences(kl))
    assert gate(now, "--policy", policy, "--candidate", "ptq").exit_code == 0, "it is advisory"
    found = drift(now)
    assert (found["tier"], found["verdict"]) == ("advisory", verdict)
    assert found["reasons"][0].startswith("since ptq of r0, accepted ") and reason in found["reasons"][0]
    gate(before, "--policy", policy, "--candidate", "ptq")
    assert drift(before) is None, "a run is not compared with itself"


def test_an_accepted_run_that_changed_or_lacks_the_variant_is_said_and_not_compared_with(run, policy):
    before = made_run(run.parent / "r0", {"bf16": 160, "other": 160}, variant_changes={"other": {"method": "ptq"}})
    accept(before, reason="shipped", candidate="other")
    gate(run, "--policy", policy, "--candidate", "ptq")
    assert drift(run)["verdict"] == "PASS" and drift(run)["reasons"][0].startswith("since other of r0")
    (before / "tasks.jsonl").write_text((before / "tasks.jsonl").read_text().replace("0.8", "0.9"))
    gate(run, "--policy", policy, "--candidate", "ptq")
    assert drift(run)["verdict"] == "INCONCLUSIVE" and "is not trusted" in drift(run)["reasons"][0]


def test_a_damaged_log_of_releases_is_an_error(run, policy):
    (run.parent.parent / "releases.jsonl").write_text("{")
    done = gate(run, "--policy", policy, "--candidate", "ptq")
    assert done.exit_code == 2 and "releases.jsonl" in done.output


IMPORTS = """
import sys
from harness import cli
sys.argv = ["harness", *sys.argv[1:]]
try:
    cli.main()
except SystemExit:
    pass
print(sorted({"torch", "lm_eval", "transformers", "numba", "vllm", "datasets", "matplotlib", "zstandard", "scipy.stats"} & set(sys.modules)))
"""


def test_it_imports_no_torch_and_needs_no_samples(run, policy):
    for path in (run / "samples").iterdir():
        path.unlink()
    command = [sys.executable, "-c", IMPORTS, "gate", run, "--policy", policy, "--candidate", "ptq"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert "ptq: GO" in done.stdout, done.stdout + done.stderr
    assert done.stdout.strip().endswith("[]"), done.stdout[-500:]


def test_the_release_policy_that_is_shipped_can_decide_its_margins_under_the_protocol_that_it_states():
    path = Path(__file__).parent.parent / "suites" / "gates" / "release.toml"
    sizes = {"math500": 500, "gpqa_diamond": 198, "aa_lcr": 100, "gsm8k": 1319, "ifeval": 541, "aime24": 30, "aime25": 30}
    (protocol,) = [line for line in path.read_text().splitlines() if line.startswith("#   math500")]
    repeats = {name: int(n) for name, n in re.findall(r"([a-z0-9_]+) (\d+)[, ]", protocol.partition("about")[0])}
    assert repeats.keys() == sizes.keys()
    asked = {name: Asked(n, 30 if name == "aa_lcr" else n, repeats[name], is_greedy=False) for name, n in sizes.items()}
    outlook = gate_outlook(load_policy(path), asked)
    assert {check.name for check in outlook.checks} == {*sizes, "pooled"}
    assert outlook.go is not None and min(outlook.go) >= 0.80, "the file says 81 %"
    assert all(max(check.smallest) <= check.margin for check in outlook.checks)


@pytest.mark.parametrize(
    ("command", "where"),
    [
        (("gate", "run", "--candidate", "ptq"), "harness.gating.gate"),
        (("nightly", "suite.toml"), "harness.nightly.nightly"),
        (("verify", "folder"), "qad.verify.verify"),
        (("parity", "folder", "--model", "folder"), "harness.parity.run_parity"),
    ],
)
def test_a_bug_in_a_command_whose_status_1_is_a_verdict_keeps_its_traceback_and_is_status_2(command, where, monkeypatch):
    def bug(*arguments, **keys):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(where, bug)
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 2, done.output
    assert "Traceback" in done.output and "ZeroDivisionError: a bug" in done.output
