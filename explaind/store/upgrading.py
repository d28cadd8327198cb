"""A run of an older schema made one of today's: step by step, each of which adds what the next version asks for and removes nothing.

2 → 3   the arrays gap and precision, where there are none; the manifest with all its fields; checksums of manifest, constants and marker

A step ends with the new version, in one move: one that was interrupted is made again.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from explaind.errors import StoreError
from explaind.store import mirror, schema
from explaind.store.checksums import constants_checksum, text_checksum
from explaind.store.filed import created
from explaind.store.layout import columns, rows_of_chunk
from explaind.store.location import MARKER, Location, inside
from explaind.store.manifest import Manifest
from explaind.store.opening import opened, reading
from explaind.store.reader import open_run
from explaind.store.tail import check_idle
from explaind.store.writer import marker_of


@dataclass(frozen=True)
class Upgraded:
    """What was done."""

    before: int
    """Schema version."""
    after: int
    steps: int
    """Steps of the run, which are what they were."""


def upgrade(path: Location) -> Upgraded:
    """Make a run one of today's schema; one that is already is left alone.

    StoreError where it cannot be read, is being recorded, is in one file, or is of a schema that is not known.
    """
    if isinstance(path, Path) and path.is_dir():
        check_idle(path)
    before = version = _version(path)
    if version not in STEPS:
        return Upgraded(before, before, open_run(path).steps)
    if not isinstance(path, Path):
        raise StoreError("a run at a URL is not upgraded", where=path, do="upgrade a copy of it in a folder, and put that there")
    if path.is_file():
        raise StoreError("a run in one file is not upgraded", where=path, do="import it with the explaind that wrote it, then upgrade it")
    mirror.drop(inside(path, but=["ledgers"]))
    while version in STEPS:
        with reading("the run cannot be upgraded", path):
            manifest = STEPS[version](path)
        version += 1
        _put(path, version, manifest)
    run = open_run(path)
    mirror.keep(path)
    return Upgraded(before, version, run.steps)


def _read(path: Location) -> dict[str, Any]:
    with reading("the run's attributes are damaged", path / "zarr.json"):
        return dict(json.loads(schema.read_file(path, "zarr.json")))


def _version(path: Location) -> int:
    if schema.kind_of(path) != "run":
        raise StoreError("only runs are upgraded", where=path, got=schema.kind_of(path), do="decompose again")
    found = _read(path)["attributes"]["explaind"].get("schema")
    if found != schema.VERSIONS["run"] and found not in STEPS:
        known = ", ".join(map(str, (*STEPS, schema.VERSIONS["run"])))
        raise StoreError("unknown schema version of a run", where=path, expected=f"one of {known}", got=found, do="update explaind")
    return int(found)


def _put(path: Path, version: int, manifest: Manifest) -> None:
    told = _read(path)
    told["attributes"] |= {"explaind": {"kind": "run", "schema": version}, "manifest": manifest.to_json()}
    schema.replace_file(path / "zarr.json", json.dumps(told, indent=2))


def _from_2(path: Path) -> Manifest:
    manifest = Manifest.from_json(_read(path)["attributes"]["manifest"], str(path))
    commit = json.loads(schema.read_file(path, "commit.json"))
    steps, complete, modes = commit["steps"], commit["complete"], [tuple(mode) for mode in commit["modes"]]
    group = zarr.open_group(path, mode="r+", zarr_format=3)
    for name in ("gap", "precision"):
        column = columns(manifest)[name]  # zeros, which are its fill
        try:
            if not (path / name / "zarr.json").exists():
                created({column: rows_of_chunk(column, manifest)}, path)
            array = schema.growing(path)[name]
            schema.extend(array, max(array.shape[0], steps), column.shape)
        except OSError as error:
            raise schema.unwritable(path, error) from error
    constants = sorted((path / "constant").glob("*/zarr.json"))
    values = {schema.unescaped(file.parent.name): _values(group, f"constant/{file.parent.name}", manifest, path) for file in constants}
    prints = _values(group, "fingerprint", manifest, path) if (path / "fingerprint").exists() else None
    sums = {"manifest": text_checksum(manifest.to_json()), "constants": constants_checksum(values, prints)}
    schema.replace_file(path / MARKER, marker_of(steps, complete, modes, sums))
    return manifest


def _values(group: zarr.Group, name: str, manifest: Manifest, path: Path) -> np.ndarray:
    return np.asarray(opened(group, name, manifest, path / name)[...])


STEPS: Mapping[int, Callable[[Path], Manifest]] = {2: _from_2}
"""By the version that each begins with: adds what the next one has, and gives the manifest as that writes it."""
