"""Fetch the two libraries of the leaderboard's page anew: `make vendor`, which needs npm; using or testing the site does not.

Writes harness/leaderboard/assets/vendor/: the files below, as they are in the packages, and libraries.json with version, licence, source and
digest of each. To update, change a version here, run it, look at the page, and commit both.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import tarfile
import tempfile
from pathlib import Path

VENDOR = Path(__file__).parent.parent / "harness" / "leaderboard" / "assets" / "vendor"
LIBRARIES = [
    {
        "name": "datatables.net",
        "version": "3.1.5",
        "what": "sorting, searching and paging of tables",
        "files": {"js/dataTables.min.js": "datatables.js", "License.txt": "datatables.LICENSE.txt"},
    },
    {
        "name": "uplot",
        "version": "1.6.32",
        "what": "charts",
        "files": {"dist/uPlot.iife.min.js": "uplot.js", "dist/uPlot.min.css": "uplot.css", "LICENSE": "uplot.LICENSE.txt"},
    },
]


def main() -> None:
    """Replace the vendored files."""
    VENDOR.mkdir(parents=True, exist_ok=True)
    for path in VENDOR.iterdir():
        path.unlink()
    record = {"schema": 1, "libraries": [fetch(library) for library in LIBRARIES]}
    (VENDOR / "libraries.json").write_text(json.dumps(record, indent=1) + "\n")


def fetch(library: dict) -> dict:
    """Unpack one package and say what was taken from it."""
    with tempfile.TemporaryDirectory() as folder:
        wanted = f"{library['name']}@{library['version']}"
        packed = subprocess.run(["npm", "pack", "--json", wanted], cwd=folder, check=True, capture_output=True, text=True)
        about = json.loads(packed.stdout)
        about = about[0] if isinstance(about, list) else next(iter(about.values()))
        digests = {}
        with tarfile.open(Path(folder) / about["filename"]) as package:
            manifest = json.loads(package.extractfile("package/package.json").read())
            for source, name in library["files"].items():
                content = package.extractfile(f"package/{source}").read()
                (VENDOR / name).write_bytes(content)
                digests[name] = {"source": source, "sha256": hashlib.sha256(content).hexdigest()}
    return {
        "name": library["name"],
        "version": manifest["version"],
        "licence": manifest["license"],
        "what": library["what"],
        "package": {"registry": "npm", "integrity": about["integrity"]},
        "files": digests,
    }


if __name__ == "__main__":
    main()
