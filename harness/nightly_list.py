"""Lists of suites for `harness nightly`: groups, each with the machine that it is meant for. A file says so by its tables [[group]]. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from harness.errors import SuiteError
from harness.hardware import cluster_of
from harness.mistakes import Mistakes
from harness.section import Name, Positive, Section
from harness.toml_file import read_toml

EXAMPLE = "suites/nightly/paper.toml"


class Group(Section):
    """Suites that run on one machine, as paths from the list. gpu, count, nodes: that machine, as `harness plan` names it; left out: any."""

    name: Name
    suites: Annotated[tuple[str, ...], Field(min_length=1)]
    gpu: Literal["a100", "h100", "h200", "b200", "b300"] | None = None
    count: Positive | None = None
    nodes: Positive | None = None

    @property
    def machine(self) -> str:
        """The machine in words."""
        cluster = cluster_of(self.gpu, self.count, self.nodes)
        return "any machine" if cluster is None else str(cluster)


class NightlyList(Section):
    """A list: schema and groups, of which a night takes one."""

    schema_: Annotated[Literal[1], Field(alias="schema")]
    group: Annotated[tuple[Group, ...], Field(min_length=1)]


def suites_of(paths: Sequence[Path], group: str | None) -> list[Path]:
    """The suites of a night: `paths` themselves, but for lists, of which the suites of one group are taken.

    Raises:
        SuiteError: a list with mistakes, a group that is not named or not there, a suite that is nowhere; --group without a list.
    """
    found: list[Path] = []
    lists = 0
    for path in paths:
        if not _is_list(path):
            found.append(path)
            continue
        lists += 1
        chosen = _chosen(path, load_list(path), group)
        found += [path.parent / suite for suite in chosen.suites]
    if group is not None and not lists:
        raise SuiteError(f"--group {group}: has no effect without a list of suites; give one, such as {EXAMPLE}")
    return found


def load_list(path: Path) -> NightlyList:
    """The list in the TOML file at `path`; SuiteError with one line a mistake."""
    mistakes = Mistakes(path)
    found = mistakes.parse(NightlyList, read_toml(path, what="list of suites", example=EXAMPLE), "")
    if found is None:
        raise SuiteError("\n".join(mistakes.found))
    assert isinstance(found, NightlyList)
    for index, group in enumerate(found.group):
        where = f"{path}: group[{index}]"
        if group.name in [other.name for other in found.group[:index]]:
            raise SuiteError(f"{where}.name: {group.name}: another group is named so; name each once")
        for suite in group.suites:
            if not (path.parent / suite).is_file():
                raise SuiteError(f"{where}.suites: {suite}: there is no such file beside the list ({path.parent / suite})")
            if group.suites.count(suite) > 1:
                raise SuiteError(f"{where}.suites: {suite}: named twice; a night runs a suite once")
        try:
            cluster_of(group.gpu, group.count, group.nodes)
        except SuiteError as error:
            raise SuiteError(f"{where}: {str(error).replace('--', '')}") from None
    return found


def _is_list(path: Path) -> bool:
    """Whether a file is a list; one that cannot be read is left to the night, which tells it as the mistake of one suite."""
    try:
        content: dict[str, Any] = read_toml(path, what="suite", example="suites/quickstart.toml")
    except SuiteError:
        return False
    return "group" in content and "model" not in content


def _chosen(path: Path, found: NightlyList, name: str | None) -> Group:
    """The group of that name, or the only one."""
    named = [group for group in found.group if name in (group.name, None)]
    if len(named) == 1:
        return named[0]
    listed = "; ".join(f"{group.name} ({len(group.suites)} suites, {group.machine})" for group in found.group)
    given = "a night takes one group: give --group" if name is None else f"--group {name}: there is no such group"
    raise SuiteError(f"{path}: {given}. Groups: {listed}")
