"""Where the rows of a data section are, what identifies them, and reading them one by one. No torch; `datasets` only to read a hub.

A hub name is looked up in the mirror (HARNESS_MIRROR, `<org>/<name>/`) before the hub, as models are: `revision.txt` declares
its commit. There the files of a split are the `.jsonl` or `.parquet` files whose names are the split's or begin with it and a
dash (`train.jsonl`, `train-00000-of-00002.parquet`), in the folder of the subset where there is one, else beside
`revision.txt` or in `data/`.
"""

from __future__ import annotations

import csv
import glob
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from harness.errors import DataError
from harness.hub import reading_hub
from harness.models import mirror_folder
from harness.row_images import picture_files
from harness.schema_data import Hub, Jsonl
from harness.store import Store

SUFFIXES = (".jsonl", ".parquet")
ROWS_AT_ONCE = 256


@dataclass(frozen=True)
class RowFiles:
    """Files in reading order; none of them for a hub set that is streamed.

    fingerprint: changes with every byte of the rows, and of the pictures that rows with images may name.
    folder: where those pictures are, if rows have images.
    """

    files: tuple[Path, ...]
    fingerprint: str
    folder: Path | None = None


def find_rows(name: str, section: Hub | Jsonl, store: Store) -> RowFiles:
    """Find the rows of `[data.<name>]`; DataError if they are nowhere. A file is read only to make its digest, once."""
    if isinstance(section, Jsonl):
        return _files(name, section, _local(name, section), store)
    mirror = mirror_folder(section.path)
    if mirror is not None:
        return _files(name, section, _mirrored(name, section, mirror), store)
    if section.revision is None:
        raise DataError(
            f"data.{name}.revision: missing; {section.path} is not in the mirror (HARNESS_MIRROR), and from the hub it needs the "
            "commit, 40 hex digits: a branch can move"
        )
    return RowFiles((), f"hub:{section.path}@{section.revision}")


def read_rows(name: str, section: Hub | Jsonl, found: RowFiles) -> Iterator[dict[str, Any]]:
    """Rows as dicts, in order, without holding them; DataError for a file or a hub set that cannot be read."""
    if not found.files:
        assert isinstance(section, Hub)
        yield from _streamed(name, section)
    for path in found.files:
        yield from file_rows(path, at_once=ROWS_AT_ONCE if section.images is None else 1)


def file_rows(path: Path, *, at_once: int = ROWS_AT_ONCE) -> Iterator[dict[str, Any]]:
    """Rows of one .jsonl, .parquet or .csv file (first line: the columns; every value is text), in order; DataError if it has none.

    at_once: how many rows of a parquet file are unpacked in memory, beside the row group that they are read from.
    """
    readers: dict[str, Callable[[Path], Iterator[dict[str, Any]]]] = {
        ".jsonl": _jsonl_rows,
        ".parquet": partial(_parquet_rows, at_once=at_once),
        ".csv": _csv_rows,
    }
    yield from readers[path.suffix](path)


def _files(name: str, section: Hub | Jsonl, paths: list[Path], store: Store) -> RowFiles:
    digests = store.digests_of(paths)
    folder = None
    if section.images is not None:
        folder = _common_folder(name, paths)
        pictures = picture_files(folder)
        names = [str(path.relative_to(folder)) for path in pictures]
        digests += [f"{name} {digest}" for name, digest in zip(names, store.digests_of(pictures), strict=True)]
    return RowFiles(tuple(paths), "files:" + hashlib.sha256(json.dumps(digests).encode()).hexdigest(), folder)


def _common_folder(name: str, paths: list[Path]) -> Path:
    folders = {path.parent for path in paths}
    if len(folders) > 1:
        first, second, *_ = sorted(folders)
        raise DataError(
            f"data.{name}.path: files in {first} and {second}; paths of images are relative to the folder of the rows, and it must be one: "
            "make a section of each and mix them"
        )
    return folders.pop()


def _local(name: str, section: Jsonl) -> list[Path]:
    path = Path(section.path).expanduser()
    if path.is_dir():
        found = sorted(p for p in path.iterdir() if p.suffix in SUFFIXES)
    elif path.is_file():
        found = [path]
    else:
        found = sorted(Path(p) for p in glob.glob(str(path)))
    wrong = [p for p in found if p.suffix not in SUFFIXES]
    if wrong:
        raise DataError(f"data.{name}.path: {wrong[0]} is neither a .jsonl nor a .parquet file; give one of these")
    if not found:
        raise DataError(
            f"data.{name}.path: {path}: there is no such file, or no .jsonl or .parquet file in it; give a file, a folder or a pattern"
        )
    return found


def _mirrored(name: str, section: Hub, mirror: Path) -> list[Path]:
    declared = mirror / "revision.txt"
    revision = declared.read_text().strip() if declared.is_file() else None
    if revision and section.revision and revision != section.revision:
        raise DataError(
            f"data.{name}.revision: the mirror holds {section.path} at {revision}, the suite asks for {section.revision}"
        )
    inner = mirror / section.subset if section.subset else mirror
    folders = [inner] if section.subset and inner.is_dir() else [mirror, mirror / "data"]
    known = sorted(p for folder in folders if folder.is_dir() for p in folder.iterdir() if p.suffix in SUFFIXES)
    found = [p for p in known if p.stem == section.split or p.stem.startswith(f"{section.split}-")]
    if not found:
        listed = ", ".join(p.name for p in known) or "no .jsonl or .parquet file"
        raise DataError(
            f"data.{name}.split: the mirror has no files of the split {section.split!r} in {folders[0]}; it has: {listed}"
        )
    return found


def _jsonl_rows(path: Path) -> Iterator[dict[str, Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)  # bytes: what is not UTF-8 is a ValueError too
            except ValueError as error:
                raise DataError(f"{path}: line {number} is not JSON ({error})") from error
            if not isinstance(row, dict):
                raise DataError(f"{path}: line {number} is a {type(row).__name__}; every line is an object with fields")
            yield row


def _parquet_rows(path: Path, *, at_once: int) -> Iterator[dict[str, Any]]:
    from pyarrow import ArrowException, parquet

    try:
        with parquet.ParquetFile(path) as file:
            for group in range(file.num_row_groups):  # one by one, or the next ones are read ahead
                for batch in file.iter_batches(batch_size=at_once, row_groups=[group]):
                    yield from batch.to_pylist()
    except (ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable parquet file ({str(error).splitlines()[0]})") from error


def _csv_rows(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for row in reader:
                if None in row or None in row.values():
                    raise DataError(
                        f"{path}: line {reader.line_num} has not the {len(reader.fieldnames or ())} values of the first line"
                    )
                yield row
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(f"{path}: not a readable CSV file ({error})") from error


def _streamed(name: str, section: Hub) -> Iterator[dict[str, Any]]:
    import datasets

    try:
        with reading_hub():
            rows = datasets.load_dataset(
                section.path, section.subset, split=section.split, revision=section.revision, streaming=True
            )
            if section.images is not None and rows.features is not None:
                rows = rows.decode(False)  # bytes as they are in the set, and not what another decoder makes of them
            yield from rows
    except (OSError, ValueError) as error:  # what datasets raises without a network, and for unknown names and subsets
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"data.{name}: {section.path} at {section.revision} cannot be had from the hub ({reason}); check path, subset, split "
            "and revision, log in for a gated set, or put it under HARNESS_MIRROR"
        ) from error
