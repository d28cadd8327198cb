"""Reading a run: everything is clamped to what the commit marker vouches for."""

import copy
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from explaind.errors import RequestError, StoreError
from explaind.store import schema
from explaind.store.manifest import Manifest
from explaind.store.row import StepRow
from explaind.store.tail import following, records
from explaind.store.writer import Begun, step_checksum, theta_checksum


@dataclass(frozen=True)
class Block:
    """Consecutive steps [start, stop) of a run, in memory."""

    start: int
    theta: np.ndarray  # [state, param], one row more than steps
    rows: tuple[StepRow, ...]
    modes: tuple[int, ...]


class Run:
    """A recorded training, opened for reading. Nothing is loaded until it is asked for."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._group = schema.open_group(self.path, "run")
        attributes: dict[str, Any] = dict(self._group.attrs)
        self.manifest = Manifest.from_json(attributes.get("manifest", {}), str(self.path))
        commit = self._read_commit()
        self.steps: int = commit["steps"]
        self.complete: bool = commit["complete"]
        self.modes: tuple[tuple[bool, ...], ...] = tuple(tuple(m) for m in commit["modes"])
        self._check_rows()

    def _read_commit(self) -> dict[str, Any]:
        try:
            commit = json.loads((self.path / "commit.json").read_text())
            return {"steps": int(commit["steps"]), "complete": bool(commit["complete"]), "modes": list(commit["modes"])}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StoreError(
                "the commit marker is missing or damaged",
                where=self.path / "commit.json",
                got=type(error).__name__,
                do="restore it from a copy of the run",
            ) from error

    def _check_rows(self) -> None:
        for name, need in (("theta", self.steps + 1), ("batch", self.steps), ("hyper", self.steps), ("age", self.steps)):
            have = self._array(name).shape[0]
            if have < need:
                raise StoreError(
                    f"rows of {name} are missing",
                    where=self.path,
                    expected=f"{need} for {self.steps} committed steps",
                    got=have,
                    do="restore the run from a copy",
                )

    def _array(self, name: str) -> zarr.Array:
        try:
            array = self._group[name]
        except KeyError as error:
            raise StoreError("an array of the run is missing", where=self.path / name, do="restore the run from a copy") from error
        if not isinstance(array, zarr.Array):
            raise StoreError("a group stands where an array should be", where=self.path / name, do="restore the run from a copy")
        return array

    def _read(self, name: str, rows: slice) -> np.ndarray:
        try:
            return np.asarray(self._array(name)[rows])
        except (OSError, RuntimeError, ValueError) as error:
            raise StoreError("a chunk cannot be read", where=self.path / name, got=error, do="restore the run from a copy") from error

    def __repr__(self) -> str:
        m = self.manifest
        return f"Run({str(self.path)!r}: {self.steps} steps of {m.optimizer}, {len(m.layers)} layers, {m.params} parameters)"

    def first(self, steps: int) -> "Run":
        """The same run as if it had ended after so many steps, or where it did."""
        shorter = copy.copy(self)
        for cached in ("identity", "examples"):
            shorter.__dict__.pop(cached, None)
        shorter.steps = min(steps, self.steps)
        return shorter

    def theta(self, step: int) -> dict[str, np.ndarray]:
        """The parameters before a step (or after the last one, for step = steps), by name, in their own shapes."""
        if not 0 <= step <= self.steps:
            raise RequestError(
                "no such state in the run", where=self.path, expected=f"0 … {self.steps}", got=step, do="choose a recorded step"
            )
        row = self._read("theta", slice(step, step + 1))[0]
        return {a.name: row[a.offset : a.offset + a.size].reshape(a.shape) for a in self.manifest.layers}

    def states(self, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) of theta: [state, param]."""
        return self._read("theta", slice(start, stop))

    @cached_property
    def constants(self) -> Mapping[str, np.ndarray]:
        """Frozen parameters and buffers, by name."""
        if "constant" not in self._group:
            return {}
        group = self._group["constant"]
        return {name: np.asarray(array[...]) for name, array in group.arrays()} if isinstance(group, zarr.Group) else {}

    @cached_property
    def fingerprint(self) -> np.ndarray | None:
        """crc32 of each training example, uint32 [example]; None where the recorder was not given the data."""
        return self._read("fingerprint", slice(None)) if "fingerprint" in self._group else None

    @cached_property
    def examples(self) -> np.ndarray:
        """The distinct ids that were trained on, sorted: int64 [example]."""
        seen: set[int] = set()
        for start in range(0, self.steps, self.manifest.block):
            seen.update(np.unique(self._read("batch", slice(start, min(start + self.manifest.block, self.steps)))).tolist())
        return np.array(sorted(seen - {-1}), dtype=np.int64)

    @cached_property
    def identity(self) -> str:
        """Hash of what was recorded: the manifest, and the last checksums, which are chained to all before them."""
        whole = hashlib.sha256(f"{json.dumps(self.manifest.to_json(), sort_keys=True)} {self.steps}".encode())
        whole.update(self._read("checksum_theta", slice(self.steps, self.steps + 1)).tobytes())
        whole.update(self._read("checksum_step", slice(max(0, self.steps - 1), self.steps)).tobytes())
        return whole.hexdigest()

    def anchor(self, step: int) -> np.ndarray | None:
        """Momentum [param] before the first step of a block; None for an optimizer without."""
        if "momentum" not in self._group:
            return None
        index = step // self.manifest.block
        return self._read("momentum", slice(index, index + 1))[0]

    def block(self, start: int, stop: int) -> Block:
        """Steps [start, stop) with everything recorded of them."""
        rows = slice(start, stop)
        batch, part, weight = (self._read(n, rows) for n in ("batch", "part", "weight"))
        hyper, age, mode = (self._read(n, rows) for n in ("hyper", "age", "mode"))
        frozen = self._read("preconditioner", rows) if "preconditioner" in self._group else None
        consumed, random = self._read("consumed", rows), self._read("random", rows)
        scalars = self._read("scalar", rows) if "scalar" in self._group else None
        steps = []
        for i in range(len(batch)):
            used = part[i] >= 0
            first = (start + i) % self.manifest.block == 0
            steps.append(
                StepRow(
                    batch[i][used],
                    part[i][used],
                    weight[i][used],
                    hyper[i],
                    age[i],
                    self.modes[mode[i]] if mode[i] < len(self.modes) else (),
                    None if frozen is None else frozen[i],
                    self.anchor(start + i) if first else None,
                    None if scalars is None else scalars[i],
                    None if np.isnan(consumed[i]).any() else consumed[i],
                    random[i][: self.manifest.random_bytes * (1 + part[i].max())] if random[i].any() else None,
                )
            )
        return Block(start, self._read("theta", slice(start, stop + 1)), tuple(steps), tuple(int(m) for m in mode))

    def begun(self, steps: int) -> Begun:
        """What a writer needs to go on after so many steps."""
        start = steps - steps % self.manifest.block
        rows = self.block(start, steps).rows if steps > start else ()
        crc_step = self._read("checksum_step", slice(start, steps))
        last = self._read("checksum_step", slice(steps - 1, steps)) if steps else np.zeros(1)
        states, crc_theta = self.states(start, steps + 1), self._read("checksum_theta", slice(start, steps + 1))
        return Begun(start, states, rows, self.modes, crc_theta, crc_step, int(last[0]))

    @property
    def logged(self) -> int:
        """Steps behind the committed ones that the tail log of a killed recording still holds; ``explaind repair`` takes them up."""
        found = following(records(self.path), self.steps)
        return len(found)

    def sound(self) -> int:
        """Steps up to the first fault of what is stored: all of them where ``damage`` finds none."""
        found, block = 0, self.manifest.block
        try:
            for start in range(0, self.steps + 1, block):
                shorter = self.first(min(start + block, self.steps))
                if shorter.damage():
                    break
                found = shorter.steps
            while found < self.steps and not self.first(found + 1).damage():
                found += 1
        except StoreError:
            pass
        return found

    def damage(self) -> list[str]:
        """Where stored bytes are not what was recorded, in words; empty when every checksum holds."""
        found: list[str] = []
        want_theta = self._read("checksum_theta", slice(0, self.steps + 1))
        want_step = self._read("checksum_step", slice(0, self.steps))
        previous = np.zeros(len(self.manifest.layers), np.uint32)
        for start in range(0, self.steps + 1, self.manifest.block):
            for i, theta in enumerate(self.states(start, min(start + self.manifest.block, self.steps + 1)), start):
                crc = theta_checksum(theta, self.manifest.layers, previous)
                wrong = [a.name for a, c, w in zip(self.manifest.layers, crc, want_theta[i], strict=True) if c != w]
                found += [_theta_words(i, wrong, len(crc))] if wrong else []
                previous = want_theta[i]
        crc_step = 0
        for start in range(0, self.steps, self.manifest.block):
            block = self.block(start, min(start + self.manifest.block, self.steps))
            for i, (row, mode) in enumerate(zip(block.rows, block.modes, strict=True), start):
                if step_checksum(row, mode, crc_step) != want_step[i]:
                    found.append(
                        f"the record of step {i} is not what was recorded (batch, weights, hyper-parameters or preconditioner), "
                        "or a step before it was removed"
                    )
                crc_step = int(want_step[i])
        return found


def _theta_words(state: int, wrong: list[str], layers: int) -> str:
    if len(wrong) == layers and layers > 1:
        return f"a step was removed, inserted or exchanged before state {state}: no tensor of theta continues the record there"
    return f"theta before step {state} is not what was recorded: {', '.join(wrong)} changed on disk"


def open_run(path: str | os.PathLike[str]) -> Run:
    """Open a recorded run; StoreError where there is none, or one of another schema version."""
    return Run(path)
