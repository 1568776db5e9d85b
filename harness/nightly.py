"""A night: every suite is run as far as it changed, judged, and compared with what was accepted; then the leaderboard is built again.

    <results>/nightly.jsonl       append-only: a line a suite and night
    <results>/nightly/logs/       what each run printed
    <results>/nightly/latest/     of the last night: summary.md, and <suite>.xml, the verdicts as JUnit
    <results>/nightly.lock        held while a night is under way

A suite is run by the ordinary command in a process of its own: what breaks it, or is left in memory or on a GPU, is none of the others'
business. Judging and comparing read the run folders alone and load no torch.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from harness.accepted import last_accepted, read_releases, untrusted, withdrawn_reason
from harness.append_only import open_log, read_log
from harness.drift import drift
from harness.errors import EngineError, HarnessError, StoreError, SuiteError
from harness.evidence import RunEvidence, open_run_evidence
from harness.gate_checks import quantized
from harness.policy import load_policy, resolve_policy
from harness.records import is_complete, open_results, read_json
from harness.reporting import EXIT_ERROR, EXIT_GAPS, EXIT_INCONCLUSIVE, EXIT_INTERRUPTED, EXIT_PROBLEMS, stopped_by_sigterm
from harness.several_gpus import on_one_gpu
from harness.store import disk_errors, make_folder, write_text
from harness.suite import load_suite
from qad.errors import QadError

HISTORY = "nightly.jsonl"
_NEEDS = ("when", "suite", "run", "status", "verdicts")
WORST_FIRST = (EXIT_ERROR, EXIT_PROBLEMS, EXIT_GAPS, EXIT_INCONCLUSIVE, 0)
_STATUS = {"GO": 0, "NO-GO": EXIT_PROBLEMS, "INCONCLUSIVE": EXIT_INCONCLUSIVE}
_SHOWN = 3
"""Reasons of a verdict that are told; all are in verdict.md."""
Say = Callable[[str], None]


@dataclass(frozen=True)
class Night:
    """What holds for all suites of a night. lock: the held lock file, which runs inherit."""

    results: Path
    policy: Path | None
    say: Say
    when: str
    lock: IO[str]

    @property
    def latest(self) -> Path:
        return self.results / "nightly" / "latest"


@dataclass
class Told:
    """What there is to say of one suite, as it comes; a line of the history, in the end."""

    file: Path
    suite: str | None = None
    run: Path | None = None
    is_new: bool = False
    has_gaps: bool = False
    verdicts: dict[str, str] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    withdrawn: str | None = None
    accepted: str | None = None
    drift: dict[str, Any] | None = None
    error: str | None = None
    is_interrupted: bool = False
    lost_gate: bool = False
    seconds: float = 0.0

    @property
    def status(self) -> int:
        if self.is_interrupted:
            return EXIT_INTERRUPTED
        found = [EXIT_ERROR] if self.error else []
        found += [EXIT_GAPS] if self.has_gaps else []
        found += [EXIT_INCONCLUSIVE] if self.withdrawn or self.lost_gate else []
        return worst([*found, *(_STATUS[verdict] for verdict in self.verdicts.values())])

    def headline(self) -> str:
        name = self.suite or str(self.file)
        if self.error or self.is_interrupted:
            return f"{name}: {'failed, see the end' if self.error else 'interrupted'}, after {_duration(self.seconds)}"
        said = next((verdict for verdict in ("NO-GO", "INCONCLUSIVE", "GO") if verdict in self.verdicts.values()), "not judged")
        run = self.run.name if self.run else "none"
        return f"{name}: {said}; run {run} ({f'new, {_duration(self.seconds)}' if self.is_new else 'nothing changed'})"

    def as_record(self, when: str) -> dict[str, Any]:
        return {
            "when": when,
            "file": str(self.file),
            "suite": self.suite,
            "run": self.run.name if self.run else None,
            "is_new": self.is_new,
            "has_gaps": self.has_gaps,
            "status": self.status,
            "verdicts": self.verdicts,
            "withdrawn": self.withdrawn,
            "accepted": self.accepted,
            "drift": self.drift,
            "error": self.error,
            "seconds": round(self.seconds, 1),
        }


def nightly(suites: Sequence[Path], *, results: Path, policy: Path | None, out: Path | None, say: Say) -> int:
    """Take every suite through its night; returns the worst exit status, in the order of WORST_FIRST.

    A suite that fails does not stop the others. Raises, before anything is run: StoreError for a results folder that is none, a night that
    is under way there, a log that cannot be read; SuiteError for a policy with mistakes; EngineError under torchrun. KeyboardInterrupt on Ctrl-C and SIGTERM, when the run
    that was under way has ended; the history holds what was done.
    """
    said: list[str] = []

    def tell(line: str) -> None:
        said.append(line)
        say(line)

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise EngineError(
            "nightly is one process, and starts its runs itself; start it without torchrun. A training over several GPUs: run its suite under "
            "torchrun first, the night finds it stored (docs/nightly.md)"
        )
    open_results(results)
    with _alone(results) as lock, stopped_by_sigterm():
        read_releases(results)
        read_log(results / HISTORY, needs=_NEEDS)
        if policy is not None:
            load_policy(policy)
        night = Night(results, policy, tell, datetime.now(UTC).isoformat(timespec="seconds"), lock)
        with disk_errors(f"the folder {night.latest}"):
            shutil.rmtree(night.latest, ignore_errors=True)
            night.latest.mkdir(parents=True)
        for note in filter(None, map(on_one_gpu, suites)):
            tell(note)
        told = _each(suites, night)
        failed = [f"{each.suite or each.file}: {each.error}" for each in told if each.error]
        site, problem = _site(results, out or results / "site")
        failed += [problem] if problem else []
        status = EXIT_ERROR if failed else worst(each.status for each in told)
        for line in (*site, *(f"error: {line}" for line in failed)):
            tell(line)
        with disk_errors(f"the folder {night.latest}"):
            write_text(night.latest / "summary.md", _summary(night.when, said, told))
    return status


def worst(statuses: Iterable[int]) -> int:
    """The one that comes first in WORST_FIRST; 0 of none."""
    return min(statuses, key=WORST_FIRST.index, default=0)


def _each(suites: Sequence[Path], night: Night) -> list[Told]:
    told: list[Told] = []
    for file in suites:
        each = Told(file)
        told.append(each)
        began = time.monotonic()
        try:
            _take(each, night, {other.suite for other in told[:-1]})
        except (HarnessError, QadError) as error:
            each.error = str(error)
        except Exception:  # a bug met in one suite is told with its traceback when the others are done
            each.error = traceback.format_exc().rstrip()
        except KeyboardInterrupt:
            each.is_interrupted = True
            raise
        finally:
            each.seconds = time.monotonic() - began
            with open_log(night.results / HISTORY, needs=_NEEDS) as (_, append):
                append(each.as_record(night.when))
            for line in (each.headline(), *(f"  {line}" for line in each.lines)):
                night.say(line)
    return told


def _take(told: Told, night: Night, before: set[str | None]) -> None:
    """One suite: run, judge, compare."""
    suite = load_suite(told.file).name
    if suite in before:
        raise SuiteError(f"{told.file}: another suite of this night is named {suite!r}, too; rename one, or give one of them")
    told.suite = suite
    complete = {path.parent.name for path in (night.results / suite).glob("*/run.json") if _is_done(path.parent)}
    told.run, told.has_gaps = _run(told, night)
    told.is_new = told.run.name not in complete
    run = open_run_evidence(told.run)
    told.withdrawn = withdrawn_reason(told.run, run.about)
    if told.withdrawn is not None:
        told.lines.append(f"the run was invalidated ({told.withdrawn}); to measure anew, change the suite or delete its stages")
    for gap in run.about.get("gaps") or ():
        told.lines.append(
            f"{gap['variant']} {gap['task']}: {gap['n_missing']:,} responses are missing; the next night asks for them again"
        )
    _judge(told, run, night)
    _compare(told, run, night)


def _is_done(run: Path) -> bool:
    with contextlib.suppress(StoreError):
        return is_complete(run)
    return False


def command(suite: Path, results: Path) -> list[str]:
    """What runs a suite."""
    return [sys.executable, "-m", "harness", "run", str(suite), "--results", str(results)]


def _run(told: Told, night: Night) -> tuple[Path, bool]:
    """Run the suite; returns its run folder, and whether responses are missing. StoreError that quotes what went wrong."""
    folder = night.results / "nightly" / "logs"
    make_folder(folder, "the folder of what runs print")
    log = folder / f"{re.sub('[^0-9]', '', night.when)[:14]}-{told.suite}.log"
    with disk_errors(f"the log {log}"), log.open("wb") as file:
        status = _wait_for(command(told.file, night.results), file, night)
    printed = log.read_text(encoding="utf-8", errors="replace")
    if status not in (0, EXIT_GAPS):
        raise StoreError(f"{_failure(status, printed)} (all that it printed: {log})")
    found = [line.removeprefix("Results: ") for line in printed.splitlines() if line.startswith("Results: ")]
    if not found:
        raise StoreError(f"the run named no results folder (all that it printed: {log})")
    return Path(found[-1]), status == EXIT_GAPS


def _wait_for(arguments: list[str], file: IO[bytes], night: Night) -> int:
    """The exit status of a command that prints into `file`. When this process is told to end, so is the command, and it is waited for."""
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        arguments,
        stdin=subprocess.DEVNULL,
        stdout=file,
        stderr=subprocess.STDOUT,
        env=environment,
        start_new_session=True,  # Ctrl-C reaches this process alone, which passes on what lets a training write a checkpoint
        pass_fds=[night.lock.fileno()],  # while the run lives, so does the lock
    )
    try:
        return process.wait()
    except KeyboardInterrupt:
        night.say("interrupted: the run under way is told to end; again: it is killed")
        process.terminate()
        try:
            process.wait()
        except KeyboardInterrupt:
            process.kill()
            process.wait()
        raise


def _failure(status: int, printed: str) -> str:
    """What a failed run said of it: its message, or the last line of a traceback."""
    lines = printed.rstrip().splitlines()
    start = next((i for i in reversed(range(len(lines))) if lines[i].startswith("harness: ")), None)
    if status == EXIT_ERROR and start is not None:
        return "\n  ".join([lines[start].removeprefix("harness: "), *lines[start + 1 :]])
    how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
    return f"the run {how}" + (f": {lines[-1].strip()}" if lines else "")


def _judge(told: Told, run: RunEvidence, night: Night) -> None:
    """The verdict on each candidate, where there is a policy: the one that the policy names, else every quantized variant."""
    from rich.console import Console

    from harness.gating import gate

    names = quantized(run)
    if not names or (night.policy is None and not (run.about.get("resolved") or {}).get("gate")):
        told.lost_gate = _was_judged(str(told.suite), night)
        if told.lost_gate:
            why = "no variant is quantized any more" if not names else "no [gate] any more, and no --policy"
            told.lines.append(f"not judged: {why} (the run before was judged)")
        else:
            why = "no variant is quantized" if not names else "its suite has no [gate], and no --policy is given"
            told.lines.append(f"not judged: {why}")
        return
    policy, _ = resolve_policy(run, night.policy)
    with open(os.devnull, "w", encoding="utf-8") as nowhere:  # its tables are too long for a mail; verdict.md has them
        gate(run.folder, Console(file=nowhere), policy=night.policy, each=policy.candidate is None)
    for each in read_json(run.folder / "verdict.json")["candidates"]:
        told.verdicts[each["candidate"]] = each["verdict"]
        more = len(each["reasons"]) - _SHOWN
        told.lines += [f"{each['candidate']}: {each['verdict']}", *(f"  {reason}" for reason in each["reasons"][:_SHOWN])]
        told.lines += [f"  and {more} more in verdict.md"] if more > 0 else []
    with disk_errors(f"the folder {night.latest}"):
        shutil.copyfile(run.folder / "verdict.xml", night.latest / f"{told.suite}.xml")


def _was_judged(suite: str, night: Night) -> bool:
    """Whether the last night that did not fail in this suite has verdicts on it."""
    lines = read_log(night.results / HISTORY, needs=_NEEDS)
    before = next((line for line in reversed(lines) if line["suite"] == suite and not line.get("error")), None)
    return bool(before and before["verdicts"])


def _compare(told: Told, run: RunEvidence, night: Night) -> None:
    """How each quantized variant stands against BF16, and what moved since the accepted run."""
    suite = str(told.suite)
    for name in quantized(run) if run.baseline is not None else ():
        against = drift(run, run, variants=[(str(run.baseline), name)])
        told.lines.append(f"{name} against {run.baseline}: {against.sentence(names_variants=False)}")
    doubt = untrusted(night.results, suite)
    entry = last_accepted(night.results, suite)
    if doubt is not None:
        told.lines.append(doubt)
    if entry is None:
        return
    told.accepted = entry["run"]
    if entry["run"] == run.folder.name:
        told.lines.append("it is the accepted run")
        return
    older = open_run_evidence(night.results / suite / entry["run"])
    moved = drift(older, run, variants=[(name, name) for name in run.variants if name in older.variants])
    told.drift = moved.as_record()
    told.lines.append(f"since the accepted run {entry['run']}: {moved.sentence()}")


def _site(results: Path, out: Path) -> tuple[list[str], str | None]:
    """Build the leaderboard; returns what to say of it, and what went wrong."""
    from harness.leaderboard.build import build_leaderboard

    try:
        built = build_leaderboard(results, out)
    except HarnessError as error:
        return [], f"the leaderboard was not built: {error}"
    return [f"left out of the leaderboard: {place}: {why}" for place, why in built.left_out] + [f"site: {built.page}"], None


def _summary(when: str, said: Sequence[str], told: Sequence[Told]) -> str:
    """The night in Markdown, for a step summary: what was said, as it is, then the verdicts of its suites."""
    lines = [f"# Nightly of {when}", "", "```", *(line.replace("```", "'''") for line in said), "```"]
    for each in told:
        if each.run is not None and each.verdicts:
            lines += ["", (each.run / "verdict.md").read_text(encoding="utf-8").rstrip()]
    return "\n".join(lines) + "\n"


@contextlib.contextmanager
def _alone(results: Path) -> Iterator[IO[str]]:
    """Hold the lock of a results folder; StoreError if another night does, or a run that it left behind."""
    path = results / "nightly.lock"
    with disk_errors(f"the lock {path}"), path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise StoreError(
                f"{results}: another nightly is under way there, or a run that it started ({file.read().strip() or 'just begun'}); wait for "
                "it, or stop it"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} since {datetime.now(UTC).isoformat(timespec='seconds')}\n")
        file.flush()
        yield file


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min" if minutes else f"{rest} s"
