"""What a run is made of, wherever it stands: arrays and small files by path. A folder, a zip and an HDF5 file are all read and written so.

attributes.json                 the attributes of its zarr group: schema version, manifest
commit.json, tail.log, tail.odd.log   as in the folder
theta, batch, …                 the columns of layout.py, and fingerprint
constant/<name>                 frozen parameters and buffers
ledgers/<name>/…                its ledgers: attributes.json, commit.json, rows, coordinates, check/<name>
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Protocol

import numpy as np

from explaind.errors import StoreError

Region = tuple[slice, ...]
TEXT = "text"
"""The dtype of names; others are called as numpy calls them."""
PIECE = 1 << 20
"""Bytes of a small file that are read at once."""
MOST_TEXT = 64 << 20
"""Bytes of attributes or of a commit marker: a million layers have no more."""


@dataclass(frozen=True)
class Spec:
    """An array without its values."""

    shape: tuple[int, ...]
    dtype: str
    dims: tuple[str, ...]
    chunks: tuple[int, ...]
    fill: float | None = None
    """Of a column."""
    codec: str = "standard"
    tile: int | None = None
    """Of a column: ``schema.Column.tile``."""
    width: int = 0
    """Bytes of the longest text."""

    @property
    def nbytes(self) -> int:
        """Of all its values."""
        return prod(self.shape) * self.itemsize

    @property
    def itemsize(self) -> int:
        """Of one value."""
        return max(1, self.width) if self.dtype == TEXT else np.dtype(self.dtype).itemsize

    def regions(self) -> Iterator[Region]:
        """Its chunks, none of them larger than `chunks`."""
        spans = [[slice(at, min(at + chunk, n)) for at in range(0, n, chunk)] for n, chunk in zip(self.shape, self.chunks, strict=True)]
        return iter(product(*spans))


@dataclass(frozen=True)
class Slab:
    """An array that can be read chunk by chunk."""

    spec: Spec
    read: Callable[[Region], np.ndarray]


class Placed(Protocol):
    """What says where it is."""

    where: str


class Source(Placed, Protocol):
    """Where a run is read from."""

    def names(self) -> Iterable[str]:
        """The paths of all arrays and small files; StoreError for what has no place in a run."""

    def slab(self, name: str) -> Slab:
        """An array; StoreError where its metadata are damaged, or claim more than the file holds."""

    def pieces(self, name: str) -> Iterator[bytes]:
        """A small file, PIECE by PIECE."""


class Sink(Protocol):
    """Where a run is written to."""

    def create(self, name: str, spec: Spec) -> Callable[[Region, np.ndarray], None]:
        """A new array, and how to write its chunks."""

    def put(self, name: str, pieces: Iterable[bytes]) -> None:
        """A small file."""


def text_of(source: Source, name: str) -> bytes:
    """A small file that must be small."""
    whole = bytearray()
    for piece in source.pieces(name):
        whole += piece
        if len(whole) > MOST_TEXT:
            raise unfit(source, name, "too long", expected=f"at most {MOST_TEXT} bytes")
    return bytes(whole)


def unfit(source: Placed, name: str, what: str, expected: object = None, got: object = None) -> StoreError:
    """What to say of a part that does not fit a run."""
    return StoreError(
        f"this does not hold a sound run: {name} is {what}",
        where=source.where,
        expected=expected,
        got=got,
        do="take it from whoever made it once more",
    )
