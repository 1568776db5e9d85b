"""Paste the table of the newest finished quickstart run into the README, between its markers: no figure there is typed."""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- quickstart table: begin -->", "<!-- quickstart table: end -->"


def main() -> None:
    runs = sorted((ROOT / "results" / "quickstart").glob("*/run.json"))
    finished = [run for run in runs if json.loads(run.read_text())["status"] == "complete"]
    if not finished:
        sys.exit("results/quickstart holds no finished run; make quickstart first")
    readme = ROOT / "README.md"
    head, rest = readme.read_text().split(BEGIN)
    _, tail = rest.split(END)
    table = (finished[-1].parent / "table.md").read_text()
    readme.write_text(f"{head}{BEGIN}\n{table}{END}{tail}")


if __name__ == "__main__":
    main()
