"""What `harness rehearse` does: the whole suite on this machine in minutes, with twins, few rows and short answers, then what was found.

The suite is scaled (`rehearsal`), twins and rows are made (`rehearsal_models`, `rehearsal_data`, `rehearsal_rows`), and the ordinary run does
the rest in a cache and a mirror of its own, so that nothing is found done and nothing is fetched. Its run is marked as a rehearsal: it is
never ranked, and a gate says INCONCLUSIVE of it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from harness.errors import HarnessError, SuiteError
from harness.evidence import open_run_evidence
from harness.gating import gate
from harness.hub import offline
from harness.models import mirror_folder, mirror_root
from harness.plan import make_plan
from harness.progress import Reporter
from harness.rehearsal import Scaled, scale
from harness.rehearsal_models import Found, find_twins, models_with_experts, write_twins
from harness.rehearsal_static import check_statically
from harness.schema_data import Hub, Jsonl
from harness.schema_gate import Gate
from harness.store import Store, cache_folder
from harness.suite import Suite, load_suite
from harness.tables import build_grid, build_table, print_grid
from harness.task_files import metadata_of
from harness.tasks.needs import language_data
from qad.errors import Interrupted, QadError

MARK = "REHEARSAL"
_SHORT = ("aa_lcr",)
"""Tasks whose real prompts no twin can hold: their rows are made."""
_KEPT = "kept"
"""In a folder of what was made that is kept: the path of its suite."""


@dataclass
class Report:
    """What a rehearsal found. run: its folder, None where there is none. less: what was checked less than it could be, with what would do it."""

    problems: list[str] = field(default_factory=list)
    less: list[str] = field(default_factory=list)
    left_out: tuple[str, ...] = ()
    has_gaps: bool = False
    run: Path | None = None

    def add(self, problems: Iterable[str]) -> None:
        """Problems that are not there yet: what is found twice, by counting and by the run, is one."""
        for problem in problems:
            if not any(problem in each or each in problem for each in self.problems):
                self.problems.append(problem)


def rehearse(path: Path, results: Path, reporter: Reporter, *, config: Path | None = None) -> Report:
    """Rehearse the suite at `path`; its run stands below `results`.

    Args:
        config: the model's config.json, where it is not found.
    Raises:
        SuiteError: the suite is wrong. ModelError: a model whose configuration is nowhere, or of which no twin can be made.
    """
    began = time.monotonic()
    home = cache_folder() / "rehearsals"
    home.mkdir(parents=True, exist_ok=True)
    _remove_kept(home, path)
    work = Path(tempfile.mkdtemp(prefix=f"{path.stem}-", dir=home))
    report = Report()
    try:
        scaled, found = _scaled(path, work, reporter, config)
        report.left_out = scaled.left_out
        report.add(_refused(scaled.original))
        _write_rows(scaled, work / "mirror", reporter, report)
        for key in write_twins(found, scaled, reporter.say):
            report.less.append(f"{key}: rehearsed with another class; only the real run tries its own")
        lines, problems = check_statically(scaled.original, found[0].configuration.fields, found[0].twin.folder)
        report.add(problems)
        report.less += [line for line in lines if "; not counted: " in line]
        reporter.say("Checked by counting, on the real configuration:")
        for line in lines:
            reporter.say(f"  {line}")
        reporter.say("")
        with _surroundings(work):
            _run(scaled, work, results, reporter, report)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    if report.problems:
        (work / _KEPT).write_text(str(path.resolve()), encoding="utf-8")
        reporter.say(f"What was made is kept: {work}")
    else:
        shutil.rmtree(work, ignore_errors=True)
    _tell(report, reporter, time.monotonic() - began)
    return report


def _remove_kept(home: Path, path: Path) -> None:
    """Remove what earlier rehearsals of the suite have kept."""
    for kept in home.glob(f"*/{_KEPT}"):
        if kept.read_text(encoding="utf-8") == str(path.resolve()):
            shutil.rmtree(kept.parent, ignore_errors=True)


def _refused(suite: Suite) -> list[str]:
    """What the run itself refuses at once: models and rows that are nowhere, or of which it is not said which."""
    found: list[str] = []
    try:
        make_plan(suite, Store(cache_folder()), missing=found)
    except SuiteError:
        raise
    except HarnessError as error:
        found.append(str(error))
    return found


def _scaled(path: Path, work: Path, reporter: Reporter, config: Path | None) -> tuple[Scaled, list[Found]]:
    """The scaled suite and its twins to be; says what differs."""
    original = load_suite(path)
    scaled = scale(path, work, with_experts=models_with_experts(original, config))
    found, said = find_twins(scaled, config=config)
    reporter.say(f"{MARK} of {original.name} ({path}). What differs from the real run:")
    for line in (*scaled.changes, *said, *(f"not rehearsed: {each}" for each in scaled.left_out)):
        reporter.say(f"  {line}")
    return scaled, found


def _write_rows(scaled: Scaled, mirror: Path, reporter: Reporter, report: Report) -> None:
    """Make the mirror, sets of tasks and rows of data, and let the scaled suite read there; notes problems with rows of the user's."""
    from harness.rehearsal_data import write_data

    tasks = {task["name"] for task in scaled.raw.get("task", ()) if "path" not in task}
    tasks |= set((scaled.raw.get("training") or {}).get("select_tasks", ()))
    for variant in scaled.raw["variant"]:
        tasks |= set((variant.get("training") or {}).get("select_tasks", ()))
    taken: set[str] = set()
    for task in sorted(tasks):
        dataset = metadata_of(task).get("dataset")
        if dataset is None:
            continue
        taken.add(dataset)
        there = mirror_folder(dataset) if task not in _SHORT else None
        if there is not None:
            _link(there, mirror / dataset)
            reporter.say(f"  task {task}: the rows of the mirror's {dataset}")
        else:
            _make_set(task, mirror)
            if task not in _SHORT:
                report.less.append(f"task {task}: made rows; put {dataset} into the mirror (HARNESS_MIRROR) to check its own")
            reporter.say(f"  task {task}: made rows of the schema of {dataset}")
    root = mirror_root()
    if root is not None and (root / "nltk").is_dir():
        _link(root / "nltk", mirror / "nltk")
    given = {name: each for name, each in scaled.original.data.items() if isinstance(each, Hub | Jsonl)}
    mirror.mkdir(parents=True, exist_ok=True)
    written = write_data(given, mirror, Store(cache_folder()), taken=taken)
    for name, where in written.paths.items():
        scaled.raw["data"][name]["path"] = where
    for line in written.said:
        reporter.say(f"  {line}")
    report.less += [
        f"data.{name}: made rows; put {where} to check its columns and values" for name, where in written.made.items()
    ]
    report.add(written.problems)


def _make_set(task: str, mirror: Path) -> None:
    from harness.rehearsal_pictures import SETS, write_set
    from harness.rehearsal_rows import MADE

    if task in SETS:
        write_set(mirror, task)
    else:
        MADE[task](mirror)


def _link(source: Path, target: Path) -> None:
    """The folders of `source` again, with links to its files."""
    for inner, _, files in os.walk(source, followlinks=True):
        folder = target / Path(inner).relative_to(source)
        folder.mkdir(parents=True, exist_ok=True)
        for file in files:
            if not (folder / file).exists():
                (folder / file).symlink_to(Path(inner, file).resolve())


@contextlib.contextmanager
def _surroundings(work: Path) -> Iterator[None]:
    """Within, mirror and cache are those of the rehearsal, and no hub is asked, here and in processes that are started."""
    punkt = language_data()
    changed = {"HARNESS_MIRROR": str(work / "mirror"), "HARNESS_CACHE": str(work / "cache"), "HF_HUB_OFFLINE": "1"}
    if punkt is not None:
        changed["NLTK_DATA"] = os.pathsep.join(filter(None, [str(punkt), os.environ.get("NLTK_DATA", "")]))
    before = {key: os.environ.get(key) for key in changed}
    with offline():
        os.environ.update(changed)
        try:
            yield
        finally:
            for key, value in before.items():
                if value is None:
                    del os.environ[key]
                else:
                    os.environ[key] = value


def _run(scaled: Scaled, work: Path, results: Path, reporter: Reporter, report: Report) -> None:
    """The ordinary run; what ends it is a problem, and what it had made is shown."""
    from harness.run import run_loaded

    suite, runs = scaled.suite, results / scaled.original.name
    before = set(runs.glob("*/run.json"))
    is_finished = True
    try:
        report.has_gaps = run_loaded(suite, results, (), reporter, journals=work / "journals")
    except Interrupted:
        raise
    except (HarnessError, QadError) as error:
        is_finished = False
        report.add([str(error)])
    made = sorted(set(runs.glob("*/run.json")) - before)
    report.run = made[-1].parent if made else None
    if report.run is not None and not is_finished:
        print_grid(build_grid(build_table(report.run)), reporter.console)
    if suite.gate is None:
        return
    if report.run is not None and is_finished:
        report.add(_judged(report.run, suite.gate, reporter))
    else:
        report.left_out += ("gate: the run did not finish, so there is nothing to judge",)


def _judged(run: Path, policy: Gate, reporter: Reporter) -> list[str]:
    """The verdict of the suite's gate, which must be INCONCLUSIVE; what is missing for one is a problem."""
    evidence = open_run_evidence(run)
    baseline = policy.baseline or evidence.baseline
    if baseline is None:
        return ["gate: no BF16 variant, and no baseline is named: there is nothing to measure against"]
    try:
        verdict = gate(run, reporter.console, each=policy.candidate is None)
    except HarnessError as error:
        return [f"gate: {error}"]
    return [] if verdict == "INCONCLUSIVE" else [f"gate: {verdict} of a rehearsal, which is no evidence; report this"]


def _tell(report: Report, reporter: Reporter, seconds: float) -> None:
    reporter.say("")
    for line in report.left_out:
        reporter.say(f"not rehearsed: {line}")
    for line in report.problems:
        reporter.say(f"problem: {line}")
    for line in report.less:
        reporter.say(f"checked less than it could be: {line}")
    verdict = _number(len(report.problems), "problem") if report.problems else "no problem found"
    left_out = _number(len(report.left_out), "part")
    less = f", {_number(len(report.less), 'check')} less than could be (above)" if report.less else ""
    reporter.say(f"{MARK}: {verdict}, {left_out} not rehearsed{less}, {seconds:.0f} s; {report.run or 'no run'}")


def _number(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"
