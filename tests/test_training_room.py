"""What a training leaves on the GPU before it begins."""

from types import SimpleNamespace

import pytest

from harness import training


@pytest.mark.parametrize(("loss", "lets_go"), [("ce", True), ("kl", False)])
def test_a_training_without_a_teacher_lets_go_of_the_model_on_the_gpu(tmp_path, monkeypatch, loss, lets_go):
    settings = SimpleNamespace(validate_every=None, packing=False, select="last", checkpoint_every=10, candidates=1)
    stage = SimpleNamespace(
        key="k",
        variant=SimpleNamespace(training=settings),
        quantization=SimpleNamespace(scale_rule="amax"),
        sections={"objective": {"loss": loss}},
    )
    said = []
    bench = SimpleNamespace(
        fresh_student=lambda *given: ({"modules": {}, "model": None}, None),
        require_start=lambda *given: None,
        keep_teacher_alone=lambda stage: said.append("kept the teacher"),
        teacher=lambda stage: said.append("teacher"),
        make_room=lambda: said.append("made room"),
        store=SimpleNamespace(unfinished=tmp_path),
    )
    monkeypatch.setattr(training, "_run_settings", lambda *given: None)
    monkeypatch.setattr(training.distill, "train", lambda *given, **named: said.append("train") or (None, SimpleNamespace()))
    with pytest.raises(AttributeError):  # of what would follow a training
        training._distil(bench, stage, [], training._Watcher(None))
    assert said == ["kept the teacher", "made room" if lets_go else "teacher", "train"]
