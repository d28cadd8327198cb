"""Steps of a training as plain values: what the kernel works on, wherever they come from."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from torch import Tensor

from explaind.rules.filter import Filter


@dataclass(frozen=True, eq=False)
class Drawn:
    """A batch, and the state of the random generators before its forward pass: the host's, and the device's where that has its own."""

    batch: Any
    states: tuple[Tensor, ...]  # uint8 [byte] each


@dataclass(frozen=True)
class Part:
    """One micro-batch of a step: examples whose losses were computed in one forward pass.

    A batch whose forward pass drew random numbers is a ``Drawn``, of which no row can be taken alone.
    """

    batch: Any
    ids: np.ndarray  # [batch]
    weights: Tensor  # [batch]


@dataclass(frozen=True)
class Step:
    """Step ``index``: from theta [param] by delta = after − theta, through a filter of the gradients of its parts."""

    index: int
    theta: Tensor
    after: Tensor
    delta: Tensor
    filter: Filter
    parts: tuple[Part, ...]
    mode: tuple[bool, ...]
    consumed: Tensor | None = None
    """Norm and largest absolute value of each layer's consumed gradient [layer, 2], where it was changed after the backward pass."""


@dataclass(frozen=True)
class Segment:
    """Consecutive steps that begin where the momentum is known: momentum [param], None for an optimizer without."""

    steps: tuple[Step, ...]
    momentum: Tensor | None


@runtime_checkable
class Steps(Protocol):
    """A source of steps, read segment by segment in any order."""

    steps: int
    starts: tuple[int, ...]
    """First step of every segment, ascending, beginning with 0."""

    def states(self) -> Iterator[Tensor]:
        """theta before every step and after the last one, some at a time: [state, param]."""
        ...

    def segment(self, start: int) -> Segment:
        """The segment that begins at step `start`, one of ``starts``."""
        ...

    def segments(self, starts: Sequence[int]) -> Iterator[Segment]:
        """The segments that begin at these steps, in this order."""
        ...
