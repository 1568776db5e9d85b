"""What `harness plan --gpu` prints: memory of every stage, what to change where it does not fit, GPU-hours, disk, tokens. No torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from harness import memory_model
from harness.architecture import Architecture
from harness.architecture_sizes import architecture_of
from harness.done import adopt_imported, find_done
from harness.hardware import BF16, GIB, TRAINING_SHARE, TRAINING_SHARE_EXPERTS, Cluster
from harness.model_config import config_of, read_configuration
from harness.plan import Plan, Stage, make_plan
from harness.planned_recipe import fp8_by, quantized_by
from harness.recipe_mistakes import planned_mistakes
from harness.schema_data import Bos, Teacher
from harness.several_gpus import MORE, torchrun_command
from harness.stage_needs import HF_BATCH, VLLM_SEQUENCES, Models, Need, asked_of, needs, served_bytes, training_of
from harness.store import Store, cache_folder
from harness.suite import load_suite
from harness.task_costs import PROMPT_TOKENS, n_requests, new_tokens, prompt_tokens
from harness.time_and_disk import (
    ANSWER_BYTES,
    TOKEN_BYTES,
    Cost,
    Generation,
    checkpoint_bytes,
    generation_hours,
    reading_hours,
    resume_bytes,
    training_hours,
    validation_hours,
)

_SHOWN = 4
"""Contributors of a need that are shown by name; the others are its rest."""
_LEAST = 0.05
"""GPU-hours below which something has no line of its own."""


@dataclass(frozen=True)
class Outlook:
    """What is printed, whether the GPUs have room for every stage, and what would end a run wherever it is done."""

    lines: tuple[str, ...]
    fits: bool
    mistakes: tuple[str, ...] = ()


def hardware_outlook(path: Path, cluster: Cluster, *, config: Path | None = None) -> Outlook:
    """What the stages of the suite at `path` that are not done yet need of `cluster`; nothing but a config.json is fetched.

    Models and rows that are nowhere are planned by what is known of them; `harness.outline` says which.

    config: of the model, in place of the one that is looked for.
    Raises:
        HarnessError: a suite with mistakes, a model whose configuration is nowhere, damaged, or of an unknown architecture.
    """
    store = Store(cache_folder())
    plan = make_plan(load_suite(path), store, missing=[])
    adopt_imported(plan, store)
    models = _models(plan, store, config)
    todo = [stage for stage in plan.stages if not stage.is_external and find_done(stage, store) is None]
    found = needs(plan, todo, models, cluster)
    host_bytes, when = _host(todo, models, cluster)
    is_host_short = cluster.host_gb is not None and host_bytes > cluster.host_gb * 1e9
    fits = all(need.fits for need in found) and not is_host_short
    recipes, mistakes = _recipes(plan, models.model)
    lines = [
        f"hardware: {cluster}; nothing of it is verified on such a machine. Sources and assumptions: harness/hardware.py",
        _model_line(models.model),
        *(f"note: {note}" for note in (*models.notes, *models.model.notes)),
        *_unseen(plan),
        *recipes,
        *mistakes,
        *_memory(found, cluster),
        *_host_line(host_bytes, when, cluster),
        *_hours(plan, todo, models, cluster, store),
        *_disk(plan, todo, models, store),
        *_launch(path, todo, cluster),
        *_verdict(found, host_bytes, cluster, is_host_short=is_host_short),
    ]
    return Outlook(tuple(lines), fits, tuple(mistakes))


def _models(plan: Plan, store: Store, config: Path | None) -> Models:
    """The architectures of all models of a plan that stages compute with; a checkpoint made elsewhere is one of the model."""
    named = [stage.inputs["teacher"] for stage in plan.stages if "teacher" in stage.inputs]
    named += [stage.inputs["judge"] for stage in plan.stages if stage.kind == "judge"]
    others = {stage.key: stage for stage in named if stage.key != plan.stages[0].key}
    own = config_of(plan.stages[0], store) if config is None else read_configuration(config)
    found = {key: config_of(stage, store) for key, stage in others.items()}
    architectures = {key: architecture_of(each.fields, each.where) for key, each in found.items()}
    notes = [each.note for each in (own, *found.values()) if each.note is not None]
    return Models(architecture_of(own.fields, own.where), architectures, tuple(dict.fromkeys(notes)))


def _model_line(model: Architecture) -> str:
    active = f", {model.active / 1e9:.2f} of them for a token" if model.has_experts else ""
    return f"model: {model.model_type}, {model.size / 1e9:.2f} billion parameters{active}, {model.stored_bytes / GIB:.1f} GiB in {'FP8' if model.is_fp8 else 'BF16'}"


def _unseen(plan: Plan) -> list[str]:
    """A line for each checkpoint that was made elsewhere and whose files are not here."""
    named = {v.name: plan.checkpoint_of[v.name].source for v in plan.variants if v.method == "checkpoint"}
    return [
        f"note: {name}: counted as large as the model, at most: its files are not here"
        for name, source in named.items()
        if source is not None and source.folder is None
    ]


def _recipes(plan: Plan, model: Architecture) -> tuple[list[str], list[str]]:
    """The share that each section quantizes, and what of it would end the run."""
    lines = []
    for quantization in {v.quantization.model_dump_json(): v.quantization for v in plan.variants if v.quantization}.values():
        names = quantized_by(model, quantization)
        share = sum(weight.size for weight in model.weights if weight.name in names) / model.size
        layers = quantization.exclude_layers
        excluded = [*quantization.exclude, *(f"{key} = {json.dumps(value)}" for key, value in layers or () if value)]
        lines.append(f"quantized: {share:.1%} of the parameters, in {len(names):,} weights; excluded: {', '.join(excluded)}")
    return list(dict.fromkeys(lines)), planned_mistakes(plan, model)


def _memory(found: list[Need], cluster: Cluster) -> list[str]:
    lines = [f"memory of a GPU, at the worst moment of each stage; {cluster.gpu.usable_bytes / GIB:.1f} GiB are usable:"]
    width = max((len(need.label) for need in found), default=0)
    for need in found:
        has_room = need.moment.total <= need.available
        verdict = "fits" if need.fits else "NOT POSSIBLE" if has_room else "DOES NOT FIT"
        largest = need.moment.largest
        shown = largest if len(largest) <= _SHOWN + 1 else [*largest[:_SHOWN], ("rest", sum(n for _, n in largest[_SHOWN:]))]
        items = ", ".join(f"{what} {n / GIB:.1f}" for what, n in shown)
        lines.append(
            f"  {need.label:{width}}  {need.moment.total / GIB:7.1f} of {need.available / GIB:5.1f} GiB  {verdict:12}  "
            f"{need.gpus} GPU{'s' * (need.gpus > 1)}, {need.moment.name}: {items}"
        )
        lines += [f"  {'':{width}}  {problem}" for problem in need.problems]
        lines += [f"  {'':{width}}  {'change' if not need.fits else 'note'}: {advice}" for advice in need.advice]
    return lines


def _host(todo: list[Stage], models: Models, cluster: Cluster) -> tuple[float, str]:
    """Bytes of host memory on a node of what needs most of it, and what that is: a training before it shards, or a model while it is quantized."""
    wanted = [(0.0, "")]
    for stage in todo:
        if stage.kind == "train":
            processes = f"{cluster.count} process{'es' * (cluster.count > 1)}"
            each = memory_model.of_training_host(training_of(stage, models, cluster.ranks), cluster.count)
            wanted.append((each, f"on each node, before a training is on its GPUs ({processes})"))
        elif stage.kind == "quantize":
            names = quantized_by(models.model, stage.quantization)
            each = memory_model.of_quantization_host(models.model, names, fp8_by(models.model, stage.quantization))
            wanted.append((each, "on one node, while the model is quantized (one process)"))
    return max(wanted)


def _host_line(wanted: float, when: str, cluster: Cluster) -> list[str]:
    if not wanted:
        return []
    said = f"host memory: {wanted / 1e9:,.0f} GB {when}"
    if cluster.host_gb is None:
        return [said]
    verdict = "fits" if wanted <= cluster.host_gb * 1e9 else "DOES NOT FIT"
    return [f"{said}, of {cluster.host_gb:,.0f} GB: {verdict}"]


def _verdict(found: list[Need], host_bytes: float, cluster: Cluster, *, is_host_short: bool) -> list[str]:
    """The last line: whether all of it fits, and what was not compared."""
    short = [need.label for need in found if need.moment.total > need.available] + ["host memory"] * is_host_short
    barred = [need.label for need in found if need.problems and need.label not in short]
    if short or barred:
        said = [("does NOT fit", short), ("NOT possible", barred)]
        return [f"{what}: {'; '.join(labels)}" for what, labels in said if labels]
    if not host_bytes:
        return ["the GPUs fit"]
    if cluster.host_gb is not None:
        return ["the GPUs fit, and so does host memory"]
    return [f"the GPUs fit; NOT compared: the {host_bytes / 1e9:,.0f} GB of host memory that a node needs (--host-memory)"]


def _launch(path: Path, todo: list[Stage], cluster: Cluster) -> list[str]:
    """The command, where trainings take more than one GPU: a plain run does them on one."""
    if cluster.ranks == 1 or not any(stage.kind == "train" for stage in todo):
        return []
    where = "" if cluster.nodes == 1 else "on each node: "
    command = torchrun_command(path, count=cluster.count, nodes=cluster.nodes)
    return [f"trainings over {cluster.ranks} GPUs take torchrun, else they run on one: {where}{command} ({MORE})"]


def _hours(plan: Plan, todo: list[Stage], models: Models, cluster: Cluster, store: Store) -> list[str]:
    """GPU-hours of all that takes long, and the tokens to generate."""
    costs: dict[str, Cost] = {}
    n_generated, unknown = 0, []
    for stage in todo:
        cost, generated = _cost(plan, stage, models, cluster, store)
        if cost is not None:
            known = costs.get(cost.label)
            costs[cost.label] = cost if known is None else Cost(cost.label, known.gpu_hours + cost.gpu_hours, cost.gpus)
        if generated is None:
            unknown.append(stage.label)
        else:
            n_generated += generated
    lines = [f"tokens to generate: {n_generated:,} at most" if n_generated else "tokens to generate: none that is known"]
    if unknown:
        named = ", ".join(unknown[:3]) + (f" and {len(unknown) - 3} more" if len(unknown) > 3 else "")
        lines.append(f"  not counted, since their requests or lengths are not known before harness prepare: {named}")
    share = TRAINING_SHARE_EXPERTS if models.model.has_experts else TRAINING_SHARE
    assumed = f" (trainings at {share:.0%} of the BF16 peak, assumed)" if any(s.kind == "train" for s in todo) else ""
    lines += _times(list(costs.values()), cluster, assumed)
    for cost in (cost for cost in sorted(costs.values(), key=lambda cost: -cost.gpu_hours) if cost.gpu_hours >= _LEAST):
        took = f"{cost.hours:,.1f} hours on {cost.gpus} GPU{'s' * (cost.gpus > 1)}"
        validations = f"; {cost.validation / cost.gpu_hours:.0%} of it validations" if cost.validation else ""
        lines.append(f"  {cost.gpu_hours:10,.1f}  {cost.label} ({took}{validations})")
    if any(cost.gpu_hours < _LEAST for cost in costs.values()):
        lines.append(
            f"  less than {_LEAST} each: {'; '.join(cost.label for cost in costs.values() if cost.gpu_hours < _LEAST)}"
        )
    return lines


def _times(costs: list[Cost], cluster: Cluster, assumed: str) -> list[str]:
    """How long it takes, and what of the machine is paid for: a stage after the other, each on its own number of GPUs."""
    wall, at_work = sum(cost.hours for cost in costs), sum(cost.gpu_hours for cost in costs)
    if cluster.ranks == 1 or not wall:
        return [f"GPU-hours: {at_work:,.1f}{assumed}, one stage after the other, of which"]
    paid = cluster.ranks * wall
    return [
        f"time: {wall:,.1f} hours, one stage after the other: {paid:,.1f} GPU-hours of {cluster.ranks} GPUs, of which {1 - at_work / paid:.0%} idle",
        f"GPU-hours at work: {at_work:,.1f}{assumed}, of which",
    ]


def _cost(plan: Plan, stage: Stage, models: Models, cluster: Cluster, store: Store) -> tuple[Cost | None, int | None]:
    """Cost of a stage, and the tokens that it generates at most; None where nothing says how many requests there are."""
    model, gpu = models.model, cluster.gpu
    if stage.kind == "train":
        assert stage.variant is not None and stage.variant.training is not None
        training = training_of(stage, models, cluster.ranks)
        settings = stage.variant.training
        validation = validation_hours(training, settings, gpu)
        hours = training_hours(training, settings.tokens, gpu) + validation
        return Cost(stage.label, hours, cluster.ranks, validation), 0
    if stage.kind in ("calibrate", "diagnostics"):
        data = stage.inputs.get("data")
        tokens = stage.sections["samples"] * (
            data.sections.get("data", {}).get("seq_len") or 2048 if data is not None else 2048
        )
        hours = reading_hours(model, tokens * (1 + (stage.kind == "diagnostics")), gpu)
        return Cost(f"{stage.kind}, at most", hours, 1), 0
    if stage.kind == "data" and stage.text is not None and isinstance(stage.text.section, Teacher | Bos):
        section = stage.text.section
        tokens = section.tokens
        if tokens is None and isinstance(section, Teacher) and section.n_prompts is not None:
            tokens = section.n_prompts * section.samples_per_prompt * section.max_tokens
        if tokens is None:
            return None, None
        made = Generation(
            model=model,
            requests=max(1, tokens // section.max_tokens),
            prompt=PROMPT_TOKENS,
            new=section.max_tokens,
            rows=VLLM_SEQUENCES if section.engine == "vllm" else HF_BATCH,
            gpus=int(section.engine_args.get("tensor_parallel_size", 1)),
            weight_bytes=BF16 * model.size,
            is_hf=section.engine == "hf",
            copies=int(section.engine_args.get("data_parallel_size", 1)),
        )
        return Cost(stage.label, generation_hours(made, gpu), made.gpus * made.copies), tokens
    if stage.kind in ("evaluate", "judge"):
        return _answers(plan, stage, models, cluster, store)
    if stage.kind == "select":
        return _selection(plan, stage, models, cluster, store)
    return None, 0


def _answers(plan: Plan, stage: Stage, models: Models, cluster: Cluster, store: Store) -> tuple[Cost | None, int | None]:
    """As `_cost`, of an "evaluate" or a "judge" stage; a server that is there already costs nothing here."""
    task, variant = stage.task, stage.variant
    assert task is not None and variant is not None
    judge = plan.suite.judge if stage.kind == "judge" else None
    requests, new = n_requests(stage.inputs["task"], store), new_tokens(task) if judge is None else judge.max_tokens
    if requests is None or new is None:
        return None, None
    engine, endpoint = (plan.suite.engine, variant.endpoint) if judge is None else (judge.engine, judge.endpoint)
    model = models.model if judge is None else models.of(stage.inputs["judge"])
    is_hf = engine.kind == "hf"
    rows = int(engine.args.get("batch_size", HF_BATCH) if is_hf else engine.args.get("max_num_seqs", VLLM_SEQUENCES))
    room = [need.room for need in needs(plan, [stage], models, cluster) if need.room is not None]
    asked = Generation(
        model=model,
        requests=requests * task.repeats,
        prompt=prompt_tokens(task) if judge is None else PROMPT_TOKENS,
        new=new,
        rows=max(1, min([rows, *room])),
        gpus=1 if is_hf else int(engine.args.get("tensor_parallel_size", 1)),
        weight_bytes=BF16 * model.size if is_hf or judge is not None else served_bytes(stage, model, engine.kernels),
        is_hf=is_hf,
        copies=1 if is_hf else int(engine.args.get("data_parallel_size", 1)),
    )
    if endpoint is not None:
        return None, asked.requests * new
    label = "judge" if judge is not None else f"answers of {variant.name}"
    return Cost(label, generation_hours(asked, cluster.gpu), asked.gpus * asked.copies), asked.requests * new


def _selection(plan: Plan, stage: Stage, models: Models, cluster: Cluster, store: Store) -> tuple[Cost | None, int | None]:
    """As `_cost`, of a "select" stage: each candidate answers each of its tasks."""
    assert stage.variant is not None and stage.variant.training is not None
    n_candidates = stage.variant.training.candidates
    found = [_answers(plan, asked, models, cluster, store) for asked in asked_of(stage)]
    known = [(cost, n) for cost, n in found if cost is not None and n is not None]
    if len(known) < len(found):
        return None, None
    hours = sum(cost.gpu_hours for cost, _ in known)
    return Cost(f"{stage.label}, at most", n_candidates * hours, known[0][0].gpus), n_candidates * sum(n for _, n in known)


def _disk(plan: Plan, todo: list[Stage], models: Models, store: Store) -> list[str]:
    """Bytes that the stages write, and the download."""
    model = models.model
    sizes: dict[str, float] = {}
    sources = {stage.key: stage for stage in plan.stages if stage.kind == "model" and stage.source is not None}
    wanted = [models.of(stage) for stage in sources.values() if stage.source is not None and stage.source.wanted is not None]
    sizes["models from the hub"] = sum(each.stored_bytes for each in wanted)
    for stage in todo:
        if (
            stage.kind in ("quantize", "train", "select")
            and stage.variant is not None
            and stage.variant.quantization is not None
        ):
            names = quantized_by(model, stage.variant.quantization)
            size = checkpoint_bytes(model, names, fp8_by(model, stage.variant.quantization))
            sizes["quantized checkpoints"] = sizes.get("quantized checkpoints", 0) + size
            if stage.kind == "train" and stage.variant.training is not None:
                training = training_of(stage, models, 1)
                sizes["to go on from, of one training"] = max(
                    sizes.get("to go on from, of one training", 0), resume_bytes(training)
                )
                keep = {"last": 0, "best_val": 1, "best_of_k": stage.variant.training.candidates}[stage.variant.training.select]
                whole = training.train == "all"
                each = size if whole else training.code_bytes
                sizes["candidates"] = sizes.get("candidates", 0) + (2 * keep + 1) * each * (keep > 0)
        if stage.kind == "model" and stage.source is not None and stage.source.gguf is not None:
            sizes["converted model"] = BF16 * model.size
        if stage.kind == "evaluate" and stage.task is not None:
            requests, new = n_requests(stage.inputs["task"], store) or 0, new_tokens(stage.task) or 0
            sizes["journals"] = sizes.get("journals", 0) + ANSWER_BYTES * requests * stage.task.repeats * new
    tokens = max((v.training.tokens for v in plan.variants if v.training is not None), default=0)
    sizes["training tokens"] = TOKEN_BYTES * tokens
    largest = sorted(((what, n) for what, n in sizes.items() if n >= 5e5), key=lambda item: -item[1])
    return [
        f"disk: {sum(sizes.values()) / 1e9:,.1f} GB at most: "
        + (", ".join(f"{what} {n / 1e9:,.1f}" for what, n in largest) or "next to nothing")
    ]
