"""GPU-hours and disk of a plan, from operations, bytes and the shares of a peak in `harness.hardware`. No torch.

A token costs two operations for each weight that it is multiplied with, in each product: one forward, one for the gradient of
what came in, one for that of a trained weight. Attention is added to trainings: twice the width of the queries for each token that
is looked at, half of a sequence on average, all of a row where documents are packed and `sdpa` has a mask. Reading and prompts leave it
out; generation reads the keys and values that it looks at.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from harness import activations
from harness.architecture import Architecture, Attention
from harness.hardware import (
    BANDWIDTH_SHARE,
    BF16,
    CODE_BYTES,
    FORWARD_SHARE,
    FP8_BYTES,
    FP32,
    HF_SHARE,
    TRAINING_SHARE,
    TRAINING_SHARE_EXPERTS,
    Gpu,
)
from harness.memory_model import Training
from harness.schema import Training as TrainingSettings

TOKEN_BYTES = 5
"""Of a token in a data stage: its number and its mask."""
ANSWER_BYTES = 4
"""Of a generated token in a journal, as text and number, compressed. Assumed."""


@dataclass(frozen=True)
class Cost:
    """GPU-hours of something, and the hours that it takes on `gpus` of them. validation: GPU-hours that are validations of a training."""

    label: str
    gpu_hours: float
    gpus: int
    validation: float = 0.0

    @property
    def hours(self) -> float:
        return self.gpu_hours / self.gpus


def training_hours(training: Training, tokens: int, gpu: Gpu) -> float:
    """GPU-hours of so many tokens."""
    student = training.student
    quantized = sum(w.size * w.active for w in student.weights if w.name in training.quantized)
    trained = student.active if training.train == "all" else quantized
    passes = 2 + training.activation_checkpointing  # forward, gradient of what came in, and the forward pass again
    operations = 2 * (passes * student.active + trained)
    operations += (passes + 1) * _attention(student, training.tokens, is_packed=training.is_packed)
    if training.teacher is not None and training.loss != "ce":
        operations += 2 * training.teacher.active + _attention(training.teacher, training.tokens, is_packed=training.is_packed)
    share = TRAINING_SHARE_EXPERTS if student.has_experts else TRAINING_SHARE
    return tokens * operations / (share * gpu.bf16) / 3600


def validation_hours(training: Training, settings: TrainingSettings, gpu: Gpu) -> float:
    """GPU-hours of the validations of a training: student and teacher read the held-out sequences after so many steps, and after the last."""
    if settings.validate_every is None:
        return 0.0
    steps = -(-settings.tokens // (settings.batch_size * training.tokens))
    read = [model for model in (training.student, training.teacher) if model is not None]
    operations = sum(2 * each.active + _attention(each, training.tokens, is_packed=training.is_packed) for each in read)
    tokens = -(-steps // settings.validate_every) * settings.validation_samples * training.tokens
    share = TRAINING_SHARE_EXPERTS if training.student.has_experts else TRAINING_SHARE
    return tokens * operations / (share * gpu.bf16) / 3600


def reading_hours(model: Architecture, tokens: float, gpu: Gpu) -> float:
    """GPU-hours of forward passes over so many tokens."""
    return tokens * 2 * model.active / (FORWARD_SHARE * gpu.bf16) / 3600


@dataclass(frozen=True, kw_only=True)
class Generation:
    """requests prompts of `prompt` tokens, `new` tokens after each, `rows` at a time on `gpus` GPUs that hold weight_bytes in all.

    copies: of the model, each on as many GPUs, that share the requests.
    """

    model: Architecture
    requests: int
    prompt: int
    new: int
    rows: int
    gpus: int
    weight_bytes: float
    is_hf: bool = False
    copies: int = 1


def generation_hours(given: Generation, gpu: Gpu) -> float:
    """GPU-hours of answers: prompts by operations; then, a token a row at a time, weights and caches by the memory's bandwidth."""
    if not given.requests:
        return 0.0
    requests = -(-given.requests // given.copies)  # of a copy
    rows = min(given.rows, requests)
    steps = requests * given.new / rows
    a_token, a_sequence = activations.cache_bytes(given.model, gpus=given.gpus)
    read = given.weight_bytes / given.gpus + rows * ((given.prompt + given.new / 2) * a_token + a_sequence)  # by each GPU
    share = HF_SHARE if given.is_hf else BANDWIDTH_SHARE
    seconds = read / (share * gpu.bandwidth)
    seconds = max(seconds, rows * 2 * given.model.active / (FORWARD_SHARE * gpu.bf16 * given.gpus))
    return given.copies * given.gpus * steps * seconds / 3600 + reading_hours(given.model, given.requests * given.prompt, gpu)


def _attention(model: Architecture, tokens: int, *, is_packed: bool) -> float:
    """Operations a token of queries with keys and of weights with values, over all layers, for rows of so many tokens."""
    looked_at = tokens if is_packed else tokens / 2
    return sum(4 * part.heads * part.head_dim * looked_at for part in model.parts(Attention))


def checkpoint_bytes(model: Architecture, quantized: frozenset[str], fp8: frozenset[str] = frozenset()) -> float:
    """Of a checkpoint on disk in which the weights of `quantized` are NVFP4, but for those of `fp8`."""
    packed = sum(w.size for w in model.weights if w.name in quantized)
    eights = sum(w.size for w in model.weights if w.name in fp8)
    return BF16 * (model.size - packed) + CODE_BYTES * (packed - eights) + FP8_BYTES * eights


def resume_bytes(training: Training) -> float:
    """Of what a training leaves to go on from: masters and the optimizer's state, twice while a new one is written."""
    states = 2 if training.optimizer == "adamw" else 0
    whole = dataclasses.replace(training, ranks=1)
    return 2 * (1 + states) * FP32 * whole.n_masters
