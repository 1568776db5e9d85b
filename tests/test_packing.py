"""Packed documents stay apart: changing one changes no logit of another."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from qad import decilm, packing
from qad.calibrate import calibrate
from qad.errors import TrainingError
from qad.experts import open_experts, opened_experts
from qad.packing import PACKABLE, allow_packing, pack, require_packable, row_positions
from qad.quantize import quantize_model
from qad.recipe import Recipe

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
EXPERTS = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
HYBRID = {
    "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp", "linear_attention"],
    "head_dim": 8,
    "mamba_num_heads": 4,
    "mamba_head_dim": 8,
    "n_groups": 2,
    "ssm_state_size": 8,
    "chunk_size": 4,
    "n_routed_experts": 4,
    "moe_shared_expert_intermediate_size": 16,
    **EXPERTS,
}
OF_ITS_OWN = {
    "nemotron-nas": {
        "block_configs": [
            {"attention": {"no_op": True}, "ffn": {"ffn_mult": 1.0}},
            {"attention": {"n_heads_in_group": 2}, "ffn": {"no_op": True}},
        ]
    },
    "nemotron_h": HYBRID,
    "qwen3": {"head_dim": 8},
    "qwen3_moe": {"head_dim": 8, "num_experts": 4, **EXPERTS},
    "mistral": {"head_dim": 8, "sliding_window": 6},
}
ROWS = ((9, 5, 1, 7), (3, 14, 2))
TOKENS = 24
"""Documents of two rows and their tokens; what is left in the second row is padding."""


def tiny(model_type, dtype=torch.float32, **settings):
    sizes = {name: value for name, value in SIZES.items() if (model_type, name) != ("nemotron_h", "num_hidden_layers")}
    torch.manual_seed(0)
    decilm.register()
    config = AutoConfig.for_model(model_type, **(sizes | OF_ITS_OWN.get(model_type, {}) | settings))
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    open_experts(model)  # as what is trained has them
    return model


def tokens(seed=0):
    return torch.randint(1, SIZES["vocab_size"], (len(ROWS), TOKENS), generator=torch.Generator().manual_seed(seed))


def documents():
    """(row, slice) of every document, padding included."""
    for row, lengths in enumerate(ROWS):
        start = 0
        for length in (*lengths, TOKENS - sum(lengths)):
            if length:
                yield row, slice(start, start + length)
            start += length


POSITIONS = torch.stack([row_positions(lengths, TOKENS) for lengths in ROWS])


def packed_logits(model, ids):
    return model(input_ids=ids, position_ids=POSITIONS, use_cache=False).logits.detach()


def leaks(model):
    """Pairs of documents of which changing the first changes a logit of the second; with experts by more than the rounding of sums, since
    an expert multiplies the tokens of all documents at once and how many there are decides how a product is added up."""
    rounding = 1e-5 if opened_experts(model) else 0
    ids, other = tokens(), tokens(seed=1)
    before, found = packed_logits(model, ids), []
    for row, part in documents():
        changed = ids.clone()
        changed[row, part] = other[row, part]
        difference = (packed_logits(model, changed) - before).abs()
        assert float(difference[row, part].max()) > 0.01
        found += [((row, part), to) for to in documents() if to != (row, part) and difference[to].max() > rounding]
    return found


@pytest.mark.parametrize("model_type", sorted(PACKABLE))
def test_changing_a_document_changes_no_logit_of_another(model_type):
    model = tiny(model_type)
    allow_packing(model)
    assert leaks(model) == []


@pytest.mark.parametrize("settings", [{}, {"attn_implementation": "eager"}])
def test_the_perturbation_test_can_fail(settings):
    assert len(leaks(tiny("nemotron_h", **settings))) == 16  # each document leaks into all that follow in its row
    llama, ids = tiny("llama", **settings), tokens()
    changed = ids.clone()
    changed[0, 0] += 1
    logits = [llama(input_ids=x, position_ids=POSITIONS, attention_mask=torch.ones_like(x)).logits for x in (ids, changed)]
    assert (logits[1] - logits[0])[0, ROWS[0][0] :].abs().max() > 0.01


@pytest.mark.parametrize("model_type", sorted(PACKABLE))
def test_a_packed_document_has_the_logits_it_has_alone(model_type):
    model, ids = tiny(model_type), tokens()
    alone = {(row, part.start): model(input_ids=ids[row : row + 1, part], use_cache=False).logits for row, part in documents()}
    allow_packing(model)
    packed = packed_logits(model, ids)
    for row, part in documents():
        assert torch.allclose(packed[row, part], alone[row, part.start][0], rtol=1e-4, atol=1e-4)


def quantized(recipe, model):
    batches = [{"input_ids": tokens(seed), "attention_mask": torch.ones_like(tokens())} for seed in (2, 3)]
    quantize_model(model, recipe, calibrate(model, recipe, batches))
    return model


@pytest.mark.parametrize("kv_cache", [None, "fp8"])
def test_quantized_documents_stay_apart(kv_cache):
    model = quantized(Recipe(kv_cache=kv_cache), tiny("llama", torch.bfloat16))
    assert model.config._attn_implementation == ("sdpa" if kv_cache is None else "qad_kv_cache")
    allow_packing(model)
    assert leaks(model) == []


def test_quantized_mamba_layers_keep_documents_apart():
    model = tiny("nemotron_h", torch.bfloat16, layers_block_type=["linear_attention", "full_attention", "mlp"])
    allow_packing(quantized(Recipe(), model))
    assert leaks(model) == []


def gradients(model, logits):
    """Of a sum that weighs every logit of two documents of the second row."""
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(4))
    (logits * weights)[1, :17].sum().backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    return found


def test_checkpointing_finds_the_borders_again_although_another_forward_pass_came_between():
    model, ids = tiny("nemotron_h").train(), tokens()
    allow_packing(model)
    expected = gradients(model, model(input_ids=ids, position_ids=POSITIONS, use_cache=False).logits)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    calls = []
    logits = model(input_ids=ids, position_ids=POSITIONS, use_cache=False).logits
    model(input_ids=tokens(seed=5), use_cache=False)
    model(input_ids=tokens(seed=6), position_ids=POSITIONS.flip(0), use_cache=False)
    model.model.layers[0].mixer.in_proj.register_forward_hook(lambda module, x, y: calls.append(x[0].shape[:2]))
    found = gradients(model, logits)
    assert len(calls) == 4  # computed again, for the four kinds of length
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_gradients_are_those_of_the_documents_alone_added_up():
    model, ids = tiny("nemotron_h"), tokens()
    weights = torch.randn(len(ROWS), TOKENS, SIZES["vocab_size"], generator=torch.Generator().manual_seed(4))
    for row, part in documents():
        (model(input_ids=ids[row : row + 1, part], use_cache=False).logits[0] * weights[row, part]).sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    allow_packing(model)
    (model(input_ids=ids, position_ids=POSITIONS, use_cache=False).logits * weights).sum().backward()
    for name, gradient in expected.items():
        assert torch.allclose(model.get_parameter(name).grad, gradient, rtol=1e-3, atol=1e-3 * float(gradient.abs().max())), (
            name
        )


def test_rows_that_are_not_packed_are_untouched():
    model, ids = tiny("nemotron_h"), tokens()
    padded, left = torch.ones_like(ids), torch.ones_like(ids)
    padded[1, 15:] = left[1, :9] = 0
    left_positions = (left.cumsum(1) - 1).clamp(min=0)

    def everything():
        yield model(input_ids=ids, use_cache=False).logits
        yield model(input_ids=ids, attention_mask=padded, use_cache=False).logits
        yield model(input_ids=ids, attention_mask=left, position_ids=left_positions, use_cache=False).logits
        yield model(input_ids=ids, position_ids=POSITIONS, use_cache=True).logits
        yield model.generate(ids, attention_mask=left, max_new_tokens=5, do_sample=False)

    before = list(everything())
    allow_packing(model)
    assert all(torch.equal(now, then) for now, then in zip(everything(), before, strict=True))


def test_allowing_twice_is_allowing_once_and_a_copy_computes_with_its_own_weights():
    model, ids = tiny("nemotron_h"), tokens()
    names = list(model.state_dict())
    allow_packing(model)
    allow_packing(model)
    assert list(model.state_dict()) == names
    assert all(len(block._forward_pre_hooks) == (block.block_type == "linear_attention") for block in model.model.layers)
    other = copy.deepcopy(model)
    before = packed_logits(model, ids)
    assert torch.equal(packed_logits(other, ids), before)
    other.model.layers[0].mixer.in_proj.weight.data.zero_()
    assert not torch.equal(packed_logits(other, ids), before)
    assert torch.equal(packed_logits(model, ids), before)
    assert leaks(other) == []


def test_documents_run_together_only_with_those_of_less_than_twice_their_length():
    seen = []
    model = tiny("nemotron_h", layers_block_type=["linear_attention"])
    allow_packing(model)
    model.model.layers[0].mixer.in_proj.register_forward_hook(lambda module, x, y: seen.append(tuple(x[0].shape[:2])))
    packed_logits(model, tokens())
    assert sorted(seen) == [(1, 1), (2, 14), (3, 3), (3, 7)]  # of documents of 9 5 1 7 2 and 3 14 2 5 tokens


def test_compiled_layers_are_not_compiled_anew_for_other_documents():
    model, ids, graphs = tiny("nemotron_h", layers_block_type=["linear_attention", "mlp"]), tokens(), []
    allow_packing(model)
    expected = packed_logits(model, ids)

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    for layer in model.model.layers:
        layer.compile(backend=backend)
    assert torch.allclose(packed_logits(model, ids), expected, rtol=1e-4, atol=1e-4)
    compiled = len(graphs)
    for lengths in ((24, 24), (23, 1), (5, 19)):
        positions = torch.stack([row_positions([length], TOKENS) for length in lengths])
        model(input_ids=ids, position_ids=positions, use_cache=False)
    assert compiled and len(graphs) == compiled


def test_an_architecture_or_an_attention_that_was_not_tested_is_refused():
    known = "llama, mistral, nemotron, nemotron-nas, nemotron_h, qwen2, qwen3, qwen3_moe"
    with pytest.raises(TrainingError, match=f'Gemma.*: model_type "gemma2" is not known .*; known: {known}.*packing = false'):
        require_packable(tiny("gemma2", head_dim=8))
    model = tiny("llama")
    require_packable(model)
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(
        TrainingError, match=r'attention "flash_attention_2" .* known: eager, qad_kv_cache, sdpa\. Load the model'
    ):
        allow_packing(model)


def test_positions_start_again_at_every_document_and_at_the_padding():
    assert row_positions([3, 1, 2], 8).tolist() == [0, 1, 2, 0, 0, 1, 0, 1]
    assert row_positions([3, 1], 4).tolist() == [0, 1, 2, 0]
    with pytest.raises(ValueError, match="a row of 3 tokens cannot hold 4"):
        row_positions([3, 1], 3)


sequences = st.lists(st.integers(1, 64), max_size=120)


@given(sequences, st.integers(64, 200))
def test_every_sequence_is_in_one_row_in_order_and_no_row_overflows(lengths, capacity):
    rows = pack(lengths, capacity)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(row and row == sorted(row) and sum(lengths[index] for index in row) <= capacity for row in rows)
    assert [row[0] for row in rows] == sorted(row[0] for row in rows)


@given(sequences, st.integers(64, 200))
def test_a_row_was_opened_only_when_those_open_were_too_full(lengths, capacity):
    rows = pack(lengths, capacity)
    for number, row in enumerate(rows):
        for earlier in rows[max(0, number - packing.OPEN_ROWS) : number]:
            assert sum(lengths[index] for index in earlier if index < row[0]) + lengths[row[0]] > capacity


@given(sequences, st.integers(64, 200), st.data())
def test_later_sequences_change_no_earlier_choice(lengths, capacity, data):
    n = data.draw(st.integers(0, len(lengths)))
    whole = [[index for index in row if index < n] for row in pack(lengths, capacity)]
    assert pack(lengths[:n], capacity) == [row for row in whole if row]


def test_the_look_back_is_bounded(monkeypatch):
    lengths = [9, 1, 8, 8, 8, 1]
    assert pack(lengths, 10) == [[0, 1], [2, 5], [3], [4]]
    monkeypatch.setattr(packing, "OPEN_ROWS", 2)
    assert pack(lengths, 10) == [[0, 1], [2], [3, 5], [4]]


@pytest.mark.parametrize("length", [0, 11])
def test_a_sequence_that_fits_no_row_is_refused(length):
    with pytest.raises(ValueError, match=f"sequence 1 has {length} tokens; a row holds 1 to 10: cut it, or use longer rows"):
        pack([3, length], 10)
