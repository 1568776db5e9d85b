"""A suite becomes a scaled one that a laptop runs in minutes: the same stages, recipe, tasks and engine, with a twin for each model.

What was read from the file is changed and read again by the ordinary rules, so that a scaled suite is a suite like any other. Nothing is
written here and no weight is made: twins are `rehearsal_models`, rows `rehearsal_data`. Every change is said; what cannot be rehearsed on
this machine is left out and named. No torch.
"""

from __future__ import annotations

import copy
import importlib.util
import re
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from harness.errors import SuiteError
from harness.provenance import vllm_device_kind
from harness.schema_data import Teacher
from harness.suite import Suite, load_suite, parse_suite
from harness.task_files import gives_answers, is_ours
from harness.task_settings import N_REHEARSED, REHEARSED_TOKENS, ResolvedTask
from harness.tasks.needs import missing
from harness.toml_file import read_toml

N_QUESTIONS, MOST_REPEATS, MAX_TOKENS = N_REHEARSED, 2, REHEARSED_TOKENS
"""Of a task: its first questions, answers to each, and their length."""
SEQ_LEN, GENERATED_SEQ_LEN = 256, 128
"""Tokens of a row, and of a text that is made token by token."""
CALIBRATION, VALIDATION, DIAGNOSTICS = 4, 2, 4
"""Sequences of each."""
TRAINING_TOKENS, STEP_ROWS = 1200, 2
CONTEXT = 4096
"""Tokens that an engine holds."""
_TRAINING = {
    "tokens": TRAINING_TOKENS,
    "batch_size": STEP_ROWS,
    "micro_batch_size": 1,
    "warmup_steps": 1,
    "validate_every": 2,
    "validation_samples": VALIDATION,
    "checkpoint_every": 2,
    "candidates": 2,
}
"""What [training] is scaled to, at most."""
_OF_MACHINE = ("gpu_memory_utilization", "tensor_parallel_size", "data_parallel_size", "max_num_batched_tokens")
"""Arguments of vLLM that are about the machine of the real run."""


_LAYER = re.compile(r"(?<![A-Za-z0-9_])\d+(?![A-Za-z0-9_])")
"""A number in a pattern, which is that of a layer."""


@dataclass(frozen=True)
class TwinOf:
    """A model that the suite names, and the folder where its twin is expected. key: where the suite names it.

    role: "model", "teacher", "judge" or "checkpoint", the model quantized as released.
    """

    key: str
    path: str
    revision: str | None
    role: str
    folder: Path


@dataclass(frozen=True)
class Scaled:
    """A scaled suite and what it was. changes: what differs, a line each. left_out: what is not rehearsed, with the reason."""

    original: Suite
    raw: dict[str, Any]
    twins: tuple[TwinOf, ...]
    changes: tuple[str, ...]
    left_out: tuple[str, ...]

    @property
    def suite(self) -> Suite:
        """It, by the ordinary rules; SuiteError if it is none, which is a mistake of the rehearsal."""
        return replace(parse_suite(self.original.path, self.raw), is_rehearsal=True)


@dataclass
class _Changes:
    """The table that is changed, and what is said of it."""

    raw: dict[str, Any]
    work: Path
    twins: list[TwinOf] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def twin(self, key: str, path: str, revision: str | None, role: str) -> str:
        """The folder of the twin of a model: one for each path and role."""
        same = next(
            (each for each in self.twins if (each.path, each.role == "checkpoint") == (path, role == "checkpoint")), None
        )
        if same is not None:
            return str(same.folder)
        folder = self.work / "twins" / f"{len(self.twins)}-{Path(path).name}"
        self.twins.append(TwinOf(key, path, revision, role, folder))
        return str(folder)


def scale(path: Path, work: Path, *, with_experts: Collection[str] = ()) -> Scaled:
    """The suite at `path`, scaled down, with its twins and rows expected below the folder `work`.

    with_experts: those of its models, by path, that have layers of experts.
    Raises:
        SuiteError: the suite is wrong, or nothing of it can be rehearsed here.
    """
    original = load_suite(path)
    found = _Changes(copy.deepcopy(read_toml(path, what="suite", example="suites/quickstart.toml")), work)
    _models(found, original)
    _quantization(found)
    _data(found, original)
    _training(found)
    _tasks(found, original)
    _engines(found, original, with_experts)
    _diagnostics(found)
    scaled = Scaled(original, found.raw, tuple(found.twins), tuple(found.said), tuple(found.left_out))
    if not found.raw.get("task") and "diagnostics" not in found.raw:
        raise SuiteError(f"{path}: nothing of it can be rehearsed on this machine: {'; '.join(scaled.left_out)}")
    return scaled


def _models(found: _Changes, original: Suite) -> None:
    model = found.raw["model"]
    model["path"] = found.twin("model.path", original.model.path, model.pop("revision", None), "model")
    if model.pop("trust_remote_code", False):
        found.said.append("model.trust_remote_code: a twin brings no code; the nearest class of transformers stands in")
    for variant in found.raw["variant"]:
        where = f'variant "{variant["name"]}"'
        if "path" in variant:
            role = "checkpoint" if is_quantized_name(variant["path"]) else "model"
            variant["path"] = found.twin(f"{where}: path", variant["path"], variant.pop("revision", None), role)
        if "teacher" in variant:
            given = variant["teacher"]
            variant["teacher"] = {"path": found.twin(f"{where}: teacher", given["path"], given.get("revision"), "teacher")}
        if variant.pop("endpoint", None) is not None:
            found.said.append(f"{where}: its endpoint serves the real checkpoint and is not asked")
        if len(variant.get("seeds", ())) > 2:
            found.said.append(f"{where}: seeds: the first two of {len(variant['seeds'])}")
            variant["seeds"] = variant["seeds"][:2]
    if "judge" in found.raw:
        judge = found.raw["judge"]
        judge["path"] = found.twin("judge.path", judge["path"], judge.pop("revision", None), "judge")
        if judge.pop("endpoint", None) is not None:
            found.said.append("judge: its endpoint is not asked; a twin judges")


def is_quantized_name(path: str) -> bool:
    """Whether a checkpoint made elsewhere is one in NVFP4, by its name; others (BF16, FP8) are rehearsed as plain models."""
    name = Path(path).name.upper()
    return not any(word in name for word in ("BF16", "FP8", "BFLOAT16"))


def _quantization(found: _Changes) -> None:
    """Few samples, no patterns that name layers by number; and random weights may saturate as they like."""
    tables = [found.raw.get("quantization"), *(variant.get("quantization") for variant in found.raw["variant"])]
    for index, table in enumerate(tables):
        if table is None or (index and "calibration" not in table):
            continue
        calibration = table.setdefault("calibration", {})
        if not index or "samples" in calibration:
            calibration["samples"] = min(calibration.get("samples", CALIBRATION), CALIBRATION)
        if not index:
            calibration |= {"max_saturated": 1.0, "max_overshoot": 1e9}
    for table in tables:
        for key in ("exclude", "fp8"):
            if table is not None and (numbered := [each for each in table.get(key, ()) if _LAYER.search(each)]):
                table[key] = [each for each in table[key] if each not in numbered]
                found.said.append(
                    f"quantization.{key}: {', '.join(numbered)} by number: a twin has other layers; checked on the real ones alone"
                )
    if found.raw.get("quantization"):
        found.said.append(
            f"quantization.calibration: {CALIBRATION} samples; random weights may saturate as they like (max_saturated, max_overshoot)"
        )


def _data(found: _Changes, original: Suite) -> None:
    sections = found.raw.get("data", {})
    for name, section in sections.items():
        source = section["source"]
        if source in ("hub", "jsonl"):
            section["seq_len"] = SEQ_LEN
            section |= {key: min(section[key], 8) for key in ("min_tokens",) if key in section}
            section.pop("max_rows", None)
        elif source in ("teacher", "bos"):
            _generated(found, name, section, original)
        elif source == "random_tokens":
            section |= {"seq_len": 64, "tokens": 64 * 160}
        elif source == "drawings":
            section["pictures"] = min(section["pictures"], 240)
        elif source == "tunnel":
            section["problems"] = min(section["problems"], 240)
    if sections:
        made = {section["source"] for section in sections.values()}
        found.said.append(f"data: few short rows, at most {SEQ_LEN} tokens each ({', '.join(sorted(made))})")


def _generated(found: _Changes, name: str, section: dict[str, Any], original: Suite) -> None:
    given = original.data[name]
    section |= {"max_tokens": MAX_TOKENS, "seq_len": GENERATED_SEQ_LEN}
    if isinstance(given, Teacher):
        section["seq_len"] = SEQ_LEN
        section.pop("tokens", None)
        section.pop("n_prompts", None)
        if given.samples_per_prompt > 1:
            section["samples_per_prompt"] = MOST_REPEATS
        if given.keep == "correct":
            section["keep"] = "incorrect"
            found.said.append(f'data.{name}.keep: "correct" becomes "incorrect": what is random is never right')
    else:
        section["tokens"] = 160 * MAX_TOKENS
    found.said.append(f"data.{name}: texts of {MAX_TOKENS} tokens, written by the twin")


def _training(found: _Changes) -> None:
    tables = [found.raw.get("training"), *(variant.get("training") for variant in found.raw["variant"])]
    for index, table in enumerate(tables):
        if table is None:
            continue
        table |= {key: min(table[key], most) for key, most in _TRAINING.items() if key in table}
        if not index:
            table |= {"epochs": 100, "checkpoint_every": 2, "warmup_steps": min(table.get("warmup_steps", 1), 1)}
            if "candidates" not in table and table.get("select") == "best_of_k":
                table["candidates"] = 2
        if "lr_groups" in table:
            table["lr_groups"] = [each for each in table["lr_groups"] if not _LAYER.search(each["match"])]
        if table.pop("compile", False):
            found.said.append("training.compile: not compiled")
    shared = found.raw.get("training")
    if shared is None:
        return
    found.said.append(f"training: {shared['tokens']:,} tokens in steps of {shared['batch_size']}; a checkpoint every 2 steps")
    trained = [variant for variant in found.raw["variant"] if variant["method"] in ("qat", "qad")]
    if shared.get("select") == "best_of_k" and len(trained) > 1:
        for variant in trained[1:]:
            _choose_by_loss(variant.setdefault("training", {}))
        found.said.append(
            f'training.select: the first trained variant is chosen by tasks, the other {len(trained) - 1} by "best_val"'
        )


def _choose_by_loss(table: dict[str, Any]) -> None:
    """Candidates are judged by an engine each, which takes most of the time; the keys of "best_of_k" would be without effect."""
    table["select"] = "best_val"
    table.pop("candidates", None)
    table.pop("select_tasks", None)


def _tasks(found: _Changes, original: Suite) -> None:
    kept = []
    resolved = {(task.own_name, task.pictures): task for task in original.tasks}
    for given in found.raw.get("task", ()):
        task = resolved[given["name"], given.get("pictures", "shown")]
        reason = _why_left_out(task)
        if reason is not None:
            found.left_out.append(f"task {task.name}: {reason}")
            continue
        given["limit"] = min(given.get("limit", N_QUESTIONS), N_QUESTIONS)
        if task.repeats > 1:
            given["repeats"] = min(task.repeats, MOST_REPEATS)
        if gives_answers(task.own_name, task.path) is not False:
            given["sampling"] = {**given.get("sampling", {}), "max_tokens": MAX_TOKENS}
        kept.append(given)
    if "task" in found.raw:
        found.raw["task"] = kept
    if not kept:
        found.raw.pop("sampling", None)
    else:
        found.said.append(f"tasks: {N_QUESTIONS} questions each, at most {MOST_REPEATS} answers of {MAX_TOKENS} tokens")
    names = {task["name"] for task in kept}
    if "judge" in found.raw and "aa_lcr" not in names:
        del found.raw["judge"]
    for table in (found.raw.get("training"), *(variant.get("training") for variant in found.raw["variant"])):
        if table and "select_tasks" in table:
            table["select_tasks"] = [name for name in table["select_tasks"] if is_ours(name) and missing(name) is None]
            if not table["select_tasks"]:
                found.said.append('training.select: "best_val", since no task of select_tasks can be asked here')
                _choose_by_loss(table)


def _why_left_out(task: ResolvedTask) -> str | None:
    if task.path is not None:
        return None
    if not is_ours(task.own_name):
        return "a task of lm-eval's, whose rows come from the hub"
    return missing(task.own_name)


def _engines(found: _Changes, original: Suite, with_experts: Collection[str]) -> None:
    raw = found.raw
    has_experts = original.model.path in with_experts
    computed = _computes(raw["engine"])
    _engine(found, "engine", raw["engine"], _why_hf(raw["engine"], has_experts=has_experts, original=original))
    if "gate" in raw and _computes(raw["engine"]) != computed:
        raw["gate"]["kernels"] = ["w4a4_emulation", "w4a16"]
    if "judge" in raw:
        judges_with = original.judge is not None and original.judge.path in with_experts
        section = raw["judge"]["engine"]
        _engine(found, "judge.engine", section, _why_hf(section, has_experts=judges_with, original=original))
    for name, section in raw.get("data", {}).items():
        if "engine" not in section:
            continue
        reason = _why_hf({"kind": section["engine"]}, has_experts=has_experts, original=original)
        if section["engine"] == "hf" or reason is not None:
            section |= {"engine": "hf", "engine_args": {"batch_size": 8}}
            if reason is not None:
                found.said.append(f'data.{name}.engine: "hf" in place of "vllm": {reason}')
        else:
            section["engine_args"] = _vllm_args(section.get("engine_args", {}))


def _computes(section: dict[str, Any]) -> tuple[str, str | None]:
    return section["kind"], section.get("kernels")


def _engine(found: _Changes, where: str, section: dict[str, Any], reason: str | None) -> None:
    """An [engine] as this machine has it. reason: why it is "hf", or None."""
    if section["kind"] == "hf" or reason is not None:
        if reason is not None:
            found.said.append(f'{where}: "hf" in place of "{section["kind"]}": {reason}')
        section.clear()
        section |= {"kind": "hf", "args": {"batch_size": 8}}
        return
    section["args"] = _vllm_args(section.get("args", {}))
    if section.get("kernels") == "native" and vllm_device_kind().startswith("cpu"):
        section["kernels"] = "w4a4_emulation"
        found.said.append(f'{where}.kernels: "w4a4_emulation" in place of "native": this machine has no FP4 units')
    found.said.append(f"{where}.args: {CONTEXT:,} tokens of context, one process, a small cache")


def _why_hf(section: dict[str, Any], *, has_experts: bool, original: Suite) -> str | None:
    """Why another engine than the suite's answers, or None."""
    if section["kind"] == "hf":
        return None
    if (section.get("launch") or {}).get("command") is not None:
        return "the server's own command may not know the twin"
    if any(variant.endpoint is not None for variant in original.variants) and section["kind"] == "server":
        return "the endpoints serve the real checkpoints"
    if importlib.util.find_spec("vllm") is None:
        return "vLLM is not installed here"
    if has_experts and vllm_device_kind().startswith("cpu"):
        return "on a CPU vLLM has no NVFP4 kernel for experts, and none at all for those without a gate"
    return None


def _vllm_args(args: dict[str, Any]) -> dict[str, Any]:
    """Arguments for a tiny model: small, one process, nothing compiled."""
    kept = {key: value for key, value in args.items() if key not in _OF_MACHINE}
    kept |= {"max_model_len": CONTEXT, "max_num_seqs": min(args.get("max_num_seqs", 16), 16), "enforce_eager": True}
    return kept | {"kv_cache_memory_gib": 0.25}


def _diagnostics(found: _Changes) -> None:
    if "diagnostics" in found.raw:
        found.raw["diagnostics"]["samples"] = DIAGNOSTICS
        found.said.append(f"diagnostics: {DIAGNOSTICS} samples")
