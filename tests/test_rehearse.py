"""The command on a small suite: its table, its marks, its statuses, and the problems that it is for."""

import json
import os
import re
import subprocess
import sys

import pytest
from conftest import variants
from typer.testing import CliRunner

from harness.accepted import accept
from harness.cli import app
from harness.errors import StoreError
from harness.gating import gate
from harness.leaderboard.build import build_leaderboard

CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 896,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "intermediate_size": 4864,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
    "max_position_embeddings": 32768,
}
SUITE = (
    """
schema = 1
name = "small"

[model]
path = "someone/model"
revision = "0123456789abcdef0123456789abcdef01234567"

[quantization]
exclude = ["lm_head"]
calibration = {{ data = "chats", samples = 64 }}

[data.chats]
source = "hub"
path = "someone/chats"
revision = "0123456789abcdef0123456789abcdef01234567"
prompt = "asked"
response = "answered"
where = {{ kind = ["good"] }}
seq_len = 8192

[training]
tokens = 1_000_000
batch_size = 64
micro_batch_size = 8
lr = 1e-4
loss_on = "assistant"
select = "best_val"
validate_every = 20

"""
    + variants("bf16", "ptq", "qad")
    + """
[sampling]
temperature = 0.6
max_tokens = 4096

[[task]]
name = "gpqa_diamond"
repeats = 8

[engine]
kind = "hf"

[diagnostics]
data = "chats"
samples = 1000

[gate]
candidate = "qad"
kernels = ["w4a4_emulation"]

[[gate.task]]
name = "gpqa_diamond"
margin = 5.0
tier = "critical"
{more}
"""
)


def rehearse(tmp_path, more="", config=CONFIG, change=lambda text: text):
    """The exit status, all that was printed, and the run folders."""
    suite = tmp_path / "small.toml"
    suite.write_text(change(SUITE.format(more=more)))
    words = ["rehearse", str(suite), "--results", str(tmp_path / "rehearsals")]
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
        words += ["--config", str(tmp_path / "config.json")]
    done = CliRunner().invoke(app, words)
    runs = [path.parent for path in sorted((tmp_path / "rehearsals").glob("small/*/run.json"))]
    return done.exit_code, " ".join(done.output.split()), runs


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_chats(mirror, row):
    folder = mirror / "someone" / "chats"
    folder.mkdir(parents=True)
    (folder / "train.jsonl").write_text("".join(json.dumps(row(i)) + "\n" for i in range(300)))


def test_a_rehearsal_ends_with_a_marked_table_that_is_never_ranked_gated_or_accepted(tmp_path, own_cache):
    names = ("HARNESS_MIRROR", "HARNESS_CACHE", "HF_HUB_OFFLINE", "NLTK_DATA")
    surroundings = {name: os.environ.get(name) for name in names}
    status, said, (run,) = rehearse(tmp_path)
    assert status == 0, said
    assert "no problem found" in said and "REHEARSAL of small" in said and "made rows" in said
    assert "168 nvfp4 linear layers are quantized" in said, "those of the real configuration: 24 layers of 7"
    about = json.loads((run / "run.json").read_text())
    assert about["rehearsal"] is True and about["status"] == "complete"
    for name in ("tasks.jsonl", "diagnostics.jsonl", "diagnostics_sequences.jsonl"):
        rows = rows_of(run / name)
        assert rows and all(row["rehearsal"] is True for row in rows)
    assert "REHEARSAL of small" in (run / "table.md").read_text()
    assert [len(rows_of(path)) > 3 for path in (run / "training").glob("*.jsonl")] == [True]
    from rich.console import Console

    assert gate(run, Console(quiet=True)) == "INCONCLUSIVE"
    assert "is a rehearsal" in (run / "verdict.json").read_text()
    with pytest.raises(StoreError, match="a rehearsal is never accepted"):
        accept(run, reason="why not", candidate="qad", despite_verdict=True)
    build_leaderboard(tmp_path / "rehearsals", tmp_path / "site")
    listed = (tmp_path / "rehearsals" / "LEADERBOARD.md").read_text()
    assert "Boards without a ranked row" in listed and "small, w4a4" in listed.partition("Boards without a ranked row")[2]
    assert {name: os.environ.get(name) for name in names} == surroundings, "mirror and cache of the rehearsal are its own"
    assert not list((own_cache / "rehearsals").iterdir()), "twins and rows are gone"


def test_a_column_that_the_mirror_lacks_is_a_problem_and_what_was_made_is_kept(tmp_path, own_cache, monkeypatch):
    write_chats(tmp_path / "mirror", lambda i: {"asked": f"What is {i}?", "reply": str(i), "kind": "good"})
    monkeypatch.setenv("HARNESS_MIRROR", str(tmp_path / "mirror"))
    status, said, _ = rehearse(tmp_path)
    assert status == 1 and 'data.chats.response: no row has the field "answered"' in said
    assert "What was made is kept" in said
    (kept,) = (own_cache / "rehearsals").iterdir()
    monkeypatch.delenv("HARNESS_MIRROR")
    status, said, _ = rehearse(tmp_path, change=lambda text: text.replace('"lm_head"', '"nothing*"'))
    assert status == 1 and said.count("problem:") == 1 and " 1 problem, 1 part not" in said and "nothing*" in said
    assert "not rehearsed: gate: the run did not finish" in said
    (other,) = (own_cache / "rehearsals").iterdir()
    assert other != kept, "what the one before had kept of the suite is gone"


def test_what_the_run_refuses_at_once_is_a_problem_and_the_rest_is_rehearsed(tmp_path, monkeypatch):
    rehearsed = []
    monkeypatch.setattr("harness.run.run_loaded", lambda suite, *given, **named: rehearsed.append(suite))
    unpinned = 'revision = "0123456789abcdef0123456789abcdef01234567"\n'
    own = f'[data.own]\nsource = "jsonl"\npath = "{tmp_path}/none.jsonl"\nprompt = "a"\nresponse = "b"\nseq_len = 512\n'
    wrong = ((unpinned, ""), ('method = "qad"', 'method = "qad"\ndata = "own"'))
    status, said, _ = rehearse(tmp_path, own, change=lambda text: [text := text.replace(*each) for each in wrong][-1])
    assert status == 1 and len(rehearsed) == 1, said
    assert "problem: model.revision" in said and "problem: data.chats.revision: missing" in said
    assert "problem: data.own.path" in said and "there is no such file" in said and " 3 problems" in said
    at = "put someone/chats into the mirror (HARNESS_MIRROR) to check its columns and values"
    assert f"checked less than it could be: data.chats: made rows; {at}" in said
    assert f"checked less than it could be: data.own: made rows; put its rows at {tmp_path}/none.jsonl to check" in said
    assert "task gpqa_diamond: made rows; put Idavidrein/gpqa into the mirror" in said
    assert re.search(r"could be: task gpqa_diamond; [^:]*; not counted: the rows of Idavidrein/gpqa are not in", said)
    assert "3 problems, 1 part not rehearsed, 4 checks less than could be (above)" in said


def test_a_gate_is_rehearsed_where_the_run_finished_whatever_else_is_wrong(tmp_path, monkeypatch):
    def finish(suite, results, *given, **named):
        (results / "small" / "one").mkdir(parents=True)
        (results / "small" / "one" / "run.json").write_text("{}")
        return False

    monkeypatch.setattr("harness.run.run_loaded", finish)
    judged = []
    monkeypatch.setattr("harness.rehearse._judged", lambda run, policy, reporter: judged.append(policy) or [])
    unpinned = 'revision = "0123456789abcdef0123456789abcdef01234567"\n'
    status, said, _ = rehearse(tmp_path, change=lambda text: text.replace(unpinned, ""))
    assert status == 1 and len(judged) == 1 and " 2 problems, 0 parts not rehearsed" in said


def test_a_filter_that_no_row_of_the_mirror_passes_is_a_problem(tmp_path, monkeypatch):
    write_chats(tmp_path / "mirror", lambda i: {"asked": f"What is {i}?", "answered": str(i), "kind": "bad"})
    monkeypatch.setenv("HARNESS_MIRROR", str(tmp_path / "mirror"))
    status, said, _ = rehearse(tmp_path)
    assert status == 1 and "data.chats.where.kind: no row of 1 passes the filter" in said


def test_a_model_whose_configuration_is_nowhere_is_an_error_that_says_what_to_do(tmp_path):
    status, said, runs = rehearse(tmp_path, config=None)
    assert status == 2 and "someone/model" in said and "--config" in said and not runs


def test_an_unknown_architecture_is_an_error_that_names_it(tmp_path):
    status, said, runs = rehearse(tmp_path, config=CONFIG | {"model_type": "never_heard_of"})
    assert status == 2 and "never_heard_of" in said and not runs


def test_a_wrong_suite_is_its_ordinary_error(tmp_path):
    status, said, _ = rehearse(tmp_path, change=lambda text: text.replace("batch_size = 64", "batchsize = 64"))
    assert status == 2 and "training.batchsize: unknown key; did you mean batch_size" in said


def test_an_interrupted_rehearsal_says_that_the_next_starts_anew(tmp_path, monkeypatch):
    def stop(*given, **named):
        raise KeyboardInterrupt

    monkeypatch.setattr("harness.run.run_loaded", stop)
    status, said, _ = rehearse(tmp_path)
    assert status == 130 and "interrupted; nothing of a rehearsal is kept, the same command starts anew" in said


def test_no_bars_of_other_libraries_are_drawn_between_the_lines():
    code = """
import contextlib
from harness.cli import app
with contextlib.suppress(SystemExit):
    app(["rehearse", "nowhere.toml"])
from tqdm import tqdm
assert tqdm(range(2)).disable
"""
    environment = {key: value for key, value in os.environ.items() if key != "TQDM_DISABLE"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, capture_output=True, timeout=120)
