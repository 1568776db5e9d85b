"""The configuration of a twin: that of a real model, made small. No torch.

A twin has the class and the kinds of layers of the model that it stands for, in their order, but few of them and narrow ones, so that whatever
depends on structure alone (patterns, positions, fused groups, names in files, what an engine can load) behaves as it will with the model.

Widths are multiples of 64 and heads 32 wide: what NVFP4 asks for (blocks of 16) and what vLLM's attention has on a CPU. Layers are a stretch of
the model's own, at least `_LAYERS` long, in whose interior (all but the first and last two) every kind of layer occurs, so that a recipe that
leaves out layers by position finds them and still leaves some of every kind.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

HIDDEN = 128
HEAD = 32
CONTEXT = 4096
_HEADS = HIDDEN // HEAD
_LAYERS = 6
_BORDER = 2
"""Layers at either end that a recipe may leave out by position."""
_MOST_QUERIES = 8
"""Query heads to a key head, at most, where heads and hidden size are independent."""
_ROUND = 64
_DROPPED = ("_name_or_path", "architectures", "auto_map", "dtype", "quantization_config", "torch_dtype", "transformers_version")
_EXPERTS = ("n_routed_experts", "num_experts", "num_local_experts")
_COUNTS = dict.fromkeys(_EXPERTS, 8) | {"num_experts_per_tok": 2, "n_shared_experts": 1}
_WIDTHS = (
    "intermediate_size",
    "moe_intermediate_size",
    "moe_latent_size",
    "moe_shared_expert_intermediate_size",
    "shared_expert_intermediate_size",
)
_LATENT = {"kv_lora_rank": 64, "q_lora_rank": 64, "qk_nope_head_dim": HEAD, "qk_rope_head_dim": HEAD, "v_head_dim": HEAD}
_MAMBA = {"mamba_num_heads": 8, "n_groups": 2, "ssm_state_size": 32, "chunk_size": 32}
_PATTERN = {"M": "linear_attention", "*": "full_attention", "-": "mlp", "E": "moe"}
_DECILM_STEP = 256
"""DeciLM rounds the widths of its MLPs up to a multiple of it."""


@dataclass(frozen=True)
class Small:
    """fields: of a config.json, but for vocabulary and special tokens, which go by the tokenizer. notes: what was made small, or stands
    for something else."""

    fields: dict[str, Any]
    notes: tuple[str, ...]


def small_config(config: Mapping[str, Any]) -> Small:
    """The content `config` of the config.json of a language model, made small.

    KeyError where a field is missing that says what its layers are.
    """
    given = {key: value for key, value in config.items() if key not in _DROPPED}
    fields = given | {"hidden_size": HIDDEN} | _heads(given) | _context(given) | _experts(given) | _latent(given)
    fields |= {key: _width(given[key], given) for key in _WIDTHS if given.get(key)}
    if given.get("num_nextn_predict_layers"):
        fields["num_nextn_predict_layers"] = 0
    if given.get("model_type") == "nemotron_h":
        layers = _hybrid(given)
    elif given.get("block_configs"):
        layers = _blocks(given)
    else:
        layers = _decoder(given)
    fields |= layers
    fields = {key: value for key, value in fields.items() if value is not _REMOVED}
    return Small(fields, (_about(given, fields),))


def small_llama(config: Mapping[str, Any]) -> dict[str, Any]:
    """A small Llama with the ratios of the language model of `config`: what stands for it inside an image-text twin."""
    text = next((config[key] for key in ("text_config", "llm_config", "language_config") if config.get(key)), config)
    kept = ("hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size", "tie_word_embeddings")
    return small_config({"model_type": "llama"} | {key: text[key] for key in kept if text.get(key) is not None}).fields


def stretch(kinds: Sequence[Hashable], *, before: Hashable = None, shapes: Sequence[Hashable] = ()) -> slice:
    """The shortest run of at least six layers whose interior has every kind of `kinds`; all layers where there is none.

    before: a kind of layer before which another may be left out by position, too: one is, and of every kind there is another one.
    shapes: of the layers; where they differ, two of the run do.
    """
    wanted, n_shapes = set(kinds), min(2, len(set(shapes)))
    for length in range(_LAYERS, len(kinds)):
        for start in range(len(kinds) - length + 1):
            run = slice(start, start + length)
            if _is_whole(kinds[run], wanted, before) and len(set(shapes[run])) >= n_shapes:
                return run
    return slice(0, len(kinds))


def _is_whole(kinds: Sequence[Hashable], wanted: set[Hashable], before: Hashable) -> bool:
    stays = {i for i in range(len(kinds) - 1) if kinds[i + 1] == before and kinds[i] != before}
    interior = range(_BORDER, len(kinds) - _BORDER)
    return {kinds[i] for i in interior if i not in stays} >= wanted and (bool(stays) or before not in wanted)


_REMOVED = object()


def _decoder(given: Mapping[str, Any]) -> dict[str, Any]:
    """Attention and an MLP (or experts) in every layer."""
    n = min(_LAYERS, given.get("num_hidden_layers", _LAYERS))
    found: dict[str, Any] = {"num_hidden_layers": n}
    if given.get("layer_types"):
        part = stretch(given["layer_types"])
        found["layer_types"] = list(given["layer_types"][part])
        n = found["num_hidden_layers"] = len(found["layer_types"])
    if given.get("first_k_dense_replace"):
        found["first_k_dense_replace"] = min(given["first_k_dense_replace"], n // 2)
    if given.get("mlp_only_layers"):
        found["mlp_only_layers"] = [index for index in given["mlp_only_layers"] if index < n // 2]
    if given.get("max_window_layers"):
        found["max_window_layers"] = min(given["max_window_layers"], n)
    return found


def _hybrid(given: Mapping[str, Any]) -> dict[str, Any]:
    """One mixer a layer: Mamba-2, attention, an MLP or experts."""
    kinds = given.get("layers_block_type") or [_PATTERN[letter] for letter in given["hybrid_override_pattern"]]
    kept = list(kinds[stretch(kinds, before="full_attention")])
    found: dict[str, Any] = dict(_MAMBA)
    if given.get("mamba_head_dim"):
        found["mamba_head_dim"] = 8 * max(1, round(given["mamba_head_dim"] / 16))
    letters = {kind: letter for letter, kind in _PATTERN.items()}
    pattern = "".join(letters[kind] for kind in kept)
    return found | {
        "hybrid_override_pattern": pattern,
        "layers_block_type": _REMOVED,
        "num_hidden_layers": len(kept),
    }


def _blocks(given: Mapping[str, Any]) -> dict[str, Any]:
    """DeciLM: attention and an MLP of its own shape in each block, or none, or one product in place of either."""
    small = [_block(block, given) for block in given["block_configs"]]
    kinds = [tuple(_absence(block[part]) for part in ("attention", "ffn")) for block in small]
    kept = small[stretch(kinds, shapes=[block["ffn"].get("ffn_mult") for block in small])]
    return {"block_configs": kept, "num_hidden_layers": len(kept), "num_attention_heads": _HEADS}


def _absence(part: Mapping[str, Any]) -> tuple[bool, bool]:
    """Of a part of a block of DeciLM: whether there is none, and whether a single product stands for it."""
    return bool(part.get("no_op")), bool(part.get("replace_with_linear"))


def _block(block: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    attention, ffn = dict(block["attention"]), dict(block["ffn"])
    if attention.get("n_heads_in_group"):
        attention["n_heads_in_group"] = min(_HEADS // 2, attention["n_heads_in_group"])
    if ffn.get("ffn_mult"):
        steps = round(2 * ffn["ffn_mult"] * HIDDEN / 3 / _DECILM_STEP)
        ffn["ffn_mult"] = 1.5 * _DECILM_STEP * max(1, steps) / HIDDEN
    return {**block, "attention": attention, "ffn": ffn}


def _heads(given: Mapping[str, Any]) -> dict[str, Any]:
    """Attention heads in the model's ratio as far as the width allows it, two key heads where it has several."""
    heads = given.get("num_attention_heads")
    if heads is None:
        return {}
    key_heads = given.get("num_key_value_heads") or heads
    ratio = max(1, heads // key_heads)
    size = given.get("head_dim")
    few = min(key_heads, 2)
    if size and size * heads != given.get("hidden_size") and not given.get("kv_lora_rank"):
        found = {"num_attention_heads": few * min(ratio, _MOST_QUERIES), "num_key_value_heads": few}
    else:
        found = {"num_attention_heads": _HEADS, "num_key_value_heads": max(few, _HEADS // ratio)}
    if given.get("num_key_value_heads") is None:
        del found["num_key_value_heads"]
    return found | ({"head_dim": HEAD} if size else {})


def _latent(given: Mapping[str, Any]) -> dict[str, Any]:
    """Widths of attention through latent vectors."""
    found: dict[str, Any] = {key: small for key, small in _LATENT.items() if given.get(key)}
    return found | ({"qk_head_dim": 2 * HEAD} if given.get("qk_head_dim") else {})


def _experts(given: Mapping[str, Any]) -> dict[str, Any]:
    """Few experts, in as many groups as there were, four at most, half of which a token may go to."""
    found: dict[str, Any] = {key: min(given[key], most) for key, most in _COUNTS.items() if given.get(key)}
    if (given.get("n_group") or 1) > 1:
        found |= {"n_group": 4, "topk_group": 2}
    return found


def _context(given: Mapping[str, Any]) -> dict[str, Any]:
    """Positions, and the lengths that a rule for longer ones names, in proportion."""
    real = given.get("max_position_embeddings") or CONTEXT
    context = min(real, CONTEXT)
    found: dict[str, Any] = {"max_position_embeddings": context}
    for key in ("rope_scaling", "rope_parameters"):
        rule = given.get(key)
        if isinstance(rule, Mapping) and rule.get("original_max_position_embeddings"):
            original = max(1, rule["original_max_position_embeddings"] * context // real)
            found[key] = {**rule, "original_max_position_embeddings": original}
    if given.get("sliding_window"):
        found["sliding_window"] = min(given["sliding_window"], context // 4)
    return found


def _width(value: int, given: Mapping[str, Any]) -> int:
    """A width in the model's ratio to its hidden size, as a multiple of 64."""
    return _ROUND * max(1, round(value * HIDDEN / given["hidden_size"] / _ROUND))


def _about(given: Mapping[str, Any], fields: Mapping[str, Any]) -> str:
    """What was made small, in a line."""
    said = [f"{fields['num_hidden_layers']} layers of {_n_layers(given)}"]
    if "hybrid_override_pattern" in fields:
        said[0] += f" ({fields['hybrid_override_pattern']})"
    if "E" in fields.get("hybrid_override_pattern", "E"):
        counts = [f"{fields[key]} experts of {given[key]}" for key in _EXPERTS if given.get(key)]
        said += counts[:1]
    if given.get("hidden_size"):
        said.append(f"{HIDDEN} wide instead of {given['hidden_size']}")
    return ", ".join(said)


def _n_layers(given: Mapping[str, Any]) -> Any:
    return given.get("num_hidden_layers") or len(given.get("layers_block_type") or given.get("hybrid_override_pattern") or ())
