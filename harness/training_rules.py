"""What the training settings of a variant must agree on, and the defaults that a source recommends. No torch here."""

from __future__ import annotations

from collections.abc import Iterator

from harness.schema import Quantization, Training, Variant

_SOURCE = "arXiv 2601.20088, section on learning rates"
RECOMMENDED_LR = {
    "sft": (1e-6, f"{_SOURCE}: for models trained by SFT (Llama Nemotron Super V1, Nemotron Nano 9B V2)"),
    "rl": (1e-5, f"{_SOURCE}: for models trained by RL (AceReason Nemotron 1.1, Nemotron 3 Nano)"),
}
"""Learning rates by `model.post_training`, with where they come from. For other models there is none that a source states."""
RECOMMENDED_LOSS = "KL to the model itself (arXiv 2601.20088: against MSE on logits, and against a larger sibling as teacher)"


def contradictions(variant: Variant, training: Training, quantization: Quantization | None) -> Iterator[tuple[str, str]]:
    """Pairs of a key of [training] and what is wrong with it."""
    given = set(variant.training) or training.model_fields_set
    if training.micro_batch_size is not None and training.micro_batch_size > training.batch_size:
        yield (
            "micro_batch_size",
            f"found {training.micro_batch_size}, more than batch_size {training.batch_size}; lower it, or leave it out",
        )
    if training.optimizer == "adafactor" and "betas" in given:
        yield "betas", 'has no effect with optimizer = "adafactor"; remove it'
    if variant.seeds is not None and "seed" in given:
        yield "seed", "has no effect beside seeds; remove it"
    if training.train == "scales" and "max_saturated" in given:
        yield "max_saturated", 'has no effect with train = "scales", whose codes stay; remove it'
    for task in {name for name in training.select_tasks if training.select_tasks.count(name) > 1}:
        yield "select_tasks", f'the task "{task}" is repeated; each is judged once'
    yield from _about_selection(training, given)
    if quantization is not None:
        yield from _about_scales(training, quantization)


def objective_of(variant: Variant) -> tuple[dict[str, str | float], list[tuple[str, str]]]:
    """The objective of a trained variant, and what is wrong with its settings, by key."""
    if variant.method == "qat":
        unused = [key for key in ("loss", "temperature", "ce_weight", "teacher") if getattr(variant, key) is not None]
        why = 'has no effect with method = "qat", which trains on cross entropy; remove it, or use "qad"'
        return {"loss": "ce"}, [(key, why) for key in unused]
    loss = variant.loss or "kl"
    objective: dict[str, str | float] = {"loss": loss}
    mistakes = []
    if loss == "mse" and variant.temperature is not None:
        mistakes.append(("temperature", 'has no effect with loss = "mse"; remove it'))
    elif loss != "mse":
        objective["temperature"] = 1.0 if variant.temperature is None else variant.temperature
    if loss == "kl_ce":
        if variant.ce_weight is None:
            mistakes.append(("ce_weight", 'missing; loss = "kl_ce" is (1 - ce_weight) KL + ce_weight CE'))
        objective["ce_weight"] = variant.ce_weight or 0.5
    elif variant.ce_weight is not None:
        mistakes.append(("ce_weight", f'has no effect with loss = "{loss}"; remove it, or use "kl_ce"'))
    return objective, mistakes


def _about_selection(training: Training, given: set[str]) -> Iterator[tuple[str, str]]:
    if training.select != "last" and training.validate_every is None:
        yield "validate_every", f'missing; select = "{training.select}" chooses among validated checkpoints'
    if training.validate_every is None and "validation_samples" in given:
        yield "validation_samples", "has no effect without validate_every; remove it"
    if training.select == "best_of_k" and not training.select_tasks:
        yield "select_tasks", 'missing; select = "best_of_k" is judged on tasks, which then are no evidence any more'
    if training.select != "best_of_k":
        for key in ("candidates", "select_tasks"):
            if key in given:
                yield f"{key}", f'has no effect with select = "{training.select}"; remove it, or use "best_of_k"'


def _about_scales(training: Training, quantization: Quantization) -> Iterator[tuple[str, str]]:
    if training.train == "scales" and quantization.block_scales != "learned":
        yield (
            "train",
            f'found "scales" with quantization.block_scales = "{quantization.block_scales}"; to train scales they must be "learned"',
        )
