"""Train the embedded vision-language model: python -m recipes.embedded_vlm.train

Everything comes from code and one seed: pictures, tokenizer, first weights. The same command goes on where an earlier one ended or was
stopped, with the same numbers on the same machine with the same number of threads. Two stages, each with an optimizer of its own:

1. Looking: the vision tower learns, by layers that are thrown away, to tell for each of its patches what stands there, where in its text
   and to what it belongs (`harness.tasks.canvas.Cell`).
2. Reading: the tower stays as it is; connector and language model learn to answer questions.

The folder holds at the end:

    model/        weights in BF16, configuration, tokenizer, processor: what AutoModelForImageTextToText and vLLM load
    log.jsonl     a line every 50 steps: the mean loss, in nats a cell (first stage) or a token of answers; held-out accuracy,
                  of the same questions about a grey picture too, on pictures of another seed than the tasks'; last,
                  the accuracy on the tasks and the digest of the weights
    recipe.json   every setting, the difficulty of the pictures and the versions of the libraries
    checkpoint.pt weights and state of the optimizer; not needed after the last step
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn

from harness.tasks.drawing_kinds import EVALUATED
from harness.tasks.drawings import Difficulty
from harness.tasks.mini_pictures import blinded, rows
from recipes.embedded_vlm.batches import NOTES, Batch, Encoder, collate, seen_batch, training_batch
from recipes.embedded_vlm.build import build_model, build_processor, build_tokenizer, save

LOG_EVERY = 50
VALIDATION_SEED = "validation"
"""Of held-out pictures of another seed than the tasks', as hard to see as those of training."""


@dataclass(frozen=True)
class Course:
    """A stage: its steps and its learning rate. pages: share of pages of text at its first step and from its middle on."""

    steps: int
    lr: float
    warm_up: int
    pages: tuple[float, float]
    last_lr: float = 2e-5

    def lr_at(self, step: int) -> float:
        """Linear warm-up, then half a cosine."""
        if step < self.warm_up:
            return self.lr * (step + 1) / self.warm_up
        done = (step - self.warm_up) / max(1, self.steps - self.warm_up)
        return self.last_lr + (self.lr - self.last_lr) * (1 + math.cos(math.pi * done)) / 2

    def pages_at(self, step: int) -> float:
        first, last = self.pages
        return first + (last - first) * min(1.0, 2 * step / self.steps)


@dataclass(frozen=True)
class Settings:
    """How the training goes. late: shares of charts, documents, diagrams and scenes, of all but the pages, from the middle of reading on,
    when what is left to learn is to find a value and to choose among options; alike before. empty: weight of a cell where nothing stands
    in the loss of the first stage, 1 being that of the others.
    """

    look: Course = Course(3000, lr=1e-3, warm_up=100, pages=(0.3, 0.2))
    read: Course = Course(3400, lr=1e-3, warm_up=200, pages=(0.3, 0.1))
    late: tuple[float, float, float, float] = (0.35, 0.1, 0.45, 0.1)
    seed: int = 0
    pictures_a_step: int = 32
    empty: float = 0.05
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.05
    clip: float = 1.0

    @property
    def steps(self) -> int:
        return self.look.steps + self.read.steps

    def course_at(self, step: int) -> tuple[Course, int]:
        """The stage that a step belongs to, and the number of the step in it."""
        return (self.look, step) if step < self.look.steps else (self.read, step - self.look.steps)

    def shares_at(self, step: int) -> list[float]:
        """Of pages, charts, documents, diagrams and scenes among the pictures of a step."""
        course, in_stage = self.course_at(step)
        pages = course.pages_at(in_stage)
        if step >= self.look.steps and 2 * in_stage >= course.steps:
            return [pages, *((1 - pages) * share for share in self.late)]
        return [pages] + [(1 - pages) / 4] * 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/embedded_vlm"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--checkpoint-every", type=int, default=250, help="steps")
    parser.add_argument("--validate-every", type=int, default=400, help="steps")
    parser.add_argument("--validation", type=int, default=100, help="held-out pictures of each task")
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="stop then, with a checkpoint; the same command goes on"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    Training(
        options.out,
        Settings(),
        checkpoint_every=options.checkpoint_every,
        validate_every=options.validate_every,
        n_validation=options.validation,
    ).go(options.seconds)


class Training:
    """One run in its folder."""

    def __init__(
        self, folder: Path, settings: Settings, *, checkpoint_every: int, validate_every: int, n_validation: int
    ) -> None:
        self.folder, self.settings = folder, settings
        self.checkpoint_every, self.validate_every = checkpoint_every, validate_every
        folder.mkdir(parents=True, exist_ok=True)
        self._hold_to_recipe()
        self.tokenizer = build_tokenizer()
        self.encoder = Encoder(self.tokenizer)
        self.model = build_model(self.tokenizer, settings.seed)
        self.model.set_attn_implementation("eager")  # in BF16 on a CPU faster than the fused one, whose backward is slow there
        torch.manual_seed(settings.seed)
        width = self.model.config.vision_config.hidden_size
        self.heads = nn.ModuleDict({name: nn.Linear(width, n) for name, n in NOTES.items()})
        self.optimizer = self._new_optimizer(0)
        self.validation = {
            task: rows(task, n=n_validation, seed=VALIDATION_SEED, difficulty=Difficulty()) for task in EVALUATED
        }
        self.step = 0
        self.losses: list[float] = []
        self._resume()

    def go(self, seconds: float = math.inf) -> bool:
        """Train to the last step, or for so many seconds; whether the end was reached."""
        began = last = time.monotonic()
        while self.step < self.settings.steps:
            if self.step == self.settings.look.steps:
                self.optimizer = self._new_optimizer(self.step)
            self.losses.append(self._one_step())
            self.step += 1
            if self.step % LOG_EVERY == 0:
                now = time.monotonic()
                mean = sum(self.losses) / len(self.losses)
                self._log(
                    loss=round(mean, 5),
                    lr=self.optimizer.param_groups[0]["lr"],
                    seconds_a_step=round((now - last) / len(self.losses), 4),
                )
                self.losses, last = [], now
            is_reading = self.step > self.settings.look.steps
            if is_reading and (self.step % self.validate_every == 0 or self.step == self.settings.steps):
                self._log(**accuracies(self.model, self.encoder, self.validation))
                last = time.monotonic()
            if self.step % self.checkpoint_every == 0 or self.step == self.settings.steps:
                self._keep()
            if time.monotonic() - began > seconds and self.step < self.settings.steps:
                self._keep()
                return False
        self._finish()
        return True

    def _new_optimizer(self, step: int) -> torch.optim.AdamW:
        """For the weights that the stage of this step trains; the others keep no gradients."""
        is_looking = step < self.settings.look.steps
        tower = [*self.model.model.vision_model.parameters(), *self.heads.parameters()]
        others = [
            *self.model.model.connector.parameters(),
            *self.model.model.text_model.parameters(),
            *self.model.lm_head.parameters(),
        ]
        for each in tower:
            each.requires_grad_(is_looking)
        self.trained = tower if is_looking else others
        return torch.optim.AdamW(
            [
                {"params": [p for p in self.trained if p.ndim > 1], "weight_decay": self.settings.weight_decay},
                {"params": [p for p in self.trained if p.ndim <= 1], "weight_decay": 0.0},
            ],
            betas=self.settings.betas,
        )

    def _one_step(self) -> float:
        settings = self.settings
        course, step = settings.course_at(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = course.lr_at(step)
        asked = {
            "seed": settings.seed,
            "step": self.step,
            "n": settings.pictures_a_step,
            "shares": settings.shares_at(self.step),
        }
        self.model.train()
        loss = self._looking_loss(**asked) if self.step < settings.look.steps else self._reading_loss(**asked)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.trained, settings.clip)
        self.optimizer.step()
        return float(loss.detach())

    def _looking_loss(self, **asked: Any) -> Tensor:
        """Cross-entropy of the notes about cells, summed over the kinds of note."""
        seen = seen_batch(**asked)
        with torch.autocast("cpu", torch.bfloat16):
            hidden = self.model.model.vision_model(pixel_values=seen.pixels[:, 0]).last_hidden_state
            logits = {name: head(hidden) for name, head in self.heads.items()}
        weights = torch.where(seen.notes["what"] > 0, 1.0, self.settings.empty).flatten()
        losses = [
            nn.functional.cross_entropy(logits[name].float().flatten(0, 1), wanted.flatten(), reduction="none")
            for name, wanted in seen.notes.items()
        ]
        return (torch.stack(losses).sum(0) * weights).sum() / weights.sum()

    def _reading_loss(self, **asked: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            logits, labels = answer_logits(self.model, training_batch(self.encoder, **asked))
        return nn.functional.cross_entropy(logits.float(), labels)

    def _finish(self) -> None:
        self.model.to(torch.bfloat16)
        save(self.folder / "model", self.model, build_processor(self.tokenizer))
        weights = self.folder / "model" / "model.safetensors"
        asked = {task: rows(task) for task in EVALUATED}
        self._log(
            tasks=accuracies(self.model, self.encoder, asked),
            pictures={task: len(of_task) for task, of_task in asked.items()},
            specks={task: about.specks for task, about in EVALUATED.items()},
            sha256=hashlib.sha256(weights.read_bytes()).hexdigest(),
            bytes=weights.stat().st_size,
        )

    def _keep(self) -> None:
        state = {
            "step": self.step,
            "losses": self.losses,
            "model": self.model.state_dict(),
            "heads": self.heads.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        beside = self.folder / "checkpoint.tmp"
        torch.save(state, beside)
        os.replace(beside, self.folder / "checkpoint.pt")

    def _resume(self) -> None:
        path = self.folder / "checkpoint.pt"
        if not path.is_file():
            self._cut_log(0)
            return
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.heads.load_state_dict(state["heads"])
        self.step, self.losses = state["step"], state["losses"]
        if self.step != self.settings.look.steps:  # there, the second stage begins with an optimizer of its own
            self.optimizer = self._new_optimizer(self.step)
            self.optimizer.load_state_dict(state["optimizer"])
        self._cut_log(self.step)

    def _cut_log(self, step: int) -> None:
        """Leave out what an earlier run wrote after the checkpoint, and the figures of its end."""
        path = self.folder / "log.jsonl"
        lines = path.read_text().splitlines() if path.is_file() else []
        kept = [line for line in lines if (record := json.loads(line))["step"] <= step and "tasks" not in record]
        path.write_text("".join(f"{line}\n" for line in kept))

    def _log(self, **figures: Any) -> None:
        line = json.dumps({"step": self.step, **figures})
        print(line, flush=True)
        with (self.folder / "log.jsonl").open("a") as file:
            file.write(f"{line}\n")

    def _hold_to_recipe(self) -> None:
        path = self.folder / "recipe.json"
        recipe = {
            "settings": dataclasses.asdict(self.settings),
            "difficulty": dataclasses.asdict(Difficulty()),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        text = json.dumps(recipe, indent=1) + "\n"
        if path.is_file() and path.read_text() != text:
            raise SystemExit(
                f"{path}: this folder holds a training with other settings; take its settings, or another folder with --out. "
                f"Found:\n{path.read_text()}asked for:\n{text}"
            )
        path.write_text(text)


def answer_logits(model: Any, batch: Batch, image_hidden_states: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Logits before each token of an answer, [tokens of answers, vocabulary], and those tokens."""
    seen = {"pixel_values": batch.pixels} if image_hidden_states is None else {"image_hidden_states": image_hidden_states}
    hidden = model.model(input_ids=batch.input_ids, use_cache=False, **seen).last_hidden_state
    predicted = batch.answers[:, 1:]
    return model.lm_head(hidden[:, :-1][predicted]), batch.input_ids[:, 1:][predicted]


@torch.no_grad()
def accuracies(model: Any, encoder: Encoder, asked: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, float]]:
    """The share of questions answered exactly, by task: about their picture ("seeing") and about a grey one ("blind").

    An answer counts where the likeliest token is the right one at each of its places and at its end: what greedy decoding gives.
    """
    model.eval()
    return {
        task: {"seeing": _accuracy(model, encoder, questions), "blind": _accuracy(model, encoder, blinded(questions))}
        for task, questions in asked.items()
    }


def _accuracy(model: Any, encoder: Encoder, questions: list[dict[str, Any]], at_once: int = 50) -> float:
    right = 0
    for start in range(0, len(questions), at_once):
        part = questions[start : start + at_once]
        sequences = [encoder.turns([(row["question"], row["answer"])], longest=10**6) for row in part]
        batch = collate(sequences, [np.asarray(row["image"]) for row in part], encoder.pad_id)
        logits, labels = answer_logits(model, batch)
        wrong = (logits.argmax(-1) != labels).tolist()
        right += sum(not any(of_one) for of_one in _split(wrong, batch.answers.sum(-1).tolist()))
    return right / len(questions)


def _split(values: list[bool], lengths: list[int]) -> Iterator[list[bool]]:
    start = 0
    for length in lengths:
        yield values[start : start + length]
        start += length


if __name__ == "__main__":
    main()
