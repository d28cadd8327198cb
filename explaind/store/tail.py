"""The tail log: every step since the last committed block, so that a killed recording loses at most the step that it was writing.

A file of records, each a length, a crc32 and a payload: one line of JSON that names arrays with dtype and shape, then their bytes. Reading
ends at the first record that is cut off or does not fit its crc. Appends reach the operating system at every step; the file is made anew,
atomically, at every commit.
"""

import json
import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from explaind.errors import StoreError
from explaind.store import schema
from explaind.store.row import StepRow

try:
    import fcntl
except ImportError:  # a system without such locks: nobody watches over a second writer there
    fcntl = None  # type: ignore[assignment]

NAME = "tail.log"
HEAD = struct.Struct("<QI")
ARRAYS = tuple(f.name for f in fields(StepRow) if f.name not in ("mode", "gap", "precision"))
KINDS = "biuf"
"""Of the arrays: no object is ever read."""


@dataclass(frozen=True)
class Record:
    """A step, and the parameters that it led to."""

    step: int
    row: StepRow
    theta: np.ndarray
    """Empty where a thin run has forgotten it."""
    crc: np.ndarray | None = None
    """Its checksum then, uint32 [layer]."""


class Tail:
    """The log of a run that is being written; one process at a time holds it."""

    def __init__(self, folder: Path) -> None:
        """StoreError where another process is writing the run."""
        self.path = folder / NAME
        self._file = self._held(self.path, "ab")

    def _held(self, path: Path, mode: str) -> BinaryIO:
        """The file, which nobody else may hold."""
        file = path.open(mode)
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.close()
            raise StoreError(
                "another process is recording this run", where=path.parent, do="wait for it, or record to another path"
            ) from error
        return cast(BinaryIO, file)

    def append(self, record: Record) -> None:
        """Add a step; it survives the process from here on."""
        self._file.write(packed(record))
        self._file.flush()

    def restart(self, kept: Sequence[Record]) -> None:
        """Forget all but these steps, in one go: a reader finds the old log or the new one."""
        partial = self.path.with_name(NAME + ".partial")
        fresh = self._held(partial, "wb")
        fresh.writelines(packed(record) for record in kept)
        fresh.flush()
        os.fsync(fresh.fileno())
        os.replace(partial, self.path)
        self._file.close()
        self._file = fresh

    def close(self, remove: bool) -> None:
        """Let go of the log; a run that is whole on disk needs none."""
        if remove:
            self.path.unlink(missing_ok=True)
        self._file.close()


def packed(record: Record) -> bytes:
    """One record, framed."""
    arrays = {name: getattr(record.row, name) for name in ARRAYS} | {"theta": record.theta, "crc": record.crc}
    held = {name: np.ascontiguousarray(values) for name, values in arrays.items() if values is not None}
    told = {
        "step": record.step,
        "mode": list(record.row.mode),
        "gap": record.row.gap,
        "precision": record.row.precision,
        "arrays": {n: [v.dtype.str, list(v.shape)] for n, v in held.items()},
    }
    payload = b"".join([json.dumps(told).encode(), b"\n", *(v.tobytes() for v in held.values())])
    return HEAD.pack(len(payload), zlib.crc32(payload)) + payload


def records(folder: Path) -> list[Record]:
    """The sound records of a run's log, in order; none where there is no log."""
    try:
        text = schema.read_file(folder, NAME)
    except FileNotFoundError:
        return []
    return list(_sound(text))


def _sound(text: bytes) -> Iterator[Record]:
    at = 0
    while at + HEAD.size <= len(text):
        length, crc = HEAD.unpack_from(text, at)
        payload = text[at + HEAD.size : at + HEAD.size + length]
        if len(payload) < length or zlib.crc32(payload) != crc:
            return
        try:
            yield _unpacked(payload)
        except (ValueError, KeyError, TypeError):
            return
        at += HEAD.size + length


def _unpacked(payload: bytes) -> Record:
    line, _, rest = payload.partition(b"\n")
    told = json.loads(line)
    arrays, at = dict[str, Any](), 0
    for name, (kind, shape) in told["arrays"].items():
        dtype = np.dtype(kind)
        size = prod(shape) * dtype.itemsize
        if dtype.kind not in KINDS or at + size > len(rest):
            raise ValueError("no array of numbers")
        arrays[name] = np.frombuffer(rest[at : at + size], dtype).reshape(shape).copy()
        at += size
    theta, crc = arrays.pop("theta"), arrays.pop("crc", None)
    optional: dict[str, Any] = {name: arrays.get(name) for name in ARRAYS}
    row = StepRow(**optional, mode=tuple(bool(m) for m in told["mode"]), gap=int(told["gap"]), precision=float(told["precision"]))
    return Record(int(told["step"]), row, theta, crc)


def following(found: Sequence[Record], step: int) -> list[Record]:
    """The records of step `step` and those right after it, without a gap, up to the last whose parameters are known."""
    wanted = {record.step: record for record in found}
    out = list[Record]()
    while step in wanted:
        out.append(wanted[step])
        step += 1
    while out and not out[-1].theta.size:
        out.pop()
    return out


def check_idle(folder: Path) -> None:
    """StoreError where another process is writing the run."""
    try:
        with (folder / NAME).open("rb") as file:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return
    except BlockingIOError as error:
        raise StoreError("another process is recording this run", where=folder, do="wait for it to end") from error
