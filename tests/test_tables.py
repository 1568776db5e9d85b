"""Tables from row files: pairing by sequence, and absence that is never a number."""

import csv
import io
import json

import pytest

from harness.errors import StoreError
from harness.tables import build_grid, build_table, paired_kl, render

VARIANTS = [{"name": "bf16", "method": "bf16"}, {"name": "ptq", "method": "ptq"}, {"name": "qad", "method": "qad"}]


def sequence(variant: str, number: int, kl_sum: float, n_tokens: int = 10) -> dict:
    return {"schema": 1, "variant": variant, "sequence": number, "kl_sum": kl_sum, "n_tokens": n_tokens}


def test_paired_differences_are_means_a_token_with_errors_over_sequences():
    rows = [sequence("ptq", 0, 5.0), sequence("ptq", 1, 7.0, 30), sequence("qad", 0, 3.0), sequence("qad", 1, 4.0, 30)]
    (found,) = paired_kl(rows, VARIANTS)
    assert (found["candidate"], found["baseline"], found["n_sequences"]) == ("qad", "ptq", 2)
    assert found["difference"] == pytest.approx(-5.0 / 40)
    residuals = (-2.0 + 0.125 * 10, -3.0 + 0.125 * 30)
    assert found["stderr"] == pytest.approx((2 * sum(r * r for r in residuals)) ** 0.5 / 40)


@pytest.mark.parametrize("other", [[sequence("qad", 0, 3.0)], [sequence("qad", 0, 3.0), sequence("qad", 2, 4.0)]])
def test_different_sequences_are_never_paired(other):
    rows = [sequence("ptq", 0, 5.0), sequence("ptq", 1, 7.0), *other]
    with pytest.raises(StoreError, match="qad and ptq were measured on different sequences"):
        paired_kl(rows, VARIANTS)


def test_a_variant_that_is_not_measured_yet_is_not_paired():
    assert paired_kl([sequence("ptq", 0, 5.0)], VARIANTS) == []


def test_absence_is_a_dash_an_empty_cell_and_null_and_never_zero(tmp_path):
    about = {
        "schema": 1,
        "suite": "s",
        "run": "r",
        "status": "unfinished",
        "model": {"notes": []},
        "variants": VARIANTS[:2],
    }
    (tmp_path / "run.json").write_text(json.dumps(about))
    shared = {"primary": "acc", "incomplete_rate": None, "kernels": {"linear": "bf16"}, "is_partial": False, "version": 1}
    row = {
        "schema": 1,
        "variant": "bf16",
        "task": "t",
        "metric": "acc",
        "value": 0.5,
        "stderr": None,
        "n_scored": 1,
        "n_total": 1,
    }
    (tmp_path / "tasks.jsonl").write_text(json.dumps(row | shared) + "\n")
    for name in ("diagnostics", "diagnostics_sequences"):
        (tmp_path / f"{name}.jsonl").write_text("")
    table = build_table(tmp_path)
    assert table["rows"][1]["tasks"] == {}
    assert table["rows"][1]["diagnostics"] is table["rows"][1]["checkpoint_bytes"] is table["rows"][1]["budget"] is None
    grid = build_grid(table)
    assert grid.rows[0][1] == "50.0"  # one question has no error
    assert set(grid.rows[1][1:]) == {"–"}
    _, first, second = csv.reader(io.StringIO(render(table, "csv")))
    assert first[2:6] == ["0.5", "", "1", "1"]
    assert set(second[2:]) == {""}
