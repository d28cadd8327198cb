"""One step of a training while its optimizers make it."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from explaind.record.filtering import Filtering
from explaind.record.incoming import MicroBatch
from explaind.record.watched import Watched
from explaind.store.row import Pieces, StepRow


class Update:
    """What is known of a step so far: begun before the first optimizer steps, finished when all have, or no other will."""

    def __init__(
        self, watched: Watched, first: bool, filtering: Filtering | None = None, known: tuple[list[int], np.ndarray] | None = None
    ) -> None:
        """first: of a block or behind a gap, for which the momentum is kept. known: ages and options before it, where it is made by now."""
        self._watched, self._theta, self._remembered = watched, watched.before(), watched.remembered()
        self._ages, self._hyper = known or (watched.ages(), watched.hyper(again=True))
        self.anchor = watched.momentum() if first else None
        self._filtered = filtering.anchor() if first and filtering is not None else None
        self.filtered: Any = None
        self._frozen: list[Tensor | None] = [None] * len(watched.layers)
        self._several = len(watched.rules) > 1
        self._lasting = not self._several
        self._owned = False
        self._scalars = watched.no_scalars()
        self._active = [-1] * len(watched.layers)
        self.checked: set[int] = set()
        """Optimizers whose gradients were looked at."""
        self.stepped: set[int] = set()
        self.taken: list[MicroBatch] = []
        self.drew: list[bool] = []
        self._sizes: np.ndarray | None = None
        self._touched = False

    def look(self, optimizer: int, touched: bool) -> None:
        """One optimizer is about to consume its gradients; touched: they are not what backward passes left.

        What others will consume may still change: a GradScaler unscales it for each on its own.
        """
        if touched or self._several:
            own = self._watched.gradient_sizes(optimizer)
            self._sizes = own if self._sizes is None else self._sizes + own
        self._touched |= touched

    def step(self, optimizer: int) -> None:
        """One optimizer has just stepped."""
        self.stepped.add(optimizer)
        hyper = self._watched.hyper()  # a closure may have given the optimizer another group
        for i, moment in enumerate(self._watched.moments(optimizer, self._theta, self._remembered)):
            if moment is None:
                continue
            rule = self._watched.rules[optimizer]
            self._active[i] = self._ages[i]
            if hyper is not self._hyper:
                self._changed(i, hyper[i])
            frozen = rule.frozen(moment)
            self._lasting = self._lasting and id(frozen) in map(id, moment.state.values())
            # Of several optimizers another may still change what this one has just used.
            self._frozen[i] = frozen.detach().clone() if frozen is not None and self._several else frozen
            if self._scalars is not None:
                facts = rule.facts(moment)
                self._scalars[i, : len(facts)] = facts

    def _changed(self, layer: int, hyper: np.ndarray) -> None:
        """The optimizer changed the options of a parameter while it stepped."""
        if not self._owned:
            self._hyper, self._owned = self._hyper.copy(), True
        self._hyper[layer] = hyper

    @property
    def whole(self) -> bool:
        """Whether it stepped every parameter, and all that was frozen of it is the optimizer's own and recorded from where it stands."""
        return min(self._active) >= 0 and (not self._watched.has_frozen or (self._lasting and self._watched.in_place))

    def frozen(self) -> Pieces | None:
        """What the rules froze of the step, as it stands: [param]; None where none freezes a tensor."""
        return self._watched.frozen(self._frozen, self._lasting)

    def row(self, gradients: np.ndarray | None = None) -> StepRow:
        """The record of the step; gradients: of its examples, where they are stored [slot, param]."""
        ids, weights = _joined([batch.ids for batch in self.taken]), _joined([batch.weights for batch in self.taken])
        part = np.zeros(len(ids), np.int32)
        if len(self.taken) > 1:
            part = np.repeat(np.arange(len(self.taken), dtype=np.int32), [len(batch.ids) for batch in self.taken])
        return StepRow(
            ids,
            part,
            weights,
            self._hyper,
            np.array(self._active, np.int32),
            self._watched.mode(),
            self.frozen(),
            self.anchor,
            self._scalars,
            self._sizes if self._touched else None,
            self._random(),
            self._filtered,
            max((batch.precision for batch in self.taken), default=0.0),
            gradients=gradients,
        )

    def _random(self) -> np.ndarray | None:
        """State of the generators before every micro-batch, zeros where none was drawn from: uint8 [part · byte]."""
        if not any(self.drew):
            return None
        states = [batch.random if drew else torch.zeros_like(batch.random) for batch, drew in zip(self.taken, self.drew, strict=True)]
        return torch.cat(states).numpy()


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def gap_row(watched: Watched, passed: int, first: bool) -> StepRow:
    """Stands for so many steps of the training that were not recorded."""
    nothing = np.zeros(0, dtype=np.int64)
    still = np.full(len(watched.layers), -1, dtype=np.int32)
    return StepRow(
        nothing,
        nothing.astype(np.int32),
        nothing.astype(np.float64),
        watched.hyper(),
        still,
        watched.mode(),
        watched.frozen([None] * len(watched.layers)),
        watched.momentum() if first else None,
        watched.no_scalars(),
        gap=passed,
    )
