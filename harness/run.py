"""The main job: load the suite, plan the stages, do each one that the store lacks, write the tables."""

from __future__ import annotations

import contextlib
import os
import resource
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from harness.done import about_stage, adopt_imported, find_done, is_done
from harness.manifest import manifest
from harness.plan import Plan, make_plan
from harness.plots import plot_trainings
from harness.progress import Reporter
from harness.provenance import provenance
from harness.records import is_complete, open_results, open_run, write_rows
from harness.store import Store, cache_folder, disk_errors, write_json, write_text
from harness.suite import load_suite
from harness.tables import build_grid, build_table, print_grid, render
from harness.torchrun import follow, is_follower, leading

if TYPE_CHECKING:
    from harness.stages import Workbench


def run_suite(path: Path, results: Path, only: tuple[str, ...], reporter: Reporter) -> None:
    """Run the suite at `path`: what is stored is found again, everything else is made and recorded.

    Of several ranks under torchrun the first does this; the others take part in training alone.
    """
    suite = load_suite(path)
    store = Store(cache_folder())
    plan = make_plan(suite, store, only=only)
    unused = adopt_imported(plan, store)
    if is_follower():
        follow(plan, store, results, reporter)
        return
    with leading():
        for line in unused:
            reporter.say(f"  {line}")
        _run(plan, store, open_results(results), reporter)


def _run(plan: Plan, store: Store, results: Path, reporter: Reporter) -> None:
    suite = plan.suite
    pending = [stage for stage in plan.stages if not is_done(stage, store)]
    folder = open_run(results, suite.name, plan.digest, has_work=bool(pending))
    try:
        if pending:
            _do(plan, store, results, folder, reporter)
        else:
            reporter.say(f"{suite.name}: nothing to do, all {len(plan.stages)} stages are stored")
    finally:  # an interrupted run shows what it has
        if pending or not is_complete(folder):
            _write(plan, store, folder)
    _show(folder, reporter)
    reporter.say(f"Results: {folder}")


def _do(plan: Plan, store: Store, results: Path, folder: Path, reporter: Reporter) -> None:
    n_pending = sum(not is_done(stage, store) for stage in plan.stages)
    reporter.say(f"{plan.suite.name}: {n_pending} of {len(plan.stages)} stages to do")
    for note in plan.source.notes:
        reporter.say(f"  {note}")
    os.environ["TQDM_DISABLE"] = "1"  # before the libraries that read it are imported: the progress shown is ours
    from harness.stages import Workbench

    bench = Workbench(plan, store, results / "journals", reporter)
    with contextlib.closing(bench):
        _do_stages(bench, plan, store, folder, reporter)


def _do_stages(bench: Workbench, plan: Plan, store: Store, folder: Path, reporter: Reporter) -> None:
    is_checked = has_table = False
    for stage in plan.stages:
        if is_done(stage, store):
            continue
        if stage.kind not in ("model", "data") and not is_checked:
            bench.check_suite()
            is_checked = True
        if stage.kind == "train" and not has_table:
            _write(plan, store, folder)
            _show(folder, reporter)
            has_table = True
        began = time.monotonic()
        record = about_stage(stage, store)
        with store.writing(stage.key, record) as stage_folder:
            record["result"] = bench.run(stage, stage_folder)
            record |= {"seconds": time.monotonic() - began, "peak_memory_bytes": _peak_memory(), "provenance": provenance()}
        bench.tidy(stage)


def _write(plan: Plan, store: Store, folder: Path) -> None:
    """Bring the run folder up to what is done."""
    done = [(stage, found) for stage in plan.stages if (found := find_done(stage, store)) is not None]
    write_rows(folder, done)
    with disk_errors(f"the run folder {folder}"):
        is_complete_now = all(is_done(stage, store) for stage in plan.stages)
        write_json(folder / "run.json", manifest(plan, done, run=folder.name, is_complete=is_complete_now))
        table = build_table(folder)
        plot_trainings(folder)
        write_json(folder / "table.json", table)
        for style in ("md", "csv"):
            write_text(folder / f"table.{style}", render(table, style))


def _show(folder: Path, reporter: Reporter) -> None:
    print_grid(build_grid(build_table(folder)), reporter.console)


def _peak_memory() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
