"""Functions of a batch taken row by row: whether that is the same function, and the gradient of every row."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, jacrev, vmap
from torch.utils._pytree import tree_leaves, tree_map

from explaind.kernel.factored import Factored, Rearranged
from explaind.kernel.frequencies import uncounted
from explaind.kernel.layout import Layout
from explaind.kernel.points import Function, Point

JUDGED, COMPARED = 16, 4
"""Rows on whose gradients it is judged whether rows are independent, and whether factors give the same."""
CHUNK_BYTES = 256 << 20
"""Size of the gradients that one call of vmap may build, unless told otherwise."""
BACKWARD = 3
"""Gradients of activations that a backward pass holds at a time, at most."""
FAULTS = (RuntimeError, NotImplementedError, ValueError, IndexError, Rearranged)
"""What a model that does what a transform cannot ends in."""


def take(batch: Any, rows: slice | Tensor) -> Any:
    """Some rows of a batch, as a slice or as their places."""
    return tree_map(lambda leaf: leaf[rows] if isinstance(leaf, Tensor) and leaf.ndim else leaf, batch)


def row(batch: Any) -> Any:
    """The first row of a batch, without its dimension 0: what ``one`` takes."""
    return tree_map(lambda leaf: leaf[0] if isinstance(leaf, Tensor) and leaf.ndim else leaf, batch)


def batch_axes(batch: Any) -> Any:
    """vmap's in_dims for a batch: its tensors run along dimension 0, anything else is shared."""
    return tree_map(lambda leaf: 0 if isinstance(leaf, Tensor) and leaf.ndim else None, batch)


def one(function: Function) -> Function:
    """The function of a single example or query: a batch of one goes in, its only row comes out."""

    def single(parameters: Mapping[str, Tensor], item: Any) -> Tensor:
        return function(parameters, tree_map(lambda leaf: leaf.unsqueeze(0) if isinstance(leaf, Tensor) else leaf, item))[0]

    return single


def rows_of(batch: Any) -> int:
    """How many rows a batch has."""
    return min((leaf.shape[0] for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.ndim), default=1)


def alike(one_way: Tensor, other: Tensor) -> bool:
    """Equal but for rounding: whether two ways to compute something compute the same."""
    close = 1e-9 if other.dtype == torch.float64 else 1e-3
    return bool((one_way - other).abs().max() <= close * (1.0 + other.abs().max()))


def alike_by_layer(one_way: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Equal but for rounding, tensor by tensor, each on its own scale: small gradients are compared as strictly as large ones."""
    largest = max((t.abs().max() for t in other.values() if t.numel()), default=torch.zeros(()))
    for name, want in other.items():
        if not want.numel():
            continue
        close, floor = (1e-8, 1e-12) if want.dtype == torch.float64 else (1e-3, 1e-5)  # a gradient may be nothing but rounding
        if not bool((one_way[name] - want).abs().max() <= close * want.abs().max() + floor * largest):
            return False
    return True


def separable(function: Function, parameters: Mapping[str, Tensor], batch: Any) -> bool:
    """Whether each row of function(batch) depends on its own row of the batch alone, so that vmap gives the same function.

    Judged by values and by gradients of a random combination, at the parameters and beside them, where nothing is zero by design. No
    gradient that counts what is in the batch (frequencies.py) is of a row alone.
    """
    whole, of_values = uncounted(function, parameters, batch)
    if of_values is not function:
        return False
    alone = vmap(one(function), (None, batch_axes(batch)))
    some = take(batch, slice(0, JUDGED))
    generator = torch.Generator().manual_seed(0)
    beside = {name: t + 0.02 * torch.randn(t.shape, generator=generator).to(t) * (1 + t.abs()) for name, t in parameters.items()}

    def combined(of: Callable[[Any, Any], Tensor]) -> Callable[[Mapping[str, Tensor]], Tensor]:
        count = rows_of(some)
        weights = torch.randn(count, generator=torch.Generator().manual_seed(1)).to(whole)
        return lambda p: (weights * of(p, some).reshape(count, -1).sum(1)).sum()

    try:
        each = alone(parameters, batch)
        if each.shape != whole.shape or not alike(each, whole):
            return False
        if rows_of(batch) < 2 or not torch.isfinite(function(beside, batch)).all():
            return True
        gradients = [grad(combined(of))(beside) for of in (alone, function)]
        return alike(alone(beside, batch), function(beside, batch)) and alike_by_layer(*gradients)
    except (RuntimeError, NotImplementedError, IndexError, ValueError, AssertionError):
        return False  # an operation that vmap lacks, or a number of rows that the function does not take


def gradient(function: Callable[[Mapping[str, Tensor]], Tensor], layout: Layout, theta: Tensor, into: Tensor, weight: float = 1.0) -> None:
    """into[param] += weight · ∇ of a scalar function of the parameters, by torch's own reverse mode: no transform comes between."""
    with torch.enable_grad():
        leaves = {name: t.detach().requires_grad_() for name, t in layout.split(theta).items()}
        value = function(leaves)
        if not value.requires_grad:
            return
        found = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
    layout.add(into, {name: g for name, g in zip(leaves, found, strict=True) if g is not None}, weight)


def combinations(
    function: Callable[[Mapping[str, Tensor]], Tensor], layout: Layout, theta: Tensor, weights: Iterable[Tensor], into: Iterable[Tensor]
) -> None:
    """into[param] += ∇ Σ_i w_i f_i for each w [row] of the weights: one forward pass, and a backward pass each."""
    with torch.enable_grad():
        leaves = {name: t.detach().requires_grad_() for name, t in layout.split(theta).items()}
        values = function(leaves)
        if not values.requires_grad:
            return
        for w, row_of in zip(weights, into, strict=True):
            found = torch.autograd.grad(values, list(leaves.values()), w.to(values.dtype), retain_graph=True, allow_unused=True)
            layout.add(row_of, {name: g for name, g in zip(leaves, found, strict=True) if g is not None})


def direct(into: Tensor, point: Point, outputs: int | None, layout: Layout, batch: Any) -> None:
    """into[row · output, param] += weight · ∇, by differentiating by the parameters themselves."""
    derivative = (grad if outputs is None else jacrev)(point.function)
    parts = vmap(derivative, (None, batch_axes(batch)))(layout.split(point.theta), batch)
    lead = 1 if outputs is None else 2
    layout.add(into, {name: t.reshape(len(into), *t.shape[lead:]) for name, t in parts.items()}, point.weight)


def one_by_one(into: Tensor, point: Point, outputs: int | None, layout: Layout, batch: Any) -> None:
    """The same without any transform: a forward pass for every row, and a backward pass for each of its outputs."""
    alone = point.weight * torch.eye(outputs or 1, dtype=into.dtype, device=into.device)
    for i, item in enumerate(each(batch)):
        called = partial(_flat, point.function, item)
        combinations(called, layout, point.theta, alone, into[i * len(alone) : (i + 1) * len(alone)])


def _flat(function: Function, item: Any, parameters: Mapping[str, Tensor]) -> Tensor:
    return function(parameters, item).reshape(-1)


def each(batch: Any) -> Iterator[Any]:
    """Every row of a batch, without its dimension 0."""
    return (row(take(batch, slice(i, i + 1))) for i in range(rows_of(batch)))


def confirmed(found: Tensor, point: Point, outputs: int | None, layout: Layout, batch: Any) -> bool:
    """Whether gradients [row · output, param] are those of torch's own reverse mode, in a random combination of every row's outputs.

    Transforms within transforms have rules of their own, and not all of them are right (torch 2.13: the second vmap of prelu, cdist).
    """
    generator = torch.Generator().manual_seed(2)
    weights = torch.randn(rows_of(batch), outputs or 1, generator=generator).to(found)
    mixed = torch.einsum("ro,rop->rp", weights, found.unflatten(0, weights.shape))
    want = torch.zeros_like(mixed)
    for into, w, item in zip(want, weights, each(batch), strict=True):
        combinations(partial(_flat, point.function, item), layout, point.theta, [point.weight * w], [into])
    return alike_by_layer(layout.split(mixed), layout.split(want))


def held(function: Callable[[Mapping[str, Tensor]], Tensor], layout: Layout, theta: Tensor) -> tuple[int, int]:
    """Numbers that a forward pass keeps for its backward pass beside the parameters: of all tensors, and of the largest."""
    kept = dict[int, int]()

    def noted(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes() // theta.element_size()
        return t

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(noted, lambda t: t):
        function({name: t.detach().requires_grad_() for name, t in layout.split(theta).items()})
    kept.pop(theta.untyped_storage().data_ptr(), None)
    return sum(kept.values()), max(kept.values(), default=0)


def taken_apart(point: Point, outputs: int | None, layout: Layout, batch: Any) -> Factored | None:
    """The factors of a function's gradients, where there are any and they give the right numbers on the first rows of the batch."""
    first = take(batch, slice(0, COMPARED))
    try:
        factored = Factored(point.function, layout, layout.split(point.theta), row(first))
        if not factored.sites:
            return None
        apart = point.theta.new_zeros(rows_of(first) * (outputs or 1), layout.params)
        factored.add(apart, [point], first, batch_axes(first))
    except FAULTS:
        return None
    return factored if confirmed(apart, point, outputs, layout, first) else None


def taken_whole(point: Point, outputs: int | None, layout: Layout, batch: Any) -> bool:
    """Whether ``direct`` gives the right numbers on the first rows of the batch."""
    first = take(batch, slice(0, COMPARED))
    found = point.theta.new_zeros(rows_of(first) * (outputs or 1), layout.params)
    try:
        direct(found, point, outputs, layout, first)
    except FAULTS:
        return False
    return confirmed(found, point, outputs, layout, first)


class RowGradients:
    """∇ of every row of a separable function, or of every (row, output): [row · output, param].

    Weights of linear maps and embeddings are kept as factors (see ``Factored``) where that is smaller. Each way is taken only where it
    yields what torch's own reverse mode does on the first rows of the batch that is given here; where none does, that is what is taken.
    """

    def __init__(self, point: Point, outputs: int | None, layout: Layout, batch: Any, chunk: int = CHUNK_BYTES) -> None:
        """point.function: (parameters, row) -> scalar (outputs None) or Tensor[output]; chunk: bytes that one call of vmap may build.

        All points that will be given must make the same calls of linear maps and embeddings.
        """
        first = take(batch, torch.arange(min(COMPARED, rows_of(batch))))  # copied: it is kept
        self._outputs, self._layout, self._chunk, self._first = outputs, layout, chunk, (point, first)
        apart = taken_apart(point, outputs, layout, first)
        self._factored = apart if apart is not None and apart.size < layout.params else None

    @cached_property
    def _way(self) -> Callable[[Tensor, Point, int | None, Layout, Any], None]:
        """Of what is not taken apart."""
        point, batch = self._first
        return direct if taken_whole(point, self._outputs, self._layout, batch) else one_by_one

    @cached_property
    def _numbers(self) -> int:
        """That a gradient takes while it is made, with what a row's forward and backward pass hold."""
        point, batch = self._first
        forward, widest = held(partial(_flat, point.function, row(batch)), self._layout, point.theta)
        own = self._layout.params if self._factored is None else max(self._factored.size, self._factored.widest)
        return own + BACKWARD * widest + forward // (self._outputs or 1)

    def add(self, into: Tensor, points: Sequence[Point], batch: Any, rows: int) -> None:
        """into[row · output, param] += Σ weight · ∇ over the points, for a batch of so many rows."""
        apart = self._factored
        for some, block in self._some(batch, rows, into):
            at_once = len(points) if apart is None else max(1, self._chunk // (len(block) * apart.size * into.element_size()))
            for start in range(0, len(points), at_once):
                self._add(block, points[start : start + at_once], some)

    def _add(self, into: Tensor, points: Sequence[Point], batch: Any) -> None:
        try:
            if self._factored is not None:
                return self._factored.add(into, points, batch, batch_axes(batch))
        except Rearranged:  # such as a branch that this batch takes and the first did not
            pass
        for point in points:
            self._way(into, point, self._outputs, self._layout, batch)

    def _some(self, batch: Any, rows: int, into: Tensor) -> Iterator[tuple[Any, Tensor]]:
        """Some rows of the batch at a time, with their part of `into`."""
        outputs = self._outputs or 1
        width = max(1, self._chunk // (outputs * self._numbers * into.element_size()))
        for start in range(0, rows, width):
            yield take(batch, slice(start, min(start + width, rows))), into[start * outputs : (start + width) * outputs]
