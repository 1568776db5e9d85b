"""Token sequences as optimizer steps: rows, batches, masks and what the budget counts."""

import numpy as np
import pytest
import torch
from training_checks import KL, losses_of, quantized, settings

from harness.batches import TrainingSteps, packed_batch, training_order, validation_batches
from harness.data import Sequence
from harness.errors import DataError
from harness.schema import Training
from qad.distill import train
from qad.packing import allow_packing
from qad.recipe import Recipe


class Sequences(list):
    """A split as it is stored: sequences, and their lengths."""

    @property
    def lengths(self):
        return np.array([len(sequence) for sequence in self])


def sequences(lengths, *, vocabulary=500):
    """Of these lengths; the first two tokens are a prompt. Each starts with a token of its own."""
    generator = torch.Generator().manual_seed(0)
    found = Sequences()
    for index, length in enumerate(lengths):
        ids = [index + 2, *torch.randint(2, vocabulary, (length - 1,), generator=generator).tolist()]
        found.append(Sequence(tuple(ids), (False, False, *[True] * (length - 2))))
    return found


def steps_of(given, *, seq_len=40, **training):
    return TrainingSteps(given, Training(**({"lr": 1e-3, "loss_on": "assistant"} | training)), seq_len=seq_len)


def documents_of(batch):
    """First tokens of the documents in each row of a batch."""
    if batch.position_ids is None:
        return [[int(row[0])] for row in batch.input_ids]
    real = batch.attention_mask.bool()
    return [[int(t) for t in row[(p == 0) & r]] for row, p, r in zip(batch.input_ids, batch.position_ids, real, strict=True)]


LENGTHS = [30, 7, 12, 40, 5, 22, 9, 18, 3, 33]


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("micro_batch_size", [None, 1, 2, 3])
def test_every_sequence_is_read_once_in_steps_of_whole_batches(packing, micro_batch_size):
    given = sequences(LENGTHS)
    steps = steps_of(given, tokens=sum(LENGTHS), batch_size=3, micro_batch_size=micro_batch_size, packing=packing)
    rows = [row for step in steps for batch in step for row in documents_of(batch)]
    assert sorted(document for row in rows for document in row) == [index + 2 for index in range(len(LENGTHS))]
    assert len(steps) == -(-len(rows) // 3)
    assert (len(rows) < len(LENGTHS)) == packing
    for index, step in enumerate(steps):
        sizes = [len(batch.input_ids) for batch in step]
        assert sum(sizes) == min(3, len(rows) - 3 * index)
        assert max(sizes) <= (micro_batch_size or 3)
        assert all(size == (micro_batch_size or 3) for size in sizes[:-1])
    assert steps.n_tokens == sum(LENGTHS) == sum(batch.n_tokens for step in steps for batch in step)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("loss_on", ["assistant", "all"])
def test_the_budget_counts_the_tokens_that_are_predicted_and_no_document_predicts_the_first_of_the_next(packing, loss_on):
    steps = steps_of(sequences(LENGTHS), tokens=sum(LENGTHS), batch_size=3, packing=packing, loss_on=loss_on)
    unpredicted = 1 if loss_on == "all" else 2
    expected = sum(length - unpredicted for length in LENGTHS)
    assert steps.budget == {
        "tokens": sum(LENGTHS),
        "loss_tokens": expected,
        "steps": len(steps),
        "epochs_read": 1,
    }
    for step in steps:
        for batch in step:
            assert not batch.loss_mask[batch.attention_mask == 0].any()
            if packing:
                assert not batch.loss_mask[batch.position_ids == 0].any()


def test_splitting_a_step_changes_no_token_of_it_and_the_seed_changes_the_order():
    given = sequences(LENGTHS)

    def read(**training):
        steps = steps_of(given, tokens=150, batch_size=4, **training)
        return [[row for batch in step for row in documents_of(batch)] for step in steps]

    assert read() == read(micro_batch_size=1) == read(micro_batch_size=3)
    assert read(packing=True) == read(packing=True, micro_batch_size=2)
    assert read() != read(seed=1)


def test_reading_stops_with_the_sequence_that_reaches_the_budget_and_goes_around_in_another_order():
    given = sequences([10] * 8)
    steps = steps_of(given, tokens=35, batch_size=1)
    assert (steps.n_tokens, len(steps), steps.epochs_read) == (40, 4, 1)
    steps = steps_of(given, tokens=155, batch_size=4, epochs=3)
    assert (steps.n_tokens, len(steps), steps.epochs_read) == (160, 4, 2)
    first, second = (
        [row[0] for step in half for batch in step for row in documents_of(batch)]
        for half in (list(steps)[:2], list(steps)[2:])
    )
    assert sorted(first) == sorted(second) and first != second


@pytest.mark.parametrize(
    ("training", "message"),
    [
        (
            {"tokens": 30, "batch_size": 8},
            "training.tokens 30 is less than one optimizer step: it reads 3 rows, batch_size is 8",
        ),
        (
            {"tokens": 30, "batch_size": 2, "packing": True},
            "it reads 1 rows, batch_size is 2; raise tokens or lower batch_size",
        ),
        ({"tokens": 200, "batch_size": 2}, "holds 80 tokens; 1 pass over it lack 120 of the 200 asked for"),
        ({"tokens": 200, "batch_size": 2, "epochs": 2}, "holds 80 tokens; 2 passes over it lack 40 of the 200 asked for"),
    ],
)
def test_a_budget_below_one_step_or_beyond_the_data_is_refused(training, message):
    with pytest.raises(DataError, match=message):
        steps_of(sequences([10] * 8), **training)


def test_steps_are_made_when_asked_for_and_end_where_they_end():
    steps = steps_of(sequences([10] * 8), tokens=80, batch_size=3)
    assert len(list(steps)) == len(steps) == 3
    assert torch.equal(steps[2][0].input_ids, list(steps)[2][0].input_ids)
    for index in (3, -1):
        with pytest.raises(IndexError):
            steps[index]


def test_a_packed_row_holds_whole_documents_with_positions_of_their_own_and_padding_as_one_more():
    given = sequences([3, 4, 5])
    batch = packed_batch([[given[0], given[1]], [given[2]]])
    assert batch.input_ids.shape == (2, 7)
    assert batch.input_ids[0].tolist() == [*given[0].token_ids, *given[1].token_ids]
    assert batch.input_ids[1].tolist() == [*given[2].token_ids, 0, 0]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 2, 3], [0, 1, 2, 3, 4, 0, 1]]
    assert batch.loss_mask.tolist() == [[0, 0, 1, 0, 0, 1, 1], [0, 0, 1, 1, 1, 0, 0]]
    assert (batch.n_tokens, batch.n_loss_tokens) == (12, 6)
    assert set(batch.inputs) == {"input_ids", "position_ids", "use_cache"}


def test_a_row_that_begins_with_a_response_does_not_predict_its_first_token():
    document = Sequence((5, 6, 7), (True, True, True))
    batch = packed_batch([[document, document]])
    assert batch.loss_mask.tolist() == [[0, 1, 1, 0, 1, 1]]
    assert batch.n_loss_tokens == 4


def test_validation_batches_hold_the_sequences_in_order_with_the_mask_that_training_has():
    given = sequences(LENGTHS)
    for loss_on, unpredicted in (("all", 1), ("assistant", 2)):
        batches = validation_batches(given, loss_on)
        assert [row[0] for batch in batches for row in documents_of(batch)] == [index + 2 for index in range(len(LENGTHS))]
        assert sum(batch.n_loss_tokens for batch in batches) == sum(length - unpredicted for length in LENGTHS)


def test_a_packed_run_finds_the_losses_of_the_same_documents_one_a_row(tiny_model):
    """In FP32 without rounded activations: the tokens of a step, not how they lie in rows, decide its loss."""
    found = {}
    for packing in (False, True):
        teacher, student, _, _ = quantized(tiny_model, Recipe(activations=False), dtype=torch.float32)
        given = sequences([12, 30, 8, 20, 25, 15] * 2)
        steps = steps_of(given, tokens=sum(map(len, given)), batch_size=1, packing=packing)
        whole = [[batch for step in steps for batch in step]]  # one step of all rows, which both read
        if packing:
            for model in (teacher, student):
                allow_packing(model)
        done, _ = train(student, teacher, whole * 3, settings(lr=1e-3), objective=KL)
        found[packing] = done
    assert found[True].steps[0].n_loss_tokens == found[False].steps[0].n_loss_tokens
    assert found[True].steps[0].n_tokens == found[False].steps[0].n_tokens
    assert losses_of(found[True]) == pytest.approx(losses_of(found[False]), rel=1e-4)


def test_epochs_beyond_the_budget_are_not_read():
    order, epochs = training_order([10] * 4, tokens=40, epochs=5, seed=0)
    assert (len(order), epochs) == (4, 1)


def test_a_step_without_a_token_of_a_response_is_found_before_training():
    silent, answered = Sequence((1, 2, 3), (False,) * 3), Sequence((1, 2, 3), (False, True, True))
    mixed = steps_of(Sequences([answered, answered, answered, silent]), tokens=12, batch_size=1)
    with pytest.raises(DataError, match=r"step \d of 4: none of its 1 rows has a token of a response"):
        mixed.require_loss_tokens()
    steps_of(Sequences([answered] * 4), tokens=12, batch_size=1).require_loss_tokens()
