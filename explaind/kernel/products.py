"""<a, ∇ℓ_i> of every example of a batch with every costate, in ways that agree.

materialise   the gradient of each example, then one matrix product per layer
ghost         from the factors of each gradient, which is never formed (contracting.py)
jvp           the forward derivative of the batch's loss vector along a; exact also where examples are coupled through the batch
backward      one backward pass through the whole batch for every example, or for every group of examples

Left to itself, the cheaper of the first two is taken for every layer, by an estimate from the rates of the machine (machine.py). Where
losses are coupled it is the cheaper of the last two, the jvp only where it differentiates what the training did (no_grad and the padding
row of a table are known to the backward pass alone).
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, cast

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from explaind.errors import RequestError
from explaind.kernel.contracting import GATHERED, Contraction, Way, in_lines
from explaind.kernel.factored import Rearranged
from explaind.kernel.gradients import (
    CHUNK_BYTES,
    RowGradients,
    batch_axes,
    combinations,
    gradient,
    one,
    rows_of,
    separable,
    take,
    taken_apart,
)
from explaind.kernel.layout import Layout
from explaind.kernel.machine import ORDINARY, Machine
from explaind.kernel.points import Function, Point
from explaind.kernel.whole import Kind, both_ways_alike, derivatives, each_row, of_batch, some_of, weighted
from explaind.replay.steps import Drawn, Part

Finest = Literal["none", "layer", "param"]
Route = Literal["jvp", "backward"] | tuple[Way, ...]
"""For the whole batch, or the way of every site; of none, where gradients are not taken apart."""
Mode = tuple[bool, ...]
"""Train or eval, module by module."""
ROUTES = ("auto", "materialise", "ghost", "jvp")
CALLS = 40
"""Operations of a backward pass for every tensor of parameters, roughly."""
AT_ONCE = 2048
"""Examples whose gradients are taken apart at once: more would want more memory, and go no faster."""
FEW = 4
"""Up to this many forward passes a batch are cheaper than gradients per example that are not taken apart."""


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
    _kinds: dict[Mode, Kind] = field(default_factory=dict)
    _drawn: dict[Mode, Kind] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._one, self._undecided = one(self.losses), Kind()
        self._kind = self._undecided  # of parts of one example: they go backwards

    @property
    def _separable(self) -> bool:
        return self._kind.separable

    @property
    def _apart(self) -> Contraction | None:
        return self._kind.apart

    def __call__(
        self, theta: Tensor, part: Part, a: Float[Tensor, "row param"], total: Float[Tensor, " param"] | None = None, mode: Mode = ()
    ) -> Iterator[tuple[slice, Tensor]]:
        """Yields (some examples of the part, products [fine, row, example]), which stand until the next are asked for.

        fine is 1, layer or param. total: as for ``credits``.
        """
        self.prepare(theta, part, mode)
        route = self._chosen(theta, part, a)
        if route == "jvp":
            return self._jvp(theta, part, a, total)
        if route == "backward":
            return self._backward(theta, part, a, total)
        return self._contracted(theta, part, a, route, total) if route else self._materialise(theta, part, a, total)

    def credits(
        self,
        theta: Tensor,
        part: Part,
        a: Float[Tensor, "row param"],
        entries: np.ndarray,
        total: Float[Tensor, " param"] | None = None,
        mode: Mode = (),
    ) -> Iterator[tuple[slice | Tensor, Tensor]]:
        """Yields (entries [entry] of the example axis, weighted products [fine, row, entry]); an entry may come more than once.

        The products stand until the next are asked for. Entries in a row come as a slice, which is three times faster to add to.

        entries [example]: where each example of the part is booked. Where so many share one that it is less work, their gradients are
        summed first. total: the weighted sum of the part's gradients is added to it, by the time that all is yielded. mode: that the model
        is in, module by module; losses may be of another kind in each.
        """
        self.prepare(theta, part, mode)
        crowded = self._crowded(part, a, *np.unique(entries, return_counts=True)) if self.route == "auto" else entries[:0]
        if len(crowded):
            yield from self._of_groups(theta, part, a, entries, crowded, total)
            alone = np.flatnonzero(~np.isin(entries, crowded))
            if not len(alone):
                return
            places = torch.from_numpy(alone).to(a.device, non_blocking=True)
            part, entries = Part(take(part.batch, places), part.ids[alone], part.weights[places]), entries[alone]
        first, places = int(entries[0]), torch.from_numpy(entries).to(a.device, non_blocking=True)
        in_a_row = bool((np.diff(entries) == 1).all())
        for span, dots in self(theta, part, a, total, mode):
            where = slice(first + span.start, first + span.stop) if in_a_row else places[span]
            yield where, dots.mul_(part.weights[span])

    def _crowded(self, part: Part, a: Tensor, groups: np.ndarray, members: np.ndarray) -> np.ndarray:
        """The groups of which a gradient is less work than products of every member: all or none where losses cannot be taken apart."""
        examples, rows, params = len(part.ids), len(a), self.layout.params
        if not self._separable:
            return groups if 2 * len(groups) <= examples else groups[:0]
        if self._apart is None:
            alone = self.machine.seconds(2 * rows * examples * params, 2 * examples * params * a.element_size())
        else:
            alone = self._apart.least(self.machine, rows, examples, a.element_size())
        together = self.machine.seconds(2 * rows * params, 3 * params * a.element_size(), CALLS * len(self.layout.names))
        found: np.ndarray = groups[(members > 1) & (together < alone * members / examples)]
        return found

    def _at_once(self, a: Tensor) -> int:
        """How many gradients are held at a time."""
        return max(1, self.chunk // (self.layout.params * a.element_size() * (len(a) if self.finest == "param" else 1)))

    def _of_groups(
        self, theta: Tensor, part: Part, a: Tensor, entries: np.ndarray, groups: np.ndarray, total: Tensor | None
    ) -> Iterator[tuple[Tensor, Float[Tensor, "fine row group"]]]:
        for some in np.split(groups, range(self._at_once(a), len(groups), self._at_once(a))):
            gradients = a.new_zeros(len(some), self.layout.params)
            self._sum_groups(theta, part, some[:, None] == entries, gradients)
            if total is not None:
                total += gradients.sum(0)
            yield torch.from_numpy(some).to(a.device, non_blocking=True), self._contract(gradients, a)

    def _sum_groups(self, theta: Tensor, part: Part, belongs: np.ndarray, into: Float[Tensor, "group param"]) -> None:
        """Add every group's weighted sum of gradients. belongs: bool [group, example]"""
        places = [torch.from_numpy(np.flatnonzero(row)).to(into.device, non_blocking=True) for row in belongs]
        if self._separable:
            for row, of_group in zip(into, (Part(take(part.batch, p), part.ids, part.weights[p]) for p in places), strict=True):
                gradient(partial(weighted, self.losses, of_group), self.layout, theta, row)
        else:
            weights = (torch.zeros_like(part.weights).index_copy_(0, p, part.weights[p]) for p in places)
            combinations(partial(of_batch, self.losses, part), self.layout, theta, weights, into)

    def prepare(self, theta: Tensor, part: Part, mode: Mode = ()) -> None:
        """Find out, once a mode, what kind of function the losses are; a part of one example cannot tell."""
        if isinstance(part.batch, Drawn):  # its random numbers belong to the whole batch
            self._kind = self._drawn.setdefault(mode, Kind())
            return
        self._kind = self._kinds.get(mode, self._undecided)
        if self._kind is not self._undecided or rows_of(part.batch) < 2:
            return
        self._kind = self._kinds[mode] = Kind(separable(self.losses, self.layout.split(theta), part.batch))
        if not self._separable:
            return
        self._kind.gradients = RowGradients(Point(self._one, theta), None, self.layout, part.batch, self.chunk)
        if self.finest != "param":
            factored = taken_apart(Point(self._one, theta), None, self.layout, part.batch)
            gathered = sys.maxsize if theta.is_cuda else GATHERED
            self._kind.apart = None if factored is None else Contraction(self.layout, factored, self.finest == "layer", gathered)

    def _forward(self, theta: Tensor, part: Part) -> bool:
        """Whether the forward derivative of the losses is the one that the backward pass takes; found out once a kind."""
        if self._kind.forward is None:
            self._kind.forward = both_ways_alike(self.losses, self.layout, theta, part)
        return self._kind.forward

    def _chosen(self, theta: Tensor, part: Part, a: Tensor) -> Route:
        if self.route in ("materialise", "ghost") and not self._separable and self._kind is not self._undecided:
            raise RequestError(
                "the losses of a batch depend on each other (or draw random numbers, or vmap lacks an operation of the model)",
                expected="products='jvp' or 'auto'",
                got=f"products={self.route!r}",
                do="use auto, which takes the whole batch",
            )
        passes = len(a) * (len(self.layout.groups) if self.finest == "layer" else 1)
        if self.route == "jvp":
            self._check_jvp(theta, part)
            return "jvp"
        if not self._separable:
            fewer = self.route == "auto" and self.finest != "param" and passes < 2 * len(part.ids)
            return "jvp" if fewer and self._forward(theta, part) else "backward"
        if self._apart is None:
            few = self.route == "auto" and self.finest != "param" and passes <= FEW
            return "jvp" if few and self._forward(theta, part) else ()
        if self.route != "auto":
            return cast(tuple[Way, ...], (self.route,) * len(self._apart.sites))
        return self._apart.cheapest(self.machine, len(a), len(part.ids), a.element_size())

    def _check_jvp(self, theta: Tensor, part: Part) -> None:
        if self.finest == "param":
            raise RequestError(
                "forward derivatives do not tell single parameters apart",
                expected="products='auto'",
                got="products='jvp' with 'param' kept",
                do="use auto, or keep 'layer'",
            )
        if not self._forward(theta, part):
            raise RequestError(
                "the forward derivative of the losses is not what the training differentiated (a part without gradients, the padding row "
                "of a table, or an operation without a forward mode)",
                expected="products='auto'",
                got="products='jvp'",
                do="use auto",
            )

    def covered(self, theta: Tensor, part: Part, rows: int, mode: Mode = ()) -> dict[str, str]:
        """How every layer's products are made for so many costates: {layer: "ghost", "materialise", "jvp" or "backward"}."""
        self.prepare(theta, part, mode)
        route = self._chosen(theta, part, theta.new_empty(rows, 0))
        if isinstance(route, str):
            return dict.fromkeys(self.layout.names, route)
        sites = () if self._apart is None else self._apart.sites
        ways = {name: way for site, way in zip(sites, route, strict=True) for name in (site.weight, site.bias)} if route else {}
        return {name: ways.get(name, "materialise") for name in self.layout.names}

    def _factors(self, apart: Contraction, theta: Tensor, part: Part) -> Any:
        return apart.factored.factors(Point(self._one, theta), part.batch, batch_axes(part.batch))

    def _contracted(
        self, theta: Tensor, part: Part, a: Tensor, ways: Sequence[Way], total: Tensor | None
    ) -> Iterator[tuple[slice, Tensor]]:
        assert self._apart is not None
        count = len(part.ids)
        rows = max(1, min(count, AT_ONCE, self.chunk // (self._apart.held(ways, len(a)) * a.element_size())))
        rows = -(-count // -(-count // rows))  # of the same size
        used = self._apart.used(a)
        for start in range(0, count, rows):
            span = slice(start, min(start + rows, count))
            some = some_of(part, span)
            try:
                factors = self._factors(self._apart, theta, some)
            except Rearranged:  # such as a branch that these examples take and the first did not
                yield from ((slice(start + s.start, start + s.stop), dots) for s, dots in self._materialise(theta, some, a, total))
            else:
                if total is not None:
                    self._apart.add(total, factors, some.weights)
                yield span, self._apart(factors, a, ways, used)

    def _materialise(self, theta: Tensor, part: Part, a: Tensor, total: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
        assert self._kind.gradients is not None
        count, rows = len(part.ids), min(len(part.ids), self._at_once(a))
        gradients = a.new_empty(rows, self.layout.params)  # fresh memory for every chunk would cost more than the sums
        for start in range(0, count, rows):
            span = slice(start, min(start + rows, count))
            some = gradients[: span.stop - start].zero_()
            self._kind.gradients.add(some, [Point(self._one, theta)], take(part.batch, span), len(some))
            if total is not None:
                total.addmv_(some.T, part.weights[span])
            yield span, self._contract(some, a)

    def _contract(self, gradients: Float[Tensor, "example param"], a: Float[Tensor, "row param"]) -> Float[Tensor, "fine row example"]:
        if self.finest == "param":
            return torch.einsum("rp,ep->pre", a, gradients)
        if self.finest == "layer":
            into = in_lines(a, len(self.layout.groups), len(a), len(gradients))
            for group, cut in zip(self.layout.group, self.layout.slices, strict=True):
                into[group].addmm_(a[:, cut], gradients[:, cut].T)
            return into
        return (a @ gradients.T)[None]

    def _jvp(self, theta: Tensor, part: Part, a: Tensor, total: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
        if total is not None:
            gradient(partial(weighted, self.losses, part), self.layout, theta, total)
        along, tangents = derivatives(self.losses, part, self.layout, theta), self.layout.split(a)
        groups: list[dict[str, Tensor]] = [{} for _ in self.layout.groups] if self.finest == "layer" else [{}]
        for name, group in zip(self.layout.names, self.layout.group, strict=True):
            groups[group if self.finest == "layer" else 0][name] = tangents[name]
        yield slice(0, len(part.ids)), torch.stack([each_row(along, group) for group in groups])

    def _backward(self, theta: Tensor, part: Part, a: Tensor, total: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
        count, at_once = len(part.ids), self._at_once(a)
        for start in range(0, count, at_once):
            span = slice(start, min(start + at_once, count))
            gradients = a.new_zeros(span.stop - start, self.layout.params)
            alone = torch.eye(count, dtype=a.dtype, device=a.device)[span]
            combinations(partial(of_batch, self.losses, part), self.layout, theta, alone, gradients)
            if total is not None:
                total.addmv_(gradients.T, part.weights[span])
            yield span, self._contract(gradients, a)
