"""A model card for an exported copy: README.md and an `every_eval_ever` record, written beside its weights and never into the store.

A card describes the files that it lies beside, so it is written only where they are the scored ones: `export` left their digests. It says
what the run folder says, and no text of any question or answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.accepted import read_verdicts, withdrawn_reason
from harness.errors import HarnessError, StoreError
from harness.export import RECORD
from harness.licence import Licence, find_licence
from harness.models import is_hub_id, mirror_folder, public_name
from harness.records import read_json, read_run
from harness.store import cache_folder, disk_errors, sha256, write_json, write_text
from harness.table_build import build_table

README, BASE_README, EVALS = "README.md", "BASE_README.md", "every_eval_ever"


@dataclass(frozen=True)
class Subject:
    """What a card is of. about: run.json; variant: its record there; row, baseline: of the table; differences: of this variant, by task.

    exported: what `export` recorded of the copy. base: id of the base model on the hub, None where it is not known. verdict: of
    `harness gate`, None where it has not judged this variant.
    """

    about: dict[str, Any]
    variant: dict[str, Any]
    row: dict[str, Any]
    baseline: dict[str, Any] | None
    differences: dict[str, dict[str, Any]]
    exported: dict[str, Any]
    base: str | None
    licence: Licence | None
    verdict: dict[str, Any] | None

    @property
    def base_name(self) -> str:
        """What the base is called: its id on the hub, else the name of its folder or file, not where that lies."""
        return self.base or public_name(self.about["model"]["path"])

    @property
    def name(self) -> str:
        """What the model is called: its base, the format, the method."""
        base = self.base_name.rpartition("/")[2].removesuffix(".gguf")
        return f"{base}-NVFP4" + ("" if self.variant["method"] == "checkpoint" else f"-{self.variant['method'].upper()}")


def write_card(run: Path, variant: str, out: Path) -> list[str]:
    """Write the card of `variant` into `out`, a copy that `harness export` made; returns what to tell the user.

    Raises:
        HarnessError: no such variant, the BF16 model itself, a run that is not finished, or a rehearsal.
        StoreError: `out` is in the cache, is no export of what was scored, or its README was edited by hand.
    """
    from harness.card_text import card_text
    from harness.every_eval_ever import every_eval_ever

    about = read_run(run)
    chosen = _variant(run, about, variant)
    exported = _exported(run, about, chosen, out)
    _require_scored(out, exported)
    readme = out / README
    with disk_errors(f"the card in {out}"):
        _keep_base_readme(readme, exported)
        subject = _subject(run, about, chosen, out, exported)
        evals = out / EVALS / f"{about['suite']}-{about['run']}-{variant}.json"
        evals.parent.mkdir(exist_ok=True)
        write_json(evals, every_eval_ever(subject))
        write_text(readme, card_text(subject))
        write_json(out / RECORD, {**exported, "card": sha256(readme)})
    said = [f"{readme} and {evals.relative_to(out)} are written"]
    if subject.base is None:
        said.append(f"fill in base_model: {about['model']['path']} is no id of the hub")
    if subject.licence is None:
        said.append("fill in license: neither a README nor a LICENSE file beside the weights or in the base's folder says it")
    return said


def _variant(run: Path, about: dict[str, Any], name: str) -> dict[str, Any]:
    variants = {found["name"]: found for found in about["variants"]}
    if name not in variants:
        raise HarnessError(f"{run}: has no variant {name!r}. Known: {', '.join(variants)}")
    if variants[name]["method"] == "bf16":
        quantized = [other for other, found in variants.items() if found["method"] != "bf16"]
        raise HarnessError(
            f"--variant {name}: is the BF16 model itself, which has its own card; give a quantized variant: {', '.join(quantized)}"
        )
    if about["status"] != "complete":
        raise HarnessError(
            f"{run}: this run is {about['status']}; a card is of a finished one: run the suite again, it goes on"
        )
    if about.get("rehearsal"):
        raise StoreError(f"{run}: a rehearsal makes no card, whose figures programs read as the model's; run the real suite")
    withdrawn = withdrawn_reason(run, about)
    if withdrawn is not None:
        raise HarnessError(f"{run}: this run was withdrawn ({withdrawn}), so its figures make no card; run the suite again")
    return variants[name]


def _exported(run: Path, about: dict[str, Any], variant: dict[str, Any], out: Path) -> dict[str, Any]:
    """What `export` recorded in `out`; StoreError unless it is of the checkpoint that this run scored."""
    command = f"harness export {run} --variant {variant['name']} --out DIR"
    if out.resolve().is_relative_to(cache_folder().resolve()):
        raise StoreError(
            f"--out {out}: is in the cache, whose stages are never written to; copy the checkpoint first: {command}"
        )
    if not out.is_dir():
        raise StoreError(f"--out {out}: is no folder; a card is written into an exported copy: {command}")
    if not (out / RECORD).is_file():
        raise StoreError(
            f"--out {out}: is no copy that harness export made (it has no {RECORD}), so nothing says that these files were scored: {command}"
        )
    exported = read_json(out / RECORD)
    if exported["checkpoint"] != variant.get("checkpoint"):
        raise StoreError(
            f"--out {out}: is a copy of {exported['variant']} of run {exported['suite']} {exported['run']}, another checkpoint than "
            f"{variant['name']} of this run; export that one to another folder: {command}"
        )
    if "folder" in exported["checkpoint"]:
        stages = [
            each for each in about["stages"] if each["kind"] == "evaluate" and each["label"].startswith(f"{variant['name']}: ")
        ]
        if any(stage["inputs"]["checkpoint"] != exported["fingerprint"] for stage in stages):
            raise StoreError(
                f"--out {out}: {exported['checkpoint']['folder']} lies outside the store and was changed after it was scored; run the suite "
                f"again, then {command}"
            )
    return exported


def _require_scored(out: Path, exported: dict[str, Any]) -> None:
    """StoreError unless all files but the README are as they were exported."""
    for name, digest in exported["files"].items():
        path = out / name
        if name != README and (not path.is_file() or sha256(path) != digest):
            what = "has other bytes than what was scored" if path.is_file() else "is missing"
            raise StoreError(
                f"{path}: {what}; a card is of the scored files: export them to another folder, and write the card there"
            )
    strangers = [path.name for path in sorted(out.glob("*.safetensors")) if path.name not in exported["files"]]
    if strangers:
        raise StoreError(
            f"{out / strangers[0]}: was not exported, so it was not scored; remove it, or export to another folder"
        )


def _keep_base_readme(readme: Path, exported: dict[str, Any]) -> None:
    """The base's own README, which came along, is renamed; one that was edited by hand is never written over."""
    if not readme.is_file():
        return
    digest = sha256(readme)
    if digest == exported["files"].get(README):
        readme.replace(readme.with_name(BASE_README))
    elif digest != exported.get("card"):
        raise StoreError(f"{readme}: was edited since; move it away, write the card again, and bring the changes over")


def _subject(run: Path, about: dict[str, Any], variant: dict[str, Any], out: Path, exported: dict[str, Any]) -> Subject:
    table = build_table(run)
    rows = {row["variant"]: row for row in table["rows"]}
    baselines = [row for row in table["rows"] if row["method"] == "bf16" and row["sampling_seed"] is None]
    folders = [out, *_base_folders(about["model"]["path"])]
    return Subject(
        about=about,
        variant=variant,
        row=rows[variant["name"]],
        baseline=baselines[0] if baselines else None,
        differences={row["task"]: row for row in table["differences"] if row["candidate"] == variant["name"]},
        exported=exported,
        base=_base_id(about["model"]),
        licence=find_licence(folders),
        verdict=_verdict(run, about, variant["name"]),
    )


def _base_folders(path: str) -> list[Path]:
    folder = Path(path).expanduser()
    mirrored = mirror_folder(path) if is_hub_id(path) else None
    return [found for found in (folder if folder.is_dir() else None, mirrored) if found is not None]


def _base_id(model: dict[str, Any]) -> str | None:
    """The base's id on the hub where the suite gave one; a README beside it names the base of the base."""
    return str(model["path"]) if is_hub_id(model["path"]) and not str(model["origin"]).startswith("folder ") else None


def _verdict(run: Path, about: dict[str, Any], variant: str) -> dict[str, Any] | None:
    """What verdict.json beside the run says of the variant, with the policy's source; StoreError where it is not of these records."""
    record = read_verdicts(run, about)
    if record is None:
        return None
    judged = next((each for each in record["candidates"] if each["candidate"] == variant), None)
    return None if judged is None else {**judged, "policy": record["policy"]}
