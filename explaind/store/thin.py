"""Writing a thin run: parameters and the optimizer's state once a block, and what it takes to live the steps between again.

The parameters after the last step of a block are written with it, so that every committed block ends where something is stored. Until a
block is full its steps stand in the log, of whose parameters only the last few are kept.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from explaind.store import schema
from explaind.store.manifest import Manifest
from explaind.store.row import StepRow
from explaind.store.tail import Record
from explaind.store.writer import Begun, RunWriter

LOGGED = 16
"""Steps after which the log forgets all parameters but the last."""
FORGOTTEN = np.zeros(0, np.float32)


class ThinWriter(RunWriter):
    """A ``RunWriter`` of a manifest with ``thin``; a row's preconditioner and momentum are left out by whoever makes it."""

    def add(self, row: StepRow, theta: np.ndarray) -> None:
        """Take step ``self.steps``, which led to the parameters theta [param]; parameter groups that have not changed are dropped."""
        known = next((r.groups for r in reversed(self._rows) if r.groups is not None), None)
        same = known is not None and row.groups is not None and np.array_equal(known, row.groups)
        row = replace(row, groups=None) if same else row
        record = Record(self.steps, row, theta)
        self._take(record)
        try:
            self._tail.append(record)
            if self._flush_if_full():
                self._tail.restart([])
            elif len(self._rows) % LOGGED == 0:
                self._tail.restart(self._forgetful())
        except OSError as error:
            self.closed = True
            raise schema.unwritable(self.path, error) from error

    def _forgetful(self) -> list[Record]:
        """The steps of the block at hand, the last alone with its parameters."""
        first = self.steps - len(self._rows)
        found = [Record(first + i, row, FORGOTTEN, self._crc_theta[i + 1]) for i, row in enumerate(self._rows)]
        return [*found[:-1], replace(found[-1], theta=self._states[-1], crc=None)]

    def _take(self, record: Record) -> None:
        super()._take(record)
        self._states = self._states[-1:]

    def _thetas(self, states: int) -> dict[str, np.ndarray]:
        return {"checksum_theta": np.stack(self._crc_theta[:states])} if states else {}

    def _flush(self, states: int) -> None:
        """The steps at hand, and the parameters that they led to."""
        now, checksum = self._states[-1:], self._crc_theta[-1:]
        super()._flush(states)
        self._states = now
        try:
            schema.append(self._columns["theta"], now[0][None], self._written["anchors"])
            if self._written["states"] == self._written["steps"]:  # else it was the last of those written
                schema.append(self._columns["checksum_theta"], checksum[0][None], self._written["states"])
        except OSError as error:
            self.closed = True
            raise schema.unwritable(self.path, error) from error

    def _commit(self, complete: bool) -> None:
        self._mark(self._written["steps"], complete)


def writer_of(manifest: Manifest) -> type[RunWriter]:
    """The class that writes such a run."""
    return RunWriter if manifest.thin is None else ThinWriter


def going_on(path: Path, manifest: Manifest, begun: Begun, logged: Sequence[Record] = ()) -> RunWriter:
    """``RunWriter.resumed`` of the class that writes such a run."""
    return writer_of(manifest).resumed(path, manifest, begun, logged)
