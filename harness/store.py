"""Finished stages on disk: atomic, content-addressed, verified on read. Nothing ever writes into a finished stage.

<cache>/stages/<key>/stage.json    what it was made of and the digests of its files
<cache>/stages/<key>/files/        the files
<cache>/imported/<key>/            the same, made on another machine and brought here by a person
<cache>/unfinished/<key>/          checkpoints of a training that is not done, written by `qad.resume`
<cache>/digests.json               file digests by path, size and time, so that nothing large is read twice
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.errors import StoreError

SCHEMA = 1
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@dataclass(frozen=True)
class StoredStage:
    """A finished stage: the folder of its files, its own record, and the digest of all its files."""

    folder: Path
    record: dict[str, Any]
    digest: str

    @property
    def is_imported(self) -> bool:
        return self.folder.parent.parent.name == "imported"


def cache_folder() -> Path:
    """HARNESS_CACHE, or the folder for caches of the user."""
    given = os.environ.get("HARNESS_CACHE")
    if given:
        return Path(given).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "qad-harness"


class Store:
    """The stage cache at `root`; made when something is first written."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.adopted: dict[str, str] = {}
        self._digests_file = root / "digests.json"
        self._digests = self._read_digests()

    def find(self, key: str, *, digest: str | None = None) -> StoredStage | None:
        """The finished stage under `key`, with that digest if one is given; None if it is absent, damaged or of another schema version.

        An imported stage that was adopted for `key` comes before an own one, and an own one before an imported one of the same key.
        """
        imported = self.root / "imported"
        for folder in (*((imported / self.adopted[key],) if key in self.adopted else ()), self._folder(key), imported / key):
            found = self.read(folder)
            if found is not None and digest in (None, found.digest):
                return found
        return None

    def adopt(self, key: str, imported_key: str) -> None:
        """Let an imported stage serve as the stage `key`, for as long as this object lives."""
        self.adopted[key] = imported_key

    def imported(self) -> list[StoredStage]:
        """All imported stages that are whole, the newest import first."""
        folders = [path for path in (self.root / "imported").glob("*") if re.fullmatch("[0-9a-f]+", path.name)]
        newest_first = sorted(folders, key=lambda path: (-path.stat().st_mtime_ns, path.name))
        return [found for folder in newest_first if (found := self.read(folder)) is not None]

    def read(self, folder: Path) -> StoredStage | None:
        """The stage in `folder`, named by its key; None if it is absent, damaged or of another schema version."""
        try:
            record = json.loads((folder / "stage.json").read_text())
        except (OSError, ValueError):
            return None
        if record.get("schema") != SCHEMA or record.get("key") != folder.name:
            return None
        files = folder / "files"
        for name, digest in record["files"].items():
            if not (files / name).is_file() or self.file_digest(files / name) != digest:
                return None
        return StoredStage(files, record, record["digest"])

    @contextlib.contextmanager
    def writing(self, key: str, record: dict[str, Any]) -> Iterator[Path]:
        """A folder to fill; it becomes the stage `key` when the block ends without an error, and vanishes otherwise.

        `record` may be filled until then. Raises StoreError where the disk is full.
        """
        folder = self._folder(key)
        partial = folder.with_name(f".partial-{key}-{os.getpid()}")
        with disk_errors(f"the stage cache {self.root}"):
            self._remove_abandoned()
            made = partial / "files"
            make_folder(made, "the stage cache")
            try:
                yield made
                files = file_digests(made)
                whole = {"schema": SCHEMA, "key": key, **record, "files": files, "digest": combined_digest(files)}
                write_json(partial / "stage.json", whole)
                if folder.exists():
                    shutil.rmtree(folder)
                os.replace(partial, folder)
            finally:
                shutil.rmtree(partial, ignore_errors=True)

    @property
    def unfinished(self) -> Path:
        """Where the checkpoints of trainings lie until they are done, each in a folder named by the key of its stage."""
        return self.root / "unfinished"

    def file_digest(self, path: Path) -> str:
        """sha256 of a file, remembered under its path, size and modification time."""
        return self.digests_of([path])[0]

    def digests_of(self, paths: Iterable[Path]) -> list[str]:
        """The same of several, remembered together."""
        found, is_changed = [], False
        for path in paths:
            stat = path.stat()
            known = self._digests.get(str(path))
            if not known or known[:2] != [stat.st_size, stat.st_mtime_ns]:
                known = self._digests[str(path)] = [stat.st_size, stat.st_mtime_ns, sha256(path)]
                is_changed = True
            found.append(str(known[2]))
        if is_changed:
            with contextlib.suppress(OSError):  # only a cache of digests: without it they are computed again
                self.root.mkdir(parents=True, exist_ok=True)
                write_json(self._digests_file, self._digests)
        return found

    def _folder(self, key: str) -> Path:
        return self.root / "stages" / key

    def _remove_abandoned(self) -> None:
        for partial in (self.root / "stages").glob(".partial-*"):
            process = re.search(r"-(\d+)$", partial.name)
            if process and not _is_alive(int(process.group(1))):
                shutil.rmtree(partial, ignore_errors=True)

    def _read_digests(self) -> dict[str, Any]:
        try:
            return dict(json.loads(self._digests_file.read_text()))
        except (OSError, ValueError):
            return {}


def sha256(path: Path) -> str:
    """The digest of a file, read now."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_digests(folder: Path) -> dict[str, str]:
    """The digest of every file below `folder`, by its path in it."""
    return {str(path.relative_to(folder)): sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def combined_digest(files: dict[str, str]) -> str:
    """One digest of all files of a stage."""
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def disk_errors(what: str) -> Iterator[None]:
    """Turn "no space left" and "not permitted" while `what` is written into a StoreError."""
    try:
        yield
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else _errno_in(str(error))
        if number in _DISK_FULL:
            raise StoreError(
                f"{what}: the disk is full or a quota is reached; what was finished stays; make room and run again"
            ) from error
        if isinstance(error, PermissionError):
            raise StoreError(f"{what}: no permission to write {error.filename}; choose another folder") from error
        raise


def make_folder(folder: Path, what: str) -> None:
    """Make `folder` and its parents; StoreError if that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"{what} {folder}: {error.strerror}; choose another folder") from error


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON, atomically: a reader sees the old file or the new one. NaN and unknown types raise."""
    text = json.dumps(value, indent=1, sort_keys=True, allow_nan=False)
    write_text(path, text + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _errno_in(message: str) -> int | None:
    """The number in messages such as "I/O error: No space left on device (os error 28)" from compiled libraries."""
    found = re.search(r"os error (\d+)", message)
    return int(found.group(1)) if found else None


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
