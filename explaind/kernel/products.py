"""<a, ∇ℓ_i> of every example of a batch with every costate, in three ways that agree.

materialise   the gradient of each example, then one matrix product per layer
ghost         from the factors of each gradient, which is never formed (contracting.py)
jvp           the forward derivative of the batch's loss vector along a; exact also where examples are coupled through the batch

Left to itself, the cheaper of the first two is taken for every layer, by an estimate from the rates of the machine (machine.py), and the
third where losses are coupled, or where gradients have no factors and few forward derivatives do.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import jvp

from explaind.errors import RequestError
from explaind.kernel.contracting import GATHERED, Contraction, Way
from explaind.kernel.factored import Rearranged
from explaind.kernel.gradients import CHUNK_BYTES, RowGradients, batch_axes, gradient, one, separable, take, taken_apart
from explaind.kernel.layout import Layout
from explaind.kernel.machine import ORDINARY, Machine
from explaind.kernel.points import Function, Point
from explaind.replay.steps import Part

Finest = Literal["none", "layer", "param"]
Route = Literal["jvp"] | tuple[Way, ...]
"""The forward derivative, or the way of every site; of none, where gradients are not taken apart."""
ROUTES = ("auto", "materialise", "ghost", "jvp")
FEW = 4
"""Up to this many forward passes a batch are cheaper than gradients per example that are not taken apart."""


def batch_gradient(losses: Function, layout: Layout, theta: Float[Tensor, " param"], parts: tuple[Part, ...]) -> Float[Tensor, " param"]:
    """G = Σ_i w_i ∇ℓ_i(θ), one backward pass a micro-batch."""
    total = torch.zeros_like(theta)
    for part in parts:
        gradient(partial(_weighted, losses, part), layout, theta, total)
    return total


def _weighted(losses: Function, part: Part, parameters: Mapping[str, Tensor]) -> Tensor:
    return losses(parameters, part.batch) @ part.weights


@dataclass
class Products:
    """Dot products of costates with example gradients, at the finest parameter axis that is kept."""

    losses: Function
    layout: Layout
    finest: Finest
    route: str = "auto"
    chunk: int = CHUNK_BYTES
    """Bytes of example gradients that may be built at once."""
    machine: Machine = ORDINARY
    """What the cheapest way is judged by."""
    _separable: bool | None = None
    _apart: Contraction | None = None
    _gradients: RowGradients | None = None

    def __post_init__(self) -> None:
        self._one = one(self.losses)

    def __call__(self, theta: Tensor, part: Part, a: Float[Tensor, "row param"]) -> Iterator[tuple[slice, Tensor]]:
        """Yields (some examples of the part, products [fine, row, example]); fine is 1, layer or param."""
        self.prepare(theta, part)
        route = self._chosen(part, a)
        if route == "jvp":
            return self._jvp(theta, part, a)
        return self._contracted(theta, part, a, route) if route else self._materialise(theta, part, a)

    def prepare(self, theta: Tensor, part: Part) -> None:
        """Find out, once, what kind of function the losses are."""
        if self._separable is not None:
            return
        self._separable = separable(self.losses, self.layout.split(theta), part.batch)
        if not self._separable:
            return
        self._gradients = RowGradients(Point(self._one, theta), None, self.layout, part.batch, self.chunk)
        if self.finest != "param":
            factored = taken_apart(Point(self._one, theta), None, self.layout, part.batch)
            gathered = sys.maxsize if theta.is_cuda else GATHERED
            self._apart = None if factored is None else Contraction(self.layout, factored, self.finest == "layer", gathered)

    def _chosen(self, part: Part, a: Tensor) -> Route:
        if self.route in ("materialise", "ghost") and not self._separable:
            raise RequestError(
                "the losses of a batch depend on each other (or vmap lacks an operation of the model)",
                expected="products='jvp' or 'auto'",
                got=f"products={self.route!r}",
                do="use jvp, which takes the whole batch",
            )
        if self.finest == "param" and (self.route == "jvp" or not self._separable):
            raise RequestError(
                "products of single examples with single parameters need each example's gradient",
                expected="examples that do not depend on each other",
                do="drop 'example' from keep, or keep 'layer' instead of 'param'",
            )
        if self.route == "jvp" or not self._separable:
            return "jvp"
        if self._apart is None:
            passes = len(a) * (len(self.layout.names) if self.finest == "layer" else 1)
            return "jvp" if self.route == "auto" and self.finest != "param" and passes <= FEW else ()
        if self.route != "auto":
            return cast(tuple[Way, ...], (self.route,) * len(self._apart.sites))
        return self._apart.cheapest(self.machine, len(a), len(part.ids), a.element_size())

    def _factors(self, apart: Contraction, theta: Tensor, part: Part) -> Any:
        return apart.factored.factors(Point(self._one, theta), part.batch, batch_axes(part.batch))

    def _contracted(self, theta: Tensor, part: Part, a: Tensor, ways: Sequence[Way]) -> Iterator[tuple[slice, Tensor]]:
        assert self._apart is not None
        count = len(part.ids)
        rows = max(1, min(count, self.chunk // (self._apart.held(ways, len(a)) * a.element_size())))
        for start in range(0, count, rows):
            span = slice(start, min(start + rows, count))
            some = _some(part, span)
            try:
                factors = self._factors(self._apart, theta, some)
            except Rearranged:  # such as a branch that these examples take and the first did not
                yield from ((slice(start + s.start, start + s.stop), dots) for s, dots in self._materialise(theta, some, a))
            else:
                yield span, self._apart(factors, a, ways)

    def _materialise(self, theta: Tensor, part: Part, a: Tensor) -> Iterator[tuple[slice, Tensor]]:
        count = len(part.ids)
        assert self._gradients is not None
        width = self.layout.params * a.element_size() * (len(a) if self.finest == "param" else 1)
        rows = max(1, min(count, self.chunk // width))
        gradients = a.new_empty(rows, self.layout.params)  # fresh memory for every chunk would cost more than the sums
        for start in range(0, count, rows):
            span = slice(start, min(start + rows, count))
            some = gradients[: span.stop - start].zero_()
            self._gradients.add(some, [Point(self._one, theta)], take(part.batch, span), len(some))
            yield span, self._contract(some, a)

    def _contract(self, gradients: Float[Tensor, "example param"], a: Float[Tensor, "row param"]) -> Float[Tensor, "fine row example"]:
        if self.finest == "param":
            return torch.einsum("rp,ep->pre", a, gradients)
        if self.finest == "layer":
            return torch.stack([a[:, cut] @ gradients[:, cut].T for cut in self.layout.slices])
        return (a @ gradients.T)[None]

    def _jvp(self, theta: Tensor, part: Part, a: Tensor) -> Iterator[tuple[slice, Tensor]]:
        parameters = self.layout.split(theta)

        def along(tangent: Mapping[str, Tensor]) -> Tensor:
            moving = {name: parameters[name] for name in tangent}
            return jvp(lambda p: self.losses({**parameters, **p}, part.batch), (moving,), (dict(tangent),))[1]

        tangents = self.layout.split(a)
        groups = [{name: t} for name, t in tangents.items()] if self.finest == "layer" else [tangents]
        with torch.no_grad():
            yield slice(0, len(part.ids)), torch.stack([_each_row(along, group) for group in groups])


def _some(part: Part, examples: slice) -> Part:
    return Part(take(part.batch, examples), part.ids[examples], part.weights[examples])


def _each_row(along: Any, tangents: Mapping[str, Tensor]) -> Tensor:
    """along(tangent) for each row of the tangents: [row, example]. One after another, so that every operation of torch will do."""
    rows = len(next(iter(tangents.values())))
    return torch.stack([along({name: t[r] for name, t in tangents.items()}) for r in range(rows)])
