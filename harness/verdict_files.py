"""Verdicts for people and machines: terminal, verdict.json, JUnit XML, Markdown; all from the one record of `gate.as_record`. No torch.

JUnit: a suite a candidate, with a first case "verdict" that is red unless the candidate is GO, so that no reader of the XML alone can take
INCONCLUSIVE for green. FAIL is a failure; what is INCONCLUSIVE and in the way of GO is an error; what decides nothing is skipped.
"""

from __future__ import annotations

import contextlib
import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from harness.store import disk_errors, make_folder, write_text

FILES = ("verdict.json", "verdict.xml", "verdict.md")
_COLOURS = {"GO": "green", "PASS": "green", "NO-GO": "red", "FAIL": "red", "INCONCLUSIVE": "yellow"}
_NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def remove_verdicts(folder: Path) -> None:
    """Remove the files of an earlier verdict."""
    with disk_errors(f"the folder {folder}"):
        for name in FILES:
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                (folder / name).unlink()


def write_verdicts(record: dict[str, Any], folder: Path) -> list[Path]:
    """Write the three files into `folder`, which is made if it is missing."""
    made = (json.dumps(record, indent=1, sort_keys=True, allow_nan=False) + "\n", junit(record), markdown(record))
    paths = [folder / name for name in FILES]
    make_folder(folder, "the folder of the verdict")
    with disk_errors(f"the folder {folder}"):
        for path, text in reversed(
            list(zip(paths, made, strict=True))
        ):  # what machines read last: it is there only with the others
            write_text(path, text)
    return paths


def markdown(record: dict[str, Any]) -> str:
    """For a pull request or a step summary."""
    lines = [
        f"## {_cell(record['suite'])}: {record['verdict']}",
        "",
        f"Run {_cell(record['run'])}, policy: {_cell(_source(record))}.",
    ]
    for each in record["candidates"]:
        lines += [
            "",
            f"### {_cell(each['candidate'])} against {_cell(each['baseline'] or 'no baseline')}: {each['verdict']}",
            "",
        ]
        lines += [f"- {_cell(reason)}" for reason in each["reasons"]]
        lines += ["", "| check | tier | verdict | why |", "| --- | --- | --- | --- |"]
        lines += [
            f"| {_cell(check['name'])} | {check['tier']} | {check['verdict']} | {_cell('; '.join(check['reasons']))} |"
            for check in each["checks"]
        ]
        if each["not_in_policy"]:
            lines += ["", f"Not in the policy: {_cell(', '.join(each['not_in_policy']))}."]
    return "\n".join(lines) + "\n"


def junit(record: dict[str, Any]) -> str:
    """JUnit XML, as Jenkins, GitLab and the reporters of GitHub Actions read it."""
    root = ElementTree.Element("testsuites", name=_xml(f"harness gate {record['suite']}"))
    for each in record["candidates"]:
        name = _xml(f"{record['suite']}.{each['candidate']}")
        suite = ElementTree.SubElement(root, "testsuite", name=name)
        counts = {"tests": 1 + len(each["checks"]), "failures": 0, "errors": 0, "skipped": 0}
        _case(suite, name, "verdict", _outcome(each["verdict"]), each["verdict"], each["reasons"], counts)
        for check in each["checks"]:
            outcome = _outcome_of_check(check)
            _case(suite, name, f"{check['name']} ({check['tier']})", outcome, check["verdict"], check["reasons"], counts)
        for key, count in counts.items():
            suite.set(key, str(count))
    for key in ("tests", "failures", "errors", "skipped"):
        root.set(key, str(sum(int(suite.get(key, "0")) for suite in root)))
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def print_verdicts(record: dict[str, Any], console: Console) -> None:
    """Each candidate: the verdict, why, and its checks."""
    for each in record["candidates"]:
        table = Table(
            title=f"{record['suite']} {record['run']}: {each['candidate']} against {each['baseline']}", title_justify="left"
        )
        for column in ("check", "tier", "verdict", "why"):
            table.add_column(column, overflow="fold", no_wrap=column in ("tier", "verdict"))
        for check in each["checks"]:
            why = Text("; ".join(check["reasons"]))
            table.add_row(Text(check["name"]), check["tier"], Text(check["verdict"], _COLOURS[check["verdict"]]), why)
        console.print(table)
        if each["not_in_policy"]:
            console.print(Text(f"Not in the policy: {', '.join(each['not_in_policy'])}."))
        console.print(Text(f"{each['candidate']}: {each['verdict']}", f"bold {_COLOURS[each['verdict']]}"))
        for reason in each["reasons"]:
            console.print(Text(f"- {reason}"))
    console.print(Text(f"Policy: {_source(record)}. Verdict: {record['verdict']}"))


def _source(record: dict[str, Any]) -> str:
    source = record["policy"]["source"]
    return "[gate] of the suite" if source == "suite" else str(source)


def _outcome(verdict: str) -> str | None:
    return {"GO": None, "PASS": None, "NO-GO": "failure", "FAIL": "failure"}.get(verdict, "error")


def _outcome_of_check(check: dict[str, Any]) -> str | None:
    """What decides nothing is skipped, not red: advisory checks, and supporting ones that were measured and are open."""
    decides = (
        check["tier"] == "critical"
        or (check["tier"] == "supporting" and not check["has_evidence"])
        or check["verdict"] == "FAIL"
    )
    outcome = _outcome(check["verdict"])
    return outcome if outcome is None or (decides and check["tier"] != "advisory") else "skipped"


def _case(
    suite: ElementTree.Element,
    of: str,
    name: str,
    outcome: str | None,
    verdict: str,
    reasons: list[str],
    counts: dict[str, int],
) -> None:
    case = ElementTree.SubElement(suite, "testcase", classname=of, name=_xml(name), time="0")
    text = _xml("\n".join(reasons))
    if outcome is None:
        ElementTree.SubElement(case, "system-out").text = text
        return
    counts[{"failure": "failures", "error": "errors", "skipped": "skipped"}[outcome]] += 1
    message = _xml(f"{verdict}: {reasons[0]}" if reasons else verdict)
    found = ElementTree.SubElement(case, outcome, message=message)
    if outcome != "skipped":
        found.set("type", verdict)
    found.text = text


def _xml(text: str) -> str:
    """Text without the characters that no XML may hold."""
    return _NOT_XML.sub("�", text)


def _cell(value: Any) -> str:
    """Text that stays in its cell or line and is no markup: names come from models and data."""
    plain = re.sub(r"\s+", " ", str(value))
    return re.sub(r"([\\`*_\[\]<>|#~])", r"\\\1", plain).replace("@", "@\u200b")
