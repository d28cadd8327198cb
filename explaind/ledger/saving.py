"""A ledger on disk: a zarr v3 group with one array a row, named dimensions and coordinates; opened lazily."""

from collections.abc import Mapping
from dataclasses import fields
from math import prod
from typing import Any

import numpy as np
import zarr

from explaind.axes import KEEPABLE, ROWS
from explaind.errors import StoreError
from explaind.ledger.ledger import Checks, Ledger, Row
from explaind.store import schema
from explaind.store.location import MARKER, Location, Where, location_of
from explaind.store.opening import LARGEST, bounded, reading

CHUNK_BYTES = 4 << 20
EMPTY = 100
"""Of a large array at least one chunk in so many is stored; chunks of zeros are not."""


def save(ledger: Ledger, path: Where) -> None:
    """Write a ledger into a new or empty folder, or to a URL where nothing is; what is written is bitwise what is in memory."""
    folder = location_of(path)
    checks = ledger.checks
    attributes = {
        "settings": dict(ledger.settings),
        "layers": list(checks.layers),
        "check_dims": list(checks.dims),
        "doubts": list(checks.doubts),
        "rows": list(ledger.rows),
    }
    group = schema.create_group(folder, "ledger", attributes)
    try:
        for name, row in {**ledger.rows, "final": ledger.final}.items():
            schema.write_array(group, name, row.values, row.dims, _chunks(row.array.shape, row.array.dtype.itemsize))
        for name, values in ledger.coords.items():
            schema.write_array(group, name, values.astype(_fixed(values)), (name,))
        for name, (values, dims) in _check_arrays(checks).items():
            schema.write_array(group, f"check/{name}", np.asarray(values), dims)
    except OSError as error:
        raise schema.unwritable(folder, error) from error
    schema.replace_file(folder / MARKER, '{"complete": true}')


def _check_arrays(checks: Checks) -> Mapping[str, tuple[np.ndarray, tuple[str, ...]]]:
    return {
        "movement": (checks.movement, checks.dims),
        "path": (checks.path, checks.dims),
        "arithmetic": (checks.arithmetic, checks.dims),
        "by_step": (checks.by_step, ("every_step", "rest")),
        "replay_error": (checks.replay_error, ("every_step", "every_layer")),
        "recipes": (checks.recipes.astype(_fixed(checks.recipes)), ("every_step", "every_block")),
    }


def _chunks(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """Halve the longest side until a chunk is small enough to read on its own."""
    chunk = [max(1, n) for n in shape]
    while chunk and int(np.prod(chunk)) * itemsize > CHUNK_BYTES:
        longest = chunk.index(max(chunk))
        chunk[longest] = -(-chunk[longest] // 2)
    return tuple(chunk)


def _fixed(values: np.ndarray) -> Any:
    """Names are written as variable-length UTF-8, which zarr v3 specifies; numbers as they are."""
    return np.dtypes.StringDType() if values.dtype.kind in "UTO" else values.dtype


def open_ledger(path: Where) -> Ledger:
    """Open a saved ledger; rows are read from disk when they are asked for. StoreError where there is none, or half of one."""
    folder = location_of(path)
    group = schema.open_group(folder, "ledger")
    if not (folder / MARKER).exists():
        raise StoreError("this ledger was not written to its end", where=folder, do="decompose again")
    with reading("the ledger is damaged", folder, do="decompose again"):
        attributes: dict[str, Any] = dict(group.attrs)
        if not set(attributes["rows"]) <= {*ROWS}:
            raise KeyError(*attributes["rows"])
        rows = {name: _row(group, name, folder) for name in attributes["rows"]}
        axes = {axis for row in rows.values() for axis in row.dims}
        coords = {axis: _plain(np.asarray(_array(group, axis, folder)[...])) for axis in sorted(axes & {*KEEPABLE})}
        names = [f.name for f in fields(Checks) if f.name not in ("dims", "layers", "doubts")]
        arrays = {name: _plain(np.asarray(_array(group, f"check/{name}", folder)[...])) for name in names}
        dims, layers, doubts = (tuple(str(word) for word in attributes[name]) for name in ("check_dims", "layers", "doubts"))
        final = _row(group, "final", folder)
        for row in (*rows.values(), final):
            if row.array.shape != tuple(len(coords[axis]) for axis in row.dims):
                raise ValueError("an array of another size than its axes")
        settings = dict(attributes["settings"])
        _check_settings(settings, *arrays["replay_error"].shape)
        return Ledger(rows, coords, final, settings, Checks(**arrays, dims=dims, layers=layers, doubts=doubts))


def _check_settings(told: Mapping[str, Any], steps: int, layers: int) -> None:
    """ValueError or KeyError for settings that a ledger is not judged by."""
    texts = [told[name] for name in ("rule", "dtype", "device", "view", "model", "recorded_model")]
    rounding, anchored = list(told["rounding"]), list(told.get("anchored", ()))
    if not all(isinstance(text, str) for text in texts) or told["dtype"] not in ("float32", "float64"):
        raise ValueError("settings that are no words")
    if len(rounding) != layers or not all(isinstance(r, float | int) for r in rounding):
        raise ValueError("no rounding of every layer")
    if not all(type(step) is int and 0 <= step < steps for step in anchored):
        raise ValueError("no steps of the run")


def _array(group: zarr.Group, name: str, folder: Location) -> zarr.Array:
    """One that takes no more memory than what is stored of it may need."""
    array = group[name]
    if not isinstance(array, zarr.Array):
        raise KeyError(name)
    array = bounded(array)
    chunk = prod(array.chunks) * array.dtype.itemsize
    if chunk > LARGEST or (array.nbytes > LARGEST and array.nbytes > EMPTY * chunk * len(schema.stored(folder, f"{name}/c"))):
        raise ValueError(f"{name} is too large: {array.dtype} {list(array.shape)} in chunks of {list(array.chunks)}")
    return array


def _row(group: zarr.Group, name: str, folder: Location) -> Row:
    array = _array(group, name, folder)
    return Row(tuple(str(d) for d in getattr(array.metadata, "dimension_names", None) or ()), array)


def _plain(values: np.ndarray) -> np.ndarray:
    """Names of one width; ValueError where a long one among many would make all of them long."""
    if values.dtype.kind not in "TO":
        return values
    longest = max(map(len, values.ravel().tolist()), default=0)
    if values.size * longest * np.dtype("U1").itemsize > LARGEST:
        raise ValueError(f"{values.size} names of up to {longest} characters")
    return np.array(values.tolist(), dtype=str)
