"""Tensors of a model as vectors on the host, layer by layer: most stand there already as they are recorded, and are not copied."""

from collections.abc import Sequence
from operator import attrgetter

import numpy as np
import torch
from torch import Tensor

from explaind.store.manifest import Layer
from explaind.store.row import Pieces

POINTER, CONTIGUOUS, NUMBERS, DTYPE = Tensor.data_ptr, Tensor.is_contiguous, Tensor.numel, attrgetter("dtype")
NOWHERE = list[int](), list[int](), Pieces([np.empty(0)])


class Views:
    """Makes vectors [param] of one tensor a layer; bfloat16 and float16 embed in float32 without loss."""

    def __init__(self, layers: Sequence[Layer], dtype: torch.dtype, device: torch.device) -> None:
        self._layers, self._dtype, self._device = layers, dtype, device
        self._rooms: dict[str, Tensor] = {}
        self._numpy = torch.empty(0, dtype=dtype).numpy().dtype
        self._known: dict[str, tuple[list[int], list[int], Pieces]] = {}
        """Where tensors stood, how many numbers each held, and the vector that was made of them."""

    def pieces(self, tensors: Sequence[Tensor | None], room: str) -> Pieces:
        """A vector that changes with the tensors; None stands for zeros.

        room: what it is for. What does not stand on the host as it is recorded is copied, every time into the same memory.
        """
        if self._device.type != "cpu":
            whole = self.flat(tensors, room)
            return Pieces([whole[a.offset : a.offset + a.size] for a in self._layers])
        return Pieces([self._piece(layer, tensor, room) for layer, tensor in zip(self._layers, tensors, strict=True)])

    def lasting(self, tensors: Sequence[Tensor], room: str) -> Pieces:
        """The same of tensors that stay where they are from step to step."""
        if self._device.type != "cpu":
            return self.pieces(tensors, room)
        pointers, sizes, known = self._known.get(room, NOWHERE)
        # The known pieces keep their memory alive: no other tensor can have come to stand there.
        stay = [*map(POINTER, tensors)] == pointers and [*map(NUMBERS, tensors)] == sizes
        if not (stay and all(map(CONTIGUOUS, tensors)) and {*map(DTYPE, tensors)} == {self._dtype}):
            there = [self._there(layer, tensor) for layer, tensor in zip(self._layers, tensors, strict=True)]
            known = Pieces([self._piece(layer, tensor, room) for layer, tensor in zip(self._layers, tensors, strict=True)])
            places = [tensor.data_ptr() if here else -1 for tensor, here in zip(tensors, there, strict=True)]
            self._known[room] = places, [len(piece) for piece in known.parts], known
        return known

    def glanced(self, tensors: Sequence[Tensor], room: str) -> Pieces:
        """The same, of tensors that ``lasting`` has looked at closely a moment ago: do they still stand where they stood?"""
        pointers, _, known = self._known.get(room, NOWHERE)
        return known if [*map(POINTER, tensors)] == pointers else self.lasting(tensors, room)

    def in_place(self, room: str) -> bool:
        """Whether ``lasting`` copied none of them."""
        pointers = self._known.get(room, NOWHERE)[0]
        return bool(pointers) and -1 not in pointers

    def _piece(self, layer: Layer, tensor: Tensor | None, room: str) -> np.ndarray:
        if tensor is None:
            return np.zeros(layer.size, self._numpy)  # memory that is never written to takes none
        if self._there(layer, tensor):
            found: np.ndarray = (tensor.detach() if tensor.requires_grad else tensor).numpy()
            return found if found.ndim == 1 else found.reshape(-1)
        return self._copy(layer, tensor, room)

    def _there(self, layer: Layer, tensor: Tensor) -> bool:
        alike = tensor.dtype is self._dtype and tensor.numel() == layer.size
        return alike and tensor.device.type == "cpu" and tensor.is_contiguous()

    def _copy(self, layer: Layer, tensor: Tensor | None, room: str) -> np.ndarray:
        own = self._room(room)[layer.offset : layer.offset + layer.size]
        if tensor is None:
            own.zero_()
        else:
            own.copy_(tensor.detach().reshape(-1))
        found: np.ndarray = own.numpy()
        return found

    def flat(self, tensors: Sequence[Tensor | None], room: str) -> np.ndarray:
        """A copy, in one piece."""
        whole = self._room(room)
        if self._device.type == "cpu":
            for layer, tensor in zip(self._layers, tensors, strict=True):
                self._copy(layer, tensor, room)
        else:  # one copy between devices instead of one a layer
            parts = [torch.zeros(a.size, device=self._device) if t is None else t for a, t in zip(self._layers, tensors, strict=True)]
            whole.copy_(torch.cat([t.detach().reshape(-1).to(self._dtype) for t in parts]))
        return whole.numpy()

    def forget(self, room: str) -> None:
        """Give its memory back."""
        self._rooms.pop(room, None)

    def _room(self, name: str) -> Tensor:
        """Memory for one vector [param] on the host, which takes none before it is used."""
        if name not in self._rooms:
            self._rooms[name] = torch.empty(sum(layer.size for layer in self._layers), dtype=self._dtype)
        return self._rooms[name]
