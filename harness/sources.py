"""From a `[data.<name>]` section to the token batches of its stage: what identifies a source, and what makes its sequences.

Finding a source reads no rows and imports neither torch nor datasets, so that planning stays fast.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from harness import builtin
from harness.data import SPLITS, Sequence, split_of
from harness.errors import DataError
from harness.generation import Ask, bos_asks, row_asks, turn_ask
from harness.numerics import versions
from harness.provenance import package_versions
from harness.row_files import RowFiles, find_rows, read_rows
from harness.rows import FilteredRows, write_rows
from harness.schema_data import Bos, Builtin, Data, Drawings, Generated, Hub, Jsonl, Mix, RandomTokens, Rows, Teacher, Tunnel
from harness.store import Store
from harness.tunnel_source import tunnel_asks, write_tunnel

if TYPE_CHECKING:
    from harness.processor import Processor
    from harness.token_store import StoredSequences, TokenWriter

_WHERE_FROM = {"path", "revision"}
"""Keys that say where rows are: their fingerprint stands in a key instead."""
_ABOUT_PROMPTS = {"source", "messages", "prompt", "response", "chat", "where", "max_rows", "max_failed", "subset", "split"}
"""Keys of a section of rows that decide which prompts it has; `images` besides, where it has any."""


@dataclass(frozen=True)
class TextSource:
    """A data section, the files of its rows, and the source of its prompts. seq_len: no sequence of it is longer."""

    name: str
    section: Data
    seq_len: int
    files: RowFiles | None = None
    prompts: TextSource | None = None

    @property
    def asks_about_images(self) -> bool:
        """Whether the model is shown images while it writes this text."""
        asked = self.prompts.section if self.prompts is not None else None
        return isinstance(asked, Drawings) or (isinstance(asked, Rows) and asked.images is not None)


def find_source(name: str, sections: Mapping[str, Data], store: Store, *, missing: list[str] | None = None) -> TextSource:
    """The section `name` with what it reads; DataError if that is nowhere, or a line of it in `missing` where that is given."""
    section = sections[name]
    files = _rows(name, section, store, missing) if isinstance(section, Hub | Jsonl) else None
    prompts = find_source(section.prompts, sections, store, missing=missing) if isinstance(section, Teacher) else None
    return TextSource(name, section, _seq_len(name, sections), files, prompts)


def _rows(name: str, section: Hub | Jsonl, store: Store, missing: list[str] | None) -> RowFiles:
    try:
        return find_rows(name, section, store)
    except DataError as error:
        if missing is None:
            raise
        missing.append(str(error))
        return RowFiles((), "missing")


def _seq_len(name: str, sections: Mapping[str, Data]) -> int:
    section = sections[name]
    return max(_seq_len(part.data, sections) for part in section.parts) if isinstance(section, Mix) else section.seq_len


def identity(source: TextSource) -> dict[str, Any]:
    """The sections of a data stage: everything that decides its sequences, beside the model with its tokenizer."""
    section = source.section
    if isinstance(section, Mix):
        weights = [part.weight for part in section.parts]
        return {"data": {"source": "mix", "seed": section.seed, "seq_len": source.seq_len, "weights": weights}}
    about: dict[str, Any] = {"data": section.model_dump(mode="json", exclude=_WHERE_FROM | {"prompts"} | _unset(section))}
    if isinstance(section, Builtin):
        about["text"] = builtin.builtin_fingerprint()
    if source.files is not None:
        about["rows"] = source.files.fingerprint
    if isinstance(section, Generated):
        about["engine"] = {"kind": section.engine, "args": section.engine_args}
        about["generation"] = {"numerics": versions()["generate"], "packages": package_versions(("torch",))}
    if source.prompts is not None:
        about["prompts"] = _identity_of_prompts(source.prompts)
    return about


def _identity_of_prompts(source: TextSource) -> dict[str, Any]:
    if isinstance(source.section, Builtin):
        return {"source": "builtin", "seed": source.section.seed}
    if isinstance(source.section, Drawings):
        return {"source": "drawings", "seed": source.section.seed, "pictures": source.section.pictures}
    if isinstance(source.section, Tunnel):
        return source.section.model_dump(mode="json", exclude={"seq_len"})
    assert source.files is not None
    keys = (_ABOUT_PROMPTS | {"images"}) - _unset(source.section)
    return {**source.section.model_dump(mode="json", include=keys), "rows": source.files.fingerprint}


def _unset(section: Data) -> set[str]:
    """Keys that say nothing where they are not given: text rows are what they were before rows had images."""
    return {"images"} if isinstance(section, Rows) and section.images is None else set()


@dataclass(frozen=True)
class Surroundings:
    """What a source may need to make its sequences.

    parts: for a mix, the stored splits of its parts, in their order.
    generate: for text that the model writes, `(section, asks, writer)` to what the record says of it.
    processor: of an image-text model.
    """

    tokenizer: Any
    eos_ids: set[int]
    parts: list[dict[str, StoredSequences]]
    generate: Callable[[Generated, Iterator[Ask], TokenWriter], dict[str, Any]]
    processor: Processor | None = None


def write_source(source: TextSource, writer: TokenWriter, given: Surroundings) -> dict[str, Any]:
    """Append the sequences of a source to `writer`; returns what the record of the stage says beside their counts.

    Raises:
        DataError: rows, a filter or a template that give no text, or too little of it.
    """
    section = source.section
    if isinstance(section, Builtin):
        splits = builtin.builtin_sequences(
            given.tokenizer, seq_len=section.seq_len, seed=section.seed, eos_ids=given.eos_ids, processor=given.processor
        )
        for split, sequences in splits.items():
            for sequence in sequences:
                writer.append(split, sequence)
        return {}
    if isinstance(section, Drawings):
        from harness.drawn import write_drawings  # here, since what only plans a suite draws nothing

        processor = _processor_of(source.name, given)
        return {"drawings": write_drawings(source.name, section, writer, processor=processor, eos_ids=given.eos_ids)}
    if isinstance(section, Tunnel):
        return {"tunnel": write_tunnel(source.name, section, writer, tokenizer=given.tokenizer, eos_ids=given.eos_ids)}
    if isinstance(section, Mix):
        return _write_mix(source.name, section, writer, given.parts)
    if isinstance(section, RandomTokens):
        return _write_random_tokens(section, writer, given)
    if isinstance(section, Rows):
        rows = _rows_of(source, given)
        write_rows(rows, writer, tokenizer=given.tokenizer, eos_ids=given.eos_ids, processor=given.processor)
        return {"rows": rows.record()}
    if isinstance(section, Bos):
        return given.generate(section, bos_asks(source.name, given.tokenizer), writer)
    assert source.prompts is not None
    return _write_teacher(source, source.prompts, section, writer, given)


def _rows_of(source: TextSource, given: Surroundings) -> FilteredRows:
    section = source.section
    assert isinstance(section, Hub | Jsonl) and source.files is not None
    if section.images is not None:
        _processor_of(source.name, given)
    return FilteredRows(source.name, section, read_rows(source.name, section, source.files), folder=source.files.folder)


def _processor_of(name: str, given: Surroundings) -> Processor:
    if given.processor is None:
        raise DataError(f'data.{name}: has images, and the model takes none; set model.kind = "image-text" if it does')
    return given.processor


def _write_teacher(
    source: TextSource, prompts: TextSource, section: Teacher, writer: TokenWriter, given: Surroundings
) -> dict[str, Any]:
    if isinstance(prompts.section, Builtin):
        turns = enumerate(builtin.generated_turns(prompts.section.seed), start=1)
        questions = (turn_ask(number, turn, given.tokenizer, processor=given.processor) for number, turn in turns)
        return given.generate(section, questions, writer)
    if isinstance(prompts.section, Tunnel):
        return given.generate(section, tunnel_asks(prompts.name, prompts.section, given.tokenizer), writer)
    if isinstance(prompts.section, Drawings):
        from harness.drawn import drawing_asks

        asks = drawing_asks(prompts.name, prompts.section, processor=_processor_of(prompts.name, given), images=writer.images)
        return given.generate(section, asks, writer)
    rows = _rows_of(prompts, given)
    asks = row_asks(rows, given.tokenizer, processor=given.processor, images=writer.images)
    found = given.generate(section, asks, writer)
    rows.finish()
    return found | {"rows": rows.record()}


def _write_mix(name: str, section: Mix, writer: TokenWriter, parts: list[dict[str, StoredSequences]]) -> dict[str, Any]:
    """Each step takes the next sequence of the part that is furthest behind its weight; it ends where that part has none left."""
    record: dict[str, Any] = {"tokens_of_parts": {}, "tokens_left": {}}
    for split in SPLITS:
        lengths = [part[split].lengths for part in parts]
        taken, read = [0] * len(parts), [0] * len(parts)
        while True:
            behind = min(range(len(parts)), key=lambda i: taken[i] / section.parts[i].weight)
            if read[behind] == len(lengths[behind]):
                break
            writer.append(split, parts[behind][split][read[behind]])
            taken[behind] += int(lengths[behind][read[behind]])
            read[behind] += 1
        record["tokens_of_parts"][split] = taken
        record["tokens_left"][split] = [int(each.sum()) - n for each, n in zip(lengths, taken, strict=True)]
        if split == "train":
            used_up = section.parts[behind].data
    return record | {"used_up_first": used_up}


def _write_random_tokens(section: RandomTokens, writer: TokenWriter, given: Surroundings) -> dict[str, Any]:
    tokenizer = given.tokenizer
    special = set(tokenizer.all_special_ids) | {int(i) for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    special |= set() if given.processor is None else {given.processor.image_token_id}
    vocabulary = sorted(set(tokenizer.get_vocab().values()) - special)
    rng = random.Random(f"random tokens {section.seed}")
    for start in range(0, section.tokens, section.seq_len):
        token_ids = tuple(rng.choices(vocabulary, k=min(section.seq_len, section.tokens - start)))
        writer.append(split_of(repr(token_ids)), Sequence(token_ids, (True,) * len(token_ids)))
    return {"vocabulary": len(vocabulary)}
