"""A thin run as steps: what is between two stored states is lived again, and kept while there is room."""

from collections import OrderedDict
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from explaind.replay.account import Account
from explaind.replay.batches import Batches, Collate, Readable
from explaind.replay.functional import Readout
from explaind.replay.reliving import Reliving
from explaind.replay.steps import Segment
from explaind.replay.trajectory import Trajectory
from explaind.store.reader import Block, Run

ROOM = 1 << 30
"""Bytes of lived steps that are kept; they are asked for twice and more, and living them again takes a training step each."""


class ThinTrajectory(Trajectory):
    """A ``Trajectory`` whose steps are lived when they are asked for, never in a thread."""

    def __init__(self, run: Run, batches: Batches, device: torch.device, dtype: torch.dtype, reliving: Reliving) -> None:
        super().__init__(run, batches, device, dtype)
        self.reliving = reliving
        self.account = reliving.account
        self._lived: OrderedDict[int, Block] = OrderedDict()
        self._size = 0

    def states(self) -> Iterator[Tensor]:
        """theta before every step and after the last one, some at a time: [state, param]."""
        for start in self.starts:
            block = self._whole(start)
            last = block.start + len(block.rows) == self.steps
            yield self.tensor(block.theta if last else block.theta[:-1])

    def segments(self, starts: Sequence[int]) -> Iterator[Segment]:
        """The segments that begin at these steps, in this order."""
        return map(self._segment, map(self._whole, starts))

    def lived(self) -> Account:
        """How exactly the run was lived again, all of it."""
        for start in self.starts:
            if start not in self.account.steps:
                self._whole(start)
        return self.account

    def _whole(self, start: int) -> Block:
        """A block with all its states."""
        if start in self._lived:
            self._lived.move_to_end(start)
            return self._lived[start]
        block = self.reliving.block(self._block(start))
        self._size += _bytes(block)
        while self._lived and self._size > ROOM:
            self._size -= _bytes(self._lived.popitem(last=False)[1])
        self._lived[start] = block
        return block


def _bytes(block: Block) -> int:
    frozen = [row.preconditioner for row in block.rows if row.preconditioner is not None]
    return int(block.theta.nbytes + sum(np.asarray(values).nbytes for values in frozen))


def trajectory(
    run: Run, model: nn.Module, losses: Readout, data: Readable, collate: Collate | None, device: torch.device, dtype: torch.dtype
) -> Trajectory:
    """The steps of a run for a kernel on this device, in this dtype; those of a thin run are lived with the model and its losses."""
    batches = Batches(data, run.examples, collate, device, dtype)
    if run.manifest.thin is None:
        return Trajectory(run, batches, device, dtype)
    return ThinTrajectory(run, batches, device, dtype, Reliving(run, model, losses, data, collate))
