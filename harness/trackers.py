"""Experiment trackers behind one seam: Weights & Biases, MLflow, trackio. Sight only: nothing that is measured depends on them.

Chosen on the command line, never in a suite. Each training is one run of the tracker; where it goes, and whether over a network, is set
up as its own documentation says (WANDB_MODE, MLFLOW_TRACKING_URI, TRACKIO_DIR and others).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, Protocol

from harness.errors import TrackerError


class Tracker(Protocol):
    """One training as a tracker sees it."""

    def log(self, step: int, figures: dict[str, float]) -> None:
        """Figures after so many optimizer steps; never fewer than before."""

    def finish(self) -> None:
        """No more figures come."""


OpenTracker = Callable[[str], Tracker]
"""Begins the tracking of the training with that name."""


def tracking(kind: str, *, project: str) -> OpenTracker:
    """What begins a tracker's run for each training; TrackerError now if its package is missing, later if it does not start."""
    adapters: dict[str, Callable[[Any, str, str], Tracker]] = {"wandb": _Wandb, "mlflow": _Mlflow, "trackio": _Trackio}
    try:
        package = importlib.import_module(kind)
    except ImportError as error:
        raise TrackerError(
            f"--track {kind}: the package cannot be imported ({error}); pip install 'qad-harness[track]', or leave --track out"
        ) from error

    def begin(name: str) -> Tracker:
        try:
            return adapters[kind](package, project, name)
        except Exception as error:  # whatever a package of others raises: it is about its set-up, not about the training
            raise TrackerError(
                f"--track {kind}: does not start ({error}); set it up as its documentation says, or leave it out"
            ) from error

    return begin


class _Wandb:
    def __init__(self, package: Any, project: str, name: str) -> None:
        self._run = package.init(project=project, name=name, reinit="finish_previous")

    def log(self, step: int, figures: dict[str, float]) -> None:
        self._run.log(figures, step=step)

    def finish(self) -> None:
        self._run.finish()


class _Mlflow:
    def __init__(self, package: Any, project: str, name: str) -> None:
        self._package = package
        package.set_experiment(project)
        package.start_run(run_name=name)

    def log(self, step: int, figures: dict[str, float]) -> None:
        self._package.log_metrics(figures, step=step)

    def finish(self) -> None:
        self._package.end_run()


class _Trackio:
    def __init__(self, package: Any, project: str, name: str) -> None:
        self._package = package
        package.init(project=project, name=name, embed=False)

    def log(self, step: int, figures: dict[str, float]) -> None:
        self._package.log(figures, step=step)

    def finish(self) -> None:
        self._package.finish()
