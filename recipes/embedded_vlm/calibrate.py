"""How the share of specks decides what the trained model reads: python -m recipes.embedded_vlm.calibrate build/embedded_vlm/model

For each task and share, the accuracy on held-out pictures of another seed than the tasks'. None is a picture of a task; many charts and
some scenes tell what one of a task tells (docs/tasks.md). From its table the shares of
`harness.tasks.drawing_kinds.EVALUATED` were chosen: well above blind, below ceiling.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoTokenizer, Idefics3ForConditionalGeneration

from harness.tasks.drawing_kinds import EVALUATED
from harness.tasks.drawings import Difficulty
from harness.tasks.mini_pictures import rows
from recipes.embedded_vlm.batches import Encoder
from recipes.embedded_vlm.train import VALIDATION_SEED, accuracies

SHARES = (0.0, 0.1, 0.2, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--pictures", type=int, default=150, help="of each task and share")
    options = parser.parse_args()
    model = Idefics3ForConditionalGeneration.from_pretrained(options.model, dtype=torch.bfloat16)
    encoder = Encoder(AutoTokenizer.from_pretrained(options.model))
    for share in SHARES:
        difficulty = Difficulty(specks=(share, share))
        asked = {task: rows(task, n=options.pictures, seed=VALIDATION_SEED, difficulty=difficulty) for task in EVALUATED}
        found = accuracies(model, encoder, asked)
        print(share, {task: (round(each["seeing"], 3), round(each["blind"], 3)) for task, each in found.items()}, flush=True)


if __name__ == "__main__":
    main()
