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
from explaind.record.buffers import COUNTER, lazy, statistics
from explaind.record.per_example import per_example
from explaind.replay.recurrent import WrittenOut
from explaind.replay.steps import Drawn
from explaind.replay.surroundings import DifferentiableStatistics, Lifted, autocast_dtype, drawing, rounding_as
from explaind.store.manifest import Layer

Readout = Callable[[nn.Module, Any], Tensor]
"""(model, batch) -> Tensor: a measure or the losses of a batch."""


class Untransformable(ReplayError, RuntimeError):
    """The user's model or function does what torch.func has no way through. A RuntimeError, as torch's own: there may be another way."""


class _Call(nn.Module):
    """Lets ``functional_call`` swap the parameters of a model that a user's function calls, or reads, in any way it likes."""

    def __init__(self, model: nn.Module, readout: Readout) -> None:
        super().__init__()
        self.model, self.readout = model, readout

    def forward(self, batch: Any) -> Tensor:
        return self.readout(self.model, batch)


class _Scaled(torch.autograd.Function):
    """The same numbers, whose gradient is multiplied."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.factor * gradients[0], None


SCALE = {torch.bfloat16: 1.0, torch.float16: 2.0**10}
"""By which losses are multiplied for a backward pass, and gradients divided: the smallest would be 0, as a GradScaler's user knows."""


class Functional:
    """readout(model, batch) as a function of parameters {name: tensor}; the user's model is copied, never touched."""

    def __init__(self, model: nn.Module, readout: Readout, device: torch.device, dtype: torch.dtype, moving: bool = False) -> None:
        """moving: whether buffers are among the parameters that it will be given."""
        self._moving = moving
        own = copied(model).to(device=device, dtype=dtype).requires_grad_(False)
        self._call = _Call(own.eval(), readout)
        self.model, self._device = own, device
        self._buffers = dict(own.named_buffers())
        self._counters: list[str] = []
        self._recurrent = any(isinstance(module, nn.RNNBase) for module in own.modules())
        self._dtype, self._casts = dtype, dict[tuple[bool, ...], bool]()
        self._autocast: torch.dtype | None = None

    def set_mode(self, mode: Sequence[bool], precision: float = 0.0) -> None:
        """Train or eval, module by module, and the ε of what autocast computed in (0: exact), as recorded.

        Under autocast numbers are rounded where the training rounded them; plain backward passes alone go through it then.
        """
        self._autocast = autocast_dtype(precision)
        for module, training in zip(self.model.modules(), mode, strict=True):
            module.training = training
        counting = (name for name, module in self.model.named_modules() if module.training and COUNTER in statistics(module))
        self._counters = [f"{name}.{COUNTER}".removeprefix(".") for name in counting]

    def __call__(self, parameters: Mapping[str, Tensor], batch: Any) -> Tensor:
        if isinstance(batch, Drawn):
            with drawing(batch.states, self._device):
                return self(parameters, batch.batch)
        if self._moving:  # a forward pass may move them in place: each begins with those that it is given
            parameters = {name: self._own(t) if name in self._buffers else t for name, t in parameters.items()}
            parameters |= {name: self._buffers[name].clone() for name in self._counters}
        if self._autocast is not None:
            return self._rounded(parameters, batch, self._autocast)
        mode = tuple(module.training for module in self.model.modules())
        lifted = Lifted(self._dtype) if self._casts.get(mode, True) else nullcontext()
        with lifted:
            found = self._called(parameters, batch)
        if isinstance(lifted, Lifted):
            self._casts[mode] = lifted.used  # a model without casts is not watched again
        return found

    def _own(self, buffer: Tensor) -> Tensor:
        return buffer.clone()

    def _rounded(self, parameters: Mapping[str, Tensor], batch: Any, precision: torch.dtype) -> Tensor:
        """In float32 under autocast, as a training has it: from and to the kernel's dtype."""
        scale = SCALE[precision]

        def single(leaf: Any) -> Any:
            return leaf.to(torch.float32) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

        still = {name: t for name, t in (*self.model.named_parameters(), *self.model.named_buffers()) if name not in parameters}
        scaled = {name: single(_Scaled.apply(t, 1 / scale)) for name, t in parameters.items()}
        with rounding_as(precision, self._device):
            found = self._called({**{name: single(t) for name, t in still.items()}, **scaled}, tree_map(single, batch))
        return _Scaled.apply(found.to(self._dtype), scale)

    def _called(self, parameters: Mapping[str, Tensor], batch: Any) -> Tensor:
        own = tree_map(lambda leaf: leaf, batch)  # containers of its own, which a function may change
        before = _versions(own)
        with DifferentiableStatistics() if self._moving else nullcontext(), WrittenOut() if self._recurrent else nullcontext():
            try:
                found: Tensor = functional_call(self._call, {f"model.{name}": tensor for name, tensor in parameters.items()}, (own,))
            except (RuntimeError, NotImplementedError) as error:
                if torch._C._functorch.peek_interpreter_stack() is None:
                    raise
                raise self._no_way(error) from error
        if _versions(batch) != before:
            raise ReplayError(
                "losses or measure change the batch that they are given",
                expected="a function without side effects",
                got="a tensor that was changed in place",
                do="copy what you change, for instance x / 255 in place of x.div_(255)",
            )
        return found

    def _no_way(self, error: Exception) -> Untransformable:
        """What stopped a transform of torch.func, and in which module of the model."""
        names, where, trace = {module: name for name, module in self.model.named_modules()}, "", error.__traceback__
        while trace is not None:  # inwards
            own = trace.tb_frame.f_locals.get("self")
            where = names.get(own, where) if isinstance(own, nn.Module) else where
            trace = trace.tb_next
        kind = type(self.model).__qualname__
        return Untransformable(
            "the model, or what is asked of it, cannot be differentiated by torch.func",
            where=f"{kind}, {where}" if where else kind,
            got=(str(error).strip() or type(error).__name__).splitlines()[0][:160],
            do="leave products='auto', which goes another way; or pad and mask in place of packing, keep to torch in place of numpy, "
            "and give an autograd.Function of your own a setup_context and generate_vmap_rule = True",
        )


class Training(Functional):
    """The losses of a training, one an example. Buffers are no parameters of theirs: no gradient goes to them, as in the training."""

    def __init__(self, model: nn.Module, losses: Readout, device: torch.device, dtype: torch.dtype, moving: bool = False) -> None:
        super().__init__(model, per_example(losses), device, dtype, moving)

    def _own(self, buffer: Tensor) -> Tensor:
        return buffer.detach().clone()


def _versions(batch: Any) -> list[int]:
    """How often each tensor was changed in place."""
    return [leaf._version for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and not leaf.is_inference()]


def copied(model: nn.Module) -> nn.Module:
    """A model of one's own; ReplayError where it is not ready, or cannot be copied.

    Tensors that hooks compute of parameters before a forward pass (weight_norm, spectral_norm, pruning) come along as numbers.
    """
    if name := lazy(model):
        raise ReplayError("a lazy module has no parameters yet", where=name, do="run one batch through the model first")
    held = (t for module in model.modules() for t in vars(module).values())
    memo: dict[int, Any] = {id(t): t.detach().clone() for t in held if isinstance(t, Tensor) and not t.is_leaf}
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:  # whatever the user's modules raise
        raise ReplayError(
            "the model cannot be copied",
            where=type(model).__qualname__,
            got=f"{type(error).__name__}: {error}"[:200],
            do="give a model that copy.deepcopy takes, for instance one that was just made",
        ) from error


def fitted(model: nn.Module, layers: Sequence[Layer], constants: Mapping[str, np.ndarray]) -> nn.Module:
    """A copy of the model with the run's frozen parameters and buffers; ReplayError when it is not the recorded architecture."""
    own = copied(model)
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
