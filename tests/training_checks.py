"""What the tests of training share: tiny models, random batches, and runs of them."""

import torch

from qad.batch import Batch
from qad.calibrate import calibrate
from qad.checkpoint import load_checkpoint
from qad.distill import Settings, train
from qad.divergence import final_hidden, measure, summarize
from qad.losses import Objective
from qad.optimization import Optimization
from qad.quantize import quantize_model
from qad.recipe import Recipe

KL, CE = Objective("kl"), Objective("ce")


def batches_for(n: int, *, vocabulary: int, length: int = 48, rows: int = 4) -> list[Batch]:
    """Random tokens; the last row of each batch is half padding."""
    generator = torch.Generator().manual_seed(3)
    found = []
    for _ in range(n):
        ids = torch.randint(2, vocabulary, (rows, length), generator=generator)
        attention = torch.ones_like(ids)
        attention[rows - 1, length // 2 :] = 0
        found.append(Batch(ids, attention, attention.bool()))
    return found


def inputs_of(batches: list[Batch]) -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": batch.input_ids, "attention_mask": batch.attention_mask} for batch in batches]


def quantized(folder, recipe: Recipe | None = None, *, dtype=torch.bfloat16, **options):
    """Teacher, student quantized by `recipe`, its modules, and batches. Each call makes the same ones."""
    recipe = recipe or Recipe()
    teacher, student = (load_checkpoint(folder).model.to(dtype) for _ in range(2))
    batches = batches_for(24, vocabulary=teacher.config.vocab_size)
    amax = calibrate(teacher, recipe, inputs_of(batches[:4])) if recipe.activations else None
    return teacher, student, quantize_model(student, recipe, amax, **options), batches


def settings(
    *, lr: float = 1e-3, warmup_steps: int = 0, optimizer: str = "adamw", schedule: str = "linear", **other
) -> Settings:
    """Settings of a short run; `other` are those of `Settings`."""
    optimization = Optimization(lr=lr, warmup_steps=warmup_steps, optimizer=optimizer, schedule=schedule)
    return Settings(**({"optimization": optimization} | other))


def one_each(batches: list[Batch]) -> list[list[Batch]]:
    """Optimizer steps of one batch."""
    return [[batch] for batch in batches]


def run(folder, steps=4, given=None, *, recipe=None, dtype=torch.bfloat16, objective=KL, split=1, **options):
    """Train a fresh student for `steps` steps of `split` batches: (training, masters, modules)."""
    teacher, student, modules, batches = quantized(folder, recipe, dtype=dtype)
    chosen = [batches[i * split : (i + 1) * split] for i in range(steps)]
    training, masters = train(student, teacher, chosen, given or settings(), objective=objective, **options)
    return training, masters, modules


def losses_of(training) -> list[float]:
    return [step.loss for step in training.steps]


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Whether two snapshots are equal in every bit."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def kl_to(teacher, student, batches):
    """Divergence figures of a student on the predicted tokens of `batches`."""
    heads = [m.get_output_embeddings().weight for m in (student, teacher)]
    response, _ = measure(final_hidden(student, batches), heads[0], final_hidden(teacher, batches), heads[1], batches)
    return summarize(response)


class Recorder:
    """A watcher that keeps what it sees, and asks for a stop once step `stop_after` is done."""

    def __init__(self, stop_after: int | None = None, on_step=None) -> None:
        self.steps, self.validations = [], []
        self._stop_after, self._on_step = stop_after, on_step

    def started(self, steps_done) -> None:
        self.steps_done = steps_done

    def step(self, step) -> None:
        self.steps.append(step)
        if self._on_step is not None:
            self._on_step(step)

    def validation(self, validation) -> None:
        self.validations.append(validation)

    def should_stop(self) -> bool:
        return self._stop_after is not None and len(self.steps) > 0 and self.steps[-1].step + 1 >= self._stop_after
