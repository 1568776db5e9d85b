"""The generated pictures: the same everywhere, no training picture held out, and the four tasks that ask about them."""

import hashlib
import random
from itertools import islice

import numpy as np
import pytest
from PIL import Image

from harness.errors import DataError
from harness.tasks import drawing_kinds, drawings
from harness.tasks.canvas import CELL, Canvas
from harness.tasks.drawing_kinds import EVALUATED
from harness.tasks.drawings import GREY, SIDE, Difficulty, made_up_word, one_question, pictures, side_of_word, speckled
from harness.tasks.mini_pictures import blinded, rows, score
from harness.tasks.sizes import N_QUESTIONS

MAKERS = [about.maker for about in EVALUATED.values()]


def take(maker, side, n, seed="test", **difficulty):
    return list(islice(pictures(maker, side, seed=seed, difficulty=Difficulty(**difficulty)), n))


def test_twenty_pictures_with_their_questions_have_known_bytes():
    digest = hashlib.sha256()
    for maker in (*MAKERS, drawing_kinds.page):
        for picture in take(maker, "train", 4, seed="digest"):
            digest.update(picture.pixels.tobytes() + repr((picture.content, picture.questions)).encode())
    assert digest.hexdigest()[:16] == "ccebf84280e055d2"


def test_a_kind_ends_when_it_has_no_other_content(monkeypatch):
    monkeypatch.setattr(drawings, "MOST_TRIED", 200)
    few, found = pictures(drawing_kinds.chart, "train", seed="test", difficulty=Difficulty(bars=(3, 3), levels=2)), set()
    with pytest.raises(DataError, match="a chart has 7 different contents on the side train: 200 draws more found no other"):
        found.update(picture.content for picture in few)
    assert len(found) == 7  # of 8, and one is held out


def test_a_line_has_the_same_pixels_from_either_end():
    for _ in range(50):
        rng = random.Random(_)
        start, end = [(rng.randrange(20), rng.randrange(20)) for _ in range(2)]
        there, back = Canvas(20, (0, 0, 0)), Canvas(20, (0, 0, 0))
        there.line(start, end, (255, 0, 0))
        back.line(end, start, (255, 0, 0))
        n = max(abs(start[0] - end[0]), abs(start[1] - end[1])) + 1
        assert (there.pixels[..., 0] > 0).sum() == (back.pixels[..., 0] > 0).sum() == n
        assert there.pixels[start[1], start[0], 0] == there.pixels[end[1], end[0], 0] == 255


def test_what_lies_beyond_the_edges_is_cut_off():
    canvas = Canvas(16, (9, 9, 9))
    canvas.text("W", -4, -4, (0, 0, 0))
    canvas.text("W", 12, 12, (0, 0, 0))
    canvas.fill((-5, 14, 3, 30), (0, 0, 0))
    whole = Canvas(32, (9, 9, 9))
    whole.text("W", 4, 4, (0, 0, 0))
    whole.text("W", 20, 20, (0, 0, 0))
    whole.fill((3, 22, 11, 38), (0, 0, 0))
    assert np.array_equal(canvas.pixels, whole.pixels[8:24, 8:24])


def test_no_two_characters_look_alike():
    looks = {}
    for character in "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-.:":
        canvas = Canvas(CELL, (0, 0, 0))
        canvas.text(character, 0, 0, (1, 1, 1))
        looks[canvas.pixels.tobytes()] = character
    assert len(looks) == 39


def test_a_character_without_a_glyph_is_refused():
    with pytest.raises(KeyError, match="é"):
        Canvas(16, GREY).text("é", 0, 0, (0, 0, 0))


@pytest.mark.parametrize("maker", MAKERS, ids=lambda maker: maker.__name__)
def test_no_held_out_picture_is_ever_trained_on(maker):
    trained, held_out = take(maker, "train", 1500), take(maker, "held-out", 200)
    assert not {p.content for p in trained} & {p.content for p in held_out}
    assert not {p.pixels.tobytes() for p in trained} & {p.pixels.tobytes() for p in held_out}
    assert len({p.content for p in held_out}) == 200
    assert {p.side for p in trained} == {"train"} and {p.side for p in held_out} == {"held-out"}


def test_no_word_of_a_held_out_picture_is_seen_in_training():
    def words(side, n):
        made = [p for maker in (drawing_kinds.scene, drawing_kinds.document, drawing_kinds.page) for p in take(maker, side, n)]
        return {q.answer for p in made for q in p.questions if q.answer.isalpha()}

    trained, held_out = words("train", 400), words("held-out", 100)
    assert len(trained) > 500 and len(held_out) > 150
    assert not trained & held_out
    assert all(side_of_word(word) == "held-out" for word in held_out)


def test_an_eighth_of_the_words_is_held_out():
    rng = random.Random(0)
    share = np.mean([side_of_word(made_up_word(rng, 5)) == "held-out" for _ in range(4000)])
    assert abs(share - 1 / 8) < 4 * (1 / 8 * 7 / 8 / 4000) ** 0.5


@pytest.mark.parametrize("style", ["bar", "line"])
def test_a_chart_shows_its_values(style):
    charts = [p for p in take(drawing_kinds.chart, "train", 60, specks=(0, 0)) if p.style == style]
    assert len(charts) > 20
    for picture in charts:
        paper = picture.pixels[SIDE - 1, SIDE - 1]
        for place, question in enumerate(q for q in picture.questions if q.kind == "value"):
            middle = CELL + 2 * CELL * place + 3
            rows = [SIDE - CELL - level * CELL + 3 for level in range(1, 8)]
            drawn = [level for level, row in enumerate(rows, start=1) if not np.array_equal(picture.pixels[row, middle], paper)]
            value = int(question.answer)
            assert drawn == ([*range(1, value + 1)] if style == "bar" else [value]), question


def test_a_document_shows_its_answers_in_the_cells_it_notes():
    """Read back with the font alone: the characters of each answer stand in the cells that bear their place and owner."""
    for picture in take(drawing_kinds.document, "train", 40, specks=(0, 0)):
        found = {}
        for cell in picture.cells:
            if cell.owner:
                found.setdefault(cell.owner, {})[cell.place] = glyph_at(picture.pixels, cell, drawing_kinds.INK)
        read = {"".join(by_place[place] for place in sorted(by_place)) for by_place in found.values()}
        assert read == {question.answer for question in picture.questions}


def test_signs_show_their_words_on_their_colours():
    for picture in take(drawing_kinds.scene, "train", 40, specks=(0, 0)):
        for question in picture.questions:
            colour = question.text.split()[3]
            cells = sorted((cell for cell in picture.cells if cell.owner == colour), key=lambda cell: cell.column)
            assert "".join(glyph_at(picture.pixels, cell, [(255, 255, 255)]) for cell in cells) == question.answer
            for cell in cells:
                assert tuple(picture.pixels[cell.row * CELL, cell.column * CELL]) == drawing_kinds.STRONG[colour]


def test_a_diagram_puts_a_mark_beside_each_shape():
    for picture in take(drawing_kinds.diagram, "train", 40, specks=(0, 0)):
        shape_of = {q.text[10:11]: q.answer for q in picture.questions if q.kind == "shape"}
        marks = [cell for cell in picture.cells if cell.owner in drawing_kinds.SHAPES]
        assert {glyph_at(picture.pixels, cell, drawing_kinds.INK) for cell in marks} == set(shape_of)
        for cell in marks:
            assert shape_of[glyph_at(picture.pixels, cell, drawing_kinds.INK)] == cell.owner


def glyph_at(pixels, cell, inks):
    """The character whose glyph is what has the colour of an ink in a cell; None if there is none."""
    shown = pixels[cell.row * CELL : (cell.row + 1) * CELL, cell.column * CELL : (cell.column + 1) * CELL]
    ink = np.any([(shown == colour).all(-1) for colour in inks], axis=0)[1:, 1:6]
    for character in "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789":
        canvas = Canvas(CELL, (0, 0, 0))
        canvas.text(character, 0, 0, (1, 1, 1))
        if np.array_equal(canvas.pixels[1:, 1:6, 0] > 0, ink):
            return character
    return None


def test_specks_take_the_share_of_pixels_that_was_asked_for():
    clean = np.zeros((SIDE, SIDE, 3), dtype=np.uint8)
    changed = [(speckled(clean, share, random.Random(1)) > 0).any(-1).mean() for share in (0.0, 0.25, 1.0)]
    assert changed[0] == 0 and changed[2] > 0.999
    assert abs(changed[1] - 0.25) < 4 * (0.25 * 0.75 / SIDE**2) ** 0.5
    assert not clean.any()


def test_the_notes_about_cells_are_among_those_that_are_listed():
    for maker in (*MAKERS, drawing_kinds.page):
        for picture in take(maker, "train", 100):
            for cell in picture.cells:
                assert 0 <= cell.row < SIDE // CELL and 0 <= cell.column < SIDE // CELL, picture.content
                assert cell.what in drawing_kinds.WHATS and cell.owner in drawing_kinds.OWNERS
                assert 0 <= cell.place < drawing_kinds.N_PLACES


def test_a_chart_answers_what_its_values_say():
    for picture in take(drawing_kinds.chart, "train", 100):
        value = {q.text.split()[-1][:-1]: int(q.answer) for q in picture.questions if q.kind == "value"}
        for question in picture.questions:
            if question.kind == "extreme":
                best = (max if "largest" in question.text else min)(value.values())
                assert [label for label, each in value.items() if each == best] == [question.answer]
            elif question.kind == "difference":
                first, second = question.text.removesuffix("?").split(" between ")[1].split(" and ")
                assert int(question.answer) == abs(value[first] - value[second])


def test_the_options_of_a_diagram_hold_the_answer_once():
    letters = []
    for picture in take(drawing_kinds.diagram, "train", 200):
        shape = {q.text: q.answer for q in picture.questions if q.kind == "shape"}
        for question in picture.questions:
            if question.kind == "option":
                asked, listed = question.text.split("? ")
                options = dict(option.split() for option in listed.split(", "))
                assert list(options) == list("ABCD") and len(set(options.values())) == 4
                assert options[question.answer] == shape[f"{asked}?"]
                letters.append(question.answer)
    assert {letter for letter in "ABCD" if 0.19 < letters.count(letter) / len(letters) < 0.31} == set("ABCD")


def test_the_total_of_a_receipt_is_the_sum_of_its_prices():
    receipts = [p for p in take(drawing_kinds.document, "train", 60) if p.style == "receipt"]
    for picture in receipts:
        (total,) = [int(q.answer) for q in picture.questions if "total" in q.text]
        assert total == sum(int(q.answer) for q in picture.questions if q.text.endswith("cost?"))
    assert receipts


def test_a_harder_picture_has_what_was_asked_for():
    for picture in take(drawing_kinds.scene, "train", 30, signs=(2, 2), word_length=(6, 6)):
        assert [len(q.answer) for q in picture.questions] == [6, 6]
    speckled_more = take(drawing_kinds.scene, "train", 3, specks=(0.9, 0.9))
    assert all(len(np.unique(p.pixels.reshape(-1, 3), axis=0)) > 3000 for p in speckled_more)


@pytest.mark.parametrize("task", EVALUATED)
def test_a_task_asks_about_200_held_out_pictures_of_every_kind(task):
    asked = rows(task)
    assert len(asked) == N_QUESTIONS == 200
    assert {row["kind"] for row in asked} == set(EVALUATED[task].kinds)
    assert {row["image"].size for row in asked} == {(SIDE, SIDE)}
    assert len({row["image"].tobytes() for row in asked}) == 200
    assert rows(task, n=5)[3] == asked[3]
    assert rows(task, n=5, seed="other")[3]["image"] != asked[3]["image"]


def test_kinds_of_question_are_asked_alike():
    kinds = ("value", "extreme", "difference")
    rng = random.Random(0)
    asked = [one_question(picture, rng, kinds).kind for picture in take(drawing_kinds.chart, "train", 600)]
    assert all(150 < asked.count(kind) < 250 for kind in kinds)


def test_a_blinded_row_has_the_question_and_shows_nothing():
    seeing = rows("mini_ocr", n=3)
    for row, blind in zip(seeing, blinded(seeing), strict=True):
        assert blind["question"] == row["question"] and blind["answer"] == row["answer"]
        assert blind["image"].getcolors() == [(SIDE * SIDE, GREY)]
        assert row["image"].getcolors() != blind["image"].getcolors()


@pytest.mark.parametrize(
    ("answer", "said", "points"),
    [
        ("KAMO", "KAMO", 1),
        ("KAMO", " kamo.\n", 1),
        ("KAMO", "KAMO KAMO", 0),
        ("KAMO", "KAM", 0),
        ("4", "4", 1),
        ("4", "44", 0),
        ("4", "4.0", 0),
        ("C", "c", 1),
        ("C", "C circle", 0),
    ],
)
def test_an_answer_is_the_whole_response(answer, said, points):
    assert score({"answer": answer}, [said]) == {"exact_match": points, "unparsed": 0}


@pytest.mark.parametrize("said", ["", " \n", "."])
def test_a_response_without_a_word_is_unparsed(said):
    assert score({"answer": "4"}, [said]) == {"exact_match": 0, "unparsed": 1}


def test_lm_eval_loads_the_tasks_with_their_pictures():
    from lm_eval.tasks import TaskManager

    from harness.task_files import TASKS_FOLDER

    manager = TaskManager(include_path=str(TASKS_FOLDER), include_defaults=False)
    for name in EVALUATED:
        task = manager.load([name])["tasks"][name]
        docs = list(task.test_docs())
        assert len(docs) == 200
        for doc, row in zip(docs[:3], rows(name, n=3), strict=True):
            (image,) = task.doc_to_image(doc)
            assert isinstance(image, Image.Image) and image.convert("RGB").tobytes() == row["image"].tobytes()
            assert task.doc_to_text(doc) == f"<image>{row['question']}"
            assert task.doc_to_target(doc) == row["answer"]
