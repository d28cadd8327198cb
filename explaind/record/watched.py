"""What the recorder reads off a model and its optimizers: everything is laid end to end in one flat vector."""

import math
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from explaind.errors import RecordError, RuleError
from explaind.record.buffers import COUNTER, lazy, places_of, same, statistics
from explaind.record.groups import Groups
from explaind.record.views import Views
from explaind.rules import rule_of
from explaind.rules.rule import Moment, Rule
from explaind.store.checksums import theta_checksum
from explaind.store.manifest import ROUNDINGS, Layer, Optimized
from explaind.store.row import Pieces

FLAGS = ("foreach", "fused", "capturable")


class Watched:
    """A model and its optimizers, seen as flat vectors [param] in the order of ``model.named_parameters()``."""

    def __init__(self, optimizers: Sequence[Optimizer], model: nn.Module, watch: Sequence[str] = ()) -> None:
        """watch: names, or globs, of parameters that are recorded although no optimizer holds them yet."""
        if name := lazy(model):
            raise RecordError("a lazy module has no parameters yet", where=name, do="run one batch through the model before it is recorded")
        self.model, self._optimizers = model, tuple(optimizers)
        self.rules: tuple[Rule, ...] = tuple(rule_of(optimizer) for optimizer in optimizers)
        self.has_momentum = any(rule.momentum is not None for rule in self.rules)
        self.has_frozen = any(rule.frozen_state is not None for rule in self.rules)
        """Whether any rule freezes a tensor."""
        self._check_owners(dict(model.named_parameters()))
        owners = {id(p): k for k, optimizer in enumerate(optimizers) for group in optimizer.param_groups for p in group["params"]}
        own = {name: p for name, p in model.named_parameters() if id(p) in owners or _matches(name, watch)}
        moving = {f"{name}.{own}".removeprefix(".") for name, module in model.named_modules() for own in statistics(module)}
        buffers = {name: b for name, b in model.named_buffers() if b.is_floating_point() and (name in moving or _matches(name, watch))}
        self._params: list[Tensor] = [*own.values(), *buffers.values()]
        self.params = self._params
        self._check_kinds(list(own.values()))
        offsets = np.concatenate([[0], np.cumsum([p.numel() for p in self._params])]).tolist()
        self.layers = tuple(
            Layer(name, tuple(p.shape), o, p.numel(), -1 if name in buffers else owners.get(id(p), 0))
            for (name, p), o in zip([*own.items(), *buffers.items()], offsets, strict=False)
        )
        self.device, self.dtype = self._params[0].device, torch.float32
        for p in self._params:
            self.dtype = torch.promote_types(self.dtype, p.dtype)
        self._views = Views(self.layers, self.dtype, self.device)
        self._held, self._kept = [-1], list[tuple[Rule, dict[str, Any]]]()
        self._none = [dict[str, Tensor]()] * len(self.layers)
        self._remembers, self._reads = (any(getattr(rule, what) for rule in self.rules) for what in ("remembers", "reads_theta"))
        self.groups = Groups(self._optimizers, self.rules, self._params)
        self._scalars = max(len(rule.scalars) for rule in self.rules)
        self.hyper()  # refuse an option without a rule now rather than at the first step
        # A forward pass may assign a tensor to a buffer in place of moving it, so that they are looked up by name.
        places = places_of(model)
        self._moving = [(i, *places[a.name]) for i, a in enumerate(self.layers) if a.optimizer < 0]
        still: dict[str, Tensor] = {n: p for n, p in model.named_parameters() if n not in own}
        still |= {n: b for n, b in model.named_buffers() if n not in buffers}
        self._still = {n: (*places[n], t.detach().clone()) for n, t in still.items()}
        self._counters = {name for name in moving if name.endswith(COUNTER)}
        self.modules = tuple(name for name, _ in model.named_modules())
        self._tree = _tree(model)

    def _check_owners(self, named: dict[str, Tensor]) -> None:
        known, seen = {id(p): name for name, p in named.items()}, set[int]()
        for optimizer in self._optimizers:
            for p in (p for group in optimizer.param_groups for p in group["params"]):
                if id(p) not in known:
                    raise RecordError(
                        "the optimizer holds a parameter that the model does not have",
                        expected="parameters of the model",
                        got=f"one of shape {tuple(p.shape)}",
                        do="pass the model that the optimizer trains",
                    )
                if id(p) in seen:
                    raise RecordError("two optimizers hold one parameter", where=known[id(p)], do="give each parameter to one optimizer")
                seen.add(id(p))

    def _check_kinds(self, params: list[nn.Parameter]) -> None:
        if not params:
            raise RecordError("the optimizer holds no parameter of the model", do="pass the model that the optimizer trains")
        for p in params:
            if hasattr(p, "full_tensor"):
                raise RuleError("parameters that are sharded over processes have no rule", got=type(p).__name__, do="train with DDP")
            if p.is_complex() or p.is_sparse:
                raise RuleError("complex and sparse parameters have no rule", got=str(p.dtype), do="train with dense real parameters")

    @property
    def optimized(self) -> tuple[Optimized, ...]:
        """What a run says of its optimizers."""
        return tuple(
            Optimized(
                rule.optimizer.__name__,
                f"{type(optimizer).__module__}.{type(optimizer).__qualname__}",
                tuple({k: v for k, v in group.items() if k in FLAGS and v is not None} for group in optimizer.param_groups),
                rule.options,
                rule.scalars,
                max(rule.rounding, _rounding([p for group in optimizer.param_groups for p in group["params"]])),
            )
            for rule, optimizer in zip(self.rules, self._optimizers, strict=True)
        )

    def _states(self) -> list[tuple[Rule, dict[str, Any]]]:
        """The rule and the optimizer's state of every parameter; a buffer has no state."""
        held = list[int]()
        for optimizer in self._optimizers:  # to look them up, tensors are hashed, which takes longer
            held += [*map(id, optimizer.state), *map(id, optimizer.state.values())]
        if held != self._held:  # what is held here keeps its id
            pairs = zip(self._params, self.layers, strict=True)
            states = [{} if a.optimizer < 0 else self._optimizers[a.optimizer].state.get(p, {}) for p, a in pairs]
            self._kept = [(self.rules[a.optimizer], state) for a, state in zip(self.layers, states, strict=True)]
            self._held = held
        return self._kept

    @property
    def params_count(self) -> int:
        """How many numbers theta holds."""
        return sum(layer.size for layer in self.layers)

    def scale(self, optimizer: int) -> float:
        """What a GradScaler left its gradients multiplied by, for a fused optimizer to undo while it steps; 1 where there is no such."""
        return _scale(self._optimizers[optimizer : optimizer + 1])

    def gradient(self, optimizer: int | None = None) -> Tensor:
        """The gradients as the optimizers consume them, zeros where there is none: [param], on the device.

        optimizer: the one that is about to consume its own, where others' may not be ready yet and are left out as zeros.
        """
        own = [a.optimizer == optimizer or optimizer is None for a in self.layers]
        parts = [p.grad if mine and p.grad is not None else torch.zeros_like(p) for mine, p in zip(own, self._params, strict=True)]
        of = self._optimizers if optimizer is None else self._optimizers[optimizer : optimizer + 1]
        return torch.cat([part.detach().reshape(-1).to(self.dtype) for part in parts]).div_(_scale(of))

    def theta(self) -> Pieces:
        """The parameters [param], as they stand: the next step changes them."""
        for i, held, name in self._moving:
            self._params[i] = held[name]
        return self._views.lasting(self._params, "theta")

    def before(self) -> np.ndarray | None:
        """A copy of the parameters [param], where a rule must know what a step began with; the next call writes into the same memory."""
        return self._views.flat(self._params, "before") if self._reads else None

    def momentum(self) -> np.ndarray | None:
        """A copy of the optimizers' momentum [param]; None where no rule has one. The next call writes into the same memory."""
        if not self.has_momentum:
            return None
        return self._views.flat([None if rule.momentum is None else state.get(rule.momentum) for rule, state in self._states()], "momentum")

    def forget_momentum(self) -> None:
        """Nobody needs the copy any more, nor the next one soon."""
        self._views.forget("momentum")

    def frozen(self, tensors: Sequence[Tensor | None], lasting: bool = False) -> Pieces | None:
        """What the rules froze of a step, one tensor a layer: [param], as it stands; None where no rule freezes one.

        lasting: all of them belong to the optimizers' state, and are kept there.
        """
        if not self.has_frozen:
            return None
        kept = [tensor for tensor in tensors if tensor is not None] if lasting else []
        return self._views.lasting(kept, "frozen") if len(kept) == len(self.layers) else self._views.pieces(tensors, "frozen")

    def ages(self) -> list[int]:
        """Updates that each parameter had so far."""
        return [rule.age(state) for rule, state in self._states()]

    def remembered(self) -> list[dict[str, Tensor]]:
        """Copies of the state that the rules must know from before a step, parameter by parameter."""
        if not self._remembers:
            return self._none
        return [{key: state[key].clone() for key in rule.remembers if key in state} for rule, state in self._states()]

    def moments(self, optimizer: int, theta: np.ndarray | None, remembered: list[dict[str, Tensor]]) -> list[Moment | None]:
        """The step that one optimizer has just made from theta [param]; None for parameters that it did not step."""
        found, groups, states = list[Moment | None](), self.groups.all(), self._states()
        for p, layer, place, before, (_, state) in zip(self._params, self.layers, self.groups.places, remembered, states, strict=True):
            if layer.optimizer != optimizer or place < 0 or p.grad is None:
                found.append(None)
                continue
            own = None
            if theta is not None:
                own = torch.from_numpy(theta[layer.offset : layer.offset + layer.size].reshape(layer.shape)).to(p)
            found.append(Moment(own, p.grad, before, state, groups[place]))
        return found

    def no_scalars(self) -> np.ndarray | None:
        """Room for the numbers that the rules need of every update: zeros, float64 [layer, scalar]; None where none needs any."""
        return np.zeros((len(self.layers), self._scalars)) if self._scalars else None

    def hyper(self, again: bool = False) -> np.ndarray:
        """Hyper-parameters of every parameter's group, as they stand: float64 [layer, option], nan where there is none. For reading.

        again: right behind ``check_unchanged``, which has looked which parameters are in the groups.
        """
        if not again:
            self.groups.look()
        return self.groups.hyper()

    @property
    def steady(self) -> bool:
        """Whether the rows of two steps may be alike: one optimizer, nothing but it moves anything, and its rule needs to know no more of
        an update than one tensor at most."""
        return len(self.rules) == 1 and not (self._moving or self._remembers or self._reads or self._scalars)

    @property
    def in_place(self) -> bool:
        """Whether what the rules froze of a step last was recorded from where the optimizer keeps it, without a copy."""
        return self._views.in_place("frozen")

    def kept(self) -> Pieces | None:
        """What the rule of the only optimizer has frozen in its state of a step of all parameters, as ``frozen``; else None."""
        if not self.has_frozen:
            return None
        frozen, kept = self.rules[0].frozen, list[Tensor]()
        for moment in self.moments(0, None, self._none):
            tensor = None if moment is None else frozen(moment)
            if tensor is None:
                return None
            kept.append(tensor)
        return self._views.lasting(kept, "frozen")

    def mode(self) -> tuple[bool, ...]:
        """Whether each module is in train mode."""
        found = list[bool]()
        for module, children in self._tree:
            if [*module._modules.values()] != children:
                self._tree = _tree(self.model)
                return self.mode()
            found.append(module.training)
        return tuple(found)

    def constants(self) -> dict[str, np.ndarray]:
        """Frozen parameters and buffers, by name."""
        return {name: _host(copy) for name, (_, _, copy) in self._still.items()}

    def check_unchanged(self, previous: np.ndarray, known: np.ndarray, step: int) -> None:
        """RecordError when anything but the optimizer changed the model since the last step.

        known, previous: checksums of the parameters after it, and of those before it, which they continue: uint32 [layer].
        """
        self.groups.look()
        self.check_still(previous, known, step)
        for p in self.groups.strangers:
            names = {id(p): name for name, p in self.model.named_parameters()}
            raise RecordError(
                "the optimizer was given a parameter that is not recorded",
                where=f"before step {step}: {names.get(id(p), tuple(p.shape))}",
                do="name it when recording begins: explaind.record(…, watch=['head.*'])",
            )

    def check_still(self, previous: np.ndarray, known: np.ndarray, step: int) -> None:
        """The same, of all but the optimizers."""
        now = theta_checksum(self._views.glanced(self._params, "theta"), self.layers, previous)
        if now.tobytes() != known.tobytes():
            self._check_moved(now != known, step)
        for name, (held, key, copy) in self._still.items():
            if name not in self._counters and not same(held[key], copy):
                record = f"let it be recorded: explaind.record(…, watch=[{name!r}]), or keep it still"
                no_way = f"numbers of {copy.dtype} cannot be recorded: keep it still, or make it floating point and name it in watch="
                raise RecordError(
                    "a buffer or frozen parameter moved",
                    where=f"before step {step}: {name}",
                    expected="only the optimizer's parameters, and running statistics, to move",
                    do=record if copy.is_floating_point() else no_way,
                )

    def _check_moved(self, differs: np.ndarray, step: int) -> None:
        """Buffers may have moved; differs: bool [layer]."""
        moved = [a.name for a, differ in zip(self.layers, differs.tolist(), strict=True) if differ and a.optimizer >= 0]
        if moved:
            raise RecordError(
                "the model was changed between two steps",
                where=f"before step {step}: {', '.join(moved)}",
                expected="only the optimizer to change recorded parameters",
                do="start another recording after the change",
            )

    def gradient_sizes(self, optimizer: int) -> np.ndarray:
        """Norm and largest absolute value of every gradient as an optimizer consumes it, 0 of others and where there is none:
        float64 [layer, 2]."""
        own = [p.grad if a.optimizer == optimizer else None for a, p in zip(self.layers, self._params, strict=True)]
        grads = [torch.zeros(1) if grad is None else grad.detach() for grad in own]
        pairs = [[torch.linalg.vector_norm(g, ord, dtype=torch.float64) for ord in (2, torch.inf)] for g in grads]
        return np.array([[float(size) for size in pair] for pair in pairs]) / self.scale(optimizer)

    def check_gradients(self, optimizer: int, step: int) -> None:
        """RecordError when a gradient that an optimizer consumes is not finite (a NaN loss) or sparse, or when nothing has any.

        What the others hold is not asked: a GradScaler may yet skip them.
        """
        names, grads, given = list[str](), list[Tensor](), False
        for layer, p in zip(self.layers, self._params, strict=True):
            grad = p.grad
            if grad is None:
                continue
            given = True
            if layer.optimizer == optimizer:
                names.append(layer.name)
                grads.append(grad)
                if grad.is_sparse:
                    raise RecordError("a sparse gradient cannot be recorded", where=f"step {step}: {layer.name}", do="use sparse=False")
        # One number tells of all: a norm is not finite where any number is not, or where it is too large itself.
        if grads and not math.isfinite(sum(map(Tensor.item, torch._foreach_norm(grads)))):
            self._check_finite(names, grads, step)
        if not given:
            raise RecordError("no parameter has a gradient", where=f"step {step}", do="call backward() before optimizer.step()")

    def _check_finite(self, names: Sequence[str], grads: Sequence[Tensor], step: int) -> None:
        for name, grad in zip(names, grads, strict=True):
            if not torch.isfinite(grad).all():
                raise RecordError(
                    "a gradient is not finite (a NaN or infinite loss)",
                    where=f"step {step}: {name}",
                    expected="finite numbers",
                    got="nan" if grad.isnan().any() else "inf",
                    do="lower the learning rate; the steps before are kept",
                )


def _tree(model: nn.Module) -> list[tuple[nn.Module, list[nn.Module | None]]]:
    """Every module, in order, with the children that it has."""
    return [(module, [*module._modules.values()]) for module in model.modules()]


def _rounding(params: Sequence[Tensor]) -> float:
    """How far, relative to an update, parameters in a precision lower than float32 may be from exact; 0 where there are none."""
    coarsest = max((torch.finfo(p.dtype).eps for p in params), default=0.0)
    return ROUNDINGS * coarsest if coarsest > torch.finfo(torch.float32).eps else 0.0


def _matches(name: str, globs: Sequence[str]) -> bool:
    return any(fnmatchcase(name, glob) for glob in globs)


def model_name(model: nn.Module) -> str:
    """Module and name of the model's class."""
    return f"{type(model).__module__}.{type(model).__qualname__}"


def _host(tensor: Tensor) -> np.ndarray:
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).cpu().numpy()


def _scale(optimizers: Sequence[torch.optim.Optimizer]) -> float:
    found = (getattr(optimizer, "grad_scale", None) for optimizer in optimizers)
    return next((float(scale) for scale in found if scale is not None), 1.0)
