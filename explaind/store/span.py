"""A span of steps on its way from the log into chunks. Its vectors stay in the log and are read one chunk at a time."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from explaind.store.checksums import Chain
from explaind.store.growing import Growing, filled
from explaind.store.row import StepRow
from explaind.store.tail import Log, Place

LARGE = 384
"""Examples of a batch that are not kept in memory until its span is in chunks."""
SLOTS = ("batch", "part", "weight")
"""Fields with a number for every example of a batch; those of large batches are read like vectors."""
VECTORS = {"preconditioner": "preconditioner", "anchor": "momentum", "filtered": "filtered", "state": "state"}
"""Fields of a row that are read from the log piece by piece, and the arrays that they go to."""
ANCHORED = ("momentum", "filtered", "state")
"""Arrays with a row for every stretch of steps."""
BYTES = ("random", "groups")
"""Fields whose length changes from step to step."""
NOTHING: Mapping[str, None] = dict.fromkeys((*VECTORS, *BYTES))
MADE = ("small", "middle", "views")
"""What a row has made of its arrays."""


class Entry(NamedTuple):
    """A step without its vectors, and where those stand in the log."""

    row: StepRow
    mode: int
    chain: Chain
    """Behind it."""
    places: Mapping[str, Place]


@dataclass
class Span:
    """Consecutive steps whose vectors one log holds."""

    start: int
    log: Log
    chain: Chain
    """Before its first step."""
    opening: Place | None = None
    """Where the parameters before its first step stand; None: they are on disk already."""
    modes: tuple[tuple[bool, ...], ...] = ()
    entries: list[Entry] = field(default_factory=list)

    @property
    def stop(self) -> int:
        """The step behind its last."""
        return self.start + len(self.entries)

    def states(self) -> list[Place | None]:
        """Where the parameters before its first step and after each of its steps stand."""
        return [self.opening, *(entry.places["theta"] for entry in self.entries)]

    def checksums(self) -> np.ndarray:
        """Of these parameters: uint32 [state, layer]."""
        return np.stack([self.chain.theta, *(entry.chain.theta for entry in self.entries)])

    @property
    def wide(self) -> bool:
        """Whether a batch of it is large, and therefore in the log alone."""
        return any(entry.row.batch is None for entry in self.entries)

    def vectors(self) -> Iterator[tuple[str, list[Place]]]:
        """Arrays of vectors, with the place of each row."""
        for name, array in {**VECTORS, **(dict(zip(SLOTS, SLOTS, strict=True)) if self.wide else {})}.items():
            places = [entry.places[name] for entry in self.entries if name in entry.places]
            if places:
                yield array, places

    def values(self, having: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """The rows of all other arrays that the run has."""
        rows = [entry.row for entry in self.entries]
        if not rows:
            return {}
        nothing = np.full((len(self.chain.theta), 2), np.nan)
        found = {
            **({} if self.wide else self._slots(rows)),
            "hyper": _stacked([row.hyper for row in rows]),
            "age": _stacked([row.age for row in rows]),
            "mode": np.array([entry.mode for entry in self.entries]),
            "checksum_step": np.array([entry.chain.step for entry in self.entries], dtype=np.uint32),
            "gap": np.array([row.gap for row in rows]),
            "precision": np.array([row.precision for row in rows]),
            "consumed": _stacked([nothing if row.consumed is None else row.consumed for row in rows]),
            **{name: self._bytes(name) for name in BYTES if name in having},
        }
        crcs = [row.gradients_crc for row in rows if row.gradients_crc is not None]
        found |= {"checksum_gradient": np.concatenate(crcs)} if crcs else {}
        scalars = [row.scalars for row in rows if row.scalars is not None]
        found |= {"scalar": _stacked(scalars)} if scalars else {}
        return {name: values for name, values in found.items() if name in having}

    def _slots(self, rows: Sequence[StepRow]) -> dict[str, np.ndarray]:
        slots = max(len(row.batch) for row in rows)
        fills = zip(SLOTS, (-1, -1, 0), strict=True)
        return {name: filled([getattr(row, name) for row in rows], slots, fill) for name, fill in fills}

    def _bytes(self, name: str) -> np.ndarray:
        """uint8 [row, longest], at least one wide."""
        none = np.zeros(0, np.uint8)
        rows = [self.log.read(entry.places[name]) if name in entry.places else none for entry in self.entries]
        return filled(rows, max(1, *map(len, rows)), 0)


def light(row: StepRow) -> StepRow:
    """Without what is large."""
    found = object.__new__(StepRow)  # far cheaper than ``replace``, which sets every field anew
    fields = found.__dict__
    fields.update(row.__dict__, **NOTHING)
    if row.batch.shape[0] > LARGE:
        fields.update(dict.fromkeys(SLOTS))
    for name in MADE:
        fields.pop(name, None)
    return found


def whole(entry: Entry, log: Log) -> StepRow:
    """With what is large, from the log."""
    large: dict[str, Any] = {name: log.read(place) for name, place in entry.places.items() if name in (*SLOTS, *VECTORS, *BYTES)}
    return replace(entry.row, **large)


def write_vectors(array: Growing, at: int, log: Log, places: Sequence[Place | None]) -> None:
    """Rows [at, at + len(places)) of an array [row, number] out of the log, and nothing behind them; None: that row stays as it is."""
    known = [place for place in places if place is not None]
    if not known:
        return
    if any(place.dtype != array.dtype for place in known):
        raise TypeError(f"{array.name} holds {array.dtype}, and the log {known[0].dtype}")
    stay = {row: array.row(at + row) for row, place in enumerate(places) if place is None}

    def read(values: np.ndarray, row: int, start: int) -> None:
        for other in stay.keys() & set(range(row, row + len(values))):
            there = stay[other](start, start + values.shape[1])
            values[other - row, : len(there)], values[other - row, len(there) :] = there, array.fill
        log.read_rows(values, places[row : row + len(values)], start, array.fill)

    array.stream(at, len(places), max(map(length, known)), read)


def _stacked(rows: Sequence[np.ndarray]) -> np.ndarray:
    """The same as numpy's stack, in one go, since this stands in the training's way; of a single array it is a view."""
    first = rows[0]
    if all(row is first for row in rows):
        return np.broadcast_to(first, (len(rows), *first.shape))
    return np.concatenate(rows).reshape(len(rows), *first.shape)


def length(place: Place) -> int:
    """Of a vector."""
    return place.shape[0]
