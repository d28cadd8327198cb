"""What is recorded of a step, as plain arrays."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np


class Pieces:
    """A vector [number] that stands in pieces, vectors of one dtype, which are read where they are: a large model is not copied."""

    def __init__(self, parts: Sequence[np.ndarray]) -> None:
        """parts: at least one."""
        self.parts, self.dtype, self.views = parts, parts[0].dtype, [part.data for part in parts]
        self.size = sum([len(part) for part in parts])
        self.shape = (self.size,)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        whole = np.concatenate(self.parts)
        return whole if dtype is None else whole.astype(dtype, copy=False)


Vector = np.ndarray | Pieces

SMALL = ("batch", "part", "weight", "hyper", "age")
"""Fields of a row that it always has, and that are gone through in one go."""


def between(vector: Vector, start: int, stop: int) -> np.ndarray:
    """The numbers [start, stop) of a vector."""
    if isinstance(vector, np.ndarray):
        return vector[start:stop]
    found, at = list[np.ndarray](), 0
    for part in vector.parts:
        found.append(part[max(0, start - at) : max(0, stop - at)])
        at += len(part)
    return np.concatenate(found)


@dataclass(frozen=True)
class StepRow:
    """What is recorded of one step beside the parameters that it leads to."""

    batch: np.ndarray  # int64 [slot]
    part: np.ndarray  # int32 [slot]
    weight: np.ndarray  # float64 [slot]
    hyper: np.ndarray  # float64 [layer, option]
    age: np.ndarray  # int32 [layer]
    mode: tuple[bool, ...]
    preconditioner: Vector | None  # [param]
    anchor: np.ndarray | None  # momentum before the step, [param]; only at the first step of a block
    scalars: np.ndarray | None = None  # float64 [layer, scalar]; where the rules need any
    consumed: np.ndarray | None = None  # float64 [layer, 2]: norm and largest size of a gradient that was changed after the backward pass
    random: np.ndarray | None = None  # uint8 [part · byte]: generators before each micro-batch, zeros where none was drawn from
    filtered: np.ndarray | None = None  # what the gradient filter remembered before the step, [slot · param]; where `anchor` is, if any
    precision: float = 0.0  # the floating point ε that autocast computed forward passes in; 0: that of the parameters
    state: np.ndarray | None = None  # uint32 [word]: the optimizer's before the step (record/living.py); thin runs, first of a block
    groups: np.ndarray | None = None  # uint8 [byte]: the parameter groups, as JSON; thin runs, where they changed
    gradients: np.ndarray | None = None
    """Of single examples, [slot, param]: on their way to disk, never in the log, and in no row that was read (``Run.gradients``)."""
    gradients_crc: np.ndarray | None = None  # uint32 [1]: their checksum, where a run stores them
    gap: int = 0  # training steps that were passed over without a record, which this row stands for; 0: a step

    @cached_property
    def small(self) -> bytes:
        """The bytes of the arrays of SMALL, end to end."""
        row = self.__dict__
        return b"".join([row[name].tobytes() for name in SMALL])
