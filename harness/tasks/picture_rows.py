"""The rows of a benchmark that asks about pictures: text in memory, pictures left where they are and named by place and digest.

From the mirror before the hub, as `sources` reads text, in the same layout: parquet files with a picture as {bytes, path}, as the
hub has them, or .jsonl and .csv with the path of a file below the folder of the set. From the hub come the parquet files as they
are (no second copy is made of them). Every picture is opened once when rows are read; a row with one that is missing, broken or too
large stays a row that is `excluded` with the reason, never asked and never scored. `pictures_of` gives the pictures of a document
and finds out where a file has changed since.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.errors import DataError
from harness.models import mirror_folder
from harness.row_files import file_rows
from harness.tasks.pictures import grey_picture, is_base64, require_readable, waiting_picture
from harness.tasks.sources import RowSet, as_dataset, checked_row, mirror_origin, mirrored_files, require_whole

if TYPE_CHECKING:
    import datasets
    from PIL.Image import Image

MARK = "<image>"
"""Where a picture stands in a prompt, for plain lm-eval and for us."""
MOST_EXCLUDED = 0.1
"""Share of the rows that may lack a picture; above it the copy is broken."""
_ROW_GROUPS_KEPT = 2


@dataclass(frozen=True)
class PictureRows:
    """Rows, each with `pictures`: by column, where the picture is (plain data), or why there is none (a text)."""

    rows: list[dict[str, Any]]
    origin: str


def load_picture_rows(
    wanted: RowSet, *, n_rows: int | None, pictures: Sequence[str] = ("image",), optional: Sequence[str] = ()
) -> PictureRows:
    """The rows of a set with the places of their pictures.

    Args:
        pictures: columns with a picture, where one may be empty. optional: columns with text that may be missing or empty.
    Raises:
        DataError: no such set, a column or value that is missing, another number of rows, too few rows with their pictures.
    """
    root, commit = _folder(wanted)
    files = mirrored_files(wanted, root)
    where = ", ".join(map(str, files))
    rows: list[dict[str, Any]] = []
    checked: dict[str, str | None] = {}
    for path in files:
        required = (*wanted.columns, pictures[0])
        for number, row in enumerate(_rows_of(path, required, (*optional, *pictures[1:]))):
            text = checked_row(row, wanted.columns, f"{path}: row {number + 1}")
            place = {"set": wanted.path, "revision": commit, "file": str(path.relative_to(root)), "row": number}
            text |= {name: row.get(name) for name in optional}
            text["pictures"] = {name: _place(row.get(name), {**place, "column": name}, root, checked) for name in pictures}
            rows.append(text)
    require_whole(len(rows), wanted, n_rows=n_rows, where=where)
    origin = mirror_origin(wanted, root, files) if commit is None else f"hub {wanted.path} at {commit}"
    return PictureRows(rows, origin)


def picture_fields(row: dict[str, Any], names: Sequence[str] = ("image",)) -> dict[str, Any]:
    """What a document says of its pictures: `pictures`, in the order of the marks; `excluded`; `cluster`, by the first picture."""
    found = [row["pictures"].get(name, "no such column") for name in names]
    lacking = [f"{name}: {each}" for name, each in zip(names, found, strict=True) if isinstance(each, str)]
    places = [_NOWHERE if isinstance(each, str) else each for each in found]
    return {"pictures": places, "excluded": "; ".join(lacking) or None, "cluster": places[0]["sha256"] or "no picture"}


def picture_dataset(docs: Sequence[dict[str, Any]], wanted: RowSet, origin: str) -> dict[str, datasets.Dataset]:
    """Documents as lm-eval wants them; DataError if more than a tenth of them lack a picture."""
    reasons = [doc["excluded"] for doc in docs if doc["excluded"] is not None]
    if len(reasons) > MOST_EXCLUDED * len(docs):
        raise DataError(
            f"{wanted.path}: {len(reasons)} of {len(docs)} rows lack a picture, more than {MOST_EXCLUDED:.0%}; the first: {reasons[0]}. "
            "Get the whole set again"
        )
    return {"test": as_dataset(docs, origin)}


def gold_texts(value: Any, where: str) -> list[str]:
    """Gold answers as a list of texts; DataError if there is none, or one that is no text."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts or not all(isinstance(each, str) for each in texts) or not any(texts):
        raise DataError(f"{where}: gold answers {value!r}; allowed: a text, or a list of one or more")
    return texts


def source_question(question: str, fields: dict[str, Any]) -> str:
    """What makes a question the same one elsewhere: its text and the bytes of its pictures."""
    return " ".join([question, *(place["sha256"] for place in fields["pictures"])])


def unmarked(text: str) -> str:
    """A text of the set in which nothing reads as a mark of ours."""
    return text.replace(MARK, "< image >")


def pictures_of(doc: dict[str, Any]) -> list[Image]:
    """The pictures of a document, in the order of its marks; grey ones for a document that is excluded.

    Raises:
        DataError: a file that is gone or has other bytes than when the rows were read.
    """
    if doc["excluded"]:
        return [grey_picture() for _ in doc["pictures"]]
    return [waiting_picture(picture_bytes(place)) for place in doc["pictures"]]


def picture_bytes(place: dict[str, Any]) -> bytes:
    """The bytes of a picture as the set has them; DataError if they are not those whose digest is known."""
    path = _file(place["set"], place["revision"], place["file"])
    data = _from_parquet(path, place["row"], place["column"]) if place["row"] is not None else path.read_bytes()
    if data is None or hashlib.sha256(data).hexdigest() != place["sha256"]:
        raise DataError(
            f"{path}: the picture of row {place['row']} has changed since the rows were read; prepare the task again"
        )
    return data


_NOWHERE: dict[str, Any] = dict.fromkeys(("set", "revision", "file", "row", "column")) | {"sha256": ""}


def _folder(wanted: RowSet) -> tuple[Path, str | None]:
    """The folder of the set and its commit: of the mirror (then None), or the part of the hub's set that holds the split."""
    mirror = mirror_folder(wanted.path)
    if mirror is not None:
        return mirror, None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    split = f"{wanted.split}-*.parquet"
    patterns = [f"{wanted.subset}/{split}"] if wanted.subset else [split, f"data/{split}"]
    at = f"{wanted.path}{f' at {wanted.revision}' if wanted.revision else ''}"
    try:
        found = Path(snapshot_download(wanted.path, repo_type="dataset", revision=wanted.revision, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"{at}: neither in the mirror (HARNESS_MIRROR) nor to be had from the hub ({reason}); {wanted.access}, or put its files "
            f"under $HARNESS_MIRROR/{wanted.path}/"
        ) from error
    if not any(path for pattern in patterns for path in found.glob(pattern)):
        raise DataError(
            f"{at}: the hub's set has no file {' or '.join(patterns)}; put its files under $HARNESS_MIRROR/{wanted.path}/"
        )
    return found, found.name


def _rows_of(path: Path, required: Sequence[str], optional: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The wanted columns of each row; of a parquet file those alone are read, and one that is missing is an error at once."""
    if path.suffix != ".parquet":
        yield from file_rows(path)
        return
    from pyarrow import ArrowException, parquet

    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            for column in required:
                if column not in names:
                    raise DataError(f"{path}: no column {column!r}; it has: {', '.join(sorted(names))}")
            wanted = [*required, *(name for name in optional if name in names)]
            for batch in file.iter_batches(batch_size=32, columns=wanted):
                yield from batch.to_pylist()
    except (ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable parquet file ({str(error).splitlines()[0]})") from error


def _place(value: Any, place: dict[str, Any], root: Path, checked: dict[str, str | None]) -> dict[str, Any] | str:
    """Where a picture is, with the sha256 of its bytes; a text if it cannot be had. checked: what is known of bytes, by sha256."""
    data = value.get("bytes") if isinstance(value, dict) else None
    name = value.get("path") if isinstance(value, dict) else value
    if not isinstance(data, bytes):
        if not isinstance(name, str) or not name:
            return "no picture"
        if name.startswith("data:") or is_base64(name):
            return "base64; a picture is its bytes in a parquet file, or the path of a file in the folder of the set"
        named = repr(name[:200])
        try:
            path = (root / name).resolve()
            if not path.is_relative_to(root.resolve()):
                return f"{named} leaves the folder of the set"
            if not path.is_file():
                return f"there is no file {named} in the folder of the set"
            data, place = path.read_bytes(), {**place, "file": name, "row": None, "column": None}
        except (OSError, ValueError, RuntimeError):  # too long, no name that a file can have, links in a circle
            return f"{named} cannot be read as the path of a file"
    digest = hashlib.sha256(data).hexdigest()
    if digest not in checked:
        checked[digest] = _why_unreadable(data)
    return checked[digest] or {**place, "sha256": digest}


def _why_unreadable(data: bytes) -> str | None:
    try:
        require_readable(data)
    except DataError as error:
        return str(error)
    return None


def _file(name: str, commit: str | None, file: str) -> Path:
    """A file of a set: of the mirror, where no commit is named, else of the hub's at that commit."""
    if commit is not None:
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(name, file, repo_type="dataset", revision=commit))
    mirror = mirror_folder(name)
    if mirror is None or not (mirror / file).is_file():
        raise DataError(f"{name}: {file} is no longer in the mirror (HARNESS_MIRROR); put it back, or prepare the task again")
    return mirror / file


def _from_parquet(path: Path, row: int, column: str) -> bytes | None:
    """The bytes of a picture; None if there is none."""
    first = 0
    for group, n_rows in enumerate(_group_sizes(path)):
        if row < first + n_rows:
            return _group(path, group, column)[row - first]
        first += n_rows
    return None


@lru_cache(maxsize=256)
def _group_sizes(path: Path) -> tuple[int, ...]:
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        return tuple(file.metadata.row_group(i).num_rows for i in range(file.num_row_groups))


@lru_cache(maxsize=_ROW_GROUPS_KEPT)
def _group(path: Path, group: int, column: str) -> list[bytes | None]:
    """The pictures of one row group: neighbours are asked for one after another."""
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        values = file.read_row_group(group, columns=[column])[column].to_pylist()
    return [value and value["bytes"] for value in values]
