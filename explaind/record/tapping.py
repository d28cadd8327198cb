"""Gradients of single examples out of a training's own forward and backward pass: nothing is computed twice, and nothing is changed.

A forward hook keeps the input x of a module, a hook on its output y the gradient δ of the loss by y. The example's gradient is then

linear map     Σ_position δ ⊗ x
convolution    Σ_position δ ⊗ patch of x
embedding      Σ_position δ ⊗ one-hot x
normalisation  Σ_position δ · x̂, with x̂ = (x − mean) / √(var + ε) as the module has it

and Σ_position δ for every bias (Goodfellow 2015, arXiv 1510.01799). Rows of x and y must be the announced examples, in their order.
A module that is called more than once, and a tensor that several modules share, add up.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from explaind.record.hooks import Hook
from explaind.record.incoming import MicroBatch

Views = Mapping[str, Tensor]
"""Where the gradients of a module's weight and bias are added up: [example, *shape]."""


def _linear(module: Any, x: Tensor, delta: Tensor, into: Views) -> None:
    x, delta = (t.flatten(1, -2) if t.ndim > 2 else t.unsqueeze(1) for t in (x, delta))  # [example, position, in or out]
    if "weight" in into:
        _outer(into["weight"], delta, x)
    if "bias" in into:
        into["bias"].add_(delta.sum(1))


def _outer(into: Tensor, delta: Tensor, x: Tensor) -> None:
    """into[example, out, in] += Σ_position δ ⊗ x"""
    if x.shape[1] == 1:
        into.addcmul_(delta[:, 0, :, None], x[:, 0, None, :])
    else:
        into.baddbmm_(delta.mT, x)


def _convolution(module: Any, x: Tensor, delta: Tensor, into: Views) -> None:
    delta = delta.flatten(2)  # [example, out, position]
    if "bias" in into:
        into["bias"].add_(delta.sum(2))
    if "weight" not in into:
        return
    groups, kernel = module.groups, module.weight.shape[2:]
    if module.padding_mode != "zeros":
        x = F.pad(x, module._reversed_padding_repeated_twice, mode=module.padding_mode)
    else:
        x = F.pad(x, _edges(module))
    for dim, (k, step, spread) in enumerate(zip(kernel, module.stride, module.dilation, strict=True)):
        x = x.unfold(2 + dim, (k - 1) * spread + 1, step)[..., ::spread]  # [example, in, *position, *kernel]
    x = x.unflatten(1, (groups, -1)).flatten(3, 2 + len(kernel)).flatten(4)  # [example, group, in, position, kernel]
    found = torch.einsum("bgop,bgipk->bgoik", delta.unflatten(1, (groups, -1)), x)
    into["weight"].add_(found.reshape(len(x), *module.weight.shape))


def _edges(module: Any) -> list[int]:
    """As F.pad takes them, the last dimension first."""
    if module.padding == "same":
        return list(module._reversed_padding_repeated_twice)
    padding = (0,) * len(module.kernel_size) if module.padding == "valid" else module.padding
    return [edge for p in reversed(padding) for edge in (p, p)]


def _embedding(module: Any, x: Tensor, delta: Tensor, into: Views) -> None:
    x, delta = x.reshape(len(x), -1), delta.reshape(len(delta), -1, delta.shape[-1])
    if module.padding_idx is not None:
        delta = delta * (x != module.padding_idx)[..., None]
    examples = torch.arange(len(x), device=x.device)[:, None]
    into["weight"].index_put_((examples, x), delta, accumulate=True)


def _normalised(normalise: Callable[[Any, Tensor], Tensor], last: bool, module: Any, x: Tensor, delta: Tensor, into: Views) -> None:
    """last: the weight runs along the last dimensions, else along dimension 1."""
    for name, view in into.items():
        found = delta * normalise(module, x) if name == "weight" else delta
        shape = view.shape[1:]
        view.add_(found.reshape(len(x), -1, *shape).sum(1) if last else found.flatten(2).sum(2) if found.ndim > 2 else found)


def _norm(kind: Callable[..., Tensor], last: bool, *options: str) -> Callable[..., None]:
    return partial(_normalised, lambda module, x: kind(x, *(getattr(module, name) for name in options), eps=module.eps), last)


FORMULAS: Mapping[type[nn.Module], Callable[[Any, Tensor, Tensor, Views], None]] = {
    nn.Linear: _linear,
    nn.Conv1d: _convolution,
    nn.Conv2d: _convolution,
    nn.Conv3d: _convolution,
    nn.Embedding: _embedding,
    nn.LayerNorm: _norm(F.layer_norm, True, "normalized_shape"),
    nn.GroupNorm: _norm(F.group_norm, False, "num_groups"),
    nn.RMSNorm: _norm(F.rms_norm, True, "normalized_shape"),
}
"""The modules whose gradients are taken so; one of another class has them too if it only inherits their forward pass."""


def kind_of(module: nn.Module) -> type[nn.Module] | None:
    """Which of FORMULAS a module has; None for any other."""
    kind = next((kind for kind in FORMULAS if isinstance(module, kind) and type(module).forward is kind.forward), None)
    if kind is nn.Embedding and (module.max_norm is not None or module.scale_grad_by_freq):
        return None  # a table that a lookup changes, and gradients that depend on the rest of the batch
    return kind


def uncovered(model: nn.Module, params: Sequence[Tensor]) -> str | None:
    """What of a model hooks cannot see, in words; None where they see the gradients of all of these parameters."""
    wanted = {id(p) for p in params}
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            return f"{name} ({type(module).__name__}: it can tie the examples of a batch together)"
        if isinstance(module, nn.MultiheadAttention):
            return f"{name} (MultiheadAttention: it does not call its projections as modules)"
        if module._compiled_call_impl is not None:
            return f"{name or 'the model'} (compiled)"
        for own, p in module._parameters.items():
            if p is not None and id(p) in wanted and (kind_of(module) is None or own not in ("weight", "bias")):
                return f"{name}.{own} of {type(module).__name__}".lstrip(".")
    return None


class Taps:
    """Hooks on the modules of a model that have a formula."""

    def __init__(self, model: nn.Module, places: Mapping[int, slice], like: Tensor, current: Callable[[], MicroBatch | None]) -> None:
        """
        places   by id of a parameter: where it stands in the flat vector [param]
        like     a vector of that kind
        current  the micro-batch that was announced last and is not stepped on yet
        """
        self._places, self._like, self._current = places, like, current
        self.fault: str | None = None
        """Why the gradients at hand cannot be used."""
        found = [
            (n, m) for n, m in model.named_modules() if kind_of(m) is not None and any(id(p) in places for p in m._parameters.values())
        ]
        self._hooks: list[RemovableHandle] = [m.register_forward_hook(Hook(self._called(n, m)), with_kwargs=True) for n, m in found]

    def close(self) -> None:
        """Let go of the modules."""
        for hook in self._hooks:
            hook.remove()

    def _called(self, name: str, module: nn.Module) -> Callable[..., None]:
        kind = kind_of(module)
        assert kind is not None
        formula = FORMULAS[kind]

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> None:
            if torch._C._are_functorch_transforms_active():
                self.fault = f"{name} was called inside of torch.func"
            elif torch.is_grad_enabled() and y.requires_grad:
                x = (args[0] if args else kwargs["input"]).detach()
                y.register_hook(partial(self._came_back, name, module, formula, x, self._current()))

        return hook

    def _came_back(
        self, name: str, module: nn.Module, formula: Callable[..., None], x: Tensor, batch: MicroBatch | None, delta: Tensor
    ) -> None:
        """The backward pass has reached the output of a module."""
        if batch is None:
            if self._current() is not None:
                self.fault = "a forward pass was made before its examples were announced"
            return  # of a step that is not recorded
        rows = len(batch.ids)
        if _rank(module) > x.ndim or x.shape[0] != rows or delta.shape[0] != rows:
            self.fault = f"{name} ({type(module).__name__}) was called with rows that are not the {rows} examples: input {tuple(x.shape)}"
            return
        try:
            with torch.no_grad(), torch.autocast(delta.device.type, enabled=False):
                formula(module, *self._precise(x, delta), self._views(module, batch))
        except (RuntimeError, IndexError, ValueError) as error:  # the training goes on to its step, where it is told
            self.fault = f"{name}: {type(error).__name__}: {error}"[:200]

    def _precise(self, x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        """In the precision that gradients are added up in; x rounded as autocast rounded it."""
        dtype = self._like.dtype
        return x.to(delta.dtype).to(dtype) if x.is_floating_point() else x, delta.to(dtype)

    def _views(self, module: nn.Module, batch: MicroBatch) -> dict[str, Tensor]:
        views = {}
        for name, p in module._parameters.items():
            if p is not None and p.requires_grad and id(p) in self._places:
                if batch.gradients is None:
                    batch.gradients = self._like.new_zeros(len(batch.ids), len(self._like))
                views[name] = batch.gradients[:, self._places[id(p)]].view(len(batch.ids), *p.shape)
        return views


def _rank(module: nn.Module) -> int:
    """Least number of dimensions of an input with a batch."""
    if isinstance(module, nn.Embedding):
        return 1
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return 1 + len(module.normalized_shape)
    return module.weight.ndim if isinstance(module, nn.modules.conv._ConvNd) else 2
