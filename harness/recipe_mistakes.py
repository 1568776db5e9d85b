"""[quantization] held against the model's config.json before its weights are here: what would end a run, said at once.

`harness plan` reads what is on this machine, by names alone and without torch; `harness run` builds the model's shapes and lets the rules of the
core match them. Of an architecture that cannot be told so nothing is said here: the run says it once the weights are loaded.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from harness.architecture import Architecture
from harness.architecture_sizes import architecture_of
from harness.done import is_done
from harness.errors import ModelError, SuiteError
from harness.hub_models import require_loadable
from harness.model_config import configuration_at_hand
from harness.plan import Plan, make_plan
from harness.planned_recipe import mistakes_of
from harness.progress import Reporter
from harness.store import Store, cache_folder
from harness.suite import load_suite
from qad.remote_code import runs_remote_code


def planned_mistakes(plan: Plan, model: Architecture) -> list[str]:
    """What would end a run of the plan with its sections of quantization, a line each."""
    sections = {v.quantization.model_dump_json(): v.quantization for v in plan.variants if v.quantization is not None}
    found = [mistake for quantization in sections.values() for mistake in mistakes_of(model, quantization)]
    return [f"{plan.suite.path}: {mistake}" for mistake in dict.fromkeys(found)]


def mistakes_at_hand(path: Path) -> list[str]:
    """The same for the suite at `path`, where the configuration of its model is on this machine; nobody is asked for it."""
    store = Store(cache_folder())
    plan = make_plan(load_suite(path), store, missing=[])
    found = configuration_at_hand(plan.stages[0], store)
    if found is None or runs_remote_code(found.fields, plan.suite.model.trust_remote_code):
        return []
    try:
        model = architecture_of(found.fields, found.where)
    except ModelError:  # not one that can be planned by its fields; the run asks the libraries
        return []
    return planned_mistakes(plan, model)


def require_model(plan: Plan, store: Store, reporter: Reporter) -> None:
    """ModelError for models of a plan that would fail once their weights are here; SuiteError for recipes that do not fit the model's shapes.

    Recipes are held against the shapes, which takes up to minutes with experts, only while something is left to quantize.
    """
    require_loadable(stage.source.wanted for stage in plan.stages if stage.source is not None)
    if all(is_done(stage, store) for stage in plan.stages if stage.kind == "quantize"):
        return
    found = configuration_at_hand(plan.stages[0], store)
    if found is None or runs_remote_code(found.fields, plan.suite.model.trust_remote_code):
        return
    if any("expert" in key for key in found.fields):
        reporter.say("  the recipes are held against the model's shapes, which with experts takes up to minutes")
    from harness.rehearsal_checks import check_recipes

    problems = check_recipes(dataclasses.replace(plan.suite, variants=plan.variants), found.fields).problems
    if problems:
        raise SuiteError("\n".join(f"{plan.suite.path}: quantization of {problem}" for problem in problems))
