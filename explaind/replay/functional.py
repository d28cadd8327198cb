"""The user's model as a pure function of its recorded parameters."""

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves, tree_map

from explaind.errors import ReplayError
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

    def __init__(self, model: nn.Module, readout: Readout, device: torch.device, dtype: torch.dtype) -> None:
        own = copy.deepcopy(model).to(device=device, dtype=dtype).requires_grad_(False)
        self._call = _Call(own.eval(), readout)
        self.model = own

    def set_mode(self, mode: Sequence[bool]) -> None:
        """Train or eval, module by module, as recorded."""
        for module, training in zip(self.model.modules(), mode, strict=True):
            module.training = training

    def __call__(self, parameters: Mapping[str, Tensor], batch: Any) -> Tensor:
        own = tree_map(lambda leaf: leaf, batch)  # containers of its own, which a function may change
        before = _versions(own)
        found: Tensor = functional_call(self._call, {f"model.{name}": tensor for name, tensor in parameters.items()}, (own,))
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


class _DifferentiableAttention(AbstractContextManager[None]):
    """Attention in its math form: the fused kernels have no forward-mode derivative."""

    def __enter__(self) -> None:
        self._fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        self._math = sdpa_kernel(SDPBackend.MATH)
        self._math.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._math.__exit__(*error)
        torch.backends.mha.set_fastpath_enabled(self._fast)


def differentiable_attention() -> AbstractContextManager[None]:
    """Within it every attention of torch has reverse- and forward-mode derivatives; settings are put back afterwards."""
    return _DifferentiableAttention()
