"""Reading a TOML file, with its errors. The only TOML parser of the project."""

from __future__ import annotations

import difflib
import re
import tomllib
from pathlib import Path
from typing import Any

from harness.errors import SuiteError


def read_toml(path: Path, *, what: str, example: str) -> dict[str, Any]:
    """The content of the file at `path`; SuiteError that says what is wrong with it, and `what` it should be."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.toml")], n=1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else f"; give the path of a TOML file, such as {example}"
        raise SuiteError(f"{path}: there is no such {what}{hint}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SuiteError(f"{path}: not TOML: {error}{_repeated_key(path, str(error))}") from None
    except OSError as error:
        raise SuiteError(f"{path}: cannot be read: {error.strerror}; a {what} is a TOML file") from None


def _repeated_key(path: Path, message: str) -> str:
    """The line of a key that is there already, which the parser calls a value that cannot be overwritten."""
    found = re.match(r"Cannot overwrite a value \(at line (\d+)", message)
    if found is None:
        return ""
    key = path.read_text(encoding="utf-8").splitlines()[int(found.group(1)) - 1].partition("=")[0].strip()
    return f': "{key}" is there twice; remove one'
