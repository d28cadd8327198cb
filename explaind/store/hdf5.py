"""A run in one HDF5 file: chunked, shuffled, gzipped, with a fletcher32 of every chunk; dimensions are named by their labels.

Texts are fixed-width UTF-8, small files are bytes. In front of the file, in the block that HDF5 leaves to its users, stands a checksum of
all the rest (exporting.py). What is read is not trusted: no links, no outside files, no objects, no other filters than these.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from explaind.errors import StoreError
from explaind.store.copying import decoded, encoded
from explaind.store.schema import CODECS
from explaind.store.shelf import PIECE, TEXT, Region, Slab, Spec, unfit

USER_BLOCK = 512
FILTERS = {1: "gzip", 2: "shuffle", 3: "fletcher32"}
"""By their numbers in a file."""
RATIO = 1032
"""Gzip makes nothing smaller by more."""
MOST_ATTRIBUTE = 1 << 16
GROUPS = 3
"""Depth of the groups: ledgers/<name>/check."""


def needed() -> Any:
    """h5py; StoreError where it is not installed."""
    try:
        import h5py
    except ImportError as error:
        raise StoreError("HDF5 needs h5py", do="pip install 'explaind-ledger[hdf5]'") from error
    return h5py


class _File:
    """A file that is closed at the end of a ``with``."""

    def __init__(self, path: Path, mode: str, **options: Any) -> None:
        self.h5py = needed()
        self.where = str(path)
        self.file = self.h5py.File(path, mode, **options)

    def __enter__(self) -> Any:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.file.close()


class Hdf5Source(_File):
    """Reads a run from HDF5."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "r")
        self._bytes = path.stat().st_size

    def names(self) -> Iterator[str]:
        """The paths of all datasets; StoreError for links, and for groups where a run has none."""
        return self._within(self.file, "", 0)

    def _within(self, group: Any, front: str, depth: int) -> Iterator[str]:
        for name in group:
            path = f"{front}{name}"
            if not isinstance(group.get(name, getlink=True), self.h5py.HardLink):
                raise unfit(self, repr(path[:80]), "a link")  # which may lead anywhere
            kind = group.get(name, getclass=True)
            if kind is self.h5py.Group and depth < GROUPS:
                yield from self._within(group[name], f"{path}/", depth + 1)
            elif kind is self.h5py.Dataset:
                yield path
            else:
                raise unfit(self, repr(path[:80]), "no part of a run")

    def slab(self, name: str) -> Slab:
        """A dataset; StoreError where it stands outside of the file, is not whole, or claims more than can be in there."""
        data = self.file[name]
        self._check_plain(name, data)
        text = data.dtype.kind == "S"
        chunks = data.chunks or tuple(max(1, n) for n in data.shape)
        stored = data.id.get_storage_size()
        if data.chunks and data.id.get_num_chunks() != prod(-(-n // chunk) for n, chunk in zip(data.shape, chunks, strict=True)):
            raise unfit(self, name, "not whole", expected="all of its chunks", got=data.id.get_num_chunks())
        if stored > self._bytes or prod(data.shape) * data.dtype.itemsize > RATIO * stored:
            raise unfit(self, name, "larger than it can be", expected=f"at most {RATIO} times its {stored} bytes", got=list(data.shape))
        codec, dims = self._told(name, data)
        spec = Spec(data.shape, TEXT if text else data.dtype.name, dims, chunks, codec=codec, width=data.dtype.itemsize if text else 0)
        return Slab(spec, lambda region: decoded(np.asarray(data[region])) if text else np.asarray(data[region]))

    def _told(self, name: str, data: Any) -> tuple[str, tuple[str, ...]]:
        """The codec and the names of the dimensions, from our own attribute: HDF5 crashes on labels that are damaged."""
        try:
            attribute = data.attrs.get_id("explaind")
            fits = attribute.dtype.kind == "S" and attribute.shape == () and attribute.dtype.itemsize < MOST_ATTRIBUTE
            told = json.loads(data.attrs["explaind"]) if fits else {}
            codec, dims = told["codec"], told["dims"]
            if codec not in CODECS or len(dims) != len(data.shape) or not all(isinstance(axis, str) for axis in dims):
                raise ValueError(f"{codec} and {dims}")
        except (KeyError, ValueError, TypeError, RecursionError) as error:
            raise unfit(self, name, "without its codec and dimensions", got=repr(error)[:80]) from error
        return codec, tuple(dims)

    def _check_plain(self, name: str, data: Any) -> None:
        plist = data.id.get_create_plist()
        filters = [plist.get_filter(i)[0] for i in range(plist.get_nfilters())]
        if data.shape is None or data.is_virtual or data.external or not set(filters) <= FILTERS.keys():
            raise unfit(self, name, "not stored plainly", expected=f"in this file, with {', '.join(FILTERS.values())}", got=filters)
        if data.dtype.kind not in "fiubcS" or data.dtype.hasobject or data.dtype.shape:
            raise unfit(self, name, "no array of numbers or names", got=data.dtype)

    def pieces(self, name: str) -> Iterator[bytes]:
        """A small file."""
        slab = self.slab(name)
        if slab.spec.dtype != "uint8" or len(slab.spec.shape) != 1:
            raise unfit(self, name, "no file", expected="uint8 [byte]", got=slab.spec.dtype)
        for start in range(0, slab.spec.shape[0], PIECE):
            yield slab.read((slice(start, start + PIECE),)).tobytes()


class Hdf5Sink(_File):
    """Writes a run into a new HDF5 file."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "w", userblock_size=USER_BLOCK)

    def create(self, name: str, spec: Spec) -> Callable[[Region, np.ndarray], None]:
        """A new dataset, and how to write its chunks."""
        chunks = tuple(min(n, chunk) for n, chunk in zip(spec.shape, spec.chunks, strict=True))
        # HDF5 has neither chunks nor filters for what holds one number or none.
        packed = {"compression": "gzip", "shuffle": True, "fletcher32": True, "chunks": chunks} if spec.shape and all(chunks) else {}
        dtype = self.h5py.string_dtype("utf-8", max(1, spec.width)) if spec.dtype == TEXT else np.dtype(spec.dtype)
        options = packed | ({} if spec.fill is None else {"fillvalue": spec.fill})
        data = self.file.create_dataset(name, spec.shape, dtype, **options)
        self._tell(data, spec.dims, spec.codec)

        def write(region: Region, values: np.ndarray) -> None:
            data[region] = encoded(values, spec.width).astype(dtype) if spec.dtype == TEXT else values

        return write

    def put(self, name: str, pieces: Iterable[bytes]) -> None:
        """A small file, as bytes."""
        options = {"compression": "gzip", "fletcher32": True, "chunks": (PIECE,), "maxshape": (None,)}
        data = self.file.create_dataset(name, (0,), np.uint8, **options)
        self._tell(data, ("byte",))
        for piece in pieces:
            data.resize(len(data) + len(piece), axis=0)
            data[len(data) - len(piece) :] = np.frombuffer(piece, np.uint8)

    def _tell(self, data: Any, dims: tuple[str, ...], codec: str = "standard") -> None:
        """Labels are for others; we read our attribute."""
        for dim, axis in zip(data.dims, dims, strict=True):
            dim.label = axis
        data.attrs["explaind"] = np.bytes_(json.dumps({"dims": dims, "codec": codec}).encode())
