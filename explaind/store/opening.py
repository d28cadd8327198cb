"""Opening the arrays of a run whose metadata may say anything: held against the manifest before memory is made for them."""

from collections.abc import Iterator
from contextlib import contextmanager
from math import prod

import numpy as np
import zarr

from explaind.errors import ExplaindError, StoreError
from explaind.store.layout import columns
from explaind.store.location import Location
from explaind.store.manifest import Manifest

LARGEST = 2**31 - 1
"""Bytes of a chunk, for no more fit into one of blosc; and of what is read at once along axes of which nobody knows how long they are."""
COPY = "restore the run from a copy"


@contextmanager
def reading(what: str, where: Location, do: str = COPY) -> Iterator[None]:
    """Whatever a library raises over odd bytes, of any class, in one line; a machine that is out of memory says nothing about the run."""
    try:
        yield
    except (ExplaindError, MemoryError):
        raise
    except Exception as error:
        raise StoreError(what, where=where, got=f"{type(error).__name__}: {error}"[:200], do=do) from error


def opened(group: zarr.Group, name: str, manifest: Manifest, where: Location) -> zarr.Array:
    """An array of a run; StoreError where there is none, or one that cannot be that array."""
    with reading("the metadata of an array cannot be read", where):
        try:
            array = group[name]
        except KeyError as error:
            raise StoreError("an array of the run is missing", where=where, do=COPY) from error
        if not isinstance(array, zarr.Array):
            raise StoreError("a group stands where an array should be", where=where, do=COPY)
        itemsize, column = array.dtype.itemsize, columns(manifest).get(name)
        got = f"{array.dtype} {list(array.shape)} in chunks of {list(array.chunks)}"
        if prod(array.chunks) * itemsize > LARGEST or (column is None and array.nbytes > LARGEST):
            raise StoreError("an array is too large", where=where, expected=f"chunks of at most {LARGEST} bytes", got=got, do=COPY)
        if column is None:
            return array
        kind, rest = str(array.dtype), array.shape[1:]
        names = getattr(array.metadata, "dimension_names", None)
        fill = np.array_equal(np.asarray(array.fill_value), np.asarray(column.fill, array.dtype), equal_nan=array.dtype.kind == "f")
        fits = fill and len(rest) == len(column.shape) and (kind, names) == (column.dtype, tuple(column.dims))
        fits = fits and (rest == column.shape if column.chunk is None else array.shape[1] * itemsize * manifest.span <= LARGEST)
        fits = fits and rest[1:] == column.shape[1:]
        if not fits:
            expected = f"{column.dtype} [{', '.join(map(str, ('…', *(column.shape if column.chunk is None else ('…',)))))}]"
            expected, got = f"{expected} filled with {column.fill}", f"{got} filled with {array.fill_value}"
            raise StoreError("an array is not what the manifest says", where=where, expected=expected, got=got, do=COPY)
        return array
