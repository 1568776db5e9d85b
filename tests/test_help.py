"""What `--help` prints is what was written: sections of a suite in brackets are no markup."""

import re

import pytest
import typer
from typer.testing import CliRunner

from harness.cli import app

GROUP = typer.main.get_command(app)
COMMANDS = [[name] for name, command in GROUP.commands.items() if not hasattr(command, "commands")]
COMMANDS += [[name, inner] for name, command in GROUP.commands.items() for inner in getattr(command, "commands", ())]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_brackets_in_a_help_are_printed(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    found = GROUP
    for name in command:
        found = found.commands[name]
    texts = [found.help or "", *(getattr(parameter, "help", None) or "" for parameter in found.params)]
    written = [name for text in texts for name in re.findall(r"\[[a-z_.]+\]?", text.replace("\\[", "["))]
    printed = CliRunner().invoke(app, [*command, "--help"]).output
    assert [name for name in written if name not in printed] == []
    if command == ["plan"]:
        assert {"[gate]", "[quantization]"} <= set(written)
