"""A run from one place into another, chunk by chunk: never more than a chunk of it is in memory."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from explaind.store import admission
from explaind.store.shelf import TEXT, Sink, Slab, Source, Spec
from explaind.store.tail import NAMES

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Copied:
    """What was taken over."""

    steps: int
    complete: bool
    ledgers: tuple[str, ...]


def copied(source: Source, sink: Sink, with_ledgers: bool, progress: Progress | None = None) -> Copied:
    """Copy the committed steps of a run, its log, and its ledgers if they are wanted.

    All names and sizes are looked at before anything is written; StoreError where they are not those of a run.
    progress(done, total): bytes of arrays.
    """
    names = [admission.check_name(name, source) for name in source.names()]
    run = admission.of_run(source, names)
    ledgers = admission.ledgers(names) if with_ledgers else []
    parts = [(run.texts, run.arrays), *(admission.of_ledger(source, ledger, names) for ledger in ledgers)]
    total = sum(spec.nbytes for _, arrays in parts for _, spec in arrays.values())
    done = 0
    for texts, arrays in parts:
        for name, text in texts.items():  # attributes come first: they make the group
            sink.put(name, [text])
        for name, (slab, spec) in arrays.items():
            _copy(name, slab, spec, sink)
            done += spec.nbytes
            if progress is not None:
                progress(done, total)
    for name in (name for name in NAMES if name in names):
        sink.put(name, source.pieces(name))
    return Copied(run.steps, run.complete, tuple(ledgers))


def _copy(name: str, slab: Slab, spec: Spec, sink: Sink) -> None:
    whole = replace(spec, width=_longest(slab, spec)) if spec.dtype == TEXT else spec
    write = sink.create(name, whole)
    for region in spec.regions():
        write(region, slab.read(region))


def _longest(slab: Slab, spec: Spec) -> int:
    """Bytes of the longest of its texts."""
    return max((len(str(text).encode()) for region in spec.regions() for text in _flat(slab.read(region))), default=0)


def _flat(values: np.ndarray) -> Sequence[str]:
    return [str(text) for text in values.ravel()]


def encoded(values: np.ndarray, width: int) -> np.ndarray:
    """Texts as UTF-8 of one width."""
    return np.array([text.encode() for text in _flat(values)], dtype=f"S{max(1, width)}").reshape(values.shape)


def decoded(values: np.ndarray) -> np.ndarray:
    """What ``encoded`` was given; UnicodeDecodeError where it is no UTF-8."""
    return np.array([text.decode() for text in values.ravel().tolist()], dtype=np.dtypes.StringDType()).reshape(values.shape)
