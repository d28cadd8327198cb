"""What the recorder reads off a model and its optimizer: everything is laid end to end in one flat vector."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from explaind.errors import RecordError, RuleError
from explaind.rules.rule import Rule
from explaind.store.manifest import Layer


class Watched:
    """A model and its optimizer, seen as flat vectors [param] in the order of ``model.named_parameters()``."""

    def __init__(self, optimizer: torch.optim.Optimizer, model: nn.Module, rule: Rule) -> None:
        self.model, self._optimizer, self._rule = model, optimizer, rule
        names = {id(p): name for name, p in model.named_parameters()}
        groups = {id(p): g for g, group in enumerate(optimizer.param_groups) for p in group["params"]}
        strangers = [tuple(p.shape) for group in optimizer.param_groups for p in group["params"] if id(p) not in names]
        if strangers:
            raise RecordError(
                "the optimizer holds a parameter that the model does not have",
                expected="parameters of the model",
                got=f"one of shape {strangers[0]}",
                do="pass the model that the optimizer trains",
            )
        self._params = [p for p in model.parameters() if id(p) in groups]
        self._groups = [groups[id(p)] for p in self._params]
        self._check_kinds()
        offsets = np.concatenate([[0], np.cumsum([p.numel() for p in self._params])]).tolist()
        self.layers = tuple(
            Layer(names[id(p)], tuple(p.shape), o, p.numel(), g) for p, o, g in zip(self._params, offsets, self._groups, strict=False)
        )
        self.device = self._params[0].device
        self.dtype = torch.float32
        for p in self._params:
            self.dtype = torch.promote_types(self.dtype, p.dtype)
        for group in optimizer.param_groups:
            rule.read(group)  # refuse an option without a rule now rather than at the first step
        self._keys = [rule.preconditioner(optimizer.param_groups[g]) for g in self._groups]
        self.preconditioned = any(key is not None for key in self._keys)
        recorded = {id(p) for p in self._params}
        still = {n: p for n, p in model.named_parameters() if id(p) not in recorded} | dict(model.named_buffers())
        self._still = {n: (t, t.detach().clone()) for n, t in still.items()}
        self.modules = tuple(name for name, _ in model.named_modules())

    def _check_kinds(self) -> None:
        if not self._params:
            raise RecordError("the optimizer holds no parameter of the model", do="pass the model that the optimizer trains")
        for p in self._params:
            if p.is_complex() or p.is_sparse:
                raise RuleError("complex and sparse parameters have no rule", got=str(p.dtype), do="train with dense real parameters")

    def flat(self, tensors: list[Tensor | None]) -> np.ndarray:
        """One vector [param] on the host; None stands for zeros. bfloat16 and float16 embed in float32 without loss."""
        parts = [
            torch.zeros(p.numel(), dtype=self.dtype, device=p.device) if t is None else t.detach().reshape(-1).to(self.dtype)
            for t, p in zip(tensors, self._params, strict=True)
        ]
        return torch.cat(parts).cpu().numpy()

    def _state(self, p: Tensor) -> dict[str, Any]:
        return self._optimizer.state.get(p, {})

    def theta(self) -> np.ndarray:
        """The parameters [param]."""
        return self.flat(list(self._params))

    def momentum(self) -> np.ndarray | None:
        """The optimizer's momentum [param]; None where its rule has none."""
        key = self._rule.momentum
        return None if key is None else self.flat([self._state(p).get(key) for p in self._params])

    def preconditioner(self) -> np.ndarray | None:
        """The frozen preconditioner's state after the step [param]."""
        if not self.preconditioned:
            return None
        return self.flat([self._state(p).get(key) if key else None for p, key in zip(self._params, self._keys, strict=True)])

    def ages(self) -> np.ndarray:
        """Updates that each parameter had so far: int32 [layer]."""
        return np.array([self._rule.age(self._state(p)) for p in self._params], dtype=np.int32)

    def active(self, ages: np.ndarray) -> np.ndarray:
        """ages, with −1 for parameters that had no gradient at this step."""
        return np.array([age if p.grad is not None else -1 for p, age in zip(self._params, ages, strict=True)], dtype=np.int32)

    def hyper(self) -> np.ndarray:
        """Hyper-parameters as they stand: float64 [group, option]."""
        return np.array([self._rule.read(group) for group in self._optimizer.param_groups], dtype=np.float64)

    def mode(self) -> tuple[bool, ...]:
        """Whether each module is in train mode."""
        return tuple(m.training for m in self.model.modules())

    def random(self) -> Tensor:
        """State of the generators that a forward pass may draw from: the host's, and the model's device's where that has its own."""
        own = [torch.cuda.get_rng_state(self.device)] if self.device.type == "cuda" else []
        return torch.cat([torch.get_rng_state(), *own])

    def constants(self) -> dict[str, np.ndarray]:
        """Frozen parameters and buffers, by name."""
        return {name: _host(copy) for name, (_, copy) in self._still.items()}

    def check_unchanged(self, theta: np.ndarray, step: int) -> None:
        """RecordError when anything but the optimizer changed the model since the last step."""
        now = self.theta()
        if not np.array_equal(now, theta, equal_nan=True):
            differs = [
                a.name for a in self.layers if not np.array_equal(now[a.offset : a.offset + a.size], theta[a.offset : a.offset + a.size])
            ]
            raise RecordError(
                "the model was changed between two steps",
                where=f"before step {step}: {', '.join(differs)}",
                expected="only the optimizer to change recorded parameters",
                do="start another recording after the change",
            )
        count = sum(len(group["params"]) for group in self._optimizer.param_groups)
        if count != len(self._params):
            raise RecordError(
                "the optimizer's parameters changed",
                where=f"before step {step}",
                expected=len(self._params),
                got=count,
                do="start another recording after adding parameters",
            )
        for name, (tensor, copy) in self._still.items():
            if not torch.equal(tensor, copy):
                raise RecordError(
                    "a buffer or frozen parameter moved",
                    where=f"before step {step}: {name}",
                    expected="only the optimizer's parameters to move",
                    do="put such modules (BatchNorm) in eval mode",
                )

    def check_gradients(self, step: int) -> None:
        """RecordError when a gradient is not finite (a NaN loss), sparse, or when there is none at all."""
        grads = [(a.name, p.grad) for a, p in zip(self.layers, self._params, strict=True) if p.grad is not None]
        for name, grad in grads:
            if grad.is_sparse:
                raise RecordError("a sparse gradient cannot be recorded", where=f"step {step}: {name}", do="use sparse=False")
            if not torch.isfinite(grad).all():
                raise RecordError(
                    "a gradient is not finite (a NaN or infinite loss)",
                    where=f"step {step}: {name}",
                    expected="finite numbers",
                    got="nan" if grad.isnan().any() else "inf",
                    do="lower the learning rate; the steps before are kept",
                )
        if not grads:
            raise RecordError("no parameter has a gradient", where=f"step {step}", do="call backward() before optimizer.step()")


def model_name(model: nn.Module) -> str:
    """Module and name of the model's class."""
    return f"{type(model).__module__}.{type(model).__qualname__}"


def _host(tensor: Tensor) -> np.ndarray:
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).cpu().numpy()
