"""What a gradient filter remembers, followed while the training goes on: its output is seen, and it can be undone."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from explaind.errors import RecordError
from explaind.record.watched import Watched
from explaind.rules.gradient_filter import GradientFilter

Remembered = Mapping[str, Tensor | Sequence[Tensor]]
"""By parameter: the mean of its gradients, or the last of them, the newest at the end."""


class Filtering:
    """Follows a gradient filter through its own state, as if it were undone: the raw gradient is never kept."""

    def __init__(self, told: GradientFilter, watched: Watched, remembered: Remembered | None) -> None:
        self.told, self._watched = told, watched
        self._state = torch.zeros(told.slots, watched.params_count, dtype=watched.dtype, device=watched.device)
        self.seen = [self._begin(name, values) for name, values in self._named(remembered or {})]

    def _named(self, remembered: Remembered) -> list[tuple[int, Sequence[Tensor]]]:
        named = {name.removeprefix("module."): values for name, values in remembered.items()}
        found = [named.get(layer.name, ()) for layer in self._watched.layers]
        return [(i, [values] if isinstance(values, Tensor) else list(values)) for i, values in enumerate(found)]

    def _begin(self, index: int, values: Sequence[Tensor]) -> int:
        """Take over what it remembers of a parameter; how many gradients it has seen of it."""
        layer = self._watched.layers[index]
        if len(values) > self.told.slots or any(tuple(v.shape) != layer.shape for v in values):
            raise RecordError(
                "this is not what the gradient filter remembers",
                where=layer.name,
                expected=f"at most {self.told.slots} tensors of shape {layer.shape}",
                got=f"{len(values)} of {', '.join(sorted({str(tuple(v.shape)) for v in values}))}",
                do="give what gradfilter_ema or gradfilter_ma returned",
            )
        for slot, value in enumerate(reversed(values)):
            self._state[slot, layer.offset : layer.offset + layer.size] = value.detach().reshape(-1).to(self._state)
        return len(values)

    def anchor(self) -> np.ndarray:
        """What it remembers now: [slot · param]."""
        found: np.ndarray = self._state.reshape(-1).cpu().numpy().copy()
        return found

    def following(self) -> tuple[Tensor, list[int]]:
        """What it remembers once it has seen the gradients whose filtered values the optimizers are about to consume, and counts."""
        sizes = [layer.size for layer in self._watched.layers]
        active = [p.grad is not None for p in self._watched.params]
        passage = self.told.passage(self.seen, active, sizes, self._state)
        raw = passage.undo(self._state, self._watched.gradient())
        return passage.advance(self._state, raw)[0], [n + on for n, on in zip(self.seen, active, strict=True)]

    def take(self, following: tuple[Tensor, list[int]] | Any) -> None:
        """The step is made."""
        self._state, self.seen = following
