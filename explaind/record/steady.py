"""The common step: it is like the one before it in all but its examples, its age and the numbers in its vectors.

``Update`` looks at a step from all sides and writes down what it finds, most often the same as before. Here it is only asked whether that
is so, and a row is made of the last one. What is recorded is the same, in less time, which is much of a small model's step.
"""

import numpy as np

from explaind.record.incoming import Incoming, MicroBatch
from explaind.record.update import Update
from explaind.record.watched import Watched
from explaind.store.row import StepRow

PLAIN = ((), ("preconditioner",))
"""What a row may hold that the next one is made of."""


class Steady:
    """Knows one such row; of a training with one optimizer, whose rule freezes at most what the optimizer itself keeps."""

    def __init__(self, watched: Watched, incoming: Incoming) -> None:
        self._watched, self._incoming = watched, incoming
        self._row: StepRow | None = None
        self._ages = list[int]()

    def know(self, update: Update, row: StepRow) -> None:
        """A step was recorded otherwise; where it is not one of those that others may be like, the last of those stays."""
        if row.held in PLAIN and update.whole:
            self._row = row
            row.forget()

    def begin(self, previous: np.ndarray, known: np.ndarray, step: int) -> MicroBatch | None:
        """The examples of the step to come, where it is like the last one so far; else None, and nothing was done.

        previous, known: as for ``Watched.check_unchanged``. Raises as that and ``Watched.check_gradients`` do.
        """
        row, batch, watched = self._row, self._incoming.plain(), self._watched
        if row is None or batch is None or batch.weights is not row.weight or batch.precision != row.precision:
            return None
        if not watched.groups.stand(row.hyper):
            return None
        watched.check_still(previous, known, step)
        watched.check_gradients(0, step)
        self._ages = watched.ages()
        return batch

    def made(self, batch: MicroBatch) -> StepRow | None:
        """The record of the step, now that it is made; None where it was not like the last one after all."""
        row, watched = self._row, self._watched
        assert row is not None
        if not watched.groups.stand(row.hyper) or watched.mode() != row.mode or watched.kept() is not row.preconditioner:
            return None
        return row.again(batch.ids, np.array(self._ages, np.int32))

    def update(self, batch: MicroBatch) -> Update:
        """What is known of a step that has begun like the last one, and has turned out to be another."""
        assert self._row is not None
        found = Update(self._watched, False, known=(self._ages, self._row.hyper))
        found.checked, found.taken, found.drew = {0}, [batch], [False]
        return found
