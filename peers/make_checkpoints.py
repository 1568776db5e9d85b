"""Write the foreign checkpoints under tests/fixtures/peers, each by the code of the tool that it is named after.

    .venv-peers/bin/python -m peers.make_checkpoints            # all of them
    .venv-peers/bin/python -m peers.make_checkpoints modelopt-nvfp4

A checkpoint is a two-layer Llama with random weights (hidden 64, four heads of 32, two for keys and values) and a byte-level
tokenizer. Beside the folder lies `<name>.reference.safetensors`: the quantized weights of layer 0 as the tool itself decodes them, in BF16.
Activation scales come from one pass over seeded random tokens. Needs no GPU: ModelOpt's quantizers only observe while they
calibrate, and its CUDA-only fake quantization is never called.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from copy import deepcopy
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

FIXTURES = Path(__file__).parent.parent / "tests" / "fixtures" / "peers"
SPECIAL = ("<|start|>", "<|end|>")
CHAT_TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
SEQUENCES, LENGTH = 8, 32


def build_source(folder: Path, *, tied: bool) -> None:
    """Write the BF16 model and its tokenizer: one token a byte and two special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate((*SPECIAL, *alphabet))}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=SPECIAL[0], eos_token=SPECIAL[1])
    wrapped.chat_template = CHAT_TEMPLATE
    wrapped.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(wrapped),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,  # the smallest that vLLM's attention takes on a CPU
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.2,
        architectures=["LlamaForCausalLM"],  # ModelOpt's export raises a bare TypeError without it
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def calibration_tokens() -> Tensor:
    return torch.randint(2, 258, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(1))


def modelopt(source: Path, out: Path, *, preset: str, fp8: str | None = None, fp8_kv_cache: bool = False) -> None:
    """ModelOpt's quantize and `export_hf_checkpoint`; `fp8` is a pattern of modules that get FP8 instead of the preset."""
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint
    from modelopt.torch.quantization.utils import update_quant_cfg_with_kv_cache_quant

    config = deepcopy(getattr(mtq, preset))
    if fp8 is not None:
        for quantizer in ("weight_quantizer", "input_quantizer"):
            config["quant_cfg"].append({"quantizer_name": f"{fp8}{quantizer}", "cfg": {"num_bits": (4, 3), "axis": None}})
    if fp8_kv_cache:
        config = update_quant_cfg_with_kv_cache_quant(config, mtq.FP8_KV_CFG["quant_cfg"])
    model = LlamaForCausalLM.from_pretrained(source, dtype=torch.bfloat16).eval()
    model = mtq.quantize(model, config, lambda quantized: quantized(calibration_tokens()))
    export_hf_checkpoint(model, export_dir=out)
    AutoTokenizer.from_pretrained(source).save_pretrained(out)


def decoded_by_modelopt(folder: Path) -> Iterator[tuple[str, Tensor]]:
    from modelopt.torch.quantization.qtensor import FP8QTensor, NVFP4QTensor

    tensors = load_file(folder / "model.safetensors")
    for name, scale in tensors.items():
        if not name.endswith(".weight_scale"):
            continue
        module, weight = name.removesuffix("_scale"), tensors[name.removesuffix("_scale")]
        if weight.dtype == torch.float8_e4m3fn:
            yield module, FP8QTensor(weight.shape, torch.bfloat16, weight).dequantize(scale=scale, dtype=torch.bfloat16)
        else:
            shape = torch.Size((weight.shape[0], 2 * weight.shape[1]))
            packed = NVFP4QTensor(shape, torch.bfloat16, weight)
            double_scale = tensors[f"{module}_scale_2"]
            yield module, packed.dequantize(scale=scale, double_scale=double_scale, block_sizes={-1: 16})


def compressed_tensors(source: Path, out: Path, *, groups: dict[str, list[str]]) -> None:
    """llm-compressor's `oneshot` and its save; `groups` maps a preset scheme to the modules that get it."""
    from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from torch.utils.data import DataLoader
    from transformers import default_data_collator

    schemes = {f"group_{i}": preset_name_to_scheme(name, targets) for i, (name, targets) in enumerate(groups.items())}
    recipe = QuantizationModifier(
        config_groups={name: scheme.model_dump() for name, scheme in schemes.items()}, ignore=["lm_head"]
    )
    tokens = calibration_tokens().tolist()
    data = Dataset.from_dict({"input_ids": tokens, "attention_mask": [[1] * LENGTH] * SEQUENCES})
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = LlamaForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    oneshot(
        model=model,
        processor=tokenizer,
        dataset=DataLoader(data, batch_size=1, collate_fn=default_data_collator),
        recipe=recipe,
        num_calibration_samples=SEQUENCES,
        max_seq_length=LENGTH,
        pipeline="basic",
    )
    model.save_pretrained(out, save_compressed=True)
    tokenizer.save_pretrained(out)


def decoded_by_compressed_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    from transformers import AutoModelForCausalLM
    from transformers.utils.quantization_config import CompressedTensorsConfig

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=CompressedTensorsConfig(dequantize=True)
    )
    for name, module in model.named_modules():
        if hasattr(module, "quantization_scheme") and hasattr(module, "weight_scale"):
            yield f"{name}.weight", module.weight.detach().to(torch.bfloat16)


LINEAR = ["Linear"]
ALL_BUT_DOWN = [r"re:.*self_attn\.[qkvo]_proj$", r"re:.*(gate|up)_proj$"]
DOWN = [r"re:.*down_proj$"]
CHECKPOINTS: dict[str, tuple[str, bool, dict[str, Any]]] = {
    "modelopt-nvfp4": ("modelopt", False, {"preset": "NVFP4_DEFAULT_CFG"}),
    "modelopt-mixed-fp8": ("modelopt", True, {"preset": "NVFP4_DEFAULT_CFG", "fp8": "*down_proj*"}),
    "modelopt-nvfp4-fp8-kv": ("modelopt", True, {"preset": "NVFP4_DEFAULT_CFG", "fp8_kv_cache": True}),
    "modelopt-w4a16": ("modelopt", True, {"preset": "W4A16_NVFP4_CFG"}),
    "compressed-tensors-nvfp4": ("compressed_tensors", True, {"groups": {"NVFP4": LINEAR}}),
    "compressed-tensors-mixed-fp8": ("compressed_tensors", False, {"groups": {"NVFP4": ALL_BUT_DOWN, "FP8": DOWN}}),
    "compressed-tensors-w4a16": ("compressed_tensors", True, {"groups": {"NVFP4A16": LINEAR}}),
}
"""Name: the tool, whether the embeddings are tied, and what the tool is asked for."""

WRITERS: dict[str, Callable[..., None]] = {"modelopt": modelopt, "compressed_tensors": compressed_tensors}
DECODERS = {"modelopt": decoded_by_modelopt, "compressed_tensors": decoded_by_compressed_tensors}
PACKAGES = {
    "modelopt": ("nvidia-modelopt", "torch", "transformers"),
    "compressed_tensors": ("llmcompressor", "compressed-tensors", "torch", "transformers"),
}


def make(name: str) -> None:
    tool, tied, arguments = CHECKPOINTS[name]
    out = FIXTURES / name
    shutil.rmtree(out, ignore_errors=True)
    with tempfile.TemporaryDirectory() as scratch:
        build_source(Path(scratch), tied=tied)
        WRITERS[tool](Path(scratch), out, **arguments)
    reference = {module: weight.contiguous() for module, weight in DECODERS[tool](out) if ".layers.0." in module}
    save_file(reference, out.with_name(f"{out.name}.reference.safetensors"))
    versions = ", ".join(f"{package} {version(package)}" for package in PACKAGES[tool])
    (out / "README.md").write_text(
        f"Written by {versions}: `.venv-peers/bin/python -m peers.make_checkpoints {name}`.\n\n"
        f"Asked for: `{json.dumps(arguments)}`; tied embeddings: {str(tied).lower()}.\n"
        f"`../{name}.reference.safetensors`: the quantized weights of layer 0, decoded to BF16 by the tool itself"
        + (" (ModelOpt decodes FP8 as BF16(code) times BF16(scale)).\n" if "fp8" in arguments else ".\n")
    )


def main() -> None:
    for name in sys.argv[1:] or CHECKPOINTS:
        make(name)


if __name__ == "__main__":
    main()
