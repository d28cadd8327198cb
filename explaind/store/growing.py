"""Growing arrays of a run that is being written: at a URL zarr puts whole objects, which are safe at once. In a folder: filed.py."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import zarr

from explaind.store.described import Described

Move = tuple[Path, Path]
"""Where a file stands, and where it belongs."""
Read = Callable[[np.ndarray, int, int], None]
"""Fills a matrix [row, number] with numbers from a row and a number of theirs on, and with fill values where there are none."""


@dataclass(frozen=True)
class Unsettled:
    """Of an array: files to be synced, and put where they belong then; others that were taken away; the shape told then, if another."""

    moves: Sequence[tuple[Move, int | None]] = ()
    """Each with the number of the file, where it is open."""
    gone: Sequence[Path] = ()
    shape: tuple[int, ...] | None = None


class Growing:
    """An array [row, …] that rows are written to; its other dimensions grow as they need to."""

    def __init__(self, array: zarr.Array | Described) -> None:
        self.name, self.chunks, self.dtype, self.fill = array.name, array.chunks, np.dtype(array.dtype), array.fill_value
        self.shape = tuple(array.shape)

    def extend(self, rows: int, shape: Sequence[int]) -> None:
        """Make it so many rows long, and its other dimensions at least as large as `shape`."""
        self.trim((rows, *(max(old, new) for old, new in zip(self.shape[1:], shape, strict=True))))

    def trim(self, shape: tuple[int, ...]) -> None:
        """Cut it off, or make it larger."""
        if shape != self.shape:
            self._resize(shape)

    def append(self, rows: np.ndarray, at: int) -> None:
        """Write rows [at, at + len(rows)), and nothing behind them: whole chunks, but for the last of a run.

        Narrower rows are filled up, so that nothing is left of rows that stood there before.
        """
        self.extend(at + len(rows), rows.shape[1:])
        self._write(rows, at)

    def put(self, row: int, values: np.ndarray, ahead: int) -> None:
        """Write one row [slot, …] at once, in chunks of its own; the array is made longer by `ahead` rows where it is too short.

        Slots behind those of the values are emptied.
        """
        self.extend(self.shape[0] if row < self.shape[0] else row + ahead, values.shape)
        self._write(values[None], row, at_once=True)

    def stream(self, at: int, rows: int, wide: int, read: Read) -> None:
        """Write rows [at, at + rows) of an array [row, number], and nothing behind them, as little at a time as its codec allows.

        wide: numbers of the longest.
        """
        self.extend(at + rows, (wide,))
        down, across = self._at_a_time()
        top = at
        while top < at + rows:
            count = min(at + rows - top, down - top % self.chunks[0])
            for start in range(0, self.shape[1], across):
                self._stream(top, (count, min(across, self.shape[1] - start)), start, _behind(read, top - at, start))
            top += count

    def _at_a_time(self) -> tuple[int, int]:
        """Rows and numbers of the chunks that are read together: one."""
        return self.chunks[0], self.chunks[1]

    def _stream(self, at: int, shape: tuple[int, int], start: int, read: Read) -> None:
        """So many rows and numbers, from a row and a number on, at which chunks begin; but for rows before which some stand already."""
        values = np.empty(shape, self.dtype)
        read(values, 0, 0)
        self._write(values, at, start, start + shape[1])

    def read(self, row: int, start: int, stop: int) -> np.ndarray:
        """Numbers [start, stop) of a row that is on disk, as far as they go there."""
        raise NotImplementedError

    def row(self, row: int) -> Callable[[int, int], np.ndarray]:
        """The same of one row, as it is asked for; sooner where that is from left to right."""
        return partial(self.read, row)

    def unsettled(self) -> Unsettled:
        """What must be made safe before a commit; nothing where it is already."""
        return Unsettled()

    def settled(self, done: Unsettled) -> None:
        """It is: until then it is told again."""

    def tidy(self) -> None:
        """Take away what an interrupted recording has left behind its last row."""

    def close(self) -> None:
        """Let go of what is not settled, and will not be."""

    def _resize(self, shape: tuple[int, ...]) -> None:
        raise NotImplementedError

    def _write(self, values: np.ndarray, at: int, start: int = 0, stop: int | None = None, at_once: bool = False) -> None:
        """Rows from `at` on, [start, stop) along the second dimension; where they are narrower they are filled up."""
        raise NotImplementedError


class Put(Growing):
    """One that zarr writes, at a URL."""

    def __init__(self, array: zarr.Array) -> None:
        super().__init__(array)
        self._array = array

    def read(self, row: int, start: int, stop: int) -> np.ndarray:
        return np.asarray(self._array[row, start:stop])

    def _resize(self, shape: tuple[int, ...]) -> None:
        self._array.resize(shape)
        self.shape = shape

    def _write(self, values: np.ndarray, at: int, start: int = 0, stop: int | None = None, at_once: bool = False) -> None:
        across = () if values.ndim == 1 else ((self.shape[1] if stop is None else stop) - start, *self.shape[2:])
        wide = [(0, 0), *((0, n - m) for n, m in zip(across, values.shape[1:], strict=True))]
        values = values if values.shape[1:] == across else np.pad(values, wide, constant_values=self.fill)
        self._array[(slice(at, at + len(values)), *([slice(start, stop)] if across else []))] = values


def _behind(read: Read, row: int, start: int) -> Read:
    """What stands behind a row and a number."""
    return lambda values, down, right: read(values, row + down, start + right)


def filled(rows: Sequence[np.ndarray], wide: int, fill: float) -> np.ndarray:
    """Vectors of the same dtype, filled up to one width: [row, number]."""
    if all(len(row) == wide for row in rows):
        return np.concatenate(rows).reshape(len(rows), wide)
    found = np.full((len(rows), wide), fill, rows[0].dtype)
    for own, row in zip(found, rows, strict=True):
        own[: len(row)] = row
    return found
