"""The verbs. Each parses its arguments and calls one function; nothing heavy is imported before it is needed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

EXIT_ERROR, EXIT_INTERRUPTED = 2, 130

app = typer.Typer(
    help="Benchmark BF16, PTQ, QAT and QAD variants of a model in NVFP4: one TOML suite in, tables out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
SuiteArgument = Annotated[Path, typer.Argument(metavar="SUITE", help="A suite, such as suites/quickstart.toml.")]


class TableFormat(StrEnum):
    """What `table` prints."""

    TERMINAL = "terminal"
    JSON = "json"
    MD = "md"
    CSV = "csv"


@app.command()
def run(
    suite: SuiteArgument,
    results: Annotated[Path, typer.Option(help="Where results and journals are kept.")] = Path("results"),
    only: Annotated[str, typer.Option(metavar="VARIANT,...", help="Make and measure these variants only.")] = "",
) -> None:
    """Do what the suite asks for and is not stored yet, then print the table."""
    with _reporting():
        from rich.console import Console

        from harness.progress import Reporter
        from harness.run import run_suite

        run_suite(suite, results, tuple(name.strip() for name in only.split(",") if name.strip()), Reporter(Console()))


@app.command()
def plan(suite: SuiteArgument) -> None:
    """Show the stages of a suite: which are stored, how many requests and training tokens the others take."""
    with _reporting():
        from harness.outline import outline

        for line in outline(suite):
            print(line)


@app.command()
def table(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, such as results/quickstart/<run id>.")],
    format: Annotated[TableFormat, typer.Option(help="What to print.")] = TableFormat.TERMINAL,
) -> None:
    """Print the table of a run again."""
    with _reporting():
        import json

        from harness.tables import build_grid, build_table, print_grid, render

        data = build_table(run)
        if format is TableFormat.JSON:
            print(json.dumps(data, indent=1, sort_keys=True, allow_nan=False))
        elif format is TableFormat.TERMINAL:
            from rich.console import Console

            print_grid(build_grid(data), Console())
        else:
            print(render(data, format.value), end="")


@app.command()
def doctor() -> None:
    """Say what this machine can do."""
    with _reporting():
        from harness.doctor import examine

        for what, found in examine():
            print(f"{what:28} {found}")


def main() -> None:
    """The command `harness`."""
    app()


@contextmanager
def _reporting() -> Iterator[None]:
    """Our errors are a message and status 2, Ctrl-C is status 130; a bug keeps its traceback."""
    try:
        yield
    except KeyboardInterrupt:
        _say("interrupted; finished stages and responses are kept, the same command goes on from them")
        raise typer.Exit(EXIT_INTERRUPTED) from None
    except Exception as error:
        if not _is_ours(error):
            raise
        _say(f"harness: {error}")
        raise typer.Exit(EXIT_ERROR) from None


def _is_ours(error: Exception) -> bool:
    from harness.errors import HarnessError
    from qad.errors import QadError

    return isinstance(error, HarnessError | QadError)


def _say(message: str) -> None:
    print(message, file=sys.stderr)


if __name__ == "__main__":
    main()
