"""What must be on the disk itself, and not only with the operating system, before something else is written: safe from a power cut."""

import errno
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

NO_FOLDERS = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)
"""What filesystems say that sync no folders."""
WRITE = os.O_WRONLY | os.O_CREAT | getattr(os, "O_BINARY", 0)
Text = Iterable[tuple[int, bytes]]
"""Of a file: pieces, each with its place."""
AT_ONCE = 4
"""Files that are synced at a time: a disk that is asked for several makes one journey of it."""
SHARE = 64
"""Files that are worth a thread where nobody waits for them: every one asks the training for the interpreter."""


def write_file(path: Path, text: bytes) -> None:
    """Write a file, or write it anew. OSError where the disk is full, FileNotFoundError where there is no folder for it."""
    os.close(written(path, [(0, text)]))


def write_new(path: Path, text: bytes) -> None:
    """Write a file that is not there yet, all of it or nothing. FileExistsError where there is one."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        write_file(partial, text)
        if path.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
        os.rename(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def written(path: Path, pieces: Text, new: bool = False) -> int:
    """The same of pieces, each with its place, in a folder that is made where there is none; the number of the open file.

    That is the caller's to close. new: FileExistsError where there is one.
    """
    how = WRITE | (os.O_EXCL if new else os.O_TRUNC)
    try:
        number = os.open(path, how, 0o666)
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
        number = os.open(path, how, 0o666)
    try:
        stands = 0
        for at, text in pieces:
            if at != stands:
                os.lseek(number, at, os.SEEK_SET)
            rest = memoryview(text)
            while len(rest):  # a file may take less than it is given
                rest = rest[os.write(number, rest) :]
            stands = at + len(text)
            del text, rest  # the next piece is yet to be made
    except BaseException:
        os.close(number)
        raise
    return number


def sync(paths: Iterable[Path | int], behind: bool = False) -> None:
    """Have the disk write files, which may be open ones, and the names that stand in folders. OSError where it does not.

    behind: nobody waits for it.
    """
    known = list(paths)
    count = min(AT_ONCE, len(known) // SHARE if behind else len(known))
    if count < 2:
        _sync(known)
        return
    # Threads that waited for the next time would hold some memory for as long as somebody trains.
    with ThreadPoolExecutor(count, "explaind-sync") as threads:
        shares = [threads.submit(_sync, known[i::count]) for i in range(count)]
    for share in shares:
        share.result()


def sync_folders(files: Iterable[Path], top: Path, behind: bool = False) -> None:
    """Sync the folders that these files stand in, up to the top one; behind: nobody waits for it."""
    found, end = {str(top)}, str(top)
    for file in files:
        folder = os.path.dirname(file)
        while folder not in found and len(folder) > len(end):
            found.add(folder)
            folder = os.path.dirname(folder)
    sync(map(Path, sorted(found)), behind)


def sync_tree(top: Path, known: Path) -> None:
    """Sync a new folder with all that is in it, and the names of it and of new ones above it; known: the lowest that is not new."""
    found = [(folder, names) for folder, _, names in os.walk(top, onerror=_raise)]
    sync(Path(folder, name) for folder, names in found for name in names)
    above = [folder for folder in top.absolute().parents if folder == known or known in folder.parents]
    sync([*(Path(folder) for folder, _ in found), *above])


def _raise(error: OSError) -> None:
    raise error


def lowest(path: Path) -> Path:
    """The lowest folder above a path that is there."""
    return next(folder for folder in path.absolute().parents if folder.exists())


def _sync(paths: Iterable[Path | int]) -> None:
    for path in paths:
        if isinstance(path, int):
            os.fsync(path)
            continue
        if os.name == "nt" and path.is_dir():  # whose folders cannot be opened
            continue
        number = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
        try:
            os.fsync(number)
        except OSError as error:
            if error.errno not in NO_FOLDERS or not path.is_dir():
                raise
        finally:
            os.close(number)
