"""The checkpoint that was scored, copied out of the store. No torch until something is copied.

A copy carries RECORD: which run and variant it is of, what was scored, and the digest of every file. It proves nothing to a stranger, who could
write it too; it is how `harness card` knows that it describes these very files. Hidden, and with no ending of a model's file, it is neither
copied along with a model nor part of its fingerprint.
"""

from __future__ import annotations

from pathlib import Path

from harness.errors import HarnessError, StoreError
from harness.models import folder_fingerprint
from harness.records import SCHEMA, read_run
from harness.store import Store, cache_folder, disk_errors, file_digests, write_json

RECORD = ".harness-export"
OUTSIDE = "outside the store"


def export(run: Path, variant: str, out: Path, layout: str | None) -> list[str]:
    """Copy the checkpoint of `variant` in the run folder `run` to `out`; returns what to tell the user.

    Raises:
        HarnessError: no such variant, or a layout for a variant that is not quantized.
        StoreError: the checkpoint is not in the store any more, or cannot be written.
    """
    record = read_run(run)
    variants = {found["name"]: found for found in record["variants"]}
    if variant not in variants:
        raise HarnessError(f"{run}: has no variant {variant!r}. Known: {', '.join(variants)}")
    store = Store(cache_folder())
    folder, key = _folder(run, variants[variant], store)
    from qad.export import copy_checkpoint
    from qad.layouts import LAYOUTS
    from qad.packed import read_config, scheme_of

    chosen = next((name for name in LAYOUTS if name == layout), None)
    if layout is not None and chosen is None:
        raise HarnessError(f"--layout {layout}: unknown. Known: {', '.join(LAYOUTS)}")
    with disk_errors(f"the export {out}"):
        changed = copy_checkpoint(folder, out, layout=chosen)
    scheme = scheme_of(out, read_config(out))
    with disk_errors(f"the export {out}"):
        write_json(
            out / RECORD,
            {
                "schema": SCHEMA,
                **{key: record[key] for key in ("suite", "run")},
                "variant": variant,
                "checkpoint": variants[variant]["checkpoint"],
                "fingerprint": folder_fingerprint(folder, store) if key == OUTSIDE else None,
                "layout": scheme.layout if scheme else None,
                "scales_changed": changed,
                "files": file_digests(out),
            },
        )
    said = [f"{variant} ({key}) is in {out}, layout: {scheme.layout if scheme else 'none (BF16)'}"]
    if changed:
        said.append(
            f"{changed} scales changed in their last bit: compressed-tensors stores reciprocals, and 1/(1/s) is not always s. The scored "
            'checkpoint has the other layout; tensor_scale = "power_of_two" has no such difference'
        )
    return said


def _folder(run: Path, variant: dict[str, object], store: Store) -> tuple[Path, str]:
    checkpoint = variant.get("checkpoint")
    if not isinstance(checkpoint, dict):
        raise StoreError(
            f"{run}: the checkpoint of {variant['name']} was not made yet; run the suite again, it goes on from there"
        )
    if "folder" in checkpoint:
        folder = Path(str(checkpoint["folder"]))
        if not folder.is_dir():
            raise StoreError(f"{folder}: the files of {variant['name']} are not there any more; it lay outside the store")
        return folder, OUTSIDE
    stored = store.find(str(checkpoint["stage"]), digest=str(checkpoint["digest"]))
    if stored is None:
        raise StoreError(
            f"{run}: the checkpoint of {variant['name']} (stage {checkpoint['stage']}) is not in the cache {cache_folder()} any more; "
            "set HARNESS_CACHE, or run the suite again: it makes what is missing"
        )
    return stored.folder, f"stage {checkpoint['stage']}"
