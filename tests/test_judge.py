"""Judges: what they are asked, what counts as a verdict, what is kept and asked again."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from conftest import build_tiny_model

from harness import cli, judge, judge_prompt
from harness.engines import Answer, Failure
from harness.engines.scripted import ScriptedEngine
from harness.errors import EngineError, SuiteError, TaskError
from harness.judge import judge_answers, parse_verdict, value_of, with_verdicts
from harness.judge_prompt import PROMPT
from harness.plan import make_plan
from harness.prepared import Question
from harness.records import read_lines, read_samples
from harness.rescore import rescore
from harness.schema_evaluation import Thinking
from harness.stages import Workbench
from harness.store import Store, cache_folder
from harness.suite import load_suite
from harness.tasks import aa_lcr
from tests.aa_lcr_copy import write_copy

THINKS = Thinking()


def question(doc: int, asked: str = "Who?", gold: str = "Anna") -> Question:
    return Question(doc, "aa_lcr", "digest", "set", gold, {"source_question": asked})


def answer(doc: int, text: str | None, repeat: int = 0) -> dict:
    response = None if text is None else [text]
    return {
        "doc": doc,
        "repeat": repeat,
        "response": response,
        "stops": [],
        "missing": None if text is not None else "no route",
    }


def fair(prompt: str) -> str:
    """CORRECT where the candidate answer holds the official one."""
    official = prompt.partition("The OFFICIAL ANSWER: ")[2].partition("\n")[0]
    candidate = prompt.partition("CANDIDATE ANSWER TO ASSESS: ")[2].partition("\n\nReply")[0]
    return " CORRECT\n" if official in candidate else "INCORRECT"


class Bench:
    """Judges `answers` to questions 0, 1, ... with the scripted engine, again and again."""

    def __init__(self, tokenizer, journals: Path) -> None:
        self.tokenizer, self.journals = tokenizer, journals

    def judge(self, answers, respond=fair, *, weights="judge", depends=False, protocol=None, context=8192, **settings):
        engine = ScriptedEngine(self.tokenizer, respond, answers_depend_on_batch=depends, context_length=context)
        engine.protocol |= protocol or {}
        questions = [question(doc) for doc in sorted({row["doc"] for row in answers})]
        settings = {"max_tokens": 64} | settings
        found = judge_answers("aa_lcr", questions, answers, engine, weights=weights, journals=self.journals, **settings)
        return found, engine


@pytest.fixture
def bench(tiny_tokenizer, tmp_path) -> Bench:
    return Bench(tiny_tokenizer, tmp_path / "journals")


@pytest.mark.parametrize("text", ["CORRECT", " CORRECT\n", "\tCORRECT  "])
def test_a_verdict_is_the_word_alone(text):
    assert parse_verdict(text) is True
    assert parse_verdict(text.replace("CORRECT", "INCORRECT")) is False


@pytest.mark.parametrize(
    "text",
    [
        "",
        "correct",
        "Correct",
        "CORRECT.",
        "**CORRECT**",
        "CORRECT INCORRECT",
        "The answer is CORRECT",
        "<think>x</think>CORRECT",
    ],
)
def test_everything_else_is_no_verdict(text):
    assert parse_verdict(text) is None


def test_the_thinking_of_a_judge_is_taken_away_where_its_marks_are_given():
    assert parse_verdict("<think>Is it INCORRECT?</think>\n\nCORRECT", THINKS) is True
    assert parse_verdict("CORRECT", THINKS) is None  # it was expected to think
    assert parse_verdict("<think>It is CORRECT", THINKS) is None


def test_the_judge_sees_question_gold_and_answer_in_the_prompt_of_the_benchmark(bench):
    _, engine = bench.judge([answer(0, "It is {Anna}.")])
    (request,) = engine.asked
    assert bench.tokenizer.decode(list(request.token_ids)) == (
        "<|start|>user\nAssess whether the following CANDIDATE ANSWER is CORRECT or INCORRECT.\nFor the CANDIDATE ANSWER to be correct, "
        "it must be consistent with the OFFICIAL ANSWER.\n\nThe question, for reference only: Who?\nThe OFFICIAL ANSWER: Anna\nCANDIDATE "
        "ANSWER TO ASSESS: It is {Anna}.\n\nReply only with CORRECT or INCORRECT.\n<|end|>\n<|start|>assistant\n"
    )
    assert (request.sampling.temperature, request.sampling.max_tokens, request.seed) == (0.0, 64, None)


def test_verdicts_become_the_metric_of_their_rows(bench):
    answers = [answer(0, "Anna"), answer(1, "Ben"), answer(1, "Anna", repeat=1)]
    found, _ = bench.judge(answers)
    assert [value_of(row["judged"]) for row in with_verdicts(answers, found.rows)] == [1.0, 0.0, 1.0]
    assert (found.about["n_asked"], found.about["n_unparsable"], found.about["n_missing"]) == (3, 0, 0)


def test_unfinished_and_empty_answers_are_wrong_unasked_and_missing_ones_stay_missing(bench):
    answers = [answer(0, "<think>Anna"), answer(1, "<think>a</think> \n"), answer(2, None), answer(3, "<think>Ben</think>Anna")]
    found, engine = bench.judge(answers, model_thinking=THINKS)
    assert len(engine.asked) == 1
    assert [row["unasked"] for row in found.rows] == ["incomplete", "empty", "missing", None]
    assert [value_of(row["judged"]) for row in with_verdicts(answers, found.rows)] == [0.0, 0.0, None, 1.0]
    assert found.about["n_missing"] == 0  # the judge owes nothing


@pytest.mark.parametrize("depends", [True, False])
def test_equal_answers_are_judged_once_alone_and_never_again(bench, depends):
    answers = [answer(0, "Anna"), answer(0, " Anna\n", repeat=1), answer(0, "Ben", repeat=2)]
    first, engine = bench.judge(answers, depends=depends)
    assert len(engine.asked) == 2
    assert engine.n_batches == (2 if depends else 1)
    other, engine = bench.judge([answer(0, "Ben"), answer(0, "Clara", repeat=1)], depends=depends)  # those of another variant
    assert len(engine.asked) == 1
    assert [row["verdict"] for row in first.rows + other.rows] == ["CORRECT", "CORRECT", "INCORRECT", "INCORRECT", "INCORRECT"]


@pytest.mark.parametrize("changed", ["weights", "protocol", "max_tokens", "prompt"])
def test_another_judge_engine_length_or_prompt_judges_anew(bench, changed, monkeypatch):
    bench.judge([answer(0, "Anna")])
    settings = {"weights": {"weights": "other"}, "protocol": {"protocol": {"version": 2}}, "max_tokens": {"max_tokens": 32}}
    if changed == "prompt":
        monkeypatch.setattr(judge, "PROMPT", PROMPT + "\n")
    _, engine = bench.judge([answer(0, "Anna")], **settings.get(changed, {}))
    assert len(engine.asked) == 1


def test_the_prompt_is_identified_by_its_text(monkeypatch):
    before = judge_prompt.prompt_hash()
    monkeypatch.setattr(judge_prompt, "PROMPT", PROMPT.replace("Reply only", "Reply"))
    assert judge_prompt.prompt_hash() != before


def test_one_unparsable_verdict_is_missing_and_counted(bench):
    answers = [answer(doc, f"Anna {doc}") for doc in range(12)]
    found, _ = bench.judge(answers, lambda prompt: "I think so." if "Anna 3\n" in prompt else "CORRECT")
    values = [value_of(row["judged"]) for row in with_verdicts(answers, found.rows)]
    assert values == [None if doc == 3 else 1.0 for doc in range(12)]
    assert found.about["n_unparsable"] == 1
    assert found.about["n_missing"] == 0


def test_a_verdict_that_was_cut_is_none(bench):
    reply = Answer("CORRECT", (1,), "length", 0.0)
    answers = [answer(doc, f"Anna {doc}") for doc in range(2)]
    found, _ = bench.judge(answers, lambda prompt: reply if "Anna 1\n" in prompt else "CORRECT")
    assert [row["verdict"] for row in found.rows] == ["CORRECT", "unparsable"]


@pytest.mark.parametrize("n", [1, 12])
def test_a_judge_that_answers_in_prose_is_an_error_that_quotes_nothing(bench, n):
    answers = [answer(doc, f"Anna {doc}") for doc in range(n)]
    with pytest.raises(TaskError) as error:
        bench.judge(answers, lambda prompt: "The candidate answer agrees with Anna.")
    message = str(error.value)
    assert f"task aa_lcr: {n} of {n} verdicts of the judge are neither CORRECT nor INCORRECT, more than 10%" in message
    assert "the first is on question 0, repeat 0 (request " in message and "judge.thinking" in message
    assert "Anna" not in message and "agrees" not in message
    (journal,) = (bench.journals / "judge" / "judge").iterdir()
    assert len(journal.read_text().splitlines()) == 1 + n  # the verdicts are kept


def test_a_failing_judge_leaves_gaps_that_the_next_run_fills(bench):
    answers = [answer(0, "Anna"), answer(1, "Ben")]
    found, _ = bench.judge(answers, lambda prompt: Failure("status 500") if "Ben" in prompt else fair(prompt))
    assert (found.about["n_missing"], found.about["missing_reasons"]) == (1, ["status 500"])
    assert [value_of(row["judged"]) for row in with_verdicts(answers, found.rows)] == [1.0, None]
    again, engine = bench.judge(answers)
    assert len(engine.asked) == 1 and again.about["n_missing"] == 0


def test_an_answer_that_the_judge_cannot_hold_is_an_error(bench):
    with pytest.raises(EngineError, match="aa_lcr, question 0: its answer and the judge's prompt around it: .* never cut"):
        bench.judge([answer(0, "Anna " * 400)], context=300)


def test_a_judge_without_a_chat_template_is_refused(bench, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(tiny_tokenizer, "chat_template", None)
    with pytest.raises(TaskError, match=r"judge\.path: the judge has no chat template"):
        bench.judge([answer(0, "Anna")])


SUITE = """
schema = 1
name = "judged"

[model]
path = "{model}"

[[variant]]
name = "bf16"
method = "bf16"

[[variant]]
name = "other"
method = "checkpoint"
path = "{other}"

[[task]]
name = "aa_lcr"

[sampling]
max_tokens = 16

[engine]
kind = "hf"

[judge]
path = "{judge}"
engine = {{ kind = "hf", args = {{ batch_size = 2 }} }}
"""
ANSWERS = {
    "Who?": "Anna Smith",
    "How many?": "There were 148 companies.",
    "When?": "in 1999",
    "Which guide?": "The guide by Smith",
}


REAL_ENGINE, REAL_JUDGE = Workbench.engine, Workbench.judge_engine
HF = 'engine = { kind = "hf", args = { batch_size = 2 } }'
SERVER = 'engine = { kind = "server" }'
ENDPOINT = 'endpoint = { url = "http://localhost:8000/v1", model = "judge", api_key_env = "KEY" }'


class Surroundings:
    """A suite with a judge, of which all models are scripts."""

    def __init__(self, tmp_path: Path, tiny_model: Path, tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
        self.path, self.results, self.monkeypatch = tmp_path / "judged.toml", tmp_path / "results", monkeypatch
        other, judging = build_tiny_model(tmp_path / "other", seed=1), build_tiny_model(tmp_path / "judge", seed=2)
        self.path.write_text(SUITE.format(model=tiny_model, other=other, judge=judging))
        self.asked_judge: list[str] = []
        self.judge = fair

        def answering(bench, checkpoint):
            return ScriptedEngine(tokenizer, reply, context_length=100_000, answers_depend_on_batch=False)

        def reply(prompt):
            return next(text for asked, text in ANSWERS.items() if f"START QUESTION\n\n{asked}" in prompt)

        def judging_engine(bench, model):
            assert model.label == "judge"
            return ScriptedEngine(tokenizer, self._judge, answers_depend_on_batch=False)

        monkeypatch.setattr(Workbench, "engine", answering)
        monkeypatch.setattr(Workbench, "context_length", lambda bench, stage: 100_000)
        monkeypatch.setattr(Workbench, "judge_engine", judging_engine)

    def _judge(self, prompt):
        self.asked_judge.append(prompt)
        return self.judge(prompt)

    def run(self) -> int:
        self.monkeypatch.setattr(sys, "argv", ["harness", "run", str(self.path), "--results", str(self.results)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return int(ended.value.code or 0)

    @property
    def folder(self) -> Path:
        return max((self.results / "judged").iterdir(), key=lambda path: path.stat().st_mtime)

    def metric(self, variant: str, name: str) -> dict:
        rows = read_lines(self.folder / "tasks.jsonl")
        return next(row for row in rows if (row["variant"], row["metric"]) == (variant, name))


@pytest.fixture
def judged(tmp_path, tiny_model, tiny_tokenizer, monkeypatch) -> Surroundings:
    monkeypatch.setenv("HARNESS_MIRROR", str(tmp_path / "mirror"))
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR", raising=False)
    aa_lcr._cl100k_counter.cache_clear()
    write_copy(tmp_path / "mirror")
    return Surroundings(tmp_path, tiny_model, tiny_tokenizer, monkeypatch)


def test_a_suite_with_a_judge_shows_its_figure_beside_the_exact_match(judged):
    assert judged.run() == 0
    metric = judged.metric("bf16", "judge_correct")
    assert (metric["primary"], metric["value"], metric["n_scored"], metric["n_total"]) == ("judge_correct", 0.75, 4, 4)
    assert judged.metric("bf16", "exact_match")["value"] == 0.5
    assert len(judged.asked_judge) == 4  # both variants gave the same answers
    about = json.loads((judged.folder / "run.json").read_text())
    assert about["resolved"]["judge"]["prompt"] == judge_prompt.prompt_hash()
    assert metric["judge"]["weights"] and metric["judge"]["n_asked"] == 4
    task = json.loads((judged.folder / "tasks" / "aa_lcr" / "task.json").read_text())
    assert task["origin"]["aa_lcr"].endswith("; sizes of prompts checked by characters")
    sample = read_samples(judged.folder / "samples" / "other.aa_lcr.jsonl.zst")[0]
    assert (sample["judged"]["verdict"], sample["cluster"]) == ("CORRECT", "law")
    note = f"aa_lcr: judged by {judged.path.parent / 'judge'} (weights {metric['judge']['weights'][:12]}, prompt {judge_prompt.prompt_hash()})."
    assert note in (judged.folder / "table.md").read_text()
    assert judged.run() == 0
    assert len(judged.asked_judge) == 4


def test_verdicts_survive_the_cache_and_a_new_score(judged, own_cache):
    judged.run()
    before = (judged.folder / "tasks.jsonl").read_text()
    shutil.rmtree(own_cache)
    rescore(judged.folder)
    assert (judged.folder / "tasks.jsonl").read_text() == before
    assert judged.run() == 0
    assert len(judged.asked_judge) == 4  # the journal has them


def test_a_judge_that_fails_leaves_a_run_with_gaps(judged):
    judged.judge = lambda prompt: Failure("status 500") if "How many?" in prompt else fair(prompt)
    assert judged.run() == 4
    assert judged.metric("bf16", "judge_correct")["n_scored"] == 3
    judged.judge = fair
    assert judged.run() == 0
    assert judged.metric("bf16", "judge_correct")["n_scored"] == 4


def test_a_prose_judge_ends_the_run_and_the_answers_are_kept(judged, capsys):
    judged.judge = lambda prompt: "It looks right to me."
    assert judged.run() == 2
    assert "4 of 4 verdicts of the judge are neither" in "".join(capsys.readouterr())
    judged.judge = fair
    judged.path.write_text(judged.path.read_text().replace("[judge]", "[judge]\nmax_tokens = 32"))
    assert judged.run() == 0


def test_the_engine_of_the_section_judges(judged, capsys):
    judged.monkeypatch.setattr(Workbench, "engine", REAL_ENGINE)
    judged.monkeypatch.setattr(Workbench, "judge_engine", REAL_JUDGE)
    assert judged.run() == 2  # random weights write neither word
    output = "".join(capsys.readouterr())
    assert "verdicts of the judge are neither CORRECT nor INCORRECT" in " ".join(output.split())
    (journal,) = judged.results.glob("journals/*/judge/*.jsonl")
    protocol = json.loads(journal.read_text().splitlines()[0])["protocol"]
    assert (protocol["prompt"], protocol["batch_size"]) == (judge_prompt.prompt_hash(), 2)


def test_how_a_judges_server_is_asked_is_no_part_of_any_key(judged):
    text = judged.path.read_text()
    keys = []
    for args in ("concurrency = 2", "concurrency = 4"):
        judged.path.write_text(text.replace(HF, SERVER.replace(" }", f", args = {{ {args} }} }}") + "\n" + ENDPOINT))
        keys.append({stage.key for stage in make_plan(load_suite(judged.path), Store(cache_folder())).stages})
    assert keys[0] == keys[1]


def test_only_what_follows_from_the_judge_is_keyed_by_it(judged):
    plan = make_plan(load_suite(judged.path), Store(cache_folder()))
    judged.path.write_text(judged.path.read_text().replace("[judge]", "[judge]\nmax_tokens = 32"))
    other = make_plan(load_suite(judged.path), Store(cache_folder()))
    kinds = {stage.kind for stage in other.stages if stage.key not in {s.key for s in plan.stages}}
    assert kinds == {"judge", "score"}
    order = [stage.kind for stage in plan.stages]
    assert order.index("judge") > max(i for i, kind in enumerate(order) if kind == "evaluate")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            ('name = "aa_lcr"', 'name = "mini_math"'),
            "judge: has no effect: no task is judged; remove it, or add one of: aa_lcr",
        ),
        (("batch_size = 2", "batch = 2"), "judge.engine.args.batch: unknown key; did you mean batch_size?"),
        (('engine = { kind = "hf"', 'engine = { kind = "hg"'), "judge.engine.kind: found 'hg'; did you mean hf?"),
        (
            ('kind = "hf", args', 'kind = "hf", kernels = "native", args'),
            'judge.engine.kernels: has no effect with kind = "hf"',
        ),
        (("[judge]", "[judge]\ntemperature = 1.0"), "judge.temperature: unknown key"),
        (("[judge]", "[judge]\nmax_tokens = 0"), "judge.max_tokens: found 0"),
        (('engine = { kind = "hf", args = { batch_size = 2 } }', ""), "judge.engine: missing"),
        (("[judge]", "[judge]\n" + ENDPOINT), 'judge.endpoint: has no effect with judge.engine.kind = "hf"'),
        (
            ('kind = "hf", args', 'kind = "hf", launch = {}, args'),
            'judge.engine.launch: has no effect with kind = "hf"',
        ),
        ((HF, SERVER + "\n" + ENDPOINT.replace("http", "ftp")), "judge.endpoint.url: found 'ftp://localhost:8000/v1'"),
        ((HF, SERVER + "\n" + ENDPOINT.replace("KEY", "sk-123")), "judge.endpoint.api_key_env: not a variable's name"),
        (
            (HF, SERVER.replace(" }", ", launch = {} }") + "\n" + ENDPOINT),
            "judge.engine.launch: has no effect: the judge has an endpoint",
        ),
        (
            (HF, SERVER.replace(" }", ', launch = { command = ["serve"] } }')),
            "judge.engine.launch.command: {folder} is missing",
        ),
        (
            (HF, SERVER.replace(" }", ", args = { max_num_seqs = 1 } }") + "\n" + ENDPOINT),
            "judge.engine.args.max_num_seqs: has no effect",
        ),
    ],
)
def test_mistakes_of_a_judge_section_are_named(judged, change, message):
    judged.path.write_text(judged.path.read_text().replace(*change))
    with pytest.raises(SuiteError) as error:
        load_suite(judged.path)
    assert message in str(error.value)


def test_a_judge_that_is_nowhere_is_an_error_of_its_key(judged):
    text = judged.path.read_text()
    judged.path.write_text(text.replace(str(judged.path.parent / "judge"), "/nowhere"))
    with pytest.raises(Exception, match=r"judge\.path: /nowhere: no such folder"):
        make_plan(load_suite(judged.path), Store(cache_folder()))
