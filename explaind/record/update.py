"""One step of a training while its optimizers make it."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from explaind.record.filtering import Filtering
from explaind.record.incoming import MicroBatch
from explaind.record.watched import Watched
from explaind.store.row import StepRow


class Update:
    """What is known of a step so far: begun before the first optimizer steps, finished when all have, or no other will."""

    def __init__(self, watched: Watched, theta: np.ndarray, first: bool, filtering: Filtering | None = None) -> None:
        """theta: parameters before the step [param]; first: of a block or behind a gap, for which the momentum is kept."""
        self._watched, self._theta = watched, theta
        self._ages, self._remembered = watched.ages(), watched.remembered()
        self.anchor = watched.momentum() if first else None
        self._filtered = filtering.anchor() if first and filtering is not None else None
        self.filtered: Any = None
        self._frozen: list[Tensor | None] = [None] * len(watched.layers)
        self._hyper = watched.hyper()
        self._scalars = watched.no_scalars()
        self._active = np.full(len(watched.layers), -1, dtype=np.int32)
        self.stepped: set[int] = set()
        self.taken: list[MicroBatch] = []
        self.drew: list[bool] = []
        self.consumed: np.ndarray | None = None
        self.gradients: np.ndarray | None = None

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
            # Of several optimizers another may still change what this one has just used.
            self._frozen[i] = frozen.detach().clone() if frozen is not None and len(self._watched.rules) > 1 else frozen
            if self._scalars is not None:
                self._scalars[i, : len(facts)] = facts

    def frozen(self) -> np.ndarray | None:
        """What the rules froze of the step: [param]; None where none freezes a tensor."""
        return self._watched.flat(self._frozen, "frozen") if self._watched.has_frozen else None

    def row(self) -> StepRow:
        """The record of the step."""
        ids, weights = (np.concatenate([getattr(batch, name) for batch in self.taken]) for name in ("ids", "weights"))
        part = np.repeat(np.arange(len(self.taken), dtype=np.int32), [len(batch.ids) for batch in self.taken])
        return StepRow(
            ids,
            part,
            weights,
            self._hyper,
            self._active,
            self._watched.mode(),
            self.frozen(),
            self.anchor,
            self._scalars,
            self.consumed,
            self._random(),
            self._filtered,
            max((batch.precision for batch in self.taken), default=0.0),
            gradients=self.gradients,
        )

    def _random(self) -> np.ndarray | None:
        """State of the generators before every micro-batch, zeros where none was drawn from: uint8 [part · byte]."""
        if not any(self.drew):
            return None
        states = [batch.random if drew else torch.zeros_like(batch.random) for batch, drew in zip(self.taken, self.drew, strict=True)]
        return torch.cat(states).numpy()


def gap_row(watched: Watched, passed: int, first: bool) -> StepRow:
    """Stands for so many steps of the training that were not recorded."""
    nothing = np.zeros(0, dtype=np.int64)
    still = np.full(len(watched.layers), -1, dtype=np.int32)
    frozen = watched.flat([None] * len(watched.layers), "frozen") if watched.has_frozen else None
    return StepRow(
        nothing,
        nothing.astype(np.int32),
        nothing.astype(np.float64),
        watched.hyper(),
        still,
        watched.mode(),
        frozen,
        watched.momentum() if first else None,
        watched.no_scalars(),
        gap=passed,
    )
