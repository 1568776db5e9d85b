"""What each kind of stage does. Effects live here; the order of stages is in `plan.py`, their storage in `store.py`."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from itertools import count
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from harness import data, evaluate, loading
from harness.batches import as_tensors, batch_of, batches_of, inputs_of, ticking
from harness.data import Sequence
from harness.engines.serving import Serving
from harness.errors import DataError, HarnessError, ModelError
from harness.models import download, folder_fingerprint
from harness.plan import Plan, Stage
from harness.progress import Reporter
from harness.provenance import RECORDED, package_versions
from harness.records import SCHEMA, write_samples
from harness.schema import Quantization
from harness.store import Store, write_json, write_text
from qad import divergence
from qad.calibrate import calibrate, counting_blocks, require_unsaturated, second_moments
from qad.checkpoint import Loaded, write_checkpoint
from qad.distill import Batch, Optimization, Step, Training, train
from qad.modules import encoding_digest
from qad.packed import read_encodings
from qad.quantize import quantize_model
from qad.recipe import Recipe, match

SECOND_MOMENTS = "input_second_moments.safetensors"
_SPLIT_OF = {"calibrate": "calibration", "diagnostics": "diagnostics"}
VALIDATION_SEQUENCES = 8
"""Held-out sequences on which saturation is checked and exports are compared."""
TEACHER_MEMORY_BYTES = 1 << 30
"""Final hidden states of the teacher on the diagnostics text are kept for the next variant up to this size."""


class Workbench:
    """Runs stages. Keeps the BF16 model and the last candidate in memory, since neighbours in a plan share them."""

    def __init__(self, plan: Plan, store: Store, journals: Path, reporter: Reporter) -> None:
        self.plan, self.store, self.journals, self.reporter = plan, store, journals, reporter
        self._loaded: dict[str, Loaded] = {}
        self._teacher_hidden: dict[str, list[Tensor]] = {}
        self._serving = Serving(plan.suite.engine)
        loading.quiet_libraries()

    def run(self, stage: Stage, folder: Path) -> dict[str, Any]:
        """Do the work of `stage` into `folder`; returns what its record says beside keys and digests."""
        work = {
            "model": self._model,
            "data": self._data,
            "calibrate": self._calibrate,
            "quantize": self._quantize,
            "train": self._train,
            "evaluate": self._evaluate,
            "diagnostics": self._diagnostics,
        }
        if stage.kind != "evaluate":
            self.close()
        return work[stage.kind](stage, folder)

    def check_suite(self) -> None:
        """Raise now what would otherwise end the run after hours: recipes that do not fit, text that is too short."""
        bf16 = self.plan.stages[0]
        for stage in (s for s in self.plan.stages if s.kind == "model"):
            self._serving.require(self.folder_of(stage))
        for variant in self.plan.variants:
            if variant.quantization is not None:
                match(self._load(bf16).model, _recipe(variant.quantization))
        for stage in self.plan.stages:
            if stage.kind == "train":
                self._training_batches(stage)
            elif stage.kind == "model" and stage is not bf16:
                self._require_same_vocabulary(bf16, stage)
            elif stage.kind == "quantize":
                self._sequences(stage.inputs["data"], "validation", VALIDATION_SEQUENCES)
            elif stage.kind in ("calibrate", "diagnostics"):
                self._sequences(stage.inputs["data"], _SPLIT_OF[stage.kind], stage.sections["samples"])

    def _require_same_vocabulary(self, bf16: Stage, other: Stage) -> None:
        """KL compares probabilities token by token: a checkpoint with other tokens has none."""
        folders = [self.folder_of(bf16), self.folder_of(other)]
        sizes = [json.loads((folder / "config.json").read_text()).get("vocab_size") for folder in folders]
        vocabularies = [self._tokenizer(folder).get_vocab() for folder in folders]
        if sizes[0] != sizes[1] or vocabularies[0] != vocabularies[1]:
            raise ModelError(
                f"{other.label}: {folders[1]} has another vocabulary ({sizes[1]} tokens) than the model ({sizes[0]}); "
                "a checkpoint is measured against the BF16 model that it was made from"
            )

    def folder_of(self, stage: Stage) -> Path:
        """Where the files of a stage are that is done, or that needs nothing done."""
        if stage.is_external:
            assert stage.source is not None
            return stage.source.folder or download(self.plan.suite.model)
        found = self.store.find(stage.key)
        assert found is not None, f"{stage.label} is used before it is done"
        return found.folder

    def _model(self, stage: Stage, folder: Path) -> dict[str, Any]:
        assert stage.source is not None and stage.source.folder is not None and stage.source.gguf is not None
        with self.reporter.track(f"model: read {stage.source.gguf} (about half a minute)"):
            loading.convert_gguf(stage.source.folder, stage.source.gguf, folder)
        return {"notes": list(stage.source.notes)}

    def _data(self, stage: Stage, folder: Path) -> dict[str, Any]:
        section = stage.sections["data"]
        model_folder = self.folder_of(stage.inputs["model"])
        tokenizer = self._tokenizer(model_folder)
        with self.reporter.track(stage.label):
            ids = loading.eos_ids(model_folder, tokenizer)
            splits = data.builtin_sequences(tokenizer, seq_len=section["seq_len"], seed=section["seed"], eos_ids=ids)
        save_file(
            {f"{name}.{part}": tensor for name, sequences in splits.items() for part, tensor in as_tensors(sequences).items()},
            folder / "sequences.safetensors",
        )
        counts = {
            name: {"sequences": len(s), "tokens": sum(map(len, s)), "response_tokens": sum(sum(q.is_response) for q in s)}
            for name, s in splits.items()
        }
        return {"splits": counts}

    def _calibrate(self, stage: Stage, folder: Path) -> dict[str, Any]:
        sequences = self._sequences(stage.inputs["data"], _SPLIT_OF[stage.kind], stage.sections["samples"])
        batches = [inputs_of(batch) for batch in batches_of(sequences)]
        model, recipe = self._load(stage.inputs["model"]).model, _recipe(_quantization(stage))
        skip = stage.sections["skip_first_token"]
        with self.reporter.track(stage.label) as advance:
            amax = calibrate(model, recipe, ticking(batches, advance), skip_first_token=skip)
            if stage.sections["second_moments"]:
                save_file(second_moments(model, recipe, batches, skip_first_token=skip), folder / SECOND_MOMENTS)
        write_json(folder / "input_amax.json", amax)
        return {"n_sequences": len(sequences), "n_tokens": sum(map(len, sequences))}

    def _quantize(self, stage: Stage, folder: Path) -> dict[str, Any]:
        limits = _quantization(stage).calibration
        with self.reporter.track(stage.label) as advance:
            student, targets = self._fresh_student(stage, self._choices(stage))
            batches = batches_of(self._sequences(stage.inputs["data"], "validation", VALIDATION_SEQUENCES))
            with counting_blocks(student["model"]) as counts:
                for _ in divergence.final_hidden(student["model"], ticking(batches, advance)):
                    pass
            require_unsaturated(counts, max_saturated=limits.max_saturated, max_overshoot=limits.max_overshoot)
        record = {
            "start_digest": encoding_digest(student["modules"]),
            "quantized": list(targets.members),
            "excluded": list(targets.excluded),
            "validation_blocks": dataclasses.asdict(counts),
        }
        return record | self._export(stage, folder, student["model"], targets)

    def _train(self, stage: Stage, folder: Path) -> dict[str, Any]:
        assert stage.variant is not None and stage.variant.training is not None
        settings = stage.variant.training
        start = self.store.find(stage.inputs["start"].key)
        assert start is not None
        batches, budget = self._training_batches(stage)
        if budget["epochs_read"] > 1:
            self.reporter.say(f"  {stage.label}: the budget reads the training data {budget['epochs_read']} times")
        is_chosen = _quantization(stage).scale_rule != "amax"  # amax is encoded again, and has to give the same
        student, targets = self._fresh_student(stage, {"start": read_encodings(start.folder)} if is_chosen else {})
        optimization = Optimization(
            lr=settings.lr, schedule=settings.schedule, warmup_steps=settings.warmup_steps, clip_norm=settings.clip_norm
        )
        teacher = self._load(stage.inputs["model"]).model if stage.sections["objective"] == "kl" else None
        with self.reporter.track(f"{stage.label} ({budget['tokens']:,} tokens)") as advance:

            def report(step: Step) -> None:
                advance(step.step + 1, len(batches), f"loss {step.loss:.3f}")

            torch.manual_seed(settings.seed)
            done = train(student["model"], teacher, batches, optimization, on_step=report)
        if done.start_digest != start.record["result"]["start_digest"]:
            raise HarnessError(f"{stage.label}: step 0 does not encode to the PTQ checkpoint; delete the cache and report this")
        record = {
            "budget": budget,
            **_training_summary(done),
            "quantized": list(targets.members),
            "excluded": list(targets.excluded),
        }
        record |= self._export(stage, folder, student["model"], targets)
        write_text(
            folder / "training.jsonl",
            "".join(json.dumps({"schema": SCHEMA, **dataclasses.asdict(step)}) + "\n" for step in done.steps),
        )
        return record

    def _evaluate(self, stage: Stage, folder: Path) -> dict[str, Any]:
        assert stage.task is not None
        checkpoint = stage.inputs["checkpoint"]
        began = time.monotonic()
        with self.reporter.track(stage.label) as advance:
            engine = self._serving.engine(checkpoint.key, self.folder_of(checkpoint), lambda: self._load(checkpoint))
            found = evaluate.evaluate_task(
                stage.task.name,
                engine,
                weights=folder_fingerprint(self.folder_of(checkpoint), self.store),
                journals=self.journals,
                limit=stage.task.limit,
                on_progress=lambda done, total: advance(done, total, ""),
            )
        write_samples(folder / "samples.jsonl.zst", found.samples)
        write_json(folder / "result.json", {"schema": SCHEMA, **found.result})
        return {"seconds_answering": time.monotonic() - began, "backend": engine.backend}

    def close(self) -> None:
        """End the engine's process, if there is one."""
        self._serving.close()

    def _diagnostics(self, stage: Stage, folder: Path) -> dict[str, Any]:
        teacher_stage, checkpoint = stage.inputs["model"], stage.inputs["checkpoint"]
        batches = batches_of(self._sequences(stage.inputs["data"], _SPLIT_OF[stage.kind], stage.sections["samples"]))
        teacher, candidate = self._load(teacher_stage), self._load(checkpoint)
        is_known = teacher_stage.key in self._teacher_hidden
        total = len(batches) * (1 if is_known else 2)
        with self.reporter.track(stage.label) as advance:
            ticks = count(1)

            def tick() -> None:
                advance(next(ticks), total, "")

            teacher_hidden = self._teacher_states(teacher_stage, teacher, batches, tick)
            hidden = teacher_hidden if candidate is teacher else divergence.final_hidden(candidate.model, batches)
            heads = [loaded.model.get_output_embeddings().weight for loaded in (candidate, teacher)]
            with counting_blocks(candidate.model) as counts:
                response, everything = divergence.measure(hidden, heads[0], teacher_hidden, heads[1], batches, on_batch=tick)
        result = {
            "schema": SCHEMA,
            "response": dataclasses.asdict(divergence.summarize(response)),
            "all": dataclasses.asdict(divergence.summarize(everything)),
            "kernels": candidate.kernels,
            "saturated_share": counts.saturated / counts.total if counts.total else None,
            "overshoot": counts.overshoot if counts.total else None,
            "subnormal_share": counts.subnormal / counts.total if counts.total else None,
        }
        write_json(folder / "result.json", result)
        rows = [
            {
                "schema": SCHEMA,
                "sequence": i,
                "kl_sum": math.fsum(r.kl),
                "n_tokens": r.n_tokens,
                "ce_sum": r.ce_sum,
                "top1_sum": r.top1_sum,
            }
            for i, r in enumerate(response)
        ]
        write_text(folder / "sequences.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        return {"n_sequences": len(rows)}

    def _choices(self, stage: Stage) -> dict[str, Any]:
        """What the scale rule of a "quantize" stage needs to choose by."""
        quantization, calibration = _quantization(stage), stage.inputs["calibration"]
        choices: dict[str, Any] = {}
        if quantization.scale_weighting == "second_moment":
            choices["second_moments"] = load_file(self.folder_of(calibration) / SECOND_MOMENTS)
        if quantization.scale_rule == "gptq":
            sequences = self._sequences(stage.inputs["data"], _SPLIT_OF["calibrate"], calibration.sections["samples"])
            choices["batches"] = [inputs_of(batch) for batch in batches_of(sequences)]
        return choices

    def _fresh_student(self, stage: Stage, choices: dict[str, Any]) -> tuple[dict[str, Any], Any]:
        """A copy of the BF16 model, quantized as PTQ is; `choices` are further arguments of `quantize_model`."""
        recipe = _recipe(_quantization(stage))
        model = self._read(self.folder_of(stage.inputs["model"])).model
        targets = match(model, recipe)
        amax = json.loads((self.folder_of(stage.inputs["calibration"]) / "input_amax.json").read_text())
        modules = quantize_model(model, recipe, amax if recipe.activations else None, **choices)
        return {"modules": modules, "model": model}, targets

    def _export(self, stage: Stage, folder: Path, student: Any, targets: Any) -> dict[str, Any]:
        """Write the checkpoint, load it back, and hold its logits against those of the model in memory, bit for bit."""
        companions = self.folder_of(stage.inputs["model"])
        record = {
            "stage": stage.key,
            "layout": _quantization(stage).layout,
            "recipe": stage.sections["quantization"],
            "inputs": {role: self._digest(given) for role, given in stage.inputs.items()},
            "training": stage.sections.get("training"),
            "objective": stage.sections.get("objective"),
            "packages": package_versions(RECORDED),
        }
        write_checkpoint(
            folder, student, targets=targets, companions=companions, record=record, layout=_quantization(stage).layout
        )
        loaded = self._read(folder)
        batch = inputs_of(batches_of(self._sequences(stage.inputs["data"], "validation", VALIDATION_SEQUENCES))[0])
        with torch.no_grad():
            expected, found = student.eval()(**batch, use_cache=False).logits, loaded.model(**batch, use_cache=False).logits
        if not torch.equal(expected, found):
            difference = float((expected.float() - found.float()).abs().max())
            raise HarnessError(
                f"{stage.label}: the exported checkpoint does not reproduce the model in memory (logits differ by up to {difference:g}); report this"
            )
        return {"load_back": "identical logits"}

    def _training_batches(self, stage: Stage) -> tuple[list[Batch], dict[str, Any]]:
        assert stage.variant is not None and stage.variant.training is not None
        settings = stage.variant.training
        sequences = self._sequences(stage.inputs["data"], "train", None)
        order, epochs = data.training_order(sequences, tokens=settings.tokens, epochs=settings.epochs, seed=settings.seed)
        chosen = [sequences[i] for i in order]
        if settings.loss_on == "all":
            chosen = [Sequence(s.token_ids, (True,) * len(s)) for s in chosen]
        batches = [batch_of(chosen[i : i + settings.batch_size]) for i in range(0, len(chosen), settings.batch_size)]
        tokens = sum(batch.n_tokens for batch in batches)
        loss_tokens = sum(int(batch.loss_mask[:, 1:].sum()) for batch in batches)
        return batches, {
            "tokens": tokens,
            "loss_tokens": loss_tokens,
            "steps": len(batches),
            "epochs_read": epochs,
            "lr": settings.lr,
        }

    def _teacher_states(self, stage: Stage, teacher: Loaded, batches: list[Batch], tick: Any) -> list[Tensor]:
        found = self._teacher_hidden.get(stage.key)
        if found is None:
            found = []
            for hidden in divergence.final_hidden(teacher.model, batches):
                found.append(hidden)
                tick()
            if sum(tensor.numel() * tensor.element_size() for tensor in found) <= TEACHER_MEMORY_BYTES:
                self._teacher_hidden = {stage.key: found}
        return found

    def _load(self, stage: Stage) -> Loaded:
        """The checkpoint of a stage, from disk; the BF16 model and one other stay in memory."""
        bf16 = next(s.key for s in self.plan.stages if s.kind == "model")
        if stage.key not in self._loaded:
            self._loaded = {key: loaded for key, loaded in self._loaded.items() if key == bf16}
            self._loaded[stage.key] = self._read(self.folder_of(stage))
        return self._loaded[stage.key]

    def _digest(self, stage: Stage) -> str:
        """What identifies the result of a stage: the calibration with all that it recorded, the text, the model."""
        found = self.store.find(stage.key)
        return stage.sections["fingerprint"] if found is None else found.digest

    def _tokenizer(self, folder: Path) -> Any:
        return loading.load_tokenizer(folder, trust_remote_code=self.plan.suite.model.trust_remote_code)

    def _read(self, folder: Path) -> Loaded:
        return loading.load_model(folder, trust_remote_code=self.plan.suite.model.trust_remote_code)

    def _sequences(self, stage: Stage, split: str, count: int | None) -> list[Sequence]:
        tensors = load_file(self.folder_of(stage) / "sequences.safetensors")
        lengths = tensors[f"{split}.lengths"].tolist()
        if count is not None and count > len(lengths):
            raise DataError(
                f"{stage.label}: the {split} split has {len(lengths)} sequences, {count} are asked for; lower samples or add data"
            )
        ids, mask = tensors[f"{split}.token_ids"].tolist(), tensors[f"{split}.is_response"].tolist()
        rows = [Sequence(tuple(ids[i][:n]), tuple(map(bool, mask[i][:n]))) for i, n in enumerate(lengths)]
        return rows if count is None else rows[:count]


def _quantization(stage: Stage) -> Quantization:
    assert stage.variant is not None and stage.variant.quantization is not None
    return stage.variant.quantization


def _recipe(quantization: Quantization) -> Recipe:
    return Recipe(
        activations=quantization.activations,
        exclude=quantization.exclude,
        power_of_two=quantization.tensor_scale == "power_of_two",
        headroom=quantization.calibration.headroom,
        scale_rule=quantization.scale_rule,
        scale_weighting=quantization.scale_weighting,
        scale_multiplier=quantization.scale_multiplier,
        block_scales=quantization.block_scales,
        fp8=quantization.fp8,
        kv_cache=quantization.kv_cache,
    )


def _training_summary(done: Training) -> dict[str, Any]:
    return {
        "start_digest": done.start_digest,
        "codes_changed": done.codes_changed,
        "block_scales_changed": done.block_scales_changed,
        "first_loss": done.steps[0].loss,
        "last_loss": done.steps[-1].loss,
        "saturated_weight_blocks": done.steps[-1].saturated_weight_blocks,
    }
