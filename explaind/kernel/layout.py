"""Parameters laid end to end: one vector [param] for all layers, and back."""

from collections.abc import Mapping, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from explaind.kernel.groups import Grouping
from explaind.store.manifest import Layer


class Layout:
    """Where each layer stands in the flat parameter vector, and which group of layers it is counted with."""

    def __init__(self, layers: Sequence[Layer], groups: Grouping | None = None) -> None:
        """groups: of layers; by default every layer is one of its own."""
        self.names = tuple(layer.name for layer in layers)
        self.shapes = tuple(tuple(layer.shape) for layer in layers)
        self.sizes = tuple(layer.size for layer in layers)
        ends = tuple(accumulate(self.sizes))
        self.slices = tuple(slice(end - size, end) for end, size in zip(ends, self.sizes, strict=True))
        self.params = ends[-1] if ends else 0
        self.moving = tuple(layer.optimizer < 0 for layer in layers)
        """Which layers are buffers, that no optimizer moves."""
        self.groups = self.names if groups is None else groups.names
        self.group = tuple(range(len(self.names))) if groups is None else tuple(groups.of.tolist())

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

    def grouped(self, by_layer: Tensor) -> Tensor:
        """[layer, …] -> [group, …], summed."""
        if self.groups == self.names:
            return by_layer
        into = by_layer.new_zeros(len(self.groups), *by_layer.shape[1:])
        for group, values in zip(self.group, by_layer, strict=True):
            into[group] += values
        return into

    def parted(self, vector: Tensor) -> tuple[Tensor, Tensor]:
        """A vector [param] without its buffers, and without anything else."""
        buffers = torch.zeros_like(vector)
        for cut, moving in zip(self.slices, self.moving, strict=True):
            if moving:
                buffers[cut] = vector[cut]
        return vector - buffers, buffers
