"""Rates, groups and optimizers against closed forms and torch's own."""

import math

import pytest
import torch
from torch import nn

from qad.errors import TrainingError, memory_asked_for
from qad.optimization import LrGroup, Optimization


def parameters():
    generator = torch.Generator().manual_seed(0)
    names = ["layers.0.up.weight", "layers.0.down.weight", "layers.1.up.weight", "norm.weight"]
    return {name: nn.Parameter(torch.randn(8, 16, generator=generator)) for name in names}


def step_with(optimizer, named, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in named.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()


def test_the_linear_schedule_warms_up_to_its_rate_and_falls_by_the_same_amount_each_step():
    linear = Optimization(lr=2.0, warmup_steps=4)
    found = [linear.lr_at(step, 10) for step in range(10)]
    assert found == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0, 2 * 5 / 6, 2 * 4 / 6, 1.0, 2 * 2 / 6, 2 / 6])


def test_the_cosine_schedule_is_half_a_wave_over_the_steps_after_the_warm_up():
    cosine = Optimization(lr=2.0, schedule="cosine", warmup_steps=2)
    found = [cosine.lr_at(step, 12) for step in range(12)]
    assert found[:2] == pytest.approx([1.0, 2.0])
    for t, rate in enumerate(found[2:]):
        assert rate == pytest.approx(1 + math.cos(math.pi * t / 10))
    assert found[7] == pytest.approx(1.0) and 0 < found[-1] < 0.06


def test_the_constant_schedule_stays_and_without_a_warm_up_the_first_rate_is_the_whole():
    constant = Optimization(lr=1.0, schedule="constant", warmup_steps=2)
    assert [constant.lr_at(step, 5) for step in range(5)] == [0.5, 1.0, 1.0, 1.0, 1.0]
    for schedule in ("linear", "cosine", "constant"):
        assert Optimization(lr=3.0, schedule=schedule, warmup_steps=0).lr_at(0, 7) == pytest.approx(3.0)


def test_a_warm_up_longer_than_the_run_never_reaches_its_rate():
    assert [Optimization(lr=1.0, warmup_steps=5).lr_at(step, 2) for step in range(2)] == [0.2, 0.4]


def test_the_first_group_that_matches_sets_a_rate_and_the_schedule_scales_all_of_them():
    named = parameters()
    groups = (LrGroup("layers.0.*", 0.1), LrGroup("*.up.weight", 0.01))
    optimization = Optimization(lr=1.0, schedule="constant", warmup_steps=4, lr_groups=groups)
    optimizer = optimization.build(named)
    assert optimization.set_rates(optimizer, 1, 10) == 0.5
    rates = {id(parameter): group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
    found = {name: rates[id(parameter)] for name, parameter in named.items()}
    assert found == pytest.approx(
        {"layers.0.up.weight": 0.05, "layers.0.down.weight": 0.05, "layers.1.up.weight": 0.005, "norm.weight": 0.5}
    )
    before = {name: parameter.detach().clone() for name, parameter in named.items()}
    step_with(optimizer, named, 1)
    for name, parameter in named.items():  # the first step of Adam is lr times the sign
        assert float((parameter.detach() - before[name]).abs().median()) == pytest.approx(found[name], rel=1e-3)


def test_a_group_that_matches_nothing_is_refused_with_names_to_choose_from():
    with pytest.raises(TrainingError, match=r'lr_groups: "layers.9.\*" matches none of the 4 .*like layers.0.up.weight'):
        Optimization(lr=1.0, lr_groups=(LrGroup("layers.9.*", 0.1),)).build(parameters())
    with pytest.raises(
        TrainingError, match=r'"layers.0.up.weight" matches none of the 4 trained parameters that an earlier group'
    ):
        Optimization(lr=1.0, lr_groups=(LrGroup("layers.*", 0.1), LrGroup("layers.0.up.weight", 0.2))).build(parameters())


def test_groups_that_cover_everything_leave_no_empty_group():
    optimizer = Optimization(lr=1.0, lr_groups=(LrGroup("*", 0.1),)).build(parameters())
    assert [group["lr"] for group in optimizer.param_groups] == [0.1]


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.8, 0.99)])
def test_adamw_moves_parameters_as_its_definition_does(betas, weight_decay):
    named = parameters()
    x = {name: parameter.detach().double() for name, parameter in named.items()}
    m, v = ({name: torch.zeros_like(value) for name, value in x.items()} for _ in range(2))
    optimization = Optimization(lr=0.01, schedule="linear", warmup_steps=2, betas=betas, weight_decay=weight_decay)
    optimizer = optimization.build(named)
    for step in range(5):
        lr = optimization.set_rates(optimizer, step, 5)
        step_with(optimizer, named, step)
        for name, parameter in named.items():
            g = parameter.grad.double()
            m[name] = betas[0] * m[name] + (1 - betas[0]) * g
            v[name] = betas[1] * v[name] + (1 - betas[1]) * g * g
            corrected = m[name] / (1 - betas[0] ** (step + 1)), v[name] / (1 - betas[1] ** (step + 1))
            x[name] = x[name] * (1 - lr * weight_decay) - lr * corrected[0] / (corrected[1].sqrt() + 1e-8)
    for name, parameter in named.items():
        assert torch.allclose(parameter.double(), x[name], rtol=1e-6, atol=1e-6)


def test_adafactor_is_torchs_own_and_keeps_a_row_and_a_column_of_state():
    named, twins = parameters(), parameters()
    optimization = Optimization(lr=0.01, schedule="constant", warmup_steps=2, optimizer="adafactor", weight_decay=0.1)
    ours = optimization.build(named)
    theirs = torch.optim.Adafactor(list(twins.values()), lr=0.01, weight_decay=0.1)
    for step in range(4):
        theirs.param_groups[0]["lr"] = optimization.set_rates(ours, step, 4)
        step_with(ours, named, step)
        step_with(theirs, twins, step)
    for name in named:
        assert torch.equal(named[name], twins[name])
        numbers = sum(value.numel() for value in ours.state[named[name]].values())
        assert numbers == 8 + 16 + 1 < named[name].numel() / 5


def test_adafactor_over_several_ranks_is_refused(monkeypatch):
    Optimization(lr=1.0, optimizer="adafactor").require_shareable()
    monkeypatch.setattr("qad.optimization.ranks.world_size", lambda: 2)
    Optimization(lr=1.0).require_shareable()
    with pytest.raises(TrainingError, match=r'optimizer = "adafactor" does not work over 2 ranks: .*use "adamw"'):
        Optimization(lr=1.0, optimizer="adafactor").require_shareable()


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_weight_decay_shrinks_weights_and_never_block_scales(optimizer):
    named = {name: torch.nn.Parameter(torch.full((2, 2), 8.0)) for name in ("a.weight", "a.block_scale")}
    made = Optimization(lr=0.1, weight_decay=0.5, optimizer=optimizer).build(named)
    for parameter in named.values():
        parameter.grad = torch.zeros_like(parameter)
    made.step()
    assert bool((named["a.weight"] < 8.0).all())
    assert torch.equal(named["a.block_scale"].detach(), torch.full((2, 2), 8.0))


def test_only_what_an_allocator_says_is_taken_for_too_little_memory():
    with pytest.raises(RuntimeError) as refused:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert "allocate memory" in memory_asked_for(refused.value)
    assert memory_asked_for(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")).endswith("2 GiB")
    assert memory_asked_for(MemoryError()) == "MemoryError"
    assert memory_asked_for(RuntimeError("shapes do not fit")) is None
