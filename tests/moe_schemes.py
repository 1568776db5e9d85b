"""What vLLM's compressed-tensors code decides for the experts of checkpoints: run as a script, apart from the tests, for it imports vLLM.

Arguments: folders. Printed, as JSON on the last line: for each, what computes each layer of experts ("nvfp4", "fp8" or "bf16"), or why
it ends. Layers go by vLLM's names, and the names in the configuration are mapped as vLLM maps them for nemotron_h.
"""

import json
import sys
from pathlib import Path

from tests.moe_models import layers_of_experts


def main(folders: list[str]) -> None:
    from torch import nn
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
        compressed_tensors_moe,
        compressed_tensors_moe_w4a4_nvfp4,
        compressed_tensors_moe_w8a8_fp8,
    )
    from vllm.model_executor.models.utils import WeightsMapper

    def always(answer):
        return lambda *args, **kwargs: answer

    compressed_tensors_moe.UnquantizedFusedMoEMethod = always("bf16")
    compressed_tensors_moe_w4a4_nvfp4.CompressedTensorsW4A4Nvfp4MoEMethod = always("nvfp4")
    compressed_tensors_moe_w8a8_fp8.CompressedTensorsW8A8Fp8MoEMethod = always("fp8")
    found = {}
    for folder in folders:
        about = json.loads((Path(folder) / "config.json").read_text())
        has_gate = about["model_type"] != "nemotron_h"
        names = {"gate": "gate_proj", "up": "up_proj"} if has_gate else {"gate": "up_proj", "up": None}
        attributes = {
            "ckpt_gate_proj_name": names["gate"],
            "ckpt_up_proj_name": names["up"],
            "ckpt_down_proj_name": "down_proj",
        }
        layer = type("RoutedExperts", (nn.Module,), attributes | {"moe_config": None})()
        config = CompressedTensorsConfig.from_config(about["quantization_config"])
        config.apply_vllm_mapper(WeightsMapper(orig_to_new_prefix={"backbone": "model"}))
        for name in layers_of_experts(about["model_type"]):
            try:
                method = compressed_tensors_moe.CompressedTensorsMoEMethod.get_moe_method(config, layer, name)
            except ValueError as error:
                method = str(error)
            found.setdefault(folder, []).append(method)
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
