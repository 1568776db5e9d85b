"""Responses as they finish: one line each, flushed. What makes an interrupted evaluation resume.

    <results>/journals/<weights>/<task>/<protocol>.jsonl

The first line is the protocol: weights, task and version, engine with arguments, kernels, package versions, device and
numerics version. A response is identified by its request hash, repeat, seed and the batch that it was planned in; the scorer
is no part of it, so a better one finds the old responses. A torn last line is dropped and asked again.
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

from harness.engines import Answer, Likelihood, Request, batch_digest
from harness.errors import StoreError
from harness.store import disk_errors, make_folder

SCHEMA = 1


class Journal:
    """One journal file, held for writing by one process at a time."""

    def __init__(self, folder: Path, protocol: dict[str, Any]) -> None:
        self.protocol = protocol
        identity = hashlib.sha256(json.dumps(protocol, sort_keys=True).encode()).hexdigest()[:16]
        self.path = folder / str(protocol["weights"])[:16] / str(protocol["task"]) / f"{identity}.jsonl"
        self._answers: dict[tuple[str, str, int], Answer | Likelihood] = {}

    def __enter__(self) -> Self:
        with disk_errors(f"the journal {self.path}"):
            make_folder(self.path.parent, "the journals")
            self._file = self.path.open("a+b")
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._file.close()
                raise StoreError(f"{self.path}: another run is writing this journal; wait for it, or stop it") from None
            self._read()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()

    def find(self, batch: Sequence[Request]) -> list[Answer | Likelihood] | None:
        """The answers of a planned batch, or None unless all of them are here."""
        digest = batch_digest(batch)
        found = [self._answers.get((digest, request.hash, request.repeat)) for request in batch]
        return None if any(answer is None for answer in found) else [answer for answer in found if answer is not None]

    def append(self, batch: Sequence[Request], answers: Sequence[Answer | Likelihood]) -> None:
        """Write the answers of a batch and flush them to the operating system."""
        digest = batch_digest(batch)
        lines = []
        for request, answer in zip(batch, answers, strict=True):
            row = {"batch": digest, "request": request.hash, "repeat": request.repeat, "seed": request.seed, **asdict(answer)}
            lines.append(json.dumps(row, allow_nan=False) + "\n")
            self._answers[digest, request.hash, request.repeat] = answer
        with disk_errors(f"the journal {self.path}"):
            self._file.write("".join(lines).encode())
            self._file.flush()

    def _read(self) -> None:
        self._file.seek(0)
        whole = self._file.read()
        kept = whole[: whole.rfind(b"\n") + 1]
        if len(kept) < len(whole):
            self._file.truncate(len(kept))
        lines = kept.splitlines()
        if not lines:
            header = {"schema": SCHEMA, "protocol": self.protocol}
            self._file.write(json.dumps(header, sort_keys=True).encode() + b"\n")
            self._file.flush()
            return
        try:
            header, *rows = [json.loads(line) for line in lines]
            if header["schema"] != SCHEMA:
                raise StoreError(
                    f"{self.path}: written with schema {header['schema']}, this version reads {SCHEMA}; move it away to ask again"
                )
            for row in rows:
                answer = _answer(row)
                self._answers[row["batch"], row["request"], row["repeat"]] = answer
        except (ValueError, KeyError, TypeError) as error:
            raise StoreError(
                f"{self.path}: a line is damaged ({error}); move the file away to ask its questions again"
            ) from error


def _answer(row: dict[str, Any]) -> Answer | Likelihood:
    if "logprob" in row:
        return Likelihood(row["logprob"], row["is_greedy"], row["seconds"])
    return Answer(row["text"], tuple(row["token_ids"]), row["finish_reason"], row["seconds"])
