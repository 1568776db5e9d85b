"""What each kind of stage does. Effects live here; the order of stages is in `plan.py`, their storage in `store.py`."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Collection
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from harness import diagnostics, evaluation, judging, loading, training
from harness.batches import Inputs, batches_of, ticking
from harness.data_stage import DataWork, make_data, what_became
from harness.done import is_done
from harness.engines.serving import Serving
from harness.errors import DataError, HarnessError, ModelError
from harness.kept import kept_digests, require_kept
from harness.load_back import load_back
from harness.models import folder_fingerprint, folder_of, require_kind, text_config
from harness.plan import Plan, Stage
from harness.processor import Processor, load_processor
from harness.processor_checks import require_same_images
from harness.progress import Reporter
from harness.provenance import RECORDED, package_versions
from harness.recipes import recipe_of, unrouted_experts, what_was_unrouted
from harness.schema_data import Generated
from harness.schema_server import kinds_of
from harness.store import Store, write_json
from harness.tasks.needs import require
from harness.token_store import StoredSequences
from qad import divergence, ranks
from qad.calibrate import calibrate, counting_blocks, require_unsaturated, second_moments
from qad.checkpoint import Loaded, write_checkpoint
from qad.errors import memory_asked_for
from qad.modules import encoding_digest
from qad.packed import read_config
from qad.quantize import quantize_model
from qad.recipe import match

SECOND_MOMENTS = "input_second_moments.safetensors"
_SPLIT_OF = {"calibrate": "calibration", "diagnostics": "diagnostics"}
VALIDATION_SEQUENCES = 8
"""Held-out sequences on which saturation is checked and exports are compared."""


class Workbench:
    """Runs stages. Keeps the BF16 model and the last candidate in memory, since neighbours in a plan share them."""

    def __init__(self, plan: Plan, store: Store, journals: Path, reporter: Reporter) -> None:
        for stage in plan.stages:  # what a score takes must be here before a model is loaded
            if stage.kind in ("prepare", "score") and stage.task and stage.task.path is None and not is_done(stage, store):
                require(stage.task.own_name)
        self.plan, self.store, self.journals, self.reporter = plan, store, journals, reporter
        self._loaded: dict[str, Loaded] = {}
        self.teacher_hidden: dict[str, list[Tensor]] = {}  # on the text of the diagnostics, by the teacher's key
        endpoints = tuple(v.endpoint for v in plan.variants if v.endpoint is not None)
        trusts = plan.suite.model.trust_remote_code
        self._serving = Serving(
            plan.suite.engine, endpoints=endpoints, records=journals / "endpoints", trust_remote_code=trusts
        )
        judge = plan.suite.judge
        self._judge: Serving | None = None
        if judge is not None:
            given = () if judge.endpoint is None else (judge.endpoint,)
            self._judge = Serving(judge.engine, endpoints=given, records=journals / "endpoints")
        loading.quiet_libraries()

    def run(self, stage: Stage, folder: Path) -> dict[str, Any]:
        """Do the work of `stage` into `folder`; returns what its record says beside keys and digests."""
        work: dict[str, Callable[[Stage, Path], dict[str, Any]]] = {
            "model": self._model,
            "data": self._data,
            "calibrate": self._calibrate,
            "quantize": self._quantize,
            "train": self._train,
            "select": self._select,
            "prepare": partial(evaluation.prepare, self),
            "evaluate": partial(evaluation.answer, self),
            "judge": partial(judging.judge, self),
            "score": partial(evaluation.score, self),
            "diagnostics": partial(diagnostics.diagnose, self),
        }
        if stage.kind not in ("evaluate", "score"):
            self._serving.close()
        if stage.kind not in ("judge", "score"):
            self._close_judge()
        if _is_served_elsewhere(stage) or stage.kind == "quantize":
            self.make_room()
        try:
            return work[stage.kind](stage, folder)
        except (RuntimeError, MemoryError) as error:
            reason = memory_asked_for(error)
            if reason is None:
                raise
            raise HarnessError(
                f"{stage.label}: out of memory ({reason}); lower the seq_len of its data, or args.batch_size of [engine] if it answers "
                "requests; or use a machine with more"
            ) from error

    def make_room(self) -> None:
        """Let go of the models on the GPU, before another model or a process takes their place: what is needed again is read again."""
        if torch.cuda.is_available():
            self._loaded.clear()
            self.teacher_hidden.clear()
            torch.cuda.empty_cache()

    def check_suite(self) -> None:
        """Raise now what would otherwise end the run after hours: recipes that do not fit, text that is too short."""
        bf16 = self.plan.stages[0]
        for stage in (s for s in self.plan.stages if s.kind == "model" and s is not self.plan.judge):
            self._serving.require(self.folder_of(stage))
        for stage in (s for s in self.plan.stages if s.kind == "judge"):
            assert self._judge is not None
            self._judge.require(self.folder_of(stage.inputs["judge"]))
        for variant in self.plan.variants:
            if variant.quantization is not None:
                model = self.load(bf16).model
                self._serving.require_layers(variant.name, match(model, recipe_of(variant.quantization, model)))
        for stage in self.plan.stages:
            if stage.kind == "train":
                training.check(self, stage)
                self._held_out(stage)
            elif stage.kind == "model" and stage not in (bf16, self.plan.judge):  # whose tokenizer renders all prompts
                self._require_same_vocabulary(bf16, stage)
            elif stage.kind == "evaluate":
                evaluation.check(self, stage)
            elif stage.kind == "quantize":
                self.sequences(stage.inputs["data"], "validation", VALIDATION_SEQUENCES)
            elif stage.kind in _SPLIT_OF and "data" in stage.inputs:
                self.sequences(stage.inputs["data"], _SPLIT_OF[stage.kind], stage.sections["samples"])

    def _require_same_vocabulary(self, bf16: Stage, other: Stage) -> None:
        """KL compares probabilities token by token: with other tokens there is none."""
        folders = [self.folder_of(bf16), self.folder_of(other)]
        sizes = [text_config(read_config(folder)).get("vocab_size") for folder in folders]
        vocabularies = [self.tokenizer(folder).get_vocab() for folder in folders]
        if sizes[0] != sizes[1] or vocabularies[0] != vocabularies[1]:
            raise ModelError(
                f"{other.label}: {folders[1]} has another vocabulary ({sizes[1]} tokens) than the model ({sizes[0]}); "
                "KL compares both token by token: a checkpoint is measured against the model that it was made from, and a teacher (teacher.path) "
                "must have the model's tokenizer; choose another"
            )
        if self.reader is not None:
            require_same_images(self.reader, self.processor(folders[1]), f"{other.label}: {folders[1]}")

    def folder_of(self, stage: Stage) -> Path:
        """Where the files of a stage are that is done, or that needs nothing done."""
        if stage.is_external:
            assert stage.source is not None
            folder = folder_of(stage.source)
            if stage is not self.plan.judge:
                require_kind(stage.label, folder, self.plan.suite.model.kind)
            return folder
        found = self.store.find(stage.key)
        assert found is not None, f"{stage.label} is used before it is done"
        return found.folder

    def _model(self, stage: Stage, folder: Path) -> dict[str, Any]:
        assert stage.source is not None and stage.source.folder is not None and stage.source.gguf is not None
        with self.reporter.track(f"model: read {stage.source.gguf} (about half a minute)"):
            loading.convert_gguf(stage.source.folder, stage.source.gguf, folder)
        return {"notes": list(stage.source.notes)}

    def _data(self, stage: Stage, folder: Path) -> dict[str, Any]:
        model = stage.inputs["model"]
        model_folder = self.folder_of(model)
        work = DataWork(
            model=model_folder,
            tokenizer=self.tokenizer(model_folder),
            processor=self.reader,
            load=lambda: self.load(model),
            parts=[self.folder_of(part) for role, part in stage.inputs.items() if role != "model"],
            journals=self.journals,
            store=self.store,
            trust_remote_code=self.plan.suite.model.trust_remote_code,
        )
        with self.reporter.track(stage.label) as advance:
            record = make_data(stage, folder, work, advance)
        if (line := what_became(record)) is not None:
            self.reporter.say(f"  {stage.label}: {line}")
        return record

    def _calibrate(self, stage: Stage, folder: Path) -> dict[str, Any]:
        sequences = self.sequences(stage.inputs["data"], _SPLIT_OF[stage.kind], stage.sections["samples"])
        batches = Inputs(batches_of(sequences, self.reader), ranks.device())
        model = self.load(stage.inputs["model"]).model
        recipe = recipe_of(stage.quantization, model)
        skip = stage.sections["skip_first_token"]
        with self.reporter.track(stage.label) as advance:
            amax = calibrate(model, recipe, ticking(batches, advance), skip_first_token=skip)
            if stage.sections["second_moments"]:
                save_file(second_moments(model, recipe, batches, skip_first_token=skip), folder / SECOND_MOMENTS)
        write_json(folder / "input_amax.json", amax)
        unrouted = {"unrouted_experts": amax.unrouted_experts} if amax.unrouted_experts else {}
        if (line := what_was_unrouted(unrouted)) is not None:
            self.reporter.say(f"  {stage.label}: {line}")
        return {"n_sequences": len(sequences), "n_tokens": sum(map(len, sequences)), **unrouted}

    def _quantize(self, stage: Stage, folder: Path) -> dict[str, Any]:
        limits = stage.quantization.calibration
        with self.reporter.track(stage.label) as advance:
            student, targets = self.fresh_student(stage, self._choices(stage))
            batches = batches_of(self.sequences(stage.inputs["data"], "validation", VALIDATION_SEQUENCES), self.reader)
            model = student["model"].to(ranks.device())
            with counting_blocks(model) as counts:
                for _ in divergence.final_hidden(model, ticking(batches, advance)):
                    pass
            require_unsaturated(counts, max_saturated=limits.max_saturated, max_overshoot=limits.max_overshoot)
        record = {
            "start_digest": encoding_digest(student["modules"]),
            "quantized": list(targets.members),
            "excluded": list(targets.excluded),
            "validation_blocks": dataclasses.asdict(counts),
        }
        return record | self.export(stage, folder, student, targets)

    def _train(self, stage: Stage, folder: Path) -> dict[str, Any]:
        return training.train(self, stage, folder)

    def _select(self, stage: Stage, folder: Path) -> dict[str, Any]:
        return training.select(self, stage, folder)

    def tidy(self, stage: Stage) -> None:
        """After a stage is stored: what was kept to go on with it is of no use any more."""
        if stage.kind == "train":
            shutil.rmtree(training.partial_folder(self, stage), ignore_errors=True)

    def require_start(self, stage: Stage, digest: str) -> None:
        """HarnessError unless training starts from the very codes and scales of the PTQ checkpoint."""
        start = self.store.find(stage.inputs["start"].key)
        if start is None or start.record["result"]["start_digest"] != digest:
            raise HarnessError(f"{stage.label}: step 0 does not encode to the PTQ checkpoint; delete the cache and report this")

    def keep_teacher_alone(self, stage: Stage) -> None:
        """Let go of the models in memory that a "train" stage does not need."""
        key = stage.inputs.get("teacher", stage.inputs["model"]).key
        self._loaded = {kept: loaded for kept, loaded in self._loaded.items() if kept == key}

    def teacher(self, stage: Stage) -> Any:
        """The model that a "train" stage learns from, or is validated against; on the CPU where it will be sharded."""
        given = stage.inputs.get("teacher", stage.inputs["model"])
        if ranks.world_size() == 1:
            return self.load(given).model
        self._loaded.clear()
        return self._read(self.folder_of(given), torch.device("cpu")).model

    def engine_of(self, key: str, folder: Path) -> Any:
        """The suite's engine with the checkpoint in `folder`, which is no stage."""
        return self._serving.engine(key, folder, lambda: self._read(folder, ranks.device()))

    def engine(self, stage: Stage) -> Any:
        """The suite's engine with the checkpoint of an "evaluate" stage."""
        checkpoint = stage.inputs["checkpoint"]
        folder = self.folder_of(checkpoint)
        return self._serving.engine(
            checkpoint.key,
            folder,
            lambda: self.load(checkpoint),
            weights=folder_fingerprint(folder, self.store),
            endpoint=stage.variant.endpoint if stage.variant else None,
        )

    def context_length(self, stage: Stage) -> int | None:
        """Tokens that the engine of an "evaluate" stage will hold; None where only the engine can say."""
        return self._serving.context_length(self.folder_of(self.plan.stages[0]))

    @property
    def max_images(self) -> int | None:
        """Images that the suite's engine takes in a prompt; None without such a limit."""
        return self._serving.max_images

    def judge_engine(self, model: Stage) -> Any:
        """The engine of [judge] with its model."""
        assert self._judge is not None
        judge, folder = self.plan.suite.judge, self.folder_of(model)
        return self._judge.engine(
            model.key,
            folder,
            lambda: self.load(model),
            weights=folder_fingerprint(folder, self.store),
            endpoint=judge.endpoint if judge is not None else None,
        )

    def close(self) -> None:
        """End the processes of engines, if there are any."""
        self._serving.close()
        self._close_judge()

    def _close_judge(self) -> None:
        if self._judge is not None:
            self._judge.close()

    def _choices(self, stage: Stage) -> dict[str, Any]:
        """What the scale rule of a "quantize" stage needs to choose by."""
        quantization, calibration = stage.quantization, stage.inputs["calibration"]
        choices: dict[str, Any] = {}
        if quantization.scale_weighting == "second_moment":
            choices["second_moments"] = load_file(self.folder_of(calibration) / SECOND_MOMENTS)
        if quantization.scale_rule == "gptq":
            sequences = self.sequences(stage.inputs["data"], _SPLIT_OF["calibrate"], calibration.sections["samples"])
            choices["batches"] = Inputs(batches_of(sequences, self.reader), torch.device("cpu"))  # where its model is
        return choices

    def fresh_student(self, stage: Stage, choices: dict[str, Any]) -> tuple[dict[str, Any], Any]:
        """A copy of the BF16 model, quantized as PTQ is, and digests of what quantization leaves alone.

        choices: further arguments of `quantize_model`.
        """
        model = self._read(self.folder_of(stage.inputs["model"]), torch.device("cpu")).model
        recipe = recipe_of(stage.quantization, model)
        targets = match(model, recipe)
        kept = kept_digests(model, targets.members)
        amax = json.loads((self.folder_of(stage.inputs["calibration"]) / "input_amax.json").read_text())
        modules = quantize_model(model, recipe, amax if recipe.activations else None, **choices)
        return {"modules": modules, "model": model, "kept": kept}, targets

    def export(
        self, stage: Stage, folder: Path, student: dict[str, Any], targets: Any, *, trained: Collection[str] = ()
    ) -> dict[str, Any]:
        """Write the checkpoint of a fresh student and load it back, bit for bit; what is not quantized, nor in `trained`, is the BF16 model's."""
        model, unrouted = student["model"], unrouted_experts(self.store.find(stage.inputs["calibration"].key))
        companions = self.folder_of(stage.inputs["model"])
        record = {
            "stage": stage.key,
            "layout": stage.quantization.layout,
            "recipe": stage.sections["quantization"],
            "inputs": {role: self._digest(given) for role, given in stage.inputs.items()},
            "training": stage.sections.get("training"),
            "objective": stage.sections.get("objective"),
            "packages": package_versions(RECORDED),
            **unrouted,
        }
        write_checkpoint(folder, model, targets=targets, companions=companions, record=record, layout=stage.quantization.layout)
        batches = batches_of(self._held_out(stage), self.reader)
        batch = next((batch for batch in batches if batch.is_image is not None), batches[0])
        loaded = load_back(stage.label, model, lambda: self._read(folder, ranks.device()).model, batch, ranks.device())
        both = [kept_digests(each, targets.members) for each in (model, loaded)]
        kept = require_kept(stage.label, student["kept"], *both, trained=trained)
        return {"load_back": "identical logits", "kept": kept, **unrouted}

    def load(self, stage: Stage) -> Loaded:
        """The checkpoint of a stage, from disk; the BF16 model and one other stay in memory."""
        bf16 = next(s.key for s in self.plan.stages if s.kind == "model")
        if stage.key not in self._loaded:
            self._loaded = {key: loaded for key, loaded in self._loaded.items() if key == bf16}
            self._loaded[stage.key] = self._read(self.folder_of(stage), ranks.device())
        return self._loaded[stage.key]

    def _digest(self, stage: Stage) -> str:
        """What identifies the result of a stage: the calibration with all that it recorded, the text, the model."""
        found = self.store.find(stage.key)
        return stage.sections["fingerprint"] if found is None else found.digest

    @cached_property
    def reader(self) -> Processor | None:
        """What writes the chats of an image-text model and makes its images into inputs; None for a model of text."""
        return None if self.plan.suite.model.kind == "text" else self.processor(self.folder_of(self.plan.stages[0]))

    def processor(self, folder: Path) -> Processor:
        """The processor of a checkpoint folder."""
        return load_processor(folder, trust_remote_code=self.plan.suite.model.trust_remote_code)

    def tokenizer(self, folder: Path) -> Any:
        return loading.load_tokenizer(folder, trust_remote_code=self.plan.suite.model.trust_remote_code)

    def _read(self, folder: Path, device: torch.device) -> Loaded:
        loaded = loading.load_model(folder, trust_remote_code=self.plan.suite.model.trust_remote_code, device=device)
        for line in loading.notes_of(loaded):
            self.reporter.say(f"  {folder.name}: {line}")
        return loaded

    def _held_out(self, stage: Stage) -> StoredSequences:
        """What an export is compared on: the first sequences of the validation split of its data, of which there must be one."""
        data = stage.inputs["data"]
        n = len(StoredSequences(self.folder_of(data), "validation", None))
        return self.sequences(data, "validation", min(max(n, 1), VALIDATION_SEQUENCES))

    def sequences(self, stage: Stage, split: str, count: int | None) -> StoredSequences:
        """The split of a data stage, or its first `count` sequences; DataError if it has fewer."""
        found = StoredSequences(self.folder_of(stage), split, count)
        if count is not None and count > len(found):
            tokens = int(found.lengths.sum())
            missing = f", about {tokens // len(found) * (count - len(found)):,} tokens" if len(found) else ""
            raise DataError(
                f"{stage.label}: the {split} split has {len(found)} sequences, {count} are asked for; {count - len(found)} are "
                f"missing{missing}: lower samples or add data"
            )
        return found


def _is_served_elsewhere(stage: Stage) -> bool:
    """Whether a process of its own computes the answers of a stage on this machine."""
    section = stage.text.section if stage.text is not None else None
    return "vllm" in kinds_of(stage.sections.get("engine", {})) or (isinstance(section, Generated) and section.engine == "vllm")
