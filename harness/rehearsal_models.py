"""The twins of a rehearsal: configurations are found first, and quickly; then small models are written in their places.

A configuration is that of the folder or the mirror, the hub's cache, or kept with the harness (`known_models`); for [model], one that is given
by hand comes before all of them. Of a judge and of another teacher whose configuration is nowhere, the model's own stands in, and that is said.
A quantized checkpoint that was made elsewhere is the model's twin, quantized as the release declares.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.errors import ModelError
from harness.known_models import known_model
from harness.model_config import CONFIG, Configuration, configuration_of, read_configuration
from harness.models import mirror_folder, text_config
from harness.rehearsal import Scaled, TwinOf
from harness.schema import Model
from harness.suite import Suite

_EXPERTS = ("n_routed_experts", "num_experts", "num_local_experts")


@dataclass(frozen=True)
class Found:
    """A twin to write, with the configuration of what it stands for."""

    twin: TwinOf
    configuration: Configuration
    seed: int


def has_experts(config: Mapping[str, Any]) -> bool:
    """Whether a configuration has layers of experts."""
    return any((config.get(key) or 0) > 1 for key in _EXPERTS)


def models_with_experts(suite: Suite, config: Path | None) -> list[str]:
    """The paths of the model and the judge of a suite, where they have experts. config: the model's, given by hand."""
    found = []
    own = read_configuration(config) if config is not None else find_configuration(suite.model.path, suite.model.revision)
    if has_experts(text_config(own.fields)):
        found.append(suite.model.path)
    if suite.judge is not None:
        with contextlib.suppress(ModelError):
            if has_experts(find_configuration(suite.judge.path, suite.judge.revision).fields):
                found.append(suite.judge.path)
    return found


def find_configuration(path: str, revision: str | None) -> Configuration:
    """The configuration of a model without its weights; ModelError, which says what to do, where it is nowhere."""
    if path.startswith("package:"):
        return _of_package(path)
    folder = Path(path).expanduser()
    if folder.is_dir():
        return read_configuration(folder / CONFIG)
    mirror = mirror_folder(path)
    if mirror is not None:
        return read_configuration(mirror / CONFIG)
    return configuration_of(Model(path=path, revision=revision))


def find_twins(scaled: Scaled, *, config: Path | None = None) -> tuple[list[Found], list[str]]:
    """Every twin with its configuration, and what is said of it. ModelError for a model whose configuration is nowhere."""
    found: list[Found] = []
    said: list[str] = []
    own = None
    for number, twin in enumerate(scaled.twins):
        if twin.role == "model" and own is None:
            own = read_configuration(config) if config is not None else find_configuration(twin.path, twin.revision)
            given = own
        elif twin.role == "checkpoint":
            assert own is not None
            given = own
        else:
            given = _or_own(twin, own, said)
        if given.note is not None and twin.role != "checkpoint":
            said.append(given.note)
        seed = 0 if twin.role == "checkpoint" else number
        found.append(Found(twin, given, seed))
    return found, said


def _or_own(twin: TwinOf, own: Configuration | None, said: list[str]) -> Configuration:
    try:
        return find_configuration(twin.path, twin.revision)
    except ModelError:
        assert own is not None
        said.append(f"{twin.key}: no configuration of {twin.path} is here; one like the model's stands for it")
        return own


def write_twins(found: list[Found], scaled: Scaled, say: Callable[[str], None]) -> list[str]:
    """Write them; returns the keys of those of a class that stands for another. ModelError: no class can be built from a configuration made small."""
    from harness.loading import quiet_libraries
    from harness.twins import write_few_words, write_twin

    quiet_libraries()
    model = scaled.original.model
    standing = []
    words = write_few_words(found[0].twin.folder.parent / "words")
    say("  twins: a tokenizer of a few hundred tokens stands for theirs")
    for each in found:
        twin = each.twin
        twin.folder.parent.mkdir(parents=True, exist_ok=True)
        if twin.role == "checkpoint":
            say(f"  {twin.key}: {_write_quantized(twin, found[0].twin.folder, scaled)}")
            continue
        kind = "text" if twin.role == "judge" else model.kind
        trusts = model.trust_remote_code or twin.role == "judge"  # which vLLM alone loads
        made = write_twin(
            each.configuration.fields, twin.folder, seed=each.seed, kind=kind, tokenizer=words, trust_remote_code=trusts
        )
        say(f"  {twin.key}: a twin of {twin.path} ({made.model_class}): {'; '.join(made.notes)}")
        standing += [twin.key] if any("stands for" in note for note in made.notes) else []
    return standing


def _write_quantized(twin: TwinOf, bf16: Path, scaled: Scaled) -> str:
    """The BF16 twin, quantized as the release declares and exported; what is said of it."""
    import torch

    from qad.calibrate import calibrate
    from qad.checkpoint import load_checkpoint, write_checkpoint
    from qad.quantize import quantize_model
    from qad.recipe import Recipe, match

    known = known_model(scaled.original.model.path)
    declared = (known.released or {}) if known is not None else {}
    excluded, cache = tuple(declared.get("exclude_modules", ())), declared.get("kv_cache_quant_algo")
    model = load_checkpoint(bf16).model
    linears = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    wanted = _patterns_for(excluded, linears)
    recipe = Recipe(exclude=wanted, kv_cache="fp8" if cache == "FP8" else "bf16")
    torch.manual_seed(0)
    words = int(getattr(model.config, "vocab_size", 0) or model.config.get_text_config().vocab_size)
    ids = torch.randint(0, min(words, 256), (8, 128))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    targets = match(model, recipe)
    quantize_model(model, recipe, calibrate(model, recipe, [batch]), keep_originals=False)
    write_checkpoint(twin.folder, model, targets=targets, companions=bf16, record={"rehearsal": True})
    source = (
        f"as {declared.get('model', twin.path)} declares of the attention layers and the output head"
        if excluded
        else "but for its output head"
    )
    return f"the model's twin, quantized {source}; BF16: {', '.join(wanted) or 'none'}"


def _patterns_for(excluded: tuple[str, ...], linears: list[str]) -> tuple[str, ...]:
    """Patterns for a twin's linear layers: its output head, and the kinds of layer that a release names in all of its attention layers."""
    heads = tuple(name for name in linears if name.endswith("lm_head"))
    attention = {
        name.rpartition(".")[2] for name in excluded if name.rpartition(".")[2] in ("q_proj", "k_proj", "v_proj", "o_proj")
    }
    here = {name.rpartition(".")[2] for name in linears}
    return (*(f"*{head}" for head in heads), *(f"*.{kind}" for kind in sorted(attention & here)))


def _of_package(path: str) -> Configuration:
    """The configuration that a GGUF file's metadata give."""
    import importlib.util

    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    package, _, file = path.removeprefix("package:").partition("/")
    found = importlib.util.find_spec(package) if package.isidentifier() else None
    if found is None or found.origin is None or not (Path(found.origin).parent / file).is_file():
        raise ModelError(f"model.path: {path}: the package or the file is not installed; run make install, or give --config")
    where = Path(found.origin).parent / file
    return Configuration(json.loads(json.dumps(load_gguf_checkpoint(str(where))["config"])), str(where))
