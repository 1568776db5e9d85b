"""Two variants, one suite, one cache: neither is ever served with the answers of the other."""

import json
import sys

import pytest
from conftest import build_tiny_model

from harness import cli, evaluation
from harness.records import read_samples

SUITE = """
schema = 1
name = "apart"

[model]
path = "{model}"

[[variant]]
name = "bf16"
method = "bf16"

[[variant]]
name = "other"
method = "checkpoint"
path = "{other}"

[[task]]
name = "mini_math"
limit = 3
repeats = {repeats}
sampling = {{ temperature = 1.0, max_tokens = 8 }}

[engine]
kind = "hf"
"""


@pytest.fixture
def responses(tiny_model, tmp_path, monkeypatch):
    """Runs the suite in a results folder; the responses of each variant, and the lines of all journals."""
    other = build_tiny_model(tmp_path / "other", seed=1)

    def run(results="results", repeats=1):
        path = tmp_path / "apart.toml"
        path.write_text(SUITE.format(model=tiny_model, other=other, repeats=repeats))
        monkeypatch.setattr(sys, "argv", ["harness", "run", str(path), "--results", str(tmp_path / results)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert not ended.value.code
        newest = max((tmp_path / results / "apart").glob("*/run.json"), key=lambda path: path.stat().st_mtime_ns).parent
        rows = {name: read_samples(newest / "samples" / f"{name}.mini_math.jsonl.zst") for name in ("bf16", "other")}
        journals = [path.read_text().splitlines() for path in sorted((tmp_path / results / "journals").rglob("*.jsonl"))]
        return {name: [row["response"] for row in found] for name, found in rows.items()}, journals

    return run


def test_each_variant_is_answered_by_its_own_weights(responses, monkeypatch, tmp_path):
    found, journals = responses()
    assert all(a != b for a, b in zip(found["bf16"], found["other"], strict=True))
    assert len(journals) == 2
    weights = {json.loads(lines[0])["protocol"]["weights"] for lines in journals}
    assert len(weights) == 2
    # the check can fail: where the key does not know the weights, the second variant gets the answers of the first
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "another-cache"))
    monkeypatch.setattr(evaluation, "folder_fingerprint", lambda folder, store: "no weights")
    confused, journals = responses("without")
    assert confused["bf16"] == confused["other"] == found["bf16"] and len(journals) == 1


def test_more_repeats_of_a_finished_suite_ask_only_for_the_new_ones(responses):
    before, journals = responses(repeats=2)
    after, more = responses(repeats=4)
    for old, new in zip(journals, more, strict=True):
        assert new[: len(old)] == old and len(new) == 1 + 4 * 3
    assert all([r for i, r in enumerate(after[name]) if i % 4 < 2] == before[name] for name in before)
