"""Rows with images as sequences: schemas, places, masks by hand, splits, what is refused and what is converted; a run is never lost to one."""

import base64
import io
import json
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from PIL import Image as Pillow
from pyarrow import parquet

from harness.data import SPLITS, split_of
from harness.data_stage import what_became
from harness.drawn import drawing_asks
from harness.errors import DataError, ModelError
from harness.processor import Processor, load_processor
from harness.row_files import file_rows
from harness.schema_data import Drawings, Hub, Jsonl, Mix, Part
from harness.sources import Surroundings, find_source, identity, write_source
from harness.store import Store
from harness.tasks import mini_pictures
from harness.tasks.drawing_kinds import EVALUATED
from harness.token_store import StoredSequences, TokenWriter
from tests.tiny_vlm import IMAGE_TOKENS

EOS = {2}
IMAGE = 3
EXPANDED = [4, 5, *[IMAGE] * IMAGE_TOKENS, 4]
"""What the tiny processor makes of `<image>`: a fake token, the token of the whole image, its parts, a fake token."""


@pytest.fixture(scope="module")
def processor(tiny_vlm) -> Processor:
    return load_processor(tiny_vlm)


def picture(number: int, mode="RGB", size=(20, 14)) -> Pillow.Image:
    values = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Pillow.fromarray(values).convert(mode)


def packed(given: Pillow.Image, kind="PNG", **options) -> bytes:
    file = io.BytesIO()
    given.save(file, format=kind, **options)
    return file.getvalue()


def section(folder: Path, rows, suffix=".jsonl", **keys) -> Jsonl:
    path = folder / f"rows{suffix}"
    if suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return Jsonl(source="jsonl", path=str(path), **({"images": "image", "seq_len": 256} | keys))


def made(tmp_path, processor, given, parts=(), name="rows"):
    """The sequences of each split, and the record."""
    source = find_source(name, {name: given}, Store(tmp_path / "cache"))
    folder = tmp_path / f"stage-{len(list(tmp_path.iterdir()))}"
    folder.mkdir()
    surroundings = Surroundings(processor.tokenizer, EOS, list(parts), lambda *arguments: {}, processor)
    with TokenWriter(folder, salt="0 ") as writer:
        record = write_source(source, writer, surroundings)
    return {split: StoredSequences(folder, split) for split in SPLITS}, record


def every(splits):
    return [sequence for stored in splits.values() for sequence in stored]


def test_a_row_is_its_chat_with_expanded_images_and_a_mask_on_the_answer_alone(tmp_path, processor):
    (tmp_path / "a.png").write_bytes(packed(picture(1)))
    splits, record = made(
        tmp_path, processor, section(tmp_path, [{"image": "a.png", "q": "Hi", "a": "Yo"}], prompt="q", response="a")
    )
    (sequence,) = every(splits)
    plain = lambda text: processor.tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    prompt = [1, *plain("user\n"), *EXPANDED, *plain("Hi"), 2, *plain("\n"), 1, *plain("assistant\n")]
    assert list(sequence.token_ids) == [*prompt, *plain("Yo"), 2, *plain("\n")]
    assert list(sequence.is_response) == [False] * len(prompt) + [True] * 3 + [False]
    (image,) = sequence.images
    assert image.open().tobytes() == picture(1).tobytes()
    assert record["rows"] | {"used": 1, "with_images": 1, "text_only": 0, "failed": 0} == record["rows"]


def test_later_images_and_later_turns_are_masked_as_well(tmp_path, processor):
    for number in (1, 2):
        (tmp_path / f"{number}.png").write_bytes(packed(picture(number)))
    messages = [
        {"role": "user", "content": "no image yet"},
        {"role": "assistant", "content": "aa"},
        {"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "image"}, {"type": "text", "text": "y"}]},
        {"role": "assistant", "content": "bb"},
        {"role": "user", "content": "more"},
        {"role": "assistant", "content": "cc"},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "z"}]},
        {"role": "assistant", "content": "dd"},
    ]
    splits, _ = made(tmp_path, processor, section(tmp_path, [{"image": ["1.png", "2.png"], "chat": messages}], messages="chat"))
    (sequence,) = every(splits)
    text = processor.tokenizer.decode(sequence.token_ids)
    one = "<fake_token_around_image><global-img>" + "<image>" * IMAGE_TOKENS + "<fake_token_around_image>"
    end = "<end_of_utterance>\n"
    asked = f"<|im_start|>user\n{{}}{end}<|im_start|>assistant\n{{}}{end}"
    expected = [("no image yet", "aa"), (f"x{one}y", "bb"), ("more", "cc"), (f"{one}z", "dd")]
    assert text == "".join(asked.format(*turn) for turn in expected)
    answered = [token for token, flag in zip(sequence.token_ids, sequence.is_response, strict=True) if flag]
    assert processor.tokenizer.decode(answered) == "".join(
        f"{letters}<end_of_utterance>" for letters in ("aa", "bb", "cc", "dd")
    )
    runs = "".join("x" if flag else "-" for flag in sequence.is_response).replace("-", " ").split()
    assert [len(run) for run in runs] == [3, 3, 3, 3]
    assert [image.open().tobytes() for image in sequence.images] == [picture(1).tobytes(), picture(2).tobytes()]


def test_an_image_behind_the_last_answer_is_left_out_with_its_turn(tmp_path, processor):
    images = [packed(picture(number)) for number in (1, 2)]
    messages = [
        {"role": "user", "content": "first <image>"},
        {"role": "assistant", "content": "ok"},
        {"role": "user", "content": "then <image>"},
    ]
    splits, _ = made(tmp_path, processor, section(tmp_path, [{"image": images, "chat": messages}], ".parquet", messages="chat"))
    (sequence,) = every(splits)
    assert sequence.token_ids.count(IMAGE) == IMAGE_TOKENS
    assert [image.open().tobytes() for image in sequence.images] == [picture(1).tobytes()]


def test_a_processor_that_writes_the_answer_otherwise_behind_an_image_is_refused(tmp_path, processor):
    class Odd(Processor):
        def encode(self, text, images):
            found = super().encode(text, images)
            changed = [*found.token_ids[:-4], 9, *found.token_ids[-3:]]
            return type(found)(tuple(changed), found.unexpanded_ids) if images else found

    odd = Odd(processor._processor, tmp_path)
    (tmp_path / "a.png").write_bytes(packed(picture(1)))
    rows = [{"image": "a.png", "q": "Hi", "a": "Yo yo yo"}, {"image": [], "q": "no image", "a": "fine"}]
    splits, record = made(tmp_path, odd, section(tmp_path, rows, prompt="q", response="a", max_failed=0.5))
    assert record["rows"]["failures"] == [
        "row 1: the processor writes other tokens behind an image than the chat has there, so that no response can be found"
    ]
    assert len(every(splits)) == 1


# schemas

MESSAGES = {
    "places in parts": [
        {
            "role": "user",
            "content": [{"type": "text", "text": "A"}, {"type": "image"}, {"type": "image"}, {"type": "text", "text": "B"}],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "ok"}]},
    ],
    "parts as parquet fills them": [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "A", "index": None},
                {"type": "image", "text": None, "index": 0},
                {"type": "image", "text": None, "index": 1},
                {"type": "text", "text": "B", "index": None},
            ],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "ok", "index": None}]},
    ],
    "places in text": [{"role": "user", "content": "A\n<image><image>\nB"}, {"role": "assistant", "content": "ok"}],
    "from and value": [{"from": "human", "value": "A<image>\n<image>B"}, {"from": "gpt", "value": "ok"}],
    "turns": [{"user": "A<image><image>B", "assistant": "ok", "source": "made"}],
}


@pytest.mark.parametrize("messages", MESSAGES.values(), ids=MESSAGES)
def test_the_schemas_that_sets_have_give_the_same_sequence(tmp_path, processor, messages):
    images = [{"bytes": packed(picture(n)), "path": None} for n in (1, 2)]
    given = section(tmp_path, [{"images": images, "chat": messages}], ".parquet", images="images", messages="chat")
    splits, _ = made(tmp_path, processor, given)
    (sequence,) = every(splits)
    one = "<fake_token_around_image><global-img>" + "<image>" * IMAGE_TOKENS + "<fake_token_around_image>"
    expected = f"<|im_start|>user\nA{one}{one}B<end_of_utterance>\n<|im_start|>assistant\nok<end_of_utterance>\n"
    assert processor.tokenizer.decode(sequence.token_ids) == expected
    assert [image.open().tobytes() for image in sequence.images] == [picture(1).tobytes(), picture(2).tobytes()]


@pytest.mark.parametrize(
    "value",
    [
        packed(picture(1)),
        [packed(picture(1))],
        {"bytes": packed(picture(1)), "path": "elsewhere.png"},
        [{"bytes": packed(picture(1)), "path": None}],
        {"bytes": None, "path": "below/a.png"},
        "below/a.png",
        ["below/a.png"],
        "data:image/png;base64," + base64.b64encode(packed(picture(1))).decode(),
    ],
)
def test_an_image_is_bytes_a_struct_a_path_or_a_list_of_them(tmp_path, processor, value):
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "a.png").write_bytes(packed(picture(1)))
    splits, _ = made(
        tmp_path, processor, section(tmp_path, [{"image": value, "q": "Q", "a": "A"}], ".parquet", prompt="q", response="a")
    )
    (sequence,) = every(splits)
    assert [image.open().tobytes() for image in sequence.images] == [picture(1).tobytes()]


def test_rows_of_the_mirror_have_images_and_paths_in_its_folder(tmp_path, processor, monkeypatch):
    folder = tmp_path / "mirror" / "org" / "set" / "data"
    folder.mkdir(parents=True)
    (folder / "b.jpg").write_bytes(packed(picture(2), "JPEG"))
    rows = [
        {"image": {"bytes": packed(picture(1)), "path": None}, "q": "Q", "a": "A"},
        {"image": {"bytes": None, "path": "b.jpg"}, "q": "Q", "a": "A"},
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "train-00000-of-00001.parquet")
    monkeypatch.setenv("HARNESS_MIRROR", str(tmp_path / "mirror"))
    given = Hub(source="hub", path="org/set", images="image", prompt="q", response="a")
    splits, _ = made(tmp_path, processor, given)
    assert len(every(splits)) == 2
    jpeg = Pillow.open(io.BytesIO(packed(picture(2), "JPEG"))).tobytes()
    assert {image.open().tobytes() for sequence in every(splits) for image in sequence.images} == {picture(1).tobytes(), jpeg}


def test_a_streamed_set_gives_bytes_and_no_decoded_pictures(tmp_path, processor, monkeypatch):
    import datasets

    rows = [{"image": {"bytes": packed(picture(1)), "path": None}, "q": "Q", "a": "A"}]
    features = datasets.Features({"image": datasets.Image(), "q": datasets.Value("string"), "a": datasets.Value("string")})
    streamed = datasets.Dataset.from_list(rows, features=features).to_iterable_dataset()
    monkeypatch.setattr(datasets, "load_dataset", lambda *arguments, **options: streamed)
    given = Hub(source="hub", path="org/set", revision="0" * 40, images="image", prompt="q", response="a")
    splits, record = made(tmp_path, processor, given)
    (sequence,) = every(splits)
    assert sequence.images[0].read() == packed(picture(1)), record


def test_rows_without_images_are_counted_and_are_the_text_that_they_are_elsewhere(tmp_path, processor):
    (tmp_path / "a.png").write_bytes(packed(picture(1)))
    texts = [{"q": f"question {i}", "a": f"answer {i}"} for i in range(6)]
    rows = [
        {"image": "a.png", "q": "Q", "a": "A"},
        *(each | {"image": []} for each in texts),
    ]
    splits, record = made(tmp_path, processor, section(tmp_path, rows, prompt="q", response="a"))
    assert record["rows"] | {"with_images": 1, "text_only": 6, "failed": 0} == record["rows"]
    assert "with images 1, text only 6" in what_became(record)
    (tmp_path / "text").mkdir()
    alone, alone_record = made(tmp_path, processor, section(tmp_path / "text", texts, prompt="q", response="a", images=None))
    assert "text_only" not in alone_record["rows"]
    for split in SPLITS:
        assert {s.token_ids for s in splits[split] if not s.images} == {s.token_ids for s in alone[split]}


def test_a_row_whose_image_is_missing_fails_and_is_not_taken_for_text(tmp_path, processor):
    rows = [
        {"image": [], "q": "Q", "a": "A"},
        {"q": "Q", "a": "A"},
        {"image": None, "q": "Q", "a": "A"},
        {"image": [None], "q": "Q", "a": "A"},
    ]
    splits, record = made(tmp_path, processor, section(tmp_path, rows, prompt="q", response="a", max_failed=0.75))
    assert len(every(splits)) == 1 == record["rows"]["text_only"]
    end = "a row that has no image says so by an empty list"
    assert record["rows"]["failures"] == [
        f'row 2: the field "image" is missing; {end}',
        f'row 3: the field "image" is null; {end}',
        "row 4: image 1 of 1: missing",
    ]
    with pytest.raises(DataError, match='3 of 4 rows failed.*row 2: the field "image" is missing'):
        made(tmp_path, processor, section(tmp_path, rows, prompt="q", response="a"))


# splits and the store


def test_all_rows_of_an_image_are_in_the_split_of_its_digest(tmp_path, processor):
    for number in range(12):
        (tmp_path / f"{number}.png").write_bytes(packed(picture(number)))
    (tmp_path / "again.png").write_bytes(packed(picture(0), compress_level=1))  # other bytes, the same pixels
    rows = [{"image": f"{n}.png", "q": f"question {k}", "a": f"answer {n} {k}"} for n in range(12) for k in range(3)]
    rows.append({"image": "again.png", "q": "and again", "a": "yes"})
    splits, _ = made(tmp_path, processor, section(tmp_path, rows, prompt="q", response="a"))
    assert len(every(splits)) == len(rows)
    for split, stored in splits.items():
        assert all(split_of(sequence.images[0].digest) == split for sequence in stored)
    assert sum(len(stored) > 0 for stored in splits.values()) > 1


def test_the_store_keeps_images_once_and_only_those_of_sequences(tmp_path, processor):
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(packed(picture(number)))
    rows = [
        {"image": "0.png", "q": "Q", "a": "A"},
        {"image": "0.png", "q": "Q2", "a": "A"},
        {"image": ["1.png", "0.png"], "q": "Q", "a": "A"},
        {"image": "2.png", "q": "Q", "a": "too long " * 40},
    ]
    splits, record = made(tmp_path, processor, section(tmp_path, rows, prompt="q", response="a"))
    assert record["rows"]["too_long"] == 1
    found = every(splits)
    (folder,) = {image.path.parent for sequence in found for image in sequence.images}
    assert {path.name for path in folder.iterdir()} == {image.digest for sequence in found for image in sequence.images}
    assert sorted(len(sequence.images) for sequence in found) == [1, 1, 2]
    two = next(sequence for sequence in found if len(sequence.images) == 2)
    assert [image.open().tobytes() for image in two.images] == [picture(1).tobytes(), picture(0).tobytes()]


def test_a_store_of_text_has_no_file_of_images(tmp_path, processor):
    texts = [{"q": f"question {i}", "a": f"answer {i}"} for i in range(30)]
    made(tmp_path, processor, section(tmp_path, texts, prompt="q", response="a", images=None))
    (stage,) = tmp_path.glob("stage-*")
    assert {path.suffix for path in stage.iterdir()} == {".tokens", ".response", ".offsets", ".order"}


def test_a_mix_with_images_holds_them_itself(tmp_path, processor):
    (tmp_path / "a").mkdir()
    rows = [{"image": packed(picture(n)), "q": "Q", "a": "A"} for n in range(30)]
    texts = [{"q": f"question {i}", "a": f"answer {i}"} for i in range(60)]
    (tmp_path / "b").mkdir()
    images, _ = made(tmp_path, processor, section(tmp_path / "a", rows, ".parquet", prompt="q", response="a"))
    text, _ = made(tmp_path, processor, section(tmp_path / "b", texts, prompt="q", response="a", images=None))
    mix = Mix(source="mix", parts=(Part(data="images", weight=1.0), Part(data="text", weight=1.0)))
    source = type("Source", (), {"section": mix, "name": "both"})
    folder = tmp_path / "mixed"
    folder.mkdir()
    with TokenWriter(folder, salt="0 ") as writer:
        write_source(source, writer, Surroundings(processor.tokenizer, EOS, [images, text], lambda *arguments: {}, processor))
    found = [s for split in SPLITS for s in StoredSequences(folder, split)]
    assert {len(s.images) for s in found} == {0, 1}
    of_parts = {s.token_ids: s.images for s in [*every(images), *every(text)] if not s.images}
    assert all(s.token_ids in of_parts for s in found if not s.images)
    digests = {image.digest for s in found for image in s.images}
    assert digests <= {image.digest for s in every(images) for image in s.images}
    assert {path.name for path in (folder / "images").iterdir()} == digests
    assert all(image.path.parent == folder / "images" for s in found for image in s.images)


def test_the_key_of_the_data_changes_with_a_picture_and_not_with_where_it_is(tmp_path, processor):
    keys = []
    for name, number in (("a", 1), ("b", 1), ("c", 2)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "p.png").write_bytes(packed(picture(number)))
        given = section(tmp_path / name, [{"image": "p.png", "q": "Q", "a": "A"}], prompt="q", response="a")
        keys.append(identity(find_source("rows", {"rows": given}, Store(tmp_path / "cache"))))
    assert keys[0] == keys[1] != keys[2]
    (tmp_path / "a" / "p.png").rename(tmp_path / "a" / "other.png")
    renamed = find_source(
        "rows",
        {"rows": section(tmp_path / "a", [{"image": "p.png", "q": "Q", "a": "A"}], prompt="q", response="a")},
        Store(tmp_path / "cache"),
    )
    assert identity(renamed) != keys[0]


def test_without_the_key_images_a_section_is_what_it_was(tmp_path, processor):
    given = section(tmp_path, [{"q": "Q", "a": "A"}], prompt="q", response="a", images=None)
    assert "images" not in identity(find_source("rows", {"rows": given}, Store(tmp_path / "cache")))["data"]


# what is refused, and what is converted


def beside_a_good_row(folder, processor, row, **keys):
    """What became of a row that is read with a good one: its sequence, or None, and the counts."""
    suffix = ".jsonl" if isinstance(row["image"], str | int) else ".parquet"
    good = packed(picture(9)) if isinstance(row["image"], bytes) else []
    given = section(
        folder,
        [row, {"image": good, "q": "good", "a": "good"}],
        suffix,
        **({"prompt": "q", "response": "a", "max_failed": 0.5} | keys),
    )
    splits, record = made(folder.parent, processor, given)
    others = [s for s in every(splits) if "good" not in processor.tokenizer.decode(s.token_ids)]
    assert len(every(splits)) == len(others) + 1
    return (others[0] if others else None), record["rows"]


def wide() -> bytes:
    return packed(Pillow.new("L", (40_000, 1)))


def bomb() -> bytes:
    """A file of some kilobytes that unpacks to 12 GB."""
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", 20_000, 200_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(10**6))) + chunk(b"IEND", b"")


REFUSED = {
    "cut off": (packed(picture(1))[:60], "image 1 of 1: "),
    "empty": (b"", "image 1 of 1: no picture that can be read"),
    "no picture": (b"GIF, he said", "image 1 of 1: no picture that can be read"),
    "40,000 pixels wide": (wide(), "40,000 × 1 pixels"),
    "a bomb": (bomb(), "a picture too large to unpack"),
    "a missing file": ("nowhere.png", '"nowhere.png": there is no such file'),
    "a folder": ("below.png", '"below.png": there is no such file'),
    "an absolute path": ("/etc/hostname.png", '"/etc/hostname.png" leaves the folder of the data'),
    "out by dots": ("../secret.png", '"../secret.png" leaves the folder of the data'),
    "out and back by dots": ("below.png/../../x.png", "leaves the folder of the data"),
    "out by a link": ("link.png", '"link.png" leads elsewhere by a link'),
    "out by a linked folder": ("linked/secret.png", '"linked/secret.png" leads elsewhere by a link'),
    "links in a circle": ("circle.png", '"circle.png" cannot be read'),
    "a name too long": ("x" * 300 + ".png", "cannot be read"),
    "another file": ("rows.parquet", "has not the name of a picture"),
    "an address": ("https://example.org/a.png", "is an address, and nothing is fetched"),
    "not base64": ("data:image/png;base64,@@", "not base64"),
    "no ASCII in base64": ("data:image/png;base64,é", "not base64 (string argument should contain only ASCII characters)"),
    "base64 without its beginning": (
        base64.b64encode(packed(picture(1), "JPEG")).decode(),
        'image 1 of 1: base64 without its beginning; write "data:image/png;base64,", or its kind of image, before it',
    ),
    "no name of a file": ("\ud800.png", '"\\ud800.png" cannot be read (no name that a file can have)'),
    "a list with a hole": ([packed(picture(1)), None], "image 2 of 2: missing"),
    "a number": (7, "image 1 of 1: a int; an image is bytes, or the path of a file"),
}


@pytest.mark.parametrize(("value", "reason"), REFUSED.values(), ids=REFUSED)
def test_a_picture_that_cannot_be_had_costs_its_row_and_no_more(tmp_path, processor, value, reason):
    outside = tmp_path / "secret.png"
    outside.write_bytes(packed(picture(5)))
    folder = tmp_path / "data"
    (folder / "below.png").mkdir(parents=True)
    (folder / "link.png").symlink_to(outside)
    (folder / "linked").symlink_to(tmp_path)
    (folder / "circle.png").symlink_to("circle.png")
    sequence, counts = beside_a_good_row(folder, processor, {"image": value, "q": "Q", "a": "A"})
    assert sequence is None and counts["failed"] == 1
    assert counts["failures"][0].startswith("row 1: image ") and reason in counts["failures"][0]
    assert "/9j/" not in counts["failures"][0]


GREY = picture(3, "L")
FRAMES = [picture(number) for number in (4, 5)]


def sixteen_bits() -> bytes:
    values = (np.asarray(GREY).astype(np.uint16)) * 257
    return packed(Pillow.fromarray(values))


CONVERTED = {
    "an animated GIF is its first frame": (packed(FRAMES[0], "GIF", save_all=True, append_images=[FRAMES[1]]), None),
    "CMYK": (packed(picture(6, "CMYK"), "JPEG"), None),
    "16 bits": (sixteen_bits(), GREY.convert("RGB")),
    "grey": (packed(GREY), GREY.convert("RGB")),
}


@pytest.mark.parametrize(("value", "expected"), CONVERTED.values(), ids=CONVERTED)
def test_a_picture_of_another_kind_is_converted(tmp_path, processor, value, expected):
    (tmp_path / "data").mkdir()
    sequence, counts = beside_a_good_row(tmp_path / "data", processor, {"image": value, "q": "Q", "a": "A"})
    assert counts["failed"] == 0
    found = sequence.images[0].open()
    with Pillow.open(io.BytesIO(value)) as first:
        expected = expected or first.convert("RGB")
    assert (found.mode, found.size, found.tobytes()) == ("RGB", expected.size, expected.tobytes())


PLACES = {
    "an image that the text asks for is not there": ([], "Look: <image>", "<image> in the text of message 0"),
    "fewer places than images": ([picture(1), picture(2)], "Look: <image>", "1 places of images and 2 images"),
    "more places than images": ([picture(1)], "<image> and <image>", "2 places of images and 1 images"),
    "the token of the model in a text": ([], "<image>", "<image> in the text of message 0"),
}


@pytest.mark.parametrize(("pictures", "question", "reason"), PLACES.values(), ids=PLACES)
def test_places_and_images_must_be_as_many(tmp_path, processor, pictures, question, reason):
    (tmp_path / "data").mkdir()
    images = [packed(each) for each in pictures]
    sequence, counts = beside_a_good_row(tmp_path / "data", processor, {"image": images, "q": question, "a": "A"})
    assert sequence is None and reason in counts["failures"][0]


CHATS = {
    "an image in an answer": (
        [{"role": "user", "content": "Draw"}, {"role": "assistant", "content": [{"type": "image"}]}],
        "message 1 is an answer and has the place of an image",
    ),
    "the token in an answer": (
        [{"role": "user", "content": "Draw"}, {"role": "assistant", "content": "<image>"}],
        "<image> in the text of message 1",
    ),
    "a text that speaks of it beside a place": (
        [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is <image>?"}]},
            {"role": "assistant", "content": "x"},
        ],
        "<image> in the text of message 0",
    ),
    "an image of its own": (
        [{"role": "user", "content": [{"type": "image", "url": "a.png"}]}, {"role": "assistant", "content": "x"}],
        "message 0 holds an image itself",
    ),
    "another order": (
        [{"role": "user", "content": [{"type": "image", "index": 1}]}, {"role": "assistant", "content": "x"}],
        "message 0 has the places of its images out of order",
    ),
    "sound": (
        [{"role": "user", "content": [{"type": "audio"}]}, {"role": "assistant", "content": "x"}],
        "message 0 has a part that is neither a text nor the place of an image",
    ),
    "nobody asks": ([{"role": "assistant", "content": "x"}], "images, and no user turn that they could belong to"),
    "no text at all": (
        [{"role": "user", "content": 7}, {"role": "assistant", "content": "x"}],
        "message 0 is not a role and a content of text",
    ),
}


@pytest.mark.parametrize(("messages", "reason"), CHATS.values(), ids=CHATS)
def test_a_chat_that_images_do_not_fit_into_is_refused(tmp_path, processor, messages, reason):
    (tmp_path / "a.png").write_bytes(packed(picture(1)))
    good = [{"role": "user", "content": "good"}, {"role": "assistant", "content": "good"}]
    rows = [{"image": "a.png", "chat": messages}, {"image": [], "chat": good}]
    splits, record = made(tmp_path, processor, section(tmp_path, rows, messages="chat", max_failed=0.5))
    assert len(every(splits)) == 1
    assert record["rows"]["failures"] == [f"row 1: {reason}"] or reason in record["rows"]["failures"][0]


def test_text_data_of_an_image_model_may_not_hold_its_image_token_either(tmp_path, processor):
    rows = [{"q": "a tag: <image>", "a": "A"}, {"q": "Q", "a": "it is <image>"}, {"q": "Q", "a": "A"}]
    keys = {"images": None, "max_failed": 0.9}
    splits, record = made(tmp_path, processor, section(tmp_path, rows, prompt="q", response="a", **keys))
    assert len(every(splits)) == 1
    assert record["rows"]["failures"] == [
        f"row {n}: the text holds <image>, which stands for an image, and there is none" for n in (1, 2)
    ]
    splits, record = made(tmp_path, processor, section(tmp_path, [*rows, {"q": "long enough " * 5, "a": ""}], text="q", **keys))
    assert record["rows"]["failures"] == ["row 1: the text holds <image>, which stands for an image, and there is none"]


def test_more_images_than_fit_are_refused_before_one_is_opened_and_too_long_rows_are_dropped_whole(tmp_path, processor):
    (tmp_path / "a.png").write_bytes(packed(picture(1)))
    rows = [
        {"image": ["a.png"] * 65, "q": "Q", "a": "A"},
        {"image": ["a.png"] * 9, "q": "Q", "a": "A"},
        {"image": "a.png", "q": "Q", "a": "A" * 60},
        {"image": [], "q": "Q", "a": "A" * 90},
    ]
    given = section(tmp_path, rows, prompt="q", response="a", seq_len=64, too_long="truncate", max_failed=0.5)
    splits, record = made(tmp_path, processor, given)
    assert record["rows"]["failures"] == [
        "row 1: 65 images; at most 64, the tokens of seq_len, of which each image takes one or more"
    ]
    assert (record["rows"]["too_long"], record["rows"]["truncated"]) == (2, 1)
    (sequence,) = every(splits)
    assert not sequence.images and len(sequence) == 64


def test_images_that_are_too_large_together_cost_their_row(tmp_path, processor, monkeypatch):
    monkeypatch.setattr("harness.row_images.MOST_PIXELS_A_ROW", 600)  # of 280 each
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(packed(picture(number)))
    rows = [{"image": [f"{n}.png" for n in range(k)], "q": "Q", "a": "A"} for k in (3, 2)]
    splits, record = made(tmp_path, processor, section(tmp_path, rows, prompt="q", response="a", max_failed=0.5))
    assert record["rows"]["failures"] == ["row 1: the first 3 of 3 images have 840 pixels; at most 600 in a row"]
    (sequence,) = every(splits)
    assert len(sequence.images) == 2


def test_an_image_that_the_processor_refuses_costs_its_row(tmp_path, processor):
    class Picky(Processor):
        def _call(self, text, images, **options):
            if any(image.open().width > 100 for of_one in images for image in of_one):
                raise ModelError("its processor does not take 1 images (101 × 1): too wide")
            return super()._call(text, images, **options)

    rows = [
        {"image": packed(Pillow.new("RGB", (101, 1))), "q": "Q", "a": "A"},
        {"image": packed(picture(1)), "q": "good", "a": "good"},
    ]
    given = section(tmp_path, rows, ".parquet", prompt="q", response="a", max_failed=0.5)
    splits, record = made(tmp_path, Picky(processor._processor, tmp_path), given)
    assert len(every(splits)) == 1
    assert record["rows"]["failures"] == ["row 1: its processor does not take 1 images (101 × 1): too wide"]


def test_too_many_broken_rows_end_the_stage_with_the_first_of_them(tmp_path, processor):
    rows = [{"image": b"no picture", "q": "Q", "a": "A"} for _ in range(3)]
    with pytest.raises(DataError, match=r"3 of 3 rows failed.*row 1: image 1 of 1: no picture that can be read"):
        made(tmp_path, processor, section(tmp_path, rows, ".parquet", prompt="q", response="a"))


def test_a_field_that_no_row_has_is_named_with_those_that_there_are(tmp_path, processor):
    rows = [{"picture": "a.png", "q": "Q", "a": "A"}]
    with pytest.raises(DataError, match=r'data.rows.images: no row has the field "image"; rows have: a, picture, q'):
        made(tmp_path, processor, section(tmp_path, rows, prompt="q", response="a"))


def test_files_in_several_folders_have_no_folder_that_paths_are_relative_to(tmp_path, processor):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        section(tmp_path / name, [{"q": "Q", "a": "A"}])
    given = Jsonl(source="jsonl", path=str(tmp_path / "*" / "rows.jsonl"), prompt="q", response="a", images="image")
    with pytest.raises(
        DataError, match="data.rows.path: files in .*a and .*b; paths of images are relative to the folder of the rows"
    ):
        made(tmp_path, processor, given)


def test_a_model_that_takes_no_images_is_named(tmp_path, tiny_tokenizer):
    source = find_source(
        "rows", {"rows": section(tmp_path, [{"q": "Q", "a": "A"}], prompt="q", response="a")}, Store(tmp_path / "cache")
    )
    with (
        TokenWriter(tmp_path) as writer,
        pytest.raises(DataError, match=r"data.rows: has images, and the model takes none; set model.kind"),
    ):
        write_source(source, writer, Surroundings(tiny_tokenizer, {1}, [], lambda *arguments: {}))


def test_a_processor_without_a_chat_template_is_named(tmp_path, processor, tiny_vlm):
    bare = load_processor(tiny_vlm)
    bare._processor.chat_template = None
    with pytest.raises(DataError, match="the processor has no chat template"):
        made(tmp_path, bare, section(tmp_path, [{"q": "Q", "a": "A"}], prompt="q", response="a"))


def test_a_template_that_passes_over_strings_is_given_lists(tmp_path, tiny_vlm):
    lists_only = load_processor(tiny_vlm)
    lists_only._processor.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for part in m['content'] %}{% if part['type'] == 'image' %}<image>"
        "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    splits, _ = made(
        tmp_path, lists_only, section(tmp_path, [{"q": "Question", "a": "Answer"}], prompt="q", response="a", images=None)
    )
    (sequence,) = every(splits)
    expected = "<|im_start|>user\nQuestion<end_of_utterance>\n<|im_start|>assistant\nAnswer<end_of_utterance>\n"
    assert lists_only.tokenizer.decode(sequence.token_ids) == expected


def test_rows_with_images_are_in_memory_one_row_group_at_a_time(tmp_path):
    rows = [{"image": np.random.default_rng(n).bytes(1_000_000), "q": "Q", "a": "A"} for n in range(40)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet", row_group_size=4)
    del rows
    before, most = pyarrow.total_allocated_bytes(), 0
    for _ in file_rows(tmp_path / "rows.parquet", at_once=1):
        most = max(most, pyarrow.total_allocated_bytes() - before)
    assert most < 20_000_000


# drawings


def test_drawings_are_chats_about_pictures_that_no_mini_task_has(tmp_path, processor):
    given = Drawings(source="drawings", pictures=16, seq_len=200)
    splits, record = made(tmp_path, processor, given)
    found = every(splits)
    assert len(found) == 16 == record["drawings"]["pictures"]
    turns = sum(sequence.token_ids.count(1) // 2 for sequence in found)
    assert turns == record["drawings"]["questions"] > 24
    assert all(len(sequence) <= 200 and len(sequence.images) == 1 for sequence in found)
    assert sum(len(stored) > 0 for stored in splits.values()) > 1
    asked = {row["image"].tobytes() for task in EVALUATED for row in mini_pictures.rows(task, n=16)}
    assert not asked & {sequence.images[0].open().tobytes() for sequence in found}
    again, _ = made(tmp_path, processor, given)
    assert found == every(again)
    other, _ = made(tmp_path, processor, Drawings(source="drawings", pictures=16, seq_len=200, seed=1))
    assert not {s.images for s in found} & {s.images for s in every(other)}


def test_drawings_that_do_not_fit_say_so(tmp_path, processor):
    with pytest.raises(
        DataError, match=r"data.rows.seq_len: no picture fits 32 tokens with a question \(the last has \d+\); raise it"
    ):
        made(tmp_path, processor, Drawings(source="drawings", pictures=4, seq_len=32))


def test_more_drawings_than_there_are_say_how_many_there_are(tmp_path, processor, monkeypatch):
    monkeypatch.setattr("harness.tasks.drawings.MOST_TRIED", 1)  # the first draw of the other side, or again, is the last
    with pytest.raises(DataError, match=r"data.rows.pictures: there are \d+, not 9,999 \(a .* has .*\); lower it"):
        made(tmp_path, processor, Drawings(source="drawings", pictures=9_999, seq_len=200))


def test_drawings_as_prompts_of_a_model_without_a_template_are_an_error_of_the_data(tmp_path, processor, tiny_vlm):
    section = Drawings(source="drawings", pictures=4, seq_len=200)
    bare = load_processor(tiny_vlm)
    bare._processor.chat_template = None
    with pytest.raises(DataError, match="the processor has no chat template"):
        next(drawing_asks("drawn", section, processor=bare, images=tmp_path))
    bare._processor.chat_template = "{{ raise_exception('no users') }}"
    with pytest.raises(DataError, match=r"data.drawn: .*no users"):
        next(drawing_asks("drawn", section, processor=bare, images=tmp_path))
