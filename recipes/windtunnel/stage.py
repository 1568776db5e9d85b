"""What every stage of the wind tunnel's model does with its folder: hold to one recipe, log, checkpoint, go on, finish.

model.safetensors, config.json, tokenizer …   what AutoModelForCausalLM and vLLM load; BF16
log.jsonl     losses or rewards by step, held-out scores, and last the scores on the four tasks and the digest of the weights
SHA256SUMS    of the model's files: the harness refuses a folder in which one was changed
recipe.json   every setting, the digest of the weights that the stage began from, threads and versions
checkpoint.pt weights and state of the optimizer; removed when the stage is done
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import LlamaForCausalLM

from recipes.windtunnel.build import build_tokenizer, save

WEIGHTS, SUMS = "model.safetensors", "SHA256SUMS"
OWN = ("log.jsonl", "recipe.json", "checkpoint.pt", SUMS)
"""Files of a stage that are no part of the model."""


@dataclasses.dataclass(frozen=True)
class Rate:
    """A learning rate by step: linear warm-up to `lr`, then half a cosine to a tenth of it."""

    lr: float
    steps: int
    warm_up: int

    def at(self, step: int) -> float:
        if step < self.warm_up:
            return self.lr * (step + 1) / self.warm_up
        done = (step - self.warm_up) / max(1, self.steps - self.warm_up)
        return self.lr * (0.55 + 0.45 * math.cos(math.pi * done))


def adamw(model: LlamaForCausalLM, weight_decay: float) -> list[torch.optim.Optimizer]:
    return [torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=weight_decay)]


def muon(model: LlamaForCausalLM, weight_decay: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for embedding and norms; with steps of Muon as large as AdamW's, one rate serves both.

    Of AdamW alone, the loss after 300 steps was what it is here after 230 (one run each).
    """
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(matrices, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.0),
    ]


class Stage:
    """One stage in its folder; `model` is in FP32. A stage that is done or was stopped is taken up where it is."""

    def __init__(
        self,
        folder: Path,
        name: str,
        model: LlamaForCausalLM,
        settings: Any,
        *,
        begins_from: str | None,
        optimizers: Sequence[torch.optim.Optimizer] = (),
    ) -> None:
        self.folder, self.name, self.model, self.settings = folder, name, model, settings
        folder.mkdir(parents=True, exist_ok=True)
        self._hold_to_recipe(begins_from)
        self.tokenizer = build_tokenizer()
        self.optimizers = optimizers
        self.step = 0
        self.seconds = 0.0
        """Of work on this stage until the last checkpoint."""
        self._began = time.monotonic()
        self._resume()

    def update(self, lr: float) -> float:
        """One step of every optimizer on the gradients that are there, which are cleared; returns their norm."""
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
        self.model.zero_grad()
        return float(norm)

    def log(self, **figures: Any) -> None:
        line = json.dumps({"step": self.step, **figures})
        print(f"{self.name}: {line}", flush=True)
        with (self.folder / "log.jsonl").open("a") as file:
            file.write(f"{line}\n")

    def keep(self) -> None:
        """A checkpoint, whole or not at all."""
        now = time.monotonic()
        self.seconds, self._began = self.seconds + now - self._began, now
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        beside = self.folder / "checkpoint.tmp"
        torch.save(state, beside)
        os.replace(beside, self.folder / "checkpoint.pt")

    def finish(self, **figures: Any) -> None:
        """Write the model and the digests of its files; log its last figures, its seconds and the digest of its weights."""
        self.keep()
        save(self.folder, self.model, self.tokenizer)
        files = sorted(path for path in self.folder.iterdir() if path.name not in OWN)
        (self.folder / SUMS).write_text("".join(f"{digest(path)}  {path.name}\n" for path in files))
        weights = self.folder / WEIGHTS
        self.log(**figures, seconds=round(self.seconds), sha256=digest(weights), bytes=weights.stat().st_size)
        (self.folder / "checkpoint.pt").unlink()

    def _resume(self) -> None:
        path = self.folder / "checkpoint.pt"
        if path.is_file():
            state = torch.load(path, weights_only=True)
            self.model.load_state_dict(state["model"])
            for optimizer, kept in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(kept)
            self.step, self.seconds = state["step"], state["seconds"]
        log = self.folder / "log.jsonl"
        lines = log.read_text().splitlines() if log.is_file() else []
        log.write_text("".join(f"{line}\n" for line in lines if json.loads(line)["step"] <= self.step and self.step))

    def _hold_to_recipe(self, begins_from: str | None) -> None:
        path = self.folder / "recipe.json"
        recipe = {
            "stage": self.name,
            "begins_from_sha256": begins_from,
            "settings": dataclasses.asdict(self.settings),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        text = json.dumps(recipe, indent=1) + "\n"
        if path.is_file() and path.read_text() != text:
            raise SystemExit(
                f"{path}: this folder holds a stage with other settings; take its settings, or another folder with --out. "
                f"Found:\n{path.read_text()}asked for:\n{text}"
            )
        path.write_text(text)


def is_done(folder: Path) -> bool:
    """Whether a stage has written its model and the last line of its log."""
    log = folder / "log.jsonl"
    lines = log.read_text().splitlines() if log.is_file() else []
    return bool(lines) and "sha256" in json.loads(lines[-1]) and (folder / WEIGHTS).is_file()


def load(out: Path, stage: str, *, needed_by: str) -> tuple[LlamaForCausalLM, str]:
    """The model of a stage in FP32 and the digest of its weights. SystemExit: it was not made, or was changed since."""
    folder = out / stage
    if not is_done(folder):
        raise SystemExit(
            f"{needed_by}: begins from the stage {stage}, which {folder} does not hold (no model, or one that is not done); "
            f"make it first: the same command with --stage {stage}, or without --stage"
        )
    weights = folder / WEIGHTS
    found, logged = digest(weights), json.loads((folder / "log.jsonl").read_text().splitlines()[-1])["sha256"]
    if found != logged:
        raise SystemExit(
            f"{needed_by}: {weights} has the digest {found[:12]}, its log says {logged[:12]}: it was changed since it was made; "
            f"remove {folder} and make it again"
        )
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32), found


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
