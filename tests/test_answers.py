"""KL on the answers of the BF16 model: what is measured, over which tokens, and what it is added up to."""

import dataclasses
import json
import re
import shutil
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from conftest import SUITE
from training_checks import quantized
from typer.testing import CliRunner

from harness import diagnostics
from harness.answers import recorded_answers
from harness.batches import FORWARD_TOKENS, batches_by_length
from harness.cli import app
from harness.data import Sequence
from harness.diagnostics import POSITIONS, diagnose
from harness.done import is_done
from harness.engines import Sampling
from harness.errors import DataError, StoreError, SuiteError
from harness.pairs import paired_kl
from harness.plan import make_plan
from harness.prepared import Ask, Prepared, Question, write_prepared
from harness.records import read_samples, write_samples
from harness.seeds import merge_seeds, seed_groups
from harness.store import Store, write_json
from harness.suite import load_suite
from qad.clustered import ratio_over_clusters, ratio_with_stderr
from qad.divergence import SequenceDivergence, _quantiles, summarize

GREEDY = Sampling(max_tokens=400, until=())
SUMS = ("kl_sum", "ce_sum", "top1_sum", "n_tokens")


def tokens(seed: int, n: int) -> tuple[int, ...]:
    return tuple(torch.randint(2, 300, (n,), generator=torch.Generator().manual_seed(seed)).tolist())


def prepared(name: str, lengths: list[int], *, clusters: list[str] | None = None) -> Prepared:
    """A task with a question of `lengths` prompt tokens each."""
    questions = [Question(i, name, f"{name} {i}", clusters[i] if clusters else str(i), "", {}) for i in range(len(lengths))]
    asks = [Ask(i, 0, 0, "", tokens(100 + i, n), sampling=GREEDY) for i, n in enumerate(lengths)]
    return Prepared({"name": name}, questions, asks)


def answered(task: Prepared, lengths: list[list[int]], *, seed: int = 0) -> list[dict]:
    """Rows of answers of so many tokens, by question and repeat."""
    return [
        {
            "doc": ask.doc,
            "repeat": repeat,
            "requests": [ask.request(repeat).hash],
            "token_ids": [list(tokens(seed + 1000 * repeat + ask.doc, n))],
            "missing": None,
        }
        for ask, of_question in zip(task.asks, lengths, strict=True)
        for repeat, n in enumerate(of_question)
    ]


class Bench:
    """Models and stages in the place of a Workbench: the BF16 model, one variant, and stages that are folders."""

    def __init__(self, teacher, candidate) -> None:
        self._loaded = {"model": teacher, "checkpoint": candidate}
        self.teacher_hidden = {}
        self.reader = None
        self.reporter = SimpleNamespace(track=self._track)

    @contextmanager
    def _track(self, label):
        yield lambda done, total, text: None

    def load(self, stage):
        return self._loaded[stage.key]

    def folder_of(self, stage):
        return stage.folder


def measured(folder, bench, tasks: dict[str, tuple[Prepared, list[dict]]], *, samples: int = 100, candidate="checkpoint"):
    """result.json and the rows of a stage over these tasks."""
    inputs = {"model": SimpleNamespace(key="model"), "checkpoint": SimpleNamespace(key=candidate)}
    for name, (task, rows) in tasks.items():
        for kind in ("task", "answers"):
            inputs[f"{kind} {name}"] = SimpleNamespace(folder=folder / kind / name)
            (folder / kind / name).mkdir(parents=True)
        write_prepared(folder / "task" / name, task)
        write_samples(folder / "answers" / name / "responses.jsonl.zst", rows)
        engine = (
            {"flags": ["unverified"], "protocol": {"token_ids": "retokenized"}}
            if name == "b"
            else {"flags": [], "protocol": {}}
        )
        write_json(folder / "answers" / name / "answers.json", {"schema": 1, **engine})
    stage = SimpleNamespace(label="v: diagnostics", sections={"on": "answers", "samples": samples}, inputs=inputs)
    record = diagnose(bench, stage, folder)
    rows = [json.loads(line) for line in (folder / "sequences.jsonl").read_text().splitlines()]
    return json.loads((folder / "result.json").read_text()), rows, record


@pytest.fixture(scope="module")
def models(tiny_model):
    teacher, student, _, _ = quantized(tiny_model)
    return [
        SimpleNamespace(model=model.eval(), kernels={"linear": name}) for model, name in ((teacher, "bf16"), (student, "w4a4"))
    ]


@pytest.fixture
def bench(models):
    return Bench(*models)


A = prepared("a", [5, 9, 30])
B = prepared("b", [12, 3], clusters=["same", "same"])
TWO = {"a": (A, answered(A, [[20, 3], [300, 17], [64, 1]])), "b": (B, answered(B, [[80], [16]], seed=7))}


def test_an_answer_stands_behind_its_prompt_and_counts_alone():
    found, _ = recorded_answers("a", A, TWO["a"][1], 100)
    for answer in found:
        prompt = A.asks[answer.doc].token_ids
        assert answer.sequence.token_ids[: len(prompt)] == prompt
        assert answer.sequence.token_ids[len(prompt) :] == answer.response
        assert answer.sequence.is_response == (False,) * len(prompt) + (True,) * len(answer.response)


def test_the_first_repeat_of_all_questions_comes_first_and_nothing_is_dropped_silently():
    rows = answered(A, [[4, 5], [6, 0], [7, 8]])
    rows.append({"doc": 1, "repeat": 2, "requests": [A.asks[1].request(2).hash], "token_ids": None, "missing": "timeout"})
    found, counts = recorded_answers("a", A, rows, 4)
    assert [(answer.repeat, answer.doc, len(answer.response)) for answer in found] == [
        (0, 0, 4),
        (0, 1, 6),
        (0, 2, 7),
        (1, 0, 5),
    ]
    assert counts == {"n_answers": 4, "n_missing": 1, "n_empty": 1, "n_left_out": 1}


def test_several_draws_of_a_question_are_answers_of_their_own_and_likelihoods_are_none():
    row = answered(A, [[4], [5], [6]])[0]
    twice = row | {"requests": row["requests"] * 2, "token_ids": [[3, 4], [5]]}
    assert [answer.response for answer in recorded_answers("a", A, [twice], 9)[0]] == [(3, 4), (5,)]
    assert recorded_answers("a", A, [row | {"token_ids": None}], 9)[0] == []


def test_an_answer_to_another_prompt_is_refused():
    rows = answered(prepared("a", [6, 9, 30]), [[4], [4], [4]])
    with pytest.raises(StoreError, match="task a, question 0: an answer to another prompt than the prepared one"):
        recorded_answers("a", A, rows, 9)


def test_the_digest_of_an_answer_tells_prompts_and_responses_apart():
    found, _ = recorded_answers("a", A, TWO["a"][1], 100)
    other = dataclasses.replace(found[0], prompt=found[0].prompt[:-1], response=(found[0].prompt[-1], *found[0].response))
    digests = [answer.about["answer"] for answer in (*found, other)]
    assert len(set(digests)) == len(digests)


def test_batches_by_length_hold_every_sequence_whole_and_few_padding():
    sequences = [Sequence(tokens(i, n), (True,) * n) for i, n in enumerate([700, 3, 2 * FORWARD_TOKENS, 650, 4, 699, 5])]
    order, batches = batches_by_length(sequences)
    rows = [ids[mask.bool()] for batch in batches for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True)]
    assert sorted(order) == list(range(len(sequences)))
    assert [tuple(row.tolist()) for row in rows] == [sequences[i].token_ids for i in order]
    assert [tuple(batch.input_ids.shape) for batch in batches] == [(3, 5), (2, 699), (1, 700), (1, 2 * FORWARD_TOKENS)]
    order, batches = batches_by_length([])
    assert order == [] and list(batches) == []


def test_the_bf16_model_is_zero_away_from_itself_in_every_task_and_at_every_position(bench, tmp_path):
    result, rows, _ = measured(tmp_path, bench, TWO, candidate="model")
    parts = [result["response"], *result["tasks"].values(), *result["positions"]]
    parts += [part for task in result["tasks"].values() for part in task["positions"]]
    assert len(parts) > 8 and all((part["kl"], part["kl_p99"], part["top1"]) == (0.0, 0.0, 1.0) for part in parts)
    assert result["kernels"] == {"linear": "bf16"} and result["saturated_share"] is None
    assert all(row["kl_sum"] == 0.0 for row in rows)


def test_figures_are_those_of_the_whole_logits_over_the_tokens_of_the_answer(bench, models, tmp_path):
    result, rows, _ = measured(tmp_path, bench, TWO)
    found = [answer for name, (task, given) in TWO.items() for answer in recorded_answers(name, task, given, 100)[0]]
    for answer, row in zip(found, rows, strict=True):
        ids, start = torch.tensor([answer.sequence.token_ids]), len(answer.prompt)
        with torch.no_grad():
            teacher, student = (loaded.model(ids).logits[0, start - 1 : -1].double().log_softmax(1) for loaded in models)
        kl = (teacher.exp() * (teacher - student)).sum(1)
        assert row["n_tokens"] == len(answer.response) == len(kl)
        assert row["kl_sum"] == pytest.approx(float(kl.sum()), rel=0.02)  # BF16 in batches of another size
        ce = -student[torch.arange(len(kl)), torch.tensor(answer.response)]
        assert row["ce_sum"] == pytest.approx(float(ce.sum()), rel=0.02)
    assert result["response"]["kl"] > 0.01 and result["all"] is None
    assert 0 <= result["saturated_share"] < 1 and result["kernels"] == {"linear": "w4a4"}


def test_sums_over_positions_and_tasks_are_the_total(bench, tmp_path):
    result, rows, record = measured(tmp_path, bench, TWO)
    for row in rows:
        assert [sum(part[key] for part in row["positions"]) for key in SUMS] == pytest.approx([row[key] for key in SUMS])
        assert [part["from"] for part in row["positions"]] == [start for start in POSITIONS if start < row["n_tokens"]]
    for parts in (result["tasks"].values(), result["positions"]):
        for key in ("kl", "ce", "top1"):
            total = sum(part[key] * part["n_tokens"] for part in parts)
            assert total == pytest.approx(result["response"][key] * result["response"]["n_tokens"])
    assert [(part["from"], part["to"], part["n_tokens"]) for part in result["positions"]] == [
        (0, 16, 16 + 3 + 16 + 16 + 16 + 1 + 16 + 16),
        (16, 64, 4 + 48 + 1 + 48 + 48),
        (64, 256, 192 + 16),
        (256, 1024, 44),
    ]
    assert result["response"]["n_tokens"] == 20 + 3 + 300 + 17 + 64 + 1 + 80 + 16
    assert (result["response"]["n_sequences"], result["response"]["n_questions"]) == (8, 4)
    assert record["tasks"]["b"] == {
        "n_answers": 2,
        "n_missing": 0,
        "n_empty": 0,
        "n_left_out": 0,
        "flags": ["unverified", "retokenized"],
    }
    by_task = result["tasks"]["a"]
    assert by_task["n_tokens"] == sum(row["n_tokens"] for row in rows if row["task"] == "a")
    assert sum(part["n_tokens"] for part in by_task["positions"]) == by_task["n_tokens"]


def test_errors_are_over_questions_and_related_ones_count_once(bench, tmp_path):
    result, rows, _ = measured(tmp_path, bench, TWO)
    groups = {}
    for row in rows:
        sums = groups.setdefault((row["task"], row["cluster"]), [0.0, 0])
        sums[0] += row["kl_sum"]
        sums[1] += row["n_tokens"]
    assert len(groups) == 4
    expected = ratio_with_stderr([kl for kl, _ in groups.values()], [n for _, n in groups.values()])
    assert (result["response"]["kl"], result["response"]["kl_stderr"]) == pytest.approx(expected)
    assert result["tasks"]["b"]["kl_stderr"] is None  # its two questions are one cluster


def test_another_answer_changes_its_own_row_alone(bench, tmp_path):
    rows = answered(A, [[20, 3], [300, 17], [64, 1]])
    changed = [
        {**row, "token_ids": [[(token + 1) % 300 for token in row["token_ids"][0]]]} if i == 3 else row
        for i, row in enumerate(rows)
    ]
    assert (changed[3]["doc"], changed[3]["repeat"]) == (1, 1)
    _, before, _ = measured(tmp_path / "before", bench, {"a": (A, rows)})
    bench.teacher_hidden.clear()
    _, after, _ = measured(tmp_path / "after", bench, {"a": (A, changed)})
    different = [(new["doc"], new["repeat"]) for old, new in zip(before, after, strict=True) if old != new]
    assert different == [(1, 1)]
    assert all(old["kl_sum"] != new["kl_sum"] for old, new in zip(before, after, strict=True) if old["answer"] != new["answer"])


def test_a_teacher_with_too_many_states_to_keep_gives_the_same(bench, tmp_path, monkeypatch):
    kept = measured(tmp_path / "kept", bench, TWO)
    assert len(bench.teacher_hidden) == 1
    bench.teacher_hidden.clear()
    monkeypatch.setattr(diagnostics, "TEACHER_MEMORY_BYTES", 1)
    for candidate in ("checkpoint", "model"):
        again = measured(tmp_path / candidate, bench, TWO, candidate=candidate)
        assert not bench.teacher_hidden
        assert again == kept if candidate == "checkpoint" else again[0]["response"]["kl"] == 0.0


def test_tasks_without_a_generated_answer_are_an_error(bench, tmp_path):
    rows = [row | {"token_ids": None} for row in TWO["b"][1]]
    with pytest.raises(DataError, match="none of the tasks b has an answer .* needs a task whose answers are generated"):
        measured(tmp_path, bench, {"b": (B, rows)})


def test_a_token_that_the_model_does_not_have_is_named(bench, tmp_path):
    rows = [row | {"token_ids": [[3, 9999]]} for row in TWO["b"][1]]
    with pytest.raises(DataError, match=r"task b, question 0: its answer has the token 9999, the model knows \d+"):
        measured(tmp_path, bench, {"b": (B, rows)})


def test_clusters_of_one_change_nothing_and_a_copied_sequence_adds_no_certainty():
    sums, counts = [3.0, 1.0, 7.5], [10, 20, 30]
    alone = ratio_with_stderr(sums, counts)
    assert ratio_over_clusters(sums, counts, ["a", "b", "c"]) == alone
    assert ratio_over_clusters(sums * 2, counts * 2, ["a", "b", "c"] * 2) == pytest.approx(alone)
    assert ratio_over_clusters(sums, counts, ["a"] * 3) == (alone[0], None)


def test_quantiles_are_those_of_torch():
    values = torch.randn(10_001, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for part in (values, values[:1], values[:2], values[:100]):
        assert _quantiles(part, 0.5, 0.99) == [float(part.quantile(0.5)), float(part.quantile(0.99))]
    assert summarize([SequenceDivergence(*(values[:7].float().abs(),) * 3)]).kl_p50 == pytest.approx(
        float(values[:7].abs().median())
    )


def sequence_rows(variant: str, sums: list[float], **changes) -> list[dict]:
    """Four answers to three questions, two of which are one cluster."""
    clusters, counts = ["a", "b", "b", "a"], [10, 20, 30, 40]
    return [
        {
            "variant": variant,
            "sequence": i,
            "task": "t",
            "cluster": cluster,
            "question": f"q{i % 3}",
            "repeat": i // 3,
            "answer": f"d{i}",
        }
        | {"kl_sum": kl, "n_tokens": n, "ce_sum": 2 * kl, "top1_sum": 0.5 * n}
        | (changes if i == 2 else {})
        for i, (cluster, n, kl) in enumerate(zip(clusters, counts, sums, strict=True))
    ]


VARIANTS = [{"name": "ptq", "method": "ptq"}, {"name": "qad", "method": "qad"}]


def test_differences_are_paired_over_answers_with_errors_over_questions():
    rows = sequence_rows("ptq", [1.0, 2.0, 3.0, 4.0]) + sequence_rows("qad", [0.5, 2.5, 1.0, 3.0])
    (found,) = paired_kl(rows, VARIANTS)
    assert (found["difference"], found["stderr"]) == pytest.approx(ratio_with_stderr([-0.5 - 1.0, 0.5 - 2.0], [50, 50]))
    assert (found["unit"], found["n_sequences"]) == ("answers", 4)


@pytest.mark.parametrize("changes", [{"answer": "other"}, {"task": "u"}, {"repeat": 1}])
def test_other_answers_are_never_paired(changes):
    rows = sequence_rows("ptq", [1.0] * 4) + sequence_rows("qad", [1.0] * 4, **changes)
    with pytest.raises(StoreError, match="qad and ptq were measured on different sequences"):
        paired_kl(rows, VARIANTS)


def test_the_error_of_several_seeds_is_over_questions_and_what_was_not_measured_stays_away():
    summary = {"kl": 0.1, "kl_stderr": 0.01, "ce": 1.0, "ppl": 2.7, "top1": 0.5}
    rows = [
        {"variant": f"qad-seed{i}", "group": "qad", "seed": i, "method": "qad", "tasks": {}, "budget": None}
        | {"diagnostics": {"response": summary, "all": None}}
        for i in range(2)
    ]
    sums = [[1.0, 2.0, 3.0, 4.0], [3.0, 2.0, 5.0, 0.0]]
    sequences = [row for i in range(2) for row in sequence_rows(f"qad-seed{i}", sums[i])]
    (group,) = seed_groups(rows, sequences, lambda variant, task: None)
    expected = ratio_with_stderr([2.0 + 2.0, 2.0 + 4.0], [50, 50])[1]
    assert group["diagnostics"]["response"]["kl"]["stderr_over_sequences"] == pytest.approx(expected)
    assert "all" not in group["diagnostics"]
    variants = [{"name": row["variant"], "group": "qad", "method": "qad"} for row in rows] + VARIANTS[:1]
    merged, merged_rows = merge_seeds(variants, sequences + sequence_rows("ptq", [4.0] * 4), [group])
    (found,) = paired_kl(merged_rows, merged)
    differences = [(2.0 + 2.0) - 8.0, (2.0 + 4.0) - 8.0]
    assert (found["difference"], found["stderr"]) == pytest.approx(ratio_with_stderr(differences, [50, 50]))


def suite_on_answers(suite, *, tasks: str, data: str = "") -> None:
    """Let the suite measure on answers to `tasks`; nothing in it is trained."""
    text = suite.read_text()
    text = text[: text.index("[training]")] + text[text.index("[[variant]]") :]
    for method in ("qat", "qad"):
        text = text.replace(f'[[variant]]\nname = "{method}"\nmethod = "{method}"\n', "")
    text = text[: text.index("[[task]]")] + tasks + text[text.index("[engine]") :]
    suite.write_text(text.replace('[diagnostics]\ndata = "text"', f'[diagnostics]\non = "answers"\n{data}'))


TASKS = """
[[task]]
name = "mini_math"
limit = 6

[[task]]
name = "mini_choice"
limit = 4

[[task]]
name = "mini_recall"
limit = 3

"""


@pytest.mark.parametrize(
    ("tasks", "data", "message"),
    [
        (TASKS, 'data = "text"', 'diagnostics.data: has no effect with on = "answers"'),
        (
            '[[task]]\nname = "mini_choice"\n\n',
            "",
            'diagnostics.on: "answers" needs a [[task]] whose answers are generated (mini_choice: scored by likelihood)',
        ),
        ("", "", 'diagnostics.on: "answers" needs a [[task]] whose answers are generated (there is none)'),
    ],
)
def test_contradictions_of_diagnostics_on_answers_are_said(tiny_suite, tasks, data, message):
    suite_on_answers(tiny_suite, tasks=tasks, data=data)
    with pytest.raises(SuiteError) as error:
        load_suite(tiny_suite)
    assert message in str(error.value)


def test_diagnostics_on_text_need_a_data_set(tiny_suite):
    tiny_suite.write_text(tiny_suite.read_text().replace('[diagnostics]\ndata = "text"', "[diagnostics]"))
    with pytest.raises(
        SuiteError, match='diagnostics.data: missing; on = "text" measures on the held-out split of a data set: text'
    ):
        load_suite(tiny_suite)


def test_one_variant_alone_is_measured_on_the_answers_of_the_bf16_model_which_is_asked_for_them(tiny_suite, own_cache):
    suite_on_answers(tiny_suite, tasks=TASKS)
    plan = make_plan(load_suite(tiny_suite), Store(own_cache), only=("ptq",))
    labels = [stage.label for stage in plan.stages]
    assert {"bf16: mini_math", "bf16: mini_recall"} <= set(labels) and "bf16: mini_choice" not in labels
    (stage,) = (stage for stage in plan.stages if stage.kind == "diagnostics")
    assert {role: given.label for role, given in stage.inputs.items() if role.startswith("answers")} == {
        "answers mini_math": "bf16: mini_math",
        "answers mini_recall": "bf16: mini_recall",
    }
    assert max(labels.index(given.label) for given in stage.inputs.values()) < labels.index(stage.label)
    whole = make_plan(load_suite(tiny_suite), Store(own_cache))
    assert stage.key in {other.key for other in whole.stages}


@pytest.fixture(scope="module")
def finished(tiny_model, text_stages, tmp_path_factory):
    """A run with PTQ on the answers to two tasks by the real command: its folder, the cache and the suite."""
    root = tmp_path_factory.mktemp("answers")
    suite = root / "tiny.toml"
    suite.write_text(SUITE.format(model=tiny_model))
    suite_on_answers(suite, tasks=TASKS)
    shutil.copytree(text_stages(512), root / "cache" / "stages")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("HARNESS_CACHE", str(root / "cache"))
        done = CliRunner().invoke(app, ["run", str(suite), "--results", str(root / "results")])
    assert done.exit_code == 0, done.output
    (run,) = (root / "results" / "tiny").iterdir()
    return run, root / "cache", suite, done.output


def test_a_suite_is_measured_on_the_answers_of_its_bf16_model(finished):
    run = finished[0]
    table = json.loads((run / "table.json").read_text())
    rows = {row["variant"]: row["diagnostics"] for row in table["rows"]}
    assert rows["bf16"]["response"]["kl"] == 0.0 < rows["ptq"]["response"]["kl"]
    assert set(rows["ptq"]["tasks"]) == {"mini_math", "mini_recall"}
    samples = {task: read_samples(run / "samples" / f"bf16.{task}.jsonl.zst") for task in rows["ptq"]["tasks"]}
    for task, found in samples.items():
        assert rows["ptq"]["tasks"][task]["n_tokens"] == sum(row["n_tokens"] for row in found)
    sequences = [json.loads(line) for line in (run / "diagnostics_sequences.jsonl").read_text().splitlines()]
    assert len(sequences) == 2 * (6 + 3) == 2 * rows["ptq"]["response"]["n_sequences"]
    assert {row["question"] for row in sequences} == {row["question"] for found in samples.values() for row in found}


def test_the_table_says_what_was_measured_on_and_has_a_row_a_variant_for_tasks_and_positions(finished):
    run, _, _, printed = finished
    text = (run / "table.md").read_text()
    (note,) = (line for line in text.splitlines() if line.startswith("- KL(BF16"))
    assert re.search(
        r"over [\d,]+ response tokens of 9 BF16 answers to 9 questions of mini_math, mini_recall; error of KL over", note
    )
    below = (
        text[text.index("**KL on BF16 answers, by task and by token of the answer**") :].split("\n- ")[0].strip().splitlines()
    )
    assert below[2].startswith("| variant | mini_math | mini_recall | 0–15 | 16–63 |")
    names = [line.split(" | ")[0] for line in below[4:]]
    assert names == ["| bf16", "| ptq", "| tokens"]
    assert below[4].count("0.000 ±0.000") == below[2].count(" | ")
    assert "by token of the answer" in printed


def test_the_same_suite_again_does_nothing_and_other_answers_measure_again(finished, monkeypatch, tmp_path):
    _, cache, suite, _ = finished
    monkeypatch.setenv("HARNESS_CACHE", str(cache))
    plan = make_plan(load_suite(suite), Store(cache))
    assert all(is_done(stage, Store(cache)) for stage in plan.stages)
    shutil.copytree(cache, tmp_path / "cache", dirs_exist_ok=True)
    store = Store(tmp_path / "cache")
    (answers,) = (stage for stage in plan.stages if stage.label == "bf16: mini_recall")
    record = json.loads((tmp_path / "cache" / "stages" / answers.key / "stage.json").read_text())
    folder = tmp_path / "cache" / "stages" / answers.key / "files"
    rows = read_samples(folder / "responses.jsonl.zst")
    rows[0]["token_ids"] = [[5, 6, 7]]
    given = {key: record[key] for key in ("kind", "label", "sections", "numerics", "inputs", "input_keys", "result")}
    about = json.loads((folder / "answers.json").read_text())
    with store.writing(answers.key, given) as made:
        write_samples(made / "responses.jsonl.zst", rows)
        write_json(made / "answers.json", about)
    stale = {stage.label for stage in plan.stages if not is_done(stage, store)}
    assert stale == {"bf16: mini_recall: score", "bf16: diagnostics", "ptq: diagnostics"}
