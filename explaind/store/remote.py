"""A URL that fsspec opens, as far as a run or a ledger needs it: whole objects by name, and zarr's store of them.

Credentials come from the environment or from fsspec's configuration, as for any other program. Those in a URL are never shown, and of what
a library says over a failed request only its kind and its status are: it may quote the request.
"""

import errno
import hashlib
import os
import re
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from pathlib import Path
from typing import Any

import fsspec
from zarr.storage import FsspecStore

from explaind.errors import ExplaindError, StoreError

KINDS = {FileNotFoundError: errno.ENOENT, PermissionError: errno.EACCES}
"""What libraries raise without a number."""
STATUS = re.compile(r"\b[45]\d\d\b")


class RemoteError(StoreError, OSError):
    """A request that failed; for who writes, what the disk is to others."""

    def __init__(self, where: object, error: BaseException) -> None:
        why = reason(error)
        super().__init__("the place cannot be reached", where=where, got=why, do="check the URL, the network and your credentials")
        self.strerror = why


@dataclass(frozen=True)
class Remote:
    """A URL, and whatever stands there: an object, or all objects whose names begin with its own and a slash."""

    fs: Any = field(repr=False, compare=False)
    """A filesystem of fsspec, for calls that wait."""
    key: str = field(repr=False)
    """What it calls the place."""
    url: str = field(repr=False)
    """As it was given."""
    shown: str
    """Without credentials."""
    spool: Path
    """Of the recording that is made there."""

    def __str__(self) -> str:
        return self.shown

    def __truediv__(self, name: str) -> "Remote":
        names = name.split("/")
        if any(part in ("", ".", "..") for part in names):
            raise StoreError("not a name that can stand at a URL", where=self, got=repr(name)[:80], do="choose another")
        return replace(self, key=f"{self.key}/{name}", url=f"{self.url}/{name}", shown=f"{self.shown}/{name}")

    @property
    def name(self) -> str:
        """The last part of its path."""
        return self.key.rpartition("/")[2]

    @property
    def parent(self) -> "Remote":
        """What it stands in."""
        return replace(self, **{name: getattr(self, name).rpartition("/")[0] for name in ("key", "url", "shown")})

    def exists(self) -> bool:
        """Whether anything is there."""
        return self._kind() is not None

    def is_file(self) -> bool:
        """Whether it is an object."""
        return self._kind() == "file"

    def is_dir(self) -> bool:
        """Whether there are objects below it."""
        return self._kind() == "directory"

    def _kind(self) -> str | None:
        with self._asked():
            self.fs.invalidate_cache()  # others may have written since
            try:
                return str(self.fs.info(self.key)["type"])
            except (FileNotFoundError, NotADirectoryError):
                return None

    def iterdir(self) -> Iterator["Remote"]:
        """What is right below it; FileNotFoundError where there is nothing."""
        with self._asked():
            self.fs.invalidate_cache()
            found = {str(path).rstrip("/") for path in self.fs.ls(self.key, detail=False)}
        names = sorted({path.rpartition("/")[2] for path in found if path.lstrip("/") != self.key.lstrip("/")})
        return iter([self / name for name in names])

    def files(self) -> list[str]:
        """What the filesystem calls all objects below it."""
        with self._asked(), suppress(FileNotFoundError):
            self.fs.invalidate_cache()
            return [str(path) for path in self.fs.find(self.key)]
        return []

    def read_bytes(self) -> bytes:
        """An object; FileNotFoundError where there is none."""
        with self._asked():
            return bytes(self.fs.cat_file(self.key))

    def read_text(self) -> str:
        """An object as UTF-8."""
        return self.read_bytes().decode()

    def write_bytes(self, content: bytes) -> None:
        """Put an object, in one request."""
        with self._asked(missing=False):
            self.fs.pipe_file(self.key, content)

    def sizes(self) -> list[int]:
        """Bytes of every object below it."""
        with self._asked(), suppress(FileNotFoundError):
            self.fs.invalidate_cache()
            return [int(entry["size"] or 0) for entry in self.fs.find(self.key, detail=True).values()]
        return []

    def copy(self, files: Sequence[str], target: "Remote") -> None:
        """Put some of ``files()`` below another place, one after another."""
        for file in files:
            with self._asked(missing=False):
                self.fs.cp_file(file, target.key + file.lstrip("/").removeprefix(self.key.lstrip("/")))

    def remove(self, files: Sequence[str]) -> None:
        """Remove some of ``files()``, one after another."""
        for file in files:
            with suppress(FileNotFoundError), self._asked():
                self.fs.rm_file(file)

    def unlink(self, missing_ok: bool = False) -> None:
        """Remove an object."""
        try:
            with self._asked():
                self.fs.rm_file(self.key)
        except FileNotFoundError:
            if not missing_ok:
                raise

    def mkdir(self, parents: bool = False, exist_ok: bool = False) -> None:
        """Nothing: folders are there with what is in them."""

    def _asked(self, missing: bool = True) -> Any:
        return asked(self.shown, missing)


@contextmanager
def asked(where: str, missing: bool = True) -> Iterator[None]:
    """Whatever a library raises over a request, as RemoteError; missing: FileNotFoundError is an answer."""
    try:
        yield
    except ExplaindError:
        raise
    except Exception as error:
        if missing and isinstance(error, FileNotFoundError):
            raise
        raise RemoteError(where, error) from error


def reason(error: BaseException) -> str:
    """Why a request failed, in words that are ours."""
    known = [number for kind, number in KINDS.items() if isinstance(error, kind)]
    number = known[0] if known else error.errno if isinstance(error, OSError) else None
    if number is not None and number in errno.errorcode:
        return os.strerror(number)
    statuses = [int(found) for found in STATUS.findall(str(error)) if int(found) in list(HTTPStatus)]
    return type(error).__name__ + (f", status {statuses[0]} {HTTPStatus(statuses[0]).phrase}" if statuses else "")


def remote(url: str, scheme: str, spool: str | os.PathLike[str] | None) -> Remote:
    """Of a URL without a slash at its end; StoreError for one that cannot be opened here."""
    shown = re.sub(r"(://)[^/]*@", r"\1", url)
    if any(sign in shown for sign in "?#*[]"):
        raise StoreError("not a URL of a place", where=re.split(r"[?#]", shown)[0], expected="SCHEME://PLACE/NAME and nothing more")
    try:
        _check_known(scheme)
        fs, key = fsspec.url_to_fs(url)
    except ImportError as error:
        extra = "pip install 'explaind-ledger[s3]'" if scheme in ("s3", "s3a") else "install the package that fsspec needs for it"
        raise StoreError(f"{scheme}:// needs another package", where=shown, do=extra) from error
    except Exception as error:
        raise StoreError("this URL cannot be opened", where=shown, got=reason(error), do="check it") from error
    key = key.rstrip("/")
    if not key.strip("/") or (scheme != "memory" and "/" not in shown.partition("://")[2]):  # a bucket is no place for one run
        raise StoreError("not a URL of a place", where=shown, expected="SCHEME://PLACE/NAME", do="name the run")
    # What is in memory is this process's own.
    name = f"{shown} {os.getpid()}" if scheme == "memory" else shown
    return Remote(fs, key, url, shown, Path(spool) if spool is not None else _spool(name))


def _check_known(scheme: str) -> None:
    """ImportError where no package opens it. Who has s3fs uses that; obstore needs nothing else."""
    try:
        fsspec.get_filesystem_class(scheme)
    except ImportError:
        if scheme not in ("s3", "s3a"):
            raise
        from obstore.fsspec import register

        register(scheme)


def _spool(name: str) -> Path:
    """Where this user's recordings to a URL keep their log and lock."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "explaind" / "spool" / hashlib.sha256(name.encode()).hexdigest()[:32]


def _shown(key: str) -> str:
    """What a filesystem calls a place, without credentials."""
    return re.sub(r"^(/?)[^/]*@", r"\1", key)


class Objects(FsspecStore):
    """Zarr's store of objects; what fails is told as in ``Remote``, and an answer that did not come is not taken for "nothing there"."""

    async def get(self, key: str, *args: Any, **options: Any) -> Any:
        with asked(_shown(self.path)):
            return await super().get(key, *args, **options)

    async def get_partial_values(self, *args: Any, **options: Any) -> Any:
        with asked(_shown(self.path)):
            return await super().get_partial_values(*args, **options)

    async def set(self, key: str, *args: Any, **options: Any) -> None:
        with asked(_shown(self.path), missing=False):
            await super().set(key, *args, **options)

    async def delete(self, key: str) -> None:
        with asked(_shown(self.path)):
            await super().delete(key)

    async def exists(self, key: str) -> bool:
        with asked(_shown(self.path)):
            try:
                await self.fs._info(f"{self.path}/{key}")
            except FileNotFoundError:
                return False
            return True

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        with asked(_shown(self.path)):
            async for name in super().list_dir(prefix):
                yield name
