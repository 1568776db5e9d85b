"""Model cards: what they say and of which files, what the hub and other programs read in them, and what they never hold."""

import json
import re
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from sample_runs import sample, write_run

from harness import cli
from harness.accepted import run_digest
from harness.card import write_card
from harness.errors import HarnessError, StoreError
from harness.export import RECORD
from harness.licence import NOT_FOUND, find_licence
from harness.store import cache_folder, file_digests

SECRET = "Which of the gated questions is this"
CHECKPOINT = {"stage": "abc", "digest": "d" * 64}
QUANTIZATION = {
    "activations": True,
    "scale_rule": "amax",
    "tensor_scale": "power_of_two",
    "block_scales": "recomputed",
    "fp8": [],
    "kv_cache": "bf16",
    "layout": "modelopt",
    "calibration": {"data": "chats", "samples": 512, "headroom": 4.0},
}
PTQ = {
    "quantization": QUANTIZATION,
    "checkpoint": CHECKPOINT,
    "checkpoint_bytes": 5_000_000,
    "n_weights": 8_000_000,
    "bits_per_weight": 5.0,
    "quantized": ["a", "b"],
    "excluded": ["lm_head"],
}
QAD = PTQ | {
    "data": "chats",
    "objective": {"loss": "kl", "temperature": 1.0},
    "training": {
        "loss_on": "assistant",
        "batch_size": 4,
        "optimizer": "adamw",
        "train": "quantized",
        "seed": 7,
        "tokens": 24000,
    },
    "budget": {"epochs_read": 1, "steps": 37, "tokens": 24_002, "loss_tokens": 14_802, "lr": 3e-4},
    "selection": {"select": "last"},
    "codes_changed": 0.03,
}
MODEL = {"kind": "text", "trust_remote_code": False, "thinking": None}


def make_run(root: Path, *, model: str = "example-org/Base-7B", **changes) -> Path:
    """A run of bf16, ptq and qad on one task of ours and one that may not be published."""
    right = {"bf16": 30, "ptq": 20, "qad": 25}
    samples = {
        (name, task): [sample(doc, float(doc < n), task=task, response=[SECRET], target=SECRET) for doc in range(40)]
        for name, n in right.items()
        for task in ("gsm8k", "gpqa_diamond")
    }
    tasks = [{"name": name, "seed": 5, "sampling": {"temperature": 0.6}, "chat": None} for name in ("gsm8k", "gpqa_diamond")]
    data = {"chats": {"source": "hub", "path": "example-org/chats"}}
    about = {
        "model": {"path": model, "origin": f"hub {model}", "fingerprint": "f", "notes": ["A note"]},
        "resolved": {"model": MODEL, "tasks": tasks, "data": data, "engine": {"kind": "hf"}},
        "provenance": {
            "packages": {"qad-harness": "0.1.0", "transformers": "5.17.0"},
            "git": {"revision": "a" * 40, "is_dirty": False},
        },
        "stages": [],
    }
    prompts = dict.fromkeys(range(40), SECRET)
    variants = {"ptq": PTQ, "qad": QAD} | changes.pop("variant_changes", {})
    folder = root / "results" / "hand" / "20261122-130524-461e31b2"
    return write_run(
        folder,
        samples,
        prompts=prompts,
        publishable=False,
        variant_changes=variants,
        about_changes=about | changes.pop("about", {}),
        **changes,
    )


def make_export(run: Path, out: Path, variant: str = "qad", **changes) -> Path:
    """A folder as `harness export` leaves it, with few bytes."""
    out.mkdir(parents=True)
    (out / "model.safetensors").write_bytes(b"weights")
    (out / "config.json").write_text("{}")
    for name, text in changes.pop("files", {}).items():
        (out / name).write_text(text)
    about = json.loads((run / "run.json").read_text())
    record = {
        "schema": 1,
        "suite": "hand",
        "run": about["run"],
        "variant": variant,
        "checkpoint": CHECKPOINT,
        "fingerprint": None,
    }
    record |= {"layout": "modelopt", "scales_changed": 0, "files": file_digests(out)}
    (out / RECORD).write_text(json.dumps(record | changes))
    return out


def card_of(root: Path, variant: str = "qad", *, export: dict | None = None, **changes) -> tuple[str, dict, list[str]]:
    """The text of a card, its record for machines, and what was said."""
    run = make_run(root, **changes)
    out = make_export(run, root / "out", variant, **(export or {}))
    said = write_card(run, variant, out)
    (record,) = (out / "every_eval_ever").iterdir()
    return (out / "README.md").read_text(), json.loads(record.read_text()), said


def test_a_card_has_scores_recovery_and_differences_with_kernel_n_and_seeds(tmp_path):
    text, _, _ = card_of(tmp_path)
    (row,) = re.findall(r"^\| gsm8k \|.*$", text, re.MULTILINE)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1:3] == ["75.0 ±10.0", "62.5 ±10.0"] and cells[5] == "40"
    assert cells[3].startswith("−12.5 [−") and cells[4].startswith("83.3 [")
    assert "computed by: w4a4_emulation; sampling seed 5, training seed 7." in text
    assert "37 steps, 24,002 tokens, 14,802 of them in the loss (assistant)" in text and "(example-org/chats)" in text
    assert "W4A4" in text and "of 2 linear layers" in text and "`lm_head`" in text and "- A note." in text
    assert "No release gate has judged this checkpoint." in text
    assert (
        "harness run hand.toml" in text
        and "harness export results/hand/<run id> --variant qad --out DIR --layout modelopt" in text
    )
    assert "Not scored with native FP4 kernels (w4a4_emulation)" in text


def test_the_hub_reads_its_metadata(tmp_path):
    card_of(tmp_path)
    data = ModelCard.load(tmp_path / "out" / "README.md").data
    assert (data.base_model, data.base_model_relation, data.pipeline_tag) == (
        "example-org/Base-7B",
        "quantized",
        "text-generation",
    )
    assert (
        data.model_name == "Base-7B-NVFP4-QAD" and set(data.tags) >= {"nvfp4", "qad", "modelopt"} and data.license == "unknown"
    )
    maths, science = data.eval_results
    assert (maths.dataset_type, maths.metric_type, maths.metric_value) == ("openai/gsm8k", "exact_match", 62.5)
    assert maths.metric_args["kernels"] == "w4a4_emulation" and maths.metric_args["n_questions"] == 40
    assert science.dataset_name == "gpqa_diamond"


RESULT = {"evaluation_name", "source_data", "metric_config", "score_details"}


def schema_problems(record: dict) -> list[str]:
    """What version 0.2.2 of the schema asks for, as far as a record of ours touches it."""
    needed = {
        "schema_version",
        "evaluation_id",
        "retrieved_timestamp",
        "source_metadata",
        "model_info",
        "eval_library",
        "evaluation_results",
    }
    found = [f"lacks {key}" for key in needed - set(record)]
    found += [f"does not know {key}" for key in set(record) - needed - {"evaluation_timestamp", "detailed_evaluation_results"}]
    source, model = record["source_metadata"], record["model_info"]
    if source["source_type"] not in ("documentation", "evaluation_run") or not source["source_organization_name"]:
        found.append("source")
    if source["evaluator_relationship"] not in ("first_party", "third_party", "collaborative", "other"):
        found.append("relationship")
    found += [f"model lacks {key}" for key in ("name", "id") if not isinstance(model.get(key), str)]
    found += [] if {"name", "version"} <= set(record["eval_library"]) else ["library"]
    details = [model["additional_details"], record["eval_library"]["additional_details"]]
    for result in record["evaluation_results"]:
        metric, score = result["metric_config"], result["score_details"]
        found += [f"result lacks {key}" for key in RESULT - set(result)]
        found += [] if isinstance(metric["lower_is_better"], bool) and isinstance(score["score"], float) else ["score"]
        found += [] if metric.get("score_type") != "continuous" or {"min_score", "max_score"} <= set(metric) else ["range"]
        data = result["source_data"]
        found += [] if data["source_type"] == "other" or (data["source_type"] == "hf_dataset" and data["hf_repo"]) else ["data"]
        details += [metric["additional_details"], score["details"], result["generation_config"]["additional_details"]]
    return found + [f"{key} is no text" for each in details for key, value in each.items() if not isinstance(value, str)]


def test_the_check_of_the_schema_finds_what_is_wrong(tmp_path):
    _, record, _ = card_of(tmp_path)
    assert schema_problems(record) == []
    assert schema_problems({key: value for key, value in record.items() if key != "evaluation_id"}) == ["lacks evaluation_id"]
    record["evaluation_results"][0]["score_details"]["details"]["n"] = 3
    record["evaluation_results"][1]["metric_config"].pop("max_score")
    assert schema_problems(record) == ["range", "n is no text"]


def test_a_program_reads_scores_errors_and_comparisons(tmp_path):
    _, record, _ = card_of(tmp_path)
    result = record["evaluation_results"][0]
    assert record["schema_version"] == "0.2.2" and record["evaluation_timestamp"] == "2026-11-22T13:05:24"
    assert result["score_details"]["score"] == 0.625
    assert result["score_details"]["uncertainty"] == {
        "num_samples": 40,
        "standard_error": {"value": 0.1, "method": "analytic, over clusters of questions"},
    }
    assert json.loads(result["score_details"]["details"]["difference_to_bf16"]) == pytest.approx(-0.125)
    assert record["model_info"]["inference_engine"] == {"name": "transformers", "version": "5.17.0"}


def test_no_text_of_a_question_or_answer_is_in_a_card(tmp_path):
    card_of(tmp_path)
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(files) == 5 and not any(SECRET in path.read_text() for path in files)


def test_places_on_this_machine_are_not_told(tmp_path):
    base = tmp_path / "home" / "someone" / "Base-7B"
    base.mkdir(parents=True)
    data = {"chats": {"source": "jsonl", "path": "/home/someone/private/chats.jsonl"}}
    resolved = {"resolved": {"model": MODEL, "data": data, "engine": {"kind": "hf"}}}
    judge = {
        "path": "/home/someone/judge",
        "revision": None,
        "weights": "w" * 64,
        "prompt": "p",
        "n_asked": 40,
        "n_unparsable": 0,
    }
    text, record, said = card_of(tmp_path, model=str(base), about=resolved, row_changes={"gsm8k": {"judge": judge}})
    assert record["evaluation_results"][0]["metric_config"]["additional_details"]["judge"].startswith("judge (weights ")
    assert "someone" not in text + json.dumps(record) and "(chats.jsonl)" in text and "`Base-7B` in NVFP4" in text
    assert any(line.startswith("fill in base_model: ") for line in said)
    assert "base_model" not in ModelCard.load(tmp_path / "out" / "README.md").data.to_dict()


def test_scores_that_are_not_proven_are_marked(tmp_path):
    rows = {("qad", "gsm8k"): {"flags": ["unverified"]}, ("bf16", "gsm8k"): {"flags": ["unverified"]}}
    text, record, _ = card_of(tmp_path, row_changes=rows)
    assert "| 62.5 ±10.0‡ |" in text and "‡ gsm8k: from an endpoint that was given; which weights" in text
    assert record["evaluation_results"][0]["score_details"]["details"]["flags"] == "unverified"
    assert "unverified" in ModelCard.load(tmp_path / "out" / "README.md").data.eval_results[0].metric_name


def test_a_control_with_grey_pictures_is_published_as_no_score(tmp_path):
    grey = {"flags": ["grey pictures"]}
    text, record, _ = card_of(tmp_path, row_changes={(name, "gsm8k"): grey for name in ("bf16", "ptq", "qad")})
    assert [result["evaluation_name"] for result in record["evaluation_results"]] == ["gpqa_diamond"]
    (science,) = ModelCard.load(tmp_path / "out" / "README.md").data.eval_results
    assert science.dataset_name == "gpqa_diamond"
    assert re.search(r"^\| gsm8k \(grey control\) \| 75.0 ±10.0‡ \| 62.5 ±10.0‡ \| – \| – \| 40 \|$", text, re.MULTILINE)
    assert "Not compared with BF16: gsm8k. Control: gsm8k shows grey pictures" in text


def test_what_cannot_be_compared_has_no_recovery_and_says_why(tmp_path):
    text, record, _ = card_of(tmp_path, row_changes={("qad", "gsm8k"): {"scorer": "another@2"}})
    assert re.search(r"^\| gsm8k \| 75.0 ±10.0 \| 62.5 ±10.0 \| – \| – \| 40 \|$", text, re.MULTILINE)
    assert "Not compared with BF16: gsm8k. Scorer" in text
    assert "recovery" not in record["evaluation_results"][0]["score_details"]["details"]


@pytest.mark.parametrize(
    ("source", "named"), [("suite", "the policy of its suite"), ("/home/me/release.toml", "the policy `release.toml`")]
)
def test_the_verdict_beside_the_run_is_told_with_its_policy(tmp_path, source, named):
    run = make_run(tmp_path)
    judged = {"candidate": "qad", "baseline": "bf16", "verdict": "NO-GO", "reasons": ["gsm8k: FAIL"], "checks": []}
    record = {
        "schema": 1,
        "suite": "hand",
        "run": run.name,
        "verdict": "NO-GO",
        "policy": {"source": source},
        "candidates": [judged],
        "digest": run_digest(run),
    }
    (run / "verdict.json").write_text(json.dumps(record))
    write_card(run, "qad", make_export(run, tmp_path / "out"))
    text = (tmp_path / "out" / "README.md").read_text()
    assert f"Release gate: **NO-GO** against bf16, by {named}.\n- gsm8k: FAIL" in text
    write_card(run, "ptq", make_export(run, tmp_path / "other", "ptq"))
    assert "No release gate has judged" in (tmp_path / "other" / "README.md").read_text()
    (run / "verdict.json").write_text(json.dumps(record | {"run": "another"}))
    with pytest.raises(StoreError, match="is about hand/another; judge this run again: harness gate"):
        write_card(run, "qad", make_export(run, tmp_path / "third"))
    (run / "verdict.json").write_text(json.dumps(record))
    (run / "tasks.jsonl").write_text((run / "tasks.jsonl").read_text().replace("0.1", "0.2"))
    with pytest.raises(StoreError, match="is older than the records of the run"):
        write_card(run, "qad", make_export(run, tmp_path / "fourth"))


def test_serving_asks_for_what_the_checkpoint_needs(tmp_path):
    fp8 = {"qad": QAD | {"quantization": QUANTIZATION | {"kv_cache": "fp8"}}}
    text, _, _ = card_of(tmp_path / "fp8", variant_changes=fp8)
    assert "vllm serve . --served-model-name Base-7B-NVFP4-QAD --kv-cache-dtype fp8\n" in text
    w4a16 = {"qad": {"kernels": {"linear": "w4a16", "kv_cache": "bf16"}}}
    assert "--linear-backend marlin" in card_of(tmp_path / "w4a16", row_changes=w4a16)[0]
    w4a16["qad"]["kernels"]["experts"] = "w4a16"
    text = card_of(tmp_path / "experts", row_changes=w4a16)[0]
    assert "--linear-backend marlin --moe-backend marlin\n" in text and "experts by: w4a16" in text
    assert "which `--linear-backend marlin` and `--moe-backend marlin` ask for" in text
    plain = card_of(tmp_path / "plain")[0]
    assert "--moe-backend" not in plain and "--kv-cache-dtype" not in plain and "--linear-backend" not in plain


def test_another_layout_than_the_scored_one_is_told(tmp_path):
    text, _, _ = card_of(tmp_path, export={"layout": "compressed-tensors", "scales_changed": 3})
    assert "Layout: compressed-tensors; scored as modelopt, the codes are the same, 3 scales differ in their last bit." in text


def test_a_variant_without_training_says_so(tmp_path):
    text = card_of(tmp_path, "ptq")[0]
    assert "- No training." in text and "(PTQ)" in text and "training seed" not in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda run, out: (out / "model.safetensors").write_bytes(b"other"),
            "has other bytes than what was scored; a card is of the scored files",
        ),
        (lambda run, out: (out / "config.json").unlink(), r"config\.json: is missing"),
        (lambda run, out: (out / "more.safetensors").write_bytes(b""), r"more\.safetensors: was not exported"),
        (
            lambda run, out: (out / RECORD).unlink(),
            "is no copy that harness export made .*harness export .* --variant qad --out DIR",
        ),
        (lambda run, out: (out / "README.md").write_text("by hand"), "was edited since; move it away"),
    ],
)
def test_only_the_very_files_that_were_scored_get_a_card(tmp_path, change, message):
    run = make_run(tmp_path)
    out = make_export(run, tmp_path / "out")
    change(run, out)
    with pytest.raises(StoreError, match=message):
        write_card(run, "qad", out)
    assert not (out / "every_eval_ever").exists()


def test_a_copy_of_another_checkpoint_gets_no_card(tmp_path):
    run = make_run(tmp_path)
    out = make_export(run, tmp_path / "out", "ptq", checkpoint={"stage": "abc", "digest": "e" * 64})
    with pytest.raises(StoreError, match="is a copy of ptq of run hand .*, another checkpoint than qad of this run"):
        write_card(run, "qad", out)


def test_a_checkpoint_outside_the_store_that_changed_since_gets_no_card(tmp_path):
    outside = {"checkpoint": {"folder": "/elsewhere"}, "quantization": None, "checkpoint_bytes": 1, "bits_per_weight": 4.5}
    stage = {"kind": "evaluate", "label": "qad: gsm8k", "variant": "qad", "inputs": {"checkpoint": "then"}, "generated": None}
    run = make_run(tmp_path, variant_changes={"qad": outside | {"method": "checkpoint"}}, about={"stages": [stage]})
    with pytest.raises(StoreError, match="/elsewhere lies outside the store and was changed after it was scored"):
        write_card(run, "qad", make_export(run, tmp_path / "out", checkpoint=outside["checkpoint"], fingerprint="now"))
    write_card(run, "qad", make_export(run, tmp_path / "same", checkpoint=outside["checkpoint"], fingerprint="then"))
    assert "quantized elsewhere" in (tmp_path / "same" / "README.md").read_text()


def test_nothing_is_written_into_the_cache(tmp_path):
    run = make_run(tmp_path)
    out = make_export(run, cache_folder() / "stages" / "abc" / "files")
    with pytest.raises(
        StoreError, match="is in the cache, whose stages are never written to; copy the checkpoint first: harness export"
    ):
        write_card(run, "qad", out)


@pytest.mark.parametrize(
    ("variant", "changes", "message"),
    [
        ("bf16", {}, "--variant bf16: is the BF16 model itself, .*give a quantized variant: ptq, qad"),
        ("nobody", {}, "has no variant 'nobody'. Known: bf16, ptq, qad"),
        ("qad", {"about": {"status": "unfinished"}}, "this run is unfinished; a card is of a finished one"),
        ("qad", {"about": {"rehearsal": True}}, "a rehearsal makes no card, .*; run the real suite"),
    ],
)
def test_a_card_that_makes_no_sense_is_refused_with_the_reason(tmp_path, monkeypatch, capsys, variant, changes, message):
    run = make_run(tmp_path, **changes)
    out = make_export(run, tmp_path / "out")
    with pytest.raises(HarnessError, match=message):
        write_card(run, variant, out)
    monkeypatch.setattr(sys, "argv", ["harness", "card", str(run), "--variant", variant, "--out", str(out)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2 and re.search(message, capsys.readouterr().err)


def test_a_withdrawn_run_makes_no_card(tmp_path):
    from harness.accepted import invalidate

    run = make_run(tmp_path)
    invalidate(run, reason="wrong prompts")
    with pytest.raises(HarnessError, match="was withdrawn .*wrong prompts"):
        write_card(run, "qad", make_export(run, tmp_path / "out"))


BASE_CARD = "---\nlicense: other\nlicense_name: research-only\nlicense_link: LICENSE\n---\n# The base\n"


def test_the_base_s_readme_is_kept_and_its_licence_told_however_often_the_card_is_written(tmp_path):
    run = make_run(tmp_path)
    out = make_export(run, tmp_path / "out", files={"README.md": BASE_CARD, "LICENSE": "Research only.\nMore."})
    for _ in range(2):
        assert not any("license" in line for line in write_card(run, "qad", out))
        assert (out / "BASE_README.md").read_text() == BASE_CARD
        data = ModelCard.load(out / "README.md").data
        assert (data.license, data.license_name, data.license_link) == ("other", "research-only", "LICENSE")
    assert "other (research-only), as its BASE_README.md says" in (out / "README.md").read_text()


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"README.md": "---\nlicense: llama3.1\n---\n"}, ("llama3.1", None, "README.md")),
        ({"LICENSE": "\n   Apache License\n   Version 2.0, January 2004\n"}, ("apache-2.0", None, "LICENSE")),
        ({"LICENSE.txt": "MIT License\n\nCopyright (c) someone"}, ("mit", None, "LICENSE.txt")),
        ({"LICENCE.md": "# Terms of Example Models\n"}, ("other", "Terms of Example Models", "LICENCE.md")),
        ({"config.json": '{"license": "gemma"}'}, ("gemma", None, "config.json")),
        ({"README.md": "---\nlicense: [not, text\n---\n", "LICENSE": "MIT License"}, ("mit", None, "LICENSE")),
        ({"README.md": "The licence is MIT, I think.", "config.json": "{"}, None),
        ({"README.md": "---\nlicense: unknown\n---\n", "LICENSE": ""}, None),
    ],
)
def test_a_licence_is_what_a_file_says_and_never_a_guess(tmp_path, files, expected):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    found = find_licence([tmp_path / "missing", tmp_path])
    assert (None if found is None else (found.id, found.name, found.found_in)) == expected


def test_a_licence_that_is_not_found_is_asked_for(tmp_path):
    text, _, said = card_of(tmp_path)
    assert NOT_FOUND.lower() in text.lower() and any(line.startswith("fill in license: ") for line in said)


def test_the_base_s_folder_is_asked_where_nothing_came_along(tmp_path):
    base = tmp_path / "Base-7B"
    base.mkdir()
    (base / "LICENSE").write_text("MIT License")
    assert "That of the base model: mit, as its LICENSE says." in card_of(tmp_path, model=str(base))[0]
