"""Configurations that are kept with the harness: closed files that say where they are from, and shipped with the package."""

import json
import re
import subprocess
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest

from harness.errors import ModelError
from harness.known_models import FOLDER, known_model, known_models, read_known_model
from harness.suite import load_suite

REPOSITORY = FOLDER.parent.parent
GOOD = {
    "path": "org/model",
    "revision": "0" * 40,
    "source": "a public program",
    "verified": False,
    "config": {"model_type": "llama"},
    "released": None,
}


def test_every_file_is_read_and_found_by_the_id_of_its_model():
    files = sorted(FOLDER.glob("*.json"))
    assert len(files) == len(known_models()) >= 5
    for file in files:
        model = read_known_model(file)
        assert known_model(model.path) == model
        assert model.verified == ("unverified" not in model.origin) and model.source in model.origin
    assert known_model("org/of-nobody") is None


def test_the_models_of_the_papers_systems_are_known_at_the_revision_that_their_suites_name():
    for name in ("acereason", "nemotron-3-nano", "nemotron-nano-v2", "nemotron-nano-v2-vl", "llama-nemotron-super"):
        asked = load_suite(REPOSITORY / "suites" / f"{name}.toml").model
        known = known_model(asked.path)
        assert known is not None and known.revision in (asked.revision, None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": None}, r"source: found None; allowed is where the fields were found, in words"),
        ({"source": " "}, r"source: found ' '; allowed is where"),
        ({"verified": 1}, r"verified: found 1; allowed is true or false"),
        ({"path": "model"}, r"path: found 'model'; allowed is an id of the hub \(org/name\)"),
        ({"revision": "main"}, r"revision: found 'main'; allowed is a commit \(40 hex digits\) or null"),
        ({"config": {}}, r"config: found \{\}; allowed is an object with a model_type"),
        ({"released": []}, r"released: found \[\]; allowed is an object or null"),
        ({"licence": "x"}, r"found config, licence, .*; a known model has exactly the fields path, revision, source, verified"),
    ],
)
def test_a_file_with_mistakes_is_refused(tmp_path, change, message):
    file = tmp_path / "model.json"
    file.write_text(json.dumps(GOOD | change))
    with pytest.raises(ModelError, match=f"^{re.escape(str(file))}: {message}"):
        read_known_model(file)


def test_a_file_without_a_source_or_without_an_object_is_refused(tmp_path):
    file = tmp_path / "model.json"
    file.write_text(json.dumps(GOOD))
    assert read_known_model(file).path == "org/model"
    file.write_text(json.dumps({key: value for key, value in GOOD.items() if key != "source"}))
    with pytest.raises(ModelError, match=r"found config, path, released, revision, verified; a known model has exactly"):
        read_known_model(file)
    file.write_text("[]")
    with pytest.raises(ModelError, match=r"found list; a known model has exactly"):
        read_known_model(file)
    file.write_text("{")
    with pytest.raises(ModelError, match=r"cannot be read as JSON"):
        read_known_model(file)


def test_every_file_of_the_package_that_is_no_code_is_shipped():
    patterns = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["harness"]
    listed = subprocess.run(["git", "ls-files", "harness"], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    data = [
        Path(line).relative_to("harness").as_posix() for line in listed.splitlines() if not line.endswith((".py", "py.typed"))
    ]
    assert data
    assert [name for name in data if not any(fnmatch(name, pattern.replace("**/", "")) for pattern in patterns)] == []
