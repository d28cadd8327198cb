"""One optimizer step as a linear filter of gradients with a frozen preconditioner.

Per parameter tensor, with z the momentum, G the consumed gradient and θ the parameters before the step:

    g  = sign · G + kappa · θ
    z' = M z + N g
    Δ  = −P (C z' + E g) − R θ

The coefficients are facts of the recorded run (theory: learning rates, bias corrections and second moments are constants of
the decomposition). Credit is therefore conditional on the preconditioner that the run realised: it is an account of what
happened, not a prediction of what another run would do.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

Coefficient = float | Tensor
"""A scalar, or a diagonal with the shape of the parameter."""


@dataclass(frozen=True)
class Mix:
    """X ↦ Q X (left) or X ↦ X Q, for a matrix X [row, column] that lies at `start` in a vector of parameters."""

    matrix: Tensor  # Q: [row, row] or [column, column]
    left: bool
    size: int
    """Numbers that X holds."""
    start: int = 0

    def __call__(self, values: Tensor, transposed: bool) -> Tensor:
        """Of its part of values [..., param]: [..., size]."""
        own, side = values[..., self.start : self.start + self.size], len(self.matrix)
        q = self.matrix.T if transposed else self.matrix
        x = own.reshape(*own.shape[:-1], *((side, -1) if self.left else (-1, side)))
        return (q @ x if self.left else x @ q).reshape(own.shape)


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
    rounding: Coefficient = 0.0
    """What the optimizer's own arithmetic, in a low precision, added to Δ: known, but no part of the filter."""
    P: tuple[Mix, ...] = ()
    """The identity but for these."""

    def consumed(self, gradient: Tensor, theta: Tensor) -> Tensor:
        """g = sign · G + kappa · θ, in the shape of theta."""
        return self.sign * gradient + self.kappa * theta

    def mixed(self, values: Tensor, transposed: bool = False) -> Tensor:
        """P or Pᵀ of values [..., param]."""
        if not self.P:
            return values
        out = values.clone()
        for mix in self.P:
            out[..., mix.start : mix.start + mix.size] = mix(values, transposed)
        return out

    def advance(self, momentum: Tensor, gradient: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        """(z, G, θ) -> (z', Δ), all of them [param]."""
        g = self.consumed(gradient, theta)
        after = self.M * momentum + self.N * g
        return after, -self.mixed(self.C * after + self.E * g) - self.R * theta


IDLE = Filter(M=1.0)
"""A step in which a parameter had no gradient: torch leaves it and its momentum alone, decay included."""
STILL = Filter()
"""What no optimizer moves: a buffer."""
COEFFICIENTS = tuple(f.name for f in fields(Filter) if f.name != "P")


def joined(filters: Sequence[Filter], sizes: Sequence[int], like: Tensor) -> Filter:
    """One filter for all parameters laid end to end: a coefficient stays a float where it is the same float everywhere."""

    def column(name: str) -> Coefficient:
        values = [getattr(f, name) for f in filters]
        if all(isinstance(v, float) and v == values[0] for v in values):
            return values[0]
        parts = [v.reshape(-1).to(like) if isinstance(v, Tensor) else like.new_full((n,), v) for v, n in zip(values, sizes, strict=True)]
        return torch.cat(parts)

    mixes, start = list[Mix](), 0
    for f, size in zip(filters, sizes, strict=True):
        mixes += [replace(mix, matrix=mix.matrix.to(like), start=start + mix.start) for mix in f.P]
        start += size
    return Filter(**{name: column(name) for name in COEFFICIENTS}, P=tuple(mixes))
