"""A model of the hub before its weights are downloaded: whether it may be read, is called so, and is of an architecture that can be loaded.

Asked is what takes kilobytes: what the hub says of the repository, and config.json. What is in the hub's cache was asked for before.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from harness.errors import ModelError
from harness.hub import reading_hub
from harness.schema import Model

CONFIG = "config.json"
TIMEOUT_S = 30.0


def require_loadable(models: Iterable[Model | None]) -> None:
    """ModelError for the first of `models` that would fail once its weights are here; nothing is asked of what is in the cache."""
    for model in models:
        if model is not None and cached_config(model) is None:
            _require_known_type(model, json.loads(fetch_config(model).read_text(encoding="utf-8")))


def cached_config(model: Model) -> Path | None:
    """The config.json of a model in the cache of the hub; None where it is not there, or the path is no id."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(model.path, CONFIG, revision=model.revision)
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None


def fetch_config(model: Model) -> Path:
    """The config.json of a model, from the hub.

    Raises:
        ModelError: no such model or commit, another name, a gated one whose terms are not accepted, no network.
    """
    from httpx import HTTPError
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    where = f"{model.path} at {model.revision}"
    try:
        with reading_hub():
            name = HfApi().model_info(model.path, revision=model.revision, timeout=TIMEOUT_S).id
            if name != model.path:
                raise ModelError(
                    f'{model.path} is called {name} on the hub now; write path = "{name}", its commits are the same. Nothing was downloaded'
                )
            return Path(hf_hub_download(model.path, CONFIG, revision=model.revision))
    except GatedRepoError:
        reason = f"is gated; accept its terms on its page on the hub ({model.path}), and log in with that account (hf auth login, or HF_TOKEN)"
    except RepositoryNotFoundError:
        reason = "there is no such model on the hub, or it is private; check the id, or log in with an account that may read it"
    except RevisionNotFoundError:
        reason = "the hub has the model, and not this commit; take the revision from the model's page"
    except EntryNotFoundError as error:
        if isinstance(error, LocalEntryNotFoundError):  # nobody could be asked
            raise ModelError(f"{where}: {_unreachable(error)}") from None
        reason = f"has no {CONFIG}; a checkpoint in the format of transformers is needed, or another model"
    except (OSError, HTTPError) as error:
        raise ModelError(f"{where}: {_unreachable(error)}") from None
    raise ModelError(f"{where}: {reason}. Nothing was downloaded")


def _unreachable(error: Exception) -> str:
    return (
        f"its {CONFIG} is neither in the mirror nor to be had from the hub ({str(error).splitlines()[0]}); put the model under HARNESS_MIRROR, "
        "or check the network. harness plan and harness rehearse take one by --config"
    )


def _require_known_type(model: Model, config: dict[str, Any]) -> None:
    """ModelError unless a class can be built for a configuration: transformers' own, ours, or, where the suite allows it, one of remote code."""
    if config.get("auto_map") and model.trust_remote_code:
        return
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING, __version__

    from qad.building import native_class

    try:
        native_class(config)
    except (KeyError, ValueError):
        kind = str(config.get("model_type"))
        near = difflib.get_close_matches(kind, [*CONFIG_MAPPING, "nemotron-nas"], n=3)
        code = (
            " Its repository brings code of its own: [model] trust_remote_code = true runs it."
            if config.get("auto_map")
            else ""
        )
        raise ModelError(
            f"{model.path} at {model.revision}: model_type {kind!r} is not known; allowed are causal language models and image-text "
            f"models that transformers {__version__} has a class for, and nemotron-nas{'; near: ' if near else ''}{', '.join(near)}.{code} "
            "Its weights were not downloaded"
        ) from None
    except (
        StrictDataclassError,
        ArithmeticError,
        AttributeError,
        RuntimeError,
        TypeError,
    ) as error:  # fields that fit no model
        raise ModelError(
            f"{model.path} at {model.revision}: its config.json describes no model ({' '.join(str(error).split())}); check the revision. "
            "Its weights were not downloaded"
        ) from None
