"""The schema of a suite: its sections, keys and values, and what belongs to the format but is not built yet."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

NOT_AVAILABLE_KEYS = {
    "gate": "release gates",
    "reference": "published figures beside ours",
    "model.post_training": "defaults by post-training history",
    "training.optimizer": "a choice of optimizers",
    "training.train": "training more, or less, than the quantized weights",
    "training.loss": "other losses than CE and KL",
    "training.select": "selection of a checkpoint",
    "training.packing": "sequence packing",
    "variant.teacher": "another teacher than the model itself",
    "variant.loss": "other losses than CE and KL",
    "task.repeats": "sampled repeats",
    "task.sampling": "sampled repeats",
    "task.temperature": "sampled repeats",
    "task.path": "task files of your own",
    "diagnostics.on": "diagnostics on answers",
}
NOT_AVAILABLE_VALUES = {
    "model.kind": {"image-text": "vision-language models"},
    "quantization.block_scales": {"learned": "learned block scales"},
    "data.source": dict.fromkeys(("hub", "jsonl", "teacher", "bos", "random_tokens"), "other sources than builtin"),
    "training.schedule": {"cosine": "the cosine schedule"},
    "engine.kind": {"server": "the server engine"},
}
"""Legal in the format, by section and key (and value), with what they will be."""


class Section(BaseModel):
    """A table of the suite: unknown keys and loose types are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=64)]
Positive = Annotated[int, Field(gt=0)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Model(Section):
    """`path`: a hub id (then `revision` is a commit), a folder, or `package:<python package>/<file.gguf>`.

    trust_remote_code: run the Python files that lie beside the weights; they are part of what identifies the model.
    """

    path: Annotated[str, Field(min_length=1)]
    revision: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")] | None = None
    kind: Literal["text"] = "text"
    trust_remote_code: bool = False


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


class Quantization(Section):
    """How every quantized variant is quantized.

    `scale_multiplier`, on the tensor scales of weights, is for the noise floor of scale rules: several variants that differ in
    nothing else. `block_scales` is about training; left out, it is "recomputed" with the rule amax and "frozen" with others.
    """

    format: Literal["nvfp4"] = "nvfp4"
    activations: bool = True
    exclude: tuple[str, ...] = ("lm_head",)
    scale_rule: Literal["amax", "mse", "four_over_six", "gptq"] = "amax"
    scale_weighting: Literal["none", "second_moment"] = "none"
    scale_multiplier: Annotated[float, Field(ge=1, le=1024, allow_inf_nan=False)] = 1.0
    block_scales: Literal["recomputed", "frozen"]
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


class Data(Section):
    """A source of text, cut to sequences of at most `seq_len` tokens and split by hash."""

    source: Literal["builtin"]
    seq_len: Annotated[int, Field(ge=32)] = 256
    seed: Seed = 0


class Training(Section):
    """The one budget that QAT and QAD share. `tokens` counts real tokens, padding excluded."""

    tokens: Positive
    batch_size: Positive
    lr: PositiveFloat
    loss_on: Literal["assistant", "all"]
    schedule: Literal["linear", "constant"] = "linear"
    warmup_steps: Annotated[int, Field(ge=0)] = 5
    clip_norm: PositiveFloat = 1.0
    epochs: Positive = 1
    seed: Seed = 0
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] | None = None


class Variant(Section):
    """One row of the tables. `quantization` and `training` override single keys of the suite's own sections."""

    name: Name
    method: Literal["bf16", "ptq", "qat", "qad", "checkpoint"]
    data: str | None = None
    path: str | None = None
    quantization: dict[str, Any] = {}
    training: dict[str, Any] = {}


class Task(Section):
    """A task by name. `limit` takes its first questions only and marks every row of it as partial."""

    name: str
    limit: Positive | None = None


class Engine(Section):
    """What answers the requests. `args` are passed on, keyed and recorded.

    kernels: what computes quantized linear layers; for vLLM, which would otherwise choose by what is installed.
    """

    kind: Literal["hf", "vllm"]
    kernels: Literal["native", "w4a4_emulation", "w4a16"] | None = None
    args: dict[str, Any] = {}


class Diagnostics(Section):
    """KL and CE against BF16 on `samples` held-out sequences of `data`."""

    data: str
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
    task: tuple[Task, ...] = ()
    engine: Engine
    diagnostics: Diagnostics | None = None
