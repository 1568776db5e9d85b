"""Ask engines that know the answers every question of the benchmarks, through prompt, extraction and scoring, and print what they score.

    HARNESS_MIRROR=… python bench/oracle.py [--tasks math500 aime24 gsm8k gpqa_diamond]

An oracle gives the gold answer in a box; then the same after a thought of more than 2,000 tokens with wrong boxes in it; one engine gives
an answer that is wrong; one begins to think and never ends, with the gold answer in its thought. GPQA's rows are made up, as many as the
real ones. Oracles' answers that do not score are printed. Minutes; no model.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
TASKS = ("math500", "aime24", "gsm8k", "gpqa_diamond")
COLUMNS = ("task", "engine", "scored", "score", "incomplete", "other metrics")


def campaign(folder: Path, tasks: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """A row of the table an engine and task; `folder` is empty and takes the mirror, the tokenizer and the journals."""
    sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]
    from conftest import build_tiny_model
    from transformers import AutoTokenizer

    from harness.engines.scripted import ScriptedEngine
    from harness.task_files import metadata_of
    from tests import asking
    from tests.oracles import THINKING, boxed, made_up_gpqa, thinking, wrong

    engines = {
        "oracle": (boxed, None),
        "oracle that thinks": (lambda doc: thinking(boxed(doc)), THINKING),
        "wrong": (wrong, None),
        "never ends its thought": (lambda doc: f"<think>so {boxed(doc)}", THINKING),
    }
    _link_mirror(folder / "mirror")
    made_up_gpqa(folder / "mirror", 198)
    tokenizer = AutoTokenizer.from_pretrained(build_tiny_model(folder / "model"))
    for name in tasks:
        if not (folder / "mirror" / str(metadata_of(name)["dataset"])).is_dir():
            print(f"{name}: not asked, its set is not in the mirror (HARNESS_MIRROR)")
            continue
        prepared = asking.prepare(asking.task(name), tokenizer)
        docs = {ask.prompt: prepared.questions[ask.doc].fields for ask in prepared.asks}
        for label, (respond, markers) in engines.items():
            engine = ScriptedEngine(tokenizer, lambda prompt, r=respond, d=docs: r(d[prompt]), context_length=100_000)
            found = asking.evaluate(name, engine, folder / name / label, prepared=prepared, thinking=markers)
            primary = found.result["primary"]
            metrics = found.result["metrics"]
            others = ", ".join(f"{metric} {each['value']:.2%}" for metric, each in metrics.items() if metric != primary)
            scored = f"{metrics[primary]['n_scored']}/{metrics[primary]['n_total']}"
            yield name, label, scored, f"{metrics[primary]['value']:.2%}", f"{found.result['incomplete_rate']:.2%}", others
            for sample in found.samples if label.startswith("oracle") else ():
                if sample["metrics"][primary] != 1.0:
                    print(f"{name}, question {sample['doc']}: gold {sample['target']!r} scores {sample['metrics']}")


def _link_mirror(folder: Path) -> None:
    """A mirror of the real sets, into which the made-up one is written, takes the place of the given one."""
    given = os.environ.get("HARNESS_MIRROR")
    folder.mkdir()
    for path in Path(given).expanduser().resolve().iterdir() if given else ():
        if path.name != "Idavidrein":
            (folder / path.name).symlink_to(path)
    os.environ["HARNESS_MIRROR"] = str(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", default=TASKS, choices=TASKS)
    chosen = tuple(parser.parse_args().tasks)
    os.environ["TQDM_DISABLE"] = os.environ["HF_HUB_OFFLINE"] = "1"
    widths = (13, 23, 10, 8, 11, 0)
    with tempfile.TemporaryDirectory() as folder:
        print("".join(cell.ljust(width) for cell, width in zip(COLUMNS, widths, strict=True)))
        for row in campaign(Path(folder), chosen):
            print("".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)), flush=True)


if __name__ == "__main__":
    main()
