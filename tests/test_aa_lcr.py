"""AA-LCR: its files, its frame, what is checked of them, and the exact match that needs no judge."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from conftest import MIRROR

from harness import evaluation
from harness.errors import DataError
from harness.prepared import Question
from harness.schema_evaluation import Thinking
from harness.task_files import TASKS_FOLDER
from harness.tasks import aa_lcr
from harness.tasks.short_answers import is_short_answer
from tests.aa_lcr_copy import COLUMNS, ROWS, TEXTS, write_copy, write_rows, write_texts
from tests.asking import task


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A made-up copy in the layout of the data set: three sets, five questions, the last of which lacks a text."""
    monkeypatch.setenv("HARNESS_MIRROR", str(tmp_path / "mirror"))
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR", raising=False)
    aa_lcr._cl100k_counter.cache_clear()
    return write_copy(tmp_path / "mirror")


def rows_of_copy() -> dict[str, dict[str, Any]]:
    return {row["question_id"]: row for row in aa_lcr.dataset()["test"]}


def test_a_prompt_holds_the_documents_in_the_order_of_its_row_in_the_frame_of_the_benchmark(copy):
    assert rows_of_copy()["1"]["prompt"] == (
        f"BEGIN INPUT DOCUMENTS\n\nBEGIN DOCUMENT 1:\n{'two ' * 100}\nEND DOCUMENT 1\n\nBEGIN DOCUMENT 2:\n{'one ' * 100}\n"
        "END DOCUMENT 2\n\nEND INPUT DOCUMENTS\n\nAnswer the following question using the input documents provided above.\n\n"
        "START QUESTION\n\nWho?\n\nEND QUESTION\n"
    )


def test_questions_of_a_set_are_neighbours_and_share_their_prompt_up_to_the_question(copy):
    rows = list(aa_lcr.dataset()["test"])
    assert [row["question_id"] for row in rows] == ["1", "3", "2", "4", "5"]
    assert [row["cluster"] for row in rows] == ["law", "law", "study", "games", "games"]
    first, second = (row["prompt"].partition("START QUESTION") for row in rows[:2])
    assert first[0] == second[0] and first[2] != second[2]


def test_a_question_that_lacks_a_text_is_excluded_with_the_reason_and_never_scored(copy):
    rows = rows_of_copy()
    assert [row["excluded"] for row in rows.values()].count(None) == 4
    assert "has no text 'lost – guide.txt' in games" in rows["5"]["excluded"]
    assert "five" not in rows["5"]["prompt"]
    assert aa_lcr.score(rows["5"], ["The other guide"]) == {}


def test_a_copy_in_which_many_questions_lack_a_text_is_refused(copy):
    write_texts(copy, {"lcr/Legal/law/first.txt": "one " * 100})
    with pytest.raises(DataError, match=r"5 of 5 questions lack a text, more than 25%; the first: .*What’s new"):
        aa_lcr.dataset()


@pytest.mark.parametrize("encoding", ["cp437", "cp1252", "latin-1"])
def test_names_of_texts_that_were_read_in_another_encoding_are_found(copy, encoding):
    wanted = rows_of_copy()
    write_texts(copy, {f"lcr/{'/'.join(where)}".encode().decode(encoding): text for where, text in TEXTS.items()})
    found = rows_of_copy()
    assert [found[key]["prompt"] for key in found] == [wanted[key]["prompt"] for key in wanted]


def test_names_of_decomposed_letters_are_found(copy):
    texts = {f"lcr/{'/'.join(where)}".replace("ş", "s\u0327"): text for where, text in TEXTS.items()}
    write_texts(copy, texts)
    assert rows_of_copy()["2"]["excluded"] is None


def test_two_texts_that_may_be_the_wanted_one_are_an_error(copy):
    texts = {f"lcr/{'/'.join(where)}": text for where, text in TEXTS.items()}
    text = texts.pop("lcr/Legal/law/What’s new.txt")
    write_texts(copy, texts | {"lcr/Legal/law/What?s new.txt": text, "lcr/Legal/law/What_s new.txt": text})
    with pytest.raises(DataError, match="2 texts may be 'What’s new.txt': 'What.s new.txt', 'What.s new.txt'; name it"):
        aa_lcr.dataset()


def test_a_text_that_was_cut_is_an_error_that_names_the_question_the_counts_and_the_texts(copy):
    write_texts(copy, {f"lcr/{'/'.join(where)}": text[:50] for where, text in TEXTS.items()})
    with pytest.raises(DataError) as error:
        aa_lcr.dataset()
    assert "question 1: the prompt has 322 characters, its row says 255 tokens; allowed: 3.2 to 5.3 characters a token" in str(
        error.value
    )
    assert "texts of law: What’s new.txt 50, first.txt 50" in str(error.value)


def test_the_row_says_which_count_was_made(copy):
    checks = rows_of_copy()["1"]["checks"]
    assert (checks["counted_by"], checks["counted"], checks["input_tokens"]) == ("characters", 1022, 255)
    said = aa_lcr.dataset()["test"].info.description
    assert said.startswith("mirror ArtificialAnalysis/AA-LCR, revision unknown, AA-LCR_Dataset.csv sha256 ")
    assert said.endswith("; sizes of prompts checked by characters")


def test_with_cl100k_at_hand_tokens_are_counted_and_held_within_two_percent(copy, monkeypatch):
    monkeypatch.setattr(aa_lcr, "_cl100k_counter", lambda: lambda text: len(text.split()))
    words = len(aa_lcr.frame(["two " * 100, "one " * 100], "Who?").split())
    rows = [row for row in ROWS if row[2] == "1"]
    write_rows(copy, rows, tokens=words)
    assert rows_of_copy()["1"]["checks"]["counted_by"] == "cl100k_base"
    write_rows(copy, rows, tokens=round(words * 1.03))
    with pytest.raises(
        DataError, match=rf"the prompt has {words} cl100k tokens, its row says {round(words * 1.03)} tokens; allowed: within 2%"
    ):
        aa_lcr.dataset()


def test_another_file_in_the_place_of_cl100k_is_an_error_and_nothing_is_downloaded(copy, tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    (tmp_path / "9b5ad71b2ce5302211f9c61530b329a4922fc6a4").write_text("not it")
    with pytest.raises(DataError, match="not the file of cl100k_base"):
        aa_lcr.dataset()


@pytest.mark.parametrize("column", [*COLUMNS, "input_tokens"])
def test_a_missing_column_is_named_with_those_that_are_there(copy, column):
    path = copy / aa_lcr.QUESTIONS_FILE
    header, _, rest = path.read_text().partition("\n")
    path.write_text(",".join("renamed" if name == column else name for name in header.strip().split(",")) + "\n" + rest)
    with pytest.raises(DataError, match=rf'AA-LCR_Dataset.csv: no column "{column}"; it has: .*renamed'):
        aa_lcr.dataset()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no rows"),
        ([ROWS[0], ROWS[0]], "row 2: question_id 1 is there twice"),
        ([(*ROWS[0][:4], " ", ROWS[0][5])], "row 1: answer is empty"),
    ],
)
def test_rows_that_cannot_be_asked_are_refused(copy, rows, message):
    write_rows(copy, rows)
    with pytest.raises(DataError, match=message):
        aa_lcr.dataset()


def test_a_count_that_is_no_number_is_refused(copy):
    write_rows(copy, ROWS, tokens="many")
    with pytest.raises(DataError, match="row 1: input_tokens 'many' is no number of tokens"):
        aa_lcr.dataset()


def test_a_mirror_without_the_zip_or_with_a_broken_one_is_refused(copy):
    (copy / aa_lcr.TEXTS_FILE).write_bytes(b"PK no zip")
    with pytest.raises(DataError, match="not a readable zip file"):
        aa_lcr.dataset()
    (copy / aa_lcr.TEXTS_FILE).unlink()
    with pytest.raises(DataError, match="has no file extracted_text/AA-LCR_extracted-text.zip; copy it there"):
        aa_lcr.dataset()


def test_a_text_that_is_not_utf8_is_named(copy):
    write_texts(copy, {f"lcr/{'/'.join(where)}": text.encode("utf-16") for where, text in TEXTS.items()})
    with pytest.raises(DataError, match=r"lcr/Legal/law/What’s new.txt: not UTF-8"):
        aa_lcr.dataset()


def test_without_a_mirror_the_hub_is_asked_and_its_absence_says_what_to_do():
    with pytest.raises(DataError, match="neither in the mirror nor to be had from the hub .*HARNESS_MIRROR"):
        aa_lcr.dataset()


def test_from_the_hub_both_files_are_of_one_commit_which_is_named(copy, monkeypatch):
    import huggingface_hub

    wanted = []

    def download(dataset, name, *, repo_type, revision):
        wanted.append(revision)
        return str(snapshot / name)

    snapshot = copy.rename(copy.with_name("0f1e2d3c"))
    monkeypatch.delenv("HARNESS_MIRROR")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    said = aa_lcr.dataset()["test"].info.description
    assert said.startswith(
        "hub ArtificialAnalysis/AA-LCR at 0f1e2d3c, its newest when it was fetched, AA-LCR_Dataset.csv sha256 "
    )
    assert wanted == [None, "0f1e2d3c"]


def test_plain_lm_eval_asks_with_the_prompt_and_scores_only_what_has_its_texts(copy):
    from lm_eval import simple_evaluate
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager

    class Answering(LM):
        def generate_until(self, requests, disable_tqdm=False):
            self.asked = [request.args[0] for request in requests]
            return [" Anna Smith\n" for _ in requests]

        def loglikelihood(self, requests, disable_tqdm=False):
            raise AssertionError

        loglikelihood_rolling = loglikelihood

    lm = Answering()
    manager = TaskManager(include_path=str(TASKS_FOLDER), include_defaults=False)
    found = simple_evaluate(lm, tasks=["aa_lcr"], task_manager=manager, bootstrap_iters=0)
    assert found["results"]["aa_lcr"]["exact_match,answer"] == 1 / 4
    assert lm.asked[0] == rows_of_copy()["1"]["prompt"]


def test_the_benchmark_of_the_prompts_counts_what_it_made(copy, tiny_model):
    bench = Path(__file__).parent.parent / "bench" / "aa_lcr_prompts.py"
    command = [sys.executable, str(bench), "--tokenizer", str(tiny_model), "--once"]
    made = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    assert (made["questions"], made["prompts"]) == (5, 4)
    assert 0.1 < made["peak_gib"] < 2 and made["cpu_s"] > 0 and made["tokens"] > 4 * 200


def test_the_answer_is_the_whole_response_and_none_is_invalid():
    assert aa_lcr.extract([[" Asana.\n"], ["\n "]], [{}, {}]) == [["Asana."], ["[invalid]"]]
    assert aa_lcr.score({"excluded": None, "answer": "[invalid]"}, ["[invalid]"]) == {"exact_match": 0.0}


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("Asana", "**Asana**."),
        ("No", "no."),
        ("Sameer ", "The answer is: Sameer"),
        ("Nasdaq", "Both files were compared.\n\n**Answer:** NASDAQ"),
        ("148 companies.", "The report names 148 of these companies"),
        ("5597456", "The sum is $5,597,456."),
        ("7.1 billion", "7,100 million"),
        ("50%.", "Fifty would be 50 percent"),
        ("-76%, -42%", "They changed by -76% and −42%, respectively."),
        ("0.16", "Rounded to two places this is 0.16"),
        ("1. the US\\n2. Australia", "1. The US\n2. Australia"),
        ("1. the US\\n2. Australia", "- the US\n- Australia"),
        ("D.A. Davidson & Co., Cowen", "D. A. Davidson & Co.; Cowen"),
        ("1948 (round up from 1947.4)", "1948 (round up from 1947.4)"),
        ("6", "I counted them in each transcript, of which there are 10.\n\nThe answer is 6."),
    ],
)
def test_answers_that_say_the_gold_answer_and_nothing_else_match(gold, answer):
    assert is_short_answer(gold, answer)


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("Asana", "1. Smartsheet\n2. Asana"),
        ("Asana", "The candidates were:\n\n- Smartsheet\n\n- Asana"),
        ("Asana", "Not Asana"),
        ("6", "16"),
        ("6", "6 or 7"),
        ("6", "6.5"),
        ("2", "2.5x"),
        ("5", ".5"),
        ("6", "Q6"),
        ("50%", "50"),
        ("7.1 billion", "7.1 million"),
        ("-76%, -42%", "-42%, -76%"),
        ("-76%", "76%"),
        ("148 companies", "148 people"),
        ("by August 2, 2026.", "by March 2, 2026"),
        ("Q2, 6% increase", "6% increase"),
        ("1. the US\\n2. Australia", "1. Australia\n2. the US"),
        ("No", "I do not know"),
        ("6", ""),
        ("?", "?"),
    ],
)
def test_answers_that_say_something_else_or_more_do_not_match(gold, answer):
    assert not is_short_answer(gold, answer)


def scored(rows: list[dict[str, Any]], respond: Callable[[str], str], **settings: Any) -> dict[str, Any]:
    """What the answers `respond(gold answer)` to all questions that are asked come to."""
    questions = [
        Question(doc, "aa_lcr", row["question_id"], row["cluster"], row["answer"], row, row["excluded"])
        for doc, row in enumerate(rows)
    ]
    said = {"repeat": 0, "requests": [], "seed": None, "stops": [], "finish_reason": ["stop"], "n_tokens": 1, "missing": None}
    answers = [{"doc": q.doc, "response": [respond(q.target)], "seconds": 0.0, **said} for q in questions if q.excluded is None]
    about = {"name": "aa_lcr", "version": 1, "draws": {"aa_lcr": 1}, "primary": "exact_match"}
    about |= {"is_partial": False, "publishable": False, "notes": []}
    engine = {"kernels": {}, "flags": [], "repeats": 1}
    return evaluation.score_task(task("aa_lcr", **settings), about, questions, answers, engine)[1]


@pytest.fixture(scope="module")
def rows():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HARNESS_MIRROR", str(MIRROR))
        return list(aa_lcr.dataset()["test"])


@pytest.mark.skipif(MIRROR is None or not (Path(MIRROR) / aa_lcr.DATASET).is_dir(), reason="no mirror with AA-LCR")
class TestTheRealSet:
    def test_has_a_hundred_questions_of_thirty_sets_two_of_which_lack_a_text(self, rows):
        assert len(rows) == 100 and len({row["cluster"] for row in rows}) == 30
        assert [row["question_id"] for row in rows if row["excluded"]] == ["98", "99"]

    def test_keeps_the_sets_together(self, rows):
        sets = [row["cluster"] for row in rows]
        assert sum(one != other for one, other in pairwise(sets)) == 29

    def test_scores_the_gold_answers_with_100_percent_and_a_wrong_answer_with_0(self, rows):
        right, wrong = (scored(rows, respond) for respond in (str, lambda gold: "This is not the answer."))
        metrics = [found["metrics"]["exact_match"] for found in (right, wrong)]
        assert [(m["value"], m["n_scored"], m["n_total"]) for m in metrics] == [(1.0, 98, 98), (0.0, 98, 98)]
        assert [each["doc"] for each in right["excluded"]] == [97, 98]

    def test_scores_the_same_behind_thinking_that_holds_wrong_answers_and_0_where_it_never_ends(self, rows):
        thought = "<think>" + "The answer is 7. Or \\boxed{8}?\n\n" * 200
        found = scored(rows, lambda gold: f"{thought}</think>\n\n{gold}", thinking=Thinking())
        assert (found["metrics"]["exact_match"]["value"], found["incomplete_rate"]) == (1.0, 0.0)
        found = scored(rows, lambda gold: thought + gold, thinking=Thinking())
        assert (found["metrics"]["exact_match"]["value"], found["incomplete_rate"]) == (0.0, 1.0)

    def test_tells_the_gold_answers_of_different_questions_apart(self, rows):
        asked = [row for row in rows if row["excluded"] is None]
        alike = {
            tuple(sorted((a["answer"], b["answer"])))
            for a in asked
            for b in asked
            if a is not b and aa_lcr.score(a, [b["answer"]])["exact_match"]
        }
        assert alike == {("6", "6"), ("9", "9")}
