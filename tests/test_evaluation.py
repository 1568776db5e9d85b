"""Tasks through an engine and the journal: scores, resume, and what is never shared or dropped."""

import json
import re
from pathlib import Path

import pytest

from harness import evaluate as scoring
from harness.aggregates import aggregate
from harness.answering import seed_of
from harness.engines import Answer, Failure, Likelihood, Request, Sampling
from harness.engines.scripted import ScriptedEngine
from harness.errors import EngineError, StoreError, TaskError
from harness.journal import Journal
from harness.prepared import question_digest
from harness.schema_evaluation import Thinking
from harness.stats import INVALID, mean_with_stderr
from harness.task_about import question_of
from harness.task_files import TASKS_FOLDER, fingerprint
from harness.tasks import mini
from harness.tasks.world import facts
from harness.thinking import split_thinking
from tests.asking import evaluate, prepare, task


def add_up(prompt: str) -> str:
    a, b = re.findall(r"(\d+) \+ (\d+)\?", prompt)[-1]
    return f"\\boxed{{{int(a) + int(b)}}}"


def know(prompt: str) -> str:
    return next(fact.answer for fact in facts() if prompt.endswith(fact.prompt))


def read(prompt: str) -> str:
    row = next(row for row in mini.context_dataset()["test"] if row["text"] in prompt and prompt.endswith(row["question"]))
    return row["answer"]


def likes_truth(prompt: str, continuation: str) -> float:
    true = any((fact.backwards or (fact.prompt, fact.answer)) == (prompt, continuation.strip()) for fact in facts())
    return -1.0 if true else -9.0


@pytest.mark.parametrize(("name", "respond"), [("mini_math", add_up), ("mini_recall", know), ("mini_context", read)])
def test_an_oracle_scores_100_percent_and_a_wrong_engine_0(name, respond, tiny_tokenizer, tmp_path):
    found = evaluate(name, ScriptedEngine(tiny_tokenizer, respond), tmp_path)
    metric = found.result["metrics"]["exact_match"]
    assert (metric["value"], metric["stderr"], metric["n_scored"], metric["n_total"]) == (
        1.0,
        0.0,
        len(found.samples),
        len(found.samples),
    )
    wrong = evaluate(name, ScriptedEngine(tiny_tokenizer, lambda prompt: "\\boxed{zebra} zebra"), tmp_path, weights="v")
    assert wrong.result["metrics"]["exact_match"]["value"] == 0.0
    assert wrong.result["incomplete_rate"] == 0.0


def test_a_likelihood_oracle_scores_100_percent(tiny_tokenizer, tmp_path):
    engine = ScriptedEngine(tiny_tokenizer, lambda prompt: "", likelihood=likes_truth)
    found = evaluate("mini_choice", engine, tmp_path)
    assert found.result["metrics"]["acc"]["value"] == 1.0
    assert found.result["incomplete_rate"] is None
    assert found.samples[0]["finish_reason"] is None
    assert found.samples[0]["n_tokens"] is None


def test_the_texts_that_are_weighed_are_kept_with_what_was_asked(tiny_tokenizer):
    prepared = prepare(task("mini_choice", limit=1), tiny_tokenizer)
    options = [ask.option for ask in prepared.asks]
    assert all(options) and prepared.questions[0].target is not None
    assert [tiny_tokenizer.decode(ask.continuation).strip() for ask in prepared.asks] == [option.strip() for option in options]
    assert {ask.option for ask in prepare(task("mini_math", limit=1), tiny_tokenizer).asks} == {None}


def test_an_engine_that_is_cut_off_is_incomplete_and_scores_0(tiny_tokenizer, tmp_path):
    found = evaluate("mini_math", ScriptedEngine(tiny_tokenizer, lambda prompt: "thinking " * 40), tmp_path)
    assert found.result["metrics"]["exact_match"]["value"] == 0.0
    assert found.result["incomplete_rate"] == 1.0
    assert {reason for sample in found.samples for reason in sample["finish_reason"]} == {"length"}


def test_sample_rows_carry_what_pairing_and_rescoring_need(tiny_tokenizer, tmp_path):
    sample = evaluate("mini_math", ScriptedEngine(tiny_tokenizer, add_up), tmp_path, limit=3).samples[2]
    assert {"schema", "task", "doc", "question", "requests", "cluster", "repeat", "seed", "target", "response"} <= set(sample)
    assert {"metrics", "scorer", "answer", "finish_reason", "n_tokens", "is_incomplete", "missing", "seconds"} <= set(sample)
    (prompt,) = (ask.prompt for ask in prepare(task("mini_math", limit=3), tiny_tokenizer).asks if ask.doc == 2)
    assert prompt.count("<|start|>user") == 2  # one worked example as a turn of its own
    assert prompt.endswith("<|start|>assistant\n")
    assert re.fullmatch(r"mini_math@1:[0-9a-f]{12}", sample["scorer"])


def test_limit_takes_the_first_questions_and_marks_the_result_partial(tiny_tokenizer, tmp_path):
    engine = ScriptedEngine(tiny_tokenizer, add_up)
    assert evaluate("mini_math", engine, tmp_path, limit=5).result["is_partial"]
    assert not evaluate("mini_math", engine, tmp_path).result["is_partial"]


def test_a_second_evaluation_asks_nothing_and_gives_the_same(tiny_tokenizer, tmp_path):
    engine = ScriptedEngine(tiny_tokenizer, add_up)
    first = evaluate("mini_math", engine, tmp_path)
    asked = engine.n_batches
    again = evaluate("mini_math", engine, tmp_path)
    assert engine.n_batches == asked == 25
    assert (again.samples, again.result) == (first.samples, first.result)


def test_two_sets_of_weights_never_share_answers(tiny_tokenizer, tmp_path):
    evaluate("mini_math", ScriptedEngine(tiny_tokenizer, add_up), tmp_path, weights="right")
    other = ScriptedEngine(tiny_tokenizer, lambda prompt: "\\boxed{0}")
    assert evaluate("mini_math", other, tmp_path, weights="other").result["metrics"]["exact_match"]["value"] == 0.0
    assert other.n_batches == 25


@pytest.mark.parametrize("what", ["versions", "package_versions", "device_kind"])
def test_answers_of_other_versions_or_devices_are_never_replayed(tiny_tokenizer, tmp_path, monkeypatch, what):
    evaluate("mini_math", ScriptedEngine(tiny_tokenizer, add_up), tmp_path)
    changed = {
        "versions": lambda: {"evaluate": 99},
        "package_versions": lambda names: {"torch": "0"},
        "device_kind": lambda: "other",
    }
    monkeypatch.setattr(f"harness.evaluation.{what}", changed[what])
    engine = ScriptedEngine(tiny_tokenizer, add_up)
    evaluate("mini_math", engine, tmp_path)
    assert engine.n_batches == 25


def test_a_changed_scorer_finds_the_old_answers(tiny_tokenizer, tmp_path, monkeypatch):
    evaluate("mini_math", ScriptedEngine(tiny_tokenizer, add_up), tmp_path)
    monkeypatch.setattr("harness.evaluation.fingerprint", lambda name, path: "another scorer")
    engine = ScriptedEngine(tiny_tokenizer, add_up)
    assert evaluate("mini_math", engine, tmp_path).samples[0]["scorer"].endswith("another scor")
    assert engine.n_batches == 0


def test_the_same_sum_in_both_orders_is_one_cluster(tiny_tokenizer, tmp_path):
    samples = evaluate("mini_math", ScriptedEngine(tiny_tokenizer, add_up), tmp_path).samples
    assert len({sample["cluster"] for sample in samples}) == 120
    assert samples[0]["cluster"] == "+".join(map(str, sorted(map(int, re.findall(r"\d+", samples[0]["target"])[:2]))))


def test_an_interrupted_evaluation_asks_only_for_unfinished_batches(tiny_tokenizer, tmp_path):
    engine = ScriptedEngine(tiny_tokenizer, add_up)
    answer = engine.answer

    def stop_after_ten(batch):
        if engine.n_batches == 10:
            raise KeyboardInterrupt
        return answer(batch)

    engine.answer = stop_after_ten
    with pytest.raises(KeyboardInterrupt):
        evaluate("mini_math", engine, tmp_path)
    (journal,) = tmp_path.rglob("*.jsonl")
    journal.write_bytes(journal.read_bytes()[:-30])  # the last line torn, as a kill in the middle of a write leaves it
    rest = ScriptedEngine(tiny_tokenizer, add_up)
    found = evaluate("mini_math", rest, tmp_path)
    assert rest.n_batches == 16
    assert found.result == evaluate("mini_math", ScriptedEngine(tiny_tokenizer, add_up), tmp_path / "whole").result


def test_a_prompt_that_does_not_fit_is_an_error_and_is_never_cut(tiny_tokenizer, tmp_path):
    engine = ScriptedEngine(tiny_tokenizer, add_up, context_length=60)
    with pytest.raises(EngineError, match=r"mini_math, question \d+: \d+ prompt tokens and 32 to answer are more than .* 60"):
        evaluate("mini_math", engine, tmp_path)


def request(n: int, **changes) -> Request:
    return Request(token_ids=(1, 2, n), sampling=Sampling(max_tokens=4, until=()), **changes)


def test_the_request_hash_knows_prompt_and_continuation_only():
    assert request(3).hash == request(3, repeat=1, seed=7).hash
    assert request(3).hash != request(4).hash
    assert Request(token_ids=(1,), continuation=(2,)).hash != Request(token_ids=(1,), continuation=(3,)).hash


def test_a_journal_keeps_answers_by_batch_repeat_and_kind(tmp_path):
    protocol = {"weights": "w", "task": "t"}
    batch = [request(1), request(2)]
    answers = [Answer("a", (5,), "stop", 0.1), Answer("b", (6,), "length", 0.1)]
    likelihoods = [Likelihood(-1.5, True, 0.2)]
    asked = [Request(token_ids=(9,), continuation=(1,))]
    with Journal(tmp_path, protocol) as journal:
        journal.append_batch(batch, answers)
        journal.append(asked[0], likelihoods[0])
    with Journal(tmp_path, protocol) as journal:
        assert journal.find_batch(batch) == answers
        assert journal.find(asked[0]) == likelihoods[0]
        assert journal.find_batch([batch[0]]) is None  # another batch may give another answer
        assert journal.find_batch([request(1, repeat=1), request(2)]) is None
    with Journal(tmp_path, protocol | {"kernels": "other"}) as journal:
        assert journal.find_batch(batch) is None


def test_a_second_writer_is_refused(tmp_path):
    with Journal(tmp_path, {"weights": "w", "task": "t"}), pytest.raises(StoreError, match="another run is writing"):
        Journal(tmp_path, {"weights": "w", "task": "t"}).__enter__()


@pytest.mark.parametrize(("line", "message"), [("{broken}\n", "a line is damaged"), ('{"batch": 1}\n', "a line is damaged")])
def test_a_damaged_line_is_an_error_that_names_the_file(tmp_path, line, message):
    with Journal(tmp_path, {"weights": "w", "task": "t"}) as journal:
        journal.append_batch([request(1)], [Answer("a", (5,), "stop", 0.1)])
    journal.path.write_text(journal.path.read_text() + line)
    with pytest.raises(StoreError, match=message), Journal(tmp_path, {"weights": "w", "task": "t"}):
        pass


def test_a_journal_of_another_schema_is_refused(tmp_path):
    with Journal(tmp_path, {"weights": "w", "task": "t"}) as journal:
        pass
    header = json.loads(journal.path.read_text())
    journal.path.write_text(json.dumps(header | {"schema": 99}) + "\n")
    with pytest.raises(StoreError, match="schema 99, this version reads 2"), Journal(tmp_path, {"weights": "w", "task": "t"}):
        pass


def test_means_have_plain_errors_for_single_questions_and_clustered_ones_otherwise():
    values = [1.0, 0.0, 1.0, 1.0]
    mean, stderr = mean_with_stderr(values, range(4))
    assert mean == 0.75
    assert stderr == pytest.approx((3 / 16 * 4 / 3 / 4) ** 0.5)  # sqrt(s^2 / n)
    _, clustered = mean_with_stderr(values, [0, 0, 1, 1])
    assert clustered == pytest.approx((2 / 1 * (0.5**2 + 0.5**2)) ** 0.5 / 4)
    assert mean_with_stderr([], []) == (None, None)
    assert mean_with_stderr([0.5], [0]) == (0.5, None)
    with pytest.raises(ValueError, match="NaN"):
        mean_with_stderr([float("nan"), 1.0], [0, 1])


def row(doc, repeat=0, *, value, cluster=None, answer="a", missing=None, incomplete=False, tokens=10):
    return {
        "doc": doc,
        "repeat": repeat,
        "cluster": doc if cluster is None else cluster,
        "metrics": {"acc": value},
        "answer": {"none": answer},
        "missing": missing,
        "is_incomplete": None if missing else incomplete,
        "is_truncated": None if missing else False,
        "n_tokens": None if missing else tokens,
    }


def test_samples_without_a_score_lower_n_scored_and_are_never_zero():
    rows = [row(0, value=1.0), row(1, value=None, missing="down"), row(2, value=1.0)]
    found = aggregate(rows, primary="acc", aggregations={}, repeats=1)
    shown = {"value": 1.0, "stderr": 0.0, "n_scored": 2, "n_total": 3, "unit": "share", "higher_is_better": None}
    assert found["metrics"]["acc"] == shown
    assert (found["n_missing"], found["n_questions"], found["mean_tokens"]) == (1, 3, 10.0)


def test_repeats_are_averaged_within_questions_first():
    values = {0: [1.0, 1.0], 1: [0.0, 1.0], 2: [0.0, None]}
    rows = [
        row(doc, repeat, value=v, answer=str(v), missing="x" if v is None else None)
        for doc, each in values.items()
        for repeat, v in enumerate(each)
    ]
    metrics = aggregate(rows, primary="acc", aggregations={}, repeats=2)["metrics"]
    assert metrics["acc"]["value"] == pytest.approx((1 + 0.5 + 0) / 3)
    assert metrics["acc"]["stderr"] == pytest.approx((((0.5**2) + 0 + 0.5**2) / 2 / 3) ** 0.5)
    assert metrics["pass@2"]["value"] == 1.0  # of the two questions with two scored repeats, both have a right one
    assert metrics["maj@2"]["value"] == pytest.approx((1 + 0.5) / 2)  # one right, one a tie
    assert (metrics["acc"]["n_scored"], metrics["acc"]["n_total"]) == (5, 6)


def test_an_aggregation_of_the_task_makes_the_value_and_resampling_its_error():
    rows = [row(doc, value=float(doc)) for doc in range(30)]
    found = aggregate(rows, primary="acc", aggregations={"acc": max}, repeats=1)["metrics"]["acc"]
    again = aggregate(rows, primary="acc", aggregations={"acc": max}, repeats=1)["metrics"]["acc"]
    assert found["value"] == 29.0 and 0 < found["stderr"] < 5 and found == again


HOT = {"temperature": 0.7, "max_tokens": 32}


class Seeded(ScriptedEngine):
    """Answers right or wrong by prompt and seed alone."""

    def __init__(self, tokenizer, **options):
        super().__init__(tokenizer, add_up, answers_depend_on_batch=False, **options)

    def _answer(self, request):
        answer = super()._answer(request)
        if isinstance(answer, Answer) and request.seed % 3 == 0:
            return Answer("\\boxed{0}", answer.token_ids, "stop", 0.0)
        return answer


def test_every_repeat_has_a_seed_of_its_own_that_all_variants_share(tiny_tokenizer, tmp_path):
    first, second = Seeded(tiny_tokenizer), Seeded(tiny_tokenizer)
    found = evaluate("mini_math", first, tmp_path, limit=20, repeats=3, sampling=HOT)
    evaluate("mini_math", second, tmp_path, limit=20, repeats=3, sampling=HOT, weights="other")
    seeds = [request.seed for request in first.asked]
    assert len(set(seeds)) == 60 and seeds == [request.seed for request in second.asked]
    assert seeds[0] == seed_of(0, first.asked[0].hash, first.asked[0].repeat)
    assert 0 < found.value("exact_match") < 1
    assert found.value("pass@3") > found.value("exact_match")


def test_more_repeats_ask_only_for_the_new_ones(tiny_tokenizer, tmp_path):
    two = evaluate("mini_math", Seeded(tiny_tokenizer), tmp_path, limit=20, repeats=2, sampling=HOT)
    engine = Seeded(tiny_tokenizer)
    four = evaluate("mini_math", engine, tmp_path, limit=20, repeats=4, sampling=HOT)
    assert sorted({request.repeat for request in engine.asked}) == [2, 3] and len(engine.asked) == 40
    kept = [sample for sample in four.samples if sample["repeat"] < 2]
    assert [s["response"] for s in kept] == [s["response"] for s in two.samples]


def test_more_repeats_leave_planned_batches_as_they_are(tiny_tokenizer, tmp_path):
    evaluate("mini_math", ScriptedEngine(tiny_tokenizer, add_up), tmp_path, limit=20, repeats=2, sampling=HOT)
    engine = ScriptedEngine(tiny_tokenizer, add_up)
    evaluate("mini_math", engine, tmp_path, limit=20, repeats=3, sampling=HOT)
    assert {request.repeat for request in engine.asked} == {2}


def test_repeats_of_greedy_answers_are_refused(tiny_tokenizer, tmp_path):
    with pytest.raises(TaskError, match="repeats = 2 has no effect, its answers draw nothing"):
        evaluate("mini_math", ScriptedEngine(tiny_tokenizer, add_up), tmp_path, repeats=2)


def test_a_failed_request_is_missing_with_its_reason_and_asked_again(tiny_tokenizer, tmp_path):
    def moody(prompt):
        return Failure("the server said no") if prompt.count("1") % 2 else add_up(prompt)

    first = ScriptedEngine(tiny_tokenizer, moody, answers_depend_on_batch=False)
    found = evaluate("mini_math", first, tmp_path, limit=40)
    missing = [sample for sample in found.samples if sample["missing"]]
    assert 0 < len(missing) < 40 and {sample["missing"] for sample in missing} == {"the server said no"}
    assert {sample["metrics"]["exact_match"] for sample in missing} == {None}
    figures = found.result["metrics"]["exact_match"]
    assert (figures["value"], figures["n_scored"], figures["n_total"]) == (1.0, 40 - len(missing), 40)
    assert found.answers.about["n_missing"] == len(missing)
    engine = ScriptedEngine(tiny_tokenizer, add_up, answers_depend_on_batch=False)
    again = evaluate("mini_math", engine, tmp_path, limit=40)
    assert len(engine.asked) == len(missing) and again.result["n_missing"] == 0


def test_each_response_is_journaled_as_it_arrives(tiny_tokenizer, tmp_path):
    class Dies(ScriptedEngine):
        def answer(self, batch):
            for n, answered in enumerate(super().answer(batch)):
                if n == 4:
                    raise KeyboardInterrupt
                yield answered

    with pytest.raises(KeyboardInterrupt):
        evaluate("mini_math", Dies(tiny_tokenizer, add_up, answers_depend_on_batch=False), tmp_path, limit=40)
    rest = ScriptedEngine(tiny_tokenizer, add_up, answers_depend_on_batch=False)
    evaluate("mini_math", rest, tmp_path, limit=40)
    assert len(rest.asked) == 36


THINKS = Thinking()
WRONG_THOUGHTS = "Maybe \\boxed{1}? No, \\boxed{2}. " * 40


@pytest.mark.parametrize(
    ("text", "thinking", "answer", "is_open"),
    [
        ("plain", None, "plain", False),
        ("a</think>b", None, "a</think>b", False),
        ("<think>a</think>b", THINKS, "b", False),
        ("a</think>b", THINKS, "b", False),  # the template opened it in the prompt
        ("a</think>b</think>c", THINKS, "c", False),
        ("<think>a", THINKS, "", True),
        ("never opened, never closed", THINKS, "", True),
        ("never opened, never closed", Thinking(expected=False), "never opened, never closed", False),
        ("<think>a", Thinking(expected=False), "", True),
        ("<think>a</think>b<think>c", THINKS, "", True),
        ("[T]a[/T]b", Thinking(open="[T]", close="[/T]"), "b", False),
        ("a</think>\n\nb", THINKS, "b", False),
    ],
)
def test_the_answer_is_what_follows_the_last_close_marker(text, thinking, answer, is_open):
    found = split_thinking(text, thinking)
    assert (found.answer, found.is_open) == (answer, is_open)


def test_stop_strings_end_the_answer_and_not_the_thinking():
    assert split_thinking("one\n\ntwo</think>\n\nthree\n\nfour", THINKS, ("\n\n",)).answer == "three"


def test_thinking_with_wrong_boxes_changes_no_score(tiny_tokenizer, tmp_path):
    engine = ScriptedEngine(tiny_tokenizer, lambda prompt: f"{WRONG_THOUGHTS}</think>{add_up(prompt)}")
    found = evaluate("mini_math", engine, tmp_path, thinking=THINKS, sampling={"max_tokens": 4096})
    assert found.value("exact_match") == 1.0 and found.result["incomplete_rate"] == 0.0


def test_thinking_that_never_closed_scores_0_and_is_incomplete(tiny_tokenizer, tmp_path):
    engine = ScriptedEngine(tiny_tokenizer, lambda prompt: f"{WRONG_THOUGHTS}{add_up(prompt)}")
    found = evaluate("mini_math", engine, tmp_path, thinking=THINKS, sampling={"max_tokens": 4096})
    assert found.value("exact_match") == 0.0 and found.result["incomplete_rate"] == 1.0
    assert found.result["metrics"]["exact_match"]["n_scored"] == 200


def test_a_complete_answer_that_was_cut_after_it_is_scored_and_counted_apart(tiny_tokenizer, tmp_path):
    engine = ScriptedEngine(tiny_tokenizer, lambda prompt: add_up(prompt) + " and on" * 40)
    found = evaluate("mini_math", engine, tmp_path)
    assert found.value("exact_match") == 1.0
    assert (found.result["incomplete_rate"], found.result["truncated_rate"]) == (0.0, 1.0)


def user_task(folder, **changes):
    """A task file of a user's: three questions, one of them answered by "no"."""
    rows = [{"question": f"Is {n} even?", "answer": "no" if n % 2 else "yes"} for n in (2, 3, 4)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = {
        "task": "even",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["."], "max_gen_toks": 8},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        **changes,
    }
    (folder / "even.yaml").write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in lines.items()))
    return folder / "even.yaml"


def test_a_task_file_of_a_users_is_asked_and_scored(tiny_tokenizer, tmp_path):
    path = user_task(tmp_path)
    engine = ScriptedEngine(tiny_tokenizer, lambda prompt: "no.never" if "3" in prompt else "yes")
    found = evaluate("even", engine, tmp_path / "journals", path=path)
    assert found.value("exact_match") == 1.0  # cut at the stop string, whatever the engine does
    assert found.prepared.about["is_chat"] is True
    assert found.samples[0]["scorer"].startswith("even@")


def test_a_task_of_lm_evals_own_reads_its_data_from_the_mirror(tiny_tokenizer, tmp_path, monkeypatch):
    (tmp_path / "org" / "numbers").mkdir(parents=True)
    (tmp_path / "org" / "numbers" / "test.jsonl").write_text('{"question": "Is 5 even?", "answer": "no"}\n')
    monkeypatch.setenv("HARNESS_MIRROR", str(tmp_path))
    path = user_task(tmp_path, dataset_path="org/numbers", dataset_kwargs={})
    (question,) = prepare(task("even", path=path), tiny_tokenizer).questions
    assert question.fields["question"] == "Is 5 even?"


def test_a_task_that_does_not_say_how_long_an_answer_may_be_is_pointed_out(tiny_tokenizer, tmp_path):
    path = user_task(tmp_path, generation_kwargs={"until": ["."]})
    prepared = prepare(task("even", path=path), tiny_tokenizer)
    (note,) = prepared.about["notes"]
    assert "lm-eval's default of 256 holds" in note
    assert prepared.asks[0].sampling.max_tokens == 256
    assert not prepare(task("even", path=path, sampling={"max_tokens": 9}), tiny_tokenizer).about["notes"]


def test_two_questions_of_one_text_are_asked_once_and_come_back_alike(tiny_tokenizer, tmp_path):
    path = user_task(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"question": "Is 4 even?", "answer": "yes"}\n' * 3)
    replies = iter(["yes", "no", "no"])
    engine = ScriptedEngine(tiny_tokenizer, lambda prompt: next(replies), answers_depend_on_batch=False)
    first = evaluate("even", engine, tmp_path / "journals", path=path)
    again = evaluate("even", engine, tmp_path / "journals", path=path)
    assert len(engine.asked) == 1 and first.samples == again.samples
    assert first.value("exact_match") == 1.0


@pytest.mark.parametrize("value", [False, "", None])
def test_a_column_that_a_data_set_calls_excluded_drops_no_question(tiny_tokenizer, tmp_path, value):
    path = user_task(tmp_path)
    rows = [{"question": f"Is {n} even?", "answer": "yes", "excluded": value} for n in (2, 4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert len(prepare(task("even", path=path), tiny_tokenizer).asks) == 2


@pytest.mark.parametrize("is_stock", [True, False])
def test_columns_of_lm_evals_own_data_sets_have_no_meaning_to_us(is_stock):
    class Stock:
        config = type("Config", (), {"task": "stock"})()
        should_decontaminate = staticmethod(lambda: False)
        doc_to_text = doc_to_target = staticmethod(lambda doc: "text")

    fields = {"cluster": "a", "excluded": "yes", "source_question": "other"}
    found = question_of(Stock(), 7, fields, fields, is_stock)
    assert (found.cluster, found.excluded) == (("7", None) if is_stock else ("a", "yes"))
    assert found.question == question_digest("text" if is_stock else "other")


def test_an_incomplete_answer_scores_0_in_figures_of_several_parts_too():
    row = {"answer": {"none": INVALID}, "metrics": {"each": [1.0, 0.0, 1.0], "all": 1.0, "worse": 1.0}}
    row |= {"is_truncated": True, "is_incomplete": False}
    scoring._settle_incomplete(row, {"each": True, "all": True, "worse": False}, states_none=False)
    assert row["is_incomplete"] and row["metrics"] == {"each": [0.0, 0.0, 0.0], "all": 0.0, "worse": 1.0}


def test_the_file_that_is_named_is_asked_whatever_lies_beside_it(tiny_tokenizer, tmp_path):
    first = user_task(tmp_path)
    second = tmp_path / "other.yaml"
    second.write_text(first.read_text().replace("{{question}}", "{{question}} Say yes or no."))
    prompts = [prepare(task("even", path=path), tiny_tokenizer).asks[0].prompt for path in (first, second)]
    assert "Say yes or no." not in prompts[0] and "Say yes or no." in prompts[1]
    assert fingerprint("even", first) != fingerprint("even", second)


def test_data_that_a_file_of_a_users_names_are_part_of_its_fingerprint_and_results_beside_it_are_not(tmp_path):
    path = user_task(tmp_path)
    before = fingerprint("even", path)
    (tmp_path / "results.json").write_text("{}")
    assert fingerprint("even", path) == before
    (tmp_path / "rows.jsonl").write_text('{"question": "Is 4 even?", "answer": "yes"}\n')
    assert fingerprint("even", path) != before


def group(folder, **second):
    """A group of two tasks: `even` and another, which differs by `second`."""
    text = user_task(folder).read_text()
    lines = {"task": "odd", **second}
    for key, value in lines.items():
        text = re.sub(rf"^{key}: .*$", f"{key}: {json.dumps(value)}", text, flags=re.MULTILINE)
    (folder / "odd.yaml").write_text(text)
    (folder / "both.yaml").write_text("group: both\ntask: [even, odd]\nmetadata: {version: 1}\n")
    return folder


def test_a_group_counts_the_part_of_which_nothing_was_answered(tiny_tokenizer, tmp_path):
    folder = group(tmp_path, doc_to_text="odd? {{question}}")

    def half(prompt):
        return Failure("down") if "odd?" in prompt else "no" if "3" in prompt else "yes"

    engine = ScriptedEngine(tiny_tokenizer, half, answers_depend_on_batch=False)
    found = evaluate("both", engine, tmp_path / "journals", path=folder)
    figure = found.result["metrics"]["exact_match"]
    assert (figure["value"], figure["n_scored"], figure["n_total"], found.result["n_missing"]) == (1.0, 3, 6, 3)
    assert found.result["subtasks"]["odd"]["exact_match"]["value"] is None


def test_a_group_whose_parts_share_no_metric_is_refused(tiny_tokenizer, tmp_path):
    metric = [{"metric": "bleu", "aggregation": "bleu", "higher_is_better": True}]
    with pytest.raises(TaskError, match="both: its parts have no metric exact_match in common"):
        prepare(task("both", path=group(tmp_path, metric_list=metric)), tiny_tokenizer)


def test_a_length_that_a_question_does_not_have_is_no_score():
    def aggregate_metrics(values):
        return sum(values) / len(values)

    rows = [row(0, value=1.0), row(1, value=0.0)]
    for each, length in zip(rows, ("8192", "4096"), strict=True):
        each["metrics"] = {length: each["metrics"]["acc"]}
    found = aggregate(rows, primary="2048", aggregations=dict.fromkeys(("4096", "8192"), aggregate_metrics), repeats=1)
    assert found["primary"] == "4096"
    assert {name: (f["value"], f["n_total"]) for name, f in found["metrics"].items()} == {"4096": (0.0, 1), "8192": (1.0, 1)}


def test_texts_without_a_context_begin_with_the_first_token_of_the_vocabulary(tiny_tokenizer, tmp_path):
    path = user_task(
        tmp_path, output_type="loglikelihood_rolling", metric_list=[{"metric": "word_perplexity"}], generation_kwargs=None
    )
    path.write_text("".join(line for line in path.read_text().splitlines(True) if not line.startswith("generation_kwargs")))
    asks = prepare(task("even", path=path), tiny_tokenizer).asks
    assert asks[0].token_ids == (tiny_tokenizer.bos_token_id,)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"generation_kwargs": {"num_beams": 4, "until": []}}, "generates with num_beams = 4"),
        ({"unsafe_code": True}, "runs code that a model wrote"),
        (
            {"dataset_kwargs": {"data_files": {"test": "missing.jsonl"}}},
            rf"data_files: missing.jsonl: there is no such file; looked for {re.escape(str(Path.cwd()))}/missing.jsonl \(relative",
        ),
        (
            {"doc_to_text": "Is {{number}} even?"},
            "task even: its template names number, which no column is; columns: question, answer$",
        ),
        ({"task": "odd"}, r"there is no such task in .*even.yaml; it holds odd"),
        ({"metadata": {"primary": "acc"}}, r"metadata.primary: found 'acc'; allowed: exact_match"),
        ({"metadata": {"stated": "("}}, r"metadata.stated: '\(' is no pattern"),
        (
            {"generation_kwargs": {"max_gen_toks": "many", "until": []}},
            "max_gen_toks: found 'many'; allowed: a positive integer",
        ),
        ({"generation_kwargs": {"until": 3}}, "until: found 3; allowed: a string"),
        ({"num_fewshot": 30}, "its prompts cannot be made"),
    ],
)
def test_a_task_that_cannot_be_asked_is_an_error_before_anything_is(tiny_tokenizer, tmp_path, changes, message):
    with pytest.raises(TaskError, match=message):
        prepare(task("even", path=user_task(tmp_path, **changes)), tiny_tokenizer)


@pytest.fixture(scope="module")
def every_task():
    """lm-eval's own tasks and ours: ten seconds, so once for all."""
    return scoring.TaskManager(include_path=[str(TASKS_FOLDER)])


@pytest.fixture
def read_before(every_task, monkeypatch):
    def give(*, include_path, include_defaults, metadata):
        assert include_defaults and include_path == [str(TASKS_FOLDER)]
        return every_task

    monkeypatch.setattr(scoring, "TaskManager", give)


def test_tasks_that_run_code_of_a_model_are_refused_before_their_own_code_is_imported(tiny_tokenizer, read_before, monkeypatch):
    monkeypatch.setattr("lm_eval.tasks._yaml_loader._import_func_in_yml", lambda *given: pytest.fail(f"imported {given}"))
    for name in ("humaneval", "humaneval_plus", "mbpp", "longproc_pseudo_to_code_2k", "livecodebench"):
        with pytest.raises(
            TaskError, match=f"task {name}: runs code that a model wrote, which needs a sandbox .*harness import"
        ):
            prepare(task(name), tiny_tokenizer)


def test_a_group_with_a_task_that_runs_code_is_refused_before_that_code_is_imported(tiny_tokenizer, tmp_path):
    user_task(tmp_path, unsafe_code=True)
    (tmp_path / "scorer.py").write_text("raise AssertionError('imported')\n")
    with (tmp_path / "even.yaml").open("a") as file:
        file.write("process_docs: !function scorer.chosen\n")
    (tmp_path / "all.yaml").write_text("group: all\ntask: [even]\n")
    with pytest.raises(TaskError, match="task even: runs code that a model wrote"):
        prepare(task("all", path=tmp_path), tiny_tokenizer)


def test_a_name_that_nobody_knows_is_an_error_with_what_is_near(tiny_tokenizer, read_before):
    with pytest.raises(TaskError, match=r"no such task here or in lm-eval; did you mean .*mmlu_pro"):
        prepare(task("mmlu_proo"), tiny_tokenizer)


def test_the_tasks_run_in_plain_lm_eval(monkeypatch):
    from lm_eval import simple_evaluate
    from lm_eval.models.dummy import DummyLM
    from lm_eval.tasks import TaskManager

    from harness.tasks.sizes import MINI_TASKS

    manager = TaskManager(include_path=str(TASKS_FOLDER), include_defaults=False)
    monkeypatch.setattr(DummyLM, "MULTIMODAL", True, raising=False)  # else lm-eval refuses the tasks with pictures
    found = simple_evaluate(model="dummy", tasks=list(MINI_TASKS), task_manager=manager, limit=3, bootstrap_iters=0)
    assert set(found["results"]) == set(MINI_TASKS)
    assert found["n-samples"]["mini_math"]["effective"] == 3


@pytest.mark.parametrize("depends_on_batch", [True, False])
def test_speed_is_known_of_what_was_asked_in_one_go_and_of_nothing_else(tiny_tokenizer, tmp_path, depends_on_batch):
    engine = ScriptedEngine(tiny_tokenizer, add_up, answers_depend_on_batch=depends_on_batch, batch_size=3)
    first = evaluate("mini_math", engine, tmp_path, limit=3).answers
    n_tokens = sum(row["n_tokens"] for row in first.rows)
    assert n_tokens > 0
    assert first.about["generated"] == {"n_tokens": n_tokens, "seconds": first.about["seconds_answering"]}
    assert evaluate("mini_math", engine, tmp_path, limit=5).answers.about["generated"] is None
    assert evaluate("mini_math", engine, tmp_path, limit=3).answers.about["generated"] is None
    silent = ScriptedEngine(tiny_tokenizer, lambda prompt: Failure("HTTP 500"), answers_depend_on_batch=depends_on_batch)
    assert evaluate("mini_math", silent, tmp_path, limit=3, weights="v").answers.about["generated"] is None
    likes = ScriptedEngine(tiny_tokenizer, add_up, answers_depend_on_batch=depends_on_batch)
    assert evaluate("mini_choice", likes, tmp_path, limit=3).answers.about["generated"]["n_tokens"] == 0
