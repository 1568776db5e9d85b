"""The rows of a benchmark: from the mirror (HARNESS_MIRROR, `<org>/<name>/`) before the hub, whole or not at all.

A column that is missing, a row without a value and another number of rows than the set is known to have are errors: a copy that is
cut short would give a score of other questions under the same name. What was read is said in the description of the data set
(`Dataset.info`), so that a record can hold it. `datasets` is imported only where rows are handed over or a hub is read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.errors import DataError
from harness.models import mirror_folder
from harness.row_files import file_rows

if TYPE_CHECKING:
    import datasets

SUFFIXES = (".jsonl", ".parquet", ".csv")


@dataclass(frozen=True)
class RowSet:
    """A set on the hub.

    columns: what every row must have, with a value.
    revision: commit on the hub, None: its newest. A mirror that declares another one (`revision.txt`) is refused.
    files: how the files of the split are called, without suffix, where it is not the split's name or begins with it and a dash.
    access: what a person has to do before the hub gives the set out.
    """

    path: str
    split: str
    columns: tuple[str, ...]
    subset: str | None = None
    revision: str | None = None
    files: tuple[str, ...] = ()
    access: str = "check the network and the name"


def load_rows(wanted: RowSet, *, n_rows: int | None) -> tuple[list[dict[str, Any]], str]:
    """The columns of every row, and where they are from, with the digests of files.

    Args:
        n_rows: how many rows the set is known to have; None: any number but none at all.
    Raises:
        DataError: no such set, a column or value that is missing, another number of rows.
    """
    mirror = mirror_folder(wanted.path)
    if mirror is not None:
        files = mirrored_files(wanted, mirror)
        rows = [row for path in files for row in _checked(file_rows(path), wanted.columns, str(path))]
        where = f"{', '.join(str(path) for path in files)}"
        origin = mirror_origin(wanted, mirror, files)
    else:
        where = origin = f"hub {wanted.path} at {wanted.revision or 'its newest revision'}"
        rows = list(_checked(_hub_rows(wanted), wanted.columns, where))
    require_whole(len(rows), wanted, n_rows=n_rows, where=where)
    return rows, origin


def require_whole(found: int, wanted: RowSet, *, n_rows: int | None, where: str) -> None:
    """DataError if there is no row, or another number of rows than the set is known to have."""
    if found == 0 or n_rows not in (None, found):
        raise DataError(
            f"{where}: {found} rows; {wanted.path}{f' ({wanted.subset})' if wanted.subset else ''} has {n_rows or 'some'}. "
            "Get the whole set: a score of other questions would bear the same name"
        )


def as_dataset(docs: Sequence[Mapping[str, Any]], origin: str) -> datasets.Dataset:
    """Documents as lm-eval wants them; `origin` becomes the description."""
    import datasets

    made = datasets.Dataset.from_list([dict(doc) for doc in docs])
    made.info.description = origin
    return made


def mirrored_files(wanted: RowSet, mirror: Path) -> list[Path]:
    """The files of a split in the mirror: beside `revision.txt`, in `data/` or in the folder of the subset; DataError if there is none."""
    folders = [mirror / wanted.subset] if wanted.subset and (mirror / wanted.subset).is_dir() else [mirror, mirror / "data"]
    known = sorted(p for folder in folders if folder.is_dir() for p in folder.iterdir() if p.suffix in SUFFIXES)
    names = wanted.files or (wanted.split,)
    found = [p for p in known if any(p.stem == name or p.stem.startswith(f"{name}-") for name in names)]
    if not found:
        raise DataError(
            f"{mirror}: the mirror's {wanted.path} has no file {' or '.join(names)} with one of the endings {', '.join(SUFFIXES)} in "
            f"{' or '.join(str(folder) for folder in folders)}; it has: {', '.join(p.name for p in known) or 'none'}"
        )
    if len({p.suffix for p in found}) > 1:
        raise DataError(
            f"{mirror}: the mirror's {wanted.path} holds the split twice: {', '.join(p.name for p in found)}; keep one"
        )
    return found


def mirror_origin(wanted: RowSet, mirror: Path, files: list[Path]) -> str:
    """What is said of rows from the mirror: the revision that it declares, the files and their digests; DataError for another revision."""
    declared = mirror / "revision.txt"
    revision = declared.read_text().strip() if declared.is_file() else None
    if revision and wanted.revision and revision != wanted.revision:
        raise DataError(
            f"{declared}: the mirror holds {wanted.path} at {revision}, the task is defined on {wanted.revision}; get that commit"
        )
    digests = ", ".join(f"{path.name} sha256 {_digest(path)}" for path in files)
    return f"mirror {wanted.path}, {f'at {revision}' if revision else 'revision unknown'}, {digests}"


def _hub_rows(wanted: RowSet) -> Iterator[dict[str, Any]]:
    import datasets

    try:
        yield from datasets.load_dataset(wanted.path, wanted.subset, split=wanted.split, revision=wanted.revision)
    except (OSError, ValueError) as error:  # what datasets raises without a network, for unknown names and for gated sets
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        at = f" at {wanted.revision}" if wanted.revision else ""
        raise DataError(
            f"{wanted.path}{at}: neither in the mirror (HARNESS_MIRROR) nor to be had from the hub ({reason}); {wanted.access}, or put "
            f"its files under $HARNESS_MIRROR/{wanted.path}/"
        ) from error


def checked_row(row: dict[str, Any], columns: tuple[str, ...], where: str) -> dict[str, Any]:
    """The columns of a row; DataError if one is missing or has no value. where: the file and the number of the row."""
    for column in columns:
        if row.get(column) is None or row[column] == "":
            what = f"no column {column!r}" if column not in row else f"no value of {column!r}"
            raise DataError(f"{where} has {what}; it has: {', '.join(sorted(map(str, row)))}")
    return {column: row[column] for column in columns}


def _checked(rows: Iterator[dict[str, Any]], columns: tuple[str, ...], where: str) -> Iterator[dict[str, Any]]:
    for number, row in enumerate(rows, start=1):
        yield checked_row(row, columns, f"{where}: row {number}")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
