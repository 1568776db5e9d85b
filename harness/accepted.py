"""The log of accepted and of withdrawn runs. No torch.

    <results>/releases.jsonl        append-only

A line holds when, who, what (kind "accepted" or "invalidated"), the run, why, the digest of the run's records as they were then, and the
revision of the harness; an acceptance also holds the candidate, its verdict and the digest of the policy that it is by.

A run that was withdrawn stays withdrawn. One whose records are not what they were when it was accepted is not trusted: `last_accepted`
does not return it, nor an older one in its place, and `untrusted` names it.
"""

from __future__ import annotations

import getpass
import hashlib
import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from harness.append_only import Entry, open_log, read_log
from harness.errors import StoreError
from harness.provenance import provenance
from harness.records import read_json
from harness.store import sha256

LOG = "releases.jsonl"
_NEEDS = ("kind", "suite", "run", "candidate", "reason", "digest", "when")
_KINDS = ("accepted", "invalidated")
_RECORDS = ("run.json", "tasks.jsonl", "subtasks.jsonl", "diagnostics.jsonl", "diagnostics_sequences.jsonl", "scores/*.jsonl")
"""What verdicts are made of. Tables, verdicts and samples are made from it, or hold text that may have been taken away."""


def accept(run: Path, *, reason: str, candidate: str | None = None, despite_verdict: bool = False) -> list[str]:
    """Log that the run is an accepted release; returns lines to print.

    Its verdict is looked up in the verdict.json beside it; without one the run is accepted as not judged. Raises StoreError for a run that
    is missing, unfinished, a rehearsal or withdrawn, for BF16 itself, for a verdict that is not of these records, and for one other than GO unless
    `despite_verdict`.
    """
    run, reason = _folder(run), _reason(reason)
    about = read_json(run / "run.json")
    _check_place(run, about)
    if about.get("status") != "complete":
        raise StoreError(f"{run}: the run is unfinished; only a complete one is accepted: run its suite again, then accept it")
    if about.get("rehearsal"):
        raise StoreError(f"{run}: a rehearsal is never accepted; accept a run of the real suite")
    judged = _judged(run, about, candidate)
    candidate, verdict = judged["candidate"], judged["verdict"]
    is_against = verdict not in (None, "GO")
    if is_against and not despite_verdict:
        raise StoreError(
            f"{run}: its verdict on {candidate} is {verdict}; --despite-verdict accepts it all the same, and the log says so"
        )
    entry = _entry("accepted", run, reason) | judged | {"is_despite_verdict": is_against}
    with open_log(run.parent.parent / LOG, needs=_NEEDS) as (entries, append):
        _check_kinds(entries, run.parent.parent)
        withdrawn = _withdrawn(entries).get((entry["suite"], entry["run"]))
        if withdrawn is not None:
            raise StoreError(f"{run}: the run was invalidated ({withdrawn}); an invalidated run is never accepted")
        newest = _newest(entries, entry["suite"])
        if newest and all(newest.get(key) == entry[key] for key in ("run", "candidate", "digest", "verdict", "policy")):
            raise StoreError(
                f"{run}: is the last accepted run of {entry['suite']} already, since {newest['when']}: {newest['reason']}"
            )
        append(entry)
    what = f"{entry['suite']}/{entry['run']}" + (f" {candidate}" if candidate else "")
    how = f"verdict {verdict}" if verdict else "not judged: no verdict.json on it beside the run"
    return [f"accepted {what} ({how}); the next runs of {entry['suite']} are compared with it"]


def invalidate(run: Path, *, reason: str) -> list[str]:
    """Log that the run is withdrawn: never ranked, never compared with again; returns lines to print.

    A run whose records are damaged can be withdrawn, too. Raises StoreError for one that is missing or withdrawn already.
    """
    run, reason = _folder(run), _reason(reason)
    try:
        about = read_json(run / "run.json")
    except StoreError:
        about = None
    if about is not None:
        _check_place(run, about)
    entry = _entry("invalidated", run, reason)
    with open_log(run.parent.parent / LOG, needs=_NEEDS) as (entries, append):
        _check_kinds(entries, run.parent.parent)
        withdrawn = _withdrawn(entries).get((entry["suite"], entry["run"]))
        if withdrawn is not None:
            raise StoreError(f"{run}: the run is invalidated already: {withdrawn}")
        append(entry)
        left = _newest([*entries, entry], entry["suite"])
    was_accepted = any((each["kind"], each["suite"], each["run"]) == ("accepted", *_name(run)) for each in entries)
    now = f"; the last accepted run is {left['run']}" if left else f"; {entry['suite']} has no accepted run"
    return [f"invalidated {entry['suite']}/{entry['run']}{now if was_accepted else ''}"]


def last_accepted(results: Path, suite: str) -> Entry | None:
    """The newest acceptance of a run of `suite` that was not withdrawn; None without one, or where its run is not trusted."""
    newest = _newest(read_releases(results), suite)
    return newest if newest and _doubt(results, newest) is None else None


def untrusted(results: Path, suite: str) -> str | None:
    """Why the newest acceptance of a run of `suite` is not trusted, as a sentence; None where it is, or where there is none."""
    newest = _newest(read_releases(results), suite)
    return _doubt(results, newest) if newest else None


def invalidated(results: Path) -> dict[tuple[str, str], str]:
    """The reason of each withdrawn run, by (suite, run)."""
    return _withdrawn(read_releases(results))


def withdrawn_reason(run: Path, about: dict[str, Any]) -> str | None:
    """Why a run folder was withdrawn; None where it was not. about: its run.json.

    It is looked up by the names of its folders and by those in its run.json, in the log beside it and, where it is reached through a link,
    also beside the folder that the link leads to.
    """
    for folder in dict.fromkeys((Path(os.path.realpath(run)), Path(os.path.abspath(run)))):
        log = invalidated(folder.parent.parent)
        for name in (_name(folder), (about.get("suite"), about.get("run"))):
            if name in log:
                return log[name]
    return None


def read_releases(results: Path) -> list[Entry]:
    """All lines of the log, the oldest first; StoreError that names the line for one that is cut short, damaged or not understood."""
    entries = read_log(results / LOG, needs=_NEEDS)
    _check_kinds(entries, results)
    return entries


def read_verdicts(run: Path, about: dict[str, Any]) -> dict[str, Any] | None:
    """What verdict.json beside a run holds; None without one. about: run.json.

    StoreError where it is of another run, older than the records of this one, or not what `harness gate` writes.
    """
    path = run / "verdict.json"
    if not path.is_file():
        return None
    record = read_json(path)
    again = f"judge this run again: harness gate {run}"
    try:
        if (record["suite"], record["run"]) != (about.get("suite"), about.get("run")):
            raise StoreError(f"{path}: is about {record['suite']}/{record['run']}; {again}")
        if record["digest"] != run_digest(run):
            raise StoreError(f"{path}: is older than the records of the run, which were changed since; {again}")
        found = {each["candidate"]: each["verdict"] for each in record["candidates"]}
        policy_digest(record["policy"])
    except (KeyError, TypeError) as error:
        raise StoreError(f"{path}: a record lacks {error}; {again}") from error
    unknown = sorted({str(verdict) for verdict in found.values()} - {"GO", "NO-GO", "INCONCLUSIVE"})
    if unknown:
        raise StoreError(f"{path}: has a verdict {unknown[0]!r}, none of GO, NO-GO, INCONCLUSIVE; {again}")
    return dict(record)


def policy_digest(policy: dict[str, Any]) -> str:
    """sha256 of a policy as it was applied, wherever it came from."""
    applied = {key: value for key, value in policy.items() if key != "source"}
    return hashlib.sha256(json.dumps(applied, sort_keys=True).encode()).hexdigest()


def run_digest(run: Path) -> str:
    """sha256 over names and digests of the records of a run; a record that appears, changes or vanishes changes it."""
    files = sorted(path for pattern in _RECORDS for path in run.glob(pattern))
    named = {str(path.relative_to(run)): sha256(path) for path in files}
    return hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()


def _entry(kind: str, run: Path, reason: str) -> Entry:
    suite, name = _name(run)
    return {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "who": _user(),
        "kind": kind,
        "suite": suite,
        "run": name,
        "candidate": None,
        "reason": reason,
        "digest": run_digest(run),
        "git": provenance()["git"],
    }


def _folder(run: Path) -> Path:
    """The run folder in full; StoreError if it is none."""
    folder = Path(os.path.realpath(run))
    if not (folder / "run.json").is_file():
        raise StoreError(f"{run}: there is no run (no run.json in it); give a run folder, such as results/quickstart/<run id>")
    return folder


def _check_place(run: Path, about: dict[str, Any]) -> None:
    """StoreError unless the run lies where it was made: the log names it by its folders."""
    if (about.get("suite"), about.get("run")) != _name(run):
        raise StoreError(
            f"{run}: its run.json says suite {about.get('suite')}, run {about.get('run')}; the log names a run by its folders "
            "<results>/<suite>/<run id>, so give it where it was made"
        )


def _reason(reason: str) -> str:
    if not reason.strip():
        raise StoreError("--reason: is empty; say why, for whoever reads the log later")
    return reason.strip()


def _name(run: Path) -> tuple[str, str]:
    return run.parent.name, run.name


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container without an entry for its user
        return f"uid {os.getuid()}"


def _judged(run: Path, about: dict[str, Any], candidate: str | None) -> dict[str, str | None]:
    """The candidate, its verdict by verdict.json (the only one judged there, unless one is given) and the digest of the policy behind it.

    The last two are None where it is not judged.
    """
    methods = {variant["name"]: variant["method"] for variant in about["variants"]}
    if candidate is not None and candidate not in methods:
        raise StoreError(f"--candidate {candidate}: {run} has no such variant. Known: {', '.join(sorted(methods))}")
    record = read_verdicts(run, about)
    verdicts = {} if record is None else {each["candidate"]: each["verdict"] for each in record["candidates"]}
    if candidate is None and len(verdicts) > 1:
        raise StoreError(
            f"{run / 'verdict.json'}: judges {', '.join(sorted(verdicts))}; say with --candidate which of them is accepted"
        )
    chosen = candidate if candidate is not None else next(iter(verdicts), None)
    if chosen is not None and methods.get(chosen) == "bf16":
        raise StoreError(
            f"{run}: {chosen} is the BF16 model itself, which is no release; say with --candidate which variant is accepted"
        )
    policy = None if record is None or chosen not in verdicts else policy_digest(record["policy"])
    return {"candidate": chosen, "verdict": verdicts.get(str(chosen)), "policy": policy}


def _check_kinds(entries: list[Entry], results: Path) -> None:
    for number, entry in enumerate(entries, start=1):
        for key in ("suite", "run", "reason", "digest"):
            if not isinstance(entry[key], str):
                raise StoreError(f"{results / LOG}: line {number} is damaged ({key} is no text); restore the file from a copy")
        if entry["kind"] not in _KINDS:
            raise StoreError(f"{results / LOG}: line {number} has kind {entry['kind']!r}. Known: {', '.join(_KINDS)}")


def _withdrawn(entries: list[Entry]) -> dict[tuple[str, str], str]:
    return {(each["suite"], each["run"]): each["reason"] for each in entries if each["kind"] == "invalidated"}


def _newest(entries: list[Entry], suite: str) -> Entry | None:
    withdrawn = _withdrawn(entries)
    standing = (
        each
        for each in reversed(entries)
        if each["kind"] == "accepted" and each["suite"] == suite and (suite, each["run"]) not in withdrawn
    )
    return next(standing, None)


def _doubt(results: Path, entry: Entry) -> str | None:
    run = results / entry["suite"] / entry["run"]
    if not (run / "run.json").is_file():
        return f"the accepted run {entry['run']} is not in {results} any more, so nothing is compared with it"
    if run_digest(run) != entry["digest"]:
        return (
            f"the accepted run {entry['run']} is not trusted: its records were changed after it was accepted on {entry['when']}; "
            "accept it again, or invalidate it"
        )
    return None
