"""Exit statuses, and how the end of a command is told: our errors as a message, an interrupt as what is kept."""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import typer

EXIT_PROBLEMS, EXIT_ERROR, EXIT_INCONCLUSIVE, EXIT_GAPS, EXIT_INTERRUPTED = 1, 2, 3, 4, 130


@contextmanager
def reporting(kept: str = "", *, is_verdict: bool = False) -> Iterator[None]:
    """Our errors are a message and status 2, Ctrl-C and SIGTERM are status 130 and say what is `kept`; a bug keeps its traceback.

    is_verdict: status 1 is a verdict of this command, so a bug, which Python ends with 1, is status 2.
    """
    try:
        with stopped_by_sigterm():
            yield
    except KeyboardInterrupt:
        _say(f"interrupted{kept}")
        raise typer.Exit(EXIT_INTERRUPTED) from None
    except typer.Exit:
        raise
    except Exception as error:
        status = _status_of(error)
        if status is None and is_verdict:
            traceback.print_exc()
            raise typer.Exit(EXIT_ERROR) from None
        if status is None:
            raise
        _say(f"harness: {error}")
        raise typer.Exit(status) from None


@contextmanager
def stopped_by_sigterm() -> Iterator[None]:
    """Within, SIGTERM ends the process as Ctrl-C does. Not under torchrun, which ends its ranks by it while they wait for each other."""
    if threading.current_thread() is not threading.main_thread() or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        yield
        return

    def stop(*arguments: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _status_of(error: Exception) -> int | None:
    from harness.errors import HarnessError
    from qad.errors import Interrupted, QadError

    if isinstance(error, Interrupted):
        return EXIT_INTERRUPTED
    return EXIT_ERROR if isinstance(error, HarnessError | QadError) else None


def _say(message: str) -> None:
    print(message, file=sys.stderr)
