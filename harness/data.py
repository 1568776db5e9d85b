"""What a token batch is made of: sequences with response masks, splits by hash, and the order in which training reads.

A *sequence* is at most `seq_len` token ids with a response mask: in a dialogue the assistant's tokens, in plain text
all. Its split is the hash of its own text, never of its source: the same prompt, chat or whole text of a row is in one split wherever
it stands, and no split moves when a source grows or is mixed with another. A chat with images is in the split of the digest of its first one,
and so is everything that is asked about it.

The exception is text that is cut before it is hashed. Pieces of the builtin manual and of random tokens are hashed one by one, by their
token ids; rows of plain text by the whole text of the row. So neighbouring pieces of one section of the manual are in several splits,
and the manual given again as rows may be in another split than the builtin source has it in: do not mix the two.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from harness.images import Image

SPLITS = {"train": 60, "validation": 5, "calibration": 10, "diagnostics": 25}
"""Shares of the splits in percent."""


@dataclass(frozen=True)
class Sequence:
    """Token ids and, for each, whether it is part of a response; the images that some of them stand for, in order."""

    token_ids: tuple[int, ...]
    is_response: tuple[bool, ...]
    images: tuple[Image, ...] = ()

    def __len__(self) -> int:
        return len(self.token_ids)


def split_of(text: str) -> str:
    """The split that a piece of text belongs to."""
    position = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) % 100
    for name, share in SPLITS.items():
        position -= share
        if position < 0:
            return name
    raise AssertionError("the shares of SPLITS do not add up to 100")
