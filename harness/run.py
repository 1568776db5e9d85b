"""The main job: load the suite, plan the stages, do each one that the store lacks, write the tables."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from harness.done import about_stage, adopt_imported, find_done, is_done, require_keys
from harness.imports import copy_imported, identities, imported_for
from harness.manifest import manifest, read_by
from harness.plan import Plan, Stage
from harness.plan_to_run import plan_to_run
from harness.plots import plot_trainings
from harness.progress import Reporter
from harness.provenance import peak_memory, provenance
from harness.recipe_mistakes import require_model
from harness.records import is_complete, open_results, open_run, read_json, read_lines, write_rows
from harness.reference_metrics import require_metrics
from harness.score_files import write_missing_scores, write_scores
from harness.store import Store, cache_folder, disk_errors, write_json
from harness.suite import Suite, load_suite
from harness.tables import build_grid, build_table, print_grid, write_tables
from harness.torchrun import follow, is_follower, leading

if TYPE_CHECKING:
    from harness.stages import Workbench


def run_suite(path: Path, results: Path, only: tuple[str, ...], reporter: Reporter) -> bool:
    """Run the suite at `path`: what is stored is found again, everything else is made and recorded.

    Of several ranks under torchrun the first does this; the others take part in training alone. Returns whether responses are missing.
    """
    return run_loaded(load_suite(path), results, only, reporter)


def run_loaded(suite: Suite, results: Path, only: tuple[str, ...], reporter: Reporter, *, journals: Path | None = None) -> bool:
    """The same of a suite that is read already. journals: where responses are kept, if not with the results."""
    store = Store(cache_folder())
    plan = plan_to_run(suite, store, only)
    unused = adopt_imported(plan, store)
    if is_follower():
        follow(plan, store, results, reporter)
        return False
    with leading():
        for line in unused:
            reporter.say(f"  {line}")
        return _run(plan, store, open_results(results), reporter, journals or results / "journals")


def prepare_suite(path: Path, results: Path, reporter: Reporter) -> None:
    """Make the tasks of the suite at `path` ready, and nothing else: `plan` then knows how many requests they take."""
    suite = load_suite(path)
    store = Store(cache_folder())
    plan = plan_to_run(suite, store, ())
    wanted = [stage for stage in plan.stages if stage.kind == "prepare"]
    if all(is_done(stage, store) for stage in wanted):
        reporter.say(f"{suite.name}: all {len(wanted)} tasks are prepared")
        return
    with contextlib.closing(_bench(plan, store, open_results(results) / "journals", reporter)) as bench:
        for stage in (plan.stages[0], *wanted):
            if not is_done(stage, store):
                _do_stage(bench, stage, store)


def _run(plan: Plan, store: Store, results: Path, reporter: Reporter, journals: Path) -> bool:
    suite = plan.suite
    pending = [stage for stage in plan.stages if not is_done(stage, store)]
    listed = identities(plan, results)
    folder = open_run(results, suite.name, plan.digest, has_work=bool(pending), imported=listed, read_by=read_by(suite))
    if not pending:
        reporter.say(f"{suite.name}: nothing to do, all {len(plan.stages)} stages are stored")
    try:
        if pending:
            _do(plan, store, journals, folder, reporter)
    finally:  # an interrupted run shows what it has
        if pending or not is_complete(folder):
            _write(plan, store, folder)
    write_missing_scores(folder)
    print_grid(build_grid(build_table(folder)), reporter.console)
    reporter.say(f"Results: {folder}")
    gaps = read_json(folder / "run.json")["gaps"]
    for gap in gaps:
        reporter.say(
            f"{gap['variant']} {gap['task']}: {gap['n_missing']:,} responses are missing; the same command asks for them"
        )
    return bool(gaps)


def _do(plan: Plan, store: Store, journals: Path, folder: Path, reporter: Reporter) -> None:
    require_keys(plan, store)
    reporter.say(f"{plan.suite.name}: {sum(not is_done(s, store) for s in plan.stages)} of {len(plan.stages)} stages to do")
    for note in plan.source.notes:
        reporter.say(f"  {note}")
    with contextlib.closing(_bench(plan, store, journals, reporter)) as bench:
        _do_stages(bench, plan, store, folder, reporter)


def _bench(plan: Plan, store: Store, journals: Path, reporter: Reporter) -> Workbench:
    os.environ["TQDM_DISABLE"] = "1"  # before the libraries that read it are imported, which the next line does
    require_model(plan, store, reporter)
    from harness.stages import Workbench

    return Workbench(plan, store, journals, reporter)


def _do_stages(bench: Workbench, plan: Plan, store: Store, folder: Path, reporter: Reporter) -> None:
    is_checked = has_table = False
    for stage in plan.stages:
        if is_done(stage, store):
            continue
        if stage.kind not in ("model", "prepare", "data") and not is_checked:
            require_metrics(plan, store)
            bench.check_suite()
            is_checked = True
        if stage.kind == "train" and not has_table:
            _write(plan, store, folder)
            print_grid(build_grid(build_table(folder)), reporter.console)
            has_table = True
        _do_stage(bench, stage, store)


def _do_stage(bench: Workbench, stage: Stage, store: Store) -> None:
    began = time.monotonic()
    record = about_stage(stage, store)
    with store.writing(stage.key, record) as stage_folder:
        record["result"] = bench.run(stage, stage_folder)
        record |= {"seconds": time.monotonic() - began, "peak_memory_bytes": peak_memory(), "provenance": provenance()}
    bench.tidy(stage)


def _write(plan: Plan, store: Store, folder: Path) -> None:
    """Bring the run folder up to what is done."""
    done = [(stage, found) for stage in plan.stages if (found := find_done(stage, store)) is not None]
    is_complete_now = all(is_done(stage, store) for stage in plan.stages)
    imported = imported_for(plan, folder.parent.parent)
    with disk_errors(f"the run folder {folder}"):
        write_rows(folder, done, copy_imported(imported, folder), is_rehearsal=plan.suite.is_rehearsal)
        write_scores(folder, read_lines(folder / "tasks.jsonl"))
        about = manifest(plan, done, run=folder.name, is_complete=is_complete_now, imported=[each.about() for each in imported])
        write_json(folder / "run.json", about)
        plot_trainings(folder)
        write_tables(folder)
