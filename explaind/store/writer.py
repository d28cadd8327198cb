"""Writing a run: rows are buffered and land in whole chunks, one block of steps at a time, each followed by a commit marker."""

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import zarr

from explaind.errors import StoreError
from explaind.store import schema
from explaind.store.layout import columns, rows_of_chunk
from explaind.store.manifest import Layer, Manifest
from explaind.store.row import StepRow
from explaind.store.tail import Record, Tail

ANCHORED = ("momentum", "filtered", "state")
"""Arrays with a row for every stretch of steps."""


def theta_checksum(theta: np.ndarray, layers: Sequence[Layer], previous: np.ndarray) -> np.ndarray:
    """crc32 of each layer's bytes, continued from the previous state's: a row that is changed, removed or moved breaks the chain."""
    crcs = [zlib.crc32(theta[a.offset : a.offset + a.size].tobytes(), int(p)) for a, p in zip(layers, previous, strict=True)]
    return np.array(crcs, dtype=np.uint32)


def step_checksum(row: StepRow, mode: int, previous: int, thin: np.ndarray | None = None) -> int:
    """crc32 of everything else that a step recorded, continued from the previous step's; thin: with theta's checksum before the step."""
    gap = np.int64(row.gap) if row.gap else None
    precision = np.float64(row.precision) if row.precision else None
    for values in (
        row.batch,
        row.part,
        row.weight,
        row.hyper,
        row.age,
        np.int32(mode),
        row.preconditioner,
        row.anchor,
        row.scalars,
        row.consumed,
        row.random,
        row.filtered,
        gap,
        precision,
        row.state,
        row.groups,
        thin,
    ):
        if values is not None:
            previous = zlib.crc32(values.tobytes(), previous)
    return previous


@dataclass(frozen=True)
class Begun:
    """What a run holds of the block that it goes on with: states has one row more than rows."""

    start: int
    anchors: int
    """Momenta that the run holds of the blocks before."""
    states: np.ndarray
    rows: tuple[StepRow, ...]
    modes: tuple[tuple[bool, ...], ...]
    crc_theta: np.ndarray
    crc_step: np.ndarray
    last_crc: int
    records: tuple[Record, ...] = ()
    """Of a thin run: the steps behind `start`, which its log holds until their block is full."""


class RunWriter:
    """Owns the folder of a run while it is recorded."""

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        theta: np.ndarray,
        constants: Mapping[str, np.ndarray],
        fingerprint: np.ndarray | None,
        momentum: bool,
        preconditioner: bool,
        codec: str = "bitdelta",
    ) -> None:
        """codec: of theta and the preconditioner, out of schema.CHOICES."""
        self.path, self.manifest = path, manifest
        self.steps = 0
        self.closed = False
        self._written = {"states": 0, "steps": 0, "anchors": 0}
        self._modes: list[tuple[bool, ...]] = []
        self._rows: list[StepRow] = []
        self._states = [theta]
        self._crc_theta = [theta_checksum(theta, manifest.layers, np.zeros(len(manifest.layers), np.uint32))]
        self._crc_step: list[int] = []
        self._last_crc = 0
        group = schema.create_group(path, "run", {"manifest": manifest.to_json()})
        try:
            self._columns = self._create(group, momentum, preconditioner, codec)
            for name, values in constants.items():
                schema.write_array(group, f"constant/{name}", values, tuple(f"{name}.{i}" for i in range(values.ndim)))
            if fingerprint is not None:
                schema.write_array(group, "fingerprint", fingerprint, ("example",))
            # The first state is written at once, so that a run that is killed in its first block still opens.
            schema.append(self._columns["theta"], theta[None], 0)
            schema.append(self._columns["checksum_theta"], self._crc_theta[0][None], 0)
            self._tail = Tail(path)
        except OSError as error:
            raise schema.unwritable(path, error) from error
        self._commit(complete=False)

    @classmethod
    def resumed(cls, path: Path, manifest: Manifest, begun: "Begun", logged: Sequence[Record] = ()) -> "RunWriter":
        """Go on with a run after what it holds of its last block, and what was logged behind that; other steps are forgotten.

        Its arrays keep the codec that they have.
        """
        self = cls.__new__(cls)
        self.path, self.manifest, self.steps, self.closed = path, manifest, begun.start + len(begun.rows), False
        self._written = {"states": begun.start, "steps": begun.start, "anchors": begun.anchors}
        self._modes, self._rows, self._states = list(begun.modes), list(begun.rows), list(begun.states)
        self._crc_theta, self._crc_step = list(begun.crc_theta), begun.crc_step.tolist()
        self._last_crc = begun.last_crc
        self._columns, self._tail = schema.growing(path), Tail(path)
        logged = (*begun.records, *logged)
        if begun.records:
            self._tail.restart(logged)  # before the marker gives up what stands behind the last whole block
        self._mark(self.steps, complete=False)
        for record in logged:
            self._take(record)
            self._flush_if_full()
        self._tail.restart(logged[-1:] if logged and not self._rows else logged)
        return self

    @property
    def block(self) -> int:
        """Steps between two commits."""
        return self.manifest.block

    def _create(self, group: zarr.Group, momentum: bool, preconditioner: bool, codec: str) -> dict[str, zarr.Array]:
        left = {name for name, kept in (("momentum", momentum), ("preconditioner", preconditioner)) if not kept}
        kept = {name: column for name, column in columns(self.manifest, codec).items() if name not in left}
        return {name: schema.create_column(group, column, rows_of_chunk(column, self.manifest.block)) for name, column in kept.items()}

    def add(self, row: StepRow, theta: np.ndarray) -> None:
        """Take step ``self.steps``, which led to the parameters theta [param]."""
        record = Record(self.steps, row, theta)
        self._take(record)
        try:
            self._tail.append(record)
            if self._flush_if_full():
                self._tail.restart([record])
        except OSError as error:
            self.closed = True
            raise schema.unwritable(self.path, error) from error

    def _flush_if_full(self) -> bool:
        full = len(self._rows) == self.manifest.block
        if full:
            # The last state stays in memory, and in the log: it opens the next block's whole chunk.
            self._flush(len(self._crc_theta) - 1)
            self._commit(complete=False)
        return full

    def _take(self, record: Record) -> None:
        row, before = record.row, self._crc_theta[-1]
        if row.mode not in self._modes:
            self._modes.append(row.mode)
        self._last_crc = step_checksum(row, self._modes.index(row.mode), self._last_crc, None if self.manifest.thin is None else before)
        self._crc_step.append(self._last_crc)
        self._crc_theta.append(theta_checksum(record.theta, self.manifest.layers, before) if record.crc is None else record.crc)
        self._rows.append(row)
        self._states.append(record.theta)
        self.steps += 1

    def close(self, complete: bool = True) -> None:
        """Write what is still in memory, the last partial block included; safe to call twice."""
        if self.closed:
            return
        self.closed = True
        self._flush(len(self._crc_theta))
        self._commit(complete)
        self._tail.close(remove=True)

    def _flush(self, states: int) -> None:
        at, rows = self._written, self._rows
        slots = max((len(r.batch) for r in rows), default=1)

        def padded(name: str, fill: float) -> np.ndarray:
            return np.stack([np.pad(getattr(r, name), (0, slots - len(r.batch)), constant_values=fill) for r in rows])

        values = self._thetas(states)
        if rows:
            values |= {"batch": padded("batch", -1), "part": padded("part", -1), "weight": padded("weight", 0)}
            values |= {"hyper": np.stack([r.hyper for r in rows]), "age": np.stack([r.age for r in rows])}
            values |= {
                "mode": np.array([self._modes.index(r.mode) for r in rows]),
                "checksum_step": np.array(self._crc_step, dtype=np.uint32),
                "gap": np.array([r.gap for r in rows]),
                "precision": np.array([r.precision for r in rows]),
            }
            if "scalar" in self._columns:
                values["scalar"] = np.stack([r.scalars for r in rows if r.scalars is not None])
            nothing = np.full((len(self.manifest.layers), 2), np.nan)
            values["consumed"] = np.stack([nothing if r.consumed is None else r.consumed for r in rows])
            values["random"] = _padded([r.random for r in rows])
            if "preconditioner" in self._columns:
                values["preconditioner"] = np.stack([r.preconditioner for r in rows if r.preconditioner is not None])
            if "groups" in self._columns:
                values["groups"] = _padded([r.groups for r in rows])
            for name, anchors in zip(
                ANCHORED, ([r.anchor for r in rows], [r.filtered for r in rows], [r.state for r in rows]), strict=True
            ):
                found = [anchor for anchor in anchors if anchor is not None]
                values |= {name: np.stack(found)} if found and name in self._columns else {}
        start = {"theta": at["states"], "checksum_theta": at["states"], **dict.fromkeys(ANCHORED, at["anchors"])}
        try:
            for name, array in values.items():
                schema.append(self._columns[name], array, start.get(name, at["steps"]))
        except OSError as error:
            self.closed = True
            raise schema.unwritable(self.path, error) from error
        self._written = {
            "states": at["states"] + states,
            "steps": at["steps"] + len(rows),
            "anchors": at["anchors"] + max(len(values.get(name, ())) for name in ANCHORED),
        }
        self._states, self._crc_theta = self._states[states:], self._crc_theta[states:] or self._crc_theta[-1:]
        self._rows, self._crc_step = [], []

    def _thetas(self, states: int) -> dict[str, np.ndarray]:
        """What is written of so many states."""
        return {"theta": np.stack(self._states[:states]), "checksum_theta": np.stack(self._crc_theta[:states])}

    def _commit(self, complete: bool) -> None:
        # A step can be used when the state that it leads to is on disk too.
        self._mark(max(0, min(self._written["steps"], self._written["states"] - 1)), complete)

    def _mark(self, steps: int, complete: bool) -> None:
        text = json.dumps({"steps": steps, "complete": complete, "modes": self._modes})
        try:
            schema.replace_file(self.path / "commit.json", text)
        except StoreError:
            self.closed = True
            raise


def _padded(rows: Sequence[np.ndarray | None]) -> np.ndarray:
    """uint8 [row, longest], at least one wide."""
    wide = max(1, *(0 if row is None else len(row) for row in rows))
    return np.stack([np.pad(np.zeros(0, np.uint8) if row is None else row, (0, wide - (0 if row is None else len(row)))) for row in rows])
