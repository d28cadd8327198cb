"""Writing a run: every step goes to a log at once; behind the training, spans of steps are made into whole chunks and committed.

A thread of its own reads a span back from the log, chunk by chunk. So no step is kept in memory, and a disk that is slower than the
training holds it up, a span later; nothing is lost or changes its order.
"""

import json
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType

import numpy as np

from explaind.store import mirror, schema, spool
from explaind.store.checksums import Chain, constants_checksum, crc32, step_checksum, text_checksum, theta_checksum
from explaind.store.durable import lowest, sync_tree
from explaind.store.filed import created, growing, settle, write_finished
from explaind.store.growing import Growing
from explaind.store.layout import columns, rows, rows_of_chunk
from explaind.store.location import Location
from explaind.store.manifest import Manifest
from explaind.store.remote import Remote
from explaind.store.row import StepRow, Vector, between
from explaind.store.span import ANCHORED, Entry, Span, light, write_vectors
from explaind.store.tail import Links, Place, Record

AHEAD = 64
"""Steps that the array of gradients is made longer by at once; readers go by the marker."""


@dataclass(frozen=True)
class Begun:
    """What a run holds of the span that it goes on with."""

    start: int
    anchors: int
    """Momenta that the run holds of the spans before."""
    chain: Chain
    """Before step `start`."""
    records: tuple[Record, ...]
    """The steps from there on."""
    modes: tuple[tuple[bool, ...], ...]
    sums: Mapping[str, int]
    """Checksums of what was written once."""


class RunWriter:
    """Owns the folder of a run while it is recorded."""

    def __init__(
        self,
        path: Location,
        manifest: Manifest,
        theta: Vector,
        constants: Mapping[str, np.ndarray],
        fingerprint: np.ndarray | None,
        momentum: bool,
        preconditioner: bool,
        codec: str = "bitdelta",
    ) -> None:
        """codec: of theta, momentum and the preconditioner, out of schema.CHOICES."""
        crc = theta_checksum(theta, manifest.layers, np.zeros(len(manifest.layers), np.uint32))
        self._set(path, manifest, 0, 0, [])
        known = lowest(path) if isinstance(path, Path) else None
        name, self._tail = spool.begin(path, {"manifest": manifest.to_json()})
        self._run = text_checksum(name)
        with self._guarded:
            self._columns = self._create(momentum, preconditioner, codec)
            words = {schema.escaped(name): values for name, values in constants.items()}
            finished = {f"constant/{word}": (values, [f"{word}.{i}" for i in range(values.ndim)]) for word, values in words.items()}
            write_finished(finished | ({} if fingerprint is None else {"fingerprint": (fingerprint, ["example"])}), path)
            # The first state is written at once, so that a run that is killed in its first span still opens.
            self._write_first(theta)
            self._columns["checksum_theta"].append(crc[None], 0)
            settle(self._columns.values(), path, synced=False)
            if isinstance(path, Path) and known is not None:
                sync_tree(path, known)
            self._chain = Chain(crc, 0)
            self._span = Span(0, self._tail.begin(0, ()), self._chain)
            self._sums = {"manifest": text_checksum(manifest.to_json()), "constants": constants_checksum(constants, fingerprint)}
            self._mark(0, complete=False, modes=())

    def _write_first(self, theta: Vector) -> None:
        """Its first state, piece by piece: it may be large."""

        def read(values: np.ndarray, _: int, start: int) -> None:
            values[0] = between(theta, start, start + values.shape[1])

        self._columns["theta"].stream(0, 1, theta.size, read)

    def _set(self, path: Location, manifest: Manifest, steps: int, anchors: int, modes: list[tuple[bool, ...]]) -> None:
        self.path, self.manifest, self.steps, self.closed = path, manifest, steps, False
        self.block, self._full = manifest.block, manifest.span
        """Steps between two anchors, and between two commits."""
        self._anchors, self._modes = anchors, modes
        self._columns = dict[str, Growing]()
        self._marked: str | None = None
        # At a URL nothing else tells the markers of two writers of the same training apart.
        self._signed = {"writer": secrets.token_hex(8)} if isinstance(path, Remote) else {}
        self._number = steps // manifest.span
        self._writing: Future[None] | None = None
        self._thread = ThreadPoolExecutor(1, "explaind-writer")
        self._guarded: _Guarded = _Guarded(self)

    @classmethod
    def resumed(cls, path: Location, manifest: Manifest, begun: Begun, logged: Sequence[Record] = ()) -> "RunWriter":
        """Go on with a run after what it holds of its last span, and what was logged behind that; other steps are forgotten.

        Its arrays keep the codec that they have.
        """
        self = cls.__new__(cls)
        self._set(path, manifest, begun.start, begun.anchors, list(begun.modes))
        self._columns = {name: growing(array, path) for name, array in schema.growing(path).items()}
        name, self._tail = spool.go_on(path)
        self._run, self._sums = text_checksum(name), dict(begun.sums)
        known = list(self._linked([*begun.records, *logged], begun.chain))
        now, later = known[: manifest.span], known[manifest.span :]
        with self._guarded:
            mirror.drop(path)
            schema.tidy(path)
            for array in self._columns.values():
                array.tidy()
            # The log holds all that is kept again before the marker gives up what stands behind it, and the other log what it has.
            log = self._tail.begin(self._number, known)
            self._chain = begun.chain
            self._span = Span(begun.start, log, self._chain)
            self._mark(self._usable(begun), complete=False, modes=begun.modes)
            for record, places in zip(now, log.places, strict=False):
                self._take(record, places)
            if len(now) < manifest.span:
                self._tail.begin(self._number + 1, ())  # what it holds is older
            else:
                self._turn(now[-1], later)
                self._wait()
        return self

    def _usable(self, begun: Begun) -> int:
        """Steps that a reader finds in the arrays of what is gone on with."""
        return begun.start + len(begun.records)

    def _create(self, momentum: bool, preconditioner: bool, codec: str) -> dict[str, Growing]:
        left = {name for name, kept in (("momentum", momentum), ("preconditioner", preconditioner)) if not kept}
        kept = {name: column for name, column in columns(self.manifest, codec).items() if name not in left}
        return created({column: rows_of_chunk(column, self.manifest) for column in kept.values()}, self.path)

    @property
    def crc_theta(self) -> np.ndarray:
        """Of the parameters after the last step, continuing the one of those before it: uint32 [layer]."""
        return self._chain.theta

    def add(self, row: StepRow, theta: Vector) -> None:
        """Take step ``self.steps``, which led to the parameters theta [param]; neither is looked at afterwards.

        StoreError when the disk refuses this step, or those that are being written behind it.
        """
        try:  # as ``_guarded``, which every step would have to enter and leave
            if self._writing is not None and self._writing.done():
                self._writing.result()
            record = self._take(Record(self.steps, row if self.manifest.gradients is None else self._without_gradients(row), theta))
            if len(self._span.entries) >= self._full:
                self._turn(record)
        except Exception as error:
            self._over(error)
            raise

    def _without_gradients(self, row: StepRow) -> StepRow:
        """The step as it is logged: before it is, the gradients of its examples stand in whole chunks, of their own."""
        nothing = np.zeros((0, self.manifest.params), self.manifest.gradients)
        values = nothing if row.gradients is None else row.gradients
        self._columns["gradient"].put(self.steps, values, AHEAD)
        return replace(row, gradients=None, gradients_crc=np.array([crc32(values)], np.uint32))

    def _take(self, record: Record, places: Mapping[str, Place] | None = None) -> Record:
        """Into the log and the span, linked to the step before it; places: where the log has it already."""
        mode, chain = self._behind(record, self._chain)
        step, row, theta, crc, _ = record
        linked, span = Record(step, row, theta, crc, self._links(self._chain, chain)), self._span
        where = span.log.append(linked) if places is None else places
        span.entries.append(Entry(light(row), mode, chain, where))
        self.steps, self._chain = step + 1, chain
        return linked

    def _behind(self, record: Record, before: Chain) -> tuple[int, Chain]:
        """Its mode, and how far the checksums come with it."""
        row, manifest, modes = record.row, self.manifest, self._modes
        if row.mode not in modes:
            modes.append(row.mode)
        mode = modes.index(row.mode)
        crc = theta_checksum(record.theta, manifest.layers, before.theta) if record.crc is None else record.crc
        return mode, Chain(crc, step_checksum(row, mode, before.step, None if manifest.thin is None else before.theta))

    def _links(self, before: Chain, behind: Chain) -> Links:
        return Links(self._run, before.link, behind.link)

    def _linked(self, records: Iterable[Record], chain: Chain) -> Iterator[Record]:
        """Consecutive steps, each with its links, and the checksum of the parameters that it led to."""
        for record in records:
            before, chain = chain, self._behind(record, chain)[1]
            yield record._replace(crc=chain.theta, links=self._links(before, chain))

    def _turn(self, last: Record, later: Sequence[Record] = ()) -> None:
        """Hand a full span over to the thread, once that is through with the one before; the other log takes the steps to come.

        later: those that were logged already.
        """
        self._wait()
        full = self._span
        full.modes = tuple(self._modes)
        self._writing = self._thread.submit(self._write, full)
        self._number += 1
        opening = self._opening(last)
        log = self._tail.begin(self._number, [*opening, *later]) if later else self._tail.turn(self._number, opening)
        where = log.places[0]["theta"] if opening else None
        self._span = Span(full.stop, log, self._chain, where)
        for record, places in zip(later, log.places[len(opening) :], strict=False):
            self._take(record, places)
        if len(later) >= self._full:
            self._turn(later[-1])

    def _opening(self, last: Record) -> list[Record]:
        """What a log begins with: the step before its first. Until its span is committed the parameters then stand nowhere else."""
        return [last]

    def _wait(self) -> None:
        if self._writing is not None:
            self._writing.result()
            self._writing = None

    def close(self, complete: bool = True) -> None:
        """Write what is only in the log, the last partial span included; safe to call twice."""
        if self.closed:
            return
        with self._guarded:
            self._wait()
            self._span.modes = tuple(self._modes)
            self._write(self._span, end=True, complete=complete)
            self._trim()
            mirror.keep(self.path)
        self.closed = True
        self._release(remove=True)

    def _trim(self) -> None:
        """Take away what stands behind the steps of a run that was gone on with at an earlier one."""
        for name, array in self._columns.items():
            array.extend(rows(columns(self.manifest)[name], self.steps, self._anchors), array.shape[1:])
        settle(self._columns.values(), self.path)

    def _release(self, remove: bool) -> None:
        self._thread.shutdown(wait=True)
        for array in self._columns.values():
            array.close()
        spool.let_go(self.path, self._tail, remove)

    def _over(self, error: Exception) -> None:
        """End the recording; what was committed or logged stays. StoreError for an error of the system."""
        self._fail()
        if isinstance(error, OSError):
            raise schema.unwritable(self.path, error) from error

    def _fail(self) -> None:
        if not self.closed:
            self.closed = True
            self._release(remove=False)

    def _write(self, span: Span, end: bool = False, complete: bool = False) -> None:
        """Make chunks of a span, and commit it; end: with the parameters that its last step led to."""
        spool.check_own(self.path, self._marked)  # what somebody else committed is not to be overwritten
        for name, values in span.values(self._columns).items():
            self._columns[name].append(values, span.start)
        vectors = list(span.vectors())
        anchors = self._anchors + max([len(places) for name, places in vectors if name in ANCHORED], default=0)
        # The training is over: of a small model, whose chunks are small, half is done by the thread.
        states = self._thread.submit(self._write_states, span, end, anchors) if end and self.manifest.together > 1 else None
        for name, places in vectors:
            write_vectors(self._columns[name], self._anchors if name in ANCHORED else span.start, span.log, places)
        if end and "gradient" in self._columns:
            array = self._columns["gradient"]
            array.trim((span.stop, self._columns["batch"].shape[1], array.shape[2]))  # which is as wide as it will be by now
        steps = self._write_states(span, end, anchors) if states is None else states.result()
        settle(self._columns.values(), self.path, behind=not end)
        self._mark(steps, complete, span.modes)
        self._anchors = anchors  # not before: what is interrupted here may be closed again

    def _write_states(self, span: Span, end: bool, anchors: int) -> int:
        """The parameters of a span; how many steps can be used then, whose parameters afterwards are on disk too.

        anchors: there are with this span.
        """
        states = span.states() if end else span.states()[:-1]
        self._columns["checksum_theta"].append(span.checksums()[: len(states)], span.start)
        write_vectors(self._columns["theta"], span.start, span.log, states)
        return span.start + len(states) - 1

    def _mark(self, steps: int, complete: bool, modes: Iterable[tuple[bool, ...]]) -> None:
        marker = marker_of(steps, complete, modes, self._sums, **self._signed)
        spool.commit(self.path, marker, self._marked)
        self._marked = marker


class _Guarded:
    """Whatever goes wrong within ends the recording (``RunWriter._over``)."""

    def __init__(self, writer: RunWriter) -> None:
        self._writer = writer

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if isinstance(error, Exception):
            self._writer._over(error)


def marker_of(steps: int, complete: bool, modes: Iterable[tuple[bool, ...]], sums: Mapping[str, int], **more: str) -> str:
    """What says that so many steps of a run are whole on disk."""
    told = {"steps": steps, "complete": complete, "modes": list(modes), "checksums": sums, **more}
    return json.dumps({**told, "crc": text_checksum(told)})
