"""A run as steps whose batches are not at hand, since the gradients of their examples are stored."""

from functools import partial

import numpy as np
import torch
from torch import Tensor

from explaind.errors import ReplayError
from explaind.replay.batches import Batches
from explaind.replay.steps import Logged, Part
from explaind.replay.trajectory import Trajectory
from explaind.store.reader import Run
from explaind.store.row import StepRow


class StoredTrajectory(Trajectory):
    """A ``Trajectory`` that reads neither data nor losses."""

    def __init__(self, run: Run, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(run, Batches({}, np.zeros(0, np.int64), None, device, dtype), device, dtype)

    def _part(self, index: int, row: StepRow, part: int) -> Part:
        slots = np.flatnonzero(row.part == part)
        first, count = int(slots[0]), len(slots)
        if slots[-1] != first + count - 1:
            raise ReplayError("the micro-batches of a step are mixed up", where=f"step {index}", do="explaind verify says what is damaged")
        return Part(Logged(count, partial(self._read, index, first)), row.batch[slots], self.tensor(row.weight[slots]))

    def _read(self, step: int, first: int, some: slice) -> Tensor:
        return self.tensor(self.run.gradients(step, first + some.start, first + some.stop))
