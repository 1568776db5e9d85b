"""The first sheet of an .xlsx workbook as rows: what evaluation tools write, nothing more. Source: ECMA-376, part 1, 18.3 and 18.4."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from harness.errors import DataError

_SPACE = "{http://schemas.openxmlformats.org/spreadsheetml/2006/main}"


def read_xlsx(path: Path) -> list[dict[str, Any]]:
    """A dictionary a row, named by the first row; empty cells are left out. DataError if it is no such workbook.

    Text stays text, numbers become int or float, truth values bool. Dates and formats are not read.
    """
    try:
        with zipfile.ZipFile(path) as book:
            names = sorted(n for n in book.namelist() if re.fullmatch(r"xl/worksheets/sheet\d+\.xml", n))
            strings = _strings(book.read("xl/sharedStrings.xml")) if "xl/sharedStrings.xml" in book.namelist() else []
            sheet = ElementTree.fromstring(book.read(min(names, key=lambda n: int(re.findall(r"\d+", n)[-1]))))
        rows = [dict(_cells(row, strings)) for row in sheet.iter(f"{_SPACE}row")]
    except (OSError, zipfile.BadZipFile, ElementTree.ParseError, KeyError, ValueError, IndexError) as error:
        raise DataError(f"{path}: cannot be read as an .xlsx workbook ({error}); save it as .tsv and give that") from error
    if not rows:
        return []
    heads = {column: str(name) for column, name in rows[0].items()}
    return [{heads[column]: value for column, value in row.items() if column in heads} for row in rows[1:]]


def _strings(data: bytes) -> list[str]:
    return [_text(item) for item in ElementTree.fromstring(data).iter(f"{_SPACE}si")]


def _text(node: ElementTree.Element) -> str:
    """The text of a string item, over its formatted pieces; phonetic hints are no part of it."""
    pieces = [piece for piece in node if piece.tag in (f"{_SPACE}t", f"{_SPACE}r")]
    return "".join((part.text or "") for piece in pieces for part in piece.iter(f"{_SPACE}t"))


def _cells(row: ElementTree.Element, strings: list[str]) -> Iterator[tuple[str, Any]]:
    for number, cell in enumerate(row.iter(f"{_SPACE}c")):
        column = re.sub(r"\d", "", cell.get("r", "")) or str(number)
        kind, value, inline = cell.get("t", "n"), cell.find(f"{_SPACE}v"), cell.find(f"{_SPACE}is")
        if kind == "inlineStr" and inline is not None:
            yield column, _text(inline)
        elif value is not None and value.text is not None:
            yield column, _value(kind, value.text, strings)


def _value(kind: str, text: str, strings: list[str]) -> Any:
    if kind == "s":
        return strings[int(text)]
    if kind == "b":
        return text == "1"
    if kind == "n":
        return int(text) if re.fullmatch(r"-?\d+", text) else float(text)
    return text
