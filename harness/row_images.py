"""The images of a row: bytes that the row holds, or files that it names by their paths in the folder of its data.

A file is read only inside that folder: an absolute path, one with `..`, a link that leads out of it and one of a whole folder are refused,
and so is every name that is not a picture's, since the fingerprint of the data covers pictures alone. Nothing is fetched from an address.
"""

from __future__ import annotations

import base64
import os
from pathlib import Path, PurePosixPath
from typing import Any

from harness.dialogues import RowError
from harness.errors import DataError
from harness.images import Image, keep_image
from harness.tasks.pictures import MOST_PIXELS, is_base64, size_of

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"})
"""Of picture files that rows may name."""
MOST_BYTES = 4 * MOST_PIXELS
"""Of a picture file: what the largest picture takes when it is not packed at all."""
MOST_PIXELS_A_ROW = 4 * MOST_PIXELS
"""Of all images of a row, which a processor holds unpacked together."""


def images_of(row: dict[str, Any], field: str, *, folder: Path | None, keep: Path, most: int) -> tuple[Image, ...]:
    """The images of a row, made canonical and kept in the folder `keep`, one after the other; none where the field is an empty list.

    folder: which paths are in; None where the rows come from no folder. RowError: the field is missing or null, as it is where an image was
    lost; more than `most`; one that cannot be had.
    """
    given = row.get(field)
    if given is None:
        raise RowError(
            f'the field "{field}" is {"null" if field in row else "missing"}; a row that has no image says so by an empty list'
        )
    values = given if isinstance(given, list | tuple) else [given]
    if len(values) > most:
        raise RowError(f"{len(values)} images; at most {most}, the tokens of seq_len, of which each image takes one or more")
    found, pixels = [], 0
    for number, value in enumerate(values, start=1):
        try:
            data = _bytes(value, folder)
            width, height = size_of(data)
            pixels += width * height
            if pixels <= MOST_PIXELS_A_ROW:
                found.append(keep_image(data, keep))
        except (DataError, RowError) as error:
            raise RowError(f"image {number} of {len(values)}: {error}") from None
        if pixels > MOST_PIXELS_A_ROW:
            raise RowError(
                f"the first {number} of {len(values)} images have {pixels:,} pixels; at most {MOST_PIXELS_A_ROW:,} in a row"
            )
    return tuple(found)


def picture_files(folder: Path) -> list[Path]:
    """Every file below `folder` that a row may name, in order."""
    root, found = folder.resolve(), []
    for inner, folders, names in os.walk(folder):
        folders.sort()
        paths = [Path(inner, name) for name in sorted(names) if Path(name).suffix.lower() in SUFFIXES]
        found += [path for path in paths if not path.is_symlink() or (path.is_file() and path.resolve().is_relative_to(root))]
    return found


def _bytes(value: Any, folder: Path | None) -> bytes:
    if isinstance(value, dict):
        value = value["bytes"] if value.get("bytes") is not None else value.get("path")
    if isinstance(value, bytes):
        return value
    if isinstance(value, str) and value.startswith("data:"):
        return _unpacked(value)
    if isinstance(value, str) and value:
        return _read(value, folder)
    raise RowError("missing" if value is None else f"a {type(value).__name__}; an image is bytes, or the path of a file")


def _unpacked(value: str) -> bytes:
    beginning, _, packed = value.partition(",")
    if not beginning.endswith(";base64"):
        raise RowError("a data address that is not base64")
    try:
        return base64.b64decode(packed, validate=True)
    except ValueError as error:
        raise RowError(f"not base64 ({error})") from None


def _read(given: str, folder: Path | None) -> bytes:
    if is_base64(given):
        raise RowError('base64 without its beginning; write "data:image/png;base64,", or its kind of image, before it')
    named = f'"{given[:200].encode(errors="backslashreplace").decode()}"'
    if "://" in given:
        raise RowError(f"{named} is an address, and nothing is fetched; put the file into the folder of the data")
    if folder is None:
        raise RowError(f"{named} is a path, and the rows hold no bytes; put the set with its files under HARNESS_MIRROR")
    path = PurePosixPath(given)
    if path.is_absolute() or ".." in path.parts or "\\" in given or "\0" in given:
        raise RowError(f"{named} leaves the folder of the data; paths are relative to it, and stay in it")
    if path.suffix.lower() not in SUFFIXES:
        raise RowError(f"{named} has not the name of a picture; known: {', '.join(sorted(SUFFIXES))}")
    try:
        return _inside(folder.resolve(), path, named)
    except UnicodeEncodeError:
        raise RowError(f"{named} cannot be read (no name that a file can have)") from None
    except (OSError, RuntimeError) as error:  # the latter of links in a circle
        reason = error.strerror if isinstance(error, OSError) else "links in a circle"
        raise RowError(f"{named} cannot be read ({reason})") from None


def _inside(root: Path, path: PurePosixPath, named: str) -> bytes:
    file = (root / path).resolve()
    if not file.is_relative_to(root) or (root / path.parent).resolve() != root / path.parent:
        raise RowError(f"{named} leads elsewhere by a link; put the folder and the file themselves into the folder of the data")
    if not file.is_file():
        raise RowError(f"{named}: there is no such file")
    if (size := file.stat().st_size) > MOST_BYTES:
        raise RowError(f"{named} has {size:,} bytes; at most {MOST_BYTES:,}")
    return file.read_bytes()
