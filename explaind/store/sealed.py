"""Arrays in one file that is whole or not there: written under another name, synced, then renamed; its first line is its own checksum.
At a URL it is put in one request.

64 hexadecimal digits of sha256 over everything after the line, a newline, then an npz without pickles
"""

import hashlib
import os
import secrets
from collections.abc import Callable, Mapping
from io import BytesIO
from typing import BinaryIO

import numpy as np

from explaind.store.location import Location
from explaind.store.remote import Remote

HEAD = 65
PIECE = 1 << 20


def write_whole(path: Location, write: Callable[[BinaryIO], object]) -> None:
    """A file that replaces the one of that name once `write` is through; OSError leaves the old one. Several processes may do so."""
    if isinstance(path, Remote):
        whole = BytesIO()
        write(whole)
        path.write_bytes(whole.getvalue())
        return
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with open(partial, "w+b") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_sealed(path: Location, arrays: Mapping[str, np.ndarray]) -> None:
    """Put arrays into a file of their own."""

    def write(file: BinaryIO) -> None:
        file.write(bytes(HEAD))
        np.savez(file, **arrays)  # type: ignore[arg-type]  # numpy's stubs take any keyword for allow_pickle
        digest = _digest(file)
        file.seek(0)
        file.write(f"{digest}\n".encode())

    write_whole(path, write)


def read_sealed(path: Location) -> dict[str, np.ndarray] | None:
    """The arrays of a file; None where it is not what was written. FileNotFoundError where there is none."""
    with BytesIO(path.read_bytes()) if isinstance(path, Remote) else open(path, "rb") as file:
        if file.read(HEAD) != f"{_digest(file)}\n".encode():
            return None
        file.seek(HEAD)
        with np.load(file, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}


def _digest(file: BinaryIO) -> str:
    file.seek(HEAD)
    digest = hashlib.sha256()
    while piece := file.read(PIECE):
        digest.update(piece)
    return digest.hexdigest()
