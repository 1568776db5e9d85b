"""What a model is made of, by its config.json alone. No torch.

Names and shapes are those of transformers' classes (5.17) and, for DeciLM ("nemotron-nas", whose blocks differ in shape), of
`qad.decilm`; each expert is linear layers of its own, as `qad.experts` opens their stacks and as files name them. A test holds all of it
against models without weights. Held against published parameter counts alone: the vision towers of image models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from harness.architecture import Architecture, Attention, Experts, Layer, Mamba, Mlp, Part, Weight
from harness.errors import ModelError
from harness.vision_sizes import vision_of

_PATTERN = {"M": "mamba", "E": "moe", "*": "attention", "-": "mlp"}
_LAYERS = {
    "mamba": "mamba",
    "linear_attention": "mamba",
    "attention": "attention",
    "full_attention": "attention",
    "moe": "moe",
    "mlp": "mlp",
}


_LATENT_NOTE = (
    "deepseek_v3: weights and the cache (as vLLM keeps it, one latent for all heads) follow its configuration, its further layer that "
    "predicts a second token is left out; activations and hours are unverified"
)


def architecture_of(config: dict[str, Any], where: str) -> Architecture:
    """The architecture of a configuration; `where` it was found is said in errors.

    Raises:
        ModelError: an architecture that is not known here, a field that is missing or no number.
    """
    fields = _Fields(config, where)
    model_type = str(config.get("model_type"))
    for key in ("text_config", "llm_config"):
        if isinstance(config.get(key), dict):
            return _with_vision(fields, _Fields(config[key], f"{where}: {key}"), model_type)
    return _text(fields, model_type, prefix="model.", head="lm_head.weight")


class _Fields:
    """Reads numbers out of a configuration."""

    def __init__(self, config: dict[str, Any], where: str) -> None:
        self.config, self.where = config, where

    def number(self, *names: str, default: int | None = None) -> int:
        """The first of `names` that is there."""
        for name in names:
            value = self.config.get(name)
            if value is not None:
                if type(value) is not int or value < 0:
                    raise ModelError(
                        f"{self.where}: {name}: found {value!r}; allowed is a whole number; copy config.json again"
                    )
                return value
        if default is not None:
            return default
        raise ModelError(f"{self.where}: {names[0]}: missing; the size of the model depends on it: copy config.json again")

    def flag(self, name: str, *, default: bool = False) -> bool:
        value = self.config.get(name)
        return default if value is None else bool(value)

    def head_dim(self) -> int:
        return self.number("head_dim", default=0) or self.number("hidden_size") // self.number("num_attention_heads")


def _text(fields: _Fields, model_type: str, *, prefix: str, head: str) -> Architecture:
    readers: dict[str, Callable[[_Fields, str], tuple[Layer, ...]]] = {
        "llama": _decoder,
        "mistral": _decoder,
        "qwen2": _decoder,
        "qwen3": _decoder,
        "qwen3_moe": _decoder,
        "deepseek_v3": _latent,
        "nemotron_h": _hybrid,
        "nemotron-nas": _blocks,
    }
    if model_type not in readers:
        raise ModelError(
            f"{fields.where}: model_type {model_type!r} is not known, so its memory cannot be planned; known: "
            f"{', '.join(sorted(readers))}, and image models around one of them (text_config or llm_config)"
        )
    width, vocabulary = fields.number("hidden_size"), fields.number("vocab_size")
    names = ("embeddings", "norm_f") if model_type == "nemotron_h" else ("embed_tokens", "norm")
    outside = [
        Weight(f"{prefix}{names[0]}.weight", (vocabulary, width), "embedding"),
        Weight(f"{prefix}{names[1]}.weight", (width,), "other"),
    ]
    if not fields.flag("tie_word_embeddings"):
        outside.append(Weight(head, (vocabulary, width), "head"))
    layers = readers[model_type](fields, prefix)
    context = fields.number("max_position_embeddings", default=0)
    notes = () if model_type != "deepseek_v3" else (_LATENT_NOTE,)
    is_fp8 = (fields.config.get("quantization_config") or {}).get("quant_method") == "fp8"
    return Architecture(model_type, width, vocabulary, context, layers, tuple(outside), notes, is_fp8)


def _decoder(fields: _Fields, prefix: str) -> tuple[Layer, ...]:
    """Attention and MLP (or experts) in every layer: Llama, Mistral, Qwen."""
    kind, width = str(fields.config["model_type"]), fields.number("hidden_size")
    heads = fields.number("num_attention_heads")
    attention = Attention(
        heads, fields.number("num_key_value_heads", default=heads), fields.head_dim(), has_norms=kind.startswith("qwen3")
    )
    has_bias = kind == "qwen2" or fields.flag("attention_bias")
    dense = fields.config.get("mlp_only_layers") or []
    layers = []
    for index in range(fields.number("num_hidden_layers")):
        name = f"{prefix}layers.{index}"
        is_sparse = (
            kind == "qwen3_moe"
            and index not in dense
            and (index + 1) % fields.number("decoder_sparse_step", default=1) == 0
            and fields.number("num_experts", "num_local_experts") > 0
        )
        part: Part
        if is_sparse:
            count, active = fields.number("num_experts", "num_local_experts"), fields.number("num_experts_per_tok")
            part = Experts(count, active, fields.number("moe_intermediate_size"), width, gated=True)
        else:
            part = Mlp(fields.number("intermediate_size"), gated=True)
        output_bias = has_bias and kind != "qwen2"
        weights = [
            *_attention(f"{name}.self_attn", width, attention, has_bias=has_bias, output_bias=output_bias),
            *_inner(f"{name}.mlp", width, part, has_bias=kind == "llama" and fields.flag("mlp_bias")),
            *_norms(name, width, "input_layernorm", "post_attention_layernorm"),
        ]
        layers.append(Layer((attention, part), tuple(weights)))
    return tuple(layers)


def _latent(fields: _Fields, prefix: str) -> tuple[Layer, ...]:
    """DeepSeek V3: attention over a latent of keys and values (MLA), an MLP in the first layers and experts after them."""
    width, heads = fields.number("hidden_size"), fields.number("num_attention_heads")
    plain, rotated, value = (fields.number(f"{kind}_head_dim") for kind in ("qk_nope", "qk_rope", "v"))
    q_rank, kv_rank = fields.number("q_lora_rank"), fields.number("kv_lora_rank")
    attention = Attention(heads, heads, plain + rotated, latent=kv_rank + rotated)
    layers = []
    for index in range(fields.number("num_hidden_layers")):
        name = f"{prefix}layers.{index}"
        part: Mlp | Experts = Mlp(fields.number("intermediate_size"), gated=True)
        if index >= fields.number("first_k_dense_replace"):
            inner = fields.number("moe_intermediate_size")
            count, active = fields.number("n_routed_experts"), fields.number("num_experts_per_tok")
            part = Experts(count, active, inner, width, gated=True, shared=inner * fields.number("n_shared_experts"))
        own = f"{name}.self_attn"
        weights = [
            *_linear(f"{own}.q_a_proj", q_rank, width, has_bias=False),
            *_linear(f"{own}.q_b_proj", heads * (plain + rotated), q_rank, has_bias=False),
            *_linear(f"{own}.kv_a_proj_with_mqa", kv_rank + rotated, width, has_bias=False),
            *_linear(f"{own}.kv_b_proj", heads * (plain + value), kv_rank, has_bias=False),
            *_linear(f"{own}.o_proj", width, heads * value, has_bias=False),
            *_norms(own, q_rank, "q_a_layernorm"),
            *_norms(own, kv_rank, "kv_a_layernorm"),
            *_inner(f"{name}.mlp", width, part, has_bias=False),
            *_norms(name, width, "input_layernorm", "post_attention_layernorm"),
        ]
        layers.append(Layer((attention, part), tuple(weights)))
    return tuple(layers)


def _hybrid(fields: _Fields, prefix: str) -> tuple[Layer, ...]:
    """One mixer a layer: Mamba-2, attention, MLP or experts."""
    width = fields.number("hidden_size")
    layers = []
    for index, kind in enumerate(_kinds(fields)):
        name = f"{prefix}layers.{index}"
        mixer = f"{name}.mixer"
        part: Part
        if kind == "mamba":
            part = Mamba(
                fields.number("mamba_num_heads"),
                fields.number("mamba_head_dim"),
                fields.number("n_groups", "mamba_n_groups"),
                fields.number("ssm_state_size"),
                fields.number("conv_kernel", "mamba_d_conv", default=4),
                fields.number("chunk_size", "mamba_chunk_size", default=128),
            )
            has_conv_bias = fields.flag("use_conv_bias", default=True)
            weights = [*_mamba(mixer, width, part, has_bias=fields.flag("use_bias"), has_conv_bias=has_conv_bias)]
        elif kind == "attention":
            heads = fields.number("num_attention_heads")
            size = fields.number("head_dim", "attention_head_dim", default=128)
            part = Attention(heads, fields.number("num_key_value_heads", default=heads), size)
            weights = [*_attention(mixer, width, part, has_bias=False, output_bias=False)]
        else:
            has_bias = fields.flag("mlp_bias")
            if kind == "mlp":
                part = Mlp(fields.number("intermediate_size"), gated=False)
            else:
                part = Experts(
                    fields.number("n_routed_experts"),
                    fields.number("num_experts_per_tok"),
                    fields.number("moe_intermediate_size"),
                    fields.number("moe_latent_size", default=width),
                    gated=False,
                    shared=fields.number("moe_shared_expert_intermediate_size"),
                )
            weights = [*_inner(mixer, width, part, has_bias=has_bias)]
        layers.append(Layer((part,), (*weights, *_norms(name, width, "norm"))))
    return tuple(layers)


def _kinds(fields: _Fields) -> list[str]:
    """The kind of every layer of a hybrid."""
    listed, pattern = (
        fields.config.get("layers_block_type") or fields.config.get("layer_types"),
        fields.config.get("hybrid_override_pattern"),
    )
    found = [_LAYERS.get(str(kind)) for kind in listed] if listed else [_PATTERN.get(letter) for letter in str(pattern or "")]
    if not found or None in found:
        raise ModelError(
            f"{fields.where}: hybrid_override_pattern: found {pattern!r}; allowed are the letters M (Mamba), * (attention), - (MLP) and "
            "E (experts), or a list layers_block_type; copy config.json again"
        )
    return [str(kind) for kind in found]


def _blocks(fields: _Fields, prefix: str) -> tuple[Layer, ...]:
    """DeciLM: each block says its shape, or that it has no attention, or no MLP, or a single product in place of one."""
    width, heads = fields.number("hidden_size"), fields.number("num_attention_heads")
    blocks = fields.config.get("block_configs")
    if not isinstance(blocks, list) or len(blocks) != fields.number("num_hidden_layers"):
        found = f"{len(blocks)} blocks" if isinstance(blocks, list) else repr(blocks)
        raise ModelError(
            f"{fields.where}: block_configs: found {found}; allowed is one for each of num_hidden_layers; copy config.json again"
        )
    layers = []
    for index, block in enumerate(blocks):
        name = f"{prefix}layers.{index}"
        attention, ffn = (
            _Fields(block.get(key) or {}, f"{fields.where}: block_configs[{index}].{key}") for key in ("attention", "ffn")
        )
        parts: list[Part] = []
        weights: list[Weight] = []
        if attention.flag("replace_with_linear"):
            weights.append(Weight(f"{name}.self_attn.linear_attn.weight", (width, width), "linear"))
        elif not attention.flag("no_op"):
            shape = Attention(heads, heads // attention.number("n_heads_in_group"), fields.head_dim())
            parts.append(shape)
            has_bias = fields.flag("attention_bias")
            weights += _attention(f"{name}.self_attn", width, shape, has_bias=has_bias, output_bias=has_bias)
        if weights:
            weights += _norms(name, width, "input_layernorm")
        if ffn.flag("replace_with_linear"):
            weights.append(Weight(f"{name}.mlp.linear_mlp.weight", (width, width), "linear"))
        elif not ffn.flag("no_op"):
            mlp = Mlp(_decilm_width(ffn, width), gated=True)
            parts.append(mlp)
            weights += _inner(f"{name}.mlp", width, mlp, has_bias=fields.flag("mlp_bias"))
        if not ffn.flag("no_op"):
            weights += _norms(name, width, "post_attention_layernorm")
        layers.append(Layer(tuple(parts), tuple(weights)))
    return tuple(layers)


def _decilm_width(ffn: _Fields, width: int) -> int:
    given = ffn.config.get("ffn_mult")
    if not isinstance(given, int | float) or isinstance(given, bool) or given <= 0:
        raise ModelError(f"{ffn.where}.ffn_mult: found {given!r}; allowed is a positive number; copy config.json again")
    return -(-int(2 * given * width / 3) // 256) * 256


def _attention(name: str, width: int, part: Attention, *, has_bias: bool, output_bias: bool) -> Iterator[Weight]:
    q, kv = part.heads * part.head_dim, part.kv_heads * part.head_dim
    for leaf, rows, columns, bias in (
        ("q_proj", q, width, has_bias),
        ("k_proj", kv, width, has_bias),
        ("v_proj", kv, width, has_bias),
        ("o_proj", width, q, output_bias),
    ):
        yield from _linear(f"{name}.{leaf}", rows, columns, has_bias=bias)
    if part.has_norms:
        yield from _norms(name, part.head_dim, "q_norm", "k_norm")


def _inner(name: str, width: int, part: Mlp | Experts, *, has_bias: bool) -> Iterator[Weight]:
    """The products of an MLP, or of experts with their router and what all tokens take."""
    if isinstance(part, Mlp):
        for leaf in ("gate_proj", "up_proj") if part.gated else ("up_proj",):
            yield from _linear(f"{name}.{leaf}", part.inner, width, has_bias=has_bias)
        yield from _linear(f"{name}.down_proj", width, part.inner, has_bias=has_bias)
        return
    active = part.active / part.count
    for index in range(part.count):
        for leaf in ("gate_proj", "up_proj") if part.gated else ("up_proj",):
            yield Weight(f"{name}.experts.{index}.{leaf}.weight", (part.inner, part.width), "experts", active)
        yield Weight(f"{name}.experts.{index}.down_proj.weight", (part.width, part.inner), "experts", active)
    yield Weight(f"{name}.gate.weight", (part.count, width), "other")
    if part.shared:
        yield from _inner(f"{name}.shared_experts", width, Mlp(part.shared, part.gated), has_bias=has_bias)
    if part.width != width:
        yield from _linear(f"{name}.fc1_latent_proj", part.width, width, has_bias=has_bias)
        yield from _linear(f"{name}.fc2_latent_proj", width, part.width, has_bias=has_bias)


def _mamba(name: str, width: int, part: Mamba, *, has_bias: bool, has_conv_bias: bool) -> Iterator[Weight]:
    for leaf in ("dt_bias", "A_log", "D"):
        yield Weight(f"{name}.{leaf}", (part.heads,), "other")
    yield Weight(f"{name}.conv1d.weight", (part.convolved, 1, part.kernel), "other")
    if has_conv_bias:
        yield Weight(f"{name}.conv1d.bias", (part.convolved,), "other")
    yield from _linear(f"{name}.in_proj", part.inner + part.convolved + part.heads, width, has_bias=has_bias)
    yield from _norms(name, part.inner, "norm")
    yield from _linear(f"{name}.out_proj", width, part.inner, has_bias=has_bias)


def _linear(name: str, rows: int, columns: int, *, has_bias: bool) -> Iterator[Weight]:
    yield Weight(f"{name}.weight", (rows, columns), "linear")
    if has_bias:
        yield Weight(f"{name}.bias", (rows,), "other")


def _norms(name: str, width: int, *leaves: str) -> list[Weight]:
    return [Weight(f"{name}.{leaf}.weight", (width,), "other") for leaf in leaves]


def _with_vision(fields: _Fields, text: _Fields, model_type: str) -> Architecture:
    """An image model: its language model, and the size of the rest."""
    # transformers' own classes; then remote code that carries a language model as it is (llm_config)
    prefix = {"idefics3": "model.text_model.", "smolvlm": "model.text_model."}.get(model_type, "model.language_model.")
    head = "lm_head.weight"
    if "llm_config" in fields.config:
        prefix, head = "language_model.model.", "language_model.lm_head.weight"
    inner = _text(text, str(text.config.get("model_type")), prefix=prefix, head=head)
    vision, notes = vision_of(fields.config, fields.where, width=inner.width)
    outside = (*inner.outside, *(Weight(name, (size,), "vision") for name, size in vision.items()))
    return Architecture(model_type, inner.width, inner.vocabulary, inner.context, inner.layers, outside, notes)
