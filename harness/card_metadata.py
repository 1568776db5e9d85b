"""The metadata at the top of a model card, as the hub reads them: `model-index` and what the model is made from. No torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from harness.controls import is_control
from harness.task_files import metadata_of

if TYPE_CHECKING:
    from harness.card import Subject

_PIPELINES = {"text": "text-generation", "image-text": "image-text-to-text"}
"""What the hub calls the use of a model, by the suite's `model.kind`."""
_TASKS = {"text-generation": "Text generation", "image-text-to-text": "Image-text to text"}


def front_matter_of(subject: Subject) -> str:
    """YAML between two lines of dashes. Keys whose value is not known are left out; an unknown licence is called that."""
    from huggingface_hub import ModelCardData

    licence, layout = subject.licence, subject.exported["layout"]
    pipeline = _PIPELINES[subject.about["resolved"]["model"]["kind"]]
    results = [found for name, task in subject.row["tasks"].items() if (found := _result(name, task, pipeline)) is not None]
    data = ModelCardData(
        base_model=subject.base,
        base_model_relation="quantized" if subject.base else None,
        license=licence.id if licence else "unknown",
        license_name=licence.name if licence else None,
        license_link=licence.link if licence else None,
        library_name="vllm",
        pipeline_tag=pipeline,
        tags=["nvfp4", "fp4", "quantized", subject.row["method"], *([layout] if layout else [])],
        model_name=subject.name,
        eval_results=results or None,
    )
    return f"---\n{data.to_yaml()}\n---"


def dataset_of(task: str) -> str | None:
    """The id on the hub of the data set of one of our tasks; None where it has none, or the task is another's."""
    named = metadata_of(task).get("dataset")
    return str(named) if named else None


def _result(name: str, task: dict[str, Any], pipeline: str) -> Any:
    """An entry of `model-index`, shares in percent; None without a value, and of a control, which is no score."""
    from huggingface_hub import EvalResult

    metric = task["metrics"][task["primary"]]
    if metric["value"] is None or is_control(task):
        return None
    scale = 100 if metric["unit"] == "share" else 1
    flags = list(task["flags"] or ())
    arguments: dict[str, Any] = {
        "stderr": None if metric["stderr"] is None else round(scale * metric["stderr"], 3),
        "n_questions": task["n_questions"] or metric["n_scored"],
        "repeats": task["repeats"] or 1,
        "kernels": str(task["kernels"].get("linear")),
        "is_partial": bool(task["is_partial"]),
        "flags": flags,
    }
    return EvalResult(
        task_type=pipeline,
        task_name=_TASKS[pipeline],
        dataset_type=dataset_of(name) or name,
        dataset_name=name,
        metric_type=task["primary"],
        metric_name=f"{task['primary']}{', percent' if scale == 100 else ''}{''.join(f', {flag}' for flag in flags)}",
        metric_value=round(scale * metric["value"], 3),
        metric_args=arguments,
    )
