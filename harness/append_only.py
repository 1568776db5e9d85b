"""Logs that are appended to and never changed: JSON, a line each, locked while they are read or written, on the disk before anyone is told.

A line that is cut short or damaged is an error that names it, and nothing is appended after it. (A journal of responses drops a torn line
and asks again; what a person or a night decided cannot be asked again.)
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from harness.errors import StoreError
from harness.store import disk_errors

SCHEMA = 1
Entry = dict[str, Any]


def read_log(path: Path, *, needs: tuple[str, ...]) -> list[Entry]:
    """The lines of a log, the oldest first, each with the keys that it `needs`; none where there is no log.

    Raises StoreError that names the line for one that is cut short, damaged, or of another schema.
    """
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH)  # no line is read while it is written
            return _parse(file.read(), path, needs)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise StoreError(f"{path}: cannot be read ({error.strerror})") from error


@contextlib.contextmanager
def open_log(path: Path, *, needs: tuple[str, ...]) -> Iterator[tuple[list[Entry], Callable[[Entry], None]]]:
    """The lines of a log, and what appends one; no other process reads or writes the log meanwhile. StoreError as for `read_log`."""
    with disk_errors(f"the log {path}"), path.open("a+b", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        whole = file.readall()

        def append(entry: Entry) -> None:
            data = json.dumps({"schema": SCHEMA, **entry}, sort_keys=True, allow_nan=False).encode() + b"\n"
            try:
                while data:
                    data = data[file.write(data) :]
                os.fsync(file.fileno())
            except BaseException:
                file.truncate(len(whole))  # no half line stays
                raise

        yield _parse(whole, path, needs), append
    if not whole:
        _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """So that a new file in it outlives a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _parse(whole: bytes, path: Path, needs: tuple[str, ...]) -> list[Entry]:
    entries = []
    *lines, rest = whole.split(b"\n")
    if rest:
        raise StoreError(
            f"{path}: line {len(lines) + 1} is cut short: its process ended while it wrote, and never said that it was done. Remove what "
            "is there of it, then give the command again"
        )
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
            if entry["schema"] != SCHEMA:
                raise StoreError(
                    f"{path}: line {number} has schema {entry['schema']}, this version reads {SCHEMA}; use the version that wrote it"
                )
            for key in needs:
                entry[key]
        except (ValueError, KeyError, TypeError) as error:
            raise StoreError(f"{path}: line {number} is damaged ({error}); restore the file from a copy") from error
        entries.append(entry)
    return entries
