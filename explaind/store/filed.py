"""Growing arrays of a run in a folder: how their chunks are made, and come to be safely on disk.

A chunk is encoded and put right here: zarr does the same through an event loop at several times the price, and holds all of it. A chunk
of rows behind those that the array is known to have is written in its place, since no marker counts them yet. One of other rows first
stands beside its place, and so does what says how long its array is: also where nothing stands there, which may be rows that are all fill.
Before a commit all of them are synced to the disk, put in their places, and these are synced too (``settle``). So a marker counts nothing
that a power cut can take away, and nothing that it counts is ever half replaced.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import product
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import zarr

from explaind.store import described, schema
from explaind.store.bitdelta import Packing, tiles
from explaind.store.described import Described
from explaind.store.durable import Text, sync, sync_folders, write_new, written
from explaind.store.growing import Growing, Move, Put, Read, Unsettled, filled
from explaind.store.location import Location, replace_file, store_of

OPEN = 0 if os.name == "nt" else 4
"""Files of an array that stay open until they are synced: to open one again is as much work. Windows moves no file that is open."""


class Filed(Growing):
    """One in a folder."""

    def __init__(self, array: Described, folder: Path) -> None:
        """folder: of the array."""
        super().__init__(array)
        self._described, self._folder, self._codec = array, folder, array.bitdelta
        self._told = self.shape  # by the file
        self._staged, self._gone = dict[Move, int | None](), list[Path]()
        self._lock = Lock()  # one thread may put rows while another settles

    def extend(self, rows: int, shape: Sequence[int]) -> None:
        with self._lock:
            super().extend(rows, shape)

    def put(self, row: int, values: np.ndarray, ahead: int) -> None:
        with self._lock:
            Growing.extend(self, self.shape[0] if row < self.shape[0] else row + ahead, values.shape)
            if self.shape != self._told:
                replace_file(self._folder / described.FILE, self._described.text(self.shape))
                self._told = self.shape
        self._write(values[None], row, at_once=True)

    def read(self, row: int, start: int, stop: int) -> np.ndarray:
        return np.asarray(zarr.open_array(self._folder, mode="r")[row, start:stop])  # the array at hand does not know how long it is

    def row(self, row: int) -> Callable[[int, int], np.ndarray]:
        return super().row(row) if self._codec is None else _Row(self, row).read

    def tiles(self, *place: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Of a chunk that is packed tile by tile, as ``bitdelta.tiles`` tells them."""
        assert self._codec is not None
        path = self._folder.joinpath("c", *map(str, place))
        if not path.exists():
            return iter([(0, np.empty((0, self.chunks[1]), self.dtype), np.array(self.fill, self.dtype))])

        def text(at: int, stop: int) -> bytes:
            with path.open("rb", buffering=0) as file:  # anew, since nobody says when the last was read
                file.seek(at)
                return file.read(max(0, stop - at))

        return tiles(text, path.stat().st_size, (self.chunks[0], self.chunks[1]), self.dtype, self._codec.columns)

    def unsettled(self) -> Unsettled:
        with self._lock:
            for stands, belongs in [move for move in self._staged if not move[0].exists()]:  # put before an interruption
                number = self._staged.pop((stands, belongs))
                self._unstage((belongs, belongs))
                self._staged[belongs, belongs] = number
            told = None
            if self.shape != self._told:
                self._stage(*_beside(self._folder / described.FILE, [(0, self._described.text(self.shape))]))
                told = self.shape
            return Unsettled(list(self._staged.items()), list(self._gone), told)

    def settled(self, done: Unsettled) -> None:
        with self._lock:
            self._told = self._told if done.shape is None else done.shape
            for move, number in done.moves:
                if self._staged.get(move, -1) == number:  # else it was written again since
                    self._unstage(move)
            gone = set(done.gone)
            self._gone = [file for file in self._gone if file not in gone]

    def create(self, values: np.ndarray | None = None) -> None:
        """Write what says that it is there, and the numbers of a finished one, whose only chunk they are. Nothing is synced."""
        self._folder.mkdir(exist_ok=True)
        write_new(self._folder / described.FILE, self._described.text(self.shape))
        text = None if values is None else self._chunk(values)
        if text is not None:
            os.close(written(self._folder.joinpath("c", *("0" for _ in self.shape)), text))

    def tidy(self) -> None:
        with self._lock:
            self._drop(self.shape)

    def close(self) -> None:
        with self._lock:
            for move in list(self._staged):
                with suppress(OSError):  # a late one: the recording has failed already
                    self._unstage(move)

    def _stage(self, move: Move, number: int) -> None:
        self._unstage(move)  # what is written twice is put once
        if sum([held is not None for held in self._staged.values()]) < OPEN:
            self._staged[move] = number
        else:
            self._staged[move] = None
            os.close(number)

    def _unstage(self, move: Move) -> None:
        number = self._staged.pop(move, None)
        if number is not None:
            os.close(number)

    def _resize(self, shape: tuple[int, ...]) -> None:
        if any(new < old for new, old in zip(shape, self.shape, strict=True)):
            self._drop(shape)
        self.shape = shape

    def _drop(self, shape: tuple[int, ...]) -> None:
        """Take away the chunks behind these extents."""
        top = self._folder / "c"
        for file in (path for path in top.rglob("*") if path.is_file()):
            place = [k.removesuffix(".partial") for k in file.relative_to(top).parts]
            if len(place) != len(self.chunks) or not all(k.isdigit() for k in place):  # nothing of ours
                continue
            if any(int(k) * c >= n for k, c, n in zip(place, self.chunks, shape, strict=True)):
                file.unlink()
                self._gone.append(file)
        for move in [move for move in self._staged if not move[0].exists()]:
            self._unstage(move)

    def _write(self, values: np.ndarray, at: int, start: int = 0, stop: int | None = None, at_once: bool = False) -> None:
        above = at % self.chunks[0]
        if above:  # of a chunk that is only begun, what stands there already
            there = [self.read(at - above + i, start, self.shape[1] if stop is None else stop) for i in range(above)]
            at, values = at - above, filled([*there, *values], max(map(len, [*there, *values])), self.fill)
        ends = (at + len(values), *self.shape[1:]) if stop is None else (at + len(values), stop)
        starts = (at, start, *(0 for _ in ends[2:]))[: len(ends)]
        for place in product(*(range(a // c, -(-b // c)) for a, b, c in zip(starts, ends, self.chunks, strict=True))):
            cut = tuple(slice(k * c - a, (k + 1) * c - a) for k, c, a in zip(place, self.chunks, starts, strict=True))
            file = self._folder.joinpath("c", *map(str, place))
            self._put(file, place[0], self._chunk(values[cut]), at_once)

    def _at_a_time(self) -> tuple[int, int]:
        if self._codec is None or self._by_tiles:
            return super()._at_a_time()
        # Whole chunks are held in any case: several that are small are read in one go.
        down = self.chunks[0] * max(1, schema.CHUNK_VALUES // (self.chunks[0] * self.chunks[1]))
        return down, self.chunks[1] * max(1, 2 * schema.CHUNK_VALUES // (down * self.chunks[1]))

    @property
    def _by_tiles(self) -> bool:
        """Whether a chunk is packed in parts."""
        return self._codec is not None and self._codec.columns is not None and self._codec.columns < self.chunks[1]

    def _stream(self, at: int, shape: tuple[int, int], start: int, read: Read) -> None:
        if at % self.chunks[0]:
            super()._stream(at, shape, start, read)
            return
        if not self._by_tiles:
            whole = -(-shape[1] // self.chunks[1]) * self.chunks[1]  # else they would be copied
            values = np.empty((shape[0], whole), self.dtype)
            values[:, shape[1] :] = self.fill
            read(values[:, : shape[1]], 0, 0)
            self._write(values, at, start, start + whole)
            return

        def some(out: np.ndarray, left: int) -> None:
            there = max(0, shape[1] - left)
            out[:, there:] = self.fill
            if there:
                read(out[:, :there], 0, left)

        assert self._codec is not None
        packing = Packing((shape[0], self.chunks[1]), self.dtype, some, self._codec.columns, self._described.behind(shape[0]))
        place = at // self.chunks[0], start // self.chunks[1]
        self._put(self._folder.joinpath("c", *map(str, place)), place[0], None if packing.holds(self.fill) else packing)

    def _put(self, file: Path, row: int, text: Text | None, at_once: bool = False) -> None:
        """Text of a chunk, whose number along the rows that is; None: it holds nothing."""
        with self._lock:
            if text is None:
                self._leave_out(file)
                return
            fresh = row * self.chunks[0] >= self._told[0]
            (stands, belongs), number = (_in_place if fresh else _beside)(file, text)
            if at_once and stands != belongs:  # a kill must find it there; it is synced with its span
                os.replace(stands, belongs)
                stands = belongs
            self._stage((stands, belongs), number)

    def _chunk(self, values: np.ndarray) -> Text | None:
        """Filled up; None where that is all there is, which zarr leaves out."""
        if not values.size or _alike(values, self.fill):
            return None
        shape = self.chunks if self._codec is None else (len(values), *self.chunks[1:])
        if values.shape != shape:
            whole = np.full(shape, self.fill, self.dtype)
            whole[tuple(map(slice, values.shape))] = values
            values = whole
        return self._described.encoded(values)

    def _leave_out(self, file: Path) -> None:
        partial = file.with_name(f"{file.name}.partial")
        for left in (partial, file):
            if left.exists():
                left.unlink()
                self._gone.append(left)
        for move in [move for move in self._staged if move[1] == file]:
            self._unstage(move)


class _Row:
    """One row of an array that is packed tile by tile, which is on disk."""

    def __init__(self, array: Filed, row: int) -> None:
        self._array, self._row = array, row
        self._chunk, self._at = -1, 0
        self._values, self._tiles = np.zeros(0, array.dtype), array.tiles(-1, -1)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Numbers [start, stop), as far as they go."""
        stop = min(stop, self._array.shape[1])
        found = np.empty(max(0, stop - start), self._array.dtype)
        at = start
        while at < stop:
            self._find(at)
            count = min(stop, self._at + len(self._values)) - at
            found[at - start : at - start + count] = self._values[at - self._at :][:count]
            at += count
        return found

    def _find(self, at: int) -> None:
        """Unpack up to the tile that holds a number."""
        across, row = self._array.chunks[1], self._row % self._array.chunks[0]
        if self._chunk != at // across or at < self._at:
            self._chunk, self._at, self._values = at // across, at // across * across, self._values[:0]
            self._tiles = self._array.tiles(self._row // self._array.chunks[0], self._chunk)
        while at >= self._at + len(self._values):
            start, values, rest = next(self._tiles)
            self._at = self._chunk * across + start
            self._values = values[row].copy() if row < len(values) else np.broadcast_to(rest, values.shape[1])


def _in_place(file: Path, text: Text) -> tuple[Move, int]:
    """Write a new file, or beside its place where there is one; its number, since it stays open."""
    return _beside(file, text) if file.exists() else ((file, file), written(file, text, new=True))


def _beside(file: Path, text: Text) -> tuple[Move, int]:
    """Write what is to be put in a file's place; its number, since it stays open."""
    partial = file.with_name(f"{file.name}.partial")
    return (partial, file), written(partial, text)


def growing(array: zarr.Array, place: Location) -> Growing:
    """An array of the run at this place, for writing."""
    if not isinstance(place, Path):
        return Put(array)
    name = str(array.name).lstrip("/")
    return Filed(Described(name, array.metadata.to_dict()), place / name)


def created(columns: Mapping[schema.Column, int], place: Location) -> dict[str, Growing]:
    """New arrays of the run at this place, by name; columns: with the rows of a chunk."""
    if not isinstance(place, Path):
        group = zarr.open_group(store_of(place), mode="r+", zarr_format=3)
        return {column.name: Put(schema.create_column(group, column, rows)) for column, rows in columns.items()}
    found = {column.name: Filed(described.column(column, rows), place / column.name) for column, rows in columns.items()}
    for array in found.values():
        array.create()
    return dict(found)


def write_finished(arrays: Mapping[str, tuple[np.ndarray, Sequence[str]]], place: Location) -> None:
    """Arrays of numbers of the run at this place that do not grow, by name, which may be that of a group and its own: values and axes."""
    if not isinstance(place, Path):
        group = zarr.open_group(store_of(place), mode="r+", zarr_format=3)
        for name, (values, dims) in arrays.items():
            schema.write_array(group, name, values, tuple(dims))
        return
    for name, (values, dims) in arrays.items():
        folder = (place / name).parent
        if not folder.exists():
            folder.mkdir()
            write_new(folder / described.FILE, described.group({}))
        Filed(described.finished(name, values, dims), place / name).create(values)


def settle(arrays: Iterable[Growing], place: Location, synced: bool = True, behind: bool = False) -> None:
    """Make everything that was written to these arrays of a run safe from a power cut. OSError where the disk does not take it.

    synced: False only puts it in its place, where all of the run is synced afterwards; behind: nobody waits for it.
    """
    found = [(array, array.unsettled()) for array in arrays]
    moves, gone = [move for _, one in found for move in one.moves], [file for _, one in found for file in one.gone]
    if isinstance(place, Path) and (moves or gone):
        if synced:
            sync([stands if number is None else number for (stands, _), number in moves], behind)
        for (stands, belongs), _ in moves:
            if stands != belongs:
                os.replace(stands, belongs)
        if synced:
            sync_folders([*(belongs for (_, belongs), _ in moves), *gone], place, behind)
    for array, one in found:
        array.settled(one)


def _alike(values: np.ndarray, fill: Any) -> bool:
    """Whether all numbers are the fill value; −0 is not 0."""
    if fill == 0:
        # The first row tells of most: a whole chunk need not be copied then.
        return not any(np.ascontiguousarray(part).view(np.uint8).any() for part in (np.atleast_1d(values)[:1], values))
    return bool((np.isnan(values) if fill != fill else values == fill).all())
