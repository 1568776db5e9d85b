"""The verbs that say what the figures of runs mean: comparisons, verdicts, cards, the leaderboard."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from harness.reporting import EXIT_ERROR, EXIT_GAPS, EXIT_INCONCLUSIVE, EXIT_PROBLEMS, reporting

verdict_app = typer.Typer()
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, such as results/quickstart/<run id>.")]


class CompareFormat(StrEnum):
    """What `compare` prints."""

    TERMINAL = "terminal"
    MD = "md"
    JSON = "json"


@verdict_app.command()
def compare(
    run: RunArgument,
    baseline: Annotated[str, typer.Argument(metavar="BASELINE", help="A variant of the run.")],
    candidate: Annotated[str, typer.Argument(metavar="CANDIDATE", help="A variant of the run.")],
    task: Annotated[list[str] | None, typer.Option(help="This task only; again for each.")] = None,
    format: Annotated[CompareFormat, typer.Option(help="What to print.")] = CompareFormat.TERMINAL,
    baseline_run: Annotated[Path | None, typer.Option(metavar="RUN", help="The baseline is of this run.")] = None,
    min_coverage: Annotated[float, typer.Option(min=0.01, max=1, help="Share of the answers that both need.")] = 1.0,
) -> None:
    """Compare two variants question by question. Status 4: some tasks are not comparable; 2: none is."""
    with reporting():
        from harness.compare import compare_runs
        from harness.evidence import open_run_evidence

        other = None if baseline_run is None else open_run_evidence(baseline_run)
        found = compare_runs(
            open_run_evidence(run), baseline, candidate, task or (), baseline_run=other, min_coverage=min_coverage
        )
        from harness import compare_report

        if format is CompareFormat.JSON:
            import json

            print(json.dumps(compare_report.as_data(found), indent=1, sort_keys=True, allow_nan=False))
        elif format is CompareFormat.MD:
            print(compare_report.render_markdown(found), end="")
        else:
            from rich.console import Console

            compare_report.print_comparison(found, Console())
        if found.refused or not found.tasks:
            raise typer.Exit(EXIT_ERROR if len(found.refused) == len(found.tasks) else EXIT_GAPS)


@verdict_app.command()
def accept(
    run: RunArgument,
    reason: Annotated[str, typer.Option(help="Why, for whoever reads the log later.")],
    candidate: Annotated[str | None, typer.Option(help="The variant that is released.")] = None,
    despite_verdict: Annotated[bool, typer.Option("--despite-verdict", help="Although its verdict is not GO.")] = False,
) -> None:
    """Log a run as an accepted release: later runs of its suite are compared with it."""
    with reporting():
        from harness import accepted

        for line in accepted.accept(run, reason=reason, candidate=candidate, despite_verdict=despite_verdict):
            print(line)


@verdict_app.command()
def invalidate(run: RunArgument, reason: Annotated[str, typer.Option(help="Why, for whoever reads the log later.")]) -> None:
    """Log that a run is withdrawn: it is never ranked again, and nothing is compared with it."""
    with reporting():
        from harness import accepted

        for line in accepted.invalidate(run, reason=reason):
            print(line)


@verdict_app.command()
def gate(
    run: RunArgument,
    policy: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A release policy; default: the suite's \\[gate].")
    ] = None,
    candidate: Annotated[str, typer.Option(metavar="VARIANT", help="What is to be released; a,b with --each.")] = "",
    baseline: Annotated[str | None, typer.Option(metavar="VARIANT", help="What it is measured against; default: BF16.")] = None,
    each: Annotated[
        bool, typer.Option("--each", help="Judge several: all quantized variants, or those of --candidate.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where the verdict is written; default: the run folder.")
    ] = None,
) -> None:
    """Say whether a candidate may be released. Status 0 GO, 1 NO-GO, 3 INCONCLUSIVE, 2 an error; of several candidates the worst."""
    with reporting(is_verdict=True):
        from rich.console import Console

        from harness import gating

        names = tuple(name.strip() for name in candidate.split(",") if name.strip())
        verdict = gating.gate(run, Console(), policy=policy, candidates=names, baseline=baseline, each=each, out=out)
        raise typer.Exit({"GO": 0, "NO-GO": EXIT_PROBLEMS, "INCONCLUSIVE": EXIT_INCONCLUSIVE}[verdict])


@verdict_app.command()
def advise(
    run: RunArgument,
    policy: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A release policy; default: \\[gate] of the suite.")
    ] = None,
    candidate: Annotated[
        str | None, typer.Option(metavar="VARIANT", help="The untrained variant; default: the one PTQ variant.")
    ] = None,
) -> None:
    """Say by the gate's rule whether training is worth it, once BF16 and PTQ are scored. Status 3: the evidence does not tell."""
    with reporting():
        from harness import advise as advising

        advice = advising.advise(run, policy_path=policy, candidate=candidate)
        for line in advice.lines:
            print(line)
        if advice.is_worth_training is None:
            raise typer.Exit(EXIT_INCONCLUSIVE)


@verdict_app.command()
def nightly(
    suites: Annotated[
        list[Path], typer.Argument(metavar="SUITE...", help="Suites, such as suites/*.toml, or lists of them (suites/nightly).")
    ],
    group: Annotated[str | None, typer.Option(help="Of a list of suites, the group that this machine is for.")] = None,
    results: Annotated[Path, typer.Option(help="Where results and journals are kept.")] = Path("results"),
    policy: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A release policy for all; default: \\[gate] of each suite.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="SITE", help="Where the leaderboard is written; default: site/ in the results.")
    ] = None,
) -> None:
    """Run what has changed, judge it, compare it with what was accepted, build the leaderboard; the worst status of all."""
    with reporting("; what was done is kept, the same command goes on from it", is_verdict=True):
        from harness import nightly as nights
        from harness.nightly_list import suites_of

        def say(line: str) -> None:
            print(line, flush=True)

        status = nights.nightly(suites_of(suites, group), results=results, policy=policy, out=out, say=say)
        if status:
            raise typer.Exit(status)


@verdict_app.command()
def leaderboard(
    results: Annotated[Path, typer.Argument(metavar="RESULTS", help="A results folder.")] = Path("results"),
    out: Annotated[
        Path | None, typer.Option(help="Where the site is written; default: site/ in the results folder.", show_default=False)
    ] = None,
) -> None:
    """Make a static site and LEADERBOARD.md of every run: tables, history, curves, a page a run."""
    with reporting():
        from harness.leaderboard.build import build_leaderboard, lines

        for line in lines(build_leaderboard(results, results / "site" if out is None else out)):
            print(line)


@verdict_app.command()
def findings(
    claims: Annotated[
        Path, typer.Argument(metavar="CLAIMS", help="A file of claims beside its suites: suites/windtunnel/claims.toml.")
    ],
    results: Annotated[
        Path, typer.Option(help="Where the runs of the suites are; gets a copy that the leaderboard shows.")
    ] = Path("results"),
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="The report; default: docs/findings.md, and nothing is written with --claim.",
            show_default=False,
        ),
    ] = None,
    claim: Annotated[list[str] | None, typer.Option(metavar="ID", help="This claim only; again for each.")] = None,
) -> None:
    """Hold claims against finished runs: each difference with its interval over questions and seeds, and a verdict."""
    with reporting():
        from harness import findings as finding

        report = out if out is not None or claim else Path("docs/findings.md")
        for line in finding.findings(claims, results, report, tuple(claim or ())):
            print(line)


@verdict_app.command()
def card(
    run: RunArgument,
    variant: Annotated[str, typer.Option(help="The variant whose exported copy it is.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The copy that `harness export` made.")],
) -> None:
    """Write a model card into an exported copy: README.md for the hub, and the scores for machines."""
    with reporting():
        from harness.card import write_card

        for line in write_card(run, variant, out):
            print(line)
