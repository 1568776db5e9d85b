"""How large the vision side of an image model is, by its configuration. It is not quantized and not trained: one size will do."""

from __future__ import annotations

from typing import Any

from harness.errors import ModelError

_TOWERS = {"vit_huge": (1280, 5120, 32), "vit_large": (1024, 4096, 24), "vit_base": (768, 3072, 12)}
"""Width, width of the MLP and layers of vision transformers that a configuration only names (Dosovitskiy et al., arXiv 2010.11929,
table 1), by the beginning of their name."""


def vision_of(config: dict[str, Any], where: str, *, width: int) -> tuple[dict[str, int], tuple[str, ...]]:
    """Parameters of the vision tower and of what leads from it to the language model, `width` wide; and what is an estimate.

    Raises:
        ModelError: neither sizes nor a name that is known.
    """
    vision = config.get("vision_config") or {}
    try:
        if "hidden_size" in vision:
            inner, mlp, layers = (int(vision[key]) for key in ("hidden_size", "intermediate_size", "num_hidden_layers"))
        else:
            name = str((vision.get("args") or {}).get("model", ""))
            inner, mlp, layers = next(sizes for start, sizes in _TOWERS.items() if name.startswith(start))
    except (KeyError, StopIteration, ValueError):
        raise ModelError(
            f"{where}: vision_config: says neither hidden_size, intermediate_size and num_hidden_layers nor a tower that is known "
            f"({', '.join(_TOWERS)}); the memory of this model cannot be planned"
        ) from None
    patch, side = int(vision.get("patch_size") or 16), int(vision.get("image_size") or 224)
    block = 4 * inner * inner + 4 * inner + 2 * inner * mlp + inner + mlp + 4 * inner  # products with biases, two norms
    tower = layers * block + 2 * inner + 3 * patch * patch * inner + inner + (side // patch) ** 2 * inner
    if "scale_factor" in config:  # Idefics3: pixels side by side become channels, then one product
        return {"vision": tower, "connector": inner * int(config["scale_factor"]) ** 2 * width}, ()
    shuffled = round(inner / float(config.get("downsample_ratio") or 1) ** 2)
    between = int(config.get("projector_hidden_size") or width)
    connector = shuffled * between + between * width
    note = f"vision_config: the {tower + connector:,} parameters of vision and connector are an estimate"
    return {"vision": tower, "connector": connector}, (note,)
