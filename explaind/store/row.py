"""What is recorded of a step, as plain arrays."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class StepRow:
    """What is recorded of one step beside the parameters that it leads to."""

    batch: np.ndarray  # int64 [slot]
    part: np.ndarray  # int32 [slot]
    weight: np.ndarray  # float64 [slot]
    hyper: np.ndarray  # float64 [layer, option]
    age: np.ndarray  # int32 [layer]
    mode: tuple[bool, ...]
    preconditioner: np.ndarray | None  # [param]
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
