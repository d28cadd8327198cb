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
