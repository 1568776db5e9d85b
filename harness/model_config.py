"""The config.json of a model, before its weights are here: what planning needs of a model, and all that it fetches. No torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.errors import ModelError
from harness.gguf_config import gguf_configuration
from harness.hub_models import CONFIG as CONFIG
from harness.hub_models import cached_config, fetch_config
from harness.known_models import known_model
from harness.models import mirror_folder
from harness.plan import Stage
from harness.schema import Model
from harness.store import Store


@dataclass(frozen=True)
class Configuration:
    """The fields of a config.json, where they were found, and what has to be said of that place, or None."""

    fields: dict[str, Any]
    where: str
    note: str | None = None


def config_of(stage: Stage, store: Store) -> Configuration:
    """The configuration of the model of a stage of kind "model".

    Looked for in the folder (which may hold nothing else yet) or the mirror, then the cache of the hub, then among those kept with the harness; that file alone is then fetched.
    Of a GGUF file, in what it was converted to, and then in its own metadata.

    Raises:
        ModelError: a GGUF file whose metadata cannot be read, or a model of the hub that cannot be: gated, renamed, no network.
    """
    source = stage.source
    assert source is not None
    if source.wanted is not None:
        return configuration_of(source.wanted)
    if source.gguf is not None:
        found = store.find(stage.key)
        if found is not None:
            return read_configuration(found.folder / CONFIG)
        assert source.folder is not None
        note = f"{source.gguf}: planned from its metadata, in BF16 as it will be converted; no weights were read"
        return Configuration(gguf_configuration(source.folder / source.gguf), source.gguf, note)
    assert source.folder is not None
    return read_configuration(source.folder / CONFIG)


def configuration_at_hand(stage: Stage, store: Store) -> Configuration | None:
    """The same, where it is on this machine; None where it is not, or cannot be read, which is said when it is loaded."""
    source = stage.source
    assert source is not None
    wanted = source.wanted
    is_here = wanted is None or cached_config(wanted) is not None or known_model(wanted.path) is not None
    try:
        return config_of(stage, store) if is_here else None
    except ModelError:
        return None


def read_configuration(path: Path) -> Configuration:
    """The configuration in the file at `path`; ModelError where it is missing or damaged."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path}: there is no such file; give the config.json of the model") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read as JSON ({error}); copy it again") from None
    if not isinstance(config, dict):
        raise ModelError(f"{path}: holds no object; copy the model's config.json again")
    return Configuration(config, str(path))


def configuration_of(model: Model) -> Configuration:
    """The configuration of a model of the hub, as `config_of` looks for it."""
    for folder in (Path(model.path).expanduser(), mirror_folder(model.path)):
        if folder is not None and (folder / CONFIG).is_file():
            return read_configuration(folder / CONFIG)
    cached = cached_config(model)
    if cached is not None:
        return read_configuration(cached)
    known = known_model(model.path)
    if known is None and model.revision is None:
        raise ModelError(
            f"{model.path}: has no revision, so nothing of it is fetched; give the commit (40 hex digits) beside its path or, of [model], its "
            f"{CONFIG} by --config"
        )
    if known is None:
        return read_configuration(fetch_config(model))
    is_other = known.revision is not None and known.revision != model.revision
    other = f"; it is of {known.revision}, the suite asks for {model.revision}" if is_other else ""
    return Configuration(known.config, f"{model.path}, as kept with the harness", f"{model.path}: from {known.origin}{other}")
