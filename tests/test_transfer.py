"""Stages made on one machine and used on another: matched by what they are, refused when damaged, never matched by chance."""

import json
import re
import shutil
import sys

import pytest
from conftest import SUITE

from harness import plan as planning
from harness import provenance
from harness.cli import main
from harness.done import about_stage, find_done
from harness.errors import StoreError
from harness.outline import outline
from harness.plan import make_plan
from harness.store import Store, cache_folder
from harness.suite import load_suite
from harness.transfer import export_stage, import_stages


@pytest.fixture(scope="module")
def machine_a(tmp_path_factory, tiny_model):
    """(suite, cache, export folder): QAD trained on another device with other packages, and exported."""
    root = tmp_path_factory.mktemp("machine-a")
    suite = root / "tiny.toml"
    text = SUITE.format(model=tiny_model)
    text = re.sub(r'\[\[variant\]\]\nname = "qat".*?\n\n', "", text, flags=re.S)
    text = re.sub(r'\[\[task\]\]\nname = "mini_choice".*?\n\n', "", text, flags=re.S)
    suite.write_text(text)
    with pytest.MonkeyPatch.context() as machine:
        machine.setenv("HARNESS_CACHE", str(root / "cache"))
        machine.setattr(planning, "device_kind", lambda: "NVIDIA H200")
        machine.setattr(provenance, "device_kind", lambda: "NVIDIA H200")
        machine.setattr(provenance, "_version", lambda name: "9.9.9" if name == "torch" else "1.0")
        assert command(machine, "run", suite, "--only", "qad", "--results", root / "results") == 0
        (key,) = (
            stage.key[:12] for stage in make_plan(load_suite(suite), Store(cache_folder())).stages if stage.kind == "train"
        )
        assert command(machine, "stage", "export", key, root / "out") == 0
    return suite, root / "cache", root / "out"


def command(monkeypatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["harness", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def labels(lines: list[str], state: str) -> set[str]:
    return {match.group(1) for line in lines if (match := re.match(rf"  {state} +\w{{12}}  ([^(,]*?)(?: \(|,|$)", line))}


def test_another_machine_scores_what_was_trained_elsewhere_and_does_not_train(machine_a, tmp_path, monkeypatch, capsys):
    suite, cache, out = machine_a
    assert command(monkeypatch, "stage", "import", out) == 0
    assert "4 stages are imported" in capsys.readouterr().out
    planned = outline(suite)
    assert labels(planned, "imported") == {"data text", "calibrate", "quantize", "qad: train"}
    assert any(line.endswith("made on NVIDIA H200 with torch 9.9.9") for line in planned)

    def refuse(*arguments, **options):
        raise AssertionError("trained or quantized again")

    monkeypatch.setattr("harness.stages.Workbench._train", refuse)
    monkeypatch.setattr("harness.stages.Workbench._quantize", refuse)
    monkeypatch.setattr("harness.stages.Workbench._calibrate", refuse)
    assert command(monkeypatch, "run", suite, "--results", tmp_path / "results") == 0
    (run,) = (tmp_path / "results" / "tiny").iterdir()
    about = json.loads((run / "run.json").read_text())
    stages = {stage["label"]: stage for stage in about["stages"]}
    assert stages["qad: train"]["imported_from"] and stages["qad: mini_math"]["imported_from"] is None
    assert stages["qad: train"]["provenance"]["device"] == "NVIDIA H200"
    assert stages["qad: mini_math"]["provenance"]["device"] == provenance.device_kind()
    (made_on_a,) = (
        path for path in (cache / "stages").glob("*/stage.json") if json.loads(path.read_text())["label"] == "qad: train"
    )
    qad = next(variant for variant in about["variants"] if variant["name"] == "qad")
    assert qad["checkpoint"]["digest"] == json.loads(made_on_a.read_text())["digest"]
    copied = tmp_path / "copied"
    assert command(monkeypatch, "export", run, "--variant", "qad", "--out", copied) == 0
    assert (copied / "config.json").is_file()


def test_an_imported_closure_is_taken_before_own_stages_with_other_bits(machine_a):
    suite, _, out = machine_a
    store = Store(cache_folder())
    stages = {stage.label: stage for stage in make_plan(load_suite(suite), store).stages}
    for label in ("data text", "calibrate"):
        with store.writing(
            stages[label].key, about_stage(stages[label], store) | {"provenance": provenance.provenance()}
        ) as folder:
            (folder / "own.txt").write_text("other bits")
        assert find_done(stages[label], store) is not None
    import_stages(out, store)
    assert labels(outline(suite), "imported") == {"data text", "calibrate", "quantize", "qad: train"}


@pytest.mark.parametrize(
    ("old", "new", "lost"),
    [
        ("lr = 1e-3", "lr = 2e-3", {"qad: train"}),
        ("samples = 8 }", "samples = 9 }", {"calibrate", "quantize", "qad: train"}),
        ("samples = 12", "samples = 13", set()),
        ('[[task]]\nname = "mini_math"\nlimit = 8\n', "", set()),
    ],
)
def test_a_changed_section_is_not_matched_and_what_came_of_it_neither(machine_a, tmp_path, old, new, lost):
    suite, _, out = machine_a
    import_stages(out, Store(tmp_path / "cache"))
    changed = tmp_path / "changed.toml"
    assert old in suite.read_text()
    changed.write_text(suite.read_text().replace(old, new))
    planned = outline(changed)
    assert labels(planned, "imported") == {"data text", "calibrate", "quantize", "qad: train"} - lost


@pytest.mark.parametrize("what", ["numerics", "model"])
def test_other_numerics_or_another_model_are_not_matched_and_plan_says_why(machine_a, tmp_path, monkeypatch, tiny_model, what):
    suite, _, out = machine_a
    import_stages(out, Store(tmp_path / "cache"))
    if what == "numerics":
        current = planning.versions()
        monkeypatch.setattr(planning, "versions", lambda: current | {"train": 99})
        planned = outline(suite)
        assert "qad: train" not in labels(planned, "imported")
        assert any(
            re.search(r"is not used for qad: train: numerics version train \d+, here train 99", line) for line in planned
        )
    else:
        other = tmp_path / "other"
        shutil.copytree(tiny_model, other)
        with (other / "model.safetensors").open("r+b") as file:
            file.seek(-1, 2)
            file.write(b"\x01")
        changed = tmp_path / "other.toml"
        changed.write_text(suite.read_text().replace(str(tiny_model), str(other)))
        planned = outline(changed)
        assert labels(planned, "imported") == set()
        assert any("is not used for data text: its model had other bytes than here" in line for line in planned)


def train_key(out) -> str:
    return json.loads((out / "export.json").read_text())["stage"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("change", r"training\.jsonl: missing, damaged \(sha256 differs\) or foreign"),
        ("remove", r"training\.jsonl: missing, damaged"),
        ("add", r"extra\.bin: missing, damaged \(sha256 differs\) or foreign"),
        ("record", r"stage\.json: missing or damaged"),
        ("link", "is a link, and an export has none"),
        ("stage", r"stage\.json: missing or damaged"),
        ("index", r"export\.json: damaged or not an export of this version"),
        ("version", "not an export of this version \\(schema 99, here 1\\)"),
        ("empty", r"export\.json: cannot be read .*give a folder that harness stage export wrote"),
    ],
)
def test_a_damaged_or_foreign_export_is_refused_whole(machine_a, tmp_path, damage, message):
    folder = tmp_path / "export"
    shutil.copytree(machine_a[2], folder)
    stage = folder / train_key(folder)
    if damage == "change":
        (stage / "files" / "training.jsonl").write_text("{}")
    elif damage == "remove":
        (stage / "files" / "training.jsonl").unlink()
    elif damage == "add":
        (stage / "files" / "extra.bin").write_text("x")
    elif damage == "record":
        (stage / "stage.json").write_text((stage / "stage.json").read_text().replace("NVIDIA H200", "NVIDIA B200"))
    elif damage == "link":
        (stage / "files" / "link").symlink_to("/etc/hostname")
    elif damage == "stage":
        shutil.rmtree(stage)
    elif damage == "index":
        (folder / "export.json").write_text('{"schema": 1, "order"')
    elif damage == "version":
        (folder / "export.json").write_text((folder / "export.json").read_text().replace('"schema": 1', '"schema": 99'))
    else:
        shutil.rmtree(folder)
        folder.mkdir()
    store = Store(tmp_path / "cache")
    with pytest.raises(StoreError, match=message):
        import_stages(folder, store)
    assert store.imported() == []
    assert not list((tmp_path / "cache").glob("stages/.partial*"))


def test_a_key_is_taken_by_its_beginning_and_an_unknown_one_names_those_near(machine_a, tmp_path, monkeypatch, capsys):
    _, cache, out = machine_a
    key = train_key(out)
    typo = key[:7] + ("0" if key[7] != "0" else "1")
    monkeypatch.setenv("HARNESS_CACHE", str(cache))
    assert command(monkeypatch, "stage", "export", typo, tmp_path / "out") == 2
    assert re.search(rf"'{typo}': no stored stage begins with it; near: .*{key[:12]} \(qad: train\)", capsys.readouterr().err)
    store = Store(cache)
    with pytest.raises(StoreError, match="no stored stage begins with it"):
        export_stage("", tmp_path / "out", store)
    first, second = "ab" + "0" * 30, "ab" + "1" * 30
    own = Store(tmp_path / "own")
    for each in (first, second):
        with own.writing(each, {"label": "x"}) as folder:
            (folder / "x").write_text("x")
    with pytest.raises(StoreError, match=rf"several stages begin with it: {first[:12]} \(x\), {second[:12]} \(x\)"):
        export_stage("ab", tmp_path / "out", own)
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_exported_says_why(machine_a, tmp_path):
    _, cache, out = machine_a
    copy = tmp_path / "cache"
    shutil.copytree(cache, copy, copy_function=shutil.copy2)
    store = Store(copy)
    key = train_key(out)
    records = {path.parent.name: json.loads(path.read_text()) for path in (copy / "stages").glob("*/stage.json")}
    score = next(name for name, record in records.items() if record["kind"] == "evaluate")
    with pytest.raises(StoreError, match="is of kind evaluate; scores are made where they are read"):
        export_stage(score, tmp_path / "out", store)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    with pytest.raises(StoreError, match="is there and not empty"):
        export_stage(key, tmp_path / "full", store)
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["x"]
    old = {name: value for name, value in records[key].items() if name not in ("numerics", "input_keys")}
    (copy / "stages" / key / "stage.json").write_text(json.dumps(old))
    with pytest.raises(StoreError, match="its record lacks numerics, input_keys, so it was made by an older version"):
        export_stage(key, tmp_path / "out", store)
    (copy / "stages" / key / "stage.json").write_text(json.dumps(records[key]))
    shutil.rmtree(copy / "stages" / records[key]["input_keys"]["calibration"])
    with pytest.raises(StoreError, match=r"its calibration \(\w+\) is not in the store any more"):
        export_stage(key, tmp_path / "out", store)
    (copy / "stages" / key / "files" / "training.jsonl").write_text("")
    with pytest.raises(StoreError, match="are damaged; run the suite again"):
        export_stage(key, tmp_path / "out", store)
    assert not (tmp_path / "out").exists()


def test_an_export_of_what_was_imported_is_the_same_again(machine_a, tmp_path):
    _, _, out = machine_a
    store = Store(tmp_path / "cache")
    import_stages(out, store)
    export_stage(train_key(out)[:12], tmp_path / "again", store)
    names = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    assert names == sorted(
        str(path.relative_to(tmp_path / "again")) for path in (tmp_path / "again").rglob("*") if path.is_file()
    )
    assert all((out / name).read_bytes() == (tmp_path / "again" / name).read_bytes() for name in names)


def test_an_own_stage_of_the_same_key_with_other_bits_does_not_stand_in_for_the_imported_one(machine_a, tmp_path):
    """Two machines alike give equal keys, and on a GPU not always equal bits."""
    _, _, out = machine_a
    store = Store(tmp_path / "cache")
    import_stages(out, store)
    calibration = next(stage for stage in store.imported() if stage.record["kind"] == "calibrate")
    key = calibration.record["key"]
    with store.writing(key, {"label": "calibrate"}) as folder:
        (folder / "own.txt").write_text("other bits")
    assert store.find(key).digest != calibration.digest
    assert store.find(key, digest=calibration.digest).is_imported
    export_stage(train_key(out), tmp_path / "again", store)
    assert (tmp_path / "again" / key / "stage.json").read_bytes() == (out / key / "stage.json").read_bytes()
