"""The checkpoint that was scored, copied out of the store. No torch until something is copied."""

from __future__ import annotations

from pathlib import Path

from harness.errors import HarnessError, StoreError
from harness.records import read_json
from harness.store import Store, cache_folder, disk_errors


def export(run: Path, variant: str, out: Path, layout: str | None) -> list[str]:
    """Copy the checkpoint of `variant` in the run folder `run` to `out`; returns what to tell the user.

    Raises:
        HarnessError: no such variant, or a layout for a variant that is not quantized.
        StoreError: the checkpoint is not in the store any more, or cannot be written.
    """
    record = read_json(run / "run.json")
    variants = {found["name"]: found for found in record["variants"]}
    if variant not in variants:
        raise HarnessError(f"{run}: has no variant {variant!r}. Known: {', '.join(variants)}")
    folder, key = _folder(run, variants[variant])
    from qad.export import copy_checkpoint
    from qad.layouts import LAYOUTS
    from qad.packed import read_config, scheme_of

    chosen = next((name for name in LAYOUTS if name == layout), None)
    if layout is not None and chosen is None:
        raise HarnessError(f"--layout {layout}: unknown. Known: {', '.join(LAYOUTS)}")
    with disk_errors(f"the export {out}"):
        changed = copy_checkpoint(folder, out, layout=chosen)
    scheme = scheme_of(out, read_config(out))
    said = [f"{variant} ({key}) is in {out}, layout: {scheme.layout if scheme else 'none (BF16)'}"]
    if changed:
        said.append(
            f"{changed} scales changed in their last bit: compressed-tensors stores reciprocals, and 1/(1/s) is not always s. The scored "
            'checkpoint has the other layout; tensor_scale = "power_of_two" has no such difference'
        )
    return said


def _folder(run: Path, variant: dict[str, object]) -> tuple[Path, str]:
    checkpoint = variant.get("checkpoint")
    if not isinstance(checkpoint, dict):
        raise StoreError(
            f"{run}: the checkpoint of {variant['name']} was not made yet; run the suite again, it goes on from there"
        )
    if "folder" in checkpoint:
        folder = Path(str(checkpoint["folder"]))
        if not folder.is_dir():
            raise StoreError(f"{folder}: the files of {variant['name']} are not there any more; it lay outside the store")
        return folder, "outside the store"
    stored = Store(cache_folder()).find(str(checkpoint["stage"]), digest=str(checkpoint["digest"]))
    if stored is None:
        raise StoreError(
            f"{run}: the checkpoint of {variant['name']} (stage {checkpoint['stage']}) is not in the cache {cache_folder()} any more; "
            "set HARNESS_CACHE, or run the suite again: it makes what is missing"
        )
    return stored.folder, f"stage {checkpoint['stage']}"
