"""What takes much of a GPU finds it free: the run lets go of the models that it holds there, and never holds an export twice."""

from types import SimpleNamespace

import pytest
import torch

from harness import stages
from harness.load_back import load_back
from harness.plan import make_plan
from harness.progress import Reporter
from harness.stages import Workbench
from harness.store import Store
from harness.suite import load_suite
from qad.batch import Batch


@pytest.fixture
def loaded(tiny_suite, tmp_path, monkeypatch):
    """A workbench with a model in memory, on what it takes for a machine with a GPU; whatever it does ends at once."""

    def make(engine):
        monkeypatch.setattr(stages.evaluation, "answer", lambda bench, stage, folder: {"held": list(bench._loaded)})
        monkeypatch.setattr(Workbench, "_quantize", lambda bench, stage, folder: {"held": list(bench._loaded)})
        monkeypatch.setattr(stages.diagnostics, "diagnose", lambda bench, stage, folder: {"held": list(bench._loaded)})
        text = tiny_suite.read_text()
        start = text.index("[engine]")
        tiny_suite.write_text(text[:start] + engine + text[text.index("[diagnostics]") :])
        store = Store(tmp_path / "cache")
        plan = make_plan(load_suite(tiny_suite), store)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        bench = Workbench(plan, store, tmp_path / "journals", Reporter(None))
        held = {}
        for kind in ("diagnostics", "evaluate", "quantize"):
            bench._loaded["key"] = object()
            held[kind] = bench.run(next(s for s in plan.stages if s.kind == kind), tmp_path)["held"]
        return held

    return make


def test_models_are_let_go_before_vllm_answers_and_not_before_other_stages(loaded):
    assert loaded('[engine]\nkind = "vllm"\nkernels = "w4a4_emulation"\n\n') == {
        "diagnostics": ["key"],
        "evaluate": [],
        "quantize": [],
    }


def test_models_stay_where_the_engine_answers_in_process(loaded):
    assert loaded('[engine]\nkind = "hf"\n\n') == {"diagnostics": ["key"], "evaluate": ["key"], "quantize": []}


def test_a_checkpoint_that_is_read_back_never_meets_the_model_that_it_was_made_of():
    placed = []

    class Placed(torch.nn.Linear):
        def __init__(self, name):
            super().__init__(1, 1)
            torch.nn.init.ones_(self.weight)
            self.name = name

        def to(self, device):
            placed.append(f"{self.name} to {device}")
            return self

        def forward(self, **inputs):
            placed.append(f"{self.name} computes")
            return SimpleNamespace(logits=self.weight)

    def read():
        placed.append("read back")
        return Placed("checkpoint")

    ids = torch.zeros(1, 2, dtype=torch.long)
    batch = Batch(ids, torch.ones_like(ids), torch.ones_like(ids, dtype=torch.bool))
    assert load_back("quantize", Placed("student"), read, batch, torch.device("meta")).name == "checkpoint"
    assert placed == ["student to meta", "student computes", "student to cpu", "read back", "checkpoint computes"]
