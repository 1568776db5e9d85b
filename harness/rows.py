"""Rows with fields to sequences: the filter, the fields that hold the text, length limits, and the count of what became of each.

A row that cannot be written is counted and never passed over in silence: the first few are named with their numbers, and above
the section's `max_failed` they are an error. A row belongs to the split of its own text: of its prompt or its first user turn,
so that two answers to one question never part, or of its whole plain text; one with images to that of its first image, whatever is asked
about it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.data import Sequence, split_of
from harness.dialogues import (
    RowError,
    cut_text,
    has_template,
    render_messages,
    render_plain,
    require_no_image_token,
    require_template,
)
from harness.errors import DataError
from harness.images import Image
from harness.row_chats import Message, chat_of, text_in, text_of, with_places
from harness.row_images import images_of
from harness.schema_data import Rows

if TYPE_CHECKING:
    from harness.processor import Processor
    from harness.token_store import TokenWriter

N_NAMED = 5
"""Failed rows that are named, and values of a filtered field."""
N_LOOKED_AT = 1000
"""Rows after which a field that none of them has is an error."""
N_HOPELESS = 200
"""Rows after which it is an error that all of them failed."""
_MOST_VALUES = 10_000


@dataclass
class RowCounts:
    """What became of the rows of a section, and of the sequences made from them. text_only: of a section with images, rows without any."""

    read: int = 0
    filtered_out: int = 0
    used: int = 0
    failed: int = 0
    too_long: int = 0
    truncated: int = 0
    too_short: int = 0
    with_images: int = 0
    text_only: int = 0
    failures: list[str] = field(default_factory=list)


class FilteredRows:
    """The rows of `[data.<name>]` that pass its `where`, with their numbers, the first being 1; counts what the caller reports.

    folder: where the files are that rows name.
    """

    def __init__(self, name: str, section: Rows, rows: Iterable[dict[str, Any]], *, folder: Path | None = None) -> None:
        self.name, self.section, self.counts, self.folder = name, section, RowCounts(), folder
        self._rows = rows
        self._fields: set[str] = set()
        self._seen: dict[str, Counter[str]] = {key: Counter() for key in section.where}

    def __iter__(self) -> Iterator[tuple[int, dict[str, Any]]]:
        for number, row in enumerate(self._rows, start=1):
            self.counts.read += 1
            self._fields.update(row)
            if number == N_LOOKED_AT:
                self._require_fields()
            if not self._passes(row):
                self.counts.filtered_out += 1
                continue
            self.counts.used += 1
            yield number, row
            if self.counts.used == self.section.max_rows:
                return

    def fail(self, number: int, reason: str) -> None:
        """Count a row that could not be used; DataError if so many rows in sequence began the source that it is hopeless."""
        self.counts.failed += 1
        if len(self.counts.failures) < N_NAMED:
            self.counts.failures.append(f"row {number}: {reason}")
        if self.counts.failed == self.counts.used == N_HOPELESS:
            self._raise_failed()

    def record(self) -> dict[str, Any]:
        """The counts as the record of the stage holds them."""
        of_images = {"with_images", "text_only"}
        return {key: value for key, value in asdict(self.counts).items() if self.section.images or key not in of_images}

    def finish(self) -> None:
        """DataError if there was no row, none that passed the filter, or too large a share of them failed."""
        self._require_fields("images")
        if not self.counts.used:
            raise DataError("\n".join(self._nothing_passed()))
        if self.counts.failed > self.section.max_failed * self.counts.used:
            self._raise_failed()

    def _passes(self, row: dict[str, Any]) -> bool:
        is_wanted = True
        for key, wanted in self.section.where.items():
            seen = self._seen[key]
            if key in row and len(seen) < _MOST_VALUES:
                seen[repr(row[key])] += 1
            is_wanted = is_wanted and key in row and row[key] in wanted
        return is_wanted

    def _require_fields(self, *others: str) -> None:
        """`others`: keys whose field the first rows may lack."""
        if not self._fields:
            raise DataError(f"data.{self.name}: the source has no rows; give another file or split")
        named = {key: getattr(self.section, key) for key in ("messages", "prompt", "response", "text", *others)}
        named |= {f"where.{key}": key for key in self.section.where}
        for key, wanted in named.items():
            if wanted is not None and wanted not in self._fields:
                known = ", ".join(sorted(self._fields))
                raise DataError(f'data.{self.name}.{key}: no row has the field "{wanted}"; rows have: {known}')

    def _nothing_passed(self) -> Iterator[str]:
        for key, wanted in self.section.where.items():
            common = ", ".join(f"{value} ({count:,})" for value, count in self._seen[key].most_common(N_NAMED))
            yield (
                f"data.{self.name}.where.{key}: no row of {self.counts.read:,} passes the filter; wanted: "
                f"{', '.join(map(repr, wanted))}; the most common values seen: {common}. Give values that rows have (of several keys all "
                "must fit one row), or remove the key"
            )

    def _raise_failed(self) -> None:
        counts = self.counts
        raise DataError(
            f"data.{self.name}: {counts.failed:,} of {counts.used:,} rows failed, more than the share max_failed = "
            f"{self.section.max_failed:g} allows; the first: {'; '.join(counts.failures)}. Mend or filter them, or raise max_failed"
        )


def write_rows(
    rows: FilteredRows, writer: TokenWriter, *, tokenizer: Any, eos_ids: set[int], processor: Processor | None = None
) -> None:
    """Append every row that passes to the split of its text or image; DataError as `FilteredRows.finish`.

    processor: of an image-text model; a section with images needs it.
    """
    section = rows.section
    if section.images is not None:
        require_template(tokenizer, processor)
    for number, row in rows:
        try:
            if section.text is not None:
                belongs, sequences = _pieces(row, section, tokenizer, processor)
            else:
                messages, images = chat_and_images(row, rows, writer.images)
                belongs, sequences = (
                    place_of(messages, images),
                    [_chat(messages, images, section, tokenizer, eos_ids, processor)],
                )
        except RowError as error:
            rows.fail(number, str(error))
            continue
        for sequence in sequences:
            fitting = fit(sequence, section, rows.counts)
            if fitting is not None:
                writer.append(split_of(belongs), fitting)
    rows.finish()


def fit(sequence: Sequence, section: Rows, counts: RowCounts) -> Sequence | None:
    """The sequence within the length limits of its section, or None; counted. One with images is not cut."""
    if len(sequence) < section.shortest:
        counts.too_short += 1
        return None
    if len(sequence) <= section.seq_len:
        return sequence
    cut = Sequence(sequence.token_ids[: section.seq_len], sequence.is_response[: section.seq_len])
    if section.too_long == "drop" or sequence.images or not any(cut.is_response):
        counts.too_long += 1
        return None
    counts.truncated += 1
    return cut


def chat_and_images(row: dict[str, Any], rows: FilteredRows, keep: Path) -> tuple[list[Message], tuple[Image, ...]]:
    """The chat of a row with a place for each of its images, which are stored in the folder `keep`. RowError if it has none, or not these."""
    section = rows.section
    messages = chat_of(row, section)
    if section.images is None:
        return messages, ()
    images = images_of(row, section.images, folder=rows.folder, keep=keep, most=section.seq_len)
    messages = with_places(messages, len(images))
    rows.counts.with_images += bool(images)
    rows.counts.text_only += not images
    return messages, images


def place_of(messages: list[Message], images: tuple[Image, ...]) -> str:
    """What decides the split of a chat."""
    return images[0].digest if images else text_of(messages)


def _pieces(row: dict[str, Any], section: Rows, tokenizer: Any, processor: Processor | None) -> tuple[str, Iterable[Sequence]]:
    assert section.text is not None
    text = text_in(row, section.text)
    if processor is not None and processor.image_token in text:
        raise RowError(f"the text holds {processor.image_token}, which stands for an image, and there is none")
    return text.strip(), cut_text(tokenizer, text, seq_len=section.seq_len, shortest=1)


def _chat(
    messages: list[Message],
    images: tuple[Image, ...],
    section: Rows,
    tokenizer: Any,
    eos_ids: set[int],
    processor: Processor | None,
) -> Sequence:
    if section.messages is None and not (section.chat and has_template(tokenizer, processor)):
        plain = render_plain(tokenizer, messages[0]["content"], messages[1]["content"])
        require_no_image_token(plain.token_ids, processor)
        return plain
    return render_messages(tokenizer, messages, eos_ids, processor=processor, images=images)
