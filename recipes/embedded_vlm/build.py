"""The embedded model before its training: tokenizer, image processor and a random Idefics3, all from code.

A picture of 64 pixels is one tile: 8 x 8 patches of 8 pixels, one character of the pictures' font each, and each of them is one of
64 image tokens. Heads are 32 (vision) and 64 (text) wide, which are sizes that vLLM's attention takes on a CPU.
Capitals and digits are tokens of their own, so that an answer is read off a picture character by character; lower-case words of the
questions are tokens by frequency.
"""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import Idefics3Config, Idefics3ForConditionalGeneration, Idefics3Processor, PreTrainedTokenizerFast
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

from harness.tasks import drawing_kinds
from harness.tasks.drawings import SIDE, pictures

PATCH, SCALE_FACTOR = 8, 1
IMAGE_TOKENS = (SIDE // PATCH // SCALE_FACTOR) ** 2
VOCABULARY = 512
MAX_POSITIONS = 1024
START, END, PAD = "<|im_start|>", "<end_of_utterance>", "<pad>"
IMAGE, AROUND, GLOBAL = "<image>", "<fake_token_around_image>", "<global-img>"
PICTURE = AROUND + GLOBAL + IMAGE * IMAGE_TOKENS + AROUND
"""What an image becomes in a prompt."""

VISION = {
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "image_size": SIDE,
    "patch_size": PATCH,
    "initializer_range": 0.04,
}
TEXT = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": MAX_POSITIONS,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    "initializer_range": 0.04,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>' }}{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{{ '<end_of_utterance>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level pairs from the questions of the training pictures; no byte is unknown."""
    tokenizer = Tokenizer(models.BPE())
    single = pre_tokenizers.Split(Regex("[A-Z0-9]"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([single, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, START, END, IMAGE, AROUND, GLOBAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    makers = (drawing_kinds.chart, drawing_kinds.document, drawing_kinds.diagram, drawing_kinds.scene, drawing_kinds.page)
    drawn = [picture for maker in makers for picture in islice(pictures(maker, "train", seed="tokenizer"), 300)]
    questions = [f"user\n{question.text}\nassistant\n{question.answer}" for picture in drawn for question in picture.questions]
    tokenizer.train_from_iterator(questions, trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=PAD, model_max_length=MAX_POSITIONS, padding_side="left"
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def build_processor(tokenizer: PreTrainedTokenizerFast) -> Idefics3Processor:
    """Pictures of any size become one tile; those of the tasks keep every pixel."""
    images = Idefics3ImageProcessorPil(
        do_image_splitting=False,
        size={"longest_edge": SIDE},
        max_image_size={"longest_edge": SIDE},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return Idefics3Processor(images, tokenizer, image_seq_len=IMAGE_TOKENS, chat_template=tokenizer.chat_template)


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> Idefics3ForConditionalGeneration:
    """A random model in FP32."""
    n_tokens = -(-len(tokenizer) // 16) * 16
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    config = Idefics3Config(
        vision_config=dict(VISION),
        text_config={**TEXT, "vocab_size": n_tokens, **ids},
        scale_factor=SCALE_FACTOR,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(seed)
    model = Idefics3ForConditionalGeneration(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def save(folder: Path, model: Any, processor: Idefics3Processor) -> None:
    """Everything that `AutoProcessor` and `AutoModelForImageTextToText` need, weights in the type that they have."""
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
