"""Text, splits and masks: nothing overlaps, nothing of the evaluation is trained on, budgets are kept."""

import random
import re

import pytest

from harness import builtin, data, dialogues
from harness.batches import training_order
from harness.data import Sequence
from harness.dialogues import Turn
from harness.errors import DataError
from harness.tasks import mini, sizes
from harness.tasks.world import facts

EOS = {1}


@pytest.fixture(scope="module")
def splits(tiny_tokenizer):
    return builtin.builtin_sequences(tiny_tokenizer, seq_len=256, seed=0, eos_ids=EOS)


def windows(sequence: Sequence, n: int) -> set[tuple[int, ...]]:
    return {sequence.token_ids[i : i + n] for i in range(len(sequence) - n + 1)}


def test_no_long_run_of_response_tokens_is_in_two_splits(splits):
    seen: dict[tuple[int, ...], str] = {}
    for split, sequences in splits.items():
        for sequence in sequences:
            if all(sequence.is_response):
                for window in windows(sequence, 128):
                    assert seen.setdefault(window, split) == split


def test_a_section_of_the_manual_is_in_several_splits_where_it_is_cut_and_in_one_where_it_is_a_row(splits, tiny_tokenizer):
    """The exception that the documentation names."""
    text = max(builtin.natural_texts(), key=len)
    pieces = list(dialogues.cut_text(tiny_tokenizer, text, seq_len=256, shortest=32))
    where = {piece.token_ids: split for split, sequences in splits.items() for piece in sequences}
    assert {where[piece.token_ids] for piece in pieces} == {data.split_of(repr(piece.token_ids)) for piece in pieces}
    assert len({where[piece.token_ids] for piece in pieces} - {data.split_of(text.strip())}) > 1


def test_a_generated_question_belongs_to_one_split():
    turns = builtin.generated_turns(seed=0)
    assert len({turn.question for turn in turns}) == len(turns) == builtin.N_DIALOGUE_TURNS
    by_split = builtin._turns_by_split(0)
    questions = {split: {turn.question for turn in found} for split, found in by_split.items()}
    for split in questions:
        assert questions[split]
        for other in questions:
            assert split == other or not questions[split] & questions[other]


def test_no_training_text_contains_an_evaluation_question(splits, tiny_tokenizer):
    texts = [tiny_tokenizer.decode(s.token_ids) for sequences in splits.values() for s in sequences]
    whole = "\n".join(texts)
    for fact in facts():
        if fact.is_evaluated:
            assert fact.question not in whole
            assert fact.prompt + " " + fact.answer not in whole
            assert fact.backwards is None or fact.backwards[0] not in whole
    for row in mini.context_dataset()["test"]:
        assert row["text"] not in whole
    sums = {tuple(map(int, found)) for found in re.findall(r"What is (\d+) \+ (\d+)\?", whole)}
    assert len(sums) > 100
    for row in mini.math_dataset()["test"]:
        a, b = map(int, re.findall(r"\d+", row["question"]))
        assert (a, b) not in sums
        assert (b, a) not in sums
        assert not re.search(rf"\b{a} \+ {b} =", whole)


def test_at_least_100_sequences_are_held_out_for_diagnostics_of_both_kinds(splits):
    held_out = splits["diagnostics"][:100]
    assert len(held_out) == 100
    dialogues = sum(not all(sequence.is_response) for sequence in held_out)
    assert 20 < dialogues < 80


def test_tasks_ask_at_least_200_questions_and_sizes_agree_with_the_data_sets():
    builders = {
        "mini_math": mini.math_dataset,
        "mini_recall": mini.recall_dataset,
        "mini_choice": mini.choice_dataset,
        "mini_context": mini.context_dataset,
    }
    for name, build in builders.items():
        rows = build()["test"]
        assert len(rows) == sizes.n_questions(name) >= 200
        assert len({str(row) for row in rows}) == len(rows)


def test_tasks_are_the_same_every_time():
    assert mini.math_dataset()["test"][:] == mini.math_dataset()["test"][:]
    assert mini.choice_dataset()["test"][:] == mini.choice_dataset()["test"][:]
    assert mini.context_dataset()["test"][:] == mini.context_dataset()["test"][:]


def test_choices_hold_the_answer_once_and_its_place_is_spread_out():
    rows = list(mini.choice_dataset()["test"])
    known = {fact.prompt: fact.answer for fact in facts()} | {f.backwards[0]: f.backwards[1] for f in facts() if f.backwards}
    for row in rows:
        assert row["choices"][row["answer"]] == known[row["question"]]
        assert len(set(row["choices"])) == 4
    assert {row["answer"] for row in rows} == {0, 1, 2, 3}


def test_context_answers_stand_in_the_text():
    for row in mini.context_dataset()["test"]:
        assert re.search(rf"\b{row['answer']}\b", row["text"])


def test_response_masks_cover_the_answers_up_to_the_end_token_and_nothing_else(tiny_tokenizer):
    turns = [Turn("Two?", "2."), Turn("Three?", "It is 3.")]
    sequence = dialogues.render_dialogue(tiny_tokenizer, turns, EOS)
    kept = [token for token, is_response in zip(sequence.token_ids, sequence.is_response, strict=True) if is_response]
    assert tiny_tokenizer.decode(kept) == "2.<|end|>It is 3.<|end|>"


def test_a_tokenizer_without_a_chat_template_and_one_that_rewrites_history_are_refused(tiny_model):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="no chat template"):
        dialogues.render_dialogue(tokenizer, [Turn("a", "b")], EOS)
    tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(DataError, match="renders the beginning of a dialogue differently"):
        dialogues.render_dialogue(tokenizer, [Turn("a", "b"), Turn("c", "d")], EOS)


def test_a_source_too_short_says_how_many_tokens_are_missing():
    with pytest.raises(DataError, match=r"holds 60 tokens; 1 pass over it lack 40 of the 100.*lower training\.tokens"):
        training_order([20] * 3, tokens=100, epochs=1, seed=0)


def test_the_order_is_fixed_by_the_seed_and_reads_nothing_twice_within_an_epoch():
    lengths = [10] * 20
    order, epochs = training_order(lengths, tokens=120, epochs=1, seed=0)
    assert (len(order), len(set(order)), epochs) == (12, 12, 1)
    assert order == training_order(lengths, tokens=120, epochs=1, seed=0)[0]
    assert order != training_order(lengths, tokens=120, epochs=1, seed=1)[0]


def test_a_second_pass_is_counted():
    order, epochs = training_order([10] * 20, tokens=250, epochs=2, seed=0)
    assert (len(order), epochs) == (25, 2)


def test_splits_have_about_their_shares():
    rng = random.Random(0)
    texts = [str(rng.random()) for _ in range(4000)]
    counts = {name: sum(data.split_of(text) == name for text in texts) / 40 for name in data.SPLITS}
    for name, share in data.SPLITS.items():
        assert abs(counts[name] - share) < 3


@pytest.mark.parametrize(
    ("response", "score"),
    [
        ("7 + 5 = 12. The answer is \\boxed{12}.", (1.0, 0.0)),
        ("\\boxed{11} no, \\boxed{ 12 }", (1.0, 0.0)),
        ("The answer is 12.", (0.0, 1.0)),
        ("\\boxed{120}", (0.0, 0.0)),
        ("\\boxed{1,2}", (1.0, 0.0)),
        ("", (0.0, 1.0)),
    ],
)
def test_boxed_answers(response, score):
    found = mini.score_boxed({"answer": "12"}, [response])
    assert (found["exact_match"], found["unparsed"]) == score


@pytest.mark.parametrize(
    ("answer", "response", "score"),
    [
        ("Paris", " Paris, the city", (1.0, 0.0)),
        ("Paris", " Parish", (0.0, 0.0)),
        ("New Delhi", " New Delhi.", (1.0, 0.0)),
        ("New Delhi", " New", (0.0, 0.0)),
        ("yen", ' the "yen"', (1.0, 0.0)),
        ("W", " W.", (1.0, 0.0)),
        ("F. Scott Fitzgerald", " F. Scott Fitzgerald", (1.0, 0.0)),
        ("N'Djamena", " N'Djamena", (1.0, 0.0)),
        ("Paris", "", (0.0, 1.0)),
        ("Paris", " the the", (0.0, 1.0)),
    ],
)
def test_sentence_endings(answer, response, score):
    found = mini.score_ending({"answer": answer}, [response])
    assert (found["exact_match"], found["unparsed"]) == score
