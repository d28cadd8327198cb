"""The log: every step, from the moment it is made until it is committed in chunks, so that a kill loses at most the step at hand.

Two files take turns, a span of steps each: while one is made into chunks the other takes the steps to come. It begins with the step before
its first, which the span before has too: of that one the parameters that it led to belong to this span's chunks.

A file of records, each a length, a crc32 and a payload: one line of JSON that names the run, the step, what that goes on from (logs.py) and
arrays with dtype and shape, then their bytes. A record that is cut off or does not fit its crc is left out. Appends reach the operating
system at every step. A file that is used again holds, behind its new steps, some of the span before the last; they are known by
their numbers, and are in chunks by then.
"""

import json
import os
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from explaind.errors import StoreError
from explaind.store import schema
from explaind.store.row import EARLY, LATE, SMALL, StepRow, Vector, views_of

try:
    import fcntl
except ImportError:  # a system without such locks: nobody watches over a second writer there
    fcntl = None  # type: ignore[assignment]

NAMES = ("tail.log", "tail.odd.log")
"""Of the spans with even and with odd numbers; who writes the run holds the first."""
HEAD, BEGINNING = struct.Struct("<QI"), b'{"step": '
PASSES = 8
"""Over a log, in which records are looked for behind one that is damaged: anything may look like the beginning of one."""
NEAR, TOGETHER = 1 << 16, 500
"""Bytes between two vectors that are read with them, and how many pieces at once: the system takes about a thousand."""
KINDS = "biuf"
"""Of the arrays: no object is ever read."""
BUSY = "this run is being recorded, by another process or by a recorder of this one that was not closed"


class Links(NamedTuple):
    """Where a step belongs."""

    run: int
    """crc32 of the run's name."""
    before: int
    """Of the run's checksums (``checksums.Chain``) before it."""
    behind: int


class Record(NamedTuple):
    """A step, and the parameters that it led to."""

    step: int
    row: StepRow
    theta: Vector
    """Empty where a thin run has forgotten it."""
    crc: np.ndarray | None = None
    """Its checksum then, uint32 [layer]."""
    links: Links | None = None
    """None in a log that an older explaind wrote."""


class Place(NamedTuple):
    """Where an array stands in a log."""

    at: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]


@dataclass(slots=True, eq=False)
class Places(Mapping[str, Place]):
    """Where the arrays of a record stand."""

    at: int
    layout: Mapping[str, Place]
    """From there on; the same from step to step, mostly."""

    def __getitem__(self, name: str) -> Place:
        at, dtype, shape = self.layout[name]
        return Place(self.at + at, dtype, shape)

    def __contains__(self, name: object) -> bool:
        return name in self.layout

    def __iter__(self) -> Iterator[str]:
        return iter(self.layout)

    def __len__(self) -> int:
        return len(self.layout)


class Log:
    """One file of records, which are appended and can be read in parts."""

    def __init__(self, path: Path, kept: Iterable[Record] = (), hold: bool = False) -> None:
        """The file is made anew with these records, in one go: a reader finds the old one or the new one.

        hold: nobody else may hold it, StoreError where somebody does. OSError where the disk refuses.
        """
        self.path = path
        self._alike: Any = None
        self._layout = dict[str, Place]()
        self._between = bytearray()
        partial = path.with_name(path.name + ".partial")
        self._file = FileIO(partial, "w+")
        try:
            if hold:
                _lock(self._file, path.parent)
            self._end = 0
            self.places = [self.append(record) for record in kept]
            os.fsync(self._file.fileno())
            os.replace(partial, path)
        except BaseException:
            self._file.close()
            partial.unlink(missing_ok=True)
            raise

    def append(self, record: Record) -> Places:
        """Add a step, which survives the process from here on; where its arrays stand."""
        step, row, theta, crc, links = record
        alike = row.alike, theta.shape, crc is None  # their dtypes are the manifest's
        if alike != self._alike:
            self._lay_out(row, theta, crc)
            self._alike = alike
        linked = "" if links is None else f'"links": [{links.run}, {links.before}, {links.behind}], '
        told, small = f'{{"step": {step}, {linked}{self._told}\n'.encode(), row.small
        early, late = row.views
        views = [*early, *late, *views_of(theta)]
        if crc is not None:
            views.append(crc.data)
        summed = zlib.crc32(small, zlib.crc32(told))
        for view in views:
            summed = zlib.crc32(view, summed)
        at = self._end + HEAD.size + len(told)
        end = at + self._bytes
        self._write([HEAD.pack(len(told) + self._bytes, summed) + told + small, *views], end)
        self._end = end
        return Places(at, self._layout)

    def _lay_out(self, row: StepRow, theta: Vector, crc: np.ndarray | None) -> None:
        """What is told of a record beside its step and its links, and where its arrays stand: from step to step the same, mostly."""
        held: dict[str, Vector] = {name: row.__dict__[name] for name in (*SMALL, *row.held)} | {"theta": theta}
        if crc is not None:
            held["crc"] = crc
        told = {"mode": list(row.mode), "gap": row.gap, "precision": row.precision}
        self._told = json.dumps({**told, "arrays": {name: [v.dtype.str, list(v.shape)] for name, v in held.items()}})[1:]
        self._layout, self._bytes = {}, 0
        for name, v in held.items():
            self._layout[name] = Place(self._bytes, v.dtype, v.shape)
            self._bytes += v.size * v.dtype.itemsize

    def _write(self, views: Sequence[Any], end: int) -> None:
        """Behind the last whole record, whatever an interrupted one has left there; end: of what is written."""
        at, rest = self._end, views
        while rest:  # a file may take less than it is given
            count = os.pwritev(self._file.fileno(), rest[:TOGETHER], at)
            at += count
            rest = _behind(rest, count) if at < end else ()

    def read(self, place: Place, start: int = 0, stop: int | None = None) -> np.ndarray:
        """An array, or of a vector the numbers [start, stop). StoreError where the file has become shorter."""
        found = np.empty(place.shape if stop is None else stop - start, place.dtype)
        self.read_into(found, place, start)
        return found

    def read_into(self, found: np.ndarray, place: Place, start: int = 0) -> None:
        """Fill an array, which has the dtype, from there on."""
        rest, at = found.reshape(-1).data.cast("B") if found.size else memoryview(b""), place.at + start * place.dtype.itemsize
        while len(rest):
            count = os.preadv(self._file.fileno(), [rest], at)
            if not count:
                raise StoreError("steps that were logged are gone", where=self.path, do="let nobody else write into a run")
            rest, at = rest[count:], at + count

    def read_rows(self, rows: np.ndarray, places: Sequence[Place | None], start: int = 0, fill: Any = 0) -> None:
        """Fill rows [row, number], each with a vector of their dtype from there on, and what is behind it; None: that row stays as it is.

        What stands close together is read in one go: every call of the system lets another thread have the interpreter.
        """
        number, whole, views, at, end = self._file.fileno(), True, list[Any](), 0, 0
        for row, place in zip(rows, places, strict=True):
            if place is None:
                continue
            part, begins = row[: max(0, place.shape[0] - start)], place.at + start * rows.itemsize
            if len(part) < len(row):
                row[len(part) :] = fill
            if not len(part):
                continue
            if views and not (0 <= begins - end <= NEAR and len(views) < TOGETHER):
                whole &= os.preadv(number, views, at) == end - at
                views = []
            if not views:
                at = begins
            elif begins > end:
                self._between = self._between or bytearray(NEAR)
                views.append(memoryview(self._between)[: begins - end])
            views.append(part)
            end = begins + part.nbytes
        if views and not (os.preadv(number, views, at) == end - at and whole):  # it may give less than it is asked for
            for row, place in zip(rows, places, strict=True):
                if place is not None and start < place.shape[0]:
                    self.read_into(row[: place.shape[0] - start], place, start)

    def restart(self, kept: Sequence[Record]) -> None:
        """Begin again with these steps, which other files have too.

        The file keeps its length: pages that it has are much sooner written than new ones. What stands behind the records to come is older
        steps, which are committed, or no record.
        """
        self._end = 0
        self.places = [self.append(record) for record in kept]

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()


def _behind(views: Sequence[Any], count: int) -> Sequence[Any]:
    """What is left of them behind so many bytes."""
    for i, view in enumerate(views):
        size = memoryview(view).nbytes
        if size > count:
            return [memoryview(view).cast("B")[count:], *views[i + 1 :]]
        count -= size
    return ()


class Tail:
    """The two logs of a run that is being written; one writer at a time holds them."""

    def __init__(self, folder: Path, of: object = None) -> None:
        """StoreError where somebody is writing the run. What the logs hold stays until ``begin`` or ``turn`` makes them anew.

        of: where the run is, if not in the same folder.
        """
        self._folder, self._of = folder, of or folder
        self._held: FileIO | None = FileIO(folder / NAMES[0], "a")
        try:
            _lock(self._held, self._of)
        except StoreError:
            self._held.close()
            raise
        self._logs: dict[int, Log] = {}

    def begin(self, span: int, kept: Iterable[Record]) -> Log:
        """The log of a span, made anew in one go with these records."""
        even = span % 2 == 0
        fresh = Log(self._folder / NAMES[span % 2], kept, hold=even)
        if span % 2 in self._logs:
            self._logs[span % 2].close()
        if even and self._held is not None:
            self._held.close()
            self._held = None
        self._logs[span % 2] = fresh
        return fresh

    def turn(self, span: int, kept: Sequence[Record]) -> Log:
        """The log of a span, which holds these records; what it held is committed."""
        if span % 2 not in self._logs:
            return self.begin(span, kept)
        self._logs[span % 2].restart(kept)
        return self._logs[span % 2]

    def close(self, remove: bool) -> None:
        """Let go of the logs; a run that is whole on disk needs none."""
        if remove:
            for name in reversed(NAMES):  # the one that is held goes last
                (self._folder / name).unlink(missing_ok=True)
        for log in self._logs.values():
            log.close()
        if self._held is not None:
            self._held.close()


def _lock(file: FileIO, run: object) -> None:
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise StoreError(BUSY, where=run, do="wait for it, close it, or record to another path") from error


def records(folder: Path) -> list[Record]:
    """The sound records of a run's log, in order; none where there is no log."""
    found = list[Record]()
    for name in NAMES:
        try:
            found += _sound(schema.read_file(folder, name))
        except FileNotFoundError:
            continue
    return sorted(found, key=lambda record: record.step)


def has_log(folder: Path) -> bool:
    """Whether a run is being written, or was left by a kill."""
    return any((folder / name).exists() for name in NAMES)


def _sound(text: bytes) -> Iterator[Record]:
    """Those that fit their crc; behind one that does not, the next is looked for by how it begins, until that becomes too much work."""
    at, work = 0, PASSES * len(text)
    while 0 <= at <= len(text) - HEAD.size and work >= 0:
        length, crc = HEAD.unpack_from(text, at)
        payload = memoryview(text)[at + HEAD.size : at + HEAD.size + length]
        work -= len(payload)
        try:
            if len(payload) < length or zlib.crc32(payload) != crc:
                raise ValueError("no record, or half of one")
            yield _unpacked(payload)
            at += HEAD.size + length
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
            found = text.find(BEGINNING, at + HEAD.size + 1)
            at = found - HEAD.size if found > 0 else -1


def _unpacked(payload: memoryview) -> Record:
    line, _, rest = bytes(payload).partition(b"\n")
    told = json.loads(line)
    arrays, at = dict[str, Any](), 0
    for name, (kind, shape) in told["arrays"].items():
        dtype = np.dtype(kind)
        size = prod(shape) * dtype.itemsize
        if dtype.kind not in KINDS or any(type(n) is not int or n < 0 for n in shape) or at + size > len(rest):
            raise ValueError("no array of numbers")
        arrays[name] = np.frombuffer(rest[at : at + size], dtype).reshape(shape).copy()
        at += size
    theta, crc = arrays.pop("theta"), arrays.pop("crc", None)
    optional: dict[str, Any] = {name: arrays.get(name) for name in (*SMALL, *EARLY, *LATE)}
    row = StepRow(**optional, mode=tuple(bool(m) for m in told["mode"]), gap=int(told["gap"]), precision=float(told["precision"]))
    return Record(int(told["step"]), row, theta, crc, Links(*map(int, told["links"])) if "links" in told else None)


def check_idle(folder: Path, of: object = None) -> None:
    """StoreError where somebody is writing the run; of: where that is, if not in the same folder."""
    try:
        with (folder / NAMES[0]).open("rb") as file:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return
    except BlockingIOError as error:
        raise StoreError(BUSY, where=of or folder, do="wait for it to end, or close it") from error
