"""Living a stretch of the training again: gradients from the batches, updates from the rule, and how far they are from the record."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from explaind.kernel.layout import Layout
from explaind.kernel.realised import realised
from explaind.kernel.whole import batch_gradient
from explaind.replay.steps import Carried, Segment, Step, Steps


@runtime_checkable
class Losses(Protocol):
    """The training loss of each example as a function of the parameters."""

    def __call__(self, parameters: Mapping[str, Tensor], batch: Any) -> Tensor:
        """Tensor[batch]."""
        ...

    def set_mode(self, mode: tuple[bool, ...], precision: float = 0.0) -> None:
        """Put every module into train or eval mode, as a step recorded it, and autocast to the precision with this ε (0: exact)."""
        ...


@dataclass(frozen=True)
class Rebuilt:
    """A step beside its replayed gradient and how far the update that the rule makes of it is from the recorded one."""

    step: Step
    gradient: Tensor
    passed: Tensor
    """The gradient as the optimizer consumed it: behind a gradient filter, where the run has one."""
    error: Tensor
    """Δ recorded − Δ rebuilt [param]."""

    def relative_error(self, layout: Layout) -> Tensor:
        """How far the rebuilt update is from the recorded one, layer by layer: float64 [layer].

        The smaller of two readings: |error| / |Δ|, both of the layer, and the gradient that would make up for the error over the
        whole gradient. A parameter whose gradient is nothing but rounding (the bias of attention's keys) moves as far under Adam as any
        other; the first reading alone would take that for a fault. Where no gradient moves a parameter, the first reading is taken.
        Rounding of the recorded parameters, which is much of a small update, is no error; nor is what the optimizer's own arithmetic is
        known to have rounded.
        """
        if self.step.gap:
            return torch.zeros(len(layout.names), dtype=torch.float64, device=self.error.device)
        f = self.step.filter
        unknown = self.error - f.rounding
        error = unknown.sign() * (unknown.abs() - self.step.eps * self.step.after.abs()).clamp_min(0.0)
        rate = torch.zeros_like(error) + (f.C * f.N + f.E)
        for mix in f.P:
            rate[mix.start : mix.start + mix.size] = 0.0  # where parameters are mixed, no single gradient makes up for an error
        needed = torch.where(rate != 0, error / rate, 0.0)
        whole = f.consumed(self.passed, self.step.theta).norm().double()
        found = (self.step.delta, error, needed, torch.where(rate != 0, 0.0, error))
        sizes, errors, gradients, others = (torch.stack([v[cut].norm() for cut in layout.slices]).double() for v in found)
        of_update, of_others = (torch.where(sizes > 0, error / sizes, error) for error in (errors, others))
        of_gradient = torch.maximum(torch.where(whole > 0, gradients / whole, torch.inf), of_others)
        smaller = torch.minimum(of_update, of_gradient)
        return torch.where(torch.tensor(layout.moving, device=smaller.device), 0.0, smaller)


def replayed(stretch: Segment, layout: Layout, losses: Losses, exact: bool = False) -> list[Tensor]:
    """The gradient that every step of a segment consumed, before its sign and coupled decay: [param] each.

    exact: without the rounding of autocast, where the training ran under it.
    """
    found = []
    for step in stretch.steps:
        losses.set_mode(step.mode, 0.0 if exact else step.precision)
        found.append(batch_gradient(losses, layout, step.theta, step.parts))
    return found


def rebuild(stretch: Segment, gradients: Sequence[Tensor], layout: Layout) -> tuple[list[Rebuilt], Carried]:
    """Advance a segment by the gradients of its steps: the steps, and what it hands to the next."""
    rebuilt = []
    momentum, filtered = stretch.carried.momentum, stretch.carried.filtered
    for recorded, gradient in zip(stretch.steps, gradients, strict=True):
        step, passed = realised(recorded, gradient, layout), gradient
        if step.passage is not None and filtered is not None:
            filtered, passed = step.passage.advance(filtered, gradient)
        before = torch.zeros_like(gradient) if momentum is None else momentum
        after, delta = step.filter.advance(before, passed, step.theta)
        momentum = None if momentum is None else after
        rebuilt.append(Rebuilt(step, gradient, passed, step.delta - delta))
    return rebuilt, Carried(momentum, filtered)


def as_trained(stretch: Segment, layout: Layout, losses: Losses) -> tuple[Segment, Tensor | None]:
    """A segment that autocast rounded, lived under it: with what was done to its gradients, and its relative errors [step, layer].

    Autocast rounds the gradient of a batch, which no example can be credited with: credits are of exact gradients, whose error is rounding.
    Whether the replay is the training is told by the rounded ones. A segment without autocast is as it was, its errors None.
    """
    if not any(step.precision for step in stretch.steps):
        return stretch, None
    lived, _ = rebuild(stretch, replayed(stretch, layout, losses), layout)
    errors = torch.stack([item.relative_error(layout) for item in lived])
    return replace(stretch, steps=tuple(replace(item.step, consumed=None) for item in lived)), errors


def replay_errors(steps: Steps, layout: Layout, losses: Losses, progress: Callable[[], None] = lambda: None) -> Tensor:
    """Relative error of every rebuilt update: float64 [step, layer]."""
    rows = []
    for stretch in steps.segments(steps.starts):
        for item in rebuild(stretch, replayed(stretch, layout, losses), layout)[0]:
            rows.append(item.relative_error(layout))
            progress()
    return torch.stack(rows)
