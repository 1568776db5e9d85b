"""The token batches of a data stage on disk: written one sequence at a time, read through memory maps.

Per split, raw little-endian arrays in the order in which the sequences were made, and the order in which they are read:

    <split>.tokens     int32, all token ids one after another
    <split>.response   uint8, 1 where a token is part of a response
    <split>.offsets    int64, sequences + 1: where each begins and the last ends
    <split>.order      int64, a permutation of the sequences: by a hash of their tokens, so that the first n of them are a
                       sample of the whole source, however it was sorted

Where a split has images, besides:

    <split>.images         their digests, 32 bytes each, in the order of the sequences and of the tokens that stand for them
    <split>.image_offsets  int64, sequences + 1: where those of each sequence begin and the last end
    images/<digest>        the images of all splits, as `harness.images` keeps them

Neither side holds the tokens in memory; the writer keeps 24 bytes a sequence, and in the end a digest of each image.
"""

from __future__ import annotations

import collections.abc
import hashlib
import os
import shutil
from array import array
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self, overload

import numpy as np

from harness.data import SPLITS, Sequence
from harness.errors import StoreError
from harness.images import FOLDER, Image, kept

TOKENS, RESPONSE, INTEGERS = np.dtype("<i4"), np.dtype("u1"), np.dtype("<i8")
DIGESTS = np.dtype("V32")
_OF_PART: dict[str, np.dtype[Any]] = {"tokens": TOKENS, "response": RESPONSE, "offsets": INTEGERS, "order": INTEGERS}


class TokenWriter:
    """Appends sequences to the splits of a folder; the arrays are whole when the block ends without an error.

    salt: put before the tokens in the hash that orders them.
    images: the folder where a source keeps its images; those of no sequence are removed at the end.
    """

    def __init__(self, folder: Path, *, salt: str = "") -> None:
        self.folder, self.salt, self.images = folder, salt, folder / FOLDER
        self.counts = {split: {"sequences": 0, "tokens": 0, "response_tokens": 0} for split in SPLITS}
        self._offsets = {split: array("q", [0]) for split in SPLITS}
        self._places = {split: array("Q") for split in SPLITS}
        self._image_offsets = {split: array("q", [0]) for split in SPLITS}
        self._open = ExitStack()

    def __enter__(self) -> Self:
        self._files = {
            (split, part): self._open.enter_context((self.folder / f"{split}.{part}").open("wb"))
            for split in SPLITS
            for part in ("tokens", "response")
        }
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._open.close()
        if kind is not None:
            return
        for split in SPLITS:
            order = np.argsort(np.frombuffer(self._places[split], dtype=np.uint64), kind="stable")
            order.astype(INTEGERS).tofile(self.folder / f"{split}.order")
            np.frombuffer(self._offsets[split], dtype=np.int64).astype(INTEGERS).tofile(self.folder / f"{split}.offsets")
            if self._image_offsets[split][-1]:
                offsets = np.frombuffer(self._image_offsets[split], dtype=np.int64)
                offsets.astype(INTEGERS).tofile(self.folder / f"{split}.image_offsets")
        self._remove_unused()

    def append(self, split: str, sequence: Sequence) -> None:
        """Add one sequence to a split."""
        self._files[split, "tokens"].write(np.array(sequence.token_ids, dtype=TOKENS).tobytes())
        self._files[split, "response"].write(np.array(sequence.is_response, dtype=RESPONSE).tobytes())
        self._offsets[split].append(self._offsets[split][-1] + len(sequence))
        digests = "".join(image.digest for image in sequence.images)
        place = hashlib.sha256(f"{self.salt}{sequence.token_ids!r}{digests}".encode()).digest()[:8]
        self._places[split].append(int.from_bytes(place, "big"))
        count = self.counts[split]
        count["sequences"] += 1
        count["tokens"] += len(sequence)
        count["response_tokens"] += sum(sequence.is_response)
        self._image_offsets[split].append(self._image_offsets[split][-1] + len(sequence.images))
        for image in sequence.images:
            self._append_image(split, image)

    def _append_image(self, split: str, image: Image) -> None:
        if (split, "images") not in self._files:
            self._files[split, "images"] = self._open.enter_context((self.folder / f"{split}.images").open("wb"))
        self._files[split, "images"].write(bytes.fromhex(image.digest))
        own = self.images / image.digest
        if not own.is_file():  # of a part of a mix
            self.images.mkdir(exist_ok=True)
            try:
                os.link(image.path, own)
            except OSError:  # other file systems have none, or not between two of them
                shutil.copyfile(image.path, own)

    def _remove_unused(self) -> None:
        """Images of rows that failed or were too long."""
        if not self.images.is_dir():
            return
        used: set[str] = set()
        for split in SPLITS:
            if self._image_offsets[split][-1]:
                used.update(digest.tobytes().hex() for digest in _mapped(self.folder / f"{split}.images", DIGESTS))
        for path in self.images.iterdir():
            if path.name not in used:
                path.unlink()
        if not used:
            self.images.rmdir()


class StoredSequences(collections.abc.Sequence[Sequence]):
    """The sequences of one split, or the first `count` of them; only those that are asked for are read.

    lengths: tokens of each, int64, in the same order. has_images: whether there are any in the split.
    """

    def __init__(self, folder: Path, split: str, count: int | None = None) -> None:
        arrays = {part: _mapped(folder / f"{split}.{part}", dtype) for part, dtype in _OF_PART.items()}
        self._tokens, self._response = arrays["tokens"], arrays["response"]
        order = arrays["order"][:count]
        self._starts, ends = arrays["offsets"][:-1][order], arrays["offsets"][1:][order]
        self.lengths = ends - self._starts
        self._images, self._order = folder / FOLDER, order
        self.has_images = (folder / f"{split}.image_offsets").is_file()
        if self.has_images:
            self._digests = _mapped(folder / f"{split}.images", DIGESTS)
            self._image_offsets = _mapped(folder / f"{split}.image_offsets", INTEGERS)

    def __len__(self) -> int:
        return len(self.lengths)

    @overload
    def __getitem__(self, index: int) -> Sequence: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sequence]: ...
    def __getitem__(self, index: int | slice) -> Sequence | list[Sequence]:
        if isinstance(index, slice):
            return [self._read(i) for i in range(*index.indices(len(self)))]
        return self._read(range(len(self))[index])

    def __iter__(self) -> Iterator[Sequence]:
        return map(self._read, range(len(self)))

    def _read(self, index: int) -> Sequence:
        start = int(self._starts[index])
        end = start + int(self.lengths[index])
        mask = tuple(self._response[start:end].astype(bool).tolist())
        return Sequence(tuple(self._tokens[start:end].tolist()), mask, self._images_of(int(self._order[index])))

    def _images_of(self, place: int) -> tuple[Image, ...]:
        if not self.has_images:
            return ()
        start, end = (int(each) for each in self._image_offsets[place : place + 2])
        return tuple(kept(self._images, digest.tobytes().hex()) for digest in self._digests[start:end])


def _mapped(path: Path, dtype: np.dtype[Any]) -> np.ndarray[Any, np.dtype[Any]]:
    try:
        size = path.stat().st_size
        return np.memmap(path, dtype=dtype, mode="r") if size else np.empty(0, dtype=dtype)
    except OSError as error:
        raise StoreError(f"{path}: cannot be read ({error.strerror}); delete the stage and run again") from error
