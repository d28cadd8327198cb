"""Where a run or a ledger stands: a folder of this machine, or a URL that fsspec opens. Who reads and writes need not know which.

A folder is a ``Path``, and so is what a file:// URL names. Any other URL is a ``Remote``, which has as much of Path's interface as the
store uses. An object store puts an object in one request, which is all or nothing; it cannot append, lock or rename. What a recording needs
the first two for stands in a folder of this machine instead, the spool (spool.py); a tree is moved object by object, its marker last.
"""

import os
import re
import shutil
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from explaind.errors import StoreError
from explaind.store.durable import sync, write_file
from explaind.store.remote import Objects, Remote, RemoteError, remote

MARKER, MIRROR = "commit.json", "metadata.json"
"""What says which part of a run or a ledger is there: it goes first and comes last; and a copy of all that is no chunk (mirror.py)."""
URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
CHAINED = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*::.*://")
SHORTENED = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/[^/]")
"""What pathlib makes of a URL."""
LOCAL = ("file", "local")

Location = Path | Remote
Where = str | os.PathLike[str] | Remote
"""What a user may say."""


def location_of(where: Where, spool: str | os.PathLike[str] | None = None) -> Location:
    """The place that a path or URL names; spool: the folder of its recordings' log and lock, where it is a URL.

    StoreError for a URL that cannot be opened here.
    """
    if isinstance(where, Remote):
        return where if spool is None else replace(where, spool=Path(spool))
    text = os.fspath(where)
    if CHAINED.match(text):
        raise StoreError("chained URLs name no place", got=text.partition("::")[0] + "::…", do="give the URL alone")
    scheme = URL.match(text)
    if scheme is None:
        if not isinstance(where, str) and SHORTENED.match(text):
            raise StoreError("pathlib has shortened a URL", got=text.split("@")[-1], do="give it as a str")
        return Path(text)
    if scheme[1].lower() in LOCAL:
        return _folder(text)
    return remote(text[: scheme.end()] + text[scheme.end() :].rstrip("/"), scheme[1].lower(), spool)


def _folder(url: str) -> Path:
    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost") or not parts.path:
        raise StoreError("not a URL of a folder", got=url, expected="file:///PATH", do="give the whole path")
    return Path(url2pathname(parts.path))


def store_of(place: Location, read_only: bool = False) -> Any:
    """What zarr reads and writes there."""
    if isinstance(place, Path):
        return place
    store = Objects.from_url(place.url, read_only=read_only)
    store.fs.invalidate_cache()
    return store


def replace_file(place: Location, content: str | bytes) -> None:
    """Write a small file so that a reader sees the old or the new one, never half of it, even after a power cut. OSError."""
    whole = content.encode() if isinstance(content, str) else content
    if isinstance(place, Remote):
        return place.write_bytes(whole)
    partial = place.with_name(place.name + ".partial")
    write_file(partial, whole)
    sync([partial])
    os.replace(partial, place)
    sync([place.parent])


def names_in(place: Location) -> list[str]:
    """Of what is right below it, sorted; none where there is nothing."""
    try:
        return sorted(path.name for path in place.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def is_free(place: Location, but: Sequence[str] = ()) -> bool:
    """Whether nothing is there, or a folder that is empty; but: names that may stand in it."""
    if isinstance(place, Remote):
        return not place.files()
    return not place.exists() or (place.is_dir() and all(path.name in but for path in place.iterdir()))


def inside(run: Location, name: str = "", but: Collection[str] = ()) -> Location:
    """A part of a run that is about to be written, or all of it but some; StoreError for a link in it, which may lead anywhere."""
    place = run / name if name else run
    link = _link(place, but, own=bool(name)) if isinstance(place, Path) else None
    if link is not None:
        do = "put there what it leads to, if you trust it"
        raise StoreError("a link stands where the run is to be written", where=link, got=os.readlink(link), do=do)
    return place


def _link(place: Path, but: Collection[str] = (), own: bool = True) -> str | None:
    """The first link below a place, or the place itself where it is its own."""
    if own and place.is_symlink():
        return str(place)
    try:
        with os.scandir(place) as entries:
            found = (e.path if e.is_symlink() else _link(Path(e.path)) for e in entries if e.name not in but)
            return next((link for link in found if link is not None), None)
    except (FileNotFoundError, NotADirectoryError):  # others may have put it away
        return None


def absolute(place: Location) -> Location:
    """The same place for whoever stands elsewhere."""
    return Path(os.path.abspath(place)) if isinstance(place, Path) else place


def size_of(place: Location) -> int:
    """Bytes of a file, or of all files below it; 0 where there is none."""
    if isinstance(place, Path):
        if place.is_file():
            return place.stat().st_size
        return sum(file.stat().st_size for file in place.rglob("*") if file.is_file())
    return sum(place.sizes())


def remove_tree(place: Location, ignore_errors: bool = False) -> None:
    """Remove all that is there; at a URL markers first, so that what a kill leaves is neither run nor ledger. OSError."""
    if isinstance(place, Path):
        shutil.rmtree(place, ignore_errors=ignore_errors)
        return
    with suppress(*([RemoteError] if ignore_errors else [])):
        place.remove(_in_order(place.files())[::-1])


def hide(place: Location, aside: Location) -> None:
    """Take a tree out of sight: it is renamed, for whoever clears up; at a URL it is removed. OSError."""
    if isinstance(place, Path) and isinstance(aside, Path):
        place.rename(aside)
    else:
        remove_tree(place)


def move(source: Location, target: Location) -> None:
    """Put a tree elsewhere, where nothing is: at once in a folder; at a URL markers come last, and go first. OSError."""
    if isinstance(source, Path) and isinstance(target, Path):
        source.rename(target)
    elif isinstance(source, Remote) and isinstance(target, Remote):
        source.copy(_in_order(source.files()), target)
        remove_tree(source)
    elif isinstance(source, Path):
        files = {file.relative_to(source).as_posix(): file for file in source.rglob("*") if file.is_file()}
        for name in _in_order(files):
            (target / name).write_bytes(files[name].read_bytes())
        shutil.rmtree(source)
    else:
        raise NotImplementedError("nothing is moved from a URL into a folder")


def _in_order(files: Iterable[str]) -> list[str]:
    """Markers last, the outermost at the very end."""
    return sorted(files, key=lambda name: (name.rpartition("/")[2] == MARKER, -name.count("/"), name))
