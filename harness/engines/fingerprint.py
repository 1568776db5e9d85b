"""What tells one served model from another: the likeliest first tokens after a few fixed prompts, each sent alone.

At first contact they are read several times; what a model differs from itself sets the tolerance. The record lies beside the
journals, by declared checkpoint and model name, and every later start is held against it. It is evidence, not proof: equal
readings do not show which weights are served, nor by which kernels.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from harness.errors import EngineError, StoreError
from harness.store import disk_errors, make_folder, write_json

SCHEMA = 1
PROMPTS = (
    "The capital of France is",
    "1, 2, 3, 5, 8, 13,",
    "def mean(values):\n    return",
    "Once upon a time, in a house by the sea,",
)
TOP = 20
"""Tokens whose log probabilities are compared; a server may give fewer."""
READINGS = 4
"""How often the prompts are read at first contact, and at most at a later one."""
FACTOR = 3.0
LEAST_TOLERANCE = 0.01
"""Nats, for a server that repeats itself exactly: rounding of another batch is no other model."""

Reading = list[dict[str, float]]
"""By prompt: log probabilities (nats) by token."""


def distance(first: dict[str, float], second: dict[str, float]) -> float:
    """Mean absolute difference of the log probabilities in nats, over the tokens in either.

    A token that only one of them lists counts as the lowest of the other, at which it would just have been listed.
    """
    tokens = first.keys() | second.keys()
    lowest = [min(values.values()) for values in (first, second)]
    return sum(abs(first.get(t, lowest[0]) - second.get(t, lowest[1])) for t in tokens) / len(tokens)


@dataclass(frozen=True)
class Fingerprint:
    """Where the fingerprint of a declared checkpoint under a model name is kept."""

    folder: Path
    declared: str
    model: str

    @property
    def path(self) -> Path:
        identity = hashlib.sha256(json.dumps([self.declared, self.model]).encode()).hexdigest()[:16]
        return self.folder / f"{identity}.json"

    def check(self, reading: Reading, read: Callable[[], Reading], *, where: str, about: dict[str, Any]) -> None:
        """Keep a first `reading` with its tolerance and what is known `about` the server, or hold it against the one kept.

        Args:
            read: gives another reading.
        Raises:
            EngineError: a prompt is answered differently beyond the tolerance.  StoreError: the record cannot be read or kept.
        """
        if self.path.exists():
            self._compare(reading, read, where)
            return
        readings = [reading, *(read() for _ in range(READINGS - 1))]
        spread = max(
            distance(a, b)
            for i, first in enumerate(readings)
            for second in readings[:i]
            for a, b in zip(first, second, strict=True)
        )
        record = {
            "schema": SCHEMA,
            "declared_checkpoint": self.declared,
            "model": self.model,
            "first_contact": datetime.now(UTC).isoformat(timespec="seconds"),
            **about,
            "prompts": PROMPTS,
            "tolerance": max(LEAST_TOLERANCE, FACTOR * spread),
            "reading": readings[0],
        }
        with disk_errors(f"the fingerprint {self.path}"):
            make_folder(self.folder, "the fingerprints of servers")
            write_json(self.path, record)

    def _compare(self, reading: Reading, read: Callable[[], Reading], where: str) -> None:
        record = self._record()
        found: list[list[float]] = []
        for number in range(READINGS):
            reading = read() if number else reading
            found.append([distance(kept, now) for kept, now in zip(record["reading"], reading, strict=True)])
            if max(found[-1]) <= record["tolerance"]:
                return
        nearest = min(found, key=max)
        worst = nearest.index(max(nearest))
        raise EngineError(
            f"{where}: model {self.model} is not what it was at first contact ({record['first_contact']}): after the prompt "
            f"{PROMPTS[worst]!r} the likeliest tokens differ by {nearest[worst]:.3g} nats, {record['tolerance']:.3g} are allowed "
            f"(nearest of {READINGS} readings). Nothing was asked. Serve the declared checkpoint as before, or, if it is meant "
            f"to be another, move {self.path} away and declare it as a variant of its own"
        )

    def _record(self) -> dict[str, Any]:
        try:
            record = json.loads(self.path.read_text())
            if (record["schema"], record["prompts"]) != (SCHEMA, list(PROMPTS)):
                raise ValueError("it is of another version")
            return dict(record)
        except (ValueError, KeyError, TypeError) as error:
            raise StoreError(
                f"{self.path}: not a fingerprint of this version ({error}); move it away for a first contact"
            ) from None
