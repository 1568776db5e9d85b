"""Models and tokenizers into memory: conversion of GGUF to a BF16 folder, loading, end-of-text tokens."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from harness.errors import ModelError
from harness.models import text_config
from qad.checkpoint import Loaded, load_checkpoint, write_checkpoint
from qad.kernels import backend

_WITH_CLASSES = (
    "config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "tokenizer_config.json",
)
"""Files of a model that may say which remote code reads its text and images."""


def quiet_libraries() -> None:
    """No notices and bars of theirs between ours."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("datasets").setLevel(logging.ERROR)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def convert_gguf(folder: Path, file: str, target: Path) -> None:
    """De-quantize a GGUF file to a BF16 checkpoint folder with its tokenizer and chat template.

    The end-of-text token of the tokenizer is set to the model's: GGUF readers are known to confuse it.
    """
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=file, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(model.config.eos_token_id)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    with tempfile.TemporaryDirectory() as companions:
        tokenizer.save_pretrained(companions)
        write_checkpoint(target, model.to(torch.bfloat16), targets=None, companions=Path(companions), record={"source": file})


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a checkpoint folder. ModelError: it cannot be loaded, or `require_own_code`."""
    if trust_remote_code:
        require_own_code(folder)
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # the tokenizers library raises bare Exception for a damaged file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(
            f"{folder}: its tokenizer cannot be loaded ({reason}); copy the tokenizer files of the original model into it"
        ) from error


def require_own_code(folder: Path) -> None:
    """ModelError if the remote code of a model lies in another repository, whence it would be fetched and run as it is today."""
    for name in _WITH_CLASSES:
        path = folder / name
        try:
            found = json.loads(path.read_text()) if path.is_file() else {}
        except ValueError as error:
            raise ModelError(f"{path}: not JSON ({error}); copy the files of the original model into its folder") from error
        for asked in _remote_classes(found, is_class=False):
            if "--" in asked:
                repository = asked.partition("--")[0]
                raise ModelError(
                    f"{path}: its remote code lies in another repository ({repository}), which nothing pins; not read. Put its Python files "
                    f'into the folder, and "{asked.partition("--")[2]}" into auto_map'
                )


def _remote_classes(value: Any, *, is_class: bool) -> Iterator[str]:
    """Every class that an `auto_map` names, however deep it lies."""
    if isinstance(value, dict):
        for key, each in value.items():
            yield from _remote_classes(each, is_class=is_class or key == "auto_map")
    elif isinstance(value, list):
        for each in value:
            yield from _remote_classes(each, is_class=is_class)
    elif is_class and isinstance(value, str):
        yield value


def load_model(folder: Path, *, trust_remote_code: bool, device: torch.device) -> Loaded:
    """The checkpoint in `folder`, in BF16 on `device`."""
    loaded = load_checkpoint(folder, trust_remote_code=trust_remote_code)
    computed_by = None if loaded.backend is None else backend(device)
    return dataclasses.replace(loaded, model=loaded.model.to(device), backend=computed_by)


def notes_of(loaded: Loaded) -> list[str]:
    """What to say of a loaded checkpoint whose files do not settle how it computes."""
    merged = loaded.merged_inputs
    told = "several input scales for the experts of a layer; computed is with the largest, as engines do; harness verify names them all"
    return (
        [f"{', '.join(merged[:2])}{' and ' + str(len(merged) - 2) + ' more' if merged[2:] else ''}: {told}"] if merged else []
    )


def eos_ids(folder: Path, tokenizer: Any) -> set[int]:
    """Tokens that end a text, by the model's configuration and by the tokenizer."""
    config = json.loads((folder / "config.json").read_text())
    configured = config.get("eos_token_id")
    if configured is None:
        configured = text_config(config).get("eos_token_id")
    ids = set(configured) if isinstance(configured, list) else {configured}
    return {int(i) for i in ids | {tokenizer.eos_token_id} if i is not None}
