"""A run as a zarr group, in a folder or in a zip.

In a zip, arrays have the standard codec and every chunk is there, so that any zarr reader opens it and nothing can be missing unseen; an
attribute "codec" of an array says how it was recorded. Entries are stored as they are, none is deflated.
"""

import json
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import numpy as np
import zarr
from zarr.core.metadata import ArrayV3Metadata
from zarr.storage import LocalStore, ZipStore

from explaind.errors import StoreError
from explaind.store import admission, schema
from explaind.store.location import MARKER, Location, names_in, store_of
from explaind.store.opening import bounded
from explaind.store.shelf import PIECE, TEXT, Region, Slab, Spec, unfit
from explaind.store.tail import NAMES

GROUPS = re.compile(r"|constant|ledgers|ledgers/[^/]+|ledgers/[^/]+/check")
CHUNK = re.compile(r"(.+?)/c(?:/(?:0|[1-9]\d{0,17}))*")


class _Grouped:
    """A zarr group in either place; closed at the end of a ``with``."""

    def __init__(self, path: Location, store: Any) -> None:
        self.where, self.store = str(path), store
        self._groups: dict[str, zarr.Group] = {}

    def __enter__(self) -> Any:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if self.store._is_open:  # a zip that was never opened has nothing to close, and says so badly
            self.store.close()

    def group(self, name: str = "") -> zarr.Group:
        return zarr.open_group(self.store, path=name, mode="r", zarr_format=3)


class _Reader(_Grouped):
    def slab(self, name: str) -> Slab:
        """An array; StoreError where its metadata are not those of an array that a run may have."""
        try:
            array = bounded(zarr.open_array(self.store, path=name, mode="r", zarr_format=3))
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise unfit(self, name, "damaged", got=error) from error
        dtype, metadata = array.dtype, cast(ArrayV3Metadata, array.metadata)
        if dtype.kind not in "fiubcT":
            raise unfit(self, name, "no array of numbers or names", got=f"{dtype} with {len(metadata.codecs)} codecs")
        dims = tuple(str(axis) for axis in metadata.dimension_names or ())
        own = schema.codec_of(metadata.codecs)
        codec = array.attrs.get("codec", own)
        if not isinstance(codec, str) or codec not in schema.CODECS:
            raise unfit(self, name, "of an unknown codec", expected=", ".join(schema.CODECS), got=repr(codec)[:40])
        spec = Spec(array.shape, TEXT if dtype.kind == "T" else dtype.name, dims, array.chunks, codec=codec)
        self._check_whole(name, array)

        def read(region: Region) -> np.ndarray:
            try:
                return np.asarray(array[region])
            except (OSError, RuntimeError, ValueError) as error:
                raise StoreError("a chunk cannot be read", where=f"{self.where}/{name}", got=error, do="restore it from a copy") from error

        return Slab(spec, read)

    def _check_whole(self, name: str, array: zarr.Array) -> None:
        """In a folder, chunks that hold nothing but the fill value are left out."""

    def pieces(self, name: str) -> Iterator[bytes]:
        """A small file; attributes as they stand in the group."""
        front, _, last = name.rpartition("/")
        if last == "attributes.json":
            try:
                yield json.dumps(dict(self.group(front).attrs)).encode()
            except (OSError, ValueError, TypeError, KeyError) as error:
                raise unfit(self, f"{front}/zarr.json", "damaged", got=type(error).__name__) from error
        else:
            yield from self._pieces(name)

    def _pieces(self, name: str) -> Iterator[bytes]:
        raise NotImplementedError


class FolderSource(_Reader):
    """Reads a run from its folder or URL; what else lies there is passed over."""

    def __init__(self, path: Location, log: Path | None) -> None:
        """log: the folder of its log, where this machine has one."""
        super().__init__(path, LocalStore(path, read_only=True) if isinstance(path, Path) else store_of(path, read_only=True))
        self.path, self._log = path, log

    def names(self) -> Iterator[str]:
        """The paths of what belongs to the run."""
        yield from ("attributes.json", *([MARKER] if (self.path / MARKER).exists() else []))
        yield from (name for name in NAMES if self._log is not None and (self._log / name).exists())
        yield from (name for name in sorted(admission.COLUMNS) if (self.path / name / "zarr.json").exists())
        yield from (f"constant/{name}" for name in self._arrays("constant"))
        for ledger in names_in(self.path / "ledgers"):
            front = f"ledgers/{ledger}"
            if not ledger.startswith(".") and (self.path / front / MARKER).exists():
                yield from (f"{front}/{name}" for name in ("attributes.json", MARKER, *self._arrays(front)))
                yield from (f"{front}/check/{name}" for name in self._arrays(f"{front}/check"))

    def _arrays(self, name: str) -> list[str]:
        found = (part for part in names_in(self.path / name) if (self.path / name / part / "zarr.json").exists())
        return [part for part in found if not GROUPS.fullmatch(f"{name}/{part}")]

    def _pieces(self, name: str) -> Iterator[bytes]:
        if name in NAMES and self._log is not None:
            with open(self._log / name, "rb") as file:
                while piece := file.read(PIECE):
                    yield piece
        else:
            yield (self.path / name).read_bytes()


class ZipSource(_Reader):
    """Reads a run from a zip that ZipSink wrote; StoreError for entries that are not of a run, or larger than the file."""

    def __init__(self, path: Path) -> None:
        with schema.archived(path) as archive:
            self._entries = archive.namelist()
        chunks = map(CHUNK.fullmatch, self._entries)
        self._chunks = Counter(chunk[1] for chunk in chunks if chunk is not None)
        super().__init__(path, ZipStore(path, mode="r"))
        self.path = path

    def names(self) -> Iterator[str]:
        """The paths of arrays and small files; every single entry is looked at."""
        arrays = {name.removesuffix("/zarr.json") for name in self._entries if name.endswith("/zarr.json")}
        arrays = {name for name in arrays if not GROUPS.fullmatch(name)}
        return (path for path in (_path(name, arrays) for name in self._entries) if path is not None)

    def _check_whole(self, name: str, array: zarr.Array) -> None:
        if self._chunks[name] != array.nchunks:
            raise unfit(self, name, "not whole", expected=f"{array.nchunks} chunks", got=self._chunks[name])

    def _pieces(self, name: str) -> Iterator[bytes]:
        with zipfile.ZipFile(self.path) as archive, archive.open(name) as file:
            while piece := file.read(PIECE):
                yield piece


def _path(entry: str, arrays: Collection[str]) -> str | None:
    """The array or small file that an entry belongs to; None for what is inside of an array, and for groups without attributes."""
    chunk = CHUNK.fullmatch(entry)
    if chunk is not None and chunk[1] in arrays:
        return None
    front, _, last = entry.rpartition("/")
    if last != "zarr.json":
        return entry
    if not front or (GROUPS.fullmatch(front) and front.count("/") == 1 and front.startswith("ledgers/")):
        return f"{front}/attributes.json".lstrip("/")
    return front if front in arrays else None


class _Writer(_Grouped):
    config: Any = None

    def codec_of(self, spec: Spec) -> tuple[str, dict[str, Any]]:
        """The codec of a new array, and its attributes."""
        return spec.codec, {}

    def create(self, name: str, spec: Spec) -> Callable[[Region, np.ndarray], None]:
        """A new array, and how to write its chunks."""
        front, _, last = name.rpartition("/")
        if front not in self._groups:
            self._groups[front] = self._group(front, {})
        dtype: Any = np.dtypes.StringDType() if spec.dtype == TEXT else np.dtype(spec.dtype)
        codec, attributes = self.codec_of(spec)
        options: dict[str, Any] = (
            dict(schema.codec(codec, spec.tile)) if codec != "standard" else {"compressors": schema.compressors(dtype)}
        )
        if spec.fill is not None:
            options["fill_value"] = spec.fill
        dims, config = list(spec.dims), self.config
        array = self._groups[front].create_array(
            last,
            shape=spec.shape,
            chunks=spec.chunks,
            dtype=dtype,
            dimension_names=dims,
            attributes=attributes,
            config=config,
            **options,
        )

        def write(region: Region, values: np.ndarray) -> None:
            array[region] = values

        return write

    def put(self, name: str, pieces: Iterable[bytes]) -> None:
        """A small file; attributes make a group."""
        front, _, last = name.rpartition("/")
        if last == "attributes.json":
            attributes = json.loads(b"".join(pieces))
            self._groups[front] = self._group(front, attributes)
        else:
            self._put(name, pieces)

    def _group(self, name: str, attributes: dict[str, Any]) -> zarr.Group:
        return zarr.create_group(self.store, path=name, zarr_format=3, attributes=attributes)

    def _put(self, name: str, pieces: Iterable[bytes]) -> None:
        raise NotImplementedError


class FolderSink(_Writer):
    """Writes a run into a new folder, as it was recorded."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, LocalStore(path))
        self.path = path

    def _group(self, name: str, attributes: dict[str, Any]) -> zarr.Group:
        # zarr makes groups of all folders above; those of the ledgers are none in a run.
        return zarr.create_group(self.path / name, zarr_format=3, attributes=attributes)

    def _put(self, name: str, pieces: Iterable[bytes]) -> None:
        with open(self.path / name, "wb") as file:
            file.writelines(pieces)


class _Zip(ZipStore):
    """Makes no group above the ledgers, as a run has none: whoever reads a tree would have to fit their axes to those of the run."""

    async def set_if_not_exists(self, key: str, value: Any) -> None:
        """How zarr makes groups above what it was asked for."""
        if key != "ledgers/zarr.json":
            await super().set_if_not_exists(key, value)


class ZipSink(_Writer):
    """Writes a run into a new zip; its small files come last, when zarr has let go of it."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, _Zip(path, mode="w"))
        self.path = path
        self.config = {"write_empty_chunks": True}
        self._files: list[tuple[str, Iterable[bytes]]] = []

    def codec_of(self, spec: Spec) -> tuple[str, dict[str, Any]]:
        """Always the standard one, which any zarr reader knows."""
        return "standard", {} if spec.codec == "standard" else {"codec": spec.codec}

    def _put(self, name: str, pieces: Iterable[bytes]) -> None:
        self._files.append((name, pieces))

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        super().__exit__(kind, value, trace)
        if kind is None:
            with zipfile.ZipFile(self.path, "a") as archive:
                for name, pieces in self._files:
                    with archive.open(name, "w", force_zip64=True) as file:
                        for piece in pieces:
                            file.write(piece)
