"""Writing a thin run: parameters and the optimizer's state once a block, and what it takes to live the steps between again.

The parameters after the last step of a block are written with it, so that every committed block ends where something is stored. Until a
block is full its steps stand in the log, of whose parameters only the last few are kept.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from explaind.store.location import Location, inside
from explaind.store.manifest import Manifest
from explaind.store.row import StepRow, Vector
from explaind.store.span import Span, whole, write_vectors
from explaind.store.tail import Place, Record
from explaind.store.writer import Begun, RunWriter

LOGGED = 16
"""Steps after which the log forgets all parameters but the last."""
FORGOTTEN = np.zeros(0, np.float32)


class ThinWriter(RunWriter):
    """A ``RunWriter`` of a manifest with ``thin``; a row's preconditioner and momentum are left out by whoever makes it."""

    _known: np.ndarray | None = None

    def add(self, row: StepRow, theta: Vector) -> None:
        """Take step ``self.steps``, which led to the parameters theta [param]; parameter groups that have not changed are dropped."""
        known = self._known if self._span.entries else None
        same = known is not None and row.groups is not None and np.array_equal(known, row.groups)
        super().add(replace(row, groups=None) if same else row, theta)
        if self._span.entries and len(self._span.entries) % LOGGED == 0:
            with self._guarded:
                self._forget()

    def _take(self, record: Record, places: Mapping[str, Place] | None = None) -> Record:
        linked = super()._take(record, places)
        self._known = self._known if record.row.groups is None else record.row.groups
        return linked

    def _forget(self) -> None:
        """Of the steps at hand, the last alone keeps its parameters in the log."""
        span = self._span
        entries, old = span.entries, span.log

        def kept() -> Iterator[Record]:
            before = span.chain
            for i, entry in enumerate(entries):
                theta = old.read(entry.places["theta"]) if entry is entries[-1] else FORGOTTEN
                yield Record(span.start + i, whole(entry, old), theta, entry.chain.theta, self._links(before, entry.chain))
                before = entry.chain

        span.log = self._tail.begin(self._number, kept())
        span.entries = [entry._replace(places=places) for entry, places in zip(entries, span.log.places, strict=True)]

    def _usable(self, begun: Begun) -> int:
        """Whole blocks: the parameters in the middle of one are in the log."""
        return begun.start

    def _opening(self, last: Record) -> list[Record]:
        """Nothing: the parameters before a span are written with the span before it."""
        return []

    def _write_states(self, span: Span, end: bool, anchors: int) -> int:
        """The parameters that its last step led to."""
        if span.entries:
            self._columns["checksum_theta"].append(span.checksums(), span.start)
            write_vectors(self._columns["theta"], anchors, span.log, span.states()[-1:])
        return span.stop


def writer_of(manifest: Manifest) -> type[RunWriter]:
    """The class that writes such a run."""
    return RunWriter if manifest.thin is None else ThinWriter


def going_on(path: Location, manifest: Manifest, begun: Begun, logged: Sequence[Record] = ()) -> RunWriter:
    """``RunWriter.resumed`` of the class that writes such a run; StoreError where a link stands in what is written."""
    return writer_of(manifest).resumed(inside(path, but=["ledgers"]), manifest, begun, logged)
