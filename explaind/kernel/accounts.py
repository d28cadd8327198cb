"""What a sweep fills in: the rows of the ledger for one block of measures, and what is needed to check them."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from explaind.kernel.layout import Layout
from explaind.kernel.resolution import Resolution


@dataclass
class Accounts:
    """Rows indexed [entry, fine, measure(, example)]: entry on the step axis; fine is 1, layer (or group of layers) or param.

    Small rows and all checks are kept in float64, so that summing many steps adds no error of its own.
    """

    data: Tensor
    decay: Tensor
    momentum0: Tensor  # [fine, measure]
    buffers: Tensor
    gap: Tensor
    arithmetic: Tensor
    path: Tensor  # [entry, measure]
    movement: Tensor  # Σ_step |δ| [measure]
    path_absolute: Tensor  # Σ_step |path| [measure]
    arithmetic_absolute: Tensor  # Σ_step Σ_layer |arithmetic| [measure]
    by_step: Tensor  # Σ_measure of |δ|, |path| and |arithmetic|, [step, 3]
    replay_error: Tensor  # of every rebuilt update, [step, layer]
    notes: list[str] = field(default_factory=list)
    """What the path rule has to say of its choices."""
    recipes: list[str] = field(default_factory=list)
    """What the path rule did: [step]."""


def empty(resolution: Resolution, layout: Layout, measures: int, examples: int, like: Tensor) -> Accounts:
    """Accounts full of zeros. `examples` is 1 where that axis is summed."""
    fine = {"none": 1, "layer": len(layout.groups), "param": layout.params}[resolution.finest]
    entries = resolution.step_entries

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64, device=like.device)

    return Accounts(
        data=like.new_zeros(entries, fine, measures, examples),
        decay=zeros(entries, fine, measures),
        momentum0=zeros(fine, measures),
        buffers=zeros(entries, fine, measures),
        gap=zeros(entries, fine, measures),
        arithmetic=zeros(entries, fine, measures),
        path=zeros(entries, measures),
        movement=zeros(measures),
        path_absolute=zeros(measures),
        arithmetic_absolute=zeros(measures),
        by_step=zeros(resolution.steps, 3),
        replay_error=zeros(resolution.steps, len(layout.names)),
        recipes=[""] * resolution.steps,
    )
