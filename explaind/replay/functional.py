"""The user's model as a pure function of its recorded parameters."""

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves, tree_map

from explaind.errors import ReplayError
from explaind.record.watched import statistics
from explaind.replay.steps import Drawn
from explaind.replay.surroundings import DifferentiableStatistics, Lifted, drawing
from explaind.store.manifest import Layer

Readout = Callable[[nn.Module, Any], Tensor]
"""(model, batch) -> Tensor: a measure or the losses of a batch."""


class _Call(nn.Module):
    """Lets ``functional_call`` swap the parameters of a model that a user's function calls, or reads, in any way it likes."""

    def __init__(self, model: nn.Module, readout: Readout) -> None:
        super().__init__()
        self.model, self.readout = model, readout

    def forward(self, batch: Any) -> Tensor:
        return self.readout(self.model, batch)


class Functional:
    """readout(model, batch) as a function of parameters {name: tensor}; the user's model is copied, never touched."""

    def __init__(self, model: nn.Module, readout: Readout, device: torch.device, dtype: torch.dtype, moving: bool = False) -> None:
        """moving: whether buffers are among the parameters that it will be given."""
        self._moving = moving
        own = copy.deepcopy(model).to(device=device, dtype=dtype).requires_grad_(False)
        self._call = _Call(own.eval(), readout)
        self.model, self._device = own, device
        self._buffers = dict(own.named_buffers())
        self._written: list[str] = []
        self._dtype, self._casts = dtype, dict[tuple[bool, ...], bool]()

    def set_mode(self, mode: Sequence[bool]) -> None:
        """Train or eval, module by module, as recorded."""
        for module, training in zip(self.model.modules(), mode, strict=True):
            module.training = training
        # In train mode a normalisation writes statistics that it does not read: they are no parameters of the losses then.
        self._written = [
            f"{name}.{buffer}".removeprefix(".")
            for name, module in self.model.named_modules()
            if module.training
            for buffer in statistics(module)
        ]

    def __call__(self, parameters: Mapping[str, Tensor], batch: Any) -> Tensor:
        if isinstance(batch, Drawn):
            with drawing(batch.states, self._device):
                return self(parameters, batch.batch)
        if self._written:
            parameters = {**parameters, **{name: self._buffers[name].clone() for name in self._written}}
        own = tree_map(lambda leaf: leaf, batch)  # containers of its own, which a function may change
        before = _versions(own)
        mode = tuple(module.training for module in self.model.modules())
        lifted = Lifted(self._dtype) if self._casts.get(mode, True) else nullcontext()
        with DifferentiableStatistics() if self._moving else nullcontext(), lifted:
            found: Tensor = functional_call(self._call, {f"model.{name}": tensor for name, tensor in parameters.items()}, (own,))
        if isinstance(lifted, Lifted):
            self._casts[mode] = lifted.used  # a model without casts is not watched again
        if _versions(batch) != before:
            raise ReplayError(
                "losses or measure change the batch that they are given",
                expected="a function without side effects",
                got="a tensor that was changed in place",
                do="copy what you change, for instance x / 255 in place of x.div_(255)",
            )
        return found


def _versions(batch: Any) -> list[int]:
    """How often each tensor was changed in place."""
    return [leaf._version for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and not leaf.is_inference()]


def fitted(model: nn.Module, layers: Sequence[Layer], constants: Mapping[str, np.ndarray]) -> nn.Module:
    """A copy of the model with the run's frozen parameters and buffers; ReplayError when it is not the recorded architecture."""
    own = copy.deepcopy(model)
    have = {name: tuple(p.shape) for name, p in own.named_parameters()}
    still = {**dict(own.named_parameters()), **dict(own.named_buffers())}
    want = {layer.name: layer.shape for layer in layers} | {name: values.shape for name, values in constants.items()}
    extra = [name for name in have if name not in want]
    for name, shape in want.items():
        got = tuple(still[name].shape) if name in still else "nothing of that name"
        if got != shape:
            raise ReplayError(
                "the model is not the one that was recorded",
                where=name,
                expected=f"shape {shape}",
                got=got,
                do="give the model class of the training",
            )
    if extra:
        raise ReplayError(
            "the model is not the one that was recorded",
            where=extra[0],
            expected="no such parameter",
            got=f"shape {have[extra[0]]}",
            do="give the model class of the training",
        )
    with torch.no_grad():
        for name, values in constants.items():
            still[name].copy_(torch.as_tensor(values))
    return own
