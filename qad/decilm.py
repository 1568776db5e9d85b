"""DeciLM (`model_type` "nemotron-nas"): Llama whose blocks differ in shape, each as `block_configs` in config.json says.

Llama Nemotron Super 49B and Ultra 253B are of this kind. Their own code needs an older transformers, so it is never run: the
configuration and the model here are made of transformers' Llama parts (5.17, `models/llama`), and `register` tells its Auto
classes about them. Tensors have the names that Llama's have; a part that a block lacks has none.

A block has attention and an MLP, and before each a norm of its own. Either part may be

- of its own size: `attention.n_heads_in_group` query heads share a key and a value head; the MLP is
  ceil256(int(2 · round(ffn_mult, 6) · hidden_size / 3)) wide, ceil256 being the next multiple of 256;
- left out with its norm (`no_op`): the block passes its input on;
- one linear layer without a bias (`replace_with_linear`): `self_attn.linear_attn` or `mlp.linear_mlp`.

The rules are those of the code beside the published weights, as vLLM 0.32 (`models/nemotron_nas.py`) and NVIDIA's NeMo Automodel
(`linear_attn`, `linear_mlp`) have them too. What else that code can do (windows, attention sinks, sparsity, experts, Mamba) is
refused by name. Departure: layers of the KV cache are counted over the blocks with attention, since generation asks the first of
them how long a text is.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, LlamaModel, LlamaPreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm, LlamaRotaryEmbedding

from qad.errors import CheckpointError

MODEL_TYPE = "nemotron-nas"
_ELSEWHERE = {
    "position_embedding_type": "rope",
    "logit_scale": 1.0,
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "partial_rotary_factor": 1.0,
}
"""Fields beside the blocks that would change the computation, with the value that does not; None and false never do."""
_REFUSED = (*_ELSEWHERE, "attention_multiplier", "rope_local_base_freq", "o_proj_bias", "qkv_bias", "bias", "sliding_window")


@dataclass(frozen=True)
class AttentionShape:
    """What stands for attention in a block. n_heads_in_group: query heads a key and value head; None where there is no attention."""

    no_op: bool
    replace_with_linear: bool
    n_heads_in_group: int | None


@dataclass(frozen=True)
class FfnShape:
    """What stands for the MLP in a block. ffn_mult: sets its width; None where there is no MLP."""

    no_op: bool
    replace_with_linear: bool
    ffn_mult: float | None


@dataclass(frozen=True)
class Block:
    """One element of `block_configs`, read. Serving engines read it under these names as well. given: as config.json has it."""

    attention: AttentionShape
    ffn: FfnShape
    given: dict[str, Any]


class DeciLMConfig(LlamaConfig):
    """The configuration of a DeciLM model; `block_configs` may be given as config.json has them, and is a list of `Block`.

    Raises:
        CheckpointError: `block_configs` is missing, has another length than `num_hidden_layers`, or asks for what is not available.
    """

    model_type = MODEL_TYPE
    has_no_defaults_at_init = True

    def __init__(self, *, block_configs: Any = None, **fields: Any) -> None:
        super().__init__(**fields | {"intermediate_size": 0, "num_key_value_heads": 0})  # each block has its own
        self.block_configs = list(_read_blocks(self, block_configs))

    def to_dict(self) -> dict[str, Any]:
        """The content of a config.json, as the published models write it: other readers of this kind know no `rope_parameters`."""
        fields = super().to_dict()
        fields["block_configs"] = [copy.deepcopy(block.given) for block in self.block_configs]
        fields["intermediate_size"] = fields["num_key_value_heads"] = None
        rope = dict(fields.pop("rope_parameters"))
        fields["rope_theta"] = rope.pop("rope_theta")
        fields["rope_scaling"] = None if rope["rope_type"] == "default" else rope
        return fields


class _Linear(nn.Module):
    """A linear layer where a block would have attention or an MLP, under the `name` that it has in files."""

    def __init__(self, name: str, width: int) -> None:
        super().__init__()
        self._name = name
        self.add_module(name, nn.Linear(width, width, bias=False))

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.get_submodule(self._name)(hidden_states)


class DeciLMDecoderLayer(GradientCheckpointingLayer):
    """One block; cache_index: which layer of the KV cache its attention has."""

    def __init__(self, config: DeciLMConfig, block: Block, cache_index: int) -> None:
        super().__init__()
        shapes = copy.copy(config)  # of this block alone; its parts ask the shared one for everything else
        attention, ffn = block.attention, block.ffn
        self.has_attention, self.has_mlp = not attention.no_op, not ffn.no_op
        if self.has_attention:
            self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
            if attention.n_heads_in_group is None:
                self.self_attn: Any = _Linear("linear_attn", config.hidden_size)
            else:
                shapes.num_key_value_heads = config.num_attention_heads // attention.n_heads_in_group
                self.self_attn = LlamaAttention(shapes, cache_index)
                self.self_attn.config = config
        if self.has_mlp:
            self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
            if ffn.ffn_mult is None:
                self.mlp: Any = _Linear("linear_mlp", config.hidden_size)
            else:
                shapes.intermediate_size = mlp_width(ffn.ffn_mult, config.hidden_size)
                self.mlp = LlamaMLP(shapes)
                self.mlp.config = config

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        if self.has_attention:
            normed = self.input_layernorm(hidden_states)
            if isinstance(self.self_attn, _Linear):
                hidden_states = hidden_states + self.self_attn(normed)
            else:
                hidden_states = hidden_states + self.self_attn(hidden_states=normed, **kwargs)[0]
        if self.has_mlp:
            hidden_states = hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states


class DeciLMModel(LlamaModel):
    """The decoder: Llama's, with blocks of its own."""

    config_class = DeciLMConfig
    _no_split_modules: ClassVar[Any] = ["DeciLMDecoderLayer"]
    _can_record_outputs: ClassVar[Any] = {"hidden_states": DeciLMDecoderLayer, "attentions": LlamaAttention}

    def __init__(self, config: DeciLMConfig) -> None:
        LlamaPreTrainedModel.__init__(self, config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(_layers(config))
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()


class DeciLMForCausalLM(LlamaForCausalLM):
    """The language model; its name is what `architectures` in config.json says."""

    config_class = DeciLMConfig
    _no_split_modules: ClassVar[Any] = ["DeciLMDecoderLayer"]

    def __init__(self, config: DeciLMConfig) -> None:
        LlamaPreTrainedModel.__init__(self, config)
        self.model = DeciLMModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


def register() -> None:
    """Tell transformers' AutoConfig and AutoModelForCausalLM what a "nemotron-nas" model is; once is enough, more does no harm.

    Its classes win over Python files beside the weights, whether those may be run or not.
    """
    AutoConfig.register(MODEL_TYPE, DeciLMConfig, exist_ok=True)
    AutoModelForCausalLM.register(DeciLMConfig, DeciLMForCausalLM, exist_ok=True)


def mlp_width(ffn_mult: float, hidden_size: int) -> int:
    """The width of an MLP: 2/3 of `ffn_mult` times `hidden_size`, cut to a whole number, then the next multiple of 256."""
    return -(-int(2 * round(ffn_mult, 6) * hidden_size / 3) // 256) * 256


def _layers(config: DeciLMConfig) -> Iterator[DeciLMDecoderLayer]:
    cached = 0
    for block in config.block_configs:
        yield DeciLMDecoderLayer(config, block, cached)
        cached += block.attention.n_heads_in_group is not None


def _read_blocks(config: DeciLMConfig, blocks: Any) -> Iterator[Block]:
    for key in _REFUSED:
        found = getattr(config, key, (config.rope_parameters or {}).get(key))
        if found not in (None, False, _ELSEWHERE.get(key)):
            allowed = f"{_ELSEWHERE[key]!r} or nothing" if key in _ELSEWHERE else "nothing"
            raise CheckpointError(f"config.json: {key}: found {found!r}; allowed for {MODEL_TYPE} is {allowed} in this version")
    if not isinstance(blocks, list) or len(blocks) != config.num_hidden_layers:
        found = f"{len(blocks)} blocks" if isinstance(blocks, list) else repr(blocks)
        raise CheckpointError(
            f"config.json: block_configs: found {found}; allowed for {MODEL_TYPE} is a list with one block for each of "
            f"num_hidden_layers ({config.num_hidden_layers}): copy config.json of the model again"
        )
    if all(_says_no_attention(block) for block in blocks):
        raise CheckpointError("config.json: block_configs: no block has attention; allowed is one or more that has")
    for index, block in enumerate(blocks):
        yield block if isinstance(block, Block) else _block(block, f"config.json: block_configs[{index}]", config)


def _says_no_attention(block: Any) -> bool:
    given = block.given if isinstance(block, Block) else block
    attention = given.get("attention") if isinstance(given, dict) else None
    return isinstance(attention, dict) and bool(attention.get("no_op") or attention.get("replace_with_linear"))


def _block(given: Any, where: str, config: DeciLMConfig) -> Block:
    attention = _part(given, where, "attention", "n_heads_in_group")
    ffn = _part(given, where, "ffn", "ffn_mult")
    _refuse_others(given, where, ("attention", "ffn"))
    group, mult = attention.pop("n_heads_in_group"), ffn.pop("ffn_mult")
    if any(attention.values()):
        group = None
    elif not _is_number(group, int) or config.num_attention_heads % group:
        raise CheckpointError(
            f"{where}.attention.n_heads_in_group: found {group!r}; allowed is a whole number above 0 that divides "
            f"num_attention_heads ({config.num_attention_heads}), or no_op or replace_with_linear in its place"
        )
    if any(ffn.values()):
        mult = None
    elif not _is_number(mult, int | float):
        raise CheckpointError(
            f"{where}.ffn.ffn_mult: found {mult!r}; allowed is a number above 0, or no_op or replace_with_linear in its place"
        )
    return Block(AttentionShape(n_heads_in_group=group, **attention), FfnShape(ffn_mult=mult, **ffn), given)


def _part(given: Any, where: str, name: str, size: str) -> dict[str, Any]:
    """`no_op`, `replace_with_linear` and the `size` of one part of a block."""
    part = given.get(name) if isinstance(given, dict) else None
    if not isinstance(part, dict):
        raise CheckpointError(
            f"{where}.{name}: found {part!r}; allowed is an object with no_op, replace_with_linear and {size}"
        )
    where = f"{where}.{name}"
    flags = {key: part.get(key) or False for key in ("no_op", "replace_with_linear")}
    for key, value in flags.items():
        if not isinstance(value, bool):
            raise CheckpointError(f"{where}.{key}: found {value!r}; allowed: true or false")
    if all(flags.values()):
        raise CheckpointError(f"{where}: no_op and replace_with_linear are both true; allowed is one of them")
    _refuse_others(part, where, (*flags, size))
    return {**flags, size: part.get(size)}


def _refuse_others(given: dict[str, Any], where: str, known: tuple[str, ...]) -> None:
    """What is neither known nor switched off would change the computation."""
    for key, value in given.items():
        if key not in known and value is not None and value is not False:
            raise CheckpointError(
                f"{where}.{key}: found {value!r}; allowed in this version are {', '.join(known)}, and others that are null or false"
            )


def _is_number(value: Any, kind: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool) and value > 0
