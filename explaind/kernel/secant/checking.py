"""Whether the secant of a function is one: every operation, on a step that is made up, where both ends and the change differ.

A rule may have been given arguments that it does not foresee. What it gets wrong shows where its arguments change by b − a, but its value
does not; that is seen once, at the beginning, and refused by the operation's name.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from explaind.kernel.secant.pair import Pair
from explaind.kernel.secant.rules import NoSecant, refuse
from explaind.kernel.secant.slopes import difference

ROUNDED = 1000
"""Units in the last place of the largest value about an operation that its change may be off by."""


def made_up(start: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters a small random step away, where nothing is zero by design."""
    generator = torch.Generator().manual_seed(0)
    return {n: t + 0.02 * torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t) * (1 + t.abs()) for n, t in start.items()}


class Checked:
    """The value of a node of the graph, as `value` gives it; NoSecant where its change is not b − a but for rounding."""

    def __init__(self, value: Callable[..., Any]) -> None:
        self._value = value
        self._eps = 0.0
        """Of the coarsest dtype so far: what was rounded once stays so."""

    def __call__(self, node: Any, args: Any, kwargs: Any) -> Any:
        try:
            value = self._value(node, args, kwargs)
        except NoSecant:
            raise
        except Exception as error:  # arguments that no rule foresaw stop this rule alone
            raise refuse(node.target, str(error).strip().splitlines()[0][:160] if str(error) else type(error).__name__) from error
        given, made = list(_pairs(args)), list(_pairs(value))
        scale = max((_largest(end) for pair in given + made for end in (pair.a, pair.b)), default=0.0)
        for pair in made:
            self._eps = max(self._eps, torch.finfo(pair.a.dtype).eps)
            if not self._exact(pair, scale):
                raise refuse(node.target, "its change is not the difference between its ends")
        return value

    def _exact(self, pair: Pair, scale: float) -> bool:
        rise = difference(pair.a, pair.b)
        off = torch.where(rise.isfinite() & pair.a.isfinite(), pair.d - rise, 0.0)  # masks are infinite
        if not off.numel():
            return True
        return float(off.abs().max()) <= self._eps**0.5 * _largest(rise) + ROUNDED * self._eps * scale


def _pairs(value: Any) -> Iterator[Pair]:
    if isinstance(value, Pair):
        yield value
    elif isinstance(value, (list, tuple)):
        for v in value:
            yield from _pairs(v)


def _largest(x: Tensor) -> float:
    """|x| of the largest finite element."""
    return float(torch.where(x.isfinite(), x, 0.0).abs().max()) if x.numel() else 0.0
