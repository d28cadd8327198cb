"""The measures of a set of queries as functions of the flat parameters: values, directional derivatives, gradients."""

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, partial
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import jacrev, jvp, vmap

from explaind.errors import RequestError
from explaind.kernel.frequencies import uncounted
from explaind.kernel.gradients import CHUNK_BYTES, RowGradients, batch_axes, combinations, gradient, held, one, row, separable, take
from explaind.kernel.groups import Grouping
from explaind.kernel.layout import Layout
from explaind.kernel.points import Function, Point
from explaind.kernel.secant import NoSecant, Secant


class Measures:
    """h_q of theory.md for one block of queries; axes that are not kept are summed before a gradient is taken.

    shape   (query, output) as far as they are kept; R = product = number of measures, row-major
    """

    def __init__(
        self,
        function: Function,
        queries: Any,
        layout: Layout,
        keep: frozenset[str],
        theta: Tensor,
        chunk: int = CHUNK_BYTES,
        groups: Mapping[str, Grouping] = MappingProxyType({}),
    ) -> None:
        """
        chunk   bytes of gradients that may be built at once, beside the result
        groups  of queries and of outputs; by default every one is one of its own
        """
        self.layout, self._queries, self._chunk, self._start = layout, queries, chunk, theta
        probe, self._function = uncounted(function, layout.split(theta), queries)
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
        self._into = tuple(groups[axis].sums(probe) if axis in groups else None for axis in ("query", "output")[: probe.ndim])
        lengths = [n if into is None else into.shape[1] for n, into in zip(probe.shape, self._into, strict=True)]
        self.shape = tuple(n for d, n in enumerate(lengths) if d not in self._sum)
        self.count = max(1, int(torch.tensor(self.shape).prod())) if self.shape else 1
        self.by_query = "query" in keep and "query" not in groups and separable(self._function, layout.split(theta), queries)
        self._outputs = self.shape[1] if len(self.shape) == 2 else None
        self._rows: dict[bool, RowGradients] = {}
        self._forward: bool | None = None

    def _reduced(self, parameters: Mapping[str, Tensor], queries: Any) -> Tensor:
        values = self._function(parameters, queries)
        for d, into in enumerate(self._into):
            if into is not None:  # as a product, which the secant has a rule for
                values = (values.movedim(d, -1) @ into).movedim(-1, d)
        return values.sum(self._sum) if self._sum else values

    def _one(self, parameters: Mapping[str, Tensor], query: Any) -> Tensor:
        """The measures of one query: Tensor[output], or a scalar where outputs are summed."""
        values = one(self._function)(parameters, query)
        into = self._into[-1]
        if len(self._into) == 2 and into is not None:
            values = values @ into
        return values.sum() if len(self.shape) == 1 else values

    @cached_property
    def _secant(self) -> Secant:
        first = row(self._queries) if self.by_query else self._queries
        return Secant(self._one if self.by_query else self._reduced, self.layout.split(self._start), first)

    def values(self, theta: Float[Tensor, " param"]) -> Float[Tensor, " measure"]:
        """h_q(θ) of every measure."""
        with torch.no_grad():
            return torch.cat([self._reduced(self.layout.split(theta), some).reshape(-1) for some in self._some(1)])

    def slopes(self, theta: Float[Tensor, " param"], delta: Float[Tensor, " param"]) -> Float[Tensor, " measure"]:
        """<∇h_q(θ), Δ> of every measure at once: one forward-mode pass.

        Where that is not what the gradient says (an operation without a forward mode, a part under no_grad, the padding row of a table),
        the gradients are taken themselves.
        """
        if self._forward is None:
            self._forward = self._trusted(theta)
        return self._pushed(theta, delta) if self._forward else self._gradients(theta) @ delta

    def _pushed(self, theta: Tensor, delta: Tensor) -> Tensor:
        at, along = self.layout.split(theta), self.layout.split(delta)
        with torch.no_grad():
            found = [jvp(partial(self._reduced, queries=some), (at,), (along,))[1].reshape(-1) for some in self._some(2)]
        return torch.cat(found)

    def _gradients(self, theta: Tensor) -> Tensor:
        gradients = theta.new_zeros(self.count, self.layout.params)
        self.add_gradients(gradients, [self.node(theta, 1.0)])
        return gradients

    def _trusted(self, theta: Tensor) -> bool:
        tangent = torch.randn(len(theta), generator=torch.Generator().manual_seed(0)).to(theta)
        try:
            found = self._pushed(theta, tangent)
        except (RuntimeError, NotImplementedError):
            return False
        gradients = self._gradients(theta)
        scale = gradients.abs() @ tangent.abs()
        close = 1e-9 if theta.dtype == torch.float64 else 1e-4
        return bool(((found - gradients @ tangent).abs() <= close * scale.max()).all())

    def secants(
        self, start: Float[Tensor, " param"], end: Float[Tensor, " param"], along: Float[Tensor, "tangent param"], stride: int = 1
    ) -> Float[Tensor, "tangent some"]:
        """<ḡ_q, tangent> of the secant between start and end, for every tangent: forward passes alone. Raises NoSecant.

        stride: take the measures of every such query only; 1 where the measures are not query by query
        """
        a, b, tangents = (self.layout.split(v) for v in (start, end, along))
        secant = self._secant  # traced here, outside of vmap

        def changes(query: Any) -> Tensor:
            return vmap(lambda t: secant(a, b, t, query))(tangents)

        with torch.no_grad():
            if self.by_query:
                queries = self._some(2 * (1 + len(along)), stride)
                found = [vmap(changes, (batch_axes(some),), out_dims=1)(some).reshape(len(along), -1) for some in queries]
                return torch.cat(found, 1)
            return changes(self._queries).reshape(len(along), -1)

    def _some(self, times: int, stride: int = 1) -> Iterator[Any]:
        """Every such query, as many at a time as a pass may take that holds so many times what a forward pass makes; all, if not apart."""
        if not self.by_query:
            yield self._queries
            return
        count = self.shape[0]
        width = stride * max(1, self._chunk // (times * max(1, self._activations) * self._start.element_size()))
        for start in range(0, count, width):
            yield take(self._queries, slice(start, min(start + width, count), stride))

    @cached_property
    def _activations(self) -> int:
        """Numbers that the forward pass of one query makes."""
        return held(partial(_called, self._one, row(self._queries)), self.layout, self._start)[0]

    def node(self, theta: Tensor, weight: float) -> Point:
        """∇h at theta."""
        return Point(self._one if self.by_query else self._reduced, theta, weight)

    def between(self, start: Tensor, end: Tensor, weight: float) -> Point:
        """ḡ of the secant between start and end. Raises NoSecant."""
        a, b, secant = self.layout.split(start), self.layout.split(end), self._secant
        return Point(lambda change, query: secant(a, b, change, query), end - start, weight)

    def why_no_secant(self, start: Tensor, end: Tensor) -> str:
        """What the secant rule says against the model; nothing where it takes it."""
        try:
            self.between(start, end, 1.0)
        except NoSecant as error:
            return str(error)
        return ""

    def add_gradients(self, into: Float[Tensor, "measure param"], points: Sequence[Point], secant: bool = False) -> None:
        """into += Σ weight · ∇ over the points, which are all nodes or all secants, for every measure."""
        if self.by_query:
            if secant not in self._rows:
                self._rows[secant] = RowGradients(points[0], self._outputs, self.layout, self._queries, self._chunk)
            self._rows[secant].add(into, points, self._queries, self.shape[0])
            return
        for point in points:
            self._add_whole(into, point)

    def _add_whole(self, into: Tensor, point: Point) -> None:
        """Of measures that depend on all queries."""
        at = partial(_called, point.function, self._queries)
        if self.shape:
            rows = max(1, self._chunk // (self.layout.params * into.element_size()))
            try:
                parts = jacrev(lambda p: at(p).reshape(-1), chunk_size=rows)(self.layout.split(point.theta))
            except (RuntimeError, NotImplementedError):  # no way through torch.func, such as for packed sequences: measure by measure
                alone = point.weight * torch.eye(len(into), dtype=into.dtype, device=into.device)
                combinations(lambda p: at(p).reshape(-1), self.layout, point.theta, alone, into)
            else:
                self.layout.add(into, parts, point.weight)
        else:
            gradient(at, self.layout, point.theta, into[0], point.weight)


def _called(function: Function, queries: Any, parameters: Mapping[str, Tensor]) -> Tensor:
    return function(parameters, queries)
