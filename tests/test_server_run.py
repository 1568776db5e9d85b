"""A whole run against servers: what its rows say, what a resumed one asks, and that no key is anywhere."""

import json
import shutil
import sys

import pytest
from fault_server import SECRET, FaultServer
from test_server import no_network  # noqa: F401  (loopback alone)

from harness import cli

SUITE = """
schema = 1
name = "served"

[model]
path = "{model}"

[[variant]]
name = "bf16"
method = "bf16"
endpoint = {{ url = "{url}", model = "m", api_key_env = "SOME_KEY" }}

[[task]]
name = "mini_math"
limit = 12

[[task]]
name = "mini_choice"
limit = 4

[engine]
kind = "server"
args = {{ retries = 0, concurrency = 2, max_model_len = 512 }}
"""


@pytest.fixture
def run(tiny_model, tmp_path, monkeypatch, capfd):
    """Runs the suite against a server; its exit status and all that it printed."""
    monkeypatch.setenv("SOME_KEY", SECRET)

    def ask(server):
        path = tmp_path / "served.toml"
        path.write_text(SUITE.format(model=tiny_model, url=server.url))
        monkeypatch.setattr(sys, "argv", ["harness", "run", str(path), "--results", str(tmp_path / "results")])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return int(ended.value.code or 0), "".join(capfd.readouterr())

    return ask


def test_a_run_keeps_what_a_failing_server_answered_asks_the_rest_and_knows_the_server_again(run, tiny_tokenizer, tmp_path):
    said = []
    with FaultServer(tiny_tokenizer, faults=lambda number, body: "500" if number % 4 == 3 else None) as server:
        status, words = run(server)
        said.append(words)
        n_first = len(server.asked)
    assert status == 4 and "missing" in words and "status 500" in words, words
    with FaultServer(tiny_tokenizer, shift=0.5) as other:
        status, words = run(other)
        said.append(words)
    assert status == 2 and "is not what it was at first contact" in words and not other.asked
    with FaultServer(tiny_tokenizer) as server:
        status, words = run(server)
        said.append(words)
        first = [tuple(body["prompt"]) for body in server.asked]
    assert status == 0, words
    assert len(first) == n_first // 4 == 7
    (folder, *_) = sorted((tmp_path / "results" / "served").iterdir(), reverse=True)
    rows = [json.loads(line) for line in (folder / "tasks.jsonl").read_text().splitlines()]
    assert rows and all(row["flags"] == ["unverified"] for row in rows)
    assert all(row["n_scored"] == row["n_total"] for row in rows)
    assert all("unverified" in row["kernels"]["linear"] for row in rows)
    assert "unverified" in said[-1]
    shutil.rmtree(tmp_path / "cache")
    files = [path for path in tmp_path.rglob("*") if path.is_file() and "cache" not in path.parts]
    assert len(files) > 5 and SECRET not in "".join(said)
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]


def test_a_key_that_is_not_set_is_said_before_anything_is_made(run, tiny_tokenizer, monkeypatch):
    monkeypatch.delenv("SOME_KEY")
    with FaultServer(tiny_tokenizer) as server:
        status, words = run(server)
    assert status == 2 and "its key is to be in the variable SOME_KEY, which is not set" in words
    assert "stages to do" not in words and not server.asked
