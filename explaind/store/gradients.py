"""Stored gradients of single examples: read some at a time, and held against their checksums."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import zarr

from explaind.errors import StoreError
from explaind.store.checksums import crc32
from explaind.store.opening import passing
from explaind.store.tail import Record

if TYPE_CHECKING:
    from explaind.store.reader import Run

PIECE = 64 << 20
"""Bytes that are read at once."""


def rows_of(array: zarr.Array, step: int, start: int, stop: int, where: object) -> np.ndarray:
    """Slots [start, stop) of a step: [slot, param]; StoreError where there are not so many."""
    if step >= array.shape[0] or stop > array.shape[1]:
        raise StoreError(
            "gradients of examples are missing",
            where=where,
            expected=f"{stop} of step {step}",
            got=f"{array.shape[1]} of {array.shape[0]} steps",
            do="restore the run from a copy",
        )
    return np.asarray(array[step, start:stop])


def pieces(count: int, params: int, itemsize: int, most: int = PIECE) -> Iterator[slice]:
    """Slots of a step, so many at a time as take no more than `most` bytes, and at least one."""
    at_once = max(1, most // max(1, params * itemsize))
    return (slice(start, min(start + at_once, count)) for start in range(0, count, at_once))


def checksum(run: "Run", step: int, count: int) -> int:
    """crc32 of the gradients of a step with so many examples."""
    crc, itemsize = 0, np.dtype(run.manifest.gradients).itemsize
    for slots in pieces(count, run.manifest.params, itemsize):
        crc = crc32(run.gradients(step, slots.start, slots.stop), crc)
    return crc


def first_damaged(run: "Run") -> int | None:
    """The first step whose gradients are not what was recorded; None where there is none."""
    if run.manifest.gradients is None:
        return None
    for start in range(0, run.steps, run.manifest.block):
        step = start
        try:
            for count, crc in zip(*run.gradient_checksums(start, min(start + run.manifest.block, run.steps)), strict=True):
                if checksum(run, step, int(count)) != int(crc):
                    return step
                step += 1
        except StoreError as error:
            if passing(error):
                raise
            return step
    return None


def having_gradients(run: "Run", logged: Sequence[Record]) -> list[Record]:
    """Those of the logged steps, up to the first whose gradients are not in their chunks: a copy of a run may lack them."""
    if run.manifest.gradients is None:
        return list(logged)
    found = []
    for record in logged:
        crc = record.row.gradients_crc
        try:
            if crc is None or checksum(run, record.step, len(record.row.batch)) != int(crc[0]):
                break
        except StoreError as error:
            if passing(error):
                raise
            break
        found.append(record)
    return found
