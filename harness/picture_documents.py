"""Documents of lm-eval's that show pictures: one at a time, as plain data, with their pictures stored. No lm_eval.

A picture that cannot be had leaves out its question with the reason and nothing else. The pictures of rows stay packed until their
document is asked for: no data set has to fit in memory, and a broken picture is found with its row. Only where a task processes its
documents by code of its own (`process_docs`), that code is given open pictures.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.errors import DataError, TaskError
from harness.images import Image, digest_of, keep_image, keep_picture
from harness.models import mirror_folder
from harness.prepared import plain
from harness.tasks.picture_rows import picture_bytes, pictures_of
from harness.tasks.pictures import canonical, grey_picture, open_picture, size_of


@dataclass(frozen=True)
class Document:
    """A document. given: as the task's own functions take it, its pictures open. fields: as plain data, {"image": digest} for a picture.

    packed: the file of an open picture that was read from one, by the picture's id. lacking: why it cannot be asked.
    """

    given: dict[str, Any]
    fields: dict[str, Any]
    packed: dict[int, bytes]
    lacking: str | None


@dataclass(frozen=True)
class Shown:
    """A picture of a question. image: what is shown. original: the digest of what would be, where a grey one stands for it."""

    image: Image
    original: str
    size: tuple[int, int]


def leave_packed(task: Any) -> None:
    """Let the rows that a task was given keep their pictures packed, if it shows any and no code of its own looks at rows before."""
    if task.config.doc_to_image is not None and task.config.process_docs is None:
        task.dataset = {split: _packed(rows) for split, rows in task.dataset.items()}


def documents(task: Any) -> Iterator[Document]:
    """The documents of a task, in order; TaskError for one that holds what is neither plain data nor a picture."""
    docs = _packed(task.eval_docs)
    features = getattr(docs, "features", None) or {}
    folders = _folders_of(task.config)
    for doc in docs:
        packed: dict[int, bytes] = {}
        lacking: list[str] = []
        given = {name: _open(value, features.get(name), folders, packed, lacking) for name, value in doc.items()}
        try:
            fields = plain(_without_pictures(given, lacking))
        except (TypeError, ValueError) as error:
            raise TaskError(f"task {task.config.task}: a document holds what is no plain data ({error})") from error
        yield Document(given, fields, packed, lacking[0] if lacking else None)


def is_same_again(task: Any) -> bool:
    """Whether the task, asked twice for its documents, gives the same ones in the same order."""
    first, second = _packed(task.eval_docs), _packed(task.eval_docs)
    return len(first) == len(second) and all(dict(one) == dict(other) for one, other in zip(first, second, strict=True))


def shown_by(task: Any, show: Any, document: Document, folder: Path, *, is_grey: bool) -> list[Shown]:
    """The pictures of a document in order, stored in `folder`.

    Args:
        show: the task's `doc_to_image`. is_grey: whether a grey picture of its size is stored in place of each.
    Raises:
        DataError: with the reason alone: there is none, or one that cannot be read.
    """
    if document.lacking is not None:
        raise DataError(document.lacking)
    try:
        if show is pictures_of:  # the tasks here know the files: what is packed is stored as it is
            found: Any = [picture_bytes(place) for place in document.given["pictures"]]
        else:
            found = task.doc_to_image(document.given, show)
    except DataError:
        raise
    except Exception as error:  # whatever the code of a task raises where it finds no picture
        raise DataError(f"its picture cannot be had ({type(error).__name__}: {_first_line(error)})") from error
    found = list(found) if isinstance(found, list | tuple) else [found]
    if not found or any(each is None for each in found):
        raise DataError("it has no picture" if len(found) < 2 else "it lacks a picture")
    return [_keep(each, document.packed.get(id(each)), folder, is_grey) for each in found]


def _keep(picture: Any, data: bytes | None, folder: Path, is_grey: bool) -> Shown:
    from PIL import Image as Pillow

    data = picture if isinstance(picture, bytes) else data
    if data is None and not isinstance(picture, Pillow.Image):
        raise DataError(
            f"doc_to_image gives {type(picture).__name__}; allowed: pictures of Pillow's, or the bytes of their files"
        )
    size = size_of(data) if data is not None else picture.size
    if is_grey:
        seen = open_picture(data) if data is not None else canonical(picture)
        return Shown(keep_picture(grey_picture(size), folder), digest_of(seen), size)
    image = keep_image(data, folder) if data is not None else keep_picture(canonical(picture), folder)
    return Shown(image, image.digest, size)


def _packed(rows: Any) -> Any:
    """Rows of a data set with columns of pictures left as the bytes of their files; anything else as it is."""
    import datasets

    for name, feature in (getattr(rows, "features", None) or {}).items():
        if isinstance(feature, datasets.Image) and feature.decode:
            rows = rows.cast_column(name, datasets.Image(decode=False))
        elif isinstance(feature, datasets.List) and isinstance(feature.feature, datasets.Image) and feature.feature.decode:
            rows = rows.cast_column(name, datasets.List(datasets.Image(decode=False)))
    return rows


def _folders_of(config: Any) -> list[Path]:
    """Where the data of a task lie: local folders that it names, the mirror's of its set, and what was fetched from the hub."""
    import datasets
    from huggingface_hub.constants import HF_HUB_CACHE

    given = config.dataset_kwargs or {}
    files = given.get("data_files") or []
    files = list(files.values()) if isinstance(files, dict) else [files]
    names = [name for each in files for name in (each if isinstance(each, list | tuple) else [each]) if "://" not in str(name)]
    folders = [Path(name) for name in (config.dataset_path, given.get("data_dir")) if name]
    folders += [Path(re.split(r"[*?[]", str(name))[0] + "x").parent for name in names]
    mirror = mirror_folder(config.dataset_path) if config.dataset_path else None
    fetched = [Path(datasets.config.DOWNLOADED_DATASETS_PATH), Path(HF_HUB_CACHE)]
    return [folder.resolve() for folder in [*folders, *([mirror] if mirror else []), *fetched] if folder.is_dir()]


def _open(value: Any, feature: Any, folders: list[Path], packed: dict[int, bytes], lacking: list[str]) -> Any:
    """A value with its packed pictures opened; None for one that cannot be, and the reason in `lacking`."""
    import datasets

    if isinstance(feature, datasets.List) and isinstance(value, list):
        return [_open(each, feature.feature, folders, packed, lacking) for each in value]
    if not isinstance(feature, datasets.Image) or not isinstance(value, dict):
        return value
    try:
        data = value["bytes"] if value["bytes"] is not None else _read(value["path"], folders)
        picture = open_picture(data)
    except DataError as error:
        lacking.append(str(error))
        return None
    packed[id(picture)] = data
    return picture


def _read(name: Any, folders: list[Path]) -> bytes:
    """The file of a picture that a row names, which may name any; DataError, with the reason alone, unless it is among the data."""
    if not isinstance(name, str) or not name:
        raise DataError("neither the bytes of a picture nor a path")
    named = repr(name[:200])
    try:
        path = Path(name).resolve()
        if not any(path.is_relative_to(folder) for folder in folders):
            raise DataError(
                f"{named} is outside the folders of the data; give its bytes, or its folder as dataset_kwargs.data_dir"
            )
        return path.read_bytes()
    except (OSError, ValueError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no name that a file can have"
        raise DataError(f"{named}: no such picture ({reason})") from error


def _without_pictures(value: Any, lacking: list[str]) -> Any:
    """A value with the digest of each picture in its place."""
    from PIL import Image as Pillow

    if isinstance(value, dict):
        return {key: _without_pictures(each, lacking) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_without_pictures(each, lacking) for each in value]
    if not isinstance(value, Pillow.Image):
        return value
    try:
        return {"image": digest_of(canonical(value))}
    except DataError as error:
        lacking.append(str(error))
        return None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]
