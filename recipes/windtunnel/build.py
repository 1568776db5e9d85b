r"""The small reasoner before its training: a tokenizer of a closed vocabulary and a random Llama, both from code.

A word is one token with the space before it, a digit is one token, `\boxed{` is one (harness/tasks/tunnel_words.py). A text with anything
else in it has no tokens: encoding raises, nothing becomes an unknown token. Decoding gives back the text that was encoded.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from harness.tasks.tunnel import SENTENCES
from harness.tasks.tunnel_words import PIECES, vocabulary

PAD, BOS, EOS, USER, ASSISTANT = "<|pad|>", "<|begin|>", "<|end|>", "<|user|>", "<|assistant|>"
MAX_POSITIONS = 1024
CHAT_TEMPLATE = (
    "{{ '<|begin|>' }}"
    "{% for message in messages %}"
    "{% if message['role'] not in ['user', 'assistant'] %}"
    "{{ raise_exception('role ' + message['role'] + ': the small reasoner knows user and assistant alone') }}{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ '<|end|>' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@dataclass(frozen=True)
class Shape:
    """Sizes of the model; every one is a multiple of 64."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int


SHAPES = {"small": Shape(128, 5, 4, 2, 384), "large": Shape(192, 5, 6, 2, 640)}


def build_tokenizer() -> PreTrainedTokenizerFast:
    words = [PAD, BOS, EOS, USER, ASSISTANT, *vocabulary(SENTENCES)]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}))  # no unknown token: it raises
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(PIECES), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([PAD, BOS, EOS, USER, ASSISTANT])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=MAX_POSITIONS,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def build_model(tokenizer: PreTrainedTokenizerFast, shape: Shape, seed: int) -> LlamaForCausalLM:
    """A random model in FP32."""
    config = LlamaConfig(
        **asdict(shape),
        vocab_size=-(-len(tokenizer) // 64) * 64,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        rms_norm_eps=1e-5,
        initializer_range=0.04,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config)


def save(folder: Path, model: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    """The model in BF16 with its tokenizer, as `AutoModelForCausalLM` and vLLM load it; `model` itself stays as it is."""
    weights = {name: tensor.detach().to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    config = type(model.config).from_dict({**model.config.to_dict(), "dtype": "bfloat16"})
    stored = LlamaForCausalLM(config).to(torch.bfloat16)
    stored.load_state_dict(weights)
    stored.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
