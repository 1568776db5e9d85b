"""Small models with experts, random, as transformers makes them: folders as `save_pretrained` writes them, and batches."""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

VOCABULARY = 256
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
HYBRID = {
    "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp", "moe"],
    "mamba_num_heads": 4,
    "mamba_head_dim": 32,
    "n_groups": 2,
    "ssm_state_size": 16,
    "chunk_size": 8,
    "n_routed_experts": 8,
    "moe_intermediate_size": 48,
    "num_experts_per_tok": 2,
    "moe_shared_expert_intermediate_size": 64,
}
OF_ITS_OWN = {
    "qwen3_moe": {"num_experts": 8, "moe_intermediate_size": 48, "num_experts_per_tok": 2, "norm_topk_prob": True},
    "nemotron_h": HYBRID,
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "olmoe": {"num_experts": 8, "num_experts_per_tok": 2},
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 0,
        "q_lora_rank": 32,
        "kv_lora_rank": 32,
        "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
    },
    "gpt_oss": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "granitemoe": {"num_local_experts": 8, "num_experts_per_tok": 2},
}
MOE = ("qwen3_moe", "nemotron_h")
LEAVES = {"qwen3_moe": ("gate_proj", "up_proj", "down_proj"), "nemotron_h": ("up_proj", "down_proj")}


def tiny_moe(model_type: str, dtype: torch.dtype = torch.bfloat16, **settings):
    """The model as transformers has it, with its eager experts; the router of a hybrid has a correction bias."""
    sizes = {name: value for name, value in SIZES.items() if (model_type, name) != ("nemotron_h", "num_hidden_layers")}
    config = AutoConfig.for_model(model_type, **(sizes | OF_ITS_OWN[model_type] | settings))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, experts_implementation="eager").eval()
    for module in model.modules():
        if hasattr(module, "e_score_correction_bias"):  # FP32 whatever the type of the model, as loading keeps it
            module.e_score_correction_bias = torch.linspace(-0.1, 0.1, module.num_experts)
    return model


def moe_folder(folder: Path, model_type: str, **settings) -> Path:
    """A checkpoint of `tiny_moe` as transformers writes it."""
    tiny_moe(model_type, **settings).save_pretrained(folder)
    return folder


def ids(rows: int = 3, length: int = 40, *, below: int = VOCABULARY, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, below, (rows, length), generator=torch.Generator().manual_seed(seed))


def batch(rows: int = 3, length: int = 40, *, seed: int = 1) -> dict[str, torch.Tensor]:
    """Inputs of a model; the last row is half padding."""
    attention = torch.ones(rows, length, dtype=torch.int64)
    attention[-1, length // 2 :] = 0
    return {"input_ids": ids(rows, length, seed=seed), "attention_mask": attention}


def layers_of_experts(model_type: str) -> list[str]:
    if model_type == "nemotron_h":
        return ["model.layers.1.mixer.experts", "model.layers.4.mixer.experts"]
    return [f"model.layers.{i}.mlp.experts" for i in range(2)]


def never_routed_to(model, index: int) -> None:
    """Make the first layer's router choose an expert for no token."""
    gate = next(module for name, module in model.named_modules() if name.endswith((".mlp.gate", ".mixer.gate")))
    if hasattr(gate, "e_score_correction_bias"):
        gate.e_score_correction_bias[index] = -1000.0
    else:
        gate.register_forward_hook(lambda module, inputs, output: _without(module, output[0], index))


def _without(gate, logits: torch.Tensor, index: int):
    logits = logits.clone()
    logits[:, index] = float("-inf")
    values, chosen = torch.topk(logits.float().softmax(-1), gate.top_k, dim=-1)
    return logits, (values / values.sum(-1, keepdim=True)).to(logits.dtype), chosen
