"""Looking at single questions: what is found, what is shown at which width, and what never enters a page."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console
from sample_runs import sample, write_run
from typer.testing import CliRunner

from harness.cli import app
from harness.errors import StoreError
from harness.inspect import show
from harness.questions import find_question, overview, select, thinking_and_answer, visible
from harness.records import write_samples
from harness.samples import samples_path, stream_samples
from harness.schema_evaluation import Thinking
from harness.tables import build_table, render

THINKING = {"open": "<think>", "close": "</think>", "expected": True}


def shown(run, width: int = 100, **options) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"), force_terminal=True)  # noqa: SIM115
    show(run, console, **options)
    return console.export_text()


@pytest.fixture
def run(tmp_path):
    """BF16 right in 0 to 3; ptq loses 1, half of 2 and gains 4; its 3 is missing, its 5 was cut off."""
    bf16 = [sample(doc, float(doc < 4), repeat=repeat) for doc in range(6) for repeat in range(2)]
    changes = {1: (0.0, 0.0), 2: (1.0, 0.0), 3: (1.0, None), 4: (1.0, 1.0)}
    ptq = [sample(doc, changes.get(doc, (float(doc < 4),) * 2)[r], repeat=r) for doc in range(6) for r in range(2)]
    ptq[-1] |= {"is_incomplete": True, "is_truncated": True, "finish_reason": "length", "answer": {"boxed": "[invalid]"}}
    return write_run(tmp_path / "run", {("ptq", "maths"): ptq, ("bf16", "maths"): bf16})


def test_flips_are_found_both_ways_against_bf16_and_the_largest_comes_first(run):
    (found,) = overview(select(run))
    assert found.variants == ("bf16", "ptq")  # BF16 first, whatever the order of the suite
    assert [(f.question.label, f.baseline, f.candidate) for f in found.worse["ptq"]] == [("1", 1.0, 0.0), ("2", 1.0, 0.5)]
    assert [(f.question.label, f.baseline, f.candidate) for f in found.better["ptq"]] == [("4", 0.0, 1.0)]
    assert "bf16" not in found.worse
    assert (found.n_questions, found.repeats) == (6, 2)


def test_incomplete_truncated_and_missing_answers_are_listed_with_their_questions(run):
    (found,) = overview(select(run))
    assert [question.label for question in found.incomplete["ptq"]] == ["5"]
    assert [question.label for question in found.truncated["ptq"]] == ["5"]
    assert [(question.label, reason) for question, reason in found.missing["ptq"]] == [("3", "HTTP 500 after 5 tries")]
    assert not found.missing["bf16"] and not found.incomplete["bf16"]


def test_a_question_that_one_variant_was_never_asked_is_missing_and_no_flip(tmp_path):
    run = write_run(tmp_path / "r", {("bf16", "maths"): [sample(0), sample(1)], ("ptq", "maths"): [sample(0, 0.0)]})
    (found,) = overview(select(run))
    assert [flip.question.label for flip in found.worse["ptq"]] == ["0"]
    assert [(q.label, reason) for q, reason in found.missing["ptq"]] == [("1", "not in this variant's samples")]


def test_without_bf16_the_first_chosen_variant_is_what_others_are_compared_with(tmp_path):
    samples = {(v, "maths"): [sample(0, score)] for v, score in (("bf16", 1.0), ("ptq", 1.0), ("qad", 0.0))}
    run = write_run(tmp_path / "r", samples)
    (found,) = overview(select(run, variants=("qad", "ptq")))
    assert found.variants == ("ptq", "qad")
    assert [flip.question.label for flip in found.worse["qad"]] == ["0"]


def test_a_digest_that_several_questions_share_is_refused_with_their_numbers(tmp_path):
    rows = [sample(0, question="ffff" + "0" * 60, subtask="law"), sample(1, question="ffff" + "0" * 60)]
    selection = select(write_run(tmp_path / "r", {("bf16", "maths"): rows}))
    with pytest.raises(StoreError, match=r"2 questions are meant: maths 0 \(ffff0000\), maths 1 \(ffff0000\); give --task"):
        find_question(selection, "ffff0")
    assert find_question(selection, "0").question.subtask == "law"


def test_a_number_that_several_tasks_have_needs_the_task(tmp_path):
    samples = {("bf16", "maths"): [sample(0)], ("bf16", "law"): [sample(0, 0.0, task="law")]}
    run = write_run(tmp_path / "r", samples)
    with pytest.raises(StoreError, match=r"2 questions are meant: maths 0 \(\w{8}\), law 0 \(\w{8}\); give --task"):
        find_question(select(run), "0")
    assert find_question(select(run, task="law"), "0").first["task"] == "law"


def test_questions_that_were_left_out_are_listed_with_the_reason(tmp_path):
    run = write_run(tmp_path / "r", {("bf16", "maths"): [sample(0)]}, excluded={7: "its text is not there"})
    assert "left out, never asked: 7 (its text is not there)" in shown(run)
    assert "7 (its text is not there)" in _Page(page(run, tmp_path)).text


def test_imported_rows_are_paired_by_the_digest_of_the_source_and_not_by_their_place(tmp_path):
    one, two = "a" * 64, "b" * 64
    bf16 = [sample(0, 1.0, question=one, imported=True), sample(1, 0.0, question=two, imported=True)]
    ptq = [sample(0, 0.0, question=two, imported=True), sample(1, 1.0, question=one, imported=True)]
    (found,) = overview(select(write_run(tmp_path / "r", {("bf16", "maths"): bf16, ("ptq", "maths"): ptq})))
    assert not found.worse["ptq"] and not found.better["ptq"]
    assert found.imported == ("bf16", "ptq")


def test_a_question_is_found_by_number_and_by_the_beginning_of_its_digest(run):
    selection = select(run)
    view = find_question(selection, "3")
    digest = view.question.digest
    assert find_question(selection, digest[:12].upper()).question == view.question
    assert [row["repeat"] for row in view.rows["ptq"]] == [0, 1]
    assert view.mean("ptq") == 1.0  # the missing repeat is no zero


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variants": ("ptg",)}, r"--variant ptg: no such variant in this run; did you mean ptq\? Known: ptq, bf16"),
        ({"task": "math"}, r"--task math: no such task in this run; did you mean maths\? Known: maths"),
        ({"question": "55"}, r"--question 55: no such question in maths; did you mean 5\? Give its number \(0 to 5\)"),
        ({"question": "abc"}, r"--question abc: no such question in maths\. Give its number \(0 to 5\) or the first 4"),
        ({"page": "nowhere/p.html"}, r"the folder .*nowhere does not exist"),
        ({"page": ""}, r"is a folder; give a file"),
    ],
)
def test_what_is_not_there_is_said_with_what_is(run, tmp_path, options, message):
    if "page" in options:
        options = {"page": tmp_path / options["page"]}
    with pytest.raises(StoreError, match=message):
        shown(run, **options)


def test_markers_of_thinking_that_this_version_does_not_know_are_named(run):
    about = json.loads((run / "run.json").read_text())
    about["resolved"]["model"]["thinking"] = THINKING | {"begin": "x"}
    (run / "run.json").write_text(json.dumps(about))
    with pytest.raises(StoreError, match=r"run.json marks thinking as this version does not know it \(model.thinking.begin\)"):
        select(run)


def test_a_page_that_the_system_does_not_let_be_written_is_named(run):
    with pytest.raises(StoreError, match=r"--html /proc/p.html: cannot be written \(.*\); give another file"):
        shown(run, page=Path("/proc/p.html"))


def test_a_run_without_samples_says_so(run):
    for path in (run / "samples").iterdir():
        path.unlink()
    with pytest.raises(StoreError, match="this run has no samples .* so there is nothing to look at"):
        select(run)


def test_a_run_of_another_version_says_so(run):
    path = samples_path(run, "ptq", "maths")
    write_samples(path, [sample(0), {"schema": 1, "question": 1}])
    with pytest.raises(StoreError, match=r"line 2 was written by another version; run the suite again"):
        overview(select(run))


@pytest.mark.parametrize("kept", [0.5, 0.99, 0.0])
def test_a_damaged_samples_file_is_an_error_and_never_a_shorter_one(run, kept):
    path = samples_path(run, "ptq", "maths")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole))])
    with pytest.raises(StoreError, match=r"ptq\.maths\.jsonl\.zst: damaged"):
        list(stream_samples(path))


@pytest.mark.parametrize("width", [80, 160])
def test_everything_stays_within_the_terminal_and_no_word_of_an_answer_is_lost(run, width):
    for text in (shown(run, width), shown(run, width, question="3")):
        assert max(map(len, text.splitlines())) <= width
    answer = shown(run, width, question="3")
    for word in (
        "bf16",
        "ptq",
        "What is 3 plus 3?",
        "It is 6.",
        "boxed: 6",
        "exact_match 1",
        "HTTP 500 after 5",
        "stop, 7 tokens",
    ):
        assert word in answer
    flat = " ".join(shown(run, width).split())
    assert "ptq worse: 1, 2 (1→0.5)" in flat and "ptq better: 4" in flat and "ptq incomplete: 5" in flat


def test_variants_that_do_not_fit_beside_each_other_go_below(tmp_path):
    run = write_run(tmp_path / "r", {(v, "maths"): [sample(0)] for v in ("bf16", "ptq", "qat", "qad")})
    heads = [line for line in shown(run, 80, question="0").splitlines() if "bf16" in line or "qad" in line]
    assert len(heads) == 2
    (head,) = [line for line in shown(run, 160, question="0").splitlines() if "bf16" in line]
    assert re.search("bf16.*ptq.*qat.*qad", head)


def test_at_most_the_limit_is_named_and_how_many_more_is_said(tmp_path):
    samples = {("bf16", "maths"): [sample(i) for i in range(9)], ("ptq", "maths"): [sample(i, 0.0) for i in range(9)]}
    text = shown(write_run(tmp_path / "r", samples), limit=3)
    assert "ptq worse: 0, 1, 2, and 6 more" in text


@pytest.mark.parametrize(
    ("response", "thinking", "wanted"),
    [
        ("<think>no</think>yes", THINKING, ("<think>no</think>", "yes")),
        ("a</think>b</think>c", THINKING, ("a</think>b</think>", "c")),  # the last marker counts
        ("never closed", THINKING, ("never closed", "")),
        ("plain", THINKING | {"expected": False}, ("", "plain")),
        ("<think>cut", THINKING | {"expected": False}, ("<think>cut", "")),
        ("<think>shown as it is</think>", None, ("", "<think>shown as it is</think>")),
    ],
)
def test_thinking_ends_with_the_last_close_marker(response, thinking, wanted):
    markers = None if thinking is None else Thinking(**thinking)
    assert thinking_and_answer(response, markers) == wanted


def test_thinking_is_dimmed_and_the_answer_is_not(tmp_path):
    rows = [sample(0, response=["<think>secret plan</think>the answer"])]
    run = write_run(tmp_path / "r", {("bf16", "maths"): rows}, thinking=THINKING)
    console = Console(width=100, record=True, file=open("/dev/null", "w"), force_terminal=True)  # noqa: SIM115
    show(run, console, question="0")
    styled = console.export_text(styles=True)
    assert re.search(r"\x1b\[2;3m[^\x1b]*secret plan", styled)
    assert not re.search(r"\x1b\[2;3m[^\x1b]*the answer", styled)


def test_a_response_can_neither_steer_the_terminal_nor_be_read_as_markup(tmp_path):
    hostile = "\x1b]0;owned\x07\x1b[2J[red]x[/red]\u202egnissim\r\nnext"
    rows = [sample(0, response=[hostile], answer={"boxed": "\x1b[1m[bold]7"}, target="\x1b[5m", cluster="\x9b2J")]
    run = write_run(tmp_path / "r", {("bf16", "maths"): rows})
    console = Console(width=100, record=True, file=open("/dev/null", "w"), force_terminal=False)  # noqa: SIM115
    show(run, console, question="0")
    text = console.export_text()
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", text)
    assert "[red]x[/red]" in text and "[bold]7" in text
    assert visible("a\tb\nc\x1b") == "a\tb\nc␛"


def test_likelihoods_are_shown_by_choice_with_the_highest_marked(tmp_path):
    rows = [sample(0, response=[[-1.5, False], [-0.25, True]], finish_reason=None, n_tokens=None)]
    text = shown(write_run(tmp_path / "r", {("bf16", "maths"): rows}), question="0")
    assert "choice 0: log-likelihood -1.500" in text and "choice 1: log-likelihood -0.250 (highest)" in text


@pytest.mark.parametrize("publishable", [True, False])
def test_the_text_of_each_choice_stands_beside_its_likelihood(tmp_path, publishable):
    rows = [sample(0, response=[[-1.5, False], [-0.25, True]], finish_reason=None, n_tokens=None)]
    run = write_run(tmp_path / "r", {("bf16", "maths"): rows}, publishable=publishable)
    asks = [
        {"doc": 0, "index": i, "part": 0, "prompt": "A capital:", "option": o} for i, o in enumerate((" Paris", " <b>Rome"))
    ]
    write_samples(run / "tasks" / "maths" / "requests.jsonl.zst", asks)
    text = shown(run, question="0")
    assert "choice 0: log-likelihood -1.500: Paris" in text
    assert "choice 1: log-likelihood -0.250 (highest): <b>Rome" in text
    shown(run, question="0", page=tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert ("log-likelihood -0.250 (highest): &lt;b&gt;Rome" in page) == publishable
    assert ("Rome" in page) == publishable


@pytest.mark.parametrize("publishable", [True, False])
def test_images_are_named_by_digest_and_size_and_a_page_never_holds_one(tmp_path, publishable):
    run = write_run(tmp_path / "r", {("bf16", "maths"): [sample(0), sample(1)]}, publishable=publishable)
    shown_to = {"images": ["ab" * 32, "cd" * 32], "image_sizes": [[1700, 2200], [64, 64]]}
    asks = [{"doc": 0, "index": i, "part": 0, "prompt": "<image> or <image>?", **shown_to} for i in range(2)]
    asks += [{"doc": 1, "index": 0, "part": 0, "prompt": "No image"}]
    write_samples(run / "tasks" / "maths" / "requests.jsonl.zst", asks)
    said = f"{'ab' * 8} (1,700 × 2,200), {'cd' * 8} (64 × 64)"
    assert f"images: {said}" in " ".join(shown(run, question="0").split())
    assert "images:" not in shown(run, question="1")
    shown(run, question="0", page=tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert f"images: <code>{said}</code>" in page
    assert "<img" not in page


def test_counts_are_said_to_be_of_questions(run, tmp_path):
    assert "Counts are of questions" in " ".join(shown(run).split())
    shown(run, page=tmp_path / "page.html")
    assert "Counts are of questions" in (tmp_path / "page.html").read_text()


def test_prompts_that_are_not_kept_leave_the_answers_to_be_seen(run):
    (run / "tasks" / "maths" / "requests.jsonl.zst").unlink()
    text = shown(run, question="0")
    assert "What is" not in text and "It is 0." in text


def test_of_a_text_too_long_for_a_terminal_the_ends_are_shown_and_the_rest_counted(tmp_path):
    run = write_run(tmp_path / "r", {("bf16", "maths"): [sample(0)]}, prompts={0: "START " + "x" * 400_000 + " END"})
    text = shown(run, question="0")
    assert "START" in text and "END" in text and "394,010 characters are left out" in text


class _Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def page(run, tmp_path, **options) -> str:
    path = tmp_path / "page.html"
    show(run, Console(file=open("/dev/null", "w")), page=path, **options)  # noqa: SIM115
    return path.read_text()


HOSTILE = '<script>alert(1)</script><img src=x onerror="alert(2)">\'"&</pre></style>'


def test_hostile_text_in_every_field_stays_text_in_the_page(tmp_path):
    changes = dict.fromkeys(("target", "cluster", "scorer", "subtask", "question"), HOSTILE)
    changes |= {"answer": {HOSTILE: HOSTILE}, "metrics": {"exact_match": 0.0, HOSTILE: 1.0}}
    changes |= {"response": [HOSTILE], "finish_reason": [HOSTILE]}
    ptq = [sample(0, **changes), sample(1, None, subtask=HOSTILE, missing=HOSTILE)]
    samples = {("bf16", "maths"): [sample(0, subtask=HOSTILE, question=HOSTILE)], ("ptq", "maths"): ptq}
    run = write_run(tmp_path / "r", samples, prompts={0: HOSTILE}, excluded={9: HOSTILE})
    for options in ({}, {"question": "0"}):
        text = page(run, tmp_path, **options)
        tags = _Page(text).tags
        assert not {tag for tag, _ in tags} & {"script", "img", "iframe", "object", "link", "base", "form"}
        assert not [a for _, attrs in tags for a in attrs if a.startswith("on")]
        assert "<script>alert(1)</script>" in _Page(text).text  # it is there, as text
        assert "default-src 'none'" in text


def test_the_page_fetches_nothing(run, tmp_path):
    text = page(run, tmp_path)
    references = [value for _, attrs in _Page(text).tags for name, value in attrs.items() if name in ("src", "href")]
    assert references and all(value.startswith("#") for value in references)
    assert not re.search(r"url\(|@import|https?:", text)


def test_every_question_named_in_the_page_is_in_it_and_links_lead_somewhere(run, tmp_path):
    tags = _Page(page(run, tmp_path)).tags
    targets = {attrs["id"] for _, attrs in tags if "id" in attrs}
    links = {attrs["href"][1:] for tag, attrs in tags if tag == "a"}
    assert links == targets and len(targets) == 5  # 1 and 2 worse, 4 better, 3 missing, 5 incomplete


def test_nothing_of_an_unpublishable_task_but_numbers_digests_and_scores_is_in_the_page(tmp_path):
    secret = "Zyzzyva"
    changes = {"target": secret, "response": [secret], "cluster": secret, "answer": {"boxed": secret}}
    samples = {
        ("bf16", "gpqa"): [sample(0, task="gpqa", **changes), sample(1, task="gpqa", **changes)],
        ("ptq", "gpqa"): [
            sample(0, 0.0, task="gpqa", **changes),
            sample(1, None, task="gpqa", target=secret, missing=f"HTTP 400: {secret} is too long"),
        ],
    }
    prompts = dict.fromkeys(range(2), secret)
    run = write_run(tmp_path / "r", samples, publishable=False, prompts=prompts, excluded={5: f"{secret} lacks a file"})
    for options in ({}, {"question": "0"}, {"question": "1"}):
        text = page(run, tmp_path, **options)
        assert secret not in text
        assert "Not publishable: gpqa." in text
    assert sample(0, task="gpqa")["question"] in page(run, tmp_path, question="0")  # its digest
    assert secret in shown(run, question="0")  # in the terminal it is the reader's own copy


@pytest.mark.parametrize(
    ("changes", "in_terminal", "in_page"),
    [
        ({"verdict": "INCORRECT", "text": "INCORRECT"}, "judge: INCORRECT", "judge: INCORRECT"),
        ({"verdict": "UNPARSABLE", "text": "Zyzzyva!"}, "judge: UNPARSABLE: Zyzzyva!", "judge: UNPARSABLE"),
        ({"unasked": "empty"}, "judge: not asked, the answer is empty", "judge: not asked, the answer is empty"),
        ({"missing": "HTTP 400: Zyzzyva"}, "judge: missing (HTTP 400: Zyzzyva)", "judge: missing"),
    ],
)
def test_what_a_judge_said_is_shown_and_its_own_words_never_in_a_page_of_an_unpublishable_task(
    tmp_path, changes, in_terminal, in_page
):
    judged = {"verdict": None, "text": None, "unasked": None, "missing": None, "request": None} | changes
    run = write_run(tmp_path / "r", {("bf16", "maths"): [sample(0, judged=judged)]}, publishable=False)
    assert in_terminal in shown(run, question="0")
    text = _Page(page(run, tmp_path, question="0")).text
    assert in_page in text and "Zyzzyva" not in text


def test_a_metric_that_gives_samples_no_score_of_their_own_is_shown_and_not_compared(tmp_path):
    samples = {(v, "maths"): [sample(0, metrics={"exact_match": [x, 2.0]})] for v, x in (("bf16", 1.0), ("ptq", 0.0))}
    run = write_run(tmp_path / "r", samples)
    (found,) = overview(select(run))
    assert not found.worse["ptq"]
    assert "exact_match [0.0, 2.0]" in shown(run, question="0")


def test_texts_that_a_metric_compares_are_not_in_a_page_of_an_unpublishable_task(tmp_path):
    compared = {"exact_match": 0.0, "bleu": ["Zyzzyva", "Zyzzyvas"]}
    run = write_run(tmp_path / "r", {("bf16", "maths"): [sample(0, metrics=compared)]}, publishable=False)
    text = page(run, tmp_path, question="0")
    assert "Zyzzyva" not in text and "bleu (no number, not shown), exact_match 0" in text
    assert "Zyzzyvas" in shown(run, question="0")


def test_a_figure_that_is_no_share_is_no_percent_in_an_overview(run, tmp_path):
    rows = [json.loads(line) for line in (run / "tasks.jsonl").read_text().splitlines()]
    plain = [row | {"unit": "plain", "value": 1234.5, "stderr": 12.0} for row in rows]
    (run / "tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in plain))
    assert "1.23e+03 ±12" in shown(run) and "1.23e+03 ±12" in page(run, tmp_path)


def test_tables_hold_no_text_of_questions_or_answers(tmp_path):
    secret = "Zyzzyva"
    rows = [sample(i, target=secret, response=[secret], cluster=secret, answer={"boxed": secret}) for i in range(3)]
    rows.append(sample(3, None, target=secret, missing=f"HTTP 400: {secret}"))
    prompts = dict.fromkeys(range(4), secret)
    run = write_run(tmp_path / "r", {("bf16", "maths"): rows}, publishable=False, prompts=prompts)
    table = build_table(run)
    assert secret not in json.dumps(table) + render(table, "md") + render(table, "csv")


def test_a_filter_that_leaves_the_answer_as_it_is_is_not_shown_as_an_extraction(tmp_path):
    rows = [sample(0, response=["It is 0."], answer={"none": "It is 0.", "boxed": "0"})]
    text = shown(write_run(tmp_path / "r", {("bf16", "maths"): rows}), question="0")
    assert "boxed: 0" in text and "none:" not in text


def test_a_task_that_does_not_say_whether_it_is_publishable_is_not(run, tmp_path):
    rows = [json.loads(line) for line in (run / "tasks.jsonl").read_text().splitlines()]
    for row in rows:
        del row["publishable"]
    (run / "tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "What is" not in page(run, tmp_path)


def test_the_command_prints_an_overview_and_its_errors_without_a_traceback(run):
    result = CliRunner().invoke(app, ["inspect", str(run), "--variant", "bf16,ptq"])
    assert result.exit_code == 0 and "compared with bf16" in result.output
    result = CliRunner().invoke(app, ["inspect", str(run), "--variant", "bf16, ptx"])
    assert result.exit_code == 2 and "no such variant" in result.output and "Traceback" not in result.output


def test_a_rehearsal_says_so_in_the_terminal_and_on_its_page(run, tmp_path):
    assert "REHEARSAL" not in shown(run)
    about = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(about | {"rehearsal": True}))
    assert "REHEARSAL of " in shown(run)
    shown(run, page=tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "<title>REHEARSAL of " in page and "<h1>REHEARSAL of " in page
