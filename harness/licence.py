"""The licence of a base model, from what lies in its folder. It is found or it is not; nothing is concluded from a name. No torch."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NOT_FOUND = "the base's licence, not found: fill in"
_TEXTS = (
    ("apache-2.0", r"Apache License\s+Version 2\.0"),
    (
        "mit",
        r"\AThe MIT License|\AMIT License|Permission is hereby granted, free of charge, to any person obtaining a copy of this software",
    ),
)
"""Hub identifiers of licences whose texts have one wording."""


@dataclass(frozen=True)
class Licence:
    """id: as the hub calls it ("other" where it has no name for it). found_in: the file that says so."""

    id: str
    name: str | None
    link: str | None
    found_in: str


def find_licence(folders: Sequence[Path]) -> Licence | None:
    """What the first of the folders says that says something: the front matter of a README, a licence file, config.json."""
    for folder in folders:
        for find in (_in_readme, _in_text, _in_config):
            found = find(folder)
            if found is not None:
                return found
    return None


def front_matter(readme: Path) -> dict[str, Any]:
    """The metadata at the top of a model card; empty where there are none, or none that can be read."""
    import yaml

    found = re.match(r"\s*---\s*\n(.*?)\n---\s*(?:\n|\Z)", readme.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    try:
        value = yaml.safe_load(found.group(1)) if found else None
    except yaml.YAMLError:
        return {}
    return value if isinstance(value, dict) else {}


def _in_readme(folder: Path) -> Licence | None:
    for name in ("BASE_README.md", "README.md"):
        if (folder / name).is_file():
            said = front_matter(folder / name)
            licence = said.get("license")
            if isinstance(licence, str) and licence and licence != "unknown":
                name_of, link = (str(said[key]) if said.get(key) else None for key in ("license_name", "license_link"))
                return Licence(licence, name_of, link, name)
    return None


def _in_text(folder: Path) -> Licence | None:
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.is_file() and re.match(r"(LICEN[CS]E|COPYING)(\.(txt|md))?\Z", path.name, re.IGNORECASE):
            text = path.read_text(encoding="utf-8", errors="replace").strip()
            known = next((identifier for identifier, pattern in _TEXTS if re.search(pattern, text[:4000])), None)
            first = next((line.strip(" #*") for line in text.splitlines() if line.strip(" #*")), None)
            if known is not None or first is not None:
                return Licence(known or "other", None if known else (first or "")[:80], path.name, path.name)
    return None


def _in_config(folder: Path) -> Licence | None:
    try:
        licence = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("license")
    except (OSError, ValueError, AttributeError):
        return None
    return Licence(licence, None, None, "config.json") if isinstance(licence, str) and licence else None
