"""Opening the arrays of a run whose metadata may say anything: held against the manifest before memory is made for them."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from math import prod
from typing import Any, cast

import numpy as np
import zarr
from zarr.codecs import BloscCodec, BytesCodec, VLenUTF8Codec, ZstdCodec
from zarr.core.metadata import ArrayV3Metadata

from explaind.errors import ExplaindError, StoreError
from explaind.store.bitdelta import BLOSC_HEAD, BitDelta
from explaind.store.layout import columns, rows_of_chunk
from explaind.store.location import Location
from explaind.store.manifest import Manifest
from explaind.store.remote import RemoteError
from explaind.store.schema import stored

LARGEST = 2**31 - 1
"""Bytes of a chunk, for no more fit into one of blosc; and of what is read at once along axes of which nobody knows how long they are."""
EMPTY = 1000
"""Bytes that one byte on the disk may stand for, at most, of what is larger still: chunks of zeros are not stored."""
COPY = "restore the run from a copy"
PASSING = (errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.ESTALE, errno.ETIMEDOUT)
"""What a system says that may read the same bytes another time."""
CHUNKS = 1 << 16
"""Of a row of chunks, at most: each that is read together is a task of its own."""
CODECS = ((BytesCodec, BloscCodec), (BitDelta,), (VLenUTF8Codec, ZstdCodec))
"""Of numbers, floats and names, as they are written: any other may make anything of a chunk."""


class UnreadableError(StoreError):
    """What cannot be read at present, which says nothing about the run."""


def passing(error: BaseException) -> bool:
    """Whether nothing is known of the bytes that were asked for: the network, a permission or a limit is in the way."""
    return isinstance(error, UnreadableError | RemoteError) or (isinstance(error, OSError) and error.errno in PASSING)


class Bounded(BloscCodec):
    """Blosc makes room for what the head of a chunk says, which is therefore looked at first: no more than the chunk has numbers."""

    async def _decode_single(self, chunk_bytes: Any, chunk_spec: Any) -> Any:
        head, most = chunk_bytes[: BLOSC_HEAD.size].to_bytes(), prod(chunk_spec.shape) * chunk_spec.dtype.to_native_dtype().itemsize
        if len(head) < BLOSC_HEAD.size or BLOSC_HEAD.unpack(head)[4] != most:
            raise ValueError(f"a chunk of {most} bytes is of another size")
        return await super()._decode_single(chunk_bytes, chunk_spec)


def bounded(array: zarr.Array) -> zarr.Array:
    """The same array, which takes no more memory for a chunk than its metadata say; ValueError for codecs that none is written with."""
    metadata = cast(ArrayV3Metadata, array.metadata)
    if tuple(map(type, metadata.codecs)) not in CODECS:
        raise ValueError(f"codecs that nothing is written with: {', '.join(type(codec).__name__ for codec in metadata.codecs)}")
    first, *others = metadata.codecs
    if not others or not isinstance(others[0], BloscCodec):
        return array
    told = {name: getattr(others[0], name) for name in ("typesize", "cname", "clevel", "shuffle", "blocksize")}
    checked = replace(metadata, codecs=(first, Bounded(**told)))
    return zarr.Array(zarr.AsyncArray(checked, array.store_path, array.async_array.config))


def check_claim(size: int, path: Location, *parts: str) -> None:
    """StoreError for more bytes to be read at once than there can be, where so little is stored in each of these parts of a run."""
    if size > LARGEST and all(size > EMPTY * sum(stored(path, part)) for part in parts):
        where = path / parts[0].partition("/")[0]
        raise StoreError("less is stored than the metadata say", where=where, expected=f"{size} bytes, not all of them 0", do=COPY)


@contextmanager
def reading(what: str, where: Location, do: str = COPY) -> Iterator[None]:
    """Whatever a library raises over odd bytes, of any class, in one line; a machine that is out of memory says nothing about the run."""
    try:
        yield
    except (ExplaindError, MemoryError):
        raise
    except Exception as error:
        got = f"{type(error).__name__}: {error}"[:200]
        if passing(error):
            raise UnreadableError(what, where=where, got=got, do="see to that, and try again") from error
        raise StoreError(what, where=where, got=got, do=do) from error


def opened(group: zarr.Group, name: str, manifest: Manifest, where: Location) -> zarr.Array:
    """An array of a run; StoreError where there is none, or one that cannot be that array."""
    with reading("the metadata of an array cannot be read", where):
        try:
            array = group[name]
        except KeyError as error:
            raise StoreError("an array of the run is missing", where=where, do=COPY) from error
        if not isinstance(array, zarr.Array):
            raise StoreError("a group stands where an array should be", where=where, do=COPY)
        array = bounded(array)
        itemsize, column = array.dtype.itemsize, columns(manifest).get(name)
        got = f"{array.dtype} {list(array.shape)} in chunks of {list(array.chunks)}"
        if prod(array.chunks) * itemsize > LARGEST or (column is None and array.nbytes > LARGEST):
            raise StoreError("an array is too large", where=where, expected=f"chunks of at most {LARGEST} bytes", got=got, do=COPY)
        if column is None:
            return _of_few_chunks(array, array.nchunks, got, where)
        kind, rest = str(array.dtype), array.shape[1:]
        names = getattr(array.metadata, "dimension_names", None)
        fill = np.array_equal(np.asarray(array.fill_value), np.asarray(column.fill, array.dtype), equal_nan=array.dtype.kind == "f")
        fits = fill and len(rest) == len(column.shape) and (kind, names) == (column.dtype, tuple(column.dims))
        fits = fits and array.chunks[0] <= rows_of_chunk(column, manifest)
        fits = fits and (rest == column.shape if column.chunk is None else array.shape[1] * itemsize * manifest.span <= LARGEST)
        fits = fits and rest[1:] == column.shape[1:]
        if not fits:
            expected = f"{column.dtype} [{', '.join(map(str, ('…', *(column.shape if column.chunk is None else ('…',)))))}]"
            expected, got = f"{expected} filled with {column.fill}", f"{got} filled with {array.fill_value}"
            raise StoreError("an array is not what the manifest says", where=where, expected=expected, got=got, do=COPY)
        return _of_few_chunks(array, prod(-(-n // wide) for n, wide in zip(rest, array.chunks[1:], strict=True)), got, where)


def _of_few_chunks(array: zarr.Array, count: int, got: str, where: Location) -> zarr.Array:
    """count: of those that are read at once."""
    if count > CHUNKS:
        raise StoreError("an array has too many chunks", where=where, expected=f"at most {CHUNKS} at once", got=got, do=COPY)
    return array
