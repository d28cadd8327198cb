"""The run as the kernel wants it: steps with tensors on the device, filters and batches."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from explaind.replay.account import Account
from explaind.replay.ahead import ahead
from explaind.replay.batches import Batches
from explaind.replay.steps import Carried, Drawn, Part, Segment, Step
from explaind.rules import rule_named
from explaind.rules.filter import IDLE, STILL, Filter, joined
from explaind.rules.gradient_filter import Passage, gradient_filter
from explaind.rules.rule import Facts
from explaind.store.manifest import Layer
from explaind.store.reader import Block, Run
from explaind.store.row import StepRow


class Trajectory:
    """Reads a run segment by segment."""

    def __init__(self, run: Run, batches: Batches, device: torch.device, dtype: torch.dtype) -> None:
        self.run, self.batches, self._device, self._dtype = run, batches, device, dtype
        self._eps = float(np.finfo(run.manifest.dtype).eps)
        self._sizes = [layer.size for layer in run.manifest.layers]
        self._rules = tuple(rule_named(optimizer.rule) for optimizer in run.manifest.optimizers)
        self.steps = run.steps
        self.starts = run.starts
        told = run.manifest.gradient_filter
        self.account = Account()
        self._filtering = None if told is None else gradient_filter(told)

    def tensor(self, values: np.ndarray) -> Tensor:
        """Recorded numbers on the kernel's device, in its dtype."""
        return torch.from_numpy(np.ascontiguousarray(values)).to(self._device, self._dtype)

    def lived(self) -> Account:
        """How exactly a thin run was lived again, all of it; nothing of a full one."""
        return self.account

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
        later = bisect_right(self.starts, start)
        return self.run.block(start, self.starts[later] if later < len(self.starts) else self.steps)

    def _segment(self, block: Block) -> Segment:
        theta = self.tensor(block.theta)
        steps = tuple(self._step(block.start + i, row, theta[i], theta[i + 1]) for i, row in enumerate(block.rows))
        momentum, filtered = (None if v is None else self.tensor(v) for v in (block.rows[0].anchor, block.rows[0].filtered))
        return Segment(steps, Carried(momentum, None if filtered is None else filtered.reshape(-1, theta.shape[1])))

    def _step(self, index: int, row: StepRow, theta: Tensor, after: Tensor) -> Step:
        parts = tuple(self._part(index, row, part) for part in np.unique(row.part).tolist())
        consumed = None if row.consumed is None else self.tensor(row.consumed)
        f = STILL if row.gap else self._filter(row, theta)
        through = self._passage(index, row, theta)
        return Step(index, theta, after, after - theta, f, parts, row.mode, consumed, through, self._eps, row.gap, row.precision)

    def _passage(self, index: int, row: StepRow, like: Tensor) -> Passage | None:
        if self._filtering is None:
            return None
        return self._filtering.passage(self._seen[index].tolist(), (row.age >= 0).tolist(), self._sizes, like)

    @cached_property
    def _seen(self) -> np.ndarray:
        """Gradients of each layer that the gradient filter had seen before each step: [step, layer]."""
        having = self.run.having_gradients
        return np.cumsum(having, axis=0) - having + np.array(self.run.manifest.filter_seen or 0)

    def _part(self, index: int, row: StepRow, part: int) -> Part:
        mine = row.part == part
        batch, wide = self.batches(row.batch[mine]), self.run.manifest.random_bytes
        state = None if row.random is None else row.random[part * wide : (part + 1) * wide]
        if state is not None and state.any():
            batch = Drawn.of(batch, state)
        return Part(batch, row.batch[mine], self.tensor(row.weight[mine]))

    def _filter(self, row: StepRow, like: Tensor) -> Filter:
        layers = self.run.manifest.layers
        frozen = None if row.preconditioner is None else self.tensor(np.asarray(row.preconditioner))
        filters = []
        for i, layer in enumerate(layers):
            own = None if frozen is None else frozen[layer.offset : layer.offset + layer.size].reshape(layer.shape)
            filters.append(self._layer_filter(layer, row, i, own))
        return joined(filters, self._sizes, like)

    def _layer_filter(self, layer: Layer, row: StepRow, index: int, frozen: Tensor | None) -> Filter:
        age = int(row.age[index])
        if layer.optimizer < 0 or age < 0:
            return STILL if layer.optimizer < 0 else IDLE
        told = self.run.manifest.optimizers[layer.optimizer]
        options = dict(zip(told.options, row.hyper[index].tolist(), strict=False))
        scalars = {} if row.scalars is None else dict(zip(told.scalars, row.scalars[index].tolist(), strict=False))
        return self._rules[layer.optimizer].filter(Facts(options, age, scalars, frozen))
