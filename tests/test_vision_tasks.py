"""The tasks that ask about pictures: rows, pictures, prompts, oracles from question to score, and where they are refused."""

import hashlib
import io
import json
import re
import struct
import zlib
from collections import Counter
from pathlib import Path

import pytest
import yaml
from conftest import SUITE
from lm_eval.api.model import LM
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager
from PIL import Image
from typer.testing import CliRunner

from harness import evaluate
from harness.cli import app
from harness.errors import DataError, TaskError
from harness.prepared import Question, plain
from harness.tasks import ai2d, chartqa, docvqa, mmmu, needs, ocrbench, textvqa
from harness.tasks.picture_rows import picture_bytes, pictures_of, unmarked
from harness.tasks.pictures import open_picture, require_readable
from tests import asking
from tests.oracles import THINKING
from tests.picture_sets import SETS, as_jsonl, gold, made_up, picture, wrong

TASKS = Path(ai2d.__file__).parent
MODULES = {"ai2d": ai2d, "chartqa": chartqa, "ocrbench": ocrbench, "textvqa": textvqa, "mmmu": mmmu}
OF_TEXT = None
"""The tokenizer of a model of text; nothing is tokenized where a task is refused."""
FULL = {"points": 1000.0}
"""The most that a metric gives, where it is not 1."""


class Seeing(LM):
    """Plain lm-eval's view of a model that is given pictures and answers every document by a function."""

    MULTIMODAL = True
    tokenizer_name = "seeing"

    def __init__(self, respond):
        super().__init__()
        self.respond, self.requests = respond, []

    def apply_chat_template(self, chat_history, add_generation_prompt=True):
        return "".join(f"<{turn['role']}>{turn['content']}" for turn in chat_history)

    def generate_until(self, requests, disable_tqdm=False):
        self.requests += requests
        return [self.respond(request.doc) for request in requests]

    def loglikelihood(self, requests, disable_tqdm=False):
        raise NotImplementedError

    loglikelihood_rolling = loglikelihood


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    folder = tmp_path / "mirror"
    folder.mkdir()
    monkeypatch.setenv("HARNESS_MIRROR", str(folder))
    return folder


def load(task, n_rows=None):
    """The documents of a task, read from the mirror."""
    function = getattr(docvqa, f"dataset_{task}") if task in ("docvqa", "infovqa") else MODULES[task].dataset
    return function(n_rows=n_rows)["test"]


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    """What plain lm-eval writes down of the machine takes seconds a run, and no score depends on it."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda found: None)
    monkeypatch.setattr("lm_eval.evaluator.get_git_commit_hash", lambda: None)


def plain_lm_eval(task, respond, n_rows=100, **options):
    """(metrics, requests) of plain lm-eval with our task file."""
    manager = TaskManager(include_path=str(TASKS), include_defaults=False, metadata={"n_rows": n_rows})
    lm = Seeing(lambda doc: respond(task, doc))
    found = simple_evaluate(lm, tasks=[task], task_manager=manager, bootstrap_iters=0, apply_chat_template=True, **options)
    given = {key.partition(",")[0]: value for key, value in found["results"][task].items() if "," in key}
    return {key: value for key, value in given.items() if not key.endswith("_stderr")}, lm.requests


# -- oracles


@pytest.mark.parametrize("task", SETS)
def test_an_oracle_in_plain_lm_eval_gets_all_that_a_task_gives_and_a_wrong_engine_nothing(mirror, task):
    made_up(mirror, task)
    right, requests = plain_lm_eval(task, gold)
    assert right == {name: FULL.get(name, 1.0) for name in right}
    assert len(requests) == 100
    for request in requests:
        prompt, options, given = request.args
        assert prompt.count("<image>") == len(given["visual"]) >= 1
        assert {(each.mode, each.size) for each in given["visual"]} == {("RGB", (96, 64))}
        assert options["until"] == [] and options["max_gen_toks"] >= 16384
    nothing, _ = plain_lm_eval(task, wrong)
    assert nothing == dict.fromkeys(right, 0.0)


@pytest.mark.parametrize("task", SETS)
def test_answers_are_scored_by_the_harness_after_their_thinking_and_from_documents_as_plain_data(mirror, task):
    made_up(mirror, task)
    docs = [plain(doc) for doc in load(task, 100).to_list()]
    questions = [Question(i, task, str(i), doc["cluster"], "", doc) for i, doc in enumerate(docs)]

    def values(respond):
        rows = [
            {"doc": i, "repeat": 0, "response": [respond(doc)], "stops": [], "finish_reason": ["stop"], "missing": None}
            for i, doc in enumerate(docs)
        ]
        scored = evaluate.score(asking.task(task, thinking=THINKING), {"draws": {task: 1}}, questions, rows)
        assert set(scored.aggregations.values()) == {None}  # a mean over questions each
        found = {}
        for row in scored.rows:
            for name, value in row["metrics"].items():
                found.setdefault(name, []).append(value)
        return {name: sum(each) / len(each) for name, each in found.items()}

    right = values(lambda doc: f"<think>{wrong(task, doc)}</think>{gold(task, doc)}")
    assert right == {name: FULL.get(name, 1.0) for name in right}
    assert values(lambda doc: f"<think>{gold(task, doc)}</think>{wrong(task, doc)}") == dict.fromkeys(right, 0.0)
    assert values(lambda doc: f"<think>{gold(task, doc)}") == dict.fromkeys(right, 0.0)  # it never ends


def test_an_answer_that_was_cut_by_length_counts_only_where_it_was_stated(mirror):
    made_up(mirror, "docvqa", 1)
    (doc,) = load("docvqa", 1).to_list()
    question = Question(0, "docvqa", "q", "c", "", doc)

    def scored(response):
        row = {"doc": 0, "repeat": 0, "response": [response], "stops": [], "finish_reason": ["length"], "missing": None}
        return evaluate.score(asking.task("docvqa"), {"draws": {"docvqa": 1}}, [question], [row]).rows[0]

    assert scored("Signer 0")["metrics"]["anls"] == 0.0
    assert scored("Signer 0")["is_incomplete"]
    assert scored(r"\boxed{Signer 0}, as")["metrics"]["anls"] == 1.0


def test_points_of_a_part_of_ocrbench_are_of_that_part_and_no_run_adds_to_another(mirror):
    made_up(mirror, "ocrbench")

    def half(task, doc):
        return gold(task, doc) if int(re.findall(r"\d+", doc["answers"][0])[0]) % 20 < 10 else "no"

    first, _ = plain_lm_eval("ocrbench", half, limit=20)
    assert (first["accuracy"], first["points"], first["text_recognition"]) == (0.5, 500.0, 0.5)
    again, _ = plain_lm_eval("ocrbench", half, limit=20)
    assert again == first
    whole, _ = plain_lm_eval("ocrbench", half)
    assert (whole["accuracy"], whole["points"]) == (0.5, 500.0)


def test_the_parts_of_chartqa_are_scored_apart(mirror):
    made_up(mirror, "chartqa")
    found, _ = plain_lm_eval("chartqa", lambda task, doc: gold(task, doc) if doc["part"] == "human_test" else "no such thing")
    assert found == {"relaxed_accuracy": 0.5, "relaxed_accuracy_human": 1.0, "relaxed_accuracy_augmented": 0.0}


# -- prompts


PROMPTS = {
    "ai2d": "<image>What does label 1 show?\nA. stage 1\nB. layer 2\nC. both of them\n"
    "Answer with the option's letter from the given choices directly.",
    "chartqa": "<image>What is the value of bar 1?\nAnswer the question with a single word.",
    "docvqa": "<image>Who signed page 1?\nAnswer the question using a single word or phrase.",
    "infovqa": "<image>How many in part 1?\nAnswer the question using a single word or phrase.",
    "ocrbench": "<image>what is written in the image?",
    "textvqa": "<image>what is the brand of item 1?\nAnswer the question using a single word or phrase.",
    "mmmu": "Compare <image> with <image>: what is 1?\n\n(A) 'one' \"so\"\n(B) 'two' \"so\"\n(C) 'three' \"so\"\n"
    "(D) 'four' \"so\"\n(E) 'five' \"so\"\n\nAnswer with the option's letter from the given choices directly.",
}


@pytest.mark.parametrize("task", SETS)
def test_a_prompt_is_that_of_the_field(mirror, task):
    made_up(mirror, task)
    _, requests = plain_lm_eval(task, gold, limit=2)
    assert requests[1].args[0] == f"<user>{PROMPTS[task]}"


def test_pictures_of_mmmu_stand_where_the_question_and_its_options_name_them(mirror):
    rows = made_up(mirror, "mmmu")
    docs = load("mmmu", 100).to_list()

    def digests(row, *names):
        return [hashlib.sha256(row[name]["bytes"]).hexdigest() for name in names]

    assert [place["sha256"] for place in docs[0]["pictures"]] == digests(rows[0], "image_1", "image_1")
    assert "(B) the second <image>\n" in docs[0]["prompt"]
    assert [place["sha256"] for place in docs[1]["pictures"]] == digests(rows[1], "image_2", "image_1")
    assert docs[4]["prompt"].endswith("what is 4?\n\nAnswer the question using a single word or phrase.")
    assert (docs[4]["answers"], docs[9]["answers"]) == (["no 4", "none of 4"], ["9.25"])
    assert [doc["subject"] for doc in docs[:3]] == ["Accounting", "Art_Theory", "Math"]


def test_a_picture_that_mmmus_question_does_not_name_stands_before_it(mirror):
    made_up(mirror, "mmmu", 4, lambda row: row | {"question": "What is it?", "options": "['a', 'b', 'c', 'd']"})
    assert load("mmmu").to_list()[0]["prompt"].startswith("<image>What is it?\n\n(A) a\n")


def test_what_reads_as_a_mark_in_a_question_is_none(mirror):
    made_up(mirror, "textvqa", 2, lambda row: row | {"question": "what does <image> say?"})
    _, requests = plain_lm_eval("textvqa", gold, n_rows=2)
    assert requests[0].args[0].count("<image>") == 1
    assert unmarked("<image 1>") == "<image 1>"


# -- rows


@pytest.mark.parametrize("task", SETS)
def test_rows_of_a_mirror_are_the_same_from_parquet_and_from_lines_with_files(mirror, tmp_path, monkeypatch, task):
    rows = made_up(mirror, task, 20)
    first = load(task, 20)
    assert first.info.description.startswith(f"mirror {'/'.join(SETS[task][0].split('/')[:2])}, revision unknown, ")
    monkeypatch.setenv("HARNESS_MIRROR", str(tmp_path / "other"))
    as_jsonl(tmp_path / "other", task, rows)
    second = load(task, 20)

    def without_places(docs):
        return [doc | {"pictures": [place["sha256"] for place in doc["pictures"]]} for doc in docs.to_list()]

    assert without_places(second) == without_places(first)
    from_files = [[each.tobytes() for each in pictures_of(doc)] for doc in second.to_list()]
    monkeypatch.setenv("HARNESS_MIRROR", str(mirror))
    assert [[each.tobytes() for each in pictures_of(doc)] for doc in first.to_list()] == from_files


def test_pictures_are_found_again_in_any_order_and_row_group(mirror):
    rows = made_up(mirror, "textvqa", 50)
    docs = load("textvqa", 50).to_list()
    for i in (49, 0, 24, 25, 26, 11, 9, 10):
        assert picture_bytes(docs[i]["pictures"][0]) == rows[i]["image"]["bytes"]
    json.dumps(docs)


def test_a_picture_that_needs_no_change_stays_packed_until_it_is_used(mirror):
    made_up(mirror, "textvqa", 2)
    (waiting,) = pictures_of(load("textvqa")[0])
    assert waiting.tile  # what is still to be unpacked
    assert waiting.tobytes() == open_picture(picture("T0", "JPEG")).tobytes()


def test_questions_of_one_page_or_document_err_together_and_the_same_words_on_another_page_are_another_question(mirror):
    made_up(mirror, "docvqa", 8, lambda row: row | {"question": "Who signed it?"})
    docs = load("docvqa").to_list()
    assert [doc["cluster"] for doc in docs] == ["doc0"] * 4 + ["doc1"] * 4
    assert len({doc["source_question"] for doc in docs}) == 4
    made_up(mirror, "infovqa", 6)
    assert list(Counter(doc["cluster"] for doc in load("infovqa").to_list()).values()) == [2, 2, 2]


BAD_ROWS = [
    ("ai2d", {"answer": "9"}, r"lmms-lab/ai2d: row 1: answer '9'; allowed: the number of an option, 0 to 1"),
    ("ai2d", {"answer": "B"}, r"answer 'B'; allowed: the number of an option"),
    ("ai2d", {"options": ["one"]}, r"options \['one'\]; allowed: a list of 2 to 9 texts"),
    ("ai2d", {"question": ""}, r"row 1 has no value of 'question'; it has: answer, image, options, question"),
    ("chartqa", {"type": "human"}, r"type 'human'; allowed: human_test, augmented_test"),
    ("docvqa", {"answers": [""]}, r"lmms-lab/DocVQA \(DocVQA\): question 1000: gold answers \[''\]; allowed: a text, or a list"),
    ("infovqa", {"answers": []}, r"question 7000: gold answers \[\]"),
    ("ocrbench", {"question_type": "Reading"}, r"question_type 'Reading'; allowed: Regular Text Recognition, "),
    ("textvqa", {"answers": []}, r"lmms-lab/textvqa: question 34602: gold answers \[\]"),
    ("mmmu", {"question_type": "essay"}, r"question validation_Accounting_0: question_type 'essay'; allowed: multiple-choice, open"),
    ("mmmu", {"options": "one, two"}, r"options 'one, two'; allowed: a list of 2 to 9 texts"),
    ("mmmu", {"answer": "H"}, r"answer 'H'; allowed: one of A, B, C, D"),
]  # fmt: skip


@pytest.mark.parametrize(("task", "change", "message"), BAD_ROWS)
def test_a_row_that_does_not_fit_is_an_error_that_says_what_it_holds(mirror, task, change, message):
    as_jsonl(mirror, task, [SETS[task][1](0) | change])
    with pytest.raises(DataError, match=message):
        load(task)


@pytest.mark.parametrize("task", SETS)
def test_a_copy_that_is_cut_short_or_lacks_a_column_is_an_error(mirror, task):
    made_up(mirror, task, 4)
    with pytest.raises(DataError, match=rf"4 rows; .* has {SETS[task][2]}. Get the whole set"):
        load(task, SETS[task][2])
    made_up(mirror, task, 4, lambda row: {key: value for key, value in row.items() if not key.startswith("question")})
    with pytest.raises(DataError, match=r"parquet: no column 'question\w*'; it has: .*answer"):
        load(task)
    made_up(mirror, task, 4, lambda row: {key: value for key, value in row.items() if not key.startswith("image")})
    with pytest.raises(DataError, match=r"parquet: no column 'image\w*'; it has: .*question"):
        load(task)


def test_a_damaged_parquet_file_is_an_error_that_names_it(mirror):
    made_up(mirror, "ai2d", 4)
    path = mirror / "lmms-lab/ai2d/data/test-00000-of-00002.parquet"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"test-00000-of-00002.parquet: not a readable parquet file"):
        load("ai2d")


def test_a_picture_that_has_changed_or_is_gone_is_an_error(mirror, monkeypatch):
    as_jsonl(mirror, "chartqa", [SETS["chartqa"][1](0)])
    (doc,) = load("chartqa").to_list()
    file = mirror / "lmms-lab/ChartQA" / doc["pictures"][0]["file"]
    file.write_bytes(picture("other"))
    with pytest.raises(DataError, match="has changed since the rows were read; prepare the task again"):
        pictures_of(doc)
    file.unlink()
    with pytest.raises(DataError, match=r"lmms-lab/ChartQA: pictures/0-image is no longer in the mirror"):
        pictures_of(doc)


# -- the hub


def test_from_the_hub_comes_the_split_alone_and_its_commit_is_kept(tmp_path, monkeypatch):
    monkeypatch.delenv("HARNESS_MIRROR", raising=False)
    commit = "c" * 40
    snapshot = tmp_path / "snapshots" / commit
    made_up(tmp_path / "made", "docvqa", 4)
    snapshot.parent.mkdir()
    (tmp_path / "made/lmms-lab/DocVQA").rename(snapshot)
    asked = []

    def fetch(name, **options):
        asked.append((name, options))
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda name, file, repo_type, revision: str(snapshot / file))
    made = load("docvqa", 4)
    assert asked == [
        ("lmms-lab/DocVQA", {"repo_type": "dataset", "revision": None, "allow_patterns": ["DocVQA/validation-*.parquet"]})
    ]
    assert made.info.description == f"hub lmms-lab/DocVQA at {commit}"
    assert made[0]["pictures"][0]["revision"] == commit
    assert [each.size for each in pictures_of(made[3])] == [(96, 64)]


def test_a_set_that_is_nowhere_says_where_to_put_it(tmp_path, monkeypatch):
    monkeypatch.delenv("HARNESS_MIRROR", raising=False)
    from huggingface_hub.errors import LocalEntryNotFoundError

    def refuse(*arguments, **options):
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(
        DataError, match=r"lmms-lab/ai2d: neither in the mirror .* \(no network\).*HARNESS_MIRROR/lmms-lab/ai2d/"
    ):
        load("ai2d")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *arguments, **options: str(tmp_path))
    with pytest.raises(DataError, match=r"the hub's set has no file test-\*.parquet or data/test-\*.parquet"):
        load("ai2d")


# -- pictures


def encoded(made, form, **options):
    file = io.BytesIO()
    made.save(file, form, **options)
    return file.getvalue()


def png_header(width, height):
    """A file that says it is that large, and holds nothing."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


BAD_PICTURES = [
    (b"", "no picture that can be read"),
    (b"<svg/>", "no picture that can be read"),
    (picture("cut")[:200], "a broken picture"),
    (picture("cut", "JPEG", size=(400, 400))[:900], "a broken picture"),
    (png_header(40_000, 10), r"a picture of 40,000 × 10 pixels; at most 30,000 a side"),
    (png_header(29_000, 5_000), "and 100,000,000 in all"),
    (png_header(30_000, 30_000), "too large to unpack|30,000 × 30,000"),
]


@pytest.mark.parametrize(("data", "reason"), BAD_PICTURES, ids=range(len(BAD_PICTURES)))
def test_a_picture_that_is_broken_or_too_large_is_refused_with_the_reason(data, reason):
    for refuse in (open_picture, require_readable):
        with pytest.raises(DataError, match=reason):
            refuse(data)


def transparent():
    made = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    made.putpixel((0, 0), (255, 0, 0, 255))
    return made


def animated():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    return encoded(frames[0], "GIF", save_all=True, append_images=frames[1:], duration=10)


CONVERTED = [  # bytes, the pixels at (0, 0) and (3, 3)
    (encoded(Image.new("RGB", (4, 4), (10, 20, 30)), "PNG"), (10, 20, 30), (10, 20, 30)),
    (encoded(Image.new("L", (4, 4), 77), "PNG"), (77, 77, 77), (77, 77, 77)),
    (encoded(Image.new("1", (4, 4), 1), "PNG"), (255, 255, 255), (255, 255, 255)),
    (encoded(Image.new("I;16", (4, 4), 65_535), "PNG"), (255, 255, 255), (255, 255, 255)),
    (encoded(Image.new("I;16", (4, 4), 257 * 100), "PNG"), (100, 100, 100), (100, 100, 100)),
    (encoded(Image.new("CMYK", (4, 4), (0, 0, 0, 255)), "TIFF"), (0, 0, 0), (0, 0, 0)),
    (encoded(transparent(), "PNG"), (255, 0, 0), (255, 255, 255)),
    (encoded(Image.new("RGB", (4, 4), "red").convert("P"), "PNG"), (255, 0, 0), (255, 0, 0)),
    (animated(), (255, 0, 0), (255, 0, 0)),
]


@pytest.mark.parametrize(("data", "first", "last"), CONVERTED, ids=range(len(CONVERTED)))
def test_a_picture_of_another_kind_becomes_one_of_8_bits_rgb(data, first, last):
    made = open_picture(data)
    assert made.mode == "RGB"
    assert (made.getpixel((0, 0)), made.getpixel((3, 3))) == (first, last)
    require_readable(data)


def test_values_beyond_16_bits_are_refused():
    made = Image.new("F", (4, 4), 1e6)
    with pytest.raises(DataError, match=r"a picture with values from 1e\+06 to 1e\+06; allowed: 8 or 16 bits"):
        open_picture(encoded(made, "TIFF"))


def test_a_row_whose_picture_cannot_be_had_is_left_out_with_the_reason_and_the_run_goes_on(mirror):
    rows = [SETS["chartqa"][1](i) for i in range(60)]
    as_jsonl(mirror, "chartqa", rows)
    path = mirror / "lmms-lab/ChartQA/data/test.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    (mirror / "secret.png").write_bytes(picture("secret"))
    for number, name in enumerate(["", "pictures/none", "../../secret.png", str(mirror / "secret.png"), None]):
        lines[number]["image"] = name
    (mirror / "lmms-lab/ChartQA/pictures/5-image").write_bytes(b"no picture")
    path.write_text("\n".join(map(json.dumps, lines)))
    docs = load("chartqa", 60).to_list()
    reasons = [doc["excluded"] for doc in docs]
    assert reasons[6:] == [None] * 54
    for reason, wanted in zip(
        reasons,
        [
            "no picture",
            "there is no file",
            "leaves the folder",
            "leaves the folder",
            "no picture",
            "no picture that can be read",
        ],
        strict=False,
    ):
        assert reason.startswith("image: ") and wanted in reason
    found, requests = plain_lm_eval("chartqa", gold, n_rows=60)
    assert found["relaxed_accuracy"] == 1.0
    assert requests[0].args[2]["visual"][0].getpixel((0, 0)) == (128, 128, 128)
    assert chartqa.score(docs[0], ["0"]) == {}


def test_a_picture_by_a_name_that_no_file_can_have_leaves_out_its_question_alone(mirror):
    rows = [SETS["chartqa"][1](i) for i in range(60)]
    as_jsonl(mirror, "chartqa", rows)
    path = mirror / "lmms-lab/ChartQA/data/test.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for number, name in enumerate(["x." * 2500, "a\0b.png", "\ud800.png", "circle", "/9j/" + "4AAQ" * 50]):
        lines[number]["image"] = name
    (mirror / "lmms-lab/ChartQA/circle").symlink_to("circle")
    path.write_text("\n".join(map(json.dumps, lines)))
    reasons = [doc["excluded"] for doc in load("chartqa", 60).to_list()]
    assert all("cannot be read as the path of a file" in reason and len(reason) < 300 for reason in reasons[:4])
    assert (
        reasons[4] == "image: base64; a picture is its bytes in a parquet file, or the path of a file in the folder of the set"
    )
    assert reasons[5:] == [None] * 55


def test_a_copy_in_which_many_pictures_are_missing_is_refused(mirror):
    made_up(mirror, "ai2d", 20, lambda row: row | ({"image": {"bytes": b"", "path": None}} if row["answer"] == "1" else {}))
    with pytest.raises(
        DataError, match=r"lmms-lab/ai2d: \d+ of 20 rows lack a picture, more than 10%; the first: image: .*Get the"
    ):
        load("ai2d")


# -- where they are refused


@pytest.mark.parametrize("command", ["prepare", "run"])
def test_a_suite_with_a_model_of_text_that_asks_about_pictures_is_refused_in_one_message(own_cache, tmp_path, command):
    suite = tmp_path / "suite.toml"
    suite.write_text(SUITE.format(model=tmp_path).replace("mini_choice", "docvqa").replace("mini_math", "mmmu"))
    done = CliRunner().invoke(app, [command, str(suite), "--results", str(tmp_path / "results")])
    said = " ".join(done.output.split())
    assert done.exit_code == 2
    assert (
        'task[0].name: mmmu asks about pictures, and a model of kind "text" is given none; remove it, or set kind = "image-text"'
        in said
    )
    assert "task[1].name: docvqa asks about pictures" in said
    assert not list(own_cache.glob("stages/*"))


def test_a_task_with_pictures_is_refused_before_its_data_are_read(mirror):
    for task in SETS:
        with pytest.raises(TaskError, match=f"task {task}: asks about pictures"):
            asking.prepare(asking.task(task), OF_TEXT)
        assert needs.missing(task) is None


def test_a_task_of_a_user_that_asks_about_pictures_is_refused_too(tmp_path):
    (tmp_path / "see.py").write_text(
        "import datasets\n"
        "def rows(**metadata):\n    return {'test': datasets.Dataset.from_list([{'question': 'Q', 'answer': 'A'}])}\n"
        "def shown(doc):\n    return []\n"
    )
    (tmp_path / "see.yaml").write_text(
        "task: see\ncustom_dataset: !function see.rows\ntest_split: test\noutput_type: generate_until\n"
        "doc_to_text: '{{question}}'\ndoc_to_target: '{{answer}}'\ndoc_to_image: !function see.shown\n"
    )
    with pytest.raises(
        TaskError, match='task see: asks about pictures, and a model of kind "text" is given none; remove it, or set'
    ):
        asking.prepare(asking.task("see", path=tmp_path), OF_TEXT)


# -- what the task files declare


class _Words(yaml.SafeLoader):
    pass


_Words.add_multi_constructor("!", lambda loader, tag, node: node.value)
CONFIGS = {name: yaml.load((TASKS / f"{name}.yaml").read_text(), _Words) for name in SETS}


@pytest.mark.parametrize("name", SETS)
def test_a_task_file_leaves_nothing_to_a_default_and_cuts_no_thinking(name):
    config = CONFIGS[name]
    given = config["generation_kwargs"]
    assert config["task"] == name
    assert set(given) == {"until", "do_sample", "temperature", "max_gen_toks"}
    assert given["until"] == [] and given["max_gen_toks"] >= 16384
    metadata = config["metadata"]
    assert set(metadata) - {"stated"} == {"version", "chat", "images", "primary", "publishable", "dataset", "n_rows"}
    assert metadata["images"] is True and metadata["publishable"] is False
    assert metadata["primary"] == config["metric_list"][0]["metric"]
    assert metadata["n_rows"] == SETS[name][2]
    assert SETS[name][0].startswith(f"{metadata['dataset']}/")
