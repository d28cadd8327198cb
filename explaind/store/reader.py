"""Reading a run: what its arrays mean; committed.py has them."""

import copy
import hashlib
import json
import os
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import zarr

from explaind.errors import RequestError, StoreError
from explaind.store import logs, mirror
from explaind.store.checksums import Chain
from explaind.store.committed import Committed
from explaind.store.damage import damage, sound_steps
from explaind.store.gradients import rows_of
from explaind.store.layout import starts
from explaind.store.location import Where, location_of
from explaind.store.manifest import ROUNDINGS
from explaind.store.opening import COPY, check_claim, opened, reading
from explaind.store.row import StepRow
from explaind.store.schema import unescaped
from explaind.store.spool import log_of
from explaind.store.tail import Record, has_log
from explaind.store.writer import Begun


@dataclass(frozen=True)
class Block:
    """Consecutive steps [start, stop) of a run, in memory."""

    start: int
    theta: np.ndarray  # [state, param], one row more than steps; of a thin run those that are stored
    rows: tuple[StepRow, ...]
    modes: tuple[int, ...]


class Run(Committed):
    """A recorded training, opened for reading. Nothing is loaded until it is asked for."""

    def __repr__(self) -> str:
        m = self.manifest
        return f"Run({str(self.path)!r}: {self.steps} steps of {m.optimizer}, {len(m.layers)} layers, {m.params} parameters)"

    def first(self, steps: int) -> "Run":
        """The same run as if it had ended after so many steps, or where it did."""
        shorter = copy.copy(self)
        for cached in ("identity", "examples", "gaps", "numbers", "starts", "rounding"):
            shorter.__dict__.pop(cached, None)
        shorter.steps = min(steps, self.steps)
        return shorter

    def theta(self, step: int) -> dict[str, np.ndarray]:
        """The parameters before a step (or after the last one, for step = steps), by name, in their own shapes."""
        if not 0 <= step <= self.steps:
            raise RequestError(
                "no such state in the run", where=self.path, expected=f"0 … {self.steps}", got=step, do="choose a recorded step"
            )
        row = self.states(step, step + 1)[0]
        return {a.name: row[a.offset : a.offset + a.size].reshape(a.shape) for a in self.manifest.layers}

    def states(self, start: int, stop: int) -> np.ndarray:
        """theta before steps [start, stop): [state, param]; RequestError for one that a thin run does not store."""
        if len(self.stored(start, stop)) < stop - start:
            raise RequestError(
                "a thin run does not store the parameters before every step",
                where=self.path,
                expected=f"a multiple of {self.manifest.block}, or the last state, {self._end}",
                got=f"{start}" if stop - start == 1 else f"{start} … {stop - 1}",
                do="choose one of these",
            )
        return self.stored_states(start, stop)

    def stored_states(self, start: int, stop: int) -> np.ndarray:
        """theta before those of the steps [start, stop) before which it is stored: [state, param]."""
        rows = list(self.stored(start, stop).values())
        return self._read("theta", slice(rows[0], rows[-1] + 1) if rows else slice(0, 0))

    def some_states(self, count: int) -> list[int]:
        """At most so many of the states that are stored, evenly along the run, the first and the last among them."""
        states = np.array(list(self.stored(0, self.steps + 1)))
        return [int(s) for s in states[np.unique(np.linspace(0, len(states) - 1, min(count, len(states))).round().astype(int))]]

    def checksums(self, start: int, stop: int) -> np.ndarray:
        """Of theta before steps [start, stop), each continued from the one before it: uint32 [state, layer]."""
        return self._read("checksum_theta", slice(start, stop))

    def step_checksums(self, start: int, stop: int) -> np.ndarray:
        """Of all else that steps [start, stop) recorded, continued likewise: uint32 [step]."""
        return self._read("checksum_step", slice(start, stop))

    @cached_property
    def constants(self) -> Mapping[str, np.ndarray]:
        """Frozen parameters and buffers, by name."""
        if not self._has("constant"):
            return {}
        with reading("frozen parameters and buffers cannot be read", self.path / "constant"):
            group = self._group["constant"]
            names = sorted(group.keys()) if isinstance(group, zarr.Group) else []
            arrays = {name: opened(self._group, f"constant/{name}", self.manifest, self.path / "constant" / name) for name in names}
            check_claim(sum(array.nbytes for array in arrays.values()), self.path, "constant")
            return {unescaped(name): np.asarray(array[...]) for name, array in arrays.items()}

    @cached_property
    def fingerprint(self) -> np.ndarray | None:
        """crc32 of each training example, uint32 [example]; None where the recorder was not given the data."""
        return self._read("fingerprint", slice(None)) if self._has("fingerprint") else None

    @cached_property
    def examples(self) -> np.ndarray:
        """The distinct ids that were trained on, sorted: int64 [example]."""
        seen: set[int] = set()
        for start in range(0, self.steps, self.manifest.block):
            ids, part, _ = self._slots(slice(start, min(start + self.manifest.block, self.steps)))
            seen.update(np.unique(ids[part >= 0]).tolist())  # what fills a row up is in no checksum
        return np.array(sorted(seen), dtype=np.int64)

    @cached_property
    def identity(self) -> str:
        """Hash of what was recorded: the manifest, and the last checksums, which are chained to all before them."""
        whole = hashlib.sha256(f"{json.dumps(self.manifest.to_json(), sort_keys=True)} {self.steps}".encode())
        whole.update(self.checksums(self.steps, self.steps + 1).tobytes())
        whole.update(self.step_checksums(max(0, self.steps - 1), self.steps).tobytes())
        return whole.hexdigest()

    @cached_property
    def gaps(self) -> np.ndarray:
        """Training steps without a record that a row stands for, 0 for a step: int64 [step]."""
        return self._read("gap", slice(0, self.steps))

    @cached_property
    def rounding(self) -> list[float]:
        """How far, relative to an update, the training's own arithmetic may be from exact: of its optimizers, and of autocast. [layer]"""
        lowest = float(self._read("precision", slice(0, self.steps)).max(initial=0.0))
        return [max(own, ROUNDINGS * lowest) for own in self.manifest.rounding]

    @cached_property
    def numbers(self) -> np.ndarray:
        """Which step of the training every row is, counted from the recording's begin, and the one behind the last: int64 [step + 1]."""
        return np.concatenate([[0], np.cumsum(np.maximum(self.gaps, 1))])

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """Steps before which the momentum is recorded, ascending: the first of every block, and the one behind every gap."""
        return starts(self.gaps, self.manifest.block)

    @property
    def having_gradients(self) -> np.ndarray:
        """Which layers had a gradient at each step: bool [step, layer]."""
        return self._read("age", slice(0, self.steps)) >= 0

    def _anchor(self, name: str, step: int) -> np.ndarray | None:
        """A row of "momentum" or "filtered"; None where the run has none."""
        index = bisect_left(self.starts, step)
        if not self._has(name) or self.starts[index : index + 1] != (step,):
            return None
        found = self._read(name, slice(index, index + 1))
        if not len(found):
            raise StoreError(f"rows of {name} are missing", where=self.path, expected=f"one for step {step}", got="none", do=COPY)
        return found[0]

    def block(self, start: int, stop: int) -> Block:
        """Steps [start, stop) with everything recorded of them."""
        rows = slice(start, stop)
        batch, part, weight = self._slots(rows)
        hyper, age, mode = (self._read(n, rows) for n in ("hyper", "age", "mode"))
        frozen = self._read("preconditioner", rows) if self._has("preconditioner") else None
        consumed, random = self._read("consumed", rows), self._read("random", rows)
        scalars = self._read("scalar", rows) if self._has("scalar") else None
        gaps, precision = self._read("gap", rows), self._read("precision", rows)
        groups = self._read("groups", rows) if self._has("groups") else None
        crcs = None if self.manifest.gradients is None else self._read("checksum_gradient", rows)
        steps = []
        for i in range(len(batch)):
            used = part[i] >= 0
            steps.append(
                StepRow(
                    batch[i][used],
                    part[i][used],
                    weight[i][used],
                    hyper[i],
                    age[i],
                    self.modes[mode[i]] if 0 <= mode[i] < len(self.modes) else (),
                    None if frozen is None else frozen[i],
                    self._anchor("momentum", start + i),
                    None if scalars is None else scalars[i],
                    None if np.isnan(consumed[i]).any() else consumed[i],
                    random[i][: self.manifest.random_bytes * (1 + part[i].max())] if random[i].any() else None,
                    self._anchor("filtered", start + i),
                    float(precision[i]),
                    _words(self._anchor("state", start + i)),
                    None if groups is None or not groups[i].any() else groups[i][: 1 + np.flatnonzero(groups[i])[-1]],
                    gradients_crc=None if crcs is None else crcs[i : i + 1],
                    gap=int(gaps[i]),
                )
            )
        return Block(start, self.stored_states(start, stop + 1), tuple(steps), tuple(int(m) for m in mode))

    def gradients(self, step: int, start: int, stop: int) -> np.ndarray:
        """Gradients of the losses of examples [start, stop) of a step's batch, their weights left out: [slot, param].

        RequestError where the run stores none (``explaind.record(…, gradients="store")``).
        """
        if self.manifest.gradients is None:
            raise RequestError("the run stores no gradients of examples", where=self.path, do="record it with gradients='store'")
        with reading("a chunk cannot be read", self.path / "gradient"):
            return rows_of(self._array("gradient"), step, start, stop, self.path / "gradient")

    def gradient_checksums(self, start: int = 0, stop: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """How many gradients of examples steps [start, stop) have, by default all, and their crc32: int64 and uint32 [step]."""
        steps = slice(start, self.steps if stop is None else stop)
        return (self._read("part", steps) >= 0).sum(1), self._read("checksum_gradient", steps)

    def _slots(self, rows: slice) -> list[np.ndarray]:
        """batch, part and weight [step, slot]. While a run is written, or after a kill, one may be wider than another, in later rows."""
        found = [self._read(name, rows) for name in ("batch", "part", "weight")]
        wide = min(values.shape[1] for values in found)
        return [values[:, :wide] for values in found]

    def begun(self, steps: int, theta: np.ndarray | None = None) -> Begun:
        """What a writer needs to go on after so many steps; theta: parameters that they led to, where a thin run does not store them."""
        if self.manifest.thin is not None:
            return self._begun_thin(steps, self.states(steps, steps + 1)[0] if theta is None else theta)
        start = steps - steps % self.manifest.span
        rows = self.block(start, steps).rows if steps > start else ()
        states, crcs = self.states(start, steps + 1), self.checksums(start, steps + 1)
        found = [Record(start + i, row, states[i + 1], crcs[i + 1]) for i, row in enumerate(rows)]
        return Begun(start, sum(s < start for s in self.starts), self.chain(start), tuple(found), self.modes, self.sums)

    def _begun_thin(self, steps: int, theta: np.ndarray) -> Begun:
        start = steps - steps % self.manifest.span
        crcs, nothing = self.checksums(start, steps + 1), np.zeros(0, theta.dtype)
        rows = self.block(start, steps).rows if steps > start else ()
        found = [Record(start + i, row, nothing, crcs[i + 1]) for i, row in enumerate(rows)]
        found[-1:] = [Record(record.step, record.row, theta, record.crc) for record in found[-1:]]
        return Begun(start, start // self.manifest.block, self.chain(start), tuple(found), self.modes, self.sums)

    def chain(self, step: int) -> Chain:
        """How far the checksums have come before a step."""
        return Chain(self.checksums(step, step + 1)[0], int(self.step_checksums(step - 1, step)[0]) if step else 0)

    @property
    def logged(self) -> int:
        """Steps behind the committed ones that the tail log of a killed recording still holds; ``explaind repair`` takes them up."""
        return len(logs.behind(self, self.steps).steps)

    def logged_behind(self, steps: int) -> logs.Logged:
        """What the tail log holds of the steps behind so many; StoreError where those are another run's."""
        found = logs.behind(self, steps)
        if found.others:
            raise logs.foreign(self)
        return found

    def log_facts(self) -> tuple[int, str | None]:
        """``logged``; and what is wrong with the log, in words, None where its steps go on from the committed ones."""
        found = logs.behind(self, self.steps)
        fault = logs.foreign(self) if found.others else logs.gap(self) if found.lost else None
        return len(found.steps), None if fault is None else str(fault)

    def is_current(self) -> bool:
        """Whether the commit marker still tells of as many steps."""
        return bool(self._read_commit()["steps"] == self.steps)

    def sound(self) -> int:
        """Steps up to the first fault of what is stored: all of them where ``damage`` finds none but in frozen parameters or buffers."""
        return sound_steps(self)

    def damage(self) -> list[str]:
        """Where stored bytes are not what was recorded, in words; empty when every checksum holds."""
        self._kept.clear()
        behind = self.forgotten()
        older = f"{behind} steps stand behind those that the commit marker tells of, and there is no log: the marker is an older one"
        found, log = damage(self), self.log_facts()[1]
        return [*found, *([older] if behind else []), *([log] if log else [])]

    def forgotten(self) -> int:
        """Steps behind the committed ones that nobody vouches for: whoever writes them has a log, and takes them away when it ends."""
        log = log_of(self.path, self.attributes)  # at a URL that of another machine is not known
        if log is None or self.path.is_file() or has_log(log):
            return 0
        behind = self._array("checksum_step").shape[0] - self._read_commit()["steps"]  # which may be another one by now
        return 0 if has_log(log) else max(0, behind)


def _words(state: np.ndarray | None) -> np.ndarray | None:
    """An optimizer's state, which says how long it is."""
    return None if state is None else state[: int(state[0])]


def open_run(path: Where, spool: str | os.PathLike[str] | None = None) -> Run:
    """Open a recorded run, in its folder, in the zip that it was exported to, or at a URL such as s3://bucket/run.

    spool: of a run at a URL, where that was given to ``record``. StoreError where there is none, or one of another schema version.
    """
    place = location_of(path, spool)
    try:
        return Run(place)
    except StoreError as error:
        if not (changed := sorted(mirror.changed(place))):
            raise
        got = f"another {', '.join(changed)}: {error}"
        raise StoreError("the run's metadata are damaged", where=place, got=got, do=mirror.BACK) from error
