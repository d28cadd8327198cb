"""<a, ∇ℓ_i> from the factors of example gradients, site by site, in two ways that agree.

ghost        Σ_position δᵀ A x, which never forms a gradient: best for few rows of a, or few positions
materialise  Σ_position δ ⊗ x of every example, then one matrix product: best for many rows and many positions

What is not taken apart (normalisations, bare parameters) is small and comes as it is. Neurons through which some rows of a never went
(behind a ReLU, all measures of a query leave the same ones out) are left out of their products too.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import embedding_bag

from explaind.kernel.factored import FEW, Factored, Factors, Site
from explaind.kernel.idle import Used, used
from explaind.kernel.layout import Layout
from explaind.kernel.machine import Machine

Way = Literal["ghost", "materialise"]
GATHERED = 8
"""Up to this many rows of a, a row of a table is copied for every lookup; with more, lookups of the same row are multiplied at once.
On a GPU rows are always copied, since it would have to tell the host what is looked up."""
GATHERED_NUMBERS = 1 << 24
"""How many of them at once."""
BLOCK = 1 << 21
"""Numbers of gradients that are formed at once: few enough to be multiplied while a cache holds them."""
GPU_BLOCK = 1 << 25
"""The same on a GPU, which wants few and large operations."""
WIDE = 1024
"""Examples of a block, where there are as many."""
DEEP = 16
"""Rows of a gradient at least in a block of those that are matrix products themselves."""
LINE = 16
"""Results begin every row at a multiple of so many numbers: matrix products write to others at two thirds of the rate."""


@dataclass(frozen=True)
class Work:
    """What one site takes for one example: operations, numbers read or written, numbers held; and calls per chunk of examples."""

    flops: float
    moved: float
    held: int
    calls: int = 4


class Contraction:
    """Products of the gradients of some examples with rows of a."""

    def __init__(self, layout: Layout, factored: Factored, by_layer: bool, gathered: int = GATHERED) -> None:
        """
        by_layer  tell groups of layers apart; otherwise they are summed
        gathered  rows of a up to which lookups copy rows of a table
        """
        self._layout, self.factored, self._by_layer, self._gathered = layout, factored, by_layer, gathered
        self._fine = len(layout.groups) if by_layer else 1
        self.sites = factored.sites
        # [out, in] of a linear map or convolution, [row, width] of a table
        self._shapes = [self._matrix(site) for site in self.sites]
        self._space: Tensor | None = None
        self._known: Tensor | None = None

    def _matrix(self, site: Site) -> tuple[int, int]:
        layer = self._layout.names.index(site.weight)
        first = self._layout.shapes[layer][0]
        return first, self._layout.sizes[layer] // first

    def _room(self, like: Tensor, *shape: int) -> Tensor:
        """Memory that is used again and again: fresh pages for every block would cost as much as the sums."""
        size = prod(shape)
        if self._space is None or self._space.numel() < size or self._space.dtype != like.dtype:
            self._space = None
            self._space = like.new_empty(size)
        return self._space[:size].view(shape)

    def _results(self, like: Tensor, *shape: int) -> Tensor:
        known = self._known
        if known is None or known.shape != shape or known.dtype != like.dtype:
            self._known = None
            self._known = known = in_lines(like, *shape)
        return known.zero_()

    def work(self, site: int, way: Way, rows: int) -> Work:
        """For so many rows of a."""
        (first, second), s = self._shapes[site], self.sites[site]
        size, positions, table = first * second, s.positions, s.lookup
        if way == "materialise" and table:
            return Work(2 * size * rows, positions * second + 2 * size, size)
        if way == "materialise":  # block by block, so that a cache holds what is formed
            formed = (2 * positions - 1 if positions <= FEW else 1) * size
            return Work(2 * size * (rows + (positions if positions > FEW else 0)), formed, 0)
        held = positions * rows * (second if table else min(first, second))
        if table and rows > self._gathered:
            return Work(2 * held, 2 * positions * rows, 2 * positions * rows, 4 * first)
        return Work(2 * held if table else 2 * positions * rows * size, (3 if table else 2) * held, held)

    def seconds(self, machine: Machine, site: int, way: Way, rows: int, examples: int, itemsize: int) -> float:
        """Estimated time of a site for so many examples."""
        w = self.work(site, way, rows)
        return machine.seconds(w.flops * examples, w.moved * examples * itemsize, w.calls)

    def cheapest(self, machine: Machine, rows: int, examples: int, itemsize: int) -> tuple[Way, ...]:
        """The way to take for every site."""
        ways: list[Way] = []
        for site in range(len(self.sites)):
            ghost, formed = (self.seconds(machine, site, way, rows, examples, itemsize) for way in ("ghost", "materialise"))
            ways.append("ghost" if ghost <= formed else "materialise")
        return tuple(ways)

    def least(self, machine: Machine, rows: int, examples: int, itemsize: int) -> float:
        """Estimated time of all sites, each in its cheapest way."""
        ways = self.cheapest(machine, rows, examples, itemsize)
        return sum(self.seconds(machine, site, way, rows, examples, itemsize) for site, way in enumerate(ways))

    def held(self, ways: Sequence[Way], rows: int) -> int:
        """Numbers held at once for one example."""
        return self.factored.size + self._fine * rows + max(self.work(site, way, rows).held for site, way in enumerate(ways))

    def used(self, a: Float[Tensor, "row param"]) -> list[list[Used]]:
        """What of a is not zero, for every site; nothing where it is multiplied whole (on a GPU always: it would have to tell the host)."""
        columns = self._layout.split(a)
        whole = [site.lookup or a.is_cuda for site in self.sites]
        return [
            [] if skip else used(columns[site.weight].view(len(a), *shape))
            for site, shape, skip in zip(self.sites, self._shapes, whole, strict=True)
        ]

    def __call__(
        self, factors: Factors, a: Float[Tensor, "row param"], ways: Sequence[Way], used: Sequence[Sequence[Used]] | None = None
    ) -> Float[Tensor, "fine row example"]:
        """fine is the groups of layers, or 1; factors of one output each; used: of this a. The next call writes into the same memory."""
        examples, group = len(factors.inputs[0]), dict(zip(self._layout.names, self._layout.group, strict=True))
        into = self._results(a, self._fine, len(a), examples)
        columns = self._layout.split(a)

        def of(name: str) -> Tensor:
            return into[group[name] if self._by_layer else 0]

        for name, gradient in factors.rest.items():
            of(name).addmm_(columns[name].reshape(len(a), -1), gradient.reshape(examples, -1).T)
        used = [[] for _ in self.sites] if used is None else used
        for site, shape, way, parts, delta, x in zip(self.sites, self._shapes, ways, used, factors.deltas, factors.inputs, strict=True):
            matrix, d = columns[site.weight].view(len(a), *shape), delta[:, 0]
            if site.lookup:
                at_once = max(1, GATHERED_NUMBERS // d.numel())
                few = len(a) <= self._gathered
                looked_up = partial(_gathered, at_once=at_once) if few else partial(_looked_up, room=self._room)
                (looked_up if way == "ghost" else _looked_up_formed)(of(site.weight), matrix, d, x)
            else:
                multiply = _ghost if way == "ghost" else _formed
                for u in (u for u in parts if len(u.outs)):
                    multiply(of(site.weight)[u.rows], matrix[u.rows], d, x, self._room, u.outs, u.ins)
                if not parts:
                    multiply(of(site.weight), matrix, d, x, self._room)
            if site.bias is not None:
                of(site.bias).addmm_(columns[site.bias], d.sum(1).T)
        return into

    def add(self, into: Float[Tensor, " param"], factors: Factors, weights: Float[Tensor, " example"]) -> None:
        """into += Σ_example weight · gradient; factors of one output each."""
        columns = self._layout.split(into)
        for name, gradient in factors.rest.items():
            columns[name].add_(torch.tensordot(weights, gradient[:, 0], 1))
        for site, shape, delta, x in zip(self.sites, self._shapes, factors.deltas, factors.inputs, strict=True):
            d = (weights[:, None, None] * delta[:, 0]).flatten(0, 1)
            if site.lookup:
                columns[site.weight].index_add_(0, x.flatten(), d)
            else:
                columns[site.weight].view(shape).addmm_(d.T, x.flatten(0, 1))
            if site.bias is not None:
                columns[site.bias].add_(d.sum(0))


def in_lines(like: Tensor, *shape: int) -> Tensor:
    """Zeros whose rows matrix products can add to at their full rate, unless they are so short that this would take much more room."""
    if shape[-1] < 2 * LINE:
        return like.new_zeros(*shape)
    return like.new_zeros(*shape[:-1], -(-shape[-1] // LINE) * LINE)[..., : shape[-1]]


def _ghost(
    into: Float[Tensor, "row example"],
    a: Float[Tensor, "row out in"],
    delta: Float[Tensor, "example position out"],
    x: Float[Tensor, "example position in"],
    room: Callable[..., Tensor],
    outs: Int[Tensor, " used_out"] | None = None,
    ins: Int[Tensor, " used_in"] | None = None,
) -> None:
    if outs is not None and ins is not None:
        a, delta, x = _some(_some(a, 1, outs), 2, ins), _some(delta, 2, outs), _some(x, 2, ins)
    # Through the wider side first: what is between the two products is then as narrow as can be.
    if a.shape[1] >= a.shape[2]:
        near, far, table = delta, x, a.movedim(1, 0).flatten(1)  # [out, row · in]
    else:
        near, far, table = x, delta, a.flatten(0, 1).T  # [in, row · out]
    near = near.flatten(0, 1)
    between = torch.mm(near, table, out=room(a, len(near), table.shape[1])).unflatten(1, (len(a), -1))  # [example · position, row, width]
    if len(a) == 1:
        found = (between[:, 0] * far.flatten(0, 1)).sum(-1, keepdim=True)
    else:
        found = torch.bmm(between, far.flatten(0, 1)[..., None])[..., 0]
    into.add_(found.unflatten(0, delta.shape[:2]).sum(1).T)


def _formed(
    into: Float[Tensor, "row example"],
    a: Float[Tensor, "row out in"],
    delta: Float[Tensor, "example position out"],
    x: Float[Tensor, "example position in"],
    room: Callable[..., Tensor],
    outs: Int[Tensor, " used_out"] | None = None,
    ins: Int[Tensor, " used_in"] | None = None,
) -> None:
    if ins is not None:
        x = _some(x, 2, ins)
    if outs is not None:
        delta = _some(delta, 2, outs)
    count, width, few = delta.shape[2], x.shape[2], x.shape[1] <= FEW
    block, wide = (GPU_BLOCK, len(x)) if a.is_cuda else (BLOCK, min(len(x), WIDE))
    deep = min(count, max(1 if few else DEEP, block // (wide * width)))
    at_once = max(LINE, block // (deep * width) // LINE * LINE)
    for start in range(0, count, deep):
        end = min(start + deep, count)
        matrix = a[:, start:end] if outs is None else a[:, outs[start:end]]
        matrix, d = (matrix if ins is None else _some(matrix, 2, ins)).flatten(1), delta[..., start:end]
        for where, own, inputs in zip(into.split(at_once, 1), d.split(at_once), x.split(at_once), strict=True):
            gradient = room(a, len(own), end - start, width)
            if few:
                torch.mul(own[:, 0, :, None], inputs[:, 0, None, :], out=gradient)
                for k in range(1, own.shape[1]):
                    gradient.addcmul_(own[:, k, :, None], inputs[:, k, None, :])
            else:
                torch.bmm(own.mT, inputs, out=gradient)
            where.addmm_(matrix, gradient.flatten(1).T)


def _some(a: Tensor, dim: int, places: Tensor) -> Tensor:
    """Some places of a dimension; what all are is not copied."""
    return a if len(places) == a.shape[dim] else a[(slice(None),) * dim + (places,)]  # several times as fast as index_select


def _gathered(
    into: Float[Tensor, "row example"],
    a: Float[Tensor, "row entry width"],
    delta: Float[Tensor, "example position width"],
    x: Int[Tensor, "example position"],
    at_once: int,
) -> None:
    for some, rows in zip(into.split(at_once), a.split(at_once), strict=True):
        some.add_((rows[:, x] * delta).sum((-1, -2)))


def _looked_up(
    into: Float[Tensor, "row example"],
    a: Float[Tensor, "row entry width"],
    delta: Float[Tensor, "example position width"],
    x: Int[Tensor, "example position"],
    room: Callable[..., Tensor],
) -> None:
    order = x.flatten().argsort(stable=True)
    entries, counts = torch.unique_consecutive(x.flatten()[order], return_counts=True)
    delta = delta.flatten(0, 1)[order]
    found = room(a, len(order), -(-len(a) // LINE) * LINE)  # of lookups of one entry below each other
    for entry, own, result in zip(entries.tolist(), *(t.split(counts.tolist()) for t in (delta, found)), strict=True):
        torch.mm(own, a[:, entry].T, out=result[:, : len(a)])
    into.add_(embedding_bag(order.argsort().view(x.shape), found, mode="sum")[:, : len(a)].T)


def _looked_up_formed(
    into: Float[Tensor, "row example"],
    a: Float[Tensor, "row entry width"],
    delta: Float[Tensor, "example position width"],
    x: Int[Tensor, "example position"],
) -> None:
    gradient = delta.new_zeros(len(x), *a.shape[1:])
    gradient.index_put_((torch.arange(len(x), device=x.device)[:, None], x), delta, accumulate=True)
    into.addmm_(a.flatten(1), gradient.flatten(1).T)
