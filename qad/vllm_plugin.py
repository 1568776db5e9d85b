"""The entry point of vLLM's plug-ins (group `vllm.general_plugins`), called in every vLLM process of an environment.

It does nothing, and imports nothing, unless the variable QAD_VLLM_KERNELS asks for kernels of ours, QAD_VLLM_IMAGES for image
processors that do without torchvision, or QAD_VLLM_DECILM for the configuration of DeciLM models: an installed plug-in must not change what
other vLLM processes compute. The kernels themselves are in `qad._vllm`. vLLM logs and skips a plug-in that raises; whoever needs the kernels reads them from the loaded model.
"""

from __future__ import annotations

import os

VARIABLE = "QAD_VLLM_KERNELS"
IMAGES = "QAD_VLLM_IMAGES"
"""Set to 1, every vLLM process of ours finds the image processors of `qad.image_processors`; empty or missing: nothing changes."""
DECILM = "QAD_VLLM_DECILM"
"""Set to 1, every vLLM process of ours reads the configuration of a DeciLM model, which transformers lacks; vLLM has the model itself."""
CHOICES = ("w4a4_emulation", "w4a16")


def register() -> None:
    """Make vLLM compute NVFP4 linear layers with the kernels that QAD_VLLM_KERNELS asks for, and find the image processors that
    QAD_VLLM_IMAGES asks for, and the configurations of QAD_VLLM_DECILM. Calling it again changes nothing.

    Raises:
        ValueError: the variable is set to something else than one of CHOICES.
    """
    if os.environ.get(IMAGES):
        from qad.image_processors import allow_without_torchvision

        allow_without_torchvision()
    if os.environ.get(DECILM):
        from qad import decilm

        decilm.register()
    asked = os.environ.get(VARIABLE, "")
    if not asked:
        return
    if asked not in CHOICES:
        raise ValueError(f"{VARIABLE}={asked}: unknown kernels. Known: {', '.join(CHOICES)}; unset it for vLLM's own choice")
    from qad._vllm import install

    install(asked)
