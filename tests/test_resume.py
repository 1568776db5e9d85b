"""Stopped anywhere and started again, a run ends with the same bits; what is not a whole checkpoint of it is never read."""

import json
import os
import pickle
import resource
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_checks import KL, Recorder, batches_for, losses_of, one_each, quantized, run, same, settings

from qad import resume
from qad.candidates import Candidate, Candidates
from qad.distill import train
from qad.errors import Interrupted, TrainingError
from qad.recipe import Recipe
from qad.resume import Checkpoints

N_STEPS = 5
KINDS = {
    "adamw": ({}, Recipe()),
    "adafactor": ({"optimizer": "adafactor", "lr": 1e-3}, Recipe()),
    "all": ({"train": "all", "schedule": "cosine", "warmup_steps": 2}, Recipe(fp8=("*.down_proj",))),
    "learned": ({"learned_scales": True}, Recipe(scale_rule="mse", block_scales="learned")),
    "scales": ({"train": "scales", "learned_scales": True}, Recipe(block_scales="learned")),
    "frozen": ({}, Recipe(scale_rule="four_over_six", block_scales="frozen")),
}


def go(tiny_model, folder, kind="adamw", *, stop_after=None, every=1, identity="this run", steps=N_STEPS):
    """Train with checkpoints and three candidates; (training, masters, candidates)."""
    given, recipe = KINDS[kind]
    candidates = Candidates(folder / "candidates", keep=2)
    training, masters, _ = run(
        tiny_model,
        steps,
        settings(validate_every=2, **given),
        recipe=recipe,
        split=2,
        held_out=batches_for(2, vocabulary=512),
        checkpoints=Checkpoints(folder, identity, every),
        candidates=candidates,
        watcher=Recorder(stop_after),
    )
    return training, masters, candidates


def without_seconds(training):
    return [replace(step, seconds=0.0) for step in training.steps], training.validations


def require_equal(found, expected):
    (training, masters, candidates), (expected_training, expected_masters, expected_candidates) = found, expected
    assert without_seconds(training) == without_seconds(expected_training)
    assert (training.codes_changed, training.trainable) == (expected_training.codes_changed, expected_training.trainable)
    assert masters.named.keys() == expected_masters.named.keys()
    assert all(torch.equal(masters.named[name], expected_masters.named[name]) for name in masters.named)
    assert same(masters.snapshot(), expected_masters.snapshot())
    assert candidates.kept == expected_candidates.kept
    assert all(same(candidates.read(kept), expected_candidates.read(kept)) for kept in candidates.kept)
    files = [sorted(path.name for path in each.folder.iterdir()) for each in (candidates, expected_candidates)]
    assert files[0] == files[1] == sorted(candidates.path(kept).name for kept in candidates.kept)


def test_stopped_after_any_step_and_started_again_a_run_ends_with_the_same_bits(tiny_model, tmp_path):
    whole = go(tiny_model, tmp_path / "whole", every=100)
    assert whole[0].resumed_at is None
    for stop_after in range(1, N_STEPS):
        folder = tmp_path / f"{stop_after}"
        with pytest.raises(
            Interrupted, match=rf"stopped after step {stop_after} of 5; the checkpoint after step {stop_after} is kept"
        ):
            go(tiny_model, folder, stop_after=stop_after, every=100)
        again = go(tiny_model, folder, every=100)
        assert again[0].resumed_at == stop_after
        require_equal(again, whole)


@pytest.mark.parametrize("kind", KINDS)
def test_stopped_after_each_step_it_ends_with_the_same_bits_and_asks_for_nothing_after_the_last(tiny_model, tmp_path, kind):
    whole = go(tiny_model, tmp_path / "whole", kind)
    for stop_after in range(1, N_STEPS):
        with pytest.raises(Interrupted, match=f"the checkpoint after step {stop_after} is kept"):
            go(tiny_model, tmp_path / "parts", kind, stop_after=stop_after, every=100)
    again = go(tiny_model, tmp_path / "parts", kind, stop_after=N_STEPS, every=100)
    assert again[0].resumed_at == N_STEPS - 1
    require_equal(again, whole)


class Killed(BaseException):
    """Ends a run where it stands, as kill -9 does."""


@pytest.mark.parametrize("where", ["save_tensors", "_sha256", "json.dump", "os.rename", "shutil.rmtree"])
def test_killed_while_a_checkpoint_is_written_it_goes_on_from_the_one_before(tiny_model, tmp_path, monkeypatch, where):
    whole = go(tiny_model, tmp_path / "whole")
    calls = []

    def dying(original, lethal):
        def call(*arguments, **options):
            if where == "os.rename" and not Path(arguments[1]).name.startswith("step-"):
                return original(*arguments, **options)  # torch renames files of its own
            calls.append(where)
            if len(calls) == lethal:
                if where in ("save_tensors", "json.dump"):  # half of the work is done
                    original(*arguments, **options)
                raise Killed
            return original(*arguments, **options)

        return call

    module, _, name = where.rpartition(".")
    owner = getattr(resume, module) if module else resume
    lethal = {"_sha256": 5, "shutil.rmtree": 8}.get(where, 3)
    with monkeypatch.context() as patched:
        patched.setattr(owner, name, dying(getattr(owner, name), lethal))
        with pytest.raises(Killed):
            go(tiny_model, tmp_path / "parts")
    again = go(tiny_model, tmp_path / "parts")
    assert again[0].resumed_at in (2, 3)
    require_equal(again, whole)


def stopped(tiny_model, folder, stop_after=3):
    """The folder of the checkpoint that a stopped run left, which is all that it left."""
    with pytest.raises(Interrupted):
        go(tiny_model, folder, stop_after=stop_after)
    (found,) = folder.glob("step-*")
    assert not list(folder.glob(".partial-*"))
    return found


def no_reading(monkeypatch):
    """Make every attempt to read tensors or a pickle of a checkpoint fail."""

    def refuse(*arguments, **options):
        raise AssertionError("a checkpoint that must not be read was read")

    monkeypatch.setattr(resume, "load_tensors", refuse)
    monkeypatch.setattr(pickle, "load", refuse)


def damage(checkpoint, kind):
    state = checkpoint / "state.json"
    record = json.loads(state.read_text())
    (data,) = checkpoint.glob("*.distcp")
    if kind == "a truncated file":
        data.write_bytes(data.read_bytes()[:-100])
    elif kind == "a changed byte":
        content = bytearray(data.read_bytes())
        content[len(content) // 2] ^= 1
        data.write_bytes(content)
    elif kind == "a missing file":
        data.unlink()
    elif kind == "an extra file":
        (checkpoint / "__1_0.distcp").write_bytes(b"more")
    elif kind == "no state":
        state.unlink()
    elif kind == "half a state":
        state.write_text(state.read_text()[:200])
    elif kind == "another identity":
        state.write_text(json.dumps(record | {"identity": "another run"}))
    elif kind == "another version":
        state.write_text(json.dumps(record | {"version": 0}))
    elif kind == "a state of another shape":
        state.write_text(json.dumps(record | {"files": []}))
    elif kind == "no list of files":
        state.write_text(json.dumps({key: value for key, value in record.items() if key != "files"}))
    elif kind == "another digest":
        state.write_text(json.dumps(record | {"files": dict.fromkeys(record["files"], "0" * 64)}))
    elif kind == "not yet renamed":
        checkpoint.rename(checkpoint.with_name(f".partial-{checkpoint.name}"))


DAMAGES = [
    "a truncated file",
    "a changed byte",
    "a missing file",
    "an extra file",
    "no state",
    "half a state",
    "another identity",
    "another version",
    "a state of another shape",
    "no list of files",
    "another digest",
    "not yet renamed",
]


@pytest.fixture(scope="module")
def left(tiny_model, tmp_path_factory):
    """What a run leaves that was stopped after step 3, with the end of one that was not."""
    root = tmp_path_factory.mktemp("left")
    stopped(tiny_model, root / "parts")
    return root / "parts", go(tiny_model, root / "whole")


@pytest.mark.parametrize("kind", DAMAGES)
def test_what_is_not_a_whole_checkpoint_of_this_run_is_never_read_and_the_run_starts_over(
    tiny_model, tmp_path, left, monkeypatch, kind
):
    shutil.copytree(left[0], tmp_path / "parts")
    (checkpoint,) = (tmp_path / "parts").glob("step-*")
    damage(checkpoint, kind)
    no_reading(monkeypatch)
    again = go(tiny_model, tmp_path / "parts", every=100)
    assert again[0].resumed_at is None
    require_equal(again, left[1])


def test_the_checks_of_reading_can_fail(tiny_model, tmp_path, left, monkeypatch):
    shutil.copytree(left[0], tmp_path / "parts")
    no_reading(monkeypatch)
    with pytest.raises(AssertionError, match="must not be read"):
        go(tiny_model, tmp_path / "parts")


class Planted:
    """A pickle of it makes a file when it is opened."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_foreign_pickle_is_never_opened(tiny_model, tmp_path, left):
    shutil.copytree(left[0], tmp_path / "parts")
    (checkpoint,) = (tmp_path / "parts").glob("step-*")
    (checkpoint / ".metadata").write_bytes(pickle.dumps(Planted(tmp_path / "opened")))
    again = go(tiny_model, tmp_path / "parts", every=100)
    assert again[0].resumed_at is None
    assert not (tmp_path / "opened").exists()
    with open(checkpoint.with_name("bait"), "wb") as file:  # the bait does work
        file.write(pickle.dumps(Planted(tmp_path / "opened")))
    pickle.loads((tmp_path / "parts" / "bait").read_bytes()).close()
    assert (tmp_path / "opened").exists()


def test_a_checkpoint_of_another_run_is_left_unread_and_replaced(tiny_model, tmp_path, left):
    shutil.copytree(left[0], tmp_path / "parts")
    with pytest.raises(Interrupted):
        go(tiny_model, tmp_path / "parts", identity="other", stop_after=2)
    assert [path.name for path in (tmp_path / "parts").glob("step-*")] == ["step-000002"]
    assert go(tiny_model, tmp_path / "parts", identity="other")[0].resumed_at == 2


def test_a_checkpoint_that_cannot_be_written_is_an_error_and_the_one_before_stays(tiny_model, tmp_path, left):
    shutil.copytree(left[0], tmp_path / "parts")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(TrainingError, match=r"the checkpoint after step 4 cannot be written \(File too large\); make room"):
            go(tiny_model, tmp_path / "parts")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    again = go(tiny_model, tmp_path / "parts")
    assert again[0].resumed_at == 3
    require_equal(again, left[1])


def test_of_two_checkpoints_the_newest_whole_one_counts(tiny_model, tmp_path, left):
    shutil.copytree(left[0], tmp_path / "parts")
    checkpoints = Checkpoints(tmp_path / "parts", "this run", 1)
    (whole,) = (tmp_path / "parts").glob("step-*")
    later = whole.with_name("step-000004")
    shutil.copytree(whole, later)
    assert checkpoints.latest()[0] == later
    (later / "state.json").unlink()
    assert checkpoints.latest()[0] == whole
    assert Checkpoints(tmp_path / "nowhere", "this run", 1).latest() is None


def test_a_run_whose_candidates_are_gone_starts_over(tiny_model, tmp_path, left):
    shutil.copytree(left[0], tmp_path / "parts")
    shutil.rmtree(tmp_path / "parts" / "candidates")
    again = go(tiny_model, tmp_path / "parts")
    assert again[0].resumed_at is None
    require_equal(again, left[1])


def test_a_nan_loss_says_which_checkpoint_is_kept_and_the_run_goes_on_from_it(tiny_model, tmp_path):
    teacher, student, _, batches = quantized(tiny_model)

    def poison(step):
        if step.step == 2:
            teacher.model.norm.weight.data.fill_(float("nan"))

    checkpoints = Checkpoints(tmp_path, "this run", 2)
    with pytest.raises(
        TrainingError,
        match="step 3: the kl loss of batch 0 is nan; lower lr, or look at that batch; the checkpoint after step 2 is kept, and the "
        "same command goes on from it",
    ):
        train(
            student,
            teacher,
            one_each(batches[:6]),
            settings(),
            objective=KL,
            checkpoints=checkpoints,
            watcher=Recorder(on_step=poison),
        )
    done, masters, _ = run(tiny_model, 6, checkpoints=checkpoints)
    assert done.resumed_at == 2
    plain, expected, _ = run(tiny_model, 6)
    assert losses_of(done) == losses_of(plain)
    assert same(masters.snapshot(), expected.snapshot())


def test_a_parameter_that_never_got_a_gradient_is_resumed_without_a_state(tiny_model, tmp_path):
    runs = {}
    for name in ("whole", "parts"):
        for stop_after in (2, None) if name == "parts" else (None,):
            teacher, student, _, batches = quantized(tiny_model)
            student.idle = torch.nn.Parameter(torch.ones(3))  # such as an expert that no token reached
            given = settings(train="all")
            checkpoints = Checkpoints(tmp_path / name, name, 100)
            arguments = {"objective": KL, "checkpoints": checkpoints, "watcher": Recorder(stop_after)}
            try:
                runs[name] = train(student, teacher, one_each(batches[:4]), given, **arguments)
            except Interrupted:
                continue
    assert runs["parts"][0].resumed_at == 2
    assert same(runs["whole"][1].snapshot(), runs["parts"][1].snapshot())
    assert runs["parts"][1].named["idle"].tolist() == [1.0, 1.0, 1.0]


def test_random_state_is_part_of_a_checkpoint_and_is_json(tiny_model, tmp_path):
    def noisy(module, inputs):
        return (inputs[0] + 0.01 * torch.randn(inputs[0].shape).to(inputs[0].dtype), *inputs[1:])

    found = {}
    for name, stops in (("whole", [None]), ("parts", [2, None])):
        for stop_after in stops:
            teacher, student, _, batches = quantized(tiny_model)
            student.model.layers[0].mlp.register_forward_pre_hook(noisy)
            checkpoints = Checkpoints(tmp_path / name, name, 100)
            try:
                done, _ = train(
                    student,
                    teacher,
                    one_each(batches[:4]),
                    settings(),
                    objective=KL,
                    checkpoints=checkpoints,
                    watcher=Recorder(stop_after),
                )
                found[name] = losses_of(done)
            except Interrupted:
                (state,) = (tmp_path / name).glob("step-*/state.json")
                assert set(json.loads(state.read_text())["random"]["0"]) >= {"cpu"}
                torch.manual_seed(99)
    assert found["parts"] == found["whole"]


def test_only_the_newest_checkpoint_stays_and_it_holds_no_pickle_of_ours(tiny_model, tmp_path):
    go(tiny_model, tmp_path, every=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["candidates", "step-000004"]
    state = json.loads((tmp_path / "step-000004" / "state.json").read_text())
    assert len(state["steps"]) == 4 and state["identity"] == "this run"
    assert sorted(state["files"]) == [".metadata", "__0_0.distcp"]


def offered(tmp_path, losses, keep):
    candidates = Candidates(tmp_path, keep)
    for step, loss in enumerate(losses, start=1):
        candidates.offer(Candidate(loss, step), lambda step=step: {"codes": torch.full((4,), step, dtype=torch.uint8)})
    return candidates


def test_the_lowest_losses_are_kept_the_earlier_of_equals_first(tmp_path):
    candidates = offered(tmp_path, [3.0, 1.0, 2.0, 1.0, 0.5, 9.0], keep=3)
    assert [candidate.step for candidate in candidates.kept] == [5, 2, 4]
    assert [int(candidates.read(candidate)["codes"][0]) for candidate in candidates.kept] == [5, 2, 4]
    assert len(list(tmp_path.iterdir())) == 5  # until a checkpoint knows that the others are not needed
    candidates.prune()
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step-00000{n}.safetensors" for n in (2, 4, 5)]


def test_a_candidate_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
    def half(tensors, path):
        path.write_bytes(b"half")
        raise Killed

    monkeypatch.setattr("qad.candidates.save_file", half)
    with pytest.raises(Killed):
        offered(tmp_path, [1.0], keep=1)
    assert not list(tmp_path.glob("*.safetensors"))


def test_candidates_hold_codes_and_scales_alone(tiny_model, tmp_path):
    _, masters, candidates = go(tiny_model, tmp_path)
    tensors = load_file(candidates.path(candidates.kept[0]))
    assert {tensor.dtype for tensor in tensors.values()} == {torch.uint8}
    weights = sum(module.weight.numel() for module in masters.modules.values())
    assert sum(tensor.numel() for tensor in tensors.values()) == weights // 2 + weights // 16
    assert os.path.getsize(candidates.path(candidates.kept[0])) < 0.7 * weights
