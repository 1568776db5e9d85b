"""Images as they are kept: made canonical once, stored under a digest of their pixels, the same for every engine. No torch.

The digest covers size and RGB pixels, so it names what a model sees: another decoder that gives other pixels gives another image, and how a
file was compressed changes nothing.
"""

from __future__ import annotations

import hashlib
import io
import os
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from harness.errors import StoreError
from harness.tasks.pictures import BROKEN, canonical, open_picture, opened

if TYPE_CHECKING:
    import PIL.Image

FOLDER = "images"
"""Of a stage: where its images lie."""
_TURN = 0x0112
"""EXIF's key for how a picture is to be turned before it is shown; 1: not at all."""
_BEGINNINGS: dict[bytes, Literal["image/png", "image/jpeg", "image/webp"]] = {
    b"\x89PNG": "image/png",
    b"\xff\xd8\xff": "image/jpeg",
    b"RIFF": "image/webp",
}


@dataclass(frozen=True)
class Image:
    """An image in its file. digest: of its pixels, 64 hex digits."""

    digest: str
    path: Path = field(compare=False, repr=False)

    def open(self) -> PIL.Image.Image:
        """Its pixels, RGB."""
        return open_picture(self.read())

    def read(self) -> bytes:
        """The file: one RGB frame in PNG, JPEG or WebP. StoreError if it cannot be read."""
        try:
            return self.path.read_bytes()
        except OSError as error:
            raise StoreError(f"{self.path}: cannot be read ({error.strerror}); delete its stage and run again") from error

    @property
    def media_type(self) -> str:
        """As a server wants to be told."""
        return next(kind for beginning, kind in _BEGINNINGS.items() if self.read().startswith(beginning))


def keep_image(data: bytes, folder: Path) -> Image:
    """Store an image file in `folder`: as it is where it is one RGB frame in a format of `Image`, else as PNG.

    One that says it is to be turned, or whose EXIF cannot be read, is stored as PNG too, which does not say so: engines make that turn,
    we do not.

    Raises DataError, with the reason alone, for what `open_picture` refuses.
    """
    found = opened(data)
    is_plain = found.mode == "RGB" and "transparency" not in found.info and getattr(found, "n_frames", 1) == 1
    is_plain = is_plain and found.format in ("PNG", "JPEG", "WEBP")
    picture = canonical(found)
    return _keep(picture, data if is_plain and _stands_upright(found) else None, folder)


def keep_picture(picture: PIL.Image.Image, folder: Path) -> Image:
    """Store a picture that was drawn here, RGB."""
    return _keep(picture, None, folder)


def kept(folder: Path, digest: str) -> Image:
    """An image that was stored in `folder`; StoreError if it is not there."""
    path = folder / digest
    if not path.is_file():
        raise StoreError(f"{folder}: image {digest} is not there; delete its stage and run again")
    return Image(digest, path)


def digest_of(picture: PIL.Image.Image) -> str:
    """The digest of an RGB picture, by which it is kept."""
    width, height = picture.size
    return hashlib.sha256(f"{width}x{height} RGB ".encode() + picture.tobytes()).hexdigest()


def _stands_upright(picture: PIL.Image.Image) -> bool:
    """Whether the EXIF of a picture, which is unpacked, asks for no turn and can be read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about damaged metadata
            return bool(picture.getexif().get(_TURN, 1) == 1)
    except (*BROKEN, TypeError, KeyError, ZeroDivisionError):
        return False


def _keep(picture: PIL.Image.Image, data: bytes | None, folder: Path) -> Image:
    digest = digest_of(picture)
    path = folder / digest
    if path.is_file():
        return Image(digest, path)
    if data is None:
        packed = io.BytesIO()
        picture.save(packed, format="PNG")
        data = packed.getvalue()
    folder.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(f".{os.getpid()}")
    beside.write_bytes(data)
    beside.replace(path)
    return Image(digest, path)
