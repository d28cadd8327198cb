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
EARLY = ("preconditioner", "anchor", "scalars", "consumed", "random", "filtered")
LATE = ("state", "groups", "gradients_crc")
"""Arrays that it may have; what is not an array stands between them where a row is summed up."""


def views_of(vector: Vector) -> Sequence[Any]:
    """The bytes of a vector, or of any array, piece by piece; what lies in order is not copied."""
    return vector.views if isinstance(vector, Pieces) else (np.ascontiguousarray(vector).data,)


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
        return self.batch.tobytes() + self.middle + self.age.tobytes()

    def forget(self) -> None:
        """Give ``small`` back, which is as large as a batch; it is made anew where it is asked for."""
        self.__dict__.pop("small", None)

    @cached_property
    def middle(self) -> bytes:
        """Those of all but the first and the last of them."""
        row = self.__dict__
        return b"".join([row[name].tobytes() for name in SMALL[1:-1]])

    @cached_property
    def held(self) -> tuple[str, ...]:
        """Names of the arrays of EARLY and LATE that it has."""
        row = self.__dict__
        return tuple([name for name in (*EARLY, *LATE) if row[name] is not None])

    @cached_property
    def views(self) -> tuple[list[Any], list[Any]]:
        """The bytes of those of EARLY, and of those of LATE, piece by piece."""
        row = self.__dict__
        early, late = ([view for name in names if row[name] is not None for view in views_of(row[name])] for names in (EARLY, LATE))
        return early, late

    @cached_property
    def alike(self) -> tuple[Any, ...]:
        """What most steps of a training have in common: all of the row but the numbers in its arrays."""
        row = self.__dict__
        return self.mode, self.gap, self.precision, self.held, [row[name].shape for name in (*SMALL, *self.held)]

    def again(self, batch: np.ndarray, age: np.ndarray) -> "StepRow":
        """The row of a step that differs from this one in its examples, which are as many, and in the ages of its parameters.

        Its vectors stand where those of this row stand, whatever numbers are there by now. Made much sooner than from its fields.
        """
        found = object.__new__(StepRow)
        small = batch.tobytes() + self.middle + age.tobytes()
        found.__dict__.update(self.__dict__, batch=batch, age=age, small=small)
        return found
