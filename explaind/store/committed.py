"""What a run has on disk: attributes, commit marker and arrays, clamped to what the marker vouches for."""

import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import zarr

from explaind.errors import ExplaindError, StoreError
from explaind.store import schema
from explaind.store.checksums import text_checksum
from explaind.store.layout import OPTIONAL, columns, rows
from explaind.store.location import Where, location_of
from explaind.store.manifest import Manifest
from explaind.store.opening import COPY, opened, reading

KEPT = 2
"""Spans of an array that are kept in memory, where a span has several blocks."""


class Committed:
    """Rows of the arrays of a run, by name. Nothing is loaded until it is asked for."""

    def __init__(self, path: Where, spool: str | os.PathLike[str] | None = None) -> None:
        self.path = location_of(path, spool)
        self._group = schema.open_group(self.path, "run")
        self.attributes: Mapping[str, Any] = dict(self._group.attrs)
        attributes = self.attributes
        commit = self._read_commit()
        self.sums: Mapping[str, int] = commit["sums"]
        if self.sums["manifest"] != text_checksum(attributes.get("manifest")):
            raise StoreError(
                "the run's attributes are not what was recorded", where=self.path / "zarr.json", do="restore zarr.json from a copy"
            )
        self.manifest = Manifest.from_json(attributes.get("manifest", {}), str(self.path))
        self.steps: int = commit["steps"]
        self.complete: bool = commit["complete"]
        self._end = self.steps
        self.modes: tuple[tuple[bool, ...], ...] = tuple(commit["modes"])
        if any(len(mode) != len(self.manifest.modules) for mode in self.modes):
            expected, got = f"modes of {len(self.manifest.modules)} modules", f"of {', '.join(str(len(mode)) for mode in self.modes)}"[:200]
            where = self.path / "commit.json"
            raise StoreError("the commit marker is not this run's", where=where, expected=expected, got=got, do="restore it from a copy")
        self._arrays: dict[str, zarr.Array] = {}
        self._known: dict[str, bool] = {}
        self._kept: dict[str, dict[int, np.ndarray]] = {}
        self._check_rows()

    def _read_commit(self) -> dict[str, Any]:
        try:
            commit = json.loads(schema.read_file(self.path, "commit.json"))
            if commit.pop("crc") != text_checksum(commit):
                raise ValueError("another checksum")
            sums = {name: int(crc) for name, crc in commit["checksums"].items()}
            if sums.keys() != {"manifest", "constants"}:
                raise ValueError("no checksums")
            if type(commit["steps"]) is not int or commit["steps"] < 0:
                raise ValueError("no number of steps")
            modes = [tuple(mode) for mode in commit["modes"]]
            if any(type(on) is not bool for mode in modes for on in mode) or type(commit["complete"]) is not bool:
                raise ValueError("no yes or no")
            return {"steps": commit["steps"], "complete": commit["complete"], "modes": modes, "sums": sums}
        except ExplaindError:
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise StoreError(
                "the commit marker is missing or damaged",
                where=self.path / "commit.json",
                got=type(error).__name__,
                do="restore it from a copy of the run",
            ) from error

    def _check_rows(self) -> None:
        """Of every array with a row a step; anchors are missed when they are read."""
        for name, column in columns(self.manifest).items():
            kind = column.dims[0]
            if kind == "anchor" or (name in OPTIONAL and not self._has(name)):
                continue
            need = len(self.stored(0, self.steps + 1)) if kind == "stored" else rows(column, self.steps, 0)
            have = self._array(name).shape[0]
            if have < need:
                raise StoreError(
                    f"rows of {name} are missing",
                    where=self.path,
                    expected=f"{need} for {self.steps} committed steps",
                    got=have,
                    do=COPY,
                )

        self._check_stored()

    def _check_stored(self) -> None:
        """No memory is made for steps on the word of metadata alone: every committed step has checksums, which are never all zero."""
        with reading("the metadata of an array cannot be read", self.path / "checksum_theta"):
            array = self._array("checksum_theta")
            need = -(-(self.steps + 1) // array.chunks[0]) * -(-array.shape[1] // array.chunks[1])
            have = schema.chunks_stored(self.path, "checksum_theta")
        if have < need:
            raise StoreError("chunks of checksum_theta are missing", where=self.path, expected=f"at least {need}", got=have, do=COPY)

    def _has(self, name: str) -> bool:
        if name not in self._known:
            with reading("the metadata of an array cannot be read", self.path / name):
                self._known[name] = name in self._group
        return self._known[name]

    def _array(self, name: str) -> zarr.Array:
        if name not in self._arrays:
            self._arrays[name] = opened(self._group, name, self.manifest, self.path / name)
        return self._arrays[name]

    def _read(self, name: str, rows: slice) -> np.ndarray:
        with reading("a chunk cannot be read", self.path / name):
            array = self._array(name)
            if self.manifest.together == 1 or array.chunks[0] < self.manifest.together or rows.stop is None:
                return np.asarray(array[rows])
            return self._of_spans(name, array, rows.start, rows.stop)

    def _of_spans(self, name: str, array: zarr.Array, start: int, stop: int) -> np.ndarray:
        """Rows of an array whose chunks hold many blocks, of which the last two that were read are kept: a chunk is not read for each."""
        long, kept, found = array.chunks[0], self._kept.setdefault(name, {}), [np.asarray(array[0:0])]
        for first in range(start - start % long, stop, long):
            if first not in kept:
                kept[first] = np.asarray(array[first : min(first + long, array.shape[0])])
            rows = kept[first] = kept.pop(first)  # the newest comes last
            found.append(rows[max(0, start - first) : max(0, stop - first)])
            while len(kept) > KEPT:
                kept.pop(next(iter(kept)))
        return np.concatenate(found)

    def stored(self, start: int, stop: int) -> dict[int, int]:
        """Which of the states [start, stop) are stored, and in which row of theta."""
        if self.manifest.thin is None:
            return {state: state for state in range(start, stop)}
        block = self.manifest.block
        return {state: -(-state // block) for state in range(start, stop) if state % block == 0 or state == self._end}
