"""What one unit of the optimizer's memory at one step does to the measures later on."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from explaind.replay.steps import Carried
from explaind.rules.gradient_filter import Passage

FADED = {torch.float64: 1e-14, torch.float32: 1e-8}
"""A costate whose momentum has shrunk to this fraction is let go in the applied view: well below rounding."""


@dataclass(eq=False)
class Costate:
    """μ [measure, param] and where on the step axis its credit is booked (None: at the step of the gradient)."""

    mu: Tensor
    entry: int | None
    memory: np.ndarray = field(default_factory=lambda: np.ones(1))
    """Bound on what is left of its newest source in each layer; 0 where that had none."""
    nu: Tensor | None = None
    """Of what a gradient filter remembers: ν [slot, measure, param], where the run has one."""
    most: float = 0.0
    """Largest number that ν ever held."""

    def through(self, passage: Passage, rows: Tensor) -> Tensor:
        """What one unit of the raw gradient did, from what one of the filtered gradient did: [measure, param] both."""
        assert self.nu is not None
        raw, self.nu = passage.pull(self.nu, rows)
        self.most = max(self.most, float(self.nu.abs().amax()))
        return raw

    @property
    def alive(self) -> bool:
        """Whether anything is left of it that counts."""
        least = FADED[self.mu.dtype]
        # What a gradient filter remembers has no bound in each layer: it is looked at.
        return bool(self.memory.max() > least) or (self.nu is not None and float(self.nu.abs().amax()) > least * self.most)

    def beside(self, carried: Carried) -> Iterator[tuple[Tensor, Tensor]]:
        """Its parts beside what they belong to: [measure, param], [param]."""
        if carried.momentum is not None:
            yield self.mu, carried.momentum
        if carried.filtered is not None and self.nu is not None:
            yield from zip(self.nu, carried.filtered, strict=True)
