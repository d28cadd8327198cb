"""Parameters laid end to end: one vector [param] for all layers, and back."""

from collections.abc import Mapping, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from explaind.store.manifest import Layer


class Layout:
    """Where each layer stands in the flat parameter vector."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.names = tuple(layer.name for layer in layers)
        self.shapes = tuple(tuple(layer.shape) for layer in layers)
        self.sizes = tuple(layer.size for layer in layers)
        ends = tuple(accumulate(self.sizes))
        self.slices = tuple(slice(end - size, end) for end, size in zip(ends, self.sizes, strict=True))
        self.params = ends[-1] if ends else 0

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """[…, param] -> {layer: […, *shape]}, as views."""
        lead = flat.shape[:-1]
        return {n: flat[..., cut].reshape((*lead, *shape)) for n, cut, shape in zip(self.names, self.slices, self.shapes, strict=True)}

    def add(self, into: Tensor, parts: Mapping[str, Tensor], weight: float = 1.0) -> None:
        """into[…, param] += weight · parts, for the layers that parts has: ``split`` backwards, without building the flat vector."""
        lead = into.shape[:-1]
        for name, cut, size in zip(self.names, self.slices, self.sizes, strict=True):
            if name in parts:
                into[..., cut].add_(parts[name].reshape(*lead, size), alpha=weight)

    def dots(self, rows: Tensor, vector: Tensor) -> Tensor:
        """<rows, vector> layer by layer: [row, param], [param] -> [layer, row]."""
        return torch.stack([rows[:, cut] @ vector[cut] for cut in self.slices])
