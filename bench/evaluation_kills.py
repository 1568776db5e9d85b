"""Kill -9 at random moments of a sampled evaluation (4 repeats), then go on: nothing is lost, nothing is asked twice.

    python bench/evaluation_kills.py [--engine scripted|hf|vllm] [--kills 25] [--seed 0] [--folder DIR]

scripted is an engine whose answer depends on prompt and seed alone; hf answers in planned batches, which are redone whole.
With both the table and all samples must be those of a run that was left alone. An answer of vllm depends on what it was
computed beside, so there it is the journal that counts. With all three: every whole line that a killed run had written stays,
byte for byte, and no request is asked that had its answer in the journal.

An evaluation is killed up to 5 times, each time when the dice say how many responses are journaled and a moment more; where
it was faster than the dice, another one begins. The command is the product's, in a process forked for each run from one that
has everything imported.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
KILLS_PER_EVALUATION = 5
LONGEST_MOMENT_S = 0.05
N_QUESTIONS, N_REPEATS = 24, 4
ENGINES = {
    "scripted": 'kind = "hf"',  # what answers is put in its place
    "hf": 'kind = "hf"\nargs = { batch_size = 5 }',
    "vllm": 'kind = "vllm"\nargs = { max_model_len = 1024, max_num_seqs = 8, kv_cache_memory_gib = 0.25 }',
}
SUITE = """
schema = 1
name = "killed"

[model]
path = "{model}"

[[variant]]
name = "bf16"
method = "bf16"

[[task]]
name = "mini_math"
limit = {questions}
repeats = {repeats}
sampling = {{ temperature = 1.0 }}

[engine]
{engine}
"""
_NOT_COMPARED = ("seconds", "run", "tokens_per_second")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=sorted(ENGINES), action="append", help="may be repeated; all three where left out")
    parser.add_argument("--kills", type=int, default=25, help="of each engine")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where to work; a temporary folder where left out")
    given = parser.parse_args()
    runs, is_good = Runs(), True
    for engine in given.engine or sorted(ENGINES):
        with tempfile.TemporaryDirectory() as temporary:
            found = campaign(runs, (given.folder or Path(temporary)) / engine, engine, kills=given.kills, seed=given.seed)
        print(f"{engine}: {found}")
        is_good &= found.holds
    runs.close()
    sys.exit(0 if is_good else 1)


@dataclass
class Found:
    """What came of a campaign. The counts of what went wrong are 0 where all is well."""

    engine: str
    evaluations: int = 0
    kills: int = 0
    equal: int = 0
    lines_lost: int = 0
    asked_again: int = 0
    responses_missing: int = 0

    @property
    def holds(self) -> bool:
        is_equal = self.engine == "vllm" or self.equal == self.evaluations
        return is_equal and not (self.lines_lost or self.asked_again or self.responses_missing)

    def __str__(self) -> str:
        return (
            f"{self.kills} kills in {self.evaluations} evaluations; {self.equal} of them ended with the table and samples of the run "
            f"that was left alone; journaled lines lost or changed: {self.lines_lost}; requests asked again that were journaled: "
            f"{self.asked_again}; responses missing at the end: {self.responses_missing}"
        )


def campaign(runs: Runs, folder: Path, engine: str, *, kills: int, seed: int) -> Found:
    """Kill evaluations of `engine` `kills` times in all, and hold each one's end against a run that was left alone."""
    suite = _suite(folder, engine)
    dice, found = random.Random(seed), Found(engine)
    alone = Evaluation(engine, suite, folder / "alone")
    _finish(runs, alone)
    expected = alone.outcome()
    while found.kills < kills:
        found.evaluations += 1
        work = Evaluation(engine, suite, folder / f"evaluation-{found.evaluations}")
        wanted = min(KILLS_PER_EVALUATION, kills - found.kills)
        moments = sorted(dice.randrange(N_QUESTIONS * N_REPEATS + 1) for _ in range(wanted))
        for n_responses in moments:
            found.kills += _kill(runs, work, n_responses, dice.random() * LONGEST_MOMENT_S, found)
        kept = work.journal()
        _finish(runs, work)
        _hold(work, kept, found)
        is_equal = work.outcome() == expected
        found.equal += is_equal
        found.responses_missing += N_QUESTIONS * N_REPEATS - len(work.answered(work.journal()))
        print(
            f"{engine}: killed {len(work.at_kills)} times, with {', '.join(map(str, work.at_kills))} responses journaled: "
            f"{'the same' if is_equal else 'another'} table and samples",
            flush=True,
        )
        shutil.rmtree(work.root)
    return found


class Evaluation:
    """One evaluation: its folder, in which runs go on from each other."""

    def __init__(self, engine: str, suite: Path, root: Path) -> None:
        self.engine, self.suite, self.root = engine, suite, root
        root.mkdir(parents=True)
        self.at_kills: list[int] = []
        self.n_asked_before = 0

    def journal(self) -> bytes:
        """The whole lines of the one journal."""
        files = list((self.root / "results" / "journals").rglob("*.jsonl"))
        if not files:
            return b""
        (file,) = files
        content = file.read_bytes()
        return content[: content.rfind(b"\n") + 1]

    def answered(self, journal: bytes) -> set[str]:
        """Identities of the requests that have a response in it."""
        rows = [json.loads(line) for line in journal.splitlines()[1:]]
        return {row["id"] for row in rows if "failure" not in row}

    def asked(self) -> list[str]:
        """Identities of all requests that reached the engine, in order."""
        path = self.root / "asked"
        return path.read_text().split() if path.is_file() else []

    def outcome(self) -> dict[str, Any]:
        """Table and samples, without times."""
        from harness.records import read_samples

        (run,) = (path.parent for path in (self.root / "results" / "killed").glob("*/run.json"))
        samples = {path.name: read_samples(path) or [] for path in sorted((run / "samples").iterdir())}
        rows = [json.loads(line) for line in (run / "tasks.jsonl").read_text().splitlines()]
        return {
            "table": [_timeless(row) for row in csv.DictReader((run / "table.csv").read_text().splitlines())],
            "tasks": [_timeless(row) for row in rows],
            "samples": {name: [_timeless(row) for row in found] for name, found in samples.items()},
        }


class Runs:
    """Starts the command in processes that are forked from one with everything imported, and tells how they ended."""

    def __init__(self) -> None:
        paths = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
        settings = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
        self._server = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), "serve"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | settings,
        )
        assert self._server.stdin is not None and self._server.stdout is not None
        self._asks, self._tells = self._server.stdin, self._server.stdout

    def start(self, work: Evaluation) -> int:
        """The process id of a new run of the evaluation."""
        asked = {"engine": work.engine, "suite": str(work.suite), "root": str(work.root)}
        print(json.dumps(asked), file=self._asks, flush=True)
        return int(self._tells.readline())

    def wait(self, *, kill: bool = False) -> int:
        """How the run that was started last has ended, or ends when it is killed: its status, or minus the signal."""
        print("kill" if kill else "wait", file=self._asks, flush=True)
        return int(self._tells.readline())

    def close(self) -> None:
        self._asks.close()
        self._server.wait()


def _finish(runs: Runs, work: Evaluation) -> None:
    runs.start(work)
    if status := runs.wait():
        raise SystemExit(f"the command ended with status {status}:\n{(work.root / 'log').read_text()[-3000:]}")


def _kill(runs: Runs, work: Evaluation, n_responses: int, moment_s: float, found: Found) -> bool:
    """Run until so many responses are journaled and a moment more, then kill; False where the run ended by itself before."""
    kept, n_asked = work.journal(), len(work.asked())
    pid = runs.start(work)
    while _is_running(pid) and not (len(work.asked()) > n_asked and len(work.journal().splitlines()) > n_responses):
        time.sleep(0.002)
    time.sleep(moment_s)
    is_killed = runs.wait(kill=True) == -signal.SIGKILL
    _hold(work, kept, found)
    if is_killed:
        work.at_kills.append(max(0, len(work.journal().splitlines()) - 1))
    return is_killed


def _hold(work: Evaluation, kept: bytes, found: Found) -> None:
    """Count what was journaled before the last run and is not any more, and what that run asked although it was journaled."""
    now, before = work.journal().splitlines(), kept.splitlines()
    found.lines_lost += sum(line != (now[i] if i < len(now) else None) for i, line in enumerate(before))
    asked = work.asked()
    found.asked_again += len(work.answered(kept) & set(asked[work.n_asked_before :]))
    work.n_asked_before = len(asked)


def _is_running(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


def _timeless(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in _NOT_COMPARED}


def _suite(folder: Path, engine: str) -> Path:
    sys.path.insert(0, str(REPOSITORY / "tests"))
    from conftest import build_tiny_model

    folder.mkdir(parents=True, exist_ok=True)
    model = build_tiny_model(folder / "model", hidden=128)  # vLLM takes no smaller heads on a CPU
    suite = folder / "killed.toml"
    suite.write_text(SUITE.format(model=model, engine=ENGINES[engine], questions=N_QUESTIONS, repeats=N_REPEATS))
    return suite


def serve() -> None:
    """The process from which runs are forked: a line of JSON in for each, its id out; "wait" or "kill" in, its status out."""
    import harness.cli
    import harness.run
    import harness.stages  # noqa: F401 (imported once for all runs)

    while line := sys.stdin.readline():
        asked = json.loads(line)
        pid = os.fork()
        if pid == 0:
            os.close(0)
            _run(asked["engine"], Path(asked["suite"]), Path(asked["root"]))
        print(pid, flush=True)
        if sys.stdin.readline() == "kill\n":
            os.kill(pid, signal.SIGKILL)  # not waited for yet, so the id is still its own
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


def _run(engine: str, suite: Path, root: Path) -> None:
    """The command in this process, its engine watched; never returns."""
    from harness import cli
    from harness.engines import serving

    os.setsid()
    os.environ["HARNESS_CACHE"] = str(root / "cache")
    log = os.open(root / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    make = serving.Serving.engine

    def watched(serving: Any, key: str, folder: Path, load: Any, **more: Any) -> Any:
        return _watched(_dice(folder) if engine == "scripted" else make(serving, key, folder, load, **more), root / "asked")

    serving.Serving.engine = watched  # type: ignore[method-assign]
    sys.argv = ["harness", "run", str(suite), "--results", str(root / "results")]
    status: Any = 1
    try:
        cli.main()
    except SystemExit as ended:
        status = ended.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status if isinstance(status, int) else 1)


def _watched(engine: Any, path: Path) -> Any:
    """The engine, which notes what it is asked before it answers."""
    from harness.engines import identity

    answer = engine.answer

    def noting(batch: Any) -> Any:
        with path.open("a") as file:
            file.write("".join(identity(request) + "\n" for request in batch))
        return answer(batch)

    engine.answer = noting
    return engine


def _dice(folder: Path) -> Any:
    """An engine whose answer to a request depends on its prompt and seed alone."""
    from harness import loading
    from harness.engines import Answer
    from harness.engines.scripted import ScriptedEngine

    class Dice(ScriptedEngine):
        def _answer(self, request: Any) -> Any:
            time.sleep(0.01)
            dice = random.Random(f"{request.token_ids} {request.seed}")
            text = dice.choice(["It is \\boxed{%d}.", "%d", "Let me think about %d, and on"]) % dice.randrange(4, 41)
            token_ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            return Answer(text, tuple(token_ids), "length" if text.endswith("on") else "stop", 0.01)

    return Dice(loading.load_tokenizer(folder), str, answers_depend_on_batch=False)


if __name__ == "__main__":
    serve() if sys.argv[1:] == ["serve"] else main()
