"""An engine that knows the gold answers, from made-up rows through prompts, images, extraction and scores: each metric's own maximum."""

from dataclasses import replace

import pytest

from harness import prompts
from harness.processor import load_processor
from harness.tasks import ai2d, chartqa, docvqa, mini_pictures, mmmu, ocrbench, textvqa
from tests import asking
from tests.oracles import THINKING
from tests.picture_sets import SETS, as_jsonl, gold, made_up, picture, wrong
from tests.seeing import SeeingEngine, digest_of_file, known_answers, pixels_digest

N_ROWS = 100
N_OF_MINI = 100
FEW = 20
BROKEN = {"bytes": picture("cut")[:200], "path": "cut.png"}
FULL = {"points": 1000.0}
MODULES = {"ai2d": ai2d, "chartqa": chartqa, "ocrbench": ocrbench, "textvqa": textvqa, "mmmu": mmmu}


@pytest.fixture(scope="module")
def processor(tiny_vlm):
    return load_processor(tiny_vlm)


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    folder = tmp_path / "mirror"
    folder.mkdir()
    monkeypatch.setenv("HARNESS_MIRROR", str(folder))
    return folder


def documents(task, n_rows):
    module = MODULES.get(task)
    make = module.dataset if module else getattr(docvqa, f"dataset_{task}")
    return make(n_rows=n_rows)["test"].to_list()


def shown_in(task, row):
    """The digests of the pictures that a row's question shows, in order, from the bytes of the row."""
    names = ["image"]
    if task == "mmmu":
        names = ["image_2", "image_1"] if row["image_2"] else ["image_1"] * (1 if row["question_type"] == "open" else 2)
    return tuple(digest_of_file(row[name]["bytes"]) for name in names)


def known(task, rows, answer=gold):
    """(digests, the question's words, answer) of each row."""
    docs = documents(task, len(rows))
    said = ["what is" if task == "mmmu" else row["question"] for row in rows]
    return [
        (shown_in(task, row), text, answer(task, doc)) for row, text, doc in zip(rows, said, docs, strict=True)
    ]  # fmt: skip


def prepare(task, processor, tmp_path, n_rows=FEW, **settings):
    asked = asking.task(task, metadata={"n_rows": n_rows}, **settings)
    return asking.prepare(asked, processor, images=tmp_path / "images")


def evaluate(task, processor, look, tmp_path, prepared, **settings):
    """What an engine that looks so scores; answers are never shared."""
    engine = SeeingEngine(processor, look)
    journals = tmp_path / f"journals {len(list(tmp_path.iterdir()))}"
    return asking.evaluate(task, engine, journals, prepared=prepared, images=tmp_path / "images", **settings)


def values(evaluated):
    return {name: found["value"] for name, found in evaluated.result["metrics"].items()}


def with_pictures_of_two_swapped(prepared):
    """The first question that asks about another picture than the first one, and the first, with each other's."""
    asks = list(prepared.asks)
    other = next(i for i, ask in enumerate(asks) if ask.images != asks[0].images and len(ask.images) == len(asks[0].images))
    asks[0], asks[other] = (
        replace(asks[i], images=asks[j].images) for i, j in ((0, other), (other, 0))
    )  # fmt: skip
    return replace(prepared, asks=asks)


@pytest.mark.parametrize("task", SETS)
def test_an_oracle_that_sees_gets_all_that_a_task_gives_and_less_where_two_pictures_are_swapped(
    mirror, processor, tmp_path, task
):
    look = known_answers(known(task, made_up(mirror, task, N_ROWS)))
    prepared = prepare(task, processor, tmp_path, N_ROWS)
    right = evaluate(task, processor, look, tmp_path, prepared)
    assert right.result["n_questions"] == N_ROWS
    assert values(right) == {name: FULL.get(name, 1.0) for name in right.result["metrics"]}
    assert all(len(sample["images"]) >= 1 for sample in right.samples)
    swapped = evaluate(task, processor, look, tmp_path, with_pictures_of_two_swapped(prepared))
    assert swapped.value(right.result["primary"]) == pytest.approx(1 - 2 / N_ROWS)


MINI = ("mini_chart", "mini_document", "mini_diagram", "mini_ocr")


@pytest.mark.parametrize("task", MINI)
def test_an_oracle_that_sees_gets_all_of_a_mini_task_and_nothing_of_it_where_pictures_are_grey(processor, tmp_path, task):
    asked = {"limit": N_OF_MINI}
    rows = mini_pictures.rows(task, n=N_OF_MINI)
    look = known_answers([((pixels_digest(row["image"]),), f"{row['question']}<", row["answer"]) for row in rows])
    prepared = prepare(task, processor, tmp_path, **asked)
    right = evaluate(task, processor, look, tmp_path, prepared, **asked)
    assert (right.value("exact_match"), right.value("unparsed"), right.result["n_questions"]) == (1, 0, N_OF_MINI)
    swapped = evaluate(task, processor, look, tmp_path, with_pictures_of_two_swapped(prepared), **asked)
    assert swapped.value("exact_match") == pytest.approx(1 - 2 / N_OF_MINI)
    grey = asked | {"pictures": "grey"}
    prepared = prepare(f"{task}-grey", processor, tmp_path, **grey)
    assert evaluate(f"{task}-grey", processor, look, tmp_path, prepared, **grey).value("exact_match") == 0


def test_an_oracle_that_is_wrong_gets_nothing(mirror, processor, tmp_path):
    look = known_answers(known("mmmu", made_up(mirror, "mmmu", FEW), wrong))
    prepared = prepare("mmmu", processor, tmp_path)
    assert evaluate("mmmu", processor, look, tmp_path, prepared).value("accuracy") == 0


def test_thinking_about_a_picture_is_no_part_of_the_answer(mirror, processor, tmp_path):
    pairs = known("ai2d", made_up(mirror, "ai2d", FEW))
    prepared = prepare("ai2d", processor, tmp_path, thinking=THINKING)
    thinks = [(seen, text, f"<think>{'Answer: A' * 3}</think>{answer}") for seen, text, answer in pairs]
    found = evaluate("ai2d", processor, known_answers(thinks), tmp_path, prepared, thinking=THINKING)
    assert found.value("exact_match") == 1
    never_ends = [(seen, text, f"<think>{answer}") for seen, text, answer in pairs]
    found = evaluate("ai2d", processor, known_answers(never_ends), tmp_path, prepared, thinking=THINKING)
    assert found.value("exact_match") == 0
    assert all(sample["is_incomplete"] for sample in found.samples)


def test_what_lies_in_the_files_is_what_an_engine_is_shown(mirror, processor, tmp_path):
    look = known_answers(known("textvqa", made_up(mirror, "textvqa", FEW)))
    prepared = prepare("textvqa", processor, tmp_path)
    first, second = (tmp_path / "images" / ask.images[0] for ask in prepared.asks[:2])
    one, other = first.read_bytes(), second.read_bytes()
    first.write_bytes(other)
    second.write_bytes(one)
    found = evaluate("textvqa", processor, look, tmp_path, prepared)
    assert found.value("vqa_accuracy") == pytest.approx(1 - 2 / FEW)


def test_of_a_set_with_a_broken_picture_all_other_questions_are_asked_and_scored(mirror, processor, tmp_path):
    rows = made_up(mirror, "chartqa", FEW, lambda row: row | ({"image": BROKEN} if row["question"].endswith("bar 3?") else {}))
    assert sum(row["image"] is BROKEN for row in rows) == 1
    docs = documents("chartqa", FEW)
    pairs = [
        (shown_in("chartqa", row), row["question"], gold("chartqa", doc))
        for row, doc in zip(rows, docs, strict=True)
        if row["image"] is not BROKEN
    ]
    prepared = prepare("chartqa", processor, tmp_path)
    (left_out,) = prepared.about["excluded"]
    assert left_out["doc"] == 3
    assert left_out["reason"].startswith("image: a broken picture")
    found = evaluate("chartqa", processor, known_answers(pairs), tmp_path, prepared)
    assert (found.value("relaxed_accuracy"), found.result["n_questions"]) == (1, FEW - 1)


def test_a_file_that_changes_while_a_task_is_prepared_leaves_out_its_question(mirror, processor, tmp_path, monkeypatch):
    as_jsonl(mirror, "chartqa", [SETS["chartqa"][1](i) for i in range(FEW)])
    (file,) = mirror.glob("lmms-lab/ChartQA/pictures/7-image")
    load = prompts.load_tasks

    def load_and_change(*arguments):
        found = load(*arguments)
        file.write_bytes(picture("other"))
        return found

    monkeypatch.setattr(prompts, "load_tasks", load_and_change)
    (left_out,) = prepare("chartqa", processor, tmp_path).about["excluded"]
    assert left_out["doc"] == 7
    assert "has changed since the rows were read" in left_out["reason"]
