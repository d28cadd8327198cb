"""A run on disk: names, axes, dtypes and chunks of its arrays. In one file: exporting.py.

run/
  zarr.json          attributes: schema version, manifest, and a name that no other run has, "recording" (spool.py)
  commit.json        how many steps are safely on disk; readers clamp to it
  metadata.json      once it is finished: the texts of commit.json and of every zarr.json a second time (mirror.py)
  tail.log, tail.odd.log   steps since then, while the run is written or after it was killed (tail.py); of one at a URL in its spool
  theta              [state, param]          parameters before step `state` (one row more than steps)
                                             of a thin run [stored, param]: before the first step of every block, and after the last step
  state              [anchor, word]          of a thin run: the optimizer's state there, tensor by tensor (record/living.py)
  groups             [step, character]       of a thin run: the parameter groups as JSON, zeros where they are the ones of the step before
  momentum           [anchor, param]         z at the first step of every block, and behind every gap
  filtered           [anchor, entry]         what a gradient filter remembers there, slot by slot
  preconditioner     [step, param]           second moment after the step, or whatever tensor the optimizer's rule freezes
  scalar             [step, layer, scalar]   numbers that the rule needs of an update, where it needs any
  batch part weight  [step, slot]            example ids, micro-batch index, weight of each loss; −1, −1, 0 where unused
  consumed           [step, layer, size]     norm and largest size of the gradients of a step that something changed after the
                                             backward pass (clipping, scaling); nan where nothing did
  random             [step, byte]            generators before each micro-batch, zeros where none was drawn from
  hyper              [step, layer, option]
  age                [step, layer]           updates before this step; −1 where the parameter had no gradient
  gap                [step]                  training steps without a record that the row stands for; 0: it is a step
  precision          [step]                  ε of the floating point numbers of autocast; 0: none
  mode               [step]                  index into commit.json's list of train/eval patterns
  gradient           [step, slot, param]     gradient of each example's loss, its weight left out (only with gradients="store")
  checksum_gradient  [step]                  crc32 of its used rows
  checksum_theta     [state, layer]          crc32 of the tensor's bytes, chained to the previous row
  checksum_step      [step]                  crc32 of all else that the step recorded, chained likewise; of a thin run with checksum_theta
  fingerprint        [example]               crc32 of each training example, where the recorder was given the data
  constant/<name>                            frozen parameters and buffers; ESCAPES stand in their names
"""

import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.codecs import BloscCodec, BloscShuffle
from zarr.storage import ZipStore

from explaind.errors import ExplaindError, StoreError
from explaind.store import location
from explaind.store.bitdelta import BitDelta
from explaind.store.location import MIRROR, Location, is_free, names_in, store_of
from explaind.store.remote import Remote, RemoteError

VERSIONS: Mapping[str, int] = {"run": 3, "ledger": 2}
"""Of the schema, by what it is of. A change that older runs cannot be read without is a new one, and a step in upgrading.py."""
CHUNK_SLOTS = 768
"""Examples of a batch in one chunk."""
CHUNK_BYTES = 1 << 13
"""Of random states in one chunk."""
CHUNK_ROWS = 48
"""With so many rows; with more it is narrower."""
ESCAPES = str.maketrans({"%": "%25", "/": "%2F", "\\": "%5C", ":": "%3A"})
"""In names of frozen parameters and buffers."""
CHUNK_VALUES = 1 << 20
"""Numbers in one chunk, so that neither the writer nor a reader of one layer holds a whole large model."""


@dataclass(frozen=True)
class Column:
    """One growing array: its first dimension counts steps, states or anchors."""

    name: str
    dims: tuple[str, ...]
    dtype: str
    shape: tuple[int, ...]
    """Extent of the dimensions after the first."""
    fill: float = 0
    chunk: int | None = None
    """Extent of a chunk along the second dimension, where that is yet to grow."""
    codec: str = "standard"
    """One of CODECS; bitdelta of floats only."""
    tile: int | None = None
    """Of bitdelta: columns that are packed at a time."""

    def chunks(self, rows: int) -> tuple[int, ...]:
        """Extents of a chunk that holds so many rows."""
        grown = () if self.chunk is None else (-(-self.chunk // max(1, rows // CHUNK_ROWS)),)
        most = max(1, CHUNK_VALUES // max(1, rows * prod(grown)))
        # Chunks of one width, since the last one is as much work as the others.
        even = (-(-n // -(-n // most)) if n else 1 for n in self.shape[len(grown) :])
        return tuple(max(1, n) for n in (rows, *grown, *even))


def lossless() -> BloscCodec:
    """Every zarr v3 reader knows it; bitshuffle suits floats that change little from step to step."""
    return BloscCodec(cname="zstd", clevel=1, shuffle=BloscShuffle.bitshuffle)


CLEVEL = 9
"""Of "apart"."""

CODECS: Mapping[str, Mapping[str, Any]] = {
    "bitdelta": {"serializer": BitDelta(), "compressors": None},
    "standard": {"compressors": [lossless()]},
    "short": {"compressors": [BloscCodec(cname="lz4", clevel=5, shuffle=BloscShuffle.bitshuffle, blocksize=1 << 13)]},
    "quick": {"compressors": [BloscCodec(cname="lz4", clevel=5, shuffle=BloscShuffle.shuffle)]},
    "apart": {"compressors": [BloscCodec(cname="zstd", clevel=CLEVEL, shuffle=BloscShuffle.shuffle)]},
}
"""As zarr's arguments. Any zarr v3 reader knows all but the first. "short" is for what is said of single examples, and takes less memory;
"quick" is for what is written while the training waits, and is a fifth larger; "apart" is for rows that have little in common, and takes
its time."""


def codec(name: str, tile: int | None) -> Mapping[str, Any]:
    """One of CODECS, with so many columns packed at a time where it is bitdelta."""
    return CODECS[name] if name != "bitdelta" else {**CODECS[name], "serializer": BitDelta(tile)}


def codec_of(codecs: Sequence[Any]) -> str:
    """Which of CODECS an array has."""
    if any(isinstance(codec, BitDelta) for codec in codecs):
        return "bitdelta"
    for name in ("short", "quick", "apart"):
        own = CODECS[name]["compressors"][0]
        if any(isinstance(codec, BloscCodec) and _told(codec) == _told(own) for codec in codecs):
            return name
    return "standard"


def _told(codec: BloscCodec) -> tuple[Any, ...]:
    return codec.cname.value, codec.clevel, codec.shuffle.value


CHOICES = ("bitdelta", "standard")
"""How theta, momentum and the preconditioner may be stored: small, or so that any zarr reader reads them."""


def marked(kind: str, attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Attributes that say what a group is, and its schema version."""
    return {"explaind": {"kind": kind, "schema": VERSIONS[kind]}, **attributes}


def create_group(path: Location, kind: str, attributes: Mapping[str, Any]) -> zarr.Group:
    """A new zarr v3 group marked with what it is; nothing may be there yet."""
    check_new(path)
    try:
        return zarr.create_group(store_of(path), zarr_format=3, attributes=marked(kind, attributes))
    except OSError as error:
        raise unwritable(path, error) from error


def check_new(path: Location, but: Sequence[str] = ()) -> None:
    """StoreError unless the path is free or an empty folder; but: names that may stand in it."""
    if not is_free(path, but):
        raise StoreError(
            "there is something here already", where=path, expected="a new or empty folder", do="choose another name, or overwrite it"
        )


def read_file(path: Location, name: str) -> bytes:
    """A small file of a run, in its folder or in the zip that it was exported to; FileNotFoundError where there is none."""
    if not isinstance(path, Path) or not zipfile.is_zipfile(path):
        return (path / name).read_bytes()
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.read(name)
    except (KeyError, zipfile.BadZipFile, NotImplementedError) as error:
        raise FileNotFoundError(2, f"no {name} in the zip", str(path)) from error


def chunks_stored(path: Location, name: str) -> int:
    """How many chunks of an array there are, in the folder of a run or in its zip; whatever its metadata say of their number."""
    if isinstance(path, Remote):
        return len((path / f"{name}/c").files())
    if not path.is_file():
        return sum(1 for file in (path / name / "c").rglob("*") if file.is_file() and file.suffix != ".partial")
    with zipfile.ZipFile(path) as archive:
        return sum(1 for file in archive.namelist() if file.startswith(f"{name}/c/"))


def kind_of(path: Location) -> str:
    """ "run" or "ledger"; StoreError where neither is."""
    if not path.exists():
        raise StoreError("there is no run or ledger here", where=path, got="no such folder", do="check the path")
    try:
        kind = json.loads(read_file(path, "zarr.json"))["attributes"]["explaind"]["kind"]
    except ExplaindError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        if MIRROR in names_in(path):
            return "run"  # which is damaged
        raise StoreError("this is neither a run nor a ledger", where=path, got=type(error).__name__, do="check the path") from error
    return str(kind)


def open_group(path: Location, kind: str) -> zarr.Group:
    """Open a run or a ledger for reading; StoreError says what is there instead."""
    if not path.exists():
        raise StoreError(f"there is no {kind} here", where=path, got="no such folder", do="check the path")
    try:
        zipped = isinstance(path, Path) and zipfile.is_zipfile(path)
        store = ZipStore(str(path), mode="r") if zipped else store_of(path, read_only=True)
        group = zarr.open_group(store, mode="r", zarr_format=3)
        mark = dict(group.attrs).get("explaind")
    except (ExplaindError, MemoryError):
        raise
    except Exception as error:  # whatever zarr raises over metadata that may say anything
        raise StoreError(f"this is not a {kind}", where=path, got=type(error).__name__, do="check the path") from error
    if not isinstance(mark, dict) or mark.get("kind") != kind:
        got = mark.get("kind") if isinstance(mark, dict) else "a zarr group that explaind did not write"
        raise StoreError(f"this is not a {kind}", where=path, got=got, do="check the path")
    check_version(path, kind, mark.get("schema"))
    return group


def check_version(path: Location, kind: str, found: object) -> None:
    """StoreError where a run or a ledger is of another schema than this explaind writes."""
    want = VERSIONS[kind]
    if found == want:
        return
    older = type(found) is int and found < want
    folder = isinstance(path, Path) and not path.is_file()
    again = "decompose again" if kind == "ledger" else f"explaind upgrade {path}" if folder else "upgrade a copy of it in a folder"
    do = again if older else "update explaind"
    raise StoreError(f"{'an older' if older else 'unknown'} schema version of a {kind}", where=path, expected=want, got=found, do=do)


def escaped(name: str) -> str:
    """The name of a frozen parameter or a buffer as that of an array: those of modules may hold signs that stand between folders."""
    return name.translate(ESCAPES)


def unescaped(word: str) -> str:
    """What ``escaped`` was given."""
    for sign, escaped in reversed(ESCAPES.items()):
        word = word.replace(escaped, chr(sign))
    return word


def create_column(group: zarr.Group, column: Column, rows: int) -> zarr.Array:
    """An empty growing array whose chunks hold `rows` rows."""
    return group.create_array(
        column.name,
        shape=(0, *column.shape),
        chunks=column.chunks(rows),
        dtype=column.dtype,
        **codec(column.codec, column.tile),
        fill_value=column.fill,
        dimension_names=list(column.dims),
    )


def tidy(path: Location) -> None:
    """Remove what is left of files that a kill found half written; objects never are."""
    if not isinstance(path, Path):
        return
    of_arrays = (folder.rglob("*.partial") for folder in path.iterdir() if folder.is_dir() and folder.name != "ledgers")
    for partial in (*path.glob("*.partial"), *(file for found in of_arrays for file in found)):
        partial.unlink(missing_ok=True)


def growing(path: Location) -> dict[str, zarr.Array]:
    """The growing arrays of a run, by name, for writing."""
    group = zarr.open_group(store_of(path), mode="r+", zarr_format=3)
    others = ("constant", "fingerprint", "ledgers")
    found = {name: group[name] for name in names_in(path) if name not in others and (path / name / "zarr.json").exists()}
    return {name: array for name, array in found.items() if isinstance(array, zarr.Array)}


def extend(array: zarr.Array, rows: int, shape: tuple[int, ...]) -> None:
    """Make an array so many rows long, and its other dimensions at least as large as `shape`."""
    grown = (rows, *(max(old, new) for old, new in zip(array.shape[1:], shape, strict=True)))
    if grown != array.shape:
        array.resize(grown)


def write_array(group: zarr.Group, name: str, values: np.ndarray, dims: tuple[str, ...], chunks: tuple[int, ...] | None = None) -> None:
    """A finished array with named dimensions."""
    array = group.create_array(
        name,
        shape=values.shape,
        chunks=chunks or tuple(max(1, n) for n in values.shape),
        dtype=values.dtype,
        dimension_names=list(dims),
        compressors=compressors(values.dtype),
    )
    if values.size:
        array[...] = np.asarray(values, order="C")  # zarr 3.1.6 writes texts in the order in which they lie in memory


def compressors(dtype: np.dtype[Any]) -> Any:
    """Of a finished array: numbers as in a column, texts as zarr likes."""
    return [lossless()] if dtype.kind in "fiubc" else "auto"


def replace_file(path: Location, content: str | bytes) -> None:
    """Write a small file so that a reader sees the old or the new one, never half of it, even after a power cut."""
    try:
        location.replace_file(path, content)
    except OSError as error:
        raise unwritable(path, error) from error


def unwritable(path: Location, error: OSError) -> StoreError:
    """What to say when the disk refuses, or whoever answers for a URL."""
    what, where, do = f"cannot write: {error.strerror or error}", path, "free space or choose another path"
    if isinstance(error, RemoteError):
        do = "check the URL, the network and your credentials, or choose another"
    elif isinstance(path, Remote):
        where = path.spool  # the disk that a recording at a URL needs
    return StoreError(what, where=where, do=f"{do}; what was committed stays readable")
