"""Images as they are kept: made canonical once, named by their pixels."""

from __future__ import annotations

import io
import json
import shutil
import warnings

import numpy as np
import pytest
from PIL import Image as Pillow

from harness.errors import DataError, ModelError, StoreError
from harness.images import keep_image, keep_picture, kept
from harness.loading import load_tokenizer
from harness.processor import load_processor
from harness.row_images import images_of
from tests.tiny_vlm import IMAGE_TOKENS


def noise(width=20, height=10, seed=0):
    return Pillow.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def packed(picture, kind="PNG", **options):
    data = io.BytesIO()
    picture.save(data, format=kind, **options)
    return data.getvalue()


def test_the_digest_is_of_the_pixels_however_the_file_was_packed(tmp_path):
    digests = {
        keep_image(packed(noise()), tmp_path).digest,
        keep_image(packed(noise(), compress_level=0), tmp_path / "b").digest,
        keep_image(packed(noise(), "BMP"), tmp_path / "c").digest,
        keep_picture(noise(), tmp_path / "d").digest,
    }
    assert len(digests) == 1
    assert keep_image(packed(noise(seed=1)), tmp_path).digest not in digests
    turned = Pillow.fromarray(np.asarray(noise()).reshape(20, 10, 3))
    assert keep_picture(turned, tmp_path).digest not in digests


@pytest.mark.parametrize(("kind", "media_type"), [("PNG", "image/png"), ("JPEG", "image/jpeg"), ("WEBP", "image/webp")])
def test_plain_files_are_kept_as_they_are(tmp_path, kind, media_type):
    data = packed(noise(), kind)
    image = keep_image(data, tmp_path)
    assert (image.read(), image.media_type) == (data, media_type)
    assert kept(tmp_path, image.digest) == image


def test_what_servers_may_read_otherwise_is_kept_as_png(tmp_path):
    for picture, kind in ((noise().convert("CMYK"), "JPEG"), (noise().convert("P"), "GIF"), (noise().convert("L"), "PNG")):
        image = keep_image(packed(picture, kind), tmp_path)
        assert image.media_type == "image/png"
        assert image.open().mode == "RGB"


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_file_that_asks_to_be_turned_is_kept_without_the_wish_for_engines_would_grant_it(tmp_path, kind):
    wish = Pillow.Exif()
    wish[0x0112] = 6  # a quarter turn
    data = packed(noise(), kind, exif=wish)
    image = keep_image(data, tmp_path)
    assert (image.media_type, image.open().size) == ("image/png", (20, 10))
    assert 0x0112 not in Pillow.open(io.BytesIO(image.read())).getexif()
    assert keep_image(packed(Pillow.open(io.BytesIO(data)).convert("RGB")), tmp_path / "b") == image


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_a_file_whose_exif_cannot_be_read_is_kept_as_png_without_it(tmp_path, kind):
    image = keep_image(packed(noise(), kind, exif=b"Exif\0\0no metadata"), tmp_path)
    assert image.media_type == "image/png"
    assert b"no metadata" not in image.read()
    assert keep_image(packed(noise(), kind), tmp_path / "b").open().tobytes() == image.open().tobytes()


def test_nothing_is_said_of_a_picture_that_is_large_for_pillow_and_not_for_us(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(packed(noise()))
    monkeypatch.setattr(Pillow, "MAX_IMAGE_PIXELS", 150)  # of 200: it warns above this, and refuses above twice as many
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (image,) = images_of({"image": "a.png"}, "image", folder=tmp_path, keep=tmp_path / "kept", most=1)
        assert image.open().size == (20, 10)


def test_no_picture_is_refused_and_a_missing_file_named(tmp_path):
    with pytest.raises(DataError, match="no picture that can be read"):
        keep_image(b"nothing", tmp_path)
    with pytest.raises(StoreError, match="image abc is not there"):
        kept(tmp_path, "abc")
    image = keep_picture(noise(), tmp_path)
    image.path.unlink()
    with pytest.raises(StoreError, match="cannot be read"):
        image.read()


def test_a_chat_is_rendered_once_and_its_images_expanded(tiny_vlm, tmp_path):
    import torch

    processor = load_processor(tiny_vlm)
    images = [keep_picture(noise(), tmp_path), keep_picture(noise(seed=1), tmp_path)]
    asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "or"}, {"type": "image"}]}]
    text = processor.render(asked)
    encoded = processor.encode(text, images)
    assert text == "<|im_start|>user\n<image>or<image><end_of_utterance>\n<|im_start|>assistant\n"
    assert encoded.token_ids.count(processor.image_token_id) == 2 * IMAGE_TOKENS
    assert encoded.unexpanded_ids.count(processor.image_token_id) == 2
    ids = torch.tensor([encoded.token_ids])
    assert processor.model_inputs([images], ids)["pixel_values"].shape[1] == 2
    assert processor.model_inputs([[]], ids) == {}


def test_a_chat_without_a_placeholder_for_each_image_is_refused(tiny_vlm, tmp_path):
    processor = load_processor(tiny_vlm)
    with pytest.raises(ModelError, match="1 placeholders <image> for 0 images"):
        processor.encode("what is <image>?", [])


def test_a_model_without_a_processor_of_images_is_named(tiny_model):
    with pytest.raises(ModelError, match="takes no images|cannot be loaded"):
        load_processor(tiny_model)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("processor_config.json", {"auto_map": {"AutoProcessor": "other/repo--processing.X"}}),
        ("processor_config.json", {"image_processor": {"auto_map": {"AutoImageProcessor": "other/repo--images.X"}}}),
        ("preprocessor_config.json", {"auto_map": {"AutoImageProcessor": ["other/repo--images.X", None]}}),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["other/repo--tokens.X", None]}}),
    ],
)
def test_trusted_code_of_a_processor_from_another_repository_is_refused(tiny_vlm, tmp_path, monkeypatch, name, content):
    import transformers

    folder = tmp_path / "model"
    shutil.copytree(tiny_vlm, folder)
    path = folder / name
    path.write_text(json.dumps((json.loads(path.read_text()) if path.is_file() else {}) | content))

    def fetch(*arguments, **options):
        raise AssertionError("fetched")

    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", fetch)
    with pytest.raises(
        ModelError, match=rf"{name}: its remote code lies in another repository \(other/repo\), which nothing pins"
    ):
        load_processor(folder, trust_remote_code=True)


def test_trusted_code_of_a_tokenizer_from_another_repository_is_refused(tiny_model, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["other/repo--tokens.X", None]}}))
    with pytest.raises(ModelError, match=r"tokenizer_config.json: its remote code lies in another repository \(other/repo\)"):
        load_tokenizer(folder, trust_remote_code=True)
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(ModelError, match=r"tokenizer_config.json: not JSON"):
        load_tokenizer(folder, trust_remote_code=True)
