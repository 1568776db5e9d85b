"""Whether a model's class comes from Python files beside its configuration: asked before anything is loaded. No torch."""

from __future__ import annotations

from typing import Any

NATIVE = ("nemotron_h", "nemotron-nas", "deepseek_v3")
"""Types of models that were published with remote code and have a class without it since: in transformers 5, in `qad.decilm`."""


def runs_remote_code(config: dict[str, Any], trust_remote_code: bool) -> bool:
    """Whether the class of a model comes from Python files beside its configuration: it names some, and `NATIVE` has none of its type.

    A caller that trusts the files gets theirs, but of "nemotron-nas", whose own cannot run any more.
    """
    model_type = config.get("model_type")
    return bool(config.get("auto_map")) and (model_type not in NATIVE or (trust_remote_code and model_type != "nemotron-nas"))
