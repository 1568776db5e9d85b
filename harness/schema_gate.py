"""The schema of a release policy, which is the `[gate]` of a suite or a file of its own, and of published figures.

Margins, bands and published values are in points: percent points of a score between 0 and 100 %.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from harness.published import DIAGNOSTICS
from harness.section import Name, Positive, Section

_Points = Annotated[float, Field(gt=0, le=100, allow_inf_nan=False)]
_Alpha = Annotated[float, Field(gt=0, lt=0.5)]
_Share = Annotated[float, Field(ge=0, le=1)]
_Ceiling = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Tier = Literal["critical", "supporting", "advisory"]
Kernel = Literal["native", "w4a4_emulation", "w4a16"]
Verified = Literal["first-hand", "cross-checked", "single translation"]
"""How sure it is that a published figure was printed so: read in the source, in several accounts of it, or in one translation."""
DIVERGENCES = ("kl", "ce")
"""What a published figure of the diagnostics may be of: KL against BF16, CE against the labels, in nats a token."""


class GateTask(Section):
    """What a task has to show: at most `margin` points of damage. Keys that are left out are the policy's own.

    tier: "critical" tasks have to PASS, "supporting" ones not to FAIL, "advisory" ones are shown.
    alpha: one-sided error of a wrong PASS.
    """

    name: Annotated[str, Field(min_length=1)]
    margin: _Points
    tier: Tier
    alpha: _Alpha | None = None
    min_coverage: Annotated[float, Field(gt=0, le=1)] | None = None
    min_questions: Positive | None = None
    min_clusters: Positive | None = None
    max_incomplete_rate: _Share | None = None
    max_length_growth: _Ceiling | None = None


class Pooled(Section):
    """One endpoint over several tasks (all of the policy's, unless named): the mean of their differences, each weighing the same."""

    margin: _Points
    tier: Tier = "critical"
    alpha: _Alpha | None = None
    tasks: tuple[str, ...] = ()


class Gate(Section):
    """What a candidate has to show against the baseline. Left out, the baseline is the BF16 variant; a candidate is named here or when asked.

    min_coverage: share of the asked answers that are scored. min_clusters: of questions that err together. kernels: what may have computed
    the candidate's quantized linear layers.
    max_kl: nats a response token. max_incomplete_rate: share of answers cut before they said anything. max_length_growth: of mean tokens,
    relative to the baseline. max_saturated_share: of activation blocks.
    admit_imported, admit_unverified: scores of other tools, and of endpoints whose weights or kernels are not proven.
    admit_unequal_budgets: a comparison of two trained variants that saw other numbers of tokens or steps.
    """

    baseline: Name | None = None
    candidate: Name | None = None
    alpha: _Alpha = 0.05
    min_coverage: Annotated[float, Field(gt=0, le=1)] = 1.0
    min_questions: Positive = 30
    min_clusters: Positive = 20
    kernels: Annotated[tuple[Kernel, ...], Field(min_length=1)]
    max_kl: _Ceiling | None = None
    max_incomplete_rate: _Share | None = None
    max_length_growth: _Ceiling | None = None
    max_saturated_share: _Share | None = None
    admit_imported: bool = False
    admit_unverified: bool = False
    admit_unequal_budgets: bool = False
    pooled: Pooled | None = None
    task: Annotated[tuple[GateTask, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _can_decide(self) -> Gate:
        names = [task.name for task in self.task]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"task: {', '.join(repeated)} repeated; a task has one margin")
        unknown = sorted(set(self.pooled.tasks) - set(names)) if self.pooled else []
        if unknown:
            raise ValueError(f"pooled.tasks: {', '.join(unknown)}: no [[task]] of the policy. Known: {', '.join(names)}")
        tiers = [task.tier for task in self.task] + ([self.pooled.tier] if self.pooled else [])
        if "critical" not in tiers:
            raise ValueError('task: none is "critical", so nothing could ever be GO; make one critical, or the pooled endpoint')
        return self


class Policy(Gate):
    """A policy as a file of its own."""

    schema_version: Annotated[Literal[1], Field(alias="schema")]


class Figure(Section):
    """A published figure of the variant or method `variant` in a task. table: where in the source. verified: how sure the figure is.

    metric: of a task that has several; left out, the one that stands in the table. With task = "diagnostics" it is one of DIVERGENCES, and
    the value is in nats a token instead of points.
    """

    variant: Name
    task: Annotated[str, Field(min_length=1)]
    metric: Annotated[str, Field(min_length=1)] | None = None
    value: Annotated[float, Field(ge=0, le=100)]
    table: str | None = None
    verified: Verified

    @model_validator(mode="after")
    def _has_its_metric(self) -> Figure:
        if self.task == DIAGNOSTICS and self.metric not in DIVERGENCES:
            raise ValueError(f'metric: found {self.metric!r}; allowed with task = "{DIAGNOSTICS}": {", ".join(DIVERGENCES)}')
        return self


class Reference(Section):
    """Published figures to print beside ours. band: how far our BF16 may be from a published one before the run is suspect."""

    source: Annotated[str, Field(min_length=1)]
    band: _Points
    figure: Annotated[tuple[Figure, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _is_one_a_cell(self) -> Reference:
        cells = [(each.variant, each.task, *([each.metric] if each.metric else [])) for each in self.figure]
        repeated = dict.fromkeys(" ".join(cell) for cell in cells if cells.count(cell) > 1)
        if repeated:
            raise ValueError(f"figure: {', '.join(repeated)} repeated; which is meant is not known, remove one")
        return self
