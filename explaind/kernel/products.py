"""<a, ∇ℓ_i> of every example of a batch with every costate, in two ways that agree.

materialise   the gradient of each example, then one matrix product per layer
jvp           the forward derivative of the batch's loss vector along a; exact also where examples are coupled through the batch
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import grad, jvp

from explaind.errors import RequestError
from explaind.kernel.gradients import CHUNK_BYTES, RowGradients, one, separable, take
from explaind.kernel.layout import Layout
from explaind.kernel.points import Function, Point
from explaind.replay.steps import Part

Finest = Literal["none", "layer", "param"]
ROUTES = ("auto", "materialise", "jvp")
FEW = 4
"""Up to this many forward passes a batch are cheaper than a gradient per example."""


def batch_gradient(losses: Function, layout: Layout, theta: Float[Tensor, " param"], parts: tuple[Part, ...]) -> Float[Tensor, " param"]:
    """G = Σ_i w_i ∇ℓ_i(θ), one backward pass a micro-batch."""
    total = torch.zeros_like(theta)
    parameters = layout.split(theta)
    for part in parts:
        layout.add(total, grad(lambda p, part=part: losses(p, part.batch) @ part.weights)(parameters))
    return total


@dataclass
class Products:
    """Dot products of costates with example gradients, at the finest parameter axis that is kept."""

    losses: Function
    layout: Layout
    finest: Finest
    route: str = "auto"
    chunk: int = CHUNK_BYTES
    """Bytes of example gradients that may be built at once."""
    _separable: bool | None = None
    _gradients: RowGradients | None = None

    def __post_init__(self) -> None:
        self._one = one(self.losses)

    def __call__(self, theta: Tensor, part: Part, a: Float[Tensor, "row param"]) -> Iterator[tuple[slice, Tensor]]:
        """Yields (some examples of the part, products [fine, row, example]); fine is 1, layer or param."""
        parameters = self.layout.split(theta)
        if self._separable is None:
            self._separable = separable(self.losses, parameters, part.batch)
        route = self._chosen(len(a))
        if route == "materialise" and not self._separable:
            raise RequestError(
                "the losses of a batch depend on each other (or vmap lacks an operation of the model)",
                expected="products='jvp' or 'auto'",
                got="products='materialise'",
                do="use jvp, which takes the whole batch",
            )
        if route == "jvp" and self.finest == "param":
            raise RequestError(
                "products of single examples with single parameters need each example's gradient",
                expected="examples that do not depend on each other",
                do="drop 'example' from keep, or keep 'layer' instead of 'param'",
            )
        yield from self._materialise(theta, part, a) if route == "materialise" else self._jvp(parameters, part, a)

    def _chosen(self, rows: int) -> str:
        if self.route != "auto":
            return self.route
        if not self._separable:
            return "jvp"
        if self.finest == "param":
            return "materialise"
        passes = rows * (len(self.layout.names) if self.finest == "layer" else 1)
        return "jvp" if passes <= FEW else "materialise"

    def _materialise(self, theta: Tensor, part: Part, a: Tensor) -> Iterator[tuple[slice, Tensor]]:
        count = len(part.ids)
        if self._gradients is None:
            self._gradients = RowGradients(Point(self._one, theta), None, self.layout, part.batch, self.chunk)
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

    def _jvp(self, parameters: Mapping[str, Tensor], part: Part, a: Tensor) -> Iterator[tuple[slice, Tensor]]:
        def along(tangent: Mapping[str, Tensor]) -> Tensor:
            moving = {name: parameters[name] for name in tangent}
            return jvp(lambda p: self.losses({**parameters, **p}, part.batch), (moving,), (dict(tangent),))[1]

        tangents = self.layout.split(a)
        groups = [{name: t} for name, t in tangents.items()] if self.finest == "layer" else [tangents]
        with torch.no_grad():
            yield slice(0, len(part.ids)), torch.stack([_each_row(along, group) for group in groups])


def _each_row(along: Any, tangents: Mapping[str, Tensor]) -> Tensor:
    """along(tangent) for each row of the tangents: [row, example]. One after another, so that every operation of torch will do."""
    rows = len(next(iter(tangents.values())))
    return torch.stack([along({name: t[r] for name, t in tangents.items()}) for r in range(rows)])
