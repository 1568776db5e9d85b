"""The schema of a suite: its sections, keys and values, and what belongs to the format but is not built yet."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from harness.schema_data import Data
from harness.schema_evaluation import SamplingSettings, Task, Thinking
from harness.schema_gate import Gate, Reference
from harness.schema_server import Endpoint, Launch
from harness.section import Name, Positive, PositiveFloat, Section, Seed

_Beta = Annotated[float, Field(ge=0, lt=1)]


class Model(Section):
    """`path`: a hub id (then `revision` is a commit), a folder, or `package:<python package>/<file.gguf>`.

    kind: what it reads; "image-text" is what transformers loads as AutoModelForImageTextToText.
    trust_remote_code: run the Python files that lie beside the weights; they are part of what identifies the model.
    post_training: what was done to it after pretraining; where a source recommends something for it, that is the default.
    thinking: of a reasoning model; without it a response is an answer as a whole. system_prompt: before every question in chat.
    """

    path: Annotated[str, Field(min_length=1)]
    revision: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")] | None = None
    kind: Literal["text", "image-text"] = "text"
    trust_remote_code: bool = False
    post_training: Literal["sft", "rl", "merged", "unknown"] = "unknown"
    thinking: Thinking | None = None
    system_prompt: Annotated[str, Field(min_length=1)] | None = None


class Teacher(Section):
    """Another teacher than the model itself, by `path` as in [model]; its vocabulary must be the model's."""

    path: Annotated[str, Field(min_length=1)]
    revision: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")] | None = None


class Calibration(Section):
    """`samples` sequences of `data` set the input scales; `headroom` multiplies the amax they show. On held-out text at most a
    share `max_saturated` of the blocks may saturate, and none by more than a factor of `max_overshoot`.

    `skip_first_token` is for experiments: what becomes of a calibration that never saw the first position of a text.
    """

    data: str
    samples: Positive = 32
    headroom: Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)] = 4.0
    max_saturated: Annotated[float, Field(ge=0, le=1)] = 0.001
    max_overshoot: PositiveFloat = 2.0
    skip_first_token: bool = False


class ExcludeLayers(Section):
    """Decoder layers that stay BF16 by position: the `first` and the `last` so many, and the layer right before each attention layer."""

    first: Annotated[int, Field(ge=0)] = 0
    last: Annotated[int, Field(ge=0)] = 0
    before_attention: bool = False

    @model_validator(mode="after")
    def _names_a_layer(self) -> ExcludeLayers:
        if not (self.first or self.last or self.before_attention):
            raise ValueError("it names no layer; give first, last or before_attention, or remove it")
        return self


class Quantization(Section):
    """How every quantized variant is quantized. `exclude` names what stays BF16 by patterns, `exclude_layers` by position.

    `scale_multiplier`, on the tensor scales of weights, is for the noise floor of scale rules: several variants that differ in
    nothing else. `block_scales` is about training; left out, it is "recomputed" with the rule amax and "frozen" with others; "learned" trains them.
    """

    format: Literal["nvfp4"] = "nvfp4"
    activations: bool = True
    exclude: tuple[str, ...] = ("lm_head",)
    exclude_layers: ExcludeLayers | None = None
    scale_rule: Literal["amax", "mse", "four_over_six", "gptq"] = "amax"
    scale_weighting: Literal["none", "second_moment"] = "none"
    scale_multiplier: Annotated[float, Field(ge=1, le=1024, allow_inf_nan=False)] = 1.0
    block_scales: Literal["recomputed", "frozen", "learned"]
    tensor_scale: Literal["power_of_two", "amax"] = "power_of_two"
    layout: Literal["modelopt", "compressed-tensors"] = "modelopt"
    fp8: tuple[str, ...] = ()
    kv_cache: Literal["bf16", "fp8"] = "bf16"
    calibration: Calibration

    @model_validator(mode="before")
    @classmethod
    def _default_block_scales(cls, given: Any) -> Any:
        if not isinstance(given, dict) or "block_scales" in given:
            return given
        return given | {"block_scales": "recomputed" if given.get("scale_rule", "amax") == "amax" else "frozen"}


class LrGroup(Section):
    """Trained parameters whose name matches the pattern `match` have a rate of their own; the first match counts."""

    match: Annotated[str, Field(min_length=1)]
    lr: PositiveFloat


class Training(Section):
    """The one budget that QAT and QAD share. `tokens` counts real tokens, padding excluded.

    batch_size, micro_batch_size: sequences (rows, with packing) of an optimizer step, and of one forward pass in it.
    lr: required, unless `model.post_training` has a recommended one.
    loss_on: "all" tokens, or those of the "assistant".
    optimizer: "adafactor" keeps next to no state; its lr is relative to the RMS of each parameter.
    train: the "quantized" weights, "all" parameters, or the block "scales" alone.
    packing: several sequences share a row of the data's seq_len.
    select: the "last" checkpoint, the one with the "best_val" loss, or of the `candidates` with the lowest ones the best on
        `select_tasks` ("best_of_k"), whose scores then are no evidence any more.
    validate_every, validation_samples: steps between validations, and sequences of the validation split.
    max_saturated: the share of weight blocks that may outgrow their tensor scale, which stays as calibrated.
    checkpoint_every: steps between checkpoints to resume from; changes no result.
    """

    tokens: Positive
    batch_size: Positive
    micro_batch_size: Positive | None = None
    lr: PositiveFloat | None = None
    loss_on: Literal["assistant", "all"]
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup_steps: Annotated[int, Field(ge=0)] = 5
    optimizer: Literal["adamw", "adafactor"] = "adamw"
    betas: tuple[_Beta, _Beta] = (0.9, 0.95)
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    lr_groups: tuple[LrGroup, ...] = ()
    clip_norm: PositiveFloat = 1.0
    train: Literal["quantized", "all", "scales"] = "quantized"
    packing: bool = False
    activation_checkpointing: bool = False
    compile: bool = False
    select: Literal["last", "best_val", "best_of_k"] = "last"
    candidates: Annotated[int, Field(ge=2)] = 10
    select_tasks: tuple[str, ...] = ()
    validate_every: Positive | None = None
    validation_samples: Positive = 8
    max_saturated: Annotated[float, Field(ge=0, le=1)] = 0.001
    checkpoint_every: Positive = 50
    epochs: Positive = 1
    seed: Seed = 0


class Variant(Section):
    """One row of the tables. `quantization` and `training` override single keys of the suite's own sections.

    path: of "checkpoint", one that was made elsewhere: a folder, or a hub id with its `revision`, a commit.
    seeds: trains one for each. teacher, loss, temperature, ce_weight: of "qad", whose loss is "kl" where nothing is said;
        "kl_ce" is (1 - ce_weight) KL + ce_weight CE.
    endpoint: the server that serves its checkpoint already, where engine.kind = "server" starts none.
    sampling_seed: for the noise floor, beside a variant that is the same without it: its sampled answers are drawn with seeds derived
        from this one, and the others computed in batches planned by it.
    """

    name: Name
    method: Literal["bf16", "ptq", "qat", "qad", "checkpoint"]
    data: str | None = None
    path: str | None = None
    revision: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")] | None = None
    quantization: dict[str, Any] = {}
    training: dict[str, Any] = {}
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] | None = None
    teacher: Teacher | None = None
    loss: Literal["kl", "mse", "kl_ce"] | None = None
    temperature: PositiveFloat | None = None
    ce_weight: Annotated[float, Field(gt=0, lt=1)] | None = None
    endpoint: Endpoint | None = None
    sampling_seed: Seed | None = None


class Engine(Section):
    """What answers the requests. `args` are passed on, keyed and recorded.

    kernels: what computes quantized linear layers; for vLLM, which would otherwise choose by what is installed.
    launch: how kind "server" starts a server for each checkpoint; left out, with vLLM's own, unless the variants have endpoints.
    """

    kind: Literal["hf", "vllm", "server"]
    kernels: Literal["native", "w4a4_emulation", "w4a16"] | None = None
    args: dict[str, Any] = {}
    launch: Launch | None = None


class Judge(Section):
    """The model that judges the answers of a task that needs it, by `path` as in [model], on an engine of its own.

    endpoint: the server that serves it already, with engine.kind = "server". max_tokens: of a verdict. thinking: how the judge marks its thinking; left out, a reply is a verdict as a whole.
    """

    path: Annotated[str, Field(min_length=1)]
    revision: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")] | None = None
    engine: Engine
    endpoint: Endpoint | None = None
    max_tokens: Positive = 64
    thinking: Thinking | None = None


class Diagnostics(Section):
    """KL and CE against BF16, on `samples` held-out sequences of `data`, or on so many of the BF16 model's own answers to each task."""

    on: Literal["text", "answers"] = "text"
    data: str | None = None
    samples: Annotated[int, Field(ge=2)] = 128


class File(Section):
    """A whole suite file."""

    schema_version: Annotated[Literal[1], Field(alias="schema")]
    name: Name
    model: Model
    quantization: Quantization | None = None
    data: dict[str, Data] = {}
    training: Training | None = None
    variant: Annotated[tuple[Variant, ...], Field(min_length=1)]
    sampling: SamplingSettings | None = None
    task: tuple[Task, ...] = ()
    engine: Engine
    judge: Judge | None = None
    diagnostics: Diagnostics | None = None
    gate: Gate | None = None
    reference: Reference | None = None
