"""One optimizer step as a linear filter of gradients with a frozen preconditioner.

Per parameter tensor, with z the momentum, G the consumed gradient and θ the parameters before the step:

    g  = sign · G + kappa · θ
    z' = M z + N g
    Δ  = −(C z' + E g) − R θ

The coefficients are facts of the recorded run (theory: learning rates, bias corrections and second moments are constants of
the decomposition). Credit is therefore conditional on the preconditioner that the run realised: it is an account of what
happened, not a prediction of what another run would do.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

Coefficient = float | Tensor
"""A scalar, or a diagonal with the shape of the parameter."""


@dataclass(frozen=True)
class Filter:
    """The coefficients of one step, of one parameter tensor or of all of them laid end to end."""

    M: Coefficient = 0.0
    N: Coefficient = 0.0
    C: Coefficient = 0.0
    E: Coefficient = 0.0
    R: Coefficient = 0.0
    kappa: Coefficient = 0.0
    sign: Coefficient = 1.0

    def consumed(self, gradient: Tensor, theta: Tensor) -> Tensor:
        """g = sign · G + kappa · θ, in the shape of theta."""
        return self.sign * gradient + self.kappa * theta

    def advance(self, momentum: Tensor, gradient: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        """(z, G, θ) -> (z', Δ), all in the shape of theta."""
        g = self.consumed(gradient, theta)
        after = self.M * momentum + self.N * g
        return after, -(self.C * after + self.E * g) - self.R * theta


IDLE = Filter(M=1.0)
"""A step in which a parameter had no gradient: torch leaves it and its momentum alone, decay included."""


def joined(filters: Sequence[Filter], sizes: Sequence[int], like: Tensor) -> Filter:
    """One filter for all parameters laid end to end: a coefficient stays a float where it is the same float everywhere."""

    def column(name: str) -> Coefficient:
        values = [getattr(f, name) for f in filters]
        if all(isinstance(v, float) and v == values[0] for v in values):
            return values[0]
        parts = [v.reshape(-1).to(like) if isinstance(v, Tensor) else like.new_full((n,), v) for v, n in zip(values, sizes, strict=True)]
        return torch.cat(parts)

    return Filter(**{f.name: column(f.name) for f in fields(Filter)})


@runtime_checkable
class Rule(Protocol):
    """What the package must know of an optimizer class; one file and one registry line each."""

    @property
    def optimizer(self) -> type[torch.optim.Optimizer]:
        """The class whose ``step`` the rule describes; subclasses that keep that ``step`` are covered."""
        ...

    @property
    def options(self) -> tuple[str, ...]:
        """Names of the numbers that ``read`` returns, stored per step and parameter group."""
        ...

    @property
    def momentum(self) -> str | None:
        """Key of z in the optimizer's state of a parameter; None where the optimizer has none."""
        ...

    def read(self, group: Mapping[str, Any]) -> tuple[float, ...]:
        """The options of a parameter group, as they stand at this step; RuleError for one that has no rule."""
        ...

    def preconditioner(self, group: Mapping[str, Any]) -> str | None:
        """Key of the frozen preconditioner's state after the step, in the optimizer's state of a parameter."""
        ...

    def age(self, state: Mapping[str, Any]) -> int:
        """How many updates this parameter had before this step, from the optimizer's state before the step."""
        ...

    def filter(self, options: Mapping[str, float], age: int, preconditioner: Tensor | None) -> Filter:
        """The coefficients of a step, from what was recorded of it."""
        ...


def numbers(group: Mapping[str, Any], keys: Iterable[str]) -> tuple[float, ...]:
    """Values of a parameter group as plain floats (learning rates may be tensors, flags become 0 or 1)."""
    return tuple(float(group[key]) for key in keys)
