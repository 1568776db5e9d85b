"""The memory that each stage of a plan needs on a cluster, and what would make a training fit. No torch.

Only training spreads over GPUs; every other stage is done by the first process on its one GPU, and vLLM takes as many as its
arguments say.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from harness import activations, memory_model
from harness.architecture import Architecture, Attention, Experts, Mlp
from harness.hardware import BF16, GPUS, MAX_NODES, VLLM_MEMORY_SHARE, Cluster
from harness.memory_model import FORWARD_TOKENS, Answering, Moment, with_slack, worst
from harness.plan import Plan, Stage
from harness.planned_recipe import fp8_by, quantized_by
from harness.task_costs import LONG_PROMPTS, PROMPT_TOKENS, new_tokens, prompt_tokens
from harness.time_and_disk import checkpoint_bytes

VLLM_CONTEXT, VLLM_SEQUENCES, VLLM_STEP_TOKENS = 8192, 64, 8192
"""max_model_len, max_num_seqs and max_num_batched_tokens where a suite does not say (`harness.engines.vllm`; a test holds both)."""
HF_BATCH = 32
"""batch_size of the engine in process (`harness.engines.hf`; a test holds both)."""
TEACHER_MEMORY = 1 << 30
"""Hidden states of the teacher that diagnostics keep, at most (`harness.diagnostics`; a test holds both)."""


@dataclass(frozen=True)
class Need:
    """What a stage needs on each of `gpus` GPUs, of which it may have `available` bytes.

    problems: why it cannot run here at all. room: sequences of the longest length that vLLM can have at once; None of other stages.
    """

    label: str
    gpus: int
    moment: Moment
    available: float
    problems: tuple[str, ...] = ()
    advice: tuple[str, ...] = ()
    room: int | None = None

    @property
    def fits(self) -> bool:
        return not self.problems and self.moment.total <= self.available


@dataclass(frozen=True)
class Models:
    """The architectures of a plan: of the model, and of other teachers and judges by the key of their stage. notes: on where they are from."""

    model: Architecture
    others: dict[str, Architecture]
    notes: tuple[str, ...] = ()

    def of(self, stage: Stage | None) -> Architecture:
        return self.model if stage is None else self.others.get(stage.key, self.model)


def needs(plan: Plan, todo: list[Stage], models: Models, cluster: Cluster) -> list[Need]:
    """What the stages of `todo` need, one entry for stages that are alike, in the order of the plan."""
    found: dict[str, Need] = {}
    for stage in todo:
        for need in _of_stage(plan, stage, models, cluster):
            known = found.get(need.label, need)
            worse = need if need.moment.total > known.moment.total else known
            found[need.label] = dataclasses.replace(worse, problems=tuple(dict.fromkeys((*known.problems, *need.problems))))
    return list(found.values())


def _of_stage(plan: Plan, stage: Stage, models: Models, cluster: Cluster) -> list[Need]:
    model = models.model
    if stage.kind == "calibrate":
        return [_on_one("calibrate", cluster, memory_model.of_calibration(model, tokens=_tokens(stage)))]
    if stage.kind == "quantize":
        return [_on_one("quantize", cluster, memory_model.of_export(model, tokens=_tokens(stage)))]
    if stage.kind == "train":
        exported = memory_model.of_export(model, tokens=_tokens(stage))
        return [_of_training(stage, models, cluster), _on_one(f"{stage.label}, export", cluster, exported)]
    if stage.kind == "diagnostics":
        states = min(TEACHER_MEMORY, BF16 * model.width * stage.sections["samples"] * _tokens(stage))
        is_candidate = stage.variant is not None and stage.variant.method != "bf16"
        moment = memory_model.of_diagnostics(model, tokens=_tokens(stage), is_candidate=is_candidate, states_bytes=states)
        return [_on_one("diagnostics", cluster, moment)]
    if stage.kind in ("evaluate", "judge"):
        return _of_answers(plan, stage, models, cluster)
    if stage.kind == "select":
        again = _on_one(f"{stage.label}, export", cluster, memory_model.of_export(model, tokens=_tokens(stage)))
        return [again, *(need for asked in asked_of(stage) for need in _of_answers(plan, asked, models, cluster))]
    return []


def asked_of(stage: Stage) -> list[Stage]:
    """What a "select" stage asks a candidate, as the "evaluate" stages that it is like: one for each of its tasks."""
    return [
        dataclasses.replace(
            stage,
            kind="evaluate",
            sections={},
            inputs={"checkpoint": stage.inputs["trained"], "task": prepared},
            task=prepared.task,
        )
        for role, prepared in stage.inputs.items()
        if role.startswith("task ")
    ]


def _on_one(label: str, cluster: Cluster, moment: Moment) -> Need:
    """A stage that one GPU does."""
    need = Need(label, 1, with_slack(moment), cluster.gpu.usable_bytes)
    if need.fits:
        return need
    larger = [name for name, gpu in GPUS.items() if gpu.usable_bytes >= need.moment.total]
    advice = (
        f"one GPU does it, however many there are: {' or '.join(larger)} has room"
        if larger
        else "one GPU does it, and none that is known has room"
    )
    return dataclasses.replace(need, advice=(advice,))


def _tokens(stage: Stage) -> int:
    """Tokens of a forward pass without gradient: batches of FORWARD_TOKENS, or one sequence that is longer."""
    data = stage.inputs.get("data")
    longest = _seq_len(data) if data is not None else 0
    return max(FORWARD_TOKENS, longest)


def _seq_len(data: Stage) -> int:
    """Tokens of the longest sequence of a data stage."""
    own = data.sections.get("data", {}).get("seq_len")
    parts = [_seq_len(part) for role, part in data.inputs.items() if role != "model"]
    return int(own) if own else max(parts, default=FORWARD_TOKENS)


def _of_training(stage: Stage, models: Models, cluster: Cluster) -> Need:
    training = training_of(stage, models, cluster.ranks)
    assert stage.variant is not None and stage.variant.training is not None
    settings = stage.variant.training
    problems: tuple[str, ...] = ()
    n_batches = -(-settings.batch_size // (settings.micro_batch_size or settings.batch_size))
    if settings.optimizer == "adafactor" and cluster.ranks > 1:
        problems = ('optimizer = "adafactor" does not work over several ranks; use "adamw"',)
    elif settings.batch_size < cluster.ranks:
        problems = (f"a step has {settings.batch_size} sequences for {cluster.ranks} ranks, and each rank needs one",)
    elif n_batches < cluster.ranks:
        micro = settings.batch_size // cluster.ranks
        problems = (
            f"a step has {n_batches} batches for {cluster.ranks} ranks: set training.micro_batch_size = {micro} or less",
        )
    need = Need(stage.label, cluster.ranks, _moment(training), cluster.gpu.usable_bytes, problems)
    if need.moment.total <= need.available and settings.batch_size >= cluster.ranks:
        return need  # the problem, if there is one, says what to change
    return dataclasses.replace(need, advice=_what_helps(training, settings.batch_size, cluster))


def training_of(stage: Stage, models: Models, ranks: int) -> memory_model.Training:
    """A "train" stage as memory sees it, over so many ranks."""
    assert stage.variant is not None and stage.variant.training is not None and stage.variant.quantization is not None
    settings, quantization = stage.variant.training, stage.variant.quantization
    objective = stage.variant.objective or {}
    loss = str(objective.get("loss", "kl"))
    needs_teacher = loss != "ce" or settings.validate_every is not None
    micro = settings.micro_batch_size or settings.batch_size
    n_batches = -(-settings.batch_size // micro)
    return memory_model.Training(
        student=models.model,
        teacher=models.of(stage.inputs.get("teacher")) if needs_teacher else None,
        quantized=quantized_by(models.model, quantization),
        fp8=fp8_by(models.model, quantization),
        rows=micro,
        tokens=_seq_len(stage.inputs["data"]),
        n_batches=-(-n_batches // ranks),
        ranks=ranks,
        train=settings.train,
        learned_scales=quantization.block_scales == "learned",
        optimizer=settings.optimizer,
        loss=loss,
        activation_checkpointing=settings.activation_checkpointing,
        is_packed=settings.packing,
    )


def _moment(training: memory_model.Training) -> Moment:
    return with_slack(worst(training.moments()), ranks=training.ranks)


def _what_helps(training: memory_model.Training, batch_size: int, cluster: Cluster) -> tuple[str, ...]:
    """What to change so that a training fits: keys of the suite, the least first, then nodes, then GPUs; each was planned again."""
    rows = sorted(
        {n for n in (training.rows // 2, training.rows // 4, 1) if 0 < n <= batch_size // cluster.ranks}, reverse=True
    )
    for checkpointing in (training.activation_checkpointing, True):
        for n in (training.rows, *rows):
            found = _changed(training, batch_size, rows=n, checkpointing=checkpointing, ranks=cluster.ranks)
            if found is not None and _moment(found).total <= cluster.gpu.usable_bytes:
                return (_said(training, found),)
    more = (_fewer_ranks if batch_size < cluster.ranks else _with_nodes)(training, batch_size, cluster)
    if more is not None:
        return (more,)
    others = [gpu for gpu in GPUS.values() if gpu.usable_bytes > cluster.gpu.usable_bytes]
    tried = {gpu.name: _with_nodes(training, batch_size, dataclasses.replace(cluster, gpu=gpu, nodes=0)) for gpu in others}
    elsewhere = [f"on {name}: {said}" for name, said in tried.items() if said is not None]
    why = f"no number of nodes helps on {cluster.gpu.name}, up to a rank for each of the {batch_size} sequences of a step"
    return (f"{why}; lower the seq_len of its data{', or take larger GPUs' if elsewhere else ''}", *elsewhere)


def _fewer_ranks(training: memory_model.Training, batch_size: int, cluster: Cluster) -> str | None:
    """The most nodes, or GPUs of one node, that have a sequence of a step for each rank; None where the training does not fit on them."""
    nodes = batch_size // cluster.count
    ranks = nodes * cluster.count or batch_size
    where = f"{nodes} node{'s' * (nodes > 1)} of {cluster.count} GPUs" if nodes else f"{batch_size} of the GPUs of one node"
    for checkpointing in (training.activation_checkpointing, True):
        rows = min(training.rows, batch_size // ranks)
        found = _changed(training, batch_size, rows=rows, checkpointing=checkpointing, ranks=ranks)
        if found is not None and _moment(found).total <= cluster.gpu.usable_bytes:
            return f"use at most {where}, with {_said(training, found)}; or raise training.batch_size"
    return None


def _with_nodes(training: memory_model.Training, batch_size: int, cluster: Cluster) -> str | None:
    """The fewest nodes beyond those of `cluster` on which the training fits with all that lowers its memory; None where none do."""
    for nodes in range(cluster.nodes + 1, min(MAX_NODES, batch_size // cluster.count) + 1):
        found = _changed(training, batch_size, rows=1, checkpointing=True, ranks=nodes * cluster.count)
        if found is not None and _moment(found).total <= cluster.gpu.usable_bytes:
            return f"needs {nodes} node{'s' * (nodes > 1)} of {cluster.count} GPUs, with {_said(training, found)}"
    return None


def _changed(
    training: memory_model.Training, batch_size: int, *, rows: int, checkpointing: bool, ranks: int
) -> memory_model.Training | None:
    """The same training otherwise spread; None where a step has too few batches for the ranks."""
    n_batches = -(-batch_size // rows)
    if n_batches < ranks:
        return None
    changes: dict[str, Any] = {"rows": rows, "n_batches": -(-n_batches // ranks), "ranks": ranks}
    return dataclasses.replace(training, activation_checkpointing=checkpointing, **changes)


def _said(before: memory_model.Training, after: memory_model.Training) -> str:
    """The keys of [training] that differ."""
    keys = [f"training.micro_batch_size = {after.rows}"] if after.rows != before.rows else []
    if after.activation_checkpointing and not before.activation_checkpointing:
        keys.append("training.activation_checkpointing = true")
    return f"{' and '.join(keys) or 'the suite as it is'}: {_moment(after).total / 2**30:.1f} GiB"


def served_bytes(stage: Stage, model: Architecture, kernels: str | None) -> float:
    """Bytes of the weights as vLLM holds them for an "evaluate" stage.

    The kernels of ours that emulate W4A4 hold them decoded, in BF16; so is the worst case of experts, whichever of vLLM's own
    emulates those. Of a checkpoint that was made elsewhere, the size of its files; where these are not here, as large as the model's.
    """
    variant, source = stage.variant, stage.inputs["checkpoint"].source
    if variant is None or variant.method == "bf16":
        return model.stored_bytes
    if kernels == "w4a4_emulation":
        return BF16 * model.size
    if variant.method == "checkpoint" and source is not None and source.folder is not None:
        return float(sum(path.stat().st_size for path in source.folder.glob("*.safetensors")))
    if variant.method == "checkpoint":
        return model.stored_bytes
    names = quantized_by(model, variant.quantization)
    return checkpoint_bytes(model, names, fp8_by(model, variant.quantization))


def _of_answers(plan: Plan, stage: Stage, models: Models, cluster: Cluster) -> list[Need]:
    variant, is_judge = stage.variant, stage.kind == "judge"
    judge = plan.suite.judge if is_judge else None
    section = plan.suite.engine if judge is None else judge.engine
    model = models.of(stage.inputs["judge"]) if is_judge else models.model
    kinds = {"bf16": "answers, BF16", "checkpoint": "answers, checkpoint"}
    who = "judge" if is_judge or variant is None else kinds.get(variant.method, "answers, quantized")
    endpoint = judge.endpoint if judge is not None else variant.endpoint if variant is not None else None
    if endpoint is not None:
        return []  # a server that is there already
    if section.kind == "hf":
        rows = int(section.args.get("batch_size", HF_BATCH))
        new = new_tokens(stage.task) if stage.task is not None and not is_judge else 64
        prompt = PROMPT_TOKENS if stage.task is None or is_judge else prompt_tokens(stage.task)
        problems = _too_long(stage, model.context, "the model's context", new if judge is None else judge.max_tokens)
        answering = Answering(model=model, rows=rows, prompt=prompt, new=new or 0, is_sampled=True)
        moment = worst(answering.moments())
        if who != "answers, BF16":
            moment = Moment(moment.name, moment.items | {"BF16 model": float(BF16 * models.model.size)})
        return [dataclasses.replace(_on_one(who, cluster, moment), problems=tuple(problems))]
    weights = BF16 * model.size if is_judge else served_bytes(stage, model, section.kernels)
    recipe = None if variant is None or is_judge else variant.quantization
    key = "engine.args.max_model_len" if judge is None else "judge.engine.args.max_model_len"
    asked = judge.max_tokens if judge is not None else new_tokens(stage.task) if stage.task is not None else None
    problems = _too_long(stage, _context(section.args, model), key, asked)
    if section.kernels == "native" and not is_judge and who != "answers, BF16" and cluster.gpu.fp4 is None:
        problems.append(
            f'engine.kernels = "native": the {cluster.gpu.name} has no FP4 units; set engine.kernels and gate.kernels to "w4a4_emulation" '
            "(and plan again: its weights are as large as BF16), or take b200 or b300"
        )
    is_fp8 = section.args.get("kv_cache_dtype") == "fp8" or (recipe is not None and recipe.kv_cache == "fp8")
    need = _of_vllm(who, section.args, model, weights, cluster, is_fp8=is_fp8)
    if not problems:
        return [need]
    advice = need.advice if need.moment.total > need.available else ()
    return [dataclasses.replace(need, problems=(*need.problems, *problems), advice=advice)]


def _context(args: dict[str, Any], model: Architecture) -> int:
    """Tokens of a prompt and its answer that vLLM has room for."""
    return int(args.get("max_model_len", min(model.context or VLLM_CONTEXT, VLLM_CONTEXT)))


def _too_long(stage: Stage, context: int, key: str, new: int | None) -> list[str]:
    """What is wrong with answers of `new` tokens in a context of so many, 0 where nothing says how many; prompts are known of few tasks."""
    task = stage.task
    prompt = 1 if task is None or stage.kind == "judge" else LONG_PROMPTS.get(task.own_name, 1)
    if not context or not new or new + prompt <= context or task is None:
        return []
    what = f"a prompt of about {prompt:,} tokens" if prompt > 1 else "a prompt"
    return [f"{task.own_name}: answers of {new:,} tokens (max_tokens) leave no room for {what} in {key} = {context:,}"]


def _of_vllm(who: str, args: dict[str, Any], model: Architecture, weights: float, cluster: Cluster, *, is_fp8: bool) -> Need:
    """vLLM over `tensor_parallel_size` GPUs, of each of which it takes a share."""
    gpus = int(args.get("tensor_parallel_size", 1))
    copies = int(args.get("data_parallel_size", 1))
    share = float(args.get("gpu_memory_utilization", VLLM_MEMORY_SHARE))
    context = _context(args, model)
    sequences = int(args.get("max_num_seqs", VLLM_SEQUENCES))
    step = int(args.get("max_num_batched_tokens", max(VLLM_STEP_TOKENS, context)))
    a_token, a_sequence = activations.cache_bytes(model, is_fp8=is_fp8, gpus=gpus)
    one = context * a_token + a_sequence
    items = {
        "weights": weights / gpus,
        f"activations of {step:,} tokens": step * activations.in_forward(model, is_fused=True) / gpus,
        "KV cache of one sequence": one,
    }
    total = cluster.gpu.memory_mib * 2**20
    available = share * total - (total - cluster.gpu.usable_bytes)
    moment = with_slack(Moment("serving", items), ranks=gpus)
    room = int((available - moment.total + one) // one) if one else sequences
    advice: list[str] = []
    problems = []
    undivided = _undivided(model, gpus)
    if undivided:
        allowed = ", ".join(str(n) for n in range(1, cluster.count + 1) if not _undivided(model, n))
        problems.append(
            f"engine.args.tensor_parallel_size = {gpus}: does not divide {', '.join(undivided)}; allowed for this model: {allowed}"
        )
    elif gpus * copies > cluster.count:
        problems.append(
            f"tensor_parallel_size {gpus} × data_parallel_size {copies} is more than the {cluster.count} GPUs of a node"
        )
    elif moment.total > available:
        splits = (n for n in (2, 4, 8, 16) if gpus < n <= cluster.count and not _undivided(model, n))
        split = next((n for n in splits if moment.total * gpus / n <= available), None)
        advice.append(
            f"engine.args.tensor_parallel_size = {split}"
            if split
            else "no tensor_parallel_size of this node helps: larger GPUs"
        )
    elif room < sequences:
        advice.append(f"{room} of {sequences} sequences of {context:,} tokens have room at once; the others wait")
    return Need(who, gpus * copies, moment, available, tuple(problems), tuple(advice), max(0, room))


def _undivided(model: Architecture, gpus: int) -> list[str]:
    """What vLLM cannot split evenly over so many GPUs. A key head may be held by several of them."""
    found = []
    for part in (part for layer in model.layers for part in layer.parts):
        if isinstance(part, Attention):
            found += [f"{part.heads} heads"] if part.heads % gpus else []
            is_odd = not part.latent and max(part.kv_heads, gpus) % min(part.kv_heads, gpus)
            found += [f"{part.kv_heads} key heads"] if is_odd else []
        elif isinstance(part, Mlp):
            found += [f"an MLP of {part.inner:,}"] if part.inner % gpus else []
        elif isinstance(part, Experts):
            found += [f"experts of {part.inner:,}"] if part.inner % gpus else []
            found += [f"a shared expert of {part.shared:,}"] if part.shared % gpus else []
        else:
            found += [f"{part.heads} heads of Mamba"] if part.heads % gpus else []
    return list(dict.fromkeys(found))
