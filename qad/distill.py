"""The one training loop. Its objective makes it QAT (cross entropy) or QAD (forward KL to the teacher).

Weights are projected, not faked: the optimizer owns FP32 masters (`qad.masters`); after each step they are encoded, and the live
weights become the decoded values. Forward and backward are those of ordinary linear layers. Tensor scales stay as calibrated;
block scales are recomputed, frozen or learned. Step 0 is the PTQ checkpoint bit for bit.

An optimizer step is a list of batches whose gradients are added up in FP32. Losses are divided by the tokens to predict of the whole
step, over batches and ranks, so that how a step is split changes nothing but roundings. Both models are called inside the
forward of one module, `Pair`, where FSDP2 holds their parameters whole.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from qad import layers, ranks
from qad.backbone import backbone_of, head_of, is_in, last_hidden
from qad.batch import Batch
from qad.candidates import Candidate, Candidates
from qad.errors import Interrupted, NonFiniteError, TrainingError, memory_asked_for
from qad.kernels import checking_once
from qad.losses import LossSums, Objective, chunked_loss
from qad.masters import Masters, Projection, Train
from qad.optimization import Optimization
from qad.resume import Checkpoints


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a training run goes, beside its objective and its batches.

    train: what has masters (`qad.masters`). learned_scales: block scales have, too.
    max_saturated: the share of blocks of weights that may lie beyond their frozen tensor scale; more end the run.
    validate_every: optimizer steps between validations, and after the last one; None for none.
    """

    optimization: Optimization
    train: Train = "quantized"
    learned_scales: bool = False
    activation_checkpointing: bool = False
    compile: bool = False
    max_saturated: float = 1.0
    validate_every: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class Step:
    """One optimizer step. loss in its unit a token over `n_loss_tokens`; kl (None without a teacher) and ce in nats a token; the
    gradient's norm before clipping; blocks of weights beyond their tensor scale after it."""

    step: int
    loss: float
    kl: float | None
    ce: float
    lr: float
    grad_norm: float
    n_tokens: int
    n_loss_tokens: int
    saturated_weight_blocks: int
    seconds: float


@dataclass(frozen=True)
class Validation:
    """Held-out figures after `step` optimizer steps, a token over `n_loss_tokens`; shares of codes and block scales that
    differ from PTQ: at a small learning rate the first sign of life."""

    step: int
    validation_loss: float
    validation_kl: float | None
    validation_ce: float
    n_loss_tokens: int
    codes_changed: float
    block_scales_changed: float


@dataclass(frozen=True)
class Training:
    """What a training run did. `trainable`: the names of what had masters, with their sizes."""

    steps: tuple[Step, ...]
    validations: tuple[Validation, ...]
    trainable: dict[str, int]
    codes_changed: float
    block_scales_changed: float
    resumed_at: int | None


class Watcher(Protocol):
    """Sees a run go on, and may ask it to stop: then it leaves a checkpoint and raises `Interrupted`."""

    def started(self, steps_done: int) -> None: ...

    def step(self, step: Step) -> None: ...

    def validation(self, validation: Validation) -> None: ...

    def should_stop(self) -> bool: ...


class Pair(nn.Module):
    """Student and teacher. Everything that reads their parameters happens in its forward."""

    def __init__(self, student: Any, teacher: Any | None, objective: Objective) -> None:
        super().__init__()
        self.student, self.teacher, self.objective = student, teacher, objective
        self._decoder = backbone_of(student).decoder

    def forward(self, batch: Batch, n_tokens: float, with_teacher: bool = True) -> tuple[Tensor, LossSums]:
        """The loss of one batch and its sums; masked positions are packed out before the products with the heads."""
        predicted = batch.predicted
        labels = batch.input_ids[:, 1:][predicted]
        inputs = batch.inputs
        hidden = last_hidden(self.student, inputs)[:, :-1][predicted]
        teacher: dict[str, Any] = {}
        if with_teacher and self.teacher is not None:
            with torch.no_grad():
                states = last_hidden(self.teacher, inputs)[:, :-1][predicted]
            teacher = {"teacher_hidden": states, "teacher_head": head_of(self.teacher)}
        head = head_of(self.student)
        loss, sums = chunked_loss(self.objective, hidden, head, labels, n_tokens=n_tokens, **teacher)
        for parameter in self._trained_outside():
            loss = loss + 0.0 * parameter.reshape(-1)[:1].sum()
        return loss, sums

    def _trained_outside(self) -> list[nn.Parameter]:
        """What is trained outside the decoder: a vision tower has a gradient, of 0, without images too, or ranks would fall out of step."""
        return [p for name, p in self.student.named_parameters() if p.requires_grad and not is_in(name, self._decoder)]


def train(
    student: Any,
    teacher: Any | None,
    steps: Sequence[Sequence[Batch]],
    settings: Settings,
    *,
    objective: Objective,
    held_out: Sequence[Batch] = (),
    checkpoints: Checkpoints | None = None,
    candidates: Candidates | None = None,
    watcher: Watcher | None = None,
) -> tuple[Training, Masters]:
    """Train `student` in place, one optimizer step for each list of batches; returns what was done, and the masters.

    Under several ranks every rank calls it with the same arguments, on the CPU; each computes its share of the batches of a step.

    Args:
        student: a transformers causal LM, or an image-text model, after `quantize_model`.
        teacher: the model whose distribution the objective asks for; with cross entropy it serves validation alone and may be None.
        held_out: batches for validation. candidates: is offered the model after each.
    Raises:
        TrainingError: a loss, gradient or activation that is not finite, a step or a validation without a token to predict,
            weights that outgrow their scales, too little memory, an optimizer that several ranks cannot share.
        Interrupted: the watcher asked to stop; a checkpoint was written if there are any.
        ValueError: arguments that contradict one another.
    """
    settings.optimization.require_shareable()
    _require_consistent(teacher, settings, objective, held_out, candidates)
    torch.manual_seed(settings.seed)
    device = ranks.device()
    if settings.compile:
        layers.compile_layers(student)
    if settings.activation_checkpointing:
        layers.checkpoint_activations(student)
    pair = Pair(student, teacher, objective)
    with _explaining_memory("before step 0", held_out, settings):
        if ranks.world_size() > 1:
            layers.shard(pair, student, teacher)
        pair.to(device)
        masters = Masters(student, train=settings.train, learned_scales=settings.learned_scales)
        run = Run(pair, masters, settings, steps, held_out, checkpoints, candidates, watcher)
    return run.go(), masters


class Run:
    """The state of one training run, and its steps."""

    def __init__(
        self,
        pair: Pair,
        masters: Masters,
        settings: Settings,
        steps: Sequence[Sequence[Batch]],
        held_out: Sequence[Batch],
        checkpoints: Checkpoints | None,
        candidates: Candidates | None,
        watcher: Watcher | None,
    ) -> None:
        self.pair, self.masters, self.settings = pair, masters, settings
        self.batches, self.held_out = steps, held_out
        self.checkpoints, self.candidates, self.watcher = checkpoints, candidates, watcher
        self.optimizer = settings.optimization.build(masters.named)
        self.steps: list[Step] = []
        self.validations: list[Validation] = []
        self.kept_step: int | None = None
        self.start = masters.encodings()
        masters.project()
        if masters.changed_since(self.start) != (0.0, 0.0):
            raise TrainingError("step 0 does not encode to the PTQ checkpoint that training starts from; report this")

    def go(self) -> Training:
        resumed_at = self._resume()
        if self.watcher is not None:
            self.watcher.started(resumed_at or 0)
        for index in range(len(self.steps), len(self.batches)):
            step = self.step(index)
            self.steps.append(step)
            if self.watcher is not None:
                self.watcher.step(step)
            is_last = index + 1 == len(self.batches)
            every = self.settings.validate_every
            if every is not None and (is_last or (index + 1) % every == 0):
                self._validate(index + 1)
            self._keep(index + 1, is_last)
        if self.candidates is not None:
            self.candidates.prune()
        changed = self.masters.changed_since(self.start)
        trainable = {name: parameter.numel() for name, parameter in self.masters.named.items()}
        self.masters.close()
        return Training(tuple(self.steps), tuple(self.validations), trainable, *changed, resumed_at)

    def step(self, index: int) -> Step:
        began = time.perf_counter()
        batches = self.batches[index]
        n_tokens, n_loss_tokens = (sum(getattr(b, key) for b in batches) for key in ("n_tokens", "n_loss_tokens"))
        if not n_loss_tokens:
            raise TrainingError(f"step {index}: no token to predict in the batch; is the response mask empty?")
        optimization, where = self.settings.optimization, f"step {index}"
        lr = optimization.set_rates(self.optimizer, index, len(self.batches))
        with _explaining_memory(where, batches, self.settings):
            sums = [self._backward(batch, n_loss_tokens, f"{where}, batch {i}") for i, batch in _share(batches)]
            loss, kl, ce = self._totals(sums, n_loss_tokens, where=where)
            self.masters.collect()
            norm = nn.utils.clip_grad_norm_(self.masters.named.values(), optimization.clip_norm)
            grad_norm = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
            if not math.isfinite(grad_norm):
                raise TrainingError(f"{where}: the gradient's norm is {grad_norm} at a loss of {loss:.4g}; {self._kept()}")
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            with self._explaining_numbers(where):
                projection = self.masters.project()
        saturated = self._require_room(index, projection)
        seconds = time.perf_counter() - began
        return Step(index, loss, kl, ce, lr, grad_norm, n_tokens, n_loss_tokens, saturated, seconds)

    def _backward(self, batch: Batch, n_tokens: int, where: str) -> LossSums:
        with self._explaining_numbers(where), checking_once():
            loss, sums = self.pair(batch.to(ranks.device()), n_tokens, self.pair.objective.needs_teacher)
        (loss * ranks.world_size()).backward()  # FSDP2 takes the mean over the ranks, and the loss is a share of the sum
        return sums

    @torch.no_grad()
    def _validate(self, step: int) -> None:
        n_tokens = sum(batch.n_loss_tokens for batch in self.held_out)
        where, sums = f"validation after step {step}", []
        with _explaining_memory(where, self.held_out, self.settings):
            for i, batch in _share(self.held_out):
                with self._explaining_numbers(f"{where}, batch {i}"), checking_once():
                    sums.append(self.pair(batch.to(ranks.device()), n_tokens)[1])
        if isinstance(self.pair, FSDPModule):
            self.pair.reshard()  # it stays whole after a forward without a backward, and masters are shards
        totals = self._totals(sums, n_tokens, where=where)
        changed = self.masters.changed_since(self.start)
        found = Validation(step, *totals, n_tokens, *changed)
        self.validations.append(found)
        if self.watcher is not None:
            self.watcher.validation(found)
        if self.candidates is not None:
            self.candidates.offer(Candidate(found.validation_loss, step), self.masters.snapshot)

    def _totals(self, sums: list[LossSums], n_tokens: int, *, where: str) -> tuple[float, float | None, float]:
        """Objective, KL and CE a token, over batches and ranks. TrainingError that names the first batch that is not finite."""
        rows = torch.zeros(len(sums) * ranks.world_size(), 3, dtype=torch.float64)  # one a batch; ranks fill in their own
        for row, found in zip(rows[ranks.rank() :: ranks.world_size()], sums, strict=True):
            row[0], row[1], row[2] = found.objective, 0.0 if found.kl is None else found.kl, found.ce
        rows = ranks.total(rows)
        for index, values in enumerate(rows.tolist()):
            for name, value in zip((f"{self.pair.objective.loss} loss", "KL", "CE"), values, strict=True):
                if not math.isfinite(value):
                    raise TrainingError(
                        f"{where}: the {name} of batch {index} is {value}; lower lr, or look at that batch; {self._kept()}"
                    )
        loss, kl, ce = (rows.sum(dim=0) / n_tokens).tolist()
        return loss, None if any(found.kl is None for found in sums) else kl, ce

    @contextmanager
    def _explaining_numbers(self, where: str) -> Iterator[None]:
        """A tensor that is not finite becomes a TrainingError that says where, and what is kept."""
        try:
            yield
        except NonFiniteError as error:
            raise TrainingError(f"{where}: {error}; {self._kept()}") from error

    def _require_room(self, index: int, projection: Projection) -> int:
        saturated, n_blocks = ranks.total(torch.tensor([projection.saturated, projection.n_blocks])).tolist()
        if saturated > self.settings.max_saturated * n_blocks:
            raise TrainingError(
                f"step {index}: {saturated:,} of {n_blocks:,} blocks of weights lie beyond their tensor scale, which stays as "
                f"calibrated, most of them in {projection.worst}; allowed is a share of {self.settings.max_saturated:g} "
                f"(training.max_saturated): lower lr, or raise it; {self._kept()}"
            )
        return saturated

    def _keep(self, step: int, is_last: bool) -> None:
        asked = self.watcher is not None and self.watcher.should_stop()
        stop = bool(ranks.total(torch.tensor([float(asked)]))) and not is_last
        if self.checkpoints is not None and not is_last and (stop or step % self.checkpoints.every == 0):
            state = {
                "steps": [asdict(each) for each in self.steps],
                "validations": [asdict(each) for each in self.validations],
                "candidates": self.candidates.state() if self.candidates is not None else [],
            }
            self.checkpoints.save(step, self.masters.named, self.optimizer, state)
            self.kept_step = step
            if self.candidates is not None:
                self.candidates.prune()
        if stop:
            raise Interrupted(f"stopped after step {step} of {len(self.batches)}; {self._kept()}")

    def _resume(self) -> int | None:
        found = self.checkpoints.latest() if self.checkpoints is not None else None
        if found is None or self.checkpoints is None:
            return None
        folder, state = found
        if self.candidates is not None and not self.candidates.resume(state["candidates"]):
            return None
        self.checkpoints.load(folder, state, self.masters.named, self.optimizer)
        self.kept_step = state["step"]
        self.steps = [Step(**each) for each in state["steps"]]
        self.validations = [Validation(**each) for each in state["validations"]]
        self.masters.project()
        return len(self.steps)

    def _kept(self) -> str:
        if self.kept_step is None:
            return "no checkpoint was written so far"
        return f"the checkpoint after step {self.kept_step} is kept, and the same command goes on from it"


def _share(batches: Sequence[Batch]) -> Iterator[tuple[int, Batch]]:
    """The batches that this rank computes, with their places. Every rank gets as many: the last ones may have nothing to predict."""
    for start in range(0, len(batches), ranks.world_size()):
        index = start + ranks.rank()
        yield index, batches[index] if index < len(batches) else batches[start].without_loss()


def _require_consistent(
    teacher: Any | None, settings: Settings, objective: Objective, held_out: Sequence[Batch], candidates: Candidates | None
) -> None:
    if objective.needs_teacher and teacher is None:
        raise ValueError(f'loss "{objective.loss}" needs a teacher')
    if candidates is not None and settings.validate_every is None:
        raise ValueError("candidates are chosen by validation: set validate_every")
    if settings.validate_every is not None and not any(batch.n_loss_tokens for batch in held_out):
        raise TrainingError("validate_every: the held-out batches have no token to predict; give some, or leave it out")


@contextmanager
def _explaining_memory(where: str, batches: Sequence[Batch], settings: Settings) -> Iterator[None]:
    """Too little memory becomes a TrainingError that says what was asked for and which keys lower it."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        reason = memory_asked_for(error)
        if reason is None:
            raise
        shape = max((tuple(batch.input_ids.shape) for batch in batches), key=math.prod, default=None)
        with_batches = "" if shape is None else f" with batches of up to {shape[0]} x {shape[1]} tokens"
        keys = ["training.micro_batch_size", "the seq_len of its data"]
        keys += [] if settings.activation_checkpointing else ["training.activation_checkpointing = true"]
        if settings.optimization.optimizer != "adafactor" and ranks.world_size() == 1:
            keys.append('training.optimizer = "adafactor"')
        raise TrainingError(
            f"{where}: out of memory{with_batches} ({reason}); lower it with {', '.join(keys)}, or use more ranks"
        ) from error
