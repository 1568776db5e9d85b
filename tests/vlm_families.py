"""Vision-language models of several families, tiny and random: their configurations, and images for some of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

IMAGE = 5
"""The token that stands for a part of an image in all of them."""
VOCABULARY = 128
_TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "initializer_range": 0.2,
}
_TOWER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
    "initializer_range": 0.2,
}
_QWEN = {"image_token_id": IMAGE, "video_token_id": 6, "vision_start_token_id": 7, "vision_end_token_id": 8}


def _mrope(kind: str) -> dict[str, Any]:
    return {**_TEXT, "rope_parameters": {"rope_type": kind, "mrope_section": [2, 3, 3], "rope_theta": 10000.0}}


def _idefics3() -> Any:
    from transformers import Idefics3Config, LlamaConfig

    return Idefics3Config(
        text_config=LlamaConfig(**_TEXT), vision_config=dict(_TOWER), scale_factor=2, image_token_id=IMAGE, pad_token_id=2
    )


def _smolvlm() -> Any:
    from transformers import LlamaConfig, SmolVLMConfig

    return SmolVLMConfig(
        text_config=LlamaConfig(**_TEXT), vision_config=dict(_TOWER), scale_factor=2, image_token_id=IMAGE, pad_token_id=2
    )


def _llava() -> Any:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    return LlavaConfig(text_config=LlamaConfig(**_TEXT), vision_config=CLIPVisionConfig(**_TOWER), image_token_index=IMAGE)


def _llava_next() -> Any:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig

    return LlavaNextConfig(text_config=LlamaConfig(**_TEXT), vision_config=CLIPVisionConfig(**_TOWER), image_token_index=IMAGE)


def _llava_onevision() -> Any:
    from transformers import LlavaOnevisionConfig, Qwen2Config, SiglipVisionConfig

    return LlavaOnevisionConfig(
        text_config=Qwen2Config(**_TEXT), vision_config=SiglipVisionConfig(**_TOWER), image_token_index=IMAGE
    )


def _qwen2_vl() -> Any:
    from transformers import Qwen2VLConfig

    vision = {"depth": 2, "embed_dim": 32, "num_heads": 2, "hidden_size": 32, "patch_size": 4}
    return Qwen2VLConfig(text_config=_mrope("default"), vision_config=vision, **_QWEN)


def _qwen2_5_vl() -> Any:
    from transformers import Qwen2_5_VLConfig

    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 32, "patch_size": 4}
    return Qwen2_5_VLConfig(text_config=_mrope("default"), vision_config={**vision, "fullatt_block_indexes": [1]}, **_QWEN)


def _qwen3_vl() -> Any:
    from transformers import Qwen3VLConfig

    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 32, "patch_size": 4}
    deep = {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    return Qwen3VLConfig(text_config=_mrope("default") | {"head_dim": 16}, vision_config=vision | deep, **_QWEN)


def _internvl() -> Any:
    from transformers import InternVLConfig, Qwen2Config

    vision = {**_TOWER, "image_size": [16, 16], "patch_size": [4, 4]}
    return InternVLConfig(text_config=Qwen2Config(**_TEXT), vision_config=vision, image_token_id=IMAGE, image_seq_length=4)


def _gemma3() -> Any:
    from transformers import Gemma3Config, SiglipVisionConfig

    text = {**_TEXT, "head_dim": 16, "sliding_window": 32}
    return Gemma3Config(
        text_config=text, vision_config=SiglipVisionConfig(**_TOWER), image_token_index=IMAGE, mm_tokens_per_image=4
    )


FAMILIES: dict[str, Callable[[], Any]] = {
    "idefics3": _idefics3,
    "smolvlm": _smolvlm,
    "llava": _llava,
    "llava_next": _llava_next,
    "llava_onevision": _llava_onevision,
    "qwen2_vl": _qwen2_vl,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
    "internvl": _internvl,
    "gemma3": _gemma3,
}
PROJECTORS = {
    "idefics3": "model.connector.modality_projection.proj",
    "smolvlm": "model.connector.modality_projection.proj",
    "llava": "model.multi_modal_projector.linear_1",
    "llava_next": "model.multi_modal_projector.linear_1",
    "llava_onevision": "model.multi_modal_projector.linear_1",
    "qwen2_vl": "model.visual.merger.mlp.0",
    "qwen2_5_vl": "model.visual.merger.mlp.0",
    "qwen3_vl": "model.visual.merger.linear_fc1",
    "internvl": "model.multi_modal_projector.linear_1",
    "gemma3": "model.vision_tower.encoder.layers.0.mlp.fc1",
}
"""A linear layer of each between image and text (of Gemma 3, whose projector is a plain matrix, one of the tower)."""


def build_family(name: str, folder: Path | None = None) -> Any:
    """A random model of a family in BF16; saved to `folder` where one is given."""
    from transformers import AutoModelForImageTextToText

    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(FAMILIES[name]())
    for parameter in model.parameters():
        if parameter.ndim > 1 and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)  # a projector that begins at zero would hide the images
    model = model.to(torch.bfloat16).eval()
    if folder is not None:
        model.save_pretrained(folder)
    return model


def images_of(name: str, n: int) -> tuple[int, dict[str, torch.Tensor]]:
    """How many tokens an image is, and what the model is called with for `n` random images of 16 pixels."""
    pixels = torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    if name in ("idefics3", "smolvlm"):
        return 4, {"pixel_values": pixels[None]}
    if name == "qwen2_5_vl":
        patches = pixels.reshape(n, 3, 1, 4, 4, 4, 4).expand(-1, -1, 2, -1, -1, -1, -1)
        rows = patches.permute(0, 3, 5, 1, 2, 4, 6).reshape(n * 16, -1)
        return 4, {"pixel_values": rows, "image_grid_thw": torch.tensor([[1, 4, 4]] * n)}
    return {"llava": 16, "internvl": 4, "gemma3": 4}[name], {"pixel_values": pixels}
