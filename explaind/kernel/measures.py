"""The measures of a set of queries as functions of the flat parameters: values, directional derivatives, gradients."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import grad, jacrev, jvp, vmap
from torch.utils._pytree import tree_map

from explaind.errors import RequestError
from explaind.kernel.layout import Layout

Function = Callable[[Mapping[str, Tensor], Any], Tensor]
"""(parameters, batch) -> Tensor[query] or Tensor[query, output] (a measure), or Tensor[batch] (losses)."""

CHUNK_BYTES = 256 << 20
"""Size of the gradients that one call of vmap may build."""


def take(batch: Any, rows: slice) -> Any:
    """Some rows of a batch."""
    return tree_map(lambda leaf: leaf[rows] if isinstance(leaf, Tensor) and leaf.ndim else leaf, batch)


def batch_axes(batch: Any) -> Any:
    """vmap's in_dims for a batch: its tensors run along dimension 0, anything else is shared."""
    return tree_map(lambda leaf: 0 if isinstance(leaf, Tensor) and leaf.ndim else None, batch)


def one(function: Function) -> Function:
    """The function of a single example or query: a batch of one goes in, its only row comes out."""

    def single(parameters: Mapping[str, Tensor], item: Any) -> Tensor:
        return function(parameters, tree_map(lambda leaf: leaf.unsqueeze(0) if isinstance(leaf, Tensor) else leaf, item))[0]

    return single


def separable(function: Function, parameters: Mapping[str, Tensor], batch: Any) -> bool:
    """Whether each row of function(batch) depends on its own row of the batch alone, so that vmap gives the same function."""
    whole = function(parameters, batch)
    try:
        alone = vmap(one(function), (None, batch_axes(batch)))(parameters, batch)
    except (RuntimeError, NotImplementedError, IndexError, ValueError):  # an operation that vmap lacks, or another number of rows
        return False
    close = 1e-9 if whole.dtype == torch.float64 else 1e-3
    return alone.shape == whole.shape and bool((alone - whole).abs().max() <= close * (1.0 + whole.abs().max()))


class Measures:
    """h_q of theory.md for one block of queries; axes that are not kept are summed before a gradient is taken.

    shape   (query, output) as far as they are kept; R = product = number of measures, row-major
    """

    def __init__(self, function: Function, queries: Any, layout: Layout, keep: frozenset[str], theta: Tensor) -> None:
        self.layout, self._function, self._queries = layout, function, queries
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

    def add_gradients(self, into: Float[Tensor, "measure param"], theta: Float[Tensor, " param"], weight: float) -> None:
        """into += weight · ∇h_q(θ), for every measure."""
        if self.by_query:
            self._add_by_query(into, self.layout.split(theta), weight)
        elif self.shape:
            rows = max(1, CHUNK_BYTES // (self.layout.params * into.element_size()))
            parts = jacrev(lambda p: self._reduced(p).reshape(-1), chunk_size=rows)(self.layout.split(theta))
            self.layout.add(into, parts, weight)
        else:
            parts = grad(self._reduced)(self.layout.split(theta))
            self.layout.add(into[0], parts, weight)

    def _add_by_query(self, into: Tensor, parameters: Mapping[str, Tensor], weight: float) -> None:
        queries, per_query = self.shape[0], self.count // self.shape[0]
        single = one(self._function)

        def measured(p: Mapping[str, Tensor], query: Any) -> Tensor:
            return single(p, query).sum() if len(self.shape) == 1 else single(p, query)

        derivative = (grad if len(self.shape) == 1 else jacrev)(measured)
        rows = max(1, CHUNK_BYTES // (per_query * self.layout.params * into.element_size()))
        for start in range(0, queries, rows):
            some = take(self._queries, slice(start, start + rows))
            parts = vmap(derivative, (None, batch_axes(some)))(parameters, some)
            block = into[start * per_query : (start + rows) * per_query]
            self.layout.add(block, {n: t.reshape(len(block), *t.shape[len(self.shape) :]) for n, t in parts.items()}, weight)
