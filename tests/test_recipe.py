"""What a recipe matches, and what it refuses."""

import pytest
import torch
from torch import nn

from qad.errors import RecipeError
from qad.recipe import Recipe, match


class Block(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
            setattr(self, name, nn.Linear(width, width, bias=False))


class Model(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(width), Block(width)])
        self.embed = nn.Embedding(40, width)
        self.lm_head = nn.Linear(width, 40, bias=False)
        self.lm_head.weight = self.embed.weight

    def get_input_embeddings(self) -> nn.Module:
        return self.embed


def test_siblings_that_are_served_fused_form_one_group():
    groups = {group.name: group.members for group in match(Model(), Recipe()).groups}
    assert groups["layers.0.qkv_proj"] == ("layers.0.q_proj", "layers.0.k_proj", "layers.0.v_proj")
    assert groups["layers.1.gate_up_proj"] == ("layers.1.gate_proj", "layers.1.up_proj")
    assert groups["layers.1.down_proj"] == ("layers.1.down_proj",)
    assert match(Model(), Recipe()).excluded == ("lm_head",)


def test_a_pattern_that_matches_nothing_is_refused_with_near_names():
    with pytest.raises(RecipeError, match=r'"lm_haed" matches no linear layer.*lm_head'):
        match(Model(), Recipe(exclude=("lm_haed",)))


def test_a_recipe_that_splits_a_fused_group_is_refused():
    with pytest.raises(RecipeError, match=r"layers\.0\.qkv_proj: the recipe splits.*layers\.0\.k_proj"):
        match(Model(), Recipe(exclude=("lm_head", "layers.0.k_proj")))


def test_a_whole_fused_group_may_be_excluded():
    targets = match(Model(), Recipe(exclude=("lm_head", "layers.0.[qkv]_proj")))
    assert "layers.0.qkv_proj" not in {group.name for group in targets.groups}


def test_a_width_that_is_no_multiple_of_16_is_named_with_the_advice_to_exclude_it():
    with pytest.raises(RecipeError, match=r'layers\.0\.q_proj: input width 40.*add "layers\.0\.q_proj" to exclude'):
        match(Model(width=40), Recipe())


def test_a_tied_output_head_must_stay():
    with pytest.raises(RecipeError, match="lm_head: shares its weight with the embedding"):
        match(Model(), Recipe(exclude=()))


def test_a_recipe_that_quantizes_nothing_is_refused():
    with pytest.raises(RecipeError, match="leaves no linear layer"):
        match(Model(), Recipe(exclude=("*",)))


def test_experts_as_a_3d_parameter_are_refused_and_a_convolution_is_not_mistaken_for_them():
    model = Model()
    model.conv = nn.Conv1d(32, 32, 4)
    match(model, Recipe())
    model.experts = nn.Module()
    model.experts.up_proj = nn.Parameter(torch.zeros(4, 32, 32))
    with pytest.raises(
        RecipeError, match=r"experts: experts held as 3-D parameters of a kind .* \(Module: holds 3-D parameters and is no"
    ):
        match(model, Recipe())


def test_headroom_must_be_positive():
    with pytest.raises(RecipeError, match="headroom"):
        Recipe(headroom=0.0)
