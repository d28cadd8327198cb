"""A run in one file, and back: HDF5 (.h5, .hdf5) or a zip that zarr opens (.zip).

Both are whole or not there, and carry a sha256 of everything in them, which is looked at before anything is read: in front of an HDF5 file,
in the comment at the end of a zip. What comes back is bitwise what was recorded: the committed steps, the log of a run that was killed, and
its ledgers. Analyses, reports and transplants can be made anew and stay behind.
"""

import hashlib
import os
import secrets
import shutil
import struct
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

from explaind.errors import StoreError
from explaind.store import mirror, schema
from explaind.store.copying import Copied, Progress, copied
from explaind.store.grouped import FolderSink, FolderSource, ZipSink, ZipSource
from explaind.store.hdf5 import USER_BLOCK, Hdf5Sink, Hdf5Source, needed
from explaind.store.location import Location, Where, absolute, is_free, location_of, move, remove_tree
from explaind.store.reader import open_run
from explaind.store.remote import Remote
from explaind.store.repair import recovered
from explaind.store.sealed import PIECE, write_whole
from explaind.store.spool import check_idle, forget, log_of

SUFFIXES = (".h5", ".hdf5", ".zip")
MARK = b"explaind sha256 "
SEAL = len(MARK) + 64
END_OF_ZIP = struct.Struct("<H")
"""Length of the comment, right before it."""


@dataclass(frozen=True)
class Exchanged(Copied):
    """What was exported or imported, and the size of the file."""

    bytes: int


def export_run(where: Where, out: Where, ledgers: bool = True, overwrite: bool = False, progress: Progress | None = None) -> Exchanged:
    """Write a run, in its folder or at a URL, into a file of its own on this machine, of the kind that its name ends with.

    ledgers: the finished ones come along. progress(done, total): bytes of arrays. StoreError where the run cannot be read or is being
    recorded, where the file is there already (unless overwrite is set), or cannot be written; no half of a file is left.
    """
    file = _local(out)
    zipped = _is_zip(file)
    opened = open_run(where)
    run, log = opened.path, log_of(opened.path, opened.attributes)
    if run.is_file():
        raise StoreError("this run is in a file already", where=run, do="copy the file, or import it first")
    if file.is_dir() or (file.exists() and not overwrite):
        raise StoreError("there is something here already", where=file, expected="a new file", do="choose another name, or overwrite it")
    check_idle(run)
    found = list[Copied]()

    def write(whole: BinaryIO) -> None:
        path = Path(whole.name)
        with FolderSource(run, log) as source, ZipSink(path) if zipped else Hdf5Sink(path) as sink:
            found.append(copied(source, sink, ledgers, progress))
        _seal(whole, zipped)

    try:
        if not zipped:
            needed()
        write_whole(file, write)
    except OSError as error:
        raise schema.unwritable(file, error) from error
    return Exchanged(**asdict(found[0]), bytes=file.stat().st_size)


def import_run(source: Where, where: Where, ledgers: bool = True, overwrite: bool = False, progress: Progress | None = None) -> Exchanged:
    """Make the folder of a run, or a run at a URL, from a file of this machine that ``export_run`` wrote.

    StoreError where the file is not bitwise what was written, holds what no run has, or where the folder is taken (by anything but a run,
    if overwrite is set). A run that is replaced stays until the new one is complete: at a URL, until all of it is ready to be put there.
    """
    file = _local(source)
    zipped = _is_zip(file)
    if not file.is_file():
        raise StoreError("there is no file to import", where=file, do="check the path")
    target = absolute(location_of(where))
    if overwrite and not is_free(target):
        schema.open_group(target, "run")  # only ever replace what is a run
        check_idle(target)
    else:
        schema.check_new(target)
    _check_seal(file, zipped)
    beside = target.parent if isinstance(target, Path) else Path(tempfile.gettempdir())
    partial = beside / f".{target.name}.{secrets.token_hex(4)}.partial"
    try:
        beside.mkdir(parents=True, exist_ok=True)
        with _readable(file), ZipSource(file) if zipped else Hdf5Source(file) as read, FolderSink(partial) as sink:
            found = copied(read, sink, ledgers, progress)
        open_run(partial)
        mirror.keep(partial)
        _replace(target, partial)
    except OSError as error:
        raise schema.unwritable(target, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Exchanged(**asdict(found), bytes=file.stat().st_size)


def _is_zip(file: Path) -> bool:
    if file.suffix not in SUFFIXES:
        raise StoreError("unknown kind of file", where=file, expected=f"a name that ends with {', '.join(SUFFIXES)}", do="choose one")
    return file.suffix == ".zip"


def _local(where: Where) -> Path:
    file = location_of(where)
    if not isinstance(file, Path):
        raise StoreError("an exported file stands on this machine", where=file, expected="a path", do="copy it there afterwards")
    return file


def _replace(target: Location, partial: Path) -> None:
    """Put the new folder in its place; the old one goes once it is there."""
    if not isinstance(target, Path):
        _put(target, partial)
        return
    older = partial.with_suffix(".older")
    if target.exists():
        target.rename(older)
    partial.rename(target)
    shutil.rmtree(older, ignore_errors=True)


def _put(target: Remote, partial: Path) -> None:
    """Put the new run at its URL, its log taken up: that would stand on one machine alone."""
    recovered(partial)
    if target.exists():
        forget(target, dict(schema.open_group(target, "run").attrs))
        remove_tree(target)
    move(partial, target)


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    """What readers of other formats raise, in one line. What they say is theirs: errors of the disk have a number."""
    try:
        yield
    except OSError as error:
        if error.errno is not None:
            raise
        raise _unreadable(file, error) from error
    except (ValueError, TypeError, KeyError, RuntimeError, OverflowError, NotImplementedError, zipfile.BadZipFile, MemoryError) as error:
        raise _unreadable(file, error) from error


def _unreadable(file: Path, error: Exception) -> StoreError:
    return StoreError("the file cannot be read", where=file, got=f"{type(error).__name__}: {error}"[:200], do="export the run once more")


def _seal(file: BinaryIO, zipped: bool) -> None:
    """Write the checksum of all the rest."""
    if zipped:
        file.seek(-END_OF_ZIP.size, os.SEEK_END)
        file.write(END_OF_ZIP.pack(SEAL))
        file.write(_digest(file, 0, file.tell()))
    else:
        mark = _digest(file, USER_BLOCK, file.seek(0, os.SEEK_END))
        file.seek(0)
        file.write(mark.ljust(USER_BLOCK, b"\0"))


def _check_seal(path: Path, zipped: bool) -> None:
    size = path.stat().st_size
    with open(path, "rb") as file:
        if zipped:
            want = _digest(file, 0, max(0, size - SEAL))
            fine = file.read() == want
        else:
            want = _digest(file, USER_BLOCK, size).ljust(USER_BLOCK, b"\0")
            file.seek(0)
            fine = file.read(USER_BLOCK) == want
    if not fine:
        raise StoreError(
            "the file is damaged, or no exported run",
            where=path,
            expected="the checksum of what is in it",
            do="take it from a copy, or export the run once more",
        )


def _digest(file: BinaryIO, start: int, stop: int) -> bytes:
    """The seal of the bytes [start, stop) of a file, which is left standing at stop."""
    file.flush()
    file.seek(start)
    digest, left = hashlib.sha256(), stop - start
    while left > 0 and (piece := file.read(min(PIECE, left))):
        digest.update(piece)
        left -= len(piece)
    return MARK + digest.hexdigest().encode()
