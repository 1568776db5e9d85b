"""Finished stages, carried from the machine that made them to another: `harness stage export` and `harness stage import`. No torch.

<folder>/export.json           what was asked for, the stages in order (inputs first), and the digest of each one's record
<folder>/<key>/stage.json      as in the store
<folder>/<key>/files/

An export holds the stage and everything that it was made of, as far as that lies in the store: a model that is used where it lies does
not travel, the other machine has it too. Digests guard against damage, not against malice: import what you would run.
Which planned stage an imported one serves is decided in `done.py`.
"""

from __future__ import annotations

import difflib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from harness.errors import StoreError
from harness.store import (
    SCHEMA,
    Store,
    StoredStage,
    combined_digest,
    disk_errors,
    file_digests,
    make_folder,
    sha256,
    write_json,
)

SCORES = ("evaluate", "judge", "score", "diagnostics")
"""Kinds of stage that are not asked for by name: scores are made where they are read."""
_NEEDED = (
    "kind",
    "label",
    "sections",
    "numerics",
    "inputs",
    "input_keys",
    "result",
    "seconds",
    "peak_memory_bytes",
    "provenance",
)


def export_stage(key: str, out: Path, store: Store) -> list[str]:
    """Copy the stage whose key begins with `key`, and all that it was made of, into the folder `out`; returns what to tell the user.

    Raises:
        StoreError: no such stage, or several; an input that is gone or was made again; `out` is not empty or cannot be written.
    """
    chosen = _stage_of(key, store)
    stages = _closure(chosen, store)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise StoreError(f"{out}: is there and not empty; give a folder that is missing or empty")
    partial = out.with_name(f".{out.name}.{os.getpid()}")
    with disk_errors(f"the export {out}"):
        make_folder(out.parent, "the folder of the export")
        try:
            for stage in stages:
                shutil.copytree(stage.folder.parent, partial / stage.record["key"])
            records = {stage.record["key"]: sha256(partial / stage.record["key"] / "stage.json") for stage in stages}
            write_json(
                partial / "export.json",
                {"schema": SCHEMA, "stage": chosen.record["key"], "order": list(records), "records": records},
            )
            os.replace(partial, out)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    return [
        *_listed(stages),
        f"{len(stages)} stages, {size / 1e6:,.1f} MB, are in {out}; there: harness stage import {out.name}",
    ]


def import_stages(folder: Path, store: Store) -> list[str]:
    """Bring the stages of an export into the store, all of them or none; returns what to tell the user.

    Raises:
        StoreError: not an export, or a file of it is missing, damaged or foreign.
    """
    about = _export_record(folder)
    imported, partial = store.root / "imported", store.root / "stages" / f".partial-import-{os.getpid()}"
    with disk_errors(f"the stage cache {store.root}"):
        make_folder(imported, "the stage cache")
        try:
            for key in about["order"]:
                _require_whole(folder / key, about["records"][key])
                shutil.copytree(folder / key, partial / key)
                _require_whole(partial / key, about["records"][key])
            for key in about["order"]:
                shutil.rmtree(imported / key, ignore_errors=True)
                os.replace(partial / key, imported / key)
                os.utime(imported / key)  # the newest import is taken where several match
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    found = [stage for key in about["order"] if (stage := store.read(imported / key)) is not None]
    return [
        *_listed(found),
        f"{len(found)} stages are imported; harness plan SUITE shows which of its stages they serve. To undo: delete {imported}",
    ]


def _stage_of(prefix: str, store: Store) -> StoredStage:
    """The stored or imported stage whose key begins with `prefix`."""
    folders = {path.name: path for where in ("stages", "imported") for path in sorted((store.root / where).glob("[0-9a-f]*"))}
    keys = [key for key in folders if key.startswith(prefix)] if prefix else []
    if len(keys) != 1:
        near = keys or difflib.get_close_matches(prefix, [key[: len(prefix)] for key in folders], n=3, cutoff=0.5)
        rows = [f"{key[:12]} ({_label(folders[key])})" for key in folders if key.startswith(tuple(near))][:5] if near else []
        what = "several stages begin with it" if keys else "no stored stage begins with it"
        hint = f": {', '.join(rows)}" if keys else f"; near: {', '.join(rows)}" if rows else ""
        raise StoreError(
            f"stage {prefix!r}: {what}{hint}. harness plan SUITE prints the keys of its stages; the cache is {store.root}"
        )
    found = store.read(folders[keys[0]])
    if found is None:
        raise StoreError(
            f"stage {keys[0]}: its files in {folders[keys[0]]} are damaged; run the suite again, it makes the stage anew"
        )
    if found.record["kind"] in SCORES:
        raise StoreError(
            f"stage {keys[0]}: is of kind {found.record['kind']}; scores are made where they are read. "
            "Export the stage that made the checkpoint (quantize or train)"
        )
    return found


def _closure(stage: StoredStage, store: Store) -> list[StoredStage]:
    """The stage and all that it was made of, inputs first, each once."""
    missing = [name for name in _NEEDED if name not in stage.record]
    if missing:
        raise StoreError(
            f"stage {stage.record['key']}: its record lacks {', '.join(missing)}, so it was made by an older version; "
            f"delete {stage.folder.parent} and run the suite again"
        )
    found: dict[str, StoredStage] = {}
    for role, key in stage.record["input_keys"].items():
        given = store.find(key, digest=stage.record["inputs"][role])
        if given is None:
            raise StoreError(
                f"stage {stage.record['key']}: its {role} ({key}) is not in the store any more, or was made again with other bytes; "
                "run the suite again, then export"
            )
        found |= {each.record["key"]: each for each in _closure(given, store)}
    return [*found.values(), stage]


def _export_record(folder: Path) -> dict[str, Any]:
    path = folder / "export.json"
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        is_ours = about["schema"] == SCHEMA and set(about["order"]) == set(about["records"])
        is_ours = is_ours and all(set(key) <= set("0123456789abcdef") and key for key in about["order"])
    except OSError as error:
        raise StoreError(f"{path}: cannot be read ({error.strerror}); give a folder that harness stage export wrote") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(f"{path}: damaged or not an export of this version ({error}); nothing was imported") from error
    if not is_ours:
        raise StoreError(
            f"{path}: not an export of this version (schema {about['schema']}, here {SCHEMA}); nothing was imported"
        )
    return dict(about)


def _require_whole(stage: Path, record_digest: str) -> None:
    """Raise unless the record is the one that was exported and the files are exactly those it lists."""
    links = [path for path in stage.rglob("*") if path.is_symlink()]
    if links:
        raise StoreError(f"{links[0]}: is a link, and an export has none; nothing was imported")
    record_file = stage / "stage.json"
    if not record_file.is_file() or sha256(record_file) != record_digest:
        raise StoreError(f"{record_file}: missing or damaged (sha256 differs); nothing was imported. Copy the export again")
    record = json.loads(record_file.read_text(encoding="utf-8"))
    if record.get("key") != stage.name or any(name not in record for name in (*_NEEDED, "files", "digest")):
        raise StoreError(f"{record_file}: not the record of stage {stage.name}; nothing was imported")
    present = file_digests(stage / "files")
    wrong = sorted(name for name in {*present, *record["files"]} if present.get(name) != record["files"].get(name))
    if wrong or combined_digest(present) != record["digest"]:
        raise StoreError(
            f"{stage / 'files'}: {', '.join(wrong) or 'the list of files'}: missing, damaged (sha256 differs) or foreign; "
            "nothing was imported. Copy the export again"
        )


def _label(stage: Path) -> str:
    try:
        return str(json.loads((stage / "stage.json").read_text())["label"])
    except (OSError, ValueError, KeyError):
        return "unreadable"


def _listed(stages: list[StoredStage]) -> list[str]:
    return [
        f"  {stage.record['key'][:12]}  {stage.record['label']}, made on {stage.record['provenance']['device']}"
        for stage in stages
    ]
