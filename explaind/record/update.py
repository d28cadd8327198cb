"""One step of a training while its optimizers make it."""

import numpy as np
import torch
from torch import Tensor

from explaind.record.incoming import MicroBatch
from explaind.record.watched import Watched
from explaind.store.row import StepRow


class Update:
    """What is known of a step so far: begun before the first optimizer steps, finished when all have, or no other will."""

    def __init__(self, watched: Watched, theta: np.ndarray, first: bool) -> None:
        """theta: parameters before the step [param]; first: of a block, for which the momentum is kept."""
        self._watched, self._theta = watched, theta
        self._ages, self._remembered = watched.ages(), watched.remembered()
        self._anchor = watched.momentum() if first else None
        self._frozen: list[Tensor | None] = [None] * len(watched.layers)
        self._hyper = watched.hyper()
        self._scalars = watched.no_scalars()
        self._active = np.full(len(watched.layers), -1, dtype=np.int32)
        self.stepped: set[int] = set()
        self.taken: list[MicroBatch] = []
        self.drew: list[bool] = []
        self.consumed: np.ndarray | None = None

    def step(self, optimizer: int) -> None:
        """One optimizer has just stepped."""
        self.stepped.add(optimizer)
        hyper = self._watched.hyper()
        for i, moment in enumerate(self._watched.moments(optimizer, self._theta, self._remembered)):
            if moment is None:
                continue
            rule = self._watched.rules[optimizer]
            self._active[i], self._hyper[i] = self._ages[i], hyper[i]
            frozen, facts = rule.frozen(moment), rule.facts(moment)
            self._frozen[i] = None if frozen is None else frozen.detach().clone()
            if self._scalars is not None:
                self._scalars[i, : len(facts)] = facts

    def row(self) -> StepRow:
        """The record of the step."""
        ids, weights = (np.concatenate([getattr(batch, name) for batch in self.taken]) for name in ("ids", "weights"))
        part = np.repeat(np.arange(len(self.taken), dtype=np.int32), [len(batch.ids) for batch in self.taken])
        frozen = self._watched.flat(self._frozen) if self._watched.has_frozen else None
        return StepRow(
            ids,
            part,
            weights,
            self._hyper,
            self._active,
            self._watched.mode(),
            frozen,
            self._anchor,
            self._scalars,
            self.consumed,
            self._random(),
        )

    def _random(self) -> np.ndarray | None:
        """State of the generators before every micro-batch, zeros where none was drawn from: uint8 [part · byte]."""
        if not any(self.drew):
            return None
        states = [batch.random if drew else torch.zeros_like(batch.random) for batch, drew in zip(self.taken, self.drew, strict=True)]
        return torch.cat(states).numpy()
