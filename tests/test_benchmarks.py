"""The benchmarks: their rows, oracles from question to score, and the checks behind the scores."""

import csv
import hashlib
import json
import random
import threading
import time
from pathlib import Path

import pytest
import yaml
from conftest import MIRROR
from lm_eval.api.model import LM
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager
from typer.testing import CliRunner

from harness.cli import app
from harness.engines import Answer
from harness.engines.scripted import ScriptedEngine
from harness.errors import DataError, TaskError
from harness.protocols import PROTOCOLS
from harness.tasks import aime, gpqa, gsm8k, ifeval, math500, needs
from harness.tasks.sources import RowSet, load_rows
from harness.tasks.verifier import Verifier, same_answer
from tests import asking
from tests.oracles import THINKING, boxed, made_up_gpqa, thinking, wrong

TASKS = Path(math500.__file__).parent
needs_mirror = pytest.mark.skipif(MIRROR is None, reason="HARNESS_MIRROR, a mirror with the real sets, is not set")


class Recorded(LM):
    """Plain lm-eval's view of an engine that answers every document by a function."""

    tokenizer_name = "recorded"

    def __init__(self, tokenizer, respond):
        super().__init__()
        self.tokenizer, self.respond = tokenizer, respond
        self.prompts = []

    def apply_chat_template(self, chat_history, add_generation_prompt=True):
        return self.tokenizer.apply_chat_template(chat_history, tokenize=False, add_generation_prompt=add_generation_prompt)

    def generate_until(self, requests, disable_tqdm=False):
        self.prompts += [request.args[0] for request in requests]
        return [self.respond(request.doc) for request in requests]

    def loglikelihood(self, requests, disable_tqdm=False):
        raise NotImplementedError

    loglikelihood_rolling = loglikelihood


@pytest.fixture
def ask(tiny_tokenizer, tmp_path):
    """A task through the harness, answered by a function of its documents; prepared once."""
    made = {}

    def evaluate(name, respond, **settings):
        asked = asking.task(name, **settings)
        key = (name, settings.get("limit"))
        made[key] = made.get(key) or asking.prepare(asked, tiny_tokenizer)
        docs = {each.prompt: made[key].questions[each.doc].fields for each in made[key].asks}
        engine = ScriptedEngine(tiny_tokenizer, lambda prompt: respond(docs[prompt]), context_length=100_000)
        journals = tmp_path / f"journals-{len(list(tmp_path.iterdir()))}"
        return asking.evaluate(name, engine, journals, prepared=made[key], **settings)

    return evaluate


def values(found):
    return {name: metric["value"] for name, metric in found.result["metrics"].items()}


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    folder = tmp_path / "mirror"
    folder.mkdir()
    monkeypatch.setenv("HARNESS_MIRROR", str(folder))
    return folder


def jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


# -- oracles


@needs_mirror
@pytest.mark.parametrize(
    ("name", "metric", "limit"),
    [("math500", "math_verify", 25), ("aime24", "exact_match", None), ("gsm8k", "exact_match", 100)],
)
def test_an_oracle_scores_100_percent_with_and_without_thinking_and_a_wrong_engine_0(ask, name, metric, limit, monkeypatch):
    monkeypatch.setenv("HARNESS_MIRROR", str(MIRROR))
    right = ask(name, boxed, limit=limit)
    assert values(right).pop(metric) == 1.0
    assert {value for key, value in values(right).items() if key != metric} <= {0.0}
    thought = ask(name, lambda doc: thinking(boxed(doc)), limit=limit, thinking=THINKING)
    assert values(thought) == values(right)
    assert thought.result["incomplete_rate"] == 0.0
    assert min(sample["n_tokens"] for sample in thought.samples) > 2000
    assert set(values(ask(name, wrong, limit=limit)).values()) == {0.0}


@needs_mirror
def test_an_engine_that_never_ends_its_thought_scores_0_and_is_incomplete(ask, monkeypatch):
    monkeypatch.setenv("HARNESS_MIRROR", str(MIRROR))
    found = ask("aime24", lambda doc: f"<think>so {boxed(doc)}", thinking=THINKING)
    assert values(found)["exact_match"] == 0.0
    assert found.result["incomplete_rate"] == 1.0


def test_an_oracle_of_made_up_gpqa_scores_100_percent_however_it_writes_and_a_wrong_engine_0(ask, mirror):
    made_up_gpqa(mirror, 198)
    forms = ["\\boxed{%s}", "Answer: %s", "**Answer:** (%s)", "I think\n%s", "\\boxed{\\text{%s}}"]

    def write(doc, letter):
        return forms[int(doc["record"][3:]) % len(forms)] % letter

    right = ask("gpqa_diamond", lambda doc: thinking(write(doc, doc["answer"])), thinking=THINKING)
    assert values(right) == {"exact_match": 1.0}
    assert len({each.prompt for each in right.prepared.asks}) == 198
    others = {"A": "B", "B": "C", "C": "D", "D": "A"}
    assert values(ask("gpqa_diamond", lambda doc: write(doc, others[doc["answer"]]))) == {"exact_match": 0.0}


@pytest.mark.parametrize(
    ("written", "is_incomplete"),
    [
        ("3 + 4 = %s and", True),
        ("So it is \\boxed{%s}. To check,", False),
        ("So:\n#### %s\nIn other words,", False),
    ],
)
def test_a_number_in_the_midst_of_reasoning_that_was_cut_is_no_answer(ask, mirror, written, is_incomplete):
    jsonl(mirror / "openai/gsm8k/test.jsonl", [{"question": f"Q{i}", "answer": "#### 7"} for i in range(1319)])
    found = ask("gsm8k", lambda doc: Answer(written % doc["answer"], (1,) * 2048, "length", 0.0), limit=1)
    assert found.samples[0]["is_truncated"]
    assert found.samples[0]["is_incomplete"] is is_incomplete
    assert values(found)["exact_match"] == (0.0 if is_incomplete else 1.0)
    ended = ask("gsm8k", lambda doc: written % doc["answer"], limit=1)
    assert values(ended)["exact_match"] == 1.0


@pytest.mark.parametrize(
    ("written", "is_incomplete"),
    [
        ("Options (A) and (%s)", True),
        ("The answer is", True),
        ("**Answer: %s**\nfor", False),
        ("$\\boxed{%s}$ since", False),
        ("Answer: $\\text{%s}$", False),
    ],
)
def test_an_option_named_in_reasoning_that_was_cut_is_no_answer(ask, mirror, written, is_incomplete):
    made_up_gpqa(mirror, 198)

    def cut(doc):
        return Answer(written.replace("%s", doc["answer"]), (1,) * 32768, "length", 0.0)

    found = ask("gpqa_diamond", cut, limit=2)
    assert {sample["is_incomplete"] for sample in found.samples} == {is_incomplete}
    assert values(found)["exact_match"] == (0.0 if is_incomplete else 1.0)


def test_aime25_is_read_by_its_own_schema_and_scored(ask, mirror):
    rows = [{"id": i, "problem": f"Problem {i}", "answer": str(10 * i), "solution": "…", "year": 2025} for i in range(30)]
    jsonl(mirror / "yentinglin/aime_2025/train.jsonl", rows)
    found = ask("aime25", lambda doc: f"\\boxed{{0{doc['answer']}}}")
    assert values(found) == {"exact_match": 1.0, "verifiers_disagree": 0.0, "verifier_gave_up": 0.0}
    assert found.prepared.asks[1].prompt == (
        "<|start|>user\nProblem 1\n\nPlease reason step by step, and put your final answer within \\boxed{}.<|end|>\n"
        "<|start|>assistant\n"
    )
    assert found.samples[1]["question"] == hashlib.sha256(b"Problem 1").hexdigest()


@needs_mirror
def test_plain_lm_eval_with_our_files_gives_the_same_prompts_and_scores(ask, tiny_tokenizer, tmp_path, monkeypatch):
    mirror = tmp_path / "mirror"
    mirror.mkdir()
    for name in ("HuggingFaceH4", "openai"):
        (mirror / name).symlink_to(Path(MIRROR) / name)
    made_up_gpqa(mirror, 198)
    monkeypatch.setenv("HARNESS_MIRROR", str(mirror))
    names = ["math500", "aime24", "gsm8k", "gpqa_diamond"]

    def respond(doc):
        """Right, wrong, or nothing, by the question."""
        luck = hashlib.sha256(doc["question"].encode()).digest()[0] % 3
        return [boxed(doc), "\\boxed{B}", "I do not know"][luck]

    ours = {name: ask(name, respond, limit=20) for name in names}
    lm = Recorded(tiny_tokenizer, respond)
    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    found = simple_evaluate(lm, tasks=names, task_manager=manager, limit=20, bootstrap_iters=0, apply_chat_template=True)
    for name in names:
        plain = {key.partition(",")[0]: value for key, value in found["results"][name].items() if "," in key}
        assert {key: value for key, value in plain.items() if not key.endswith("_stderr")} == values(ours[name])
    assert sorted(lm.prompts) == sorted(each.prompt for name in names for each in ours[name].prepared.asks)
    assert 0 < values(ours["gpqa_diamond"])["exact_match"] < 1


# -- gold against answers


@pytest.mark.parametrize(
    ("gold", "answer", "is_same"),
    [
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3, \pi/2)", True),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3, \pi)", False),
        (r"\frac{3}{4}", "0.75", True),
        (r"3\sqrt{13}", r"\sqrt{117}", True),
        ("p - q", "p-q", True),
        ("p - q", "q - p", False),
        (r"\text{Evelyn}", "Evelyn", True),
        (r"\text{Evelyn}", r"\text{Carla}", False),
        (r"\text{(C)}", "C", True),
        (r"\$32,\!348", "32348", True),
        ("90^\\circ", "90", True),
        ("1, -2", "-2, 1", True),
        ("(1,2)", "(2,1)", False),
        ("2", "zebra", False),
        ("2", "{{{", False),
    ],
)
def test_answers_are_compared_as_mathematics(gold, answer, is_same):
    assert same_answer(gold, answer) is is_same


def test_a_comparison_that_does_not_end_is_given_up_and_the_next_one_works():
    verifier = Verifier(limit_s=1.0)
    began = time.monotonic()
    assert verifier.same("9^{9^{9}}", "1") is None
    assert time.monotonic() - began < 30
    assert verifier.same("1/2", "0.5") is True
    verifier.close()


def test_answers_are_compared_outside_the_main_thread():
    found = []
    thread = threading.Thread(target=lambda: found.append(same_answer("7", "7.0")))
    thread.start()
    thread.join()
    assert found == [True]


def test_what_could_not_be_compared_scores_0_and_is_counted(monkeypatch):
    monkeypatch.setattr(math500, "same_answer", lambda gold, answer: None)
    assert math500.score({"answer": "1"}, ["1"]) == {"math_verify": 0.0, "verifier_gave_up": 1.0}
    monkeypatch.setattr(aime, "same_answer", lambda gold, answer: None)
    assert aime.score({"answer": "1"}, ["1"]) == {"exact_match": 1.0, "verifiers_disagree": 0.0, "verifier_gave_up": 1.0}


@pytest.mark.parametrize(("said", "right", "disagree"), [("204", 1.0, 0.0), (r"\frac{408}{2}", 0.0, 1.0), ("5", 0.0, 0.0)])
def test_where_the_two_checks_of_an_integer_differ_is_counted(said, right, disagree):
    found = aime.score({"answer": "204"}, [said])
    assert (found["exact_match"], found["verifiers_disagree"]) == (right, disagree)


def test_a_missing_math_verify_says_what_to_do(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(TaskError, match="math_verify is not installed.*make install"):
        Verifier().same("1", "1")
    with pytest.raises(TaskError, match="math500: not installed: math_verify, latex2sympy2_extended, antlr4"):
        needs.require("math500")
    assert needs.missing("gpqa_diamond") is None


def test_a_math_verify_that_does_not_start_is_no_verdict(monkeypatch, tmp_path):
    (tmp_path / "math_verify.py").write_text("raise ImportError('no antlr')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(TaskError, match="does not start: ImportError: no antlr"):
        Verifier().same("1", "1")


# -- GPQA


def test_the_options_of_a_question_stand_in_an_order_that_its_text_alone_decides(mirror):
    made_up_gpqa(mirror, 198)
    random.seed(1)
    first = gpqa.dataset(n_rows=198)["test"].to_list()
    random.seed(2)
    assert gpqa.dataset(n_rows=198)["test"].to_list() == first
    places = [doc["answer"] for doc in first]
    assert all(30 <= places.count(letter) <= 70 for letter in "ABCD")
    # fixed for good: with another order, results of before and after could not be compared
    assert gpqa.option_order("How far does it fall?") == [1, 3, 2, 0]
    assert gpqa.option_order(" How far does it fall?\n") == [1, 3, 2, 0]
    assert "canary" not in json.dumps(first)


def test_a_gated_set_says_how_to_get_access(monkeypatch):
    from datasets.exceptions import DatasetNotFoundError

    def refuse(*arguments, **options):
        raise DatasetNotFoundError("Dataset 'Idavidrein/gpqa' is a gated dataset on the Hub.")

    monkeypatch.setattr("datasets.load_dataset", refuse)
    with pytest.raises(DataError, match="gated: accept its terms.*log in.*HARNESS_MIRROR/Idavidrein/gpqa/"):
        gpqa.dataset(n_rows=198)


# -- IFEval


@pytest.fixture
def sentence_model(tmp_path, monkeypatch):
    """A sentence model that knows no abbreviations."""
    folder = tmp_path / "nltk_data" / "tokenizers" / "punkt_tab" / "english"
    folder.mkdir(parents=True)
    for name in ("abbrev_types.txt", "collocations.tab", "ortho_context.tab", "sent_starters.txt"):
        (folder / name).write_text("")
    monkeypatch.setenv("NLTK_DATA", str(tmp_path / "nltk_data"))
    return tmp_path / "nltk_data"


def ifeval_rows(n):
    asked = [
        ("punctuation:no_comma", {}),
        ("length_constraints:number_words", {"relation": "at least", "num_words": 4}),
        ("length_constraints:number_sentences", {"relation": "less than", "num_sentences": 3}),
    ]
    return [
        {"key": i, "prompt": f"Say something. ({i})", "instruction_id_list": [name for name, _ in asked], "kwargs": [k for _, k in asked]}
        for i in range(n)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("response", "prompts", "instructions"),
    [
        ("These are four words.", 1.0, 1.0),
        ("These, are four words.", 0.0, 2 / 3),
        ("One. Two. Three, four.", 0.0, 1 / 3),
        ("", 0.0, 0.0),
    ],
)
def test_instructions_are_checked_and_counted(ask, mirror, sentence_model, response, prompts, instructions):
    jsonl(mirror / "google/IFEval/ifeval_input_data.jsonl", ifeval_rows(541))
    found = ask("ifeval", lambda doc: response, limit=3)
    assert values(found)["prompt_level_strict_acc"] == values(found)["prompt_level_loose_acc"] == prompts
    assert values(found)["inst_level_strict_acc"] == pytest.approx(instructions)
    assert found.prepared.asks[0].prompt == "<|start|>user\nSay something. (0)<|end|>\n<|start|>assistant\n"


def test_instructions_weigh_alike_whatever_prompt_they_are_of():
    assert ifeval.over_instructions([[True], [False, True, True]]) == 0.75


def test_languages_are_told_apart_alike_every_time(sentence_model):
    doc = {"key": 1, "question": "Q", "instruction_id_list": ["language:response_language"], "kwargs": [{"language": "de"}]}
    found = {ifeval.score(doc, ["Otec matka syn. Otec matka syn."])["prompt_level_strict_acc"] for _ in range(20)}
    assert len(found) == 1


def test_without_a_sentence_model_nothing_is_downloaded_and_the_error_says_where_to_put_it(monkeypatch, tmp_path):
    monkeypatch.setattr(needs, "_places", lambda: iter([tmp_path / "a", tmp_path / "b"]))
    with pytest.raises(TaskError, match="sentence model is nowhere: .*punkt_tab/english/ is not in .*/a, .*/b.*NLTK_DATA"):
        ifeval.dataset(n_rows=541)


def test_a_run_says_what_a_task_lacks_before_it_loads_a_model(tiny_suite, own_cache, tmp_path, monkeypatch):
    monkeypatch.setattr(needs, "_places", lambda: iter([tmp_path / "nowhere"]))
    tiny_suite.write_text(tiny_suite.read_text().replace("mini_choice", "ifeval"))
    done = CliRunner().invoke(app, ["run", str(tiny_suite), "--results", str(tmp_path / "results")])
    assert done.exit_code == 2
    assert "ifeval: NLTK's sentence model is nowhere" in " ".join(done.output.split())
    assert not list(own_cache.glob("stages/*"))


def test_the_sentence_model_is_looked_for_where_it_was_named_then_in_the_mirror_then_in_a_package(
    monkeypatch, mirror, tmp_path
):
    package = tmp_path / "packages" / "llama_index" / "core"
    package.mkdir(parents=True)
    monkeypatch.syspath_prepend(str(tmp_path / "packages"))
    monkeypatch.setenv("NLTK_DATA", f"{tmp_path / 'one'}:{tmp_path / 'two'}")
    places = list(needs._places())
    wanted = [tmp_path / "one", tmp_path / "two", mirror / "nltk" / "nltk_data", package / "_static" / "nltk_cache"]
    assert places[:4] == wanted


# -- rows

ROWS = RowSet("org/set", "test", columns=("question", "answer"), revision="a" * 40)


def test_rows_are_read_from_jsonl_csv_and_parquet_alike(mirror):
    import pyarrow
    from pyarrow import parquet

    rows = [{"question": f'q{i}, "or"\nso', "answer": str(i), "more": "…"} for i in range(3)]
    wanted = [{key: row[key] for key in ("question", "answer")} for row in rows]
    folder = mirror / "org" / "set"
    jsonl(folder / "test.jsonl", rows)
    assert load_rows(ROWS, n_rows=3)[0] == wanted
    (folder / "test.jsonl").unlink()
    with (folder / "test.csv").open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    assert load_rows(ROWS, n_rows=3)[0] == wanted
    (folder / "test.csv").unlink()
    (folder / "data").mkdir()
    for i in range(3):
        parquet.write_table(pyarrow.Table.from_pylist(rows[i : i + 1]), folder / "data" / f"test-0000{i}-of-00003.parquet")
    found, origin = load_rows(ROWS, n_rows=3)
    assert found == wanted
    assert origin.startswith("mirror org/set, revision unknown, test-00000-of-00003.parquet sha256 ")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([{"question": "q", "solution": "s"}], r"test.jsonl: row 1 has no column 'answer'; it has: question, solution"),
        ([{"question": "q", "answer": "1"}, {"question": "q", "answer": None}], r"test.jsonl: row 2 has no value of 'answer'"),
        ([{"question": "q", "answer": "1"}], r"test.jsonl: 1 rows; org/set has 2. Get the whole set"),
        ([], r"test.jsonl: 0 rows; org/set has 2"),
    ],
)
def test_a_copy_that_lacks_something_is_an_error_that_says_what(mirror, lines, message):
    jsonl(mirror / "org/set/test.jsonl", lines)
    with pytest.raises(DataError, match=message):
        load_rows(ROWS, n_rows=2)


def test_files_of_the_mirror_that_do_not_fit_are_errors(mirror):
    folder = mirror / "org" / "set"
    jsonl(folder / "train.jsonl", [{"question": "q", "answer": "1"}])
    with pytest.raises(DataError, match=r"org/set has no file test with one of the endings .*; it has: train.jsonl"):
        load_rows(ROWS, n_rows=1)
    jsonl(folder / "test.jsonl", [{"question": "q", "answer": "1"}])
    (folder / "revision.txt").write_text("b" * 40)
    with pytest.raises(DataError, match="the mirror holds org/set at bbb.*, the task is defined on aaa.*; get that commit"):
        load_rows(ROWS, n_rows=1)
    (folder / "revision.txt").write_text("a" * 40)
    assert "at aaa" in load_rows(ROWS, n_rows=1)[1]
    (folder / "test.csv").write_text("question,answer\nq,1\n")
    with pytest.raises(DataError, match="holds the split twice: test.csv, test.jsonl; keep one"):
        load_rows(ROWS, n_rows=1)


def test_without_a_mirror_the_pinned_commit_of_the_hub_is_read(monkeypatch):
    asked = []

    def load(*arguments, **options):
        asked.append((arguments, options))
        return [{"question": "Q", "answer": "so\n#### 1,000"}]

    monkeypatch.setattr("datasets.load_dataset", load)
    made = gsm8k.dataset(n_rows=1)["test"]
    assert made[0] == {"question": "Q", "answer": "1000", "source_question": "Q"}
    assert asked == [(("openai/gsm8k", "main"), {"split": "test", "revision": gsm8k.ROWS.revision})]
    assert made.info.description == f"hub openai/gsm8k at {gsm8k.ROWS.revision}"


@pytest.mark.parametrize(
    "text", ['question,answer\n"q,1\n', "question,answer\nq\n", "question,answer\nq,1,2\n", "question,answer\n\xff,1\n"]
)
def test_a_damaged_csv_file_is_an_error_that_names_it(mirror, text):
    path = mirror / "org" / "set" / "test.csv"
    path.parent.mkdir(parents=True)
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match="test.csv: "):
        load_rows(ROWS, n_rows=1)


def test_gold_answers_that_are_none_are_errors(mirror):
    jsonl(
        mirror / "HuggingFaceH4/aime_2024/train.jsonl",
        [{"problem": "Zyzzyva", "answer": "1"}, {"problem": "Zyzzyva", "answer": "1000"}],
    )
    with pytest.raises(DataError, match=r"row 1 \(from 0\) is no integer of 0 to 999") as caught:
        aime.dataset_24(n_rows=2)
    assert "Zyzzyva" not in str(caught.value)
    jsonl(mirror / "openai/gsm8k/test.jsonl", [{"question": "q", "answer": "no mark 7"}])
    with pytest.raises(DataError, match="does not end with #### and a number"):
        gsm8k.dataset(n_rows=1)


# -- what the task files declare


class _Words(yaml.SafeLoader):
    pass


_Words.add_multi_constructor("!", lambda loader, tag, node: node.value)
CONFIGS = {
    name: yaml.load((TASKS / f"{name}.yaml").read_text(), _Words)
    for name in ("math500", "aime24", "aime25", "gpqa_diamond", "gsm8k", "ifeval")
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_task_file_leaves_nothing_of_generation_to_a_default(name):
    config = CONFIGS[name]
    assert config["task"] == name
    assert set(config["generation_kwargs"]) == {"until", "do_sample", "temperature", "max_gen_toks"}
    assert config["generation_kwargs"]["until"] == []
    assert set(config["metadata"]) - {"stated"} == {"version", "chat", "primary", "publishable", "dataset", "n_rows"}
    assert config["metadata"]["primary"] in [metric["metric"] for metric in config["metric_list"]]


def test_what_may_be_published_is_what_its_licence_allows():
    assert {name for name, config in CONFIGS.items() if config["metadata"]["publishable"]} == {"math500", "gsm8k", "ifeval"}


def test_protocols_name_tasks_that_exist():
    assert {task for protocol in PROTOCOLS.values() for task in protocol.repeats} <= {*CONFIGS, "aa_lcr"}
    assert PROTOCOLS["qad-paper"].repeats["gpqa_diamond"] == 20
    assert PROTOCOLS["qad-paper"].max_tokens is None
