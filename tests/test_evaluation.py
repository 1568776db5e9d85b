"""Tasks through an engine and the journal: scores, resume, and what is never shared or dropped."""

import json
import re

import pytest

from harness.engines import Answer, Likelihood, Request, Sampling
from harness.engines.scripted import ScriptedEngine
from harness.errors import EngineError, StoreError
from harness.evaluate import aggregate, evaluate_task
from harness.journal import Journal
from harness.stats import mean_with_stderr
from harness.tasks import mini
from harness.tasks.world import facts


def evaluate(name, engine, journals, *, weights="w", limit=None):
    return evaluate_task(name, engine, weights=weights, journals=journals, limit=limit, on_progress=lambda done, total: None)


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


def test_an_engine_that_is_cut_off_is_incomplete_and_scores_0(tiny_tokenizer, tmp_path):
    found = evaluate("mini_math", ScriptedEngine(tiny_tokenizer, lambda prompt: "thinking " * 40), tmp_path)
    assert found.result["metrics"]["exact_match"]["value"] == 0.0
    assert found.result["incomplete_rate"] == 1.0
    assert {sample["finish_reason"] for sample in found.samples} == {"length"}


def test_sample_rows_carry_what_pairing_and_rescoring_need(tiny_tokenizer, tmp_path):
    sample = evaluate("mini_math", ScriptedEngine(tiny_tokenizer, add_up), tmp_path, limit=3).samples[2]
    assert {"schema", "task", "question", "requests", "cluster", "repeat", "seed", "prompt", "target", "response"} <= set(
        sample
    )
    assert {"metrics", "scorer", "finish_reason", "n_tokens", "is_incomplete", "seconds"} <= set(sample)
    assert sample["prompt"].count("<|start|>user") == 2  # one worked example as a turn of its own
    assert sample["prompt"].endswith("<|start|>assistant\n")
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
    assert again == first


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
    monkeypatch.setattr(f"harness.evaluate.{what}", changed[what])
    engine = ScriptedEngine(tiny_tokenizer, add_up)
    evaluate("mini_math", engine, tmp_path)
    assert engine.n_batches == 25


def test_a_changed_scorer_finds_the_old_answers(tiny_tokenizer, tmp_path, monkeypatch):
    evaluate("mini_math", ScriptedEngine(tiny_tokenizer, add_up), tmp_path)
    monkeypatch.setattr("harness.evaluate.task_fingerprint", lambda name: "another scorer")
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
    with pytest.raises(EngineError, match=r"mini_math, question 0: \d+ prompt tokens and 32 to answer are more than .* 60"):
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
        journal.append(batch, answers)
        journal.append(asked, likelihoods)
    with Journal(tmp_path, protocol) as journal:
        assert journal.find(batch) == answers
        assert journal.find(asked) == likelihoods
        assert journal.find([batch[0]]) is None  # another batch may give another answer
        assert journal.find([request(1, repeat=1), request(2)]) is None
    with Journal(tmp_path, protocol | {"kernels": "other"}) as journal:
        assert journal.find(batch) is None


def test_a_second_writer_is_refused(tmp_path):
    with Journal(tmp_path, {"weights": "w", "task": "t"}), pytest.raises(StoreError, match="another run is writing"):
        Journal(tmp_path, {"weights": "w", "task": "t"}).__enter__()


@pytest.mark.parametrize(("line", "message"), [("{broken}\n", "a line is damaged"), ('{"batch": 1}\n', "a line is damaged")])
def test_a_damaged_line_is_an_error_that_names_the_file(tmp_path, line, message):
    with Journal(tmp_path, {"weights": "w", "task": "t"}) as journal:
        journal.append([request(1)], [Answer("a", (5,), "stop", 0.1)])
    journal.path.write_text(journal.path.read_text() + line)
    with pytest.raises(StoreError, match=message), Journal(tmp_path, {"weights": "w", "task": "t"}):
        pass


def test_a_journal_of_another_schema_is_refused(tmp_path):
    with Journal(tmp_path, {"weights": "w", "task": "t"}) as journal:
        pass
    header = json.loads(journal.path.read_text())
    journal.path.write_text(json.dumps(header | {"schema": 99}) + "\n")
    with pytest.raises(StoreError, match="schema 99, this version reads 1"), Journal(tmp_path, {"weights": "w", "task": "t"}):
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


def test_samples_without_a_score_lower_n_scored_and_are_never_zero():
    samples = [{"metrics": {"acc": v}, "cluster": i, "is_incomplete": None} for i, v in enumerate([1.0, None, 1.0])]
    found = aggregate(samples, primary="acc", n_total=3, kernels={})
    assert found["metrics"]["acc"] == {"value": 1.0, "stderr": 0.0, "n_scored": 2, "n_total": 3}


def test_the_tasks_run_in_plain_lm_eval(tmp_path):
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from harness.suite import TASKS_FOLDER, known_tasks

    manager = TaskManager(include_path=str(TASKS_FOLDER), include_defaults=False)
    found = simple_evaluate(model="dummy", tasks=known_tasks(), task_manager=manager, limit=3, bootstrap_iters=0)
    assert set(found["results"]) == {"mini_choice", "mini_context", "mini_math", "mini_recall"}
    assert found["n-samples"]["mini_math"]["effective"] == 3
