"""The verbs. Each parses its arguments and calls one function; nothing heavy is imported before it is needed."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from harness.cli_verdicts import verdict_app
from harness.errors import HarnessError
from harness.reporting import EXIT_GAPS, EXIT_PROBLEMS, reporting

app = typer.Typer(
    help="Benchmark BF16, PTQ, QAT and QAD variants of a model in NVFP4: one TOML suite in, tables out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
stage_app = typer.Typer(help="Carry finished stages between machines: train on one, score on another.", no_args_is_help=True)
app.add_typer(stage_app, name="stage")
app.add_typer(verdict_app)
SuiteArgument = Annotated[Path, typer.Argument(metavar="SUITE", help="A suite, such as suites/quickstart.toml.")]


class TableFormat(StrEnum):
    """What `table` prints."""

    TERMINAL = "terminal"
    JSON = "json"
    MD = "md"
    CSV = "csv"
    LATEX = "latex"


class ForeignTool(StrEnum):
    """Whose results `import` reads."""

    AUTO = "auto"
    LM_EVAL = "lm-eval"
    NEMO_SKILLS = "nemo-skills"
    NEMO_EVALUATOR = "nemo-evaluator"
    VLMEVALKIT = "vlmevalkit"


class TrackerName(StrEnum):
    """What training figures may be sent to."""

    WANDB = "wandb"
    MLFLOW = "mlflow"
    TRACKIO = "trackio"


@app.command()
def run(
    suite: SuiteArgument,
    results: Annotated[Path, typer.Option(help="Where results and journals are kept.")] = Path("results"),
    only: Annotated[str, typer.Option(metavar="VARIANT,...", help="Make and measure these variants only.")] = "",
    track: Annotated[TrackerName | None, typer.Option(help="Send the figures of trainings there too.")] = None,
) -> None:
    """Do what the suite asks for and is not stored yet, then print the table. Status 4: responses are missing."""
    with reporting("; finished stages and responses are kept, the same command goes on from them"):
        from rich.console import Console

        from harness.progress import Reporter
        from harness.run import run_suite
        from harness.trackers import tracking

        reporter = Reporter(Console(), open_tracker=tracking(track.value, project=suite.stem) if track else None)
        if run_suite(suite, results, tuple(name.strip() for name in only.split(",") if name.strip()), reporter):
            raise typer.Exit(EXIT_GAPS)


@app.command()
def prepare(
    suite: SuiteArgument,
    results: Annotated[Path, typer.Option(help="Where results and journals are kept.")] = Path("results"),
) -> None:
    """Read the tasks of a suite and render their prompts, so that `plan` knows their size and a missing data set shows."""
    with reporting("; tasks that are ready are kept, the same command goes on from them"):
        from rich.console import Console

        from harness.progress import Reporter
        from harness.run import prepare_suite

        prepare_suite(suite, results, Reporter(Console()))


@app.command()
def rehearse(
    suite: SuiteArgument,
    results: Annotated[Path, typer.Option(help="Where the runs of rehearsals are kept.")] = Path("results/rehearsals"),
    config: Annotated[Path | None, typer.Option(metavar="FILE", help="The model's config.json, where it is not found.")] = None,
) -> None:
    """Try the whole suite here in minutes, with small random models and few rows. Status 1: problems; 4: a part was not rehearsed."""
    with reporting("; nothing of a rehearsal is kept, the same command starts anew", is_verdict=True):
        os.environ["TQDM_DISABLE"] = "1"  # read once, when torch imports the library: the progress shown is ours
        from rich.console import Console

        from harness.progress import Reporter
        from harness.rehearse import rehearse as try_out

        found = try_out(suite, results, Reporter(Console()), config=config)
        if found.problems:
            raise typer.Exit(EXIT_PROBLEMS)
        if found.left_out or found.has_gaps:
            raise typer.Exit(EXIT_GAPS)


@app.command()
def plan(
    suite: SuiteArgument,
    policy: Annotated[Path | None, typer.Option(help="A release policy in place of the suite's \\[gate].")] = None,
    results: Annotated[Path, typer.Option(help="Where earlier runs show how much answers vary.")] = Path("results"),
    gpu: Annotated[str | None, typer.Option(help="Plan memory, GPU-hours and disk for a100, h100, h200, b200 or b300.")] = None,
    count: Annotated[int | None, typer.Option(help="With --gpu: GPUs of a node.")] = None,
    nodes: Annotated[int | None, typer.Option(help="With --gpu: nodes.", show_default="1")] = None,
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="With --gpu: the model's config.json, where it is not found.")
    ] = None,
    host_memory: Annotated[
        float | None, typer.Option(metavar="GB", help="With --gpu: memory of a node beside its GPUs, to be compared too.")
    ] = None,
) -> None:
    """Show the stages of a suite: which are stored, what the others take; and which margins its gate can decide.

    With --gpu, also what they need of such machines; status 1 where a stage does not fit. Nothing but a config.json is downloaded. Status 2: models
    or rows are missing, or a run would end with \\[quantization], which is said at the end.
    """
    with reporting():
        from harness.hardware import cluster_of
        from harness.outline import outline

        cluster = cluster_of(gpu, count, nodes, config=config, host_gb=host_memory)
        missing: list[str] = []
        for line in outline(suite, policy=policy, results=results, missing=missing):
            print(line)
        fits = True
        if cluster is None:
            from harness.recipe_mistakes import mistakes_at_hand

            missing += mistakes_at_hand(suite)
        else:
            from harness.plan_hardware import hardware_outlook

            try:
                found = hardware_outlook(suite, cluster, config=config)
            except HarnessError as error:
                if not missing:
                    raise
                missing.append(str(error))
            else:
                fits = found.fits
                for line in found.lines:
                    print(line)
                missing += found.mistakes
        if missing:
            raise HarnessError("to mend before a run:\n" + "\n".join(f"  {line}" for line in dict.fromkeys(missing)))
        if not fits:
            raise typer.Exit(EXIT_PROBLEMS)


@app.command()
def table(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, such as results/quickstart/<run id>.")],
    format: Annotated[TableFormat, typer.Option(help="What to print.")] = TableFormat.TERMINAL,
) -> None:
    """Print the table of a run again."""
    with reporting():
        import json

        from harness.tables import build_grid, build_table, print_grid, render

        data = build_table(run)
        if format is TableFormat.JSON:
            print(json.dumps(data, indent=1, sort_keys=True, allow_nan=False))
        elif format is TableFormat.TERMINAL:
            from rich.console import Console

            print_grid(build_grid(data), Console())
        else:
            print(render(data, "tex" if format is TableFormat.LATEX else format.value), end="")


@app.command()
def inspect(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, such as results/quickstart/<run id>.")],
    variant: Annotated[str, typer.Option(metavar="A,B,...", help="These variants only.")] = "",
    task: Annotated[str | None, typer.Option(help="This task only.")] = None,
    question: Annotated[str | None, typer.Option(help="Its number in the task, or the beginning of its digest.")] = None,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a page instead; no text of unpublishable tasks.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Questions named of a kind, at most.")] = 20,
) -> None:
    """Show where variants disagree or have trouble or, with --question, the answers of all variants to one question."""
    with reporting():
        from rich.console import Console

        from harness.inspect import show

        names = tuple(name.strip() for name in variant.split(",") if name.strip())
        show(run, Console(), variants=names, task=task, question=question, page=html, limit=limit)


@app.command("import")
def import_(
    suite: SuiteArgument,
    variant: Annotated[str, typer.Option(help="Whose results they are.")],
    task: Annotated[str, typer.Option(help="What the table calls the task; none that the suite runs itself.")],
    source: Annotated[list[Path], typer.Option("--from", metavar="FILE", help="Per-question results; again for each file.")],
    format: Annotated[ForeignTool, typer.Option(help="The tool that made them.")] = ForeignTool.AUTO,
    metric: Annotated[
        str | None, typer.Option(help="What stands in the table; default: the tool's own headline metric.")
    ] = None,
    results: Annotated[Path, typer.Option(help="Where results and journals are kept.")] = Path("results"),
) -> None:
    """Bring in results of a task that was scored elsewhere: the next run lists them, marked as imported."""
    with reporting():
        from harness.imports import import_results

        for line in import_results(suite, variant, task, source, results, tool=format.value, metric=metric):
            print(line)


@app.command()
def score(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, such as results/quickstart/<run id>.")],
) -> None:
    """Score the recorded answers of a run again, after a scorer changed: no model, no cache."""
    with reporting("; answers are kept, the same command scores them again"):
        from rich.console import Console

        from harness.rescore import rescore
        from harness.tables import build_grid, build_table, print_grid

        for line in rescore(run):
            print(line)
        print_grid(build_grid(build_table(run)), Console())


@app.command()
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, such as results/quickstart/<run id>.")],
    variant: Annotated[str, typer.Option(help="The variant whose scored checkpoint is copied.")],
    out: Annotated[Path, typer.Option(help="A folder that is missing or empty.")],
    layout: Annotated[str | None, typer.Option(help="modelopt or compressed-tensors; default: as scored.")] = None,
) -> None:
    """Copy the checkpoint that was scored out of the store, in either layout."""
    with reporting():
        from harness.export import export as copy

        for line in copy(run, variant, out, layout):
            print(line)


@stage_app.command("export")
def stage_export(
    key: Annotated[str, typer.Argument(metavar="KEY", help="A key that `harness plan` prints, or its beginning.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A folder that is missing or empty.")],
) -> None:
    """Copy a finished stage, and what it was made of, out of the store."""
    with reporting():
        from harness.store import Store, cache_folder
        from harness.transfer import export_stage

        for line in export_stage(key, out, Store(cache_folder())):
            print(line)


@stage_app.command("import")
def stage_import(folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="What `harness stage export` wrote.")]) -> None:
    """Bring exported stages into the store of this machine: suites that match them use them."""
    with reporting():
        from harness.store import Store, cache_folder
        from harness.transfer import import_stages

        for line in import_stages(folder, Store(cache_folder())):
            print(line)


@app.command()
def verify(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A folder with a packed checkpoint.")],
    tp: Annotated[int, typer.Option(min=1, help="Devices that will share each layer (tensor parallelism).")] = 1,
) -> None:
    """List everything that is wrong with a packed checkpoint; status 1 if anything is."""
    with reporting(is_verdict=True):
        from qad.verify import verify as examine

        found = examine(checkpoint, tensor_parallel=tp)
    for problem in found.problems:
        print(problem)
    formats = ", ".join(f"{count} {format}" for format, count in found.formats.items()) or "nothing"
    guessed = (
        "; linear layers guessed from the tensors: the architecture is unknown to transformers" if found.is_guessed else ""
    )
    verdict = f"{len(found.problems)} problems" if found.problems else "no problems"
    print(f"{checkpoint}: {verdict}; linear layers: {formats}, {found.n_left} left alone{guessed}")
    if found.problems:
        raise typer.Exit(EXIT_PROBLEMS)


@app.command()
def parity(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A quantized checkpoint folder.")],
    model: Annotated[Path, typer.Option(help="The BF16 folder that it was made from.")],
    kernels: Annotated[str | None, typer.Option(help="What vLLM computes with; native FP4 where there is any.")] = None,
    results: Annotated[Path, typer.Option(help="Where the record is kept, in parity/.")] = Path("results"),
    seq_len: Annotated[
        int | None, typer.Option(min=32, help="Tokens of a held-out sequence, at most; 192, beside a picture.")
    ] = None,
    max_sequences: Annotated[int, typer.Option(min=2, help="Where to stop adding text.")] = 256,
) -> None:
    """Hold vLLM's numbers against ours: modules on equal inputs, mean KL to BF16. Status 0 PASS, 1 FAIL, 3 INCONCLUSIVE."""
    with reporting(is_verdict=True):
        from rich.console import Console

        from harness.parity import run_parity
        from harness.parity_report import report
        from harness.progress import Reporter

        record, path = run_parity(
            checkpoint,
            model,
            kernels=kernels,
            results=results,
            seq_len=seq_len,
            max_sequences=max_sequences,
            reporter=Reporter(Console()),
        )
        for line in report(record, path):
            print(line)
        raise typer.Exit({"PASS": 0, "FAIL": 1, "INCONCLUSIVE": 3}[record["verdict"]])


@app.command()
def doctor() -> None:
    """Say what this machine can do."""
    with reporting():
        from harness.doctor import examine

        for what, found in examine():
            print(f"{what:28} {found}")


def main() -> None:
    """The command `harness`."""
    app()


if __name__ == "__main__":
    main()
