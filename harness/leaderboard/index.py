"""What is remembered between two builds: the summaries of runs that have not changed since, so that one more run costs one run.

The index is no part of the site: without it everything is read again, and the site has the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.store import write_text

NAME = ".index.json"


@dataclass
class Index:
    """By place of a run: {signature, page_bytes, summary}; protocols by digest, shared by all."""

    runs: dict[str, dict[str, Any]] = field(default_factory=dict)
    protocols: dict[str, dict[str, Any]] = field(default_factory=dict)


def read_index(site: Path) -> Index:
    """The index of a site; an empty one if there is none, or if it is damaged or of other code."""
    try:
        record = json.loads((site / NAME).read_text(encoding="utf-8"))
        if record["code"] == _code():
            return Index(record["runs"], record["protocols"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return Index()


def write_index(site: Path, runs: Mapping[str, dict[str, Any]], protocols: dict[str, dict[str, Any]]) -> None:
    """Remember these runs, and of the protocols those that they name."""
    used = {
        digest for run in runs.values() for variant in run["summary"]["variants"] for digest in variant["protocol"].values()
    }
    record = {"code": _code(), "runs": runs, "protocols": {digest: protocols[digest] for digest in sorted(used)}}
    write_text(site / NAME, json.dumps(record, separators=(",", ":")))


def _code() -> str:
    """A digest of the code that makes summaries and pages."""
    found = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        found.update(path.read_bytes())
    return found.hexdigest()
