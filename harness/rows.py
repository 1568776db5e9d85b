"""Rows with fields to sequences: the filter, the fields that hold the text, length limits, and the count of what became of each.

A row that cannot be written is counted and never passed over in silence: the first few are named with their numbers, and above
the section's `max_failed` they are an error. A row belongs to the split of its own text: of its prompt or its first user turn,
so that two answers to one question never part, or of its whole plain text.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from harness.data import Sequence, split_of
from harness.dialogues import RowError, cut_text, render_messages, render_plain
from harness.errors import DataError
from harness.schema_data import Rows

if TYPE_CHECKING:
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
    """What became of the rows of a section, and of the sequences made from them."""

    read: int = 0
    filtered_out: int = 0
    used: int = 0
    failed: int = 0
    too_long: int = 0
    truncated: int = 0
    too_short: int = 0
    failures: list[str] = field(default_factory=list)


class FilteredRows:
    """The rows of `[data.<name>]` that pass its `where`, with their numbers, the first being 1; counts what the caller reports."""

    def __init__(self, name: str, section: Rows, rows: Iterable[dict[str, Any]]) -> None:
        self.name, self.section, self.counts = name, section, RowCounts()
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

    def finish(self) -> None:
        """DataError if there was no row, none that passed the filter, or too large a share of them failed."""
        self._require_fields()
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

    def _require_fields(self) -> None:
        if not self._fields:
            raise DataError(f"data.{self.name}: the source has no rows; give another file or split")
        named = {key: getattr(self.section, key) for key in ("messages", "prompt", "response", "text")}
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


def write_rows(rows: FilteredRows, writer: TokenWriter, *, tokenizer: Any, eos_ids: set[int]) -> None:
    """Append every row that passes to the split of its text; DataError as `FilteredRows.finish`."""
    for number, row in rows:
        try:
            text, sequences = _sequences(row, rows.section, tokenizer, eos_ids)
        except RowError as error:
            rows.fail(number, str(error))
            continue
        split = split_of(text)
        for sequence in sequences:
            fitting = fit(sequence, rows.section, rows.counts)
            if fitting is not None:
                writer.append(split, fitting)
    rows.finish()


def fit(sequence: Sequence, section: Rows, counts: RowCounts) -> Sequence | None:
    """The sequence within the length limits of its section, or None; counted."""
    if len(sequence) < section.shortest:
        counts.too_short += 1
        return None
    if len(sequence) <= section.seq_len:
        return sequence
    cut = Sequence(sequence.token_ids[: section.seq_len], sequence.is_response[: section.seq_len])
    if section.too_long == "drop" or not any(cut.is_response):
        counts.too_long += 1
        return None
    counts.truncated += 1
    return cut


def chat_of(row: dict[str, Any], section: Rows) -> list[dict[str, str]]:
    """The messages of a row; a prompt and its response are one turn. RowError if a field is missing or no text."""
    if section.messages is None:
        assert section.prompt is not None and section.response is not None
        return [
            {"role": "user", "content": _text(row, section.prompt)},
            {"role": "assistant", "content": _text(row, section.response)},
        ]
    messages = row.get(section.messages)
    if not isinstance(messages, list) or not messages:
        raise RowError(f'the field "{section.messages}" holds no list of messages')
    return [_message(message, index) for index, message in enumerate(messages)]


def text_of(messages: list[dict[str, str]]) -> str:
    """The text whose hash decides the split of a chat: its first user turn."""
    asked = [message["content"] for message in messages if message["role"] == "user"]
    return (asked or [messages[0]["content"]])[0].strip()


def _sequences(row: dict[str, Any], section: Rows, tokenizer: Any, eos_ids: set[int]) -> tuple[str, Iterable[Sequence]]:
    if section.text is not None:
        text = _text(row, section.text)
        return text.strip(), cut_text(tokenizer, text, seq_len=section.seq_len, shortest=1)
    messages = chat_of(row, section)
    if section.messages is None and not (section.chat and tokenizer.chat_template):
        return text_of(messages), [render_plain(tokenizer, messages[0]["content"], messages[1]["content"])]
    return text_of(messages), [render_messages(tokenizer, messages, eos_ids)]


def _text(row: dict[str, Any], key: str) -> str:
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise RowError(f'the field "{key}" is missing' if value is None else f'the field "{key}" is no text')
    text = str(value)
    if not text.strip():
        raise RowError(f'the field "{key}" is empty')
    return text


def _message(message: Any, index: int) -> dict[str, str]:
    """role, content and reasoning_content of one message; fields that are None, as parquet fills them, count as absent."""
    given = {key: value for key, value in message.items() if value is not None} if isinstance(message, dict) else {}
    kept = {key: given[key] for key in ("role", "content", "reasoning_content") if key in given}
    if not {"role", "content"} <= kept.keys() or not all(isinstance(value, str) for value in kept.values()):
        raise RowError(f"message {index} is not a role and a content of text")
    return kept
