"""The measures of a set of queries as functions of the flat parameters: values, directional derivatives, gradients."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import grad, jacrev, jvp

from explaind.errors import RequestError
from explaind.kernel.gradients import CHUNK_BYTES, Function, Point, RowGradients, one, separable
from explaind.kernel.layout import Layout


class Measures:
    """h_q of theory.md for one block of queries; axes that are not kept are summed before a gradient is taken.

    shape   (query, output) as far as they are kept; R = product = number of measures, row-major
    """

    def __init__(
        self, function: Function, queries: Any, layout: Layout, keep: frozenset[str], theta: Tensor, chunk: int = CHUNK_BYTES
    ) -> None:
        """chunk: bytes of gradients that may be built at once, beside the result."""
        self.layout, self._function, self._queries, self._chunk = layout, function, queries, chunk
        probe = function(layout.split(theta), queries)
        if probe.ndim not in (1, 2) or not probe.is_floating_point():
            raise RequestError(
                "a measure must give one number per query, or per query and output",
                expected="Tensor[query] or Tensor[query, output]",
                got=f"{probe.dtype} of shape {tuple(probe.shape)}",
                do="change the measure",
            )
        if probe.ndim == 1 and "output" in keep:
            raise RequestError(
                "keep holds 'output', but the measure gives one number per query",
                expected="Tensor[query, output]",
                got=f"shape {tuple(probe.shape)}",
                do="drop 'output' from keep",
            )
        if not torch.isfinite(probe).all():
            raise RequestError("the measure is not finite", where="at the start of the run", do="choose another measure or other queries")
        self._sum = tuple(d for d, axis in enumerate(("query", "output")[: probe.ndim]) if axis not in keep)
        self.shape = tuple(n for d, n in enumerate(probe.shape) if d not in self._sum)
        self.count = max(1, int(torch.tensor(self.shape).prod())) if self.shape else 1
        self.by_query = "query" in keep and separable(function, layout.split(theta), queries)
        outputs = self.shape[1] if len(self.shape) == 2 else None
        self._gradients = RowGradients(self._one, outputs, layout, theta, queries, chunk) if self.by_query else None

    def _reduced(self, parameters: Mapping[str, Tensor]) -> Tensor:
        values = self._function(parameters, self._queries)
        return values.sum(self._sum) if self._sum else values

    def values(self, theta: Float[Tensor, " param"]) -> Float[Tensor, " measure"]:
        """h_q(θ) of every measure."""
        with torch.no_grad():
            return self._reduced(self.layout.split(theta)).reshape(-1)

    def slopes(self, theta: Float[Tensor, " param"], delta: Float[Tensor, " param"]) -> Float[Tensor, " measure"]:
        """<∇h_q(θ), Δ> of every measure at once: one forward-mode pass."""
        with torch.no_grad():
            return jvp(self._reduced, (self.layout.split(theta),), (self.layout.split(delta),))[1].reshape(-1)

    def add_gradients(self, into: Float[Tensor, "measure param"], points: Sequence[Point]) -> None:
        """into += Σ weight · ∇h_q(θ) over the points (θ, weight), for every measure."""
        if self._gradients is not None:
            self._gradients.add(into, points, self._queries, self.shape[0])
            return
        for theta, weight in points:
            if self.shape:
                rows = max(1, self._chunk // (self.layout.params * into.element_size()))
                parts = jacrev(lambda p: self._reduced(p).reshape(-1), chunk_size=rows)(self.layout.split(theta))
                self.layout.add(into, parts, weight)
            else:
                self.layout.add(into[0], grad(self._reduced)(self.layout.split(theta)), weight)

    def _one(self, parameters: Mapping[str, Tensor], query: Any) -> Tensor:
        """The measures of one query: Tensor[output], or a scalar where outputs are summed."""
        values = one(self._function)(parameters, query)
        return values.sum() if len(self.shape) == 1 else values
