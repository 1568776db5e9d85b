"""What the tests of several ranks run under torchrun: python -m torch.distributed.run ... tests/rank_worker.py FOLDER CASE...

Rank 0 writes what each case found to FOLDER/<case>.json. The tests run the same cases in a single process to compare with.
"""

import copy
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from training_checks import Recorder, batches_for, inputs_of, settings
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from qad import ranks
from qad.batch import Batch
from qad.calibrate import calibrate
from qad.candidates import Candidates
from qad.distill import train
from qad.errors import Interrupted, TrainingError
from qad.experts import open_experts
from qad.losses import Objective
from qad.modules import encoding_digest
from qad.quantize import quantize_model
from qad.recipe import Recipe
from qad.resume import Checkpoints

VOCABULARY = 501
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "tie_word_embeddings": True,
    "initializer_range": 0.2,
}
"""No number of rows is a multiple of three, and that of the tied head none of two."""
PLAIN = Recipe(activations=False)
CASES = {
    "quantized": {"n_steps": 20},
    "all": {"train": "all"},
    "learned": {"learned_scales": True},
    "scales": {"train": "scales", "learned_scales": True},
    "w4a4": {"recipe": Recipe()},
    "fp8": {"recipe": Recipe(fp8=("*.down_proj",), kv_cache="fp8")},
    "ce": {"train": "all", "objective": Objective("ce"), "validate_every": 5},
    "checkpointing": {"activation_checkpointing": True},
    "head": {"recipe": Recipe(activations=False, exclude=()), "tied": False, "validate_every": 5, "keep": 2},
    "bf16": {"dtype": torch.bfloat16, "recipe": Recipe(), "n_steps": 20},
    "bf16_all": {
        "dtype": torch.bfloat16,
        "recipe": Recipe(block_scales="learned"),
        "train": "all",
        "learned_scales": True,
        "n_steps": 20,
    },
    "stopped": {"train": "all", "stop_after": 4},
    "resumed": {"train": "all", "resume": True},
    "nan": {"nan": True},
    "adafactor": {"optimizer": "adafactor"},
    "experts": {"has_experts": True, "recipe": Recipe()},
    "experts_all": {"has_experts": True, "train": "all", "activation_checkpointing": True},
    "images": {"sees": True, "recipe": Recipe()},
    "images_all": {"sees": True, "train": "all", "activation_checkpointing": True},
}


IMAGE = VOCABULARY - 1


def model(tied, sees, has_experts):
    if has_experts:  # more than the few tokens of a row reach: ranks route to different ones
        experts = {"num_experts": 64, "num_experts_per_tok": 1, "moe_intermediate_size": 32, "head_dim": 16}
        mixed = Qwen3MoeForCausalLM(Qwen3MoeConfig(**(SIZES | experts | {"tie_word_embeddings": False})))
        open_experts(mixed)
        return mixed
    config = LlamaConfig(**(SIZES | {"tie_word_embeddings": tied}))
    if not sees:
        return LlamaForCausalLM(config)
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1}
    vision = tower | {"image_size": 8, "patch_size": 4, "initializer_range": 0.2}
    return Idefics3ForConditionalGeneration(
        Idefics3Config(
            text_config=config,
            vision_config=vision,
            scale_factor=2,
            image_token_id=IMAGE,
            tie_word_embeddings=False,
            pad_token_id=0,
        )
    )


def seeing(batch, generator):
    """The same with an image of one token in its first row: other rows, and so other ranks, have none."""
    ids = batch.input_ids.clone()
    ids[ids == IMAGE] = 5
    ids[0, 2] = IMAGE
    pixels = torch.randn(1, 1, 3, 8, 8, generator=generator)
    return Batch(ids, batch.attention_mask, batch.loss_mask, None, {"pixel_values": pixels}, ids == IMAGE)


def models(dtype, recipe, tied, sees, has_experts=False):
    """Teacher and quantized student, the same in every process; its modules, and batches of three rows."""
    torch.manual_seed(0)
    teacher = model(tied, sees, has_experts).to(torch.bfloat16).to(dtype).eval()
    student = copy.deepcopy(teacher)
    batches = batches_for(60, vocabulary=VOCABULARY, length=24, rows=3)
    if sees:
        generator = torch.Generator().manual_seed(0)
        batches = [seeing(batch, generator) for batch in batches]
    amax = (
        calibrate(
            teacher,
            recipe,
            [inputs | batch.image_inputs for inputs, batch in zip(inputs_of(batches), batches[:4], strict=False)],
        )
        if recipe.activations or recipe.kv_cache == "fp8"
        else None
    )
    return teacher, student, quantize_model(student, recipe, amax), batches


def rows_of(batches: list[Batch]) -> list[Batch]:
    """One batch a row; an image belongs to the first."""
    return [_row(batch, i) for batch in batches for i in range(len(batch.input_ids))]


def _row(batch: Batch, i: int) -> Batch:
    row = Batch(*(each[i : i + 1] for each in (batch.input_ids, batch.attention_mask, batch.loss_mask)))
    is_image = None if batch.is_image is None else batch.is_image[i : i + 1]
    return replace(row, is_image=is_image, image_inputs=batch.image_inputs if i == 0 else {})


def run_case(
    folder,
    name,
    *,
    dtype=torch.float32,
    recipe=PLAIN,
    objective=None,
    n_steps=10,
    stop_after=None,
    resume=False,
    nan=False,
    split=rows_of,
    tied=True,
    sees=False,
    has_experts=False,
    keep=None,
    **given,
):
    """Train as `name` says: losses, gradient norms, validations, shapes of the snapshot and of the `keep` candidates, or the error."""
    teacher, student, modules, batches = models(dtype, recipe, tied, sees, has_experts)
    if nan:
        batches[4].input_ids[1, 3] = 7
        for batch in (*batches[:4], *batches[5:]):
            batch.input_ids[batch.input_ids == 7] = 8
        teacher.set_input_embeddings(torch.nn.Embedding.from_pretrained(teacher.get_input_embeddings().weight.clone()))
        teacher.get_input_embeddings().weight.data[7] = float("nan")
    start = encoding_digest(modules)
    home = Path(folder) / ("handed" if resume else "checkpoints")
    checkpoints = Checkpoints(home, "one identity", 100) if stop_after or resume else None
    candidates = Candidates(Path(folder) / name, keep) if keep is not None else None
    # only the last rank is asked to stop
    watcher = Recorder(stop_after if ranks.rank() == ranks.world_size() - 1 else None)
    try:
        done, masters = train(
            student,
            teacher if (objective or Objective("kl")).needs_teacher or "validate_every" in given else None,
            [split([batch]) for batch in batches[:n_steps]],
            settings(lr=1e-3, **given),
            objective=objective or Objective("kl"),
            held_out=batches[50:53],
            checkpoints=checkpoints,
            candidates=candidates,
            watcher=watcher,
        )
    except (Interrupted, TrainingError) as error:
        return {"error": f"{type(error).__name__}: {error}"}
    ranks.barrier()
    kept = {} if candidates is None else {str(c.step): candidates.read(c) for c in candidates.kept}
    return {
        "losses": [step.loss for step in done.steps],
        "ce": [step.ce for step in done.steps],
        "grad_norms": [step.grad_norm for step in done.steps],
        "validation": [v.validation_kl for v in done.validations],
        "codes_changed": done.codes_changed,
        "trainable": done.trainable,
        "resumed_at": done.resumed_at,
        "start": start,
        "shapes": _shapes(masters.snapshot()),
        "kept": {step: _shapes(snapshot) for step, snapshot in kept.items()},
    }


def _shapes(tensors):
    return {key: list(value.shape) for key, value in tensors.items()}


def main() -> None:
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    with ranks.joined():
        for name in names:
            found = run_case(folder, name, **CASES[name])
            (folder / f"{name}.rank{ranks.rank()}.json").write_text(json.dumps(found))
            ranks.barrier()


if __name__ == "__main__":
    main()
