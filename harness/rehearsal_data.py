"""The rows that a rehearsal trains on, as files of a mirror of its own: a few of the user's mirror or file, shortened, else made ones.

Rows that are there are taken as they are but for the length of their texts, so that a column or a value of `where` that is missing is missing
in the rehearsal too. Each split gets enough of them: the split of a row is the hash of its text. Nothing is fetched. No torch.
"""

from __future__ import annotations

import glob
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from harness.data import split_of
from harness.dialogues import RowError
from harness.errors import DataError
from harness.images import digest_of
from harness.models import mirror_folder
from harness.row_chats import PLACE, chat_of, text_of
from harness.row_files import find_rows, read_rows
from harness.row_images import images_of
from harness.schema_data import Hub, Jsonl
from harness.store import Store

if TYPE_CHECKING:
    from PIL.Image import Image

QUOTAS = {"train": 24, "validation": 10, "calibration": 6, "diagnostics": 6}
"""Rows that a section gets in each split."""
SIDE = 32
"""Pixels of a made picture."""
_LOOKED_AT = 20_000
"""Rows of a real set that are looked at."""
_TEXT_BYTES, _END_BYTES = 140, 50
"""Length of a text that a row keeps, and of its end."""
_WORDS = [
    "count",
    "the",
    "red",
    "boxes",
    "then",
    "name",
    "every",
    "small",
    "tool",
    "and",
    "say",
    "how",
    "far",
    "two",
    "trains",
    "go",
    "before",
    "noon",
]

_UNREADABLE = ""
"""In place of the split of a row that has none."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Written:
    """paths: that replace those of the sections, by name. said: a line each. problems: rows of the user's that cannot be had.

    made: of sections whose rows are nowhere on this machine, where they would have to be.
    """

    paths: dict[str, str]
    said: list[str]
    problems: list[str]
    made: dict[str, str]


def write_data(sections: dict[str, Hub | Jsonl], mirror: Path, store: Store, *, taken: set[str]) -> Written:
    """Write the rows of the sections below `mirror`. taken: sets that tasks read whole, beside which sections get one of another name."""
    written = Written({}, [], [], {})
    files: dict[Path, list[Row]] = {}
    for name, section in sections.items():
        file = _place(name, section, mirror, written.paths, taken)
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            where, real = _real_rows(name, section, store)
            rows = None if real is None else list(_in_all_splits(section, real, file.parent))
            if real is None:
                hub = isinstance(section, Hub)
                written.made[name] = (
                    f"{section.path} into the mirror (HARNESS_MIRROR)" if hub else f"its rows at {section.path}"
                )
        except DataError as error:
            written.problems.append(str(error))
            rows = None
        if rows is None:
            rows, where = list(_made_rows(section, file.parent)), ""
        elif len(rows) < sum(QUOTAS.values()):
            rows += list(_more(section, rows))
        files.setdefault(file, []).extend(rows)
        written.said.append(
            f"data.{name}: {len(rows)} {f'rows of {where}' if where else 'made rows, so its columns are not checked'}"
        )
    for file, rows in files.items():
        lines = (json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
        file.write_text("".join(lines), encoding="utf-8")
    return written


def _place(name: str, section: Hub | Jsonl, mirror: Path, paths: dict[str, str], taken: set[str]) -> Path:
    """The file for the rows of a section; notes the path that the section gets."""
    if isinstance(section, Jsonl):
        paths[name] = str(mirror / "files" / name / "rows.jsonl")
        return Path(paths[name])
    paths[name] = f"{section.path}-rows" if section.path in taken else section.path
    folder = mirror / paths[name]
    folder.mkdir(parents=True, exist_ok=True)
    revision = section.revision or _declared(section)
    if revision:
        (folder / "revision.txt").write_text(revision)
    return folder / (section.subset or "") / f"{section.split}.jsonl"


def _declared(section: Hub) -> str | None:
    """The revision that the user's mirror declares."""
    folder = mirror_folder(section.path)
    declared = folder / "revision.txt" if folder is not None else None
    return declared.read_text().strip() if declared is not None and declared.is_file() else None


def _real_rows(name: str, section: Hub | Jsonl, store: Store) -> tuple[str, Iterator[Row] | None]:
    """Where the rows of a section are on this machine, and them; None where they are not."""
    if isinstance(section, Hub):
        if mirror_folder(section.path) is None:
            return "", None
        where = f"the mirror's {section.path}"
    else:
        where = section.path
        given = Path(section.path).expanduser()
        if not given.exists() and not glob.glob(str(given)):
            return "", None
    found = find_rows(name, section, store)
    images = section.images
    rows = islice(read_rows(name, section, found), _LOOKED_AT)
    if images is None:
        return where, rows
    return where, ({**row, "": found.folder} for row in rows)


def _in_all_splits(section: Hub | Jsonl, rows: Iterator[Row] | None, folder: Path) -> Iterator[Row]:
    """Shortened rows that pass the filter until each split has its share; the first one whatever it is, and some that cannot be read."""
    wanted = Counter(QUOTAS | {_UNREADABLE: 10})
    for number, row in enumerate(rows or ()):
        if number and not _passes(row, section):
            continue
        short, split = _shortened(row, section, folder)
        if not number or wanted[split or _UNREADABLE] > 0:
            wanted[split or _UNREADABLE] -= 1
            yield short
        if not any(wanted[split] > 0 for split in QUOTAS):
            return


def _passes(row: Row, section: Hub | Jsonl) -> bool:
    return all(key in row and row[key] in values for key, values in section.where.items())


def _more(section: Hub | Jsonl, rows: list[Row]) -> Iterator[Row]:
    """Where a real set is small: its rows again under other questions, until each split has enough."""
    wanted = Counter(QUOTAS)
    usable = [row for row in rows if _passes(row, section) and _split(row, section) is not None]
    for row in usable:
        wanted[_split(row, section) or _UNREADABLE] -= 1
    for number in range(5_000) if usable and section.images is None else ():
        again = _renamed(usable[number % len(usable)], section, f" ({number})")
        split = _split(again, section) or _UNREADABLE
        if wanted[split] > 0:
            wanted[split] -= 1
            yield again
        if not any(wanted[split] > 0 for split in QUOTAS):
            return


def _made_rows(section: Hub | Jsonl, folder: Path) -> Iterator[Row]:
    wanted = Counter(QUOTAS)
    for number in count():
        row, split = made_row(section, number, folder, is_wanted=lambda split: wanted[split] > 0)
        if row is not None:
            wanted[split] -= 1
            yield row
        if not any(left > 0 for left in wanted.values()):
            return


def made_row(
    section: Hub | Jsonl, number: int, folder: Path, *, is_wanted: Callable[[str], bool] = lambda split: True
) -> tuple[Row | None, str]:
    """A row with the columns that the section names, and its split; None in place of one in a split that is not wanted."""
    first, second = number % len(_WORDS), number // len(_WORDS) % len(_WORDS)
    asked = f"Question {number}: {' '.join(_WORDS[first:] + _WORDS[:second])}?"
    answer = f"Because of {number}, {' '.join(_WORDS[second:])}, so the answer is #### \\boxed{{{number % 97}}}"
    row: Row = {key: values[number % len(values)] for key, values in section.where.items()}
    if section.messages is not None:
        row[section.messages] = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    elif section.prompt is not None and section.response is not None:
        row |= {section.prompt: asked, section.response: answer}
    elif section.text is not None:
        row[section.text] = f"{asked} {answer}"
    if section.images is None:
        split = split_of((row[section.text] if section.text else asked).strip())
        return (row if is_wanted(split) else None), split
    from PIL import Image as Pictures

    drawn = Pictures.new("RGB", (SIDE, SIDE), ((number * 37) % 256, (number * 101) % 256, (number // 256 * 59) % 256))
    drawn.paste((255, 255, 255), (4, 4, 4 + number % (SIDE - 8) + 1, 10))
    split = split_of(digest_of(drawn))
    if not is_wanted(split):
        return None, split
    return row | {section.images: [_saved(drawn, folder)]}, split


def _saved(picture: Image, folder: Path) -> str:
    """The picture in a file; its path in the folder."""
    (folder / "pictures").mkdir(exist_ok=True)
    name = f"pictures/{digest_of(picture)[:24]}.png"
    picture.save(folder / name)
    return name


def _split(row: Row, section: Hub | Jsonl) -> str | None:
    """The split of a row without images; None if it cannot be read."""
    try:
        if section.text is not None:
            return split_of(str(row[section.text]).strip())
        return split_of(text_of(chat_of(row, section)))
    except (KeyError, RowError):
        return None


def _shortened(row: Row, section: Hub | Jsonl, folder: Path) -> tuple[Row, str | None]:
    """The row with short texts, a chat of one turn, and small pictures in files; and its split, None if it cannot be read."""
    kept = {key: value for key, value in row.items() if key != ""}
    for key in (section.prompt, section.response, section.text):
        if key is not None and isinstance(kept.get(key), str):
            kept[key] = _cut(kept[key])
    if section.messages is not None and isinstance(kept.get(section.messages), list):
        kept[section.messages] = _one_turn(kept[section.messages])
    used = {section.prompt, section.response, section.text, section.messages, section.images, *section.where}
    kept = {key: value for key, value in kept.items() if key in used}
    if section.images is not None and kept.get(section.images):
        return _with_small_pictures(kept, section.images, row.get(""), folder)
    return kept, _split(kept, section)


def _one_turn(messages: list[Any]) -> list[Any]:
    kept = []
    for message in messages:
        kept.append({key: _cut_within(value) for key, value in message.items()} if isinstance(message, dict) else message)
        role = kept[-1].get("role", kept[-1].get("from", "")) if isinstance(kept[-1], dict) else ""
        if role in ("assistant", "gpt") or (isinstance(kept[-1], dict) and "assistant" in kept[-1]):
            return kept
    return kept


def _cut_within(value: Any) -> Any:
    if isinstance(value, str):
        return _cut(value)
    if isinstance(value, list):
        return [
            {**part, "text": _cut(part["text"])} if isinstance(part, dict) and isinstance(part.get("text"), str) else part
            for part in value
        ]
    return value


def _cut(text: str) -> str:
    """The beginning and the end of a text, where its answer may stand, with all places of images that it has."""
    places, plain = text.count(PLACE), text.replace(PLACE, "").encode()
    if len(plain) > _TEXT_BYTES:
        plain = plain[: _TEXT_BYTES - _END_BYTES] + b" " + plain[-_END_BYTES:]
    return PLACE * places + plain.decode(errors="ignore")


def _with_small_pictures(row: Row, field: str, root: Path | None, folder: Path) -> tuple[Row, str | None]:
    """The pictures of a row in files beside the rows; a row whose pictures cannot be had stays as it is, and fails as it would."""
    try:
        with TemporaryDirectory() as kept:
            images = [image.open() for image in images_of(row, field, folder=root, keep=Path(kept), most=64)]
    except RowError:
        return row, None
    for image in images:
        image.thumbnail((2 * SIDE, 2 * SIDE))
    return row | {field: [_saved(image, folder) for image in images]}, split_of(digest_of(images[0]))


def _renamed(row: Row, section: Hub | Jsonl, ending: str) -> Row:
    """The same row, asked otherwise."""
    if section.prompt is not None:
        return row | {section.prompt: f"{row[section.prompt]}{ending}"}
    if section.text is not None:
        return row | {section.text: f"{row[section.text]}{ending}"}
    assert section.messages is not None
    messages = json.loads(json.dumps(row[section.messages]))
    for message in messages:
        for key in ("content", "value", "user"):
            if isinstance(message.get(key), str):
                message[key] += ending
                return row | {section.messages: messages}
    return row
