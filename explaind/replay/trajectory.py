"""The run as the kernel wants it: steps with tensors on the device, filters and batches."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from explaind.replay.ahead import ahead
from explaind.replay.steps import Part, Segment, Step
from explaind.rules import rule_named
from explaind.rules.rule import IDLE, Filter, joined
from explaind.store.reader import Block, Run
from explaind.store.writer import StepRow


class Trajectory:
    """Reads a run segment by segment."""

    def __init__(self, run: Run, batches: Callable[[np.ndarray], Any], device: torch.device, dtype: torch.dtype) -> None:
        self.run, self._batches, self._device, self._dtype = run, batches, device, dtype
        self._rule = rule_named(run.manifest.rule)
        self.steps = run.steps
        self.starts = tuple(range(0, run.steps, run.manifest.block))

    def tensor(self, values: np.ndarray) -> Tensor:
        """Recorded numbers on the kernel's device, in its dtype."""
        return torch.from_numpy(np.ascontiguousarray(values)).to(self._device, self._dtype)

    def states(self) -> Iterator[Tensor]:
        """theta before every step and after the last one, some at a time: [state, param]."""
        bounds = [*self.starts[1:], self.steps + 1]
        return map(self.tensor, ahead(lambda span: self.run.states(*span), list(zip(self.starts, bounds, strict=True))))

    def segment(self, start: int) -> Segment:
        """The segment that begins at step `start`, one of ``starts``."""
        return next(self.segments([start]))

    def segments(self, starts: Sequence[int]) -> Iterator[Segment]:
        """The segments that begin at these steps, in this order; only bytes are read ahead, the user's data never in a thread."""
        return map(self._segment, ahead(self._block, starts))

    def _block(self, start: int) -> Block:
        return self.run.block(start, min(start + self.run.manifest.block, self.steps))

    def _segment(self, block: Block) -> Segment:
        theta = self.tensor(block.theta)
        steps = tuple(self._step(block.start + i, row, theta[i], theta[i + 1]) for i, row in enumerate(block.rows))
        anchor = block.rows[0].anchor
        return Segment(steps, None if anchor is None else self.tensor(anchor))

    def _step(self, index: int, row: StepRow, theta: Tensor, after: Tensor) -> Step:
        parts = tuple(self._part(row, part) for part in np.unique(row.part).tolist())
        return Step(index, theta, after, after - theta, self._filter(row, theta), parts, row.mode)

    def _part(self, row: StepRow, part: int) -> Part:
        mine = row.part == part
        return Part(self._batches(row.batch[mine]), row.batch[mine], self.tensor(row.weight[mine]))

    def _filter(self, row: StepRow, like: Tensor) -> Filter:
        m = self.run.manifest
        frozen = None if row.preconditioner is None else self.tensor(row.preconditioner)
        filters = []
        for layer, age in zip(m.layers, row.age.tolist(), strict=True):
            options = dict(zip(m.options, row.hyper[layer.group].tolist(), strict=True))
            own = None if frozen is None else frozen[layer.offset : layer.offset + layer.size]
            filters.append(IDLE if age < 0 else self._rule.filter(options, age, own))
        return joined(filters, [layer.size for layer in m.layers], like)
