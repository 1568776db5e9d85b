"""Responses as they finish: one line each, flushed. What makes an interrupted evaluation resume.

    <results>/journals/<weights>/<task>/<protocol>.jsonl

The first line is the protocol: weights, task and version, engine with arguments, kernels, package versions, device and
numerics version. A response is identified by its request hash, complete sampling parameters, repeat and seed, and, where an
engine's answers depend on it, the batch that it was planned in. The scorer is no part of it, so a better one finds the old
responses. A torn last line is dropped and asked again.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from harness.engines import Answer, Failure, Likelihood, Outcome, Request, batch_digest, identity
from harness.errors import StoreError
from harness.store import disk_errors, make_folder

SCHEMA = 2


class Journal:
    """One journal file, held for writing by one process at a time."""

    def __init__(self, folder: Path, protocol: dict[str, Any]) -> None:
        self.protocol = protocol
        name = hashlib.sha256(json.dumps(protocol, sort_keys=True).encode()).hexdigest()[:16]
        self.path = folder / str(protocol["weights"])[:16] / str(protocol["task"]) / f"{name}.jsonl"
        self._answers: dict[tuple[str | None, str], Answer | Likelihood] = {}
        self.n_written = self.n_tokens_written = 0  # responses of this process, and the tokens that they generated

    def __enter__(self) -> Self:
        with disk_errors(f"the journal {self.path}"):
            make_folder(self.path.parent, "the journals")
            self._file = self.path.open("a+b", buffering=0)  # what a full disk refused is not tried again when it closes
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._file.close()
                raise StoreError(f"{self.path}: another run is writing this journal; wait for it, or stop it") from None
            self._read()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()

    def find(self, request: Request) -> Answer | Likelihood | None:
        """The answer to a request that stands for itself."""
        return self._answers.get((None, identity(request)))

    def find_batch(self, batch: Sequence[Request]) -> list[Answer | Likelihood] | None:
        """The answers of a planned batch, or None unless all of them are here."""
        digest = batch_digest(batch)
        found = [self._answers.get((digest, identity(request))) for request in batch]
        return None if any(answer is None for answer in found) else [answer for answer in found if answer is not None]

    def append(self, request: Request, outcome: Outcome) -> None:
        """Write what came of a request and flush it to the operating system. A failure is kept for people alone."""
        self._write([(None, request, outcome)])

    def append_batch(self, batch: Sequence[Request], outcomes: Sequence[Outcome]) -> None:
        """Write what came of a whole batch and flush it."""
        digest = batch_digest(batch)
        self._write([(digest, request, outcome) for request, outcome in zip(batch, outcomes, strict=True)])

    def _write(self, entries: list[tuple[str | None, Request, Outcome]]) -> None:
        lines = []
        for batch, request, outcome in entries:
            asked = {"id": identity(request), "request": request.hash, "repeat": request.repeat, "seed": request.seed}
            row = {
                "batch": batch,
                **asked,
                **({"failure": outcome.reason} if isinstance(outcome, Failure) else asdict(outcome)),
            }
            lines.append(json.dumps(row, allow_nan=False) + "\n")
            if not isinstance(outcome, Failure):
                self._answers[batch, identity(request)] = outcome
                self.n_written += 1
                self.n_tokens_written += len(outcome.token_ids) if isinstance(outcome, Answer) else 0
        with disk_errors(f"the journal {self.path}"):
            self._put("".join(lines).encode())

    def _put(self, data: bytes) -> None:
        """All of it; the operating system may take a part at a time, and refuses the next where the disk is full."""
        while data:
            data = data[self._file.write(data) :]

    def _read(self) -> None:
        self._file.seek(0)
        whole = self._file.read()
        kept = whole[: whole.rfind(b"\n") + 1]
        if len(kept) < len(whole):
            self._file.truncate(len(kept))
        lines = kept.splitlines()
        if not lines:
            header = {"schema": SCHEMA, "protocol": self.protocol}
            self._put(json.dumps(header, sort_keys=True).encode() + b"\n")
            return
        try:
            header, *rows = [json.loads(line) for line in lines]
            if header["schema"] != SCHEMA:
                raise StoreError(
                    f"{self.path}: written with schema {header['schema']}, this version reads {SCHEMA}; move it away to ask again"
                )
            for row in rows:
                if "failure" not in row:
                    self._answers[row["batch"], row["id"]] = _answer(row)
        except (ValueError, KeyError, TypeError) as error:
            raise StoreError(
                f"{self.path}: a line is damaged ({error}); move the file away to ask its questions again"
            ) from error


def _answer(row: dict[str, Any]) -> Answer | Likelihood:
    if "logprob" in row:
        return Likelihood(row["logprob"], row["is_greedy"], row["seconds"])
    return Answer(row["text"], tuple(row["token_ids"]), row["finish_reason"], row["seconds"])
