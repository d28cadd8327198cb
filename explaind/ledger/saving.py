"""A ledger on disk: a zarr v3 group with one array a row, named dimensions and coordinates; opened lazily."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import numpy as np
import zarr

from explaind.errors import StoreError
from explaind.ledger.ledger import Checks, Ledger, Row
from explaind.store import schema
from explaind.store.location import MARKER, Where, location_of

CHUNK_BYTES = 4 << 20


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
    attributes: dict[str, Any] = dict(group.attrs)
    try:
        rows = {name: _row(group, name) for name in attributes["rows"]}
        axes = {axis for row in rows.values() for axis in row.dims}
        coords = {axis: _plain(np.asarray(_array(group, axis)[...])) for axis in axes}
        names = [f.name for f in fields(Checks) if f.name not in ("dims", "layers", "doubts")]
        arrays = {name: _plain(np.asarray(_array(group, f"check/{name}")[...])) for name in names}
        checks = Checks(
            **arrays, dims=tuple(attributes["check_dims"]), layers=tuple(attributes["layers"]), doubts=tuple(attributes["doubts"])
        )
        return Ledger(rows, coords, _row(group, "final"), attributes["settings"], checks)
    except (KeyError, TypeError) as error:
        raise StoreError("the ledger is damaged", where=folder, got=repr(error), do="decompose again") from error


def _array(group: zarr.Group, name: str) -> zarr.Array:
    array = group[name]
    if not isinstance(array, zarr.Array):
        raise KeyError(name)
    return array


def _row(group: zarr.Group, name: str) -> Row:
    array = _array(group, name)
    return Row(tuple(str(d) for d in getattr(array.metadata, "dimension_names", None) or ()), array)


def _plain(values: np.ndarray) -> np.ndarray:
    return np.array(values.tolist(), dtype=str) if values.dtype.kind in "TO" else values
