"""The work of a data stage: a source's sequences into its token store, with an engine where the model writes them itself."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import loading
from harness.data import SPLITS
from harness.engines.serving import Serving
from harness.generation import Ask, generate
from harness.journal import Journal
from harness.models import folder_fingerprint
from harness.plan import Stage
from harness.processor import Processor
from harness.provenance import device_kind, what_opens_images
from harness.schema import Engine
from harness.schema_data import Builtin, Generated
from harness.sources import Surroundings, write_source
from harness.store import Store
from harness.token_store import StoredSequences, TokenWriter
from qad.checkpoint import Loaded


@dataclass(frozen=True)
class DataWork:
    """What the stage is done with: the BF16 model's folder, its tokenizer and a way to load it, and where responses are kept.

    processor: of an image-text model, whose tokenizer is `tokenizer` then. trust_remote_code: as the suite says of the model.
    """

    model: Path
    tokenizer: Any
    load: Callable[[], Loaded]
    parts: list[Path]
    journals: Path
    store: Store
    processor: Processor | None = None
    trust_remote_code: bool = False


def serving_of(section: Generated, work: DataWork) -> Serving:
    """What serves the model that a section's text is written by."""
    return Serving(Engine(kind=section.engine, args=section.engine_args), trust_remote_code=work.trust_remote_code)


def make_data(stage: Stage, folder: Path, work: DataWork, advance: Callable[[int, int, str], None]) -> dict[str, Any]:
    """Write the token store of a stage of kind "data" into `folder`; returns what its record says.

    The builtin source is ordered by the hash of its tokens alone, others by that of their seed and tokens.
    """
    source = stage.text
    assert source is not None
    salt = "" if isinstance(source.section, Builtin) else f"{source.section.seed} "
    parts = [{split: StoredSequences(part, split) for split in SPLITS} for part in work.parts]

    def write_generated(section: Generated, asks: Iterator[Ask], writer: TokenWriter) -> dict[str, Any]:
        with contextlib.closing(serving_of(section, work)) as serving:
            serving.require(work.model)
            engine = serving.engine(stage.inputs["model"].key, work.model, work.load)
            protocol = {
                "weights": folder_fingerprint(work.model, work.store),
                "task": f"data-{section.source}",
                "kernels": engine.kernels,
                "device": device_kind(),
                **stage.sections["generation"],
                **what_opens_images(source.asks_about_images),
                **engine.protocol,
            }
            with Journal(work.journals, protocol) as journal:
                return generate(
                    source.name,
                    section,
                    asks,
                    writer,
                    engine=engine,
                    journal=journal,
                    on_progress=lambda done, total: advance(done, total, ""),
                    processor=work.processor,
                )

    eos_ids = loading.eos_ids(work.model, work.tokenizer)
    given = Surroundings(work.tokenizer, eos_ids, parts, write_generated, work.processor)
    with TokenWriter(folder, salt=salt) as writer:
        found = write_source(source, writer, given)
    return {"splits": writer.counts, **found}


def what_became(record: dict[str, Any]) -> str | None:
    """What became of the rows and of the responses that `make_data` read, in a line; None for a source that has neither."""
    parts = []
    if rows := record.get("rows"):
        failed = "; ".join(" ".join(reason.split()) for reason in rows["failures"])
        counts = _counts({what: n for what, n in rows.items() if what != "failures"})
        parts.append(f"rows: {counts}" + (f" (the first failed: {failed})" if failed else ""))
    if responses := record.get("responses"):
        parts.append(f"responses: {_counts(responses)}")
    return "; ".join(parts) or None


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{what.replace('_', ' ')} {n:,}" for what, n in counts.items())
