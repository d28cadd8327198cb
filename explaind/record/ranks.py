"""Processes that train one model together (DistributedDataParallel): every one says whose gradient it computed, the first one writes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch.distributed as dist
from torch import nn

from explaind.errors import ExplaindError, RecordError
from explaind.record.incoming import MicroBatch
from explaind.store.checksums import theta_checksum
from explaind.store.manifest import Layer
from explaind.store.row import StepRow, Vector


class Writer(Protocol):
    """What a recorder needs of whoever writes its run."""

    closed: bool

    @property
    def steps(self) -> int:
        """Rows written."""
        ...

    @property
    def block(self) -> int:
        """Rows between two anchors of the momentum."""
        ...

    @property
    def crc_theta(self) -> np.ndarray:
        """Of the parameters after the last row, continuing the one of those before it: uint32 [layer]."""
        ...

    def add(self, row: StepRow, theta: Vector) -> None:
        """Take a row; neither is looked at afterwards."""
        ...

    def close(self, complete: bool = True) -> None:
        """Write what is left."""
        ...


class Elsewhere:
    """Stands for the writer of another process: counts its rows."""

    def __init__(self, steps: int, block: int, layers: Sequence[Layer]) -> None:
        self.steps, self.block, self.closed, self._layers = steps, block, False, layers
        self.crc_theta = np.zeros(len(layers), np.uint32)

    def add(self, row: StepRow, theta: Vector) -> None:
        """One row more."""
        self.steps += 1
        self.crc_theta = theta_checksum(theta, self._layers, self.crc_theta)

    def close(self, complete: bool = True) -> None:
        """No more rows."""
        self.closed = True


@dataclass(frozen=True)
class Ranks:
    """The processes that share a model."""

    group: Any = None
    size: int = 1
    rank: int = 0

    @property
    def first(self) -> bool:
        """Whether this one writes."""
        return self.rank == 0

    def gathered(self, taken: Sequence[MicroBatch], drew: Sequence[bool], step: int) -> tuple[list[MicroBatch], list[bool]]:
        """The micro-batches of all processes, of whose gradients the step consumes the mean; and whether they drew random numbers."""
        if self.size == 1:
            return list(taken), list(drew)
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, (list(taken), list(drew)), group=self.group)
        idle = [rank for rank, (some, _) in enumerate(found) if not some]
        if 0 < len(idle) < self.size:
            raise RecordError(
                "a process stepped, but nobody said on whose gradient",
                where=f"step {step}, rank {', '.join(map(str, idle))}",
                do="call recorder.examples(ids) before each forward pass, in every process",
            )
        batches = [replace(batch, weights=batch.weights / self.size, reached={}) for some, _ in found for batch in some]
        return batches, [bool(one) for _, some in found for one in some]

    def led(self, begin: Callable[[], tuple[Writer, int]], layers: Sequence[Layer]) -> tuple[Writer, int]:
        """The writer, which the first process begins with, and the number of the next step; its error is raised in all of them."""
        writer, number, message = None, 0, list[Any]([None])
        error: ExplaindError | None = None
        if self.first:
            try:
                writer, number = begin()
                message = [(number, writer.steps, writer.block)]
            except ExplaindError as caught:
                error, message = caught, [str(caught)]
        if self.size > 1:
            dist.broadcast_object_list(message, src=dist.get_global_rank(self.group, 0), group=self.group)
        if error is not None:
            raise error
        if isinstance(message[0], str):
            raise RecordError(f"the first process cannot record: {message[0]}")
        number, steps, block = message[0]
        return writer or Elsewhere(steps, block, layers), number


ALONE = Ranks()


def ranks_of(model: nn.Module) -> Ranks:
    """Those of a DistributedDataParallel model, wherever it is wrapped; else this process alone."""
    for inner in (getattr(model, "_orig_mod", None), getattr(model, "module", None)):
        if type(model).__name__ == "DistributedDataParallel":
            group: Any = model.process_group
            return Ranks(group, dist.get_world_size(group), dist.get_rank(group))
        if isinstance(inner, nn.Module):
            return ranks_of(inner)
    return ALONE
