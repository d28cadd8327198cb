"""Whose gradient the coming step consumes: the micro-batches since the last step, less those whose gradient was thrown away."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from explaind.record.hooks import Hook

CPU = torch.device("cpu")


def random_state(device: torch.device) -> Tensor:
    """State of the generators that a forward pass may draw from: the host's, then the device's where that has its own. uint8 [byte]."""
    host = torch.default_generator.get_state()  # as torch.get_rng_state does
    if device == CPU:  # sooner told than the type
        return host
    return torch.cat([host, torch.cuda.get_rng_state(device)]) if device.type == "cuda" else host


@dataclass(eq=False)
class MicroBatch:
    """Examples of one forward and backward pass."""

    ids: np.ndarray
    weights: np.ndarray
    random: Tensor
    """State of the generators before the pass."""
    drew: bool | None = None
    """Whether its forward pass drew random numbers; None until its backward pass begins."""
    precision: float = 0.0
    """ε of the numbers that autocast computed its forward pass in; 0 without."""
    over: bool = False
    """Whether another one was announced after its backward pass."""
    gradients: Tensor | None = None
    """Of its examples' shares of the loss, as the backward pass makes them: [example, param]; where a recording stores them."""
    reached: dict[int, int] = field(default_factory=dict)
    """By parameter: how often its gradient had begun anew when this backward pass reached it."""


class Incoming:
    """Watches the gradients of parameters grow, through hooks that torch calls when it has accumulated one.

    A gradient that is not the one that was left, plus one addition, has begun anew: it was zeroed, or removed, in between. What a
    micro-batch gave is then lost, as for a step that GradScaler skips. A version counter tells: nothing is compared or copied.
    """

    def __init__(self, params: Sequence[Tensor], device: torch.device, reduced: bool = False) -> None:
        """reduced: gradients are averaged over processes, in place, when a backward pass is through."""
        self._reduced = reduced
        self._params, self._device, self.kind = params, device, device.type
        self.pending: list[MicroBatch] = []
        """Announced since the last step."""
        self._left: list[tuple[int, int] | None] = [None] * len(params)  # identity and version of each gradient when torch left it
        self._begun = [0] * len(params)
        self._hooks = [p.register_post_accumulate_grad_hook(_Grown(self, i)) for i, p in enumerate(params) if p.requires_grad and p.is_leaf]

    def close(self) -> None:
        """Let go of the parameters."""
        for hook in self._hooks:
            hook.remove()

    def add(self, ids: np.ndarray, weights: np.ndarray, precision: float = 0.0) -> None:
        """Announce a micro-batch: ids and weights [batch]; precision: of its forward pass at least, as in ``lower``."""
        for batch in self.pending:
            batch.over = bool(batch.reached)
        if self._reduced:
            self._left = [None if p.grad is None else (p.grad._cdata, p.grad._version) for p in self._params]
        if torch.is_autocast_enabled(self.kind):
            precision = max(precision, self._precision())
        self.pending.append(MicroBatch(ids, weights, random_state(self._device), precision=precision))

    def lower(self) -> None:
        """The forward pass of the last micro-batch is computed by autocast."""
        if self.pending:
            self.pending[-1].precision = max(self.pending[-1].precision, self._precision())

    def _precision(self) -> float:
        """ε of the numbers that autocast computes in now."""
        return torch.finfo(torch.get_autocast_dtype(self.kind)).eps

    def taken(self) -> list[MicroBatch]:
        """The micro-batches that the gradients as they stand are sums of; one that was taken away alone (frozen by hand) does not count."""
        return [batch for batch in self.pending if self._stands(batch)]

    def clear(self) -> None:
        """Begin another step."""
        self.pending = []

    def drew(self, batch: MicroBatch) -> bool:
        """Whether its forward pass drew random numbers."""
        if batch.drew is None:
            # As bytes: to compare so few numbers, tensors take twice as long.
            batch.drew = batch.random.numpy().tobytes() != random_state(self._device).numpy().tobytes()
        return batch.drew

    @property
    def untouched(self) -> bool:
        """Whether every gradient is what backward passes left: not clipped, scaled or put there by hand."""
        for p, left in zip(self._params, self._left, strict=True):
            grad = p.grad
            if grad is not None and left != (grad._cdata, grad._version):
                return False
        return True

    def plain(self) -> MicroBatch | None:
        """The micro-batch whose gradient the coming step consumes, where that is told at a glance; else None.

        It is the only one, drew no random number, its backward pass reached every parameter, and nobody touched what it left.
        """
        if len(self.pending) != 1:
            return None
        batch = self.pending[0]
        if batch.drew is not False or len(batch.reached) != len(self._params):
            return None
        for p, left in zip(self._params, self._left, strict=True):
            grad = p.grad
            if grad is None or left != (grad._cdata, grad._version):
                return None
        return batch

    def _stands(self, batch: MicroBatch) -> bool:
        there = [self._begun[i] == begun for i, begun in batch.reached.items() if self._params[i].grad is not None]
        return all(there) and (bool(there) or not batch.reached)


class _Grown(Hook):
    """Torch has just accumulated the gradient of a parameter. It says so for every one, in every backward pass: all is done right here."""

    def __init__(self, incoming: Incoming, index: int) -> None:
        self._incoming, self._index = incoming, index

    def __call__(self, param: Tensor) -> None:
        own, index, grad = self._incoming, self._index, param.grad
        assert grad is not None
        left = own._left[index]
        now = own._left[index] = grad._cdata, grad._version
        if left is None or now != (left[0], left[1] + 1):
            own._begun[index] += 1
        for batch in own.pending:
            if not batch.over:
                if batch.drew is None:
                    own.drew(batch)
                batch.reached[index] = own._begun[index]


class Begins(Hook):
    """A forward pass begins."""

    def __init__(self, incoming: Incoming) -> None:
        self._incoming = incoming

    def __call__(self, *args: Any) -> None:
        if torch.is_autocast_enabled(self._incoming.kind):
            self._incoming.lower()
