"""The config.json of a model, before its weights are here: what planning needs of a model, and all that it fetches. No torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.errors import ModelError
from harness.hub_models import CONFIG as CONFIG
from harness.hub_models import cached_config, fetch_config
from harness.known_models import known_model
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

    Looked for in the folder or the mirror, then the cache of the hub, then among those kept with the harness; that file alone is then fetched.

    Raises:
        ModelError: a GGUF file that was not converted yet, or a model of the hub that cannot be read: gated, renamed, no network.
    """
    source = stage.source
    assert source is not None
    if source.wanted is not None:
        return configuration_of(source.wanted)
    if source.gguf is not None:
        found = store.find(stage.key)
        if found is None:
            raise ModelError(
                f"{stage.label}: {source.gguf} has a {CONFIG} once it is converted; run harness prepare on the suite, or give one by --config"
            )
        return read_configuration(found.folder / CONFIG)
    assert source.folder is not None
    return read_configuration(source.folder / CONFIG)


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
