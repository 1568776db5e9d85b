"""Training of models with experts: it starts at PTQ, idle experts do no harm, what stays stays, runs go on where they stopped."""

from functools import partial

import pytest
import torch

from harness.kept import kept_digests
from qad.batch import Batch
from qad.calibrate import calibrate
from qad.checkpoint import load_checkpoint, write_checkpoint
from qad.distill import Pair, train
from qad.errors import Interrupted
from qad.experts import EXPERT, opened_experts
from qad.masters import Masters
from qad.modules import encoding_digest
from qad.quantize import quantize_model
from qad.recipe import Recipe, match
from qad.resume import Checkpoints
from tests.moe_models import MOE, VOCABULARY, layers_of_experts, moe_folder, never_routed_to
from tests.training_checks import KL, Recorder, batches_for, inputs_of, one_each, settings

LEARNED = Recipe(block_scales="learned")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {model_type: moe_folder(tmp_path_factory.mktemp(model_type), model_type) for model_type in MOE}


def quantized(folder, recipe=None, unrouted=None):
    """Teacher, student, its quantized layers and batches; routers and their biases in the types that loading gives them."""
    recipe = recipe or Recipe()
    teacher, student = (load_checkpoint(folder).model for _ in range(2))
    for model in (teacher, student) if unrouted is not None else ():
        never_routed_to(model, unrouted)
    batches = batches_for(8, vocabulary=VOCABULARY)
    amax = calibrate(teacher, recipe, inputs_of(batches[:4]))
    return teacher, student, quantize_model(student, recipe, amax), batches


def run(folder, steps, given=None, **options):
    teacher, student, modules, batches = quantized(folder)
    training, masters = train(student, teacher, one_each(batches[:steps]), given or settings(), objective=KL, **options)
    return training, masters, modules


@pytest.mark.parametrize("model_type", MOE)
@pytest.mark.parametrize("given", [{}, {"activation_checkpointing": True}])
def test_training_lowers_the_loss_moves_experts_and_leaves_the_rest_bit_for_bit(folders, model_type, given, tmp_path):
    folder = folders[model_type]
    before = load_checkpoint(folder).model
    members = match(before, Recipe()).members
    _, start, _, _ = quantized(folder)
    codes = {name: module.encoding.packed.clone() for name, module in start.named_modules() if name in members}
    teacher, student, modules, batches = quantized(folder)
    done, masters = train(
        student, teacher, one_each(batches[:1] * 8), settings(lr=3e-3, schedule="constant", **given), objective=KL
    )
    assert done.steps[-1].loss < 0.9 * done.steps[0].loss
    assert set(done.trainable) == {f"{name}.weight" for name in members}
    moved = [name for name in members if not torch.equal(modules[name].encoding.packed, codes[name])]
    assert sum(EXPERT.match(name) is not None for name in moved) > 8
    assert kept_digests(student, members) == kept_digests(before, members)
    write_checkpoint(tmp_path / "trained", student, targets=match(before, Recipe()), companions=folder, record={})
    inputs = batches[0].inputs
    with torch.no_grad():
        found = load_checkpoint(tmp_path / "trained").model
        assert torch.equal(found(**inputs).logits, student.eval()(**inputs).logits)
    assert kept_digests(found, members) == kept_digests(before, members)
    masters.close()


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
@pytest.mark.parametrize(("kind", "recipe"), [("quantized", Recipe()), ("all", Recipe()), ("scales", LEARNED)])
@pytest.mark.parametrize("model_type", MOE)
def test_an_expert_that_gets_no_token_in_a_run_keeps_its_codes_and_ends_nothing(folders, model_type, kind, recipe, optimizer):
    teacher, student, modules, batches = quantized(folders[model_type], recipe, unrouted=3)
    layer = layers_of_experts(model_type)[0]
    idle = [module for name, module in modules.items() if name.startswith(f"{layer}.3.")]
    codes = [module.encoding.packed.clone() for module in idle]
    learned = recipe is LEARNED
    given = settings(lr=1e-3, train=kind, learned_scales=learned, optimizer=optimizer)
    done, masters = train(student, teacher, one_each(batches[:3]), given, objective=KL)
    assert len(done.steps) == 3
    assert all(torch.equal(module.encoding.packed, before) for module, before in zip(idle, codes, strict=True))
    assert any(name.startswith(f"{layer}.3.") for name in masters.named)


@pytest.mark.parametrize("model_type", MOE)
def test_gradients_of_idle_experts_are_zero_and_not_missing_however_a_step_is_split(folders, model_type):
    teacher, student, _, batches = quantized(folders[model_type])
    masters = Masters(student, train="quantized")
    row = batches[0].input_ids[:1, :3]
    batch = Batch(row, torch.ones_like(row), torch.ones_like(row).bool())
    loss, _ = Pair(student, teacher, KL)(batch, 2)
    loss.backward()
    assert all(master.grad is not None for master in masters.named.values())
    zero = [name for name, master in masters.named.items() if not master.grad.any()]
    assert zero and all(EXPERT.match(name.removesuffix(".weight")) for name in zero)


@pytest.mark.parametrize("model_type", MOE)
def test_a_stopped_run_goes_on_to_the_same_codes(folders, model_type, tmp_path):
    plain, _, modules = run(folders[model_type], 5)
    checkpoints = Checkpoints(tmp_path / "kept", "one identity", 100)
    with pytest.raises(Interrupted, match="stopped after step 2"):
        run(folders[model_type], 5, checkpoints=checkpoints, watcher=Recorder(2))
    done, _, resumed = run(folders[model_type], 5, checkpoints=checkpoints)
    assert done.resumed_at == 2
    assert [step.loss for step in done.steps] == [step.loss for step in plain.steps]
    assert encoding_digest(resumed) == encoding_digest(modules)


def test_layers_are_traced_for_compilation_with_experts_outside_and_train_the_same(folders, monkeypatch):
    plain, _, _ = run(folders["qwen3_moe"], 2)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # traced as ever, generated code left out
    done, _, _ = run(folders["qwen3_moe"], 2, settings(compile=True))
    assert [s.loss for s in done.steps] == [s.loss for s in plain.steps]


def test_every_expert_of_a_model_on_disk_is_opened_for_training(folders):
    model = load_checkpoint(folders["nemotron_h"]).model
    assert all(not experts.training for experts in opened_experts(model).values())
    assert all(experts.training for experts in opened_experts(model.train()).values())
