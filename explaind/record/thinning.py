"""Thin recordings: parameters and the optimizer's state every so many steps; of the steps between what it takes to live them again."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import ceil, sqrt
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.optim import Optimizer

from explaind.errors import RecordError
from explaind.record.incoming import MicroBatch
from explaind.record.living import packed_groups, packed_state
from explaind.store.manifest import Layer
from explaind.store.row import StepRow


def spacing(thin: int | str) -> int:
    """Steps between two stored states: a number, or "sqrt:STEPS" for the root of so many; RecordError for anything else."""
    found = re.fullmatch(r"sqrt:(\d+)", thin) if isinstance(thin, str) else None
    every = ceil(sqrt(int(found[1]))) if found else 0 if isinstance(thin, str | bool) else int(thin)
    if every < 1:
        raise RecordError(
            "thin is no spacing of stored states",
            expected="a number of steps, or 'sqrt:STEPS' with the number of steps to come",
            got=repr(thin),
            do="give for instance thin=32, or thin='sqrt:1000'",
        )
    return every


def refuse(what: str, do: str = "record without thin=", where: object = None) -> RecordError:
    """For what cannot be lived again."""
    return RecordError(f"a thin recording cannot live {what} again", where=where, do=do)


class Thinning:
    """What a recorder adds to and takes from its rows."""

    def __init__(self, optimizers: Sequence[Optimizer], model: nn.Module, params: Sequence[Tensor], layers: Sequence[Layer]) -> None:
        """RecordError names what cannot be lived again."""
        if len(optimizers) > 1:
            raise refuse("the steps of several optimizers")
        moving = [layer.name for layer in layers if layer.optimizer < 0]
        if moving:
            raise refuse("buffers that move", where=", ".join(moving[:3]))
        self._optimizer, self._params = optimizers[0], list(params)
        names = {layer.name for layer in layers}
        still = {name: t for name, t in (*model.named_parameters(), *model.named_buffers()) if name not in names}
        kinds = [str(p.dtype).removeprefix("torch.") for p in params]
        self.facts: Mapping[str, Any] = {"dtypes": kinds, "still": {name: str(t.dtype).removeprefix("torch.") for name, t in still.items()}}
        self._state: np.ndarray | None = None
        self._groups: np.ndarray | None = None

    def begin(self, first: bool, closure: object, step: int) -> None:
        """A step is about to be made; first: of a block. RecordError for what its optimizer keeps."""
        if closure is not None:
            raise refuse("a step with a closure", where=f"step {step}")
        self._state = packed_state(self._optimizer, self._params) if first else None
        self._groups = packed_groups(self._optimizer, self._params)

    def check(self, taken: Sequence[MicroBatch], step: int) -> None:
        """RecordError for micro-batches whose gradient cannot be made again."""
        if any(batch.precision for batch in taken):
            raise refuse("autocast", where=f"step {step}")

    def thinned(self, row: StepRow) -> StepRow:
        """The step as it is stored."""
        return replace(row, preconditioner=None, anchor=None, state=self._state, groups=self._groups)


def check_asked(thin: int | str | None, **others: object) -> int | None:
    """The spacing, None for a full recording; RecordError names an argument of ``explaind.record`` that does not go with it."""
    if thin is None:
        return None
    words = {
        "watch": "parameters that the optimizer is given later (watch=)",
        "steps": "windows of steps (steps=)",
        "gradient_filter": "a gradient filter (gradient_filter=)",
        "precision": "autocast (precision=)",
        "processes": "the gradients of several processes",
    }
    for name, what in words.items():
        if others.get(name):
            raise refuse(what)
    return spacing(thin)
