"""Steps of a training as plain values: what the kernel works on, wherever they come from."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from explaind.rules.filter import Filter
from explaind.rules.gradient_filter import Passage


@dataclass(frozen=True, eq=False)
class Drawn:
    """A batch, and the state of the random generators before its forward pass: the host's, and the device's where that has its own."""

    batch: Any
    states: tuple[Tensor, ...]  # uint8 [byte] each

    @staticmethod
    def of(batch: Any, state: np.ndarray) -> "Drawn":
        """From a recorded state, the host's first: uint8 [byte]."""
        host = len(torch.get_rng_state())
        return Drawn(batch, tuple(torch.from_numpy(part.copy()) for part in (state[:host], state[host:]) if len(part)))


@dataclass(frozen=True, eq=False)
class Logged:
    """Stands for a batch whose examples' gradients the training has stored."""

    examples: int
    read: Callable[[slice], Tensor]
    """Gradients of some of the examples: [example, param]."""


@dataclass(frozen=True)
class Part:
    """One micro-batch of a step: examples whose losses were computed in one forward pass.

    A batch whose forward pass drew random numbers is a ``Drawn``, of which no row can be taken alone; one whose gradients are stored is
    ``Logged``.
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
    passage: Passage | None = None
    """Through a gradient filter, before the optimizer consumed it."""
    eps: float = 0.0
    """Relative rounding of the recorded parameters."""
    gap: int = 0
    """Training steps without a record that it stands for; 0: it is a step."""
    precision: float = 0.0
    """ε of the numbers that autocast computed its forward passes in; 0 without."""


@dataclass(frozen=True)
class Carried:
    """What one step hands to the next beside the parameters; None where the run has no such thing."""

    momentum: Tensor | None = None  # [param]
    filtered: Tensor | None = None  # what the gradient filter remembers [slot, param]

    def less(self, other: "Carried") -> "Carried":
        """How much it is more than another; None where either has no such thing."""
        pairs = ((self.momentum, other.momentum), (self.filtered, other.filtered))
        return Carried(*(None if a is None or b is None else a - b for a, b in pairs))


@dataclass(frozen=True)
class Segment:
    """Consecutive steps that begin where it is known what they were handed."""

    steps: tuple[Step, ...]
    carried: Carried


def with_examples(segments: Iterator[Segment], backwards: bool = False) -> Step:
    """The first of these steps that is not a gap; or the last of all, of segments that come last first."""
    return next(step for stretch in segments for step in (stretch.steps[::-1] if backwards else stretch.steps) if step.parts)


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
