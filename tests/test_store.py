"""Stages on disk: atomic, verified, and an error with a name when the disk is full."""

import json
import os
import subprocess
import sys

import pytest

from harness.errors import StoreError
from harness.store import Store


def test_a_stage_is_found_with_its_record_and_files(tmp_path):
    store = Store(tmp_path)
    with store.writing("k1", {"kind": "data"}) as folder:
        (folder / "x.txt").write_text("hello")
    found = store.find("k1")
    assert (found.folder / "x.txt").read_text() == "hello"
    assert found.record["kind"] == "data"
    assert store.find("k2") is None


def test_an_error_leaves_nothing_behind(tmp_path):
    store = Store(tmp_path)
    with pytest.raises(RuntimeError, match="stop"), store.writing("k1", {}) as folder:
        (folder / "x.txt").write_text("half")
        raise RuntimeError("stop")
    assert store.find("k1") is None
    assert list((tmp_path / "stages").iterdir()) == []


@pytest.mark.parametrize("damage", ["change", "remove", "schema", "torn"])
def test_a_damaged_stage_is_not_found(tmp_path, damage):
    store = Store(tmp_path)
    with store.writing("k1", {}) as folder:
        (folder / "x.txt").write_text("hello")
    stage = tmp_path / "stages" / "k1"
    if damage == "change":
        (stage / "files" / "x.txt").write_text("hullo")
    elif damage == "remove":
        (stage / "files" / "x.txt").unlink()
    elif damage == "schema":
        record = json.loads((stage / "stage.json").read_text())
        (stage / "stage.json").write_text(json.dumps(record | {"schema": 99}))
    else:
        (stage / "stage.json").write_text('{"schema": 1, "ke')
    assert Store(tmp_path).find("k1") is None


def test_what_a_killed_process_left_is_removed_and_never_used(tmp_path):
    process = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    left = tmp_path / "stages" / f".partial-k1-{process.stdout.strip()}"
    mine = tmp_path / "stages" / f".partial-k9-{os.getpid()}"
    left.mkdir(parents=True)
    mine.mkdir()
    store = Store(tmp_path)
    assert store.find("k1") is None
    with store.writing("k2", {}) as folder:
        (folder / "x.txt").write_text("")
    assert not left.exists()
    assert mine.exists()


def test_file_digests_are_remembered_until_the_file_changes(tmp_path):
    path = tmp_path / "weights"
    path.write_text("a")
    first = Store(tmp_path / "cache").file_digest(path)
    assert Store(tmp_path / "cache").file_digest(path) == first
    path.write_text("ab")
    assert Store(tmp_path / "cache").file_digest(path) != first


FULL_DISK = """
import resource, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from harness.errors import StoreError
from harness.store import Store
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
store = Store(Path(sys.argv[1]))
def write(folder):
    if sys.argv[2] == "python":
        (folder / "x").write_bytes(b"0" * 200_000)
    else:
        save_file({"x": torch.zeros(100_000)}, folder / "x")
try:
    with store.writing("k1", {}) as folder:
        write(folder)
except StoreError as error:
    print(error)
print(store.find("k1"), list((store.root / "stages").iterdir()))
"""


@pytest.mark.parametrize("writer", ["python", "compiled"])
def test_a_disk_that_fills_is_one_message_and_leaves_nothing_half_written(tmp_path, writer):
    """The limit on file sizes gives the same refusal as a full disk, from the operating system itself."""
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(tmp_path), writer], capture_output=True, text=True)
    message, state = done.stdout.strip().splitlines()
    assert (
        message
        == f"the stage cache {tmp_path}: the disk is full or a quota is reached; what was finished stays; make room and run again"
    )
    assert state == "None []"


FULL_JOURNAL = """
import resource, sys
from pathlib import Path
from harness.engines import Answer, Request, Sampling
from harness.errors import StoreError
from harness.journal import Journal
resource.setrlimit(resource.RLIMIT_FSIZE, (4_500, 4_500))
asked = [Request(token_ids=(n,), sampling=Sampling(max_tokens=1, until=())) for n in range(9)]
try:
    with Journal(Path(sys.argv[1]), {"weights": "w", "task": "t"}) as journal:
        for request in asked:
            journal.append(request, Answer("x" * 1_000, (1,), "stop", 0.1))
except StoreError as error:
    print(error)
print(sum(line.endswith(b"\\n") for line in next(Path(sys.argv[1]).rglob("*.jsonl")).open("rb")))
with Journal(Path(sys.argv[1]), {"weights": "w", "task": "t"}) as journal:
    print(sum(journal.find(request) is not None for request in asked))
"""


def test_a_disk_that_fills_under_a_journal_is_one_message_and_keeps_what_was_written(tmp_path):
    done = subprocess.run([sys.executable, "-c", FULL_JOURNAL, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    message, n_lines, n_found = done.stdout.strip().splitlines()
    assert message.startswith(f"the journal {tmp_path}") and "the disk is full or a quota is reached" in message
    assert int(n_found) == int(n_lines) - 1 > 0  # the header, and the answers that went in whole


def test_folders_that_cannot_be_made_are_named(tmp_path):
    from harness.journal import Journal
    from harness.records import open_results

    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="the stage cache .*Not a directory; choose another folder"):
        Store(tmp_path / "file").writing("k", {}).__enter__()
    with pytest.raises(StoreError, match="the results folder .*Not a directory"):
        open_results(tmp_path / "file" / "x")
    with pytest.raises(StoreError, match="the journals .*Not a directory"):
        Journal(tmp_path / "file", {"weights": "w", "task": "t"}).__enter__()


def test_a_complete_run_is_never_written_again_when_there_is_work(tmp_path):
    from harness.records import open_run
    from harness.store import write_json

    first = open_run(tmp_path, "s", "d" * 12, has_work=True)
    write_json(first / "run.json", {"schema": 1, "plan": "d" * 12, "status": "unfinished"})
    assert open_run(tmp_path, "s", "d" * 12, has_work=True) == first
    about = {"schema": 1, "plan": "d" * 12, "status": "complete", "rehearsal": False}
    write_json(first / "run.json", about)
    assert open_run(tmp_path, "s", "d" * 12, has_work=False) == first
    second = first.with_name("20000101-000000-dddddddd")
    first.rename(second)
    assert open_run(tmp_path, "s", "d" * 12, has_work=True) != second
    write_json(second / "run.json", {key: about[key] for key in about if key != "rehearsal"})
    assert open_run(tmp_path, "s", "d" * 12, has_work=False) != second, "it does not say that it is no rehearsal"
    for status in ("unfinished", "complete"):
        write_json(second / "run.json", about | {"status": status, "rehearsal": True})
        assert open_run(tmp_path, "s", "d" * 12, has_work=True) != second, "what a rehearsal had made is gone"


def test_another_gate_makes_another_run_of_what_is_stored(tmp_path):
    from harness.records import open_run
    from harness.store import write_json

    gate = {"gate": {"kernels": ("native",)}}
    first = open_run(tmp_path, "s", "d" * 12, has_work=False, read_by=gate)
    first = first.rename(first.with_name("20000101-000000-dddddddd"))
    about = {
        "schema": 1,
        "plan": "d" * 12,
        "status": "complete",
        "rehearsal": False,
        "resolved": {"gate": {"kernels": ["native"]}},
    }
    write_json(first / "run.json", about)
    assert open_run(tmp_path, "s", "d" * 12, has_work=False, read_by=gate) == first
    assert open_run(tmp_path, "s", "d" * 12, has_work=False, read_by={"gate": None}) != first


def test_a_cache_that_may_not_be_written_is_named(tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    tmp_path.chmod(0o500)
    with pytest.raises(StoreError, match="no permission"), Store(tmp_path / "cache").writing("k", {}):
        pass
