"""A value at both ends of a step, and how it changes when the parameters change: the algebra in which secant rules are written."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from explaind.kernel.secant.slopes import logarithm, reciprocal, reciprocal_root, root, smooth

Dims = int | list[int] | tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Pair:
    """An intermediate value of the model.

    a, b    its values at the two ends of the step
    d       the change that a change of the parameters makes of it, a linear function of that change; when the parameters change
            from their values at `a` to those at `b`, then d = b − a exactly (but for rounding)
    """

    a: Tensor
    b: Tensor
    d: Tensor

    @property
    def mid(self) -> Tensor:
        """(a + b) / 2."""
        return torch.lerp(self.a, self.b, 0.5)

    def linear(self, f: Callable[[Tensor], Tensor]) -> "Pair":
        """f(x) for a linear f."""
        return Pair(f(self.a), f(self.b), f(self.d))

    def elementwise(self, f: Callable[[Tensor], Tensor], slope: Tensor) -> "Pair":
        """f(x) with (f(b) − f(a)) / (b − a) given."""
        return Pair(f(self.a), f(self.b), slope * self.d)

    def __add__(self, other: "Pair | Tensor | float") -> "Pair":
        if isinstance(other, Pair):
            return Pair(self.a + other.a, self.b + other.b, self.d + other.d)
        a = self.a + other
        return Pair(a, self.b + other, self.d.expand(a.shape))

    def __neg__(self) -> "Pair":
        return Pair(-self.a, -self.b, -self.d)

    def __sub__(self, other: "Pair | Tensor | float") -> "Pair":
        return self + (-other)

    def __mul__(self, other: "Pair | Tensor | float") -> "Pair":
        if isinstance(other, Pair):
            return product(torch.mul, self, other)
        return Pair(self.a * other, self.b * other, self.d * other)

    __radd__, __rmul__ = __add__, __mul__

    def __truediv__(self, other: "Pair | Tensor | float") -> "Pair":
        return self * (other.reciprocal() if isinstance(other, Pair) else 1.0 / other)

    def reciprocal(self) -> "Pair":
        return self.elementwise(torch.reciprocal, reciprocal(self.a, self.b))

    def square(self) -> "Pair":
        return self.elementwise(torch.square, self.a + self.b)

    def sqrt(self) -> "Pair":
        return self.elementwise(torch.sqrt, root(self.a, self.b))

    def rsqrt(self) -> "Pair":
        return self.elementwise(torch.rsqrt, reciprocal_root(self.a, self.b))

    def exp(self) -> "Pair":
        return self.elementwise(torch.exp, smooth(torch.exp, self.a, self.b))

    def log(self) -> "Pair":
        return self.elementwise(torch.log, logarithm(self.a, self.b))

    def sum(self, dim: Dims, keepdim: bool = False) -> "Pair":
        return self.linear(lambda t: t.sum(dim, keepdim))

    def mean(self, dim: Dims, keepdim: bool = False) -> "Pair":
        return self.linear(lambda t: t.mean(dim, keepdim))

    def reshape(self, *shape: int) -> "Pair":
        return self.linear(lambda t: t.reshape(shape))


def product(op: Callable[..., Tensor], x: "Pair | Tensor | float", y: "Pair | Tensor | float") -> Pair:
    """op(x, y) for a bilinear op: δ(xy) = δx · mean(y) + mean(x) · δy, exactly b − a."""
    if isinstance(x, Pair) and isinstance(y, Pair):
        return Pair(op(x.a, y.a), op(x.b, y.b), op(x.d, y.mid) + op(x.mid, y.d))
    if isinstance(x, Pair):
        return x.linear(lambda t: op(t, y))
    assert isinstance(y, Pair)
    return y.linear(lambda t: op(x, t))


def at(value: Any, side: str) -> Any:
    """Arguments of an operation with every pair replaced by its value at "a" or "b"."""
    if isinstance(value, Pair):
        return getattr(value, side)
    if isinstance(value, (list, tuple)):
        return type(value)(at(v, side) for v in value)
    return value


def has_pair(value: Any) -> bool:
    """Whether a pair is among arguments."""
    if isinstance(value, (list, tuple)):
        return any(map(has_pair, value))
    return isinstance(value, Pair)
