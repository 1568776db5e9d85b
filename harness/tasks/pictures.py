"""A picture from its bytes, as every engine gets it: RGB, 8 bits, one frame; or why it cannot be had.

Refused with a DataError: what is no picture, is cut off or damaged; more than 30,000 pixels on a side or 100 million in all (a small
file may unpack to gigabytes; the size is read before anything is unpacked). Converted: CMYK, grey and palette pictures; transparent
ones onto white, as on a page; 16 bits to 8, by 257; an animated picture is its first frame. The turn that EXIF asks for is not made:
pixels stay as they are stored, as elsewhere in the field. Pillow is imported where a picture is opened.
"""

from __future__ import annotations

import io
import re
import struct
import warnings
import zlib
from typing import TYPE_CHECKING, cast

from harness.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

MOST_PIXELS_A_SIDE = 30_000
MOST_PIXELS = 100_000_000
BROKEN = (OSError, SyntaxError, ValueError, EOFError, IndexError, OverflowError, struct.error, zlib.error)
"""What Pillow raises for damaged files."""
_SIXTEEN_BITS = 65_535
_ADDRESS = re.compile(r" <[^<>]* at 0x[0-9a-f]+>")
_BASE64 = re.compile(r"[A-Za-z0-9+/\s]+={0,2}\s*")
_BASE64_BEGINNINGS = ("iVBORw0KGgo", "/9j/", "UklGR", "R0lGOD", "SUkqA", "TU0AK", "Qk")
"""Of PNG, JPEG, WebP, GIF, TIFF of either order and BMP."""


def open_picture(data: bytes) -> Image:
    """The picture in RGB; DataError, with the reason alone, if it is broken or too large."""
    return canonical(opened(data))


def canonical(picture: Image) -> Image:
    """A picture that is open already, in RGB; DataError, with the reason alone, if it is broken or too large."""
    _require_size(picture)
    return _as_rgb(_loaded(picture))


def opened(data: bytes) -> Image:
    """The picture with its size known and checked, and nothing unpacked; DataError as `open_picture`."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's limits are not ours; what it says of odd metadata changes no pixel
            picture = Image.open(io.BytesIO(data))
    except Image.DecompressionBombError as error:
        raise DataError(f"a picture too large to unpack ({_reason(error)}); at most {MOST_PIXELS:,} pixels") from error
    except BROKEN as error:
        raise DataError(f"no picture that can be read ({_reason(error)})") from error
    _require_size(picture)
    return picture


def size_of(data: bytes) -> tuple[int, int]:
    """(width, height) of a picture, with nothing unpacked; DataError as `open_picture`."""
    return opened(data).size


def waiting_picture(data: bytes) -> Image:
    """As `open_picture`, of bytes that `require_readable` has passed: what is RGB already is unpacked when it is first used.

    Plain lm-eval holds the pictures of all questions at once: packed they are a tenth of the size.
    """
    picture = opened(data)
    is_ready = picture.mode == "RGB" and "transparency" not in picture.info and getattr(picture, "n_frames", 1) == 1
    return picture if is_ready else open_picture(data)


def require_readable(data: bytes) -> None:
    """The DataError of `open_picture`, if there is one; a JPEG is read through at an eighth of its size, which is faster."""
    picture = opened(data)
    if picture.format != "JPEG":
        open_picture(data)
        return
    picture.draft(picture.mode, (picture.width // 8, picture.height // 8))
    _loaded(picture)


def is_base64(text: str) -> bool:
    """Whether a text that should name a file is the file of a picture itself, in base64."""
    is_long = len(text) > 200 or (len(text) > 40 and text.startswith(_BASE64_BEGINNINGS))
    return is_long and _BASE64.fullmatch(text) is not None


def grey_picture(size: tuple[int, int] = (64, 64)) -> Image:
    """What stands for a picture of that size that is not shown."""
    from PIL import Image

    return Image.new("RGB", size, (128, 128, 128))


def _require_size(picture: Image) -> None:
    width, height = picture.size
    if max(width, height) > MOST_PIXELS_A_SIDE or width * height > MOST_PIXELS:
        raise DataError(
            f"a picture of {width:,} × {height:,} pixels; at most {MOST_PIXELS_A_SIDE:,} a side and {MOST_PIXELS:,} in all"
        )


def _loaded(picture: Image) -> Image:
    try:
        picture.load()
    except BROKEN as error:
        raise DataError(f"a broken picture ({_reason(error)})") from error
    return picture


def _as_rgb(picture: Image) -> Image:
    from PIL import Image

    if picture.mode.startswith(("I", "F")):
        picture = _eight_bits(picture)
    if picture.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        page = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(page, picture).convert("RGB")
    return picture.convert("RGB")


def _eight_bits(picture: Image) -> Image:
    """A grey picture of more than 8 bits, its white of 65,535 as 255."""
    wide = picture.convert("F")
    darkest, brightest = cast(tuple[float, float], wide.getextrema())
    if not 0 <= darkest <= brightest <= _SIXTEEN_BITS:
        raise DataError(f"a picture with values from {darkest:g} to {brightest:g}; allowed: 8 or 16 bits")
    return wide.point(lambda value: value * (255 / _SIXTEEN_BITS) + 0.5).convert("L")


def _reason(error: Exception) -> str:
    """The first line of what an error says, the same in every process."""
    return _ADDRESS.sub("", (str(error).splitlines() or [type(error).__name__])[0])
