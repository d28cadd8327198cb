"""Gradients of a linear map's weight, kept as factors until they are summed.

For y = W x + b the gradient of a measure is Σ_position δ ⊗ x, with δ the measure's gradient at y. Averaged over the nodes of a path
rule it is one matrix product, (δ of all nodes)ᵀ (x of all nodes), written once, where adding up the nodes' gradients would write and
read [measure, param] numbers for each of them; and its product with a costate needs no gradient at all (products.py). A convolution is
the same with the patches of its input for x, an embedding with one-hot x. Only calls of torch.nn.functional.linear, embedding and conv1d
to conv3d are taken apart (nn.Linear, nn.Embedding and nn.Conv make these); parameters that are used in any other way, such as those of
normalisations, are differentiated as usual.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.func import vjp, vmap
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from explaind.kernel.layout import Layout
from explaind.kernel.points import Function, Point

FEW = 4
"""Up to this many positions, adding outer products one by one beats small matrix products."""


@dataclass(frozen=True)
class Site:
    """One call of a linear map, a convolution or an embedding: its parameters by name, and the shape of y for a single query."""

    weight: str
    bias: str | None
    shape: torch.Size
    lookup: bool = False
    """Whether x are indices of rows of the weight."""
    spatial: int = 0
    """Dimensions of a convolution."""

    @property
    def positions(self) -> int:
        """Vectors x and δ of a single query."""
        return self.shape.numel() // self.shape[-1 - self.spatial]


@dataclass(frozen=True)
class Factors:
    """Gradients of some queries: of the parameters that are not taken apart as they are, of the others as δ and x, site by site."""

    rest: Mapping[str, Tensor]
    """[query, output, *shape]"""
    deltas: list[Tensor]
    """[query, output, position, out]"""
    inputs: list[Tensor]
    """[query, position, in], or indices [query, position]"""


class Rearranged(Exception):
    """The function made other calls than those that were found when it was first taken apart."""


CONVOLUTIONS = (torch.conv1d, torch.conv2d, torch.conv3d)


def patches(x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]) -> Tensor:
    """What a convolution multiplies its kernel with: [batch, in, *space] -> [batch, *position, in · kernel]."""
    edges = [edge for p in reversed(padding) for edge in (p, p)]
    x = F.pad(x, edges) if any(edges) else x
    n = len(kernel)
    for d, (k, step, spread) in enumerate(zip(kernel, stride, dilation, strict=True)):
        x = x.unfold(2 + d, (k - 1) * spread + 1, step)[..., ::spread]
    return x.movedim(1, 1 + n).flatten(1 + n)


@dataclass
class _Taps(TorchFunctionMode):
    """Holds W and b still in every call that is taken apart, adds a probe to y, and remembers x: the gradient of the probe is δ."""

    parameters: Mapping[str, Tensor]
    probes: tuple[Tensor, ...] | None = None
    expected: tuple[Site, ...] = ()
    """What the probes are for, in the order of the calls."""
    sites: list[Site] = field(default_factory=list)
    inputs: list[Tensor] = field(default_factory=list)
    rest: set[str] = field(default_factory=set)
    """Parameters that were used in any other way."""

    def __post_init__(self) -> None:
        super().__init__()
        self._names = {id(tensor): name for name, tensor in self.parameters.items()}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.linear:
            return self._linear(*args, **kwargs)
        if func is F.embedding:
            return self._embedding(*args, **kwargs)
        if func in CONVOLUTIONS:
            return self._convolution(func, *args, **kwargs)
        self._note(args, kwargs)
        return func(*args, **kwargs)

    def _note(self, *used: Any) -> None:
        self.rest.update(self._names[id(leaf)] for leaf in tree_leaves(used) if id(leaf) in self._names)

    def _still(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
        """Whether weight and bias are parameters themselves; otherwise what is used is noted."""
        if id(weight) in self._names and (bias is None or id(bias) in self._names):
            return True
        self._note(input, weight, bias)
        return False

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if not self._still(input, weight, bias):
            return F.linear(input, weight, bias)
        y = F.linear(input, weight.detach(), None if bias is None else bias.detach())
        return self._probed(self._site(weight, bias, y), input, y, input)

    def _convolution(
        self,
        func: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: int | Sequence[int] = 1,
        padding: str | int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
    ) -> Tensor:
        spatial = weight.ndim - 2
        plain = groups == 1 and not isinstance(padding, str) and input.ndim == weight.ndim
        if not plain:
            self._note(input, weight, bias)
        if not plain or not self._still(input, weight, bias):
            return func(input, weight, bias, stride, padding, dilation, groups)
        y = func(input, weight.detach(), None if bias is None else bias.detach(), stride, padding, dilation)
        assert not isinstance(padding, str)
        x = patches(input, weight.shape[2:], *((v,) * spatial if isinstance(v, int) else v for v in (stride, padding, dilation)))
        return self._probed(self._site(weight, bias, y, spatial=spatial), x, y, input)

    def _site(self, weight: Tensor, bias: Tensor | None, y: Tensor, **of: Any) -> Site:
        return Site(self._names[id(weight)], None if bias is None else self._names[id(bias)], y.shape, **of)

    def _embedding(
        self,
        input: Tensor,
        weight: Tensor,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
    ) -> Tensor:
        if id(weight) not in self._names or padding_idx is not None or max_norm is not None or scale_grad_by_freq:
            self._note(weight)
            return F.embedding(input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)
        y = F.embedding(input, weight.detach())
        return self._probed(self._site(weight, None, y, lookup=True), input, y, input)

    def _probed(self, site: Site, x: Tensor, y: Tensor, entered: Tensor) -> Tensor:
        self._note(entered)
        self.sites.append(site)
        self.inputs.append(x)
        if self.probes is None:
            return y
        if self.sites != list(self.expected[: len(self.sites)]):
            raise Rearranged
        return y + self.probes[len(self.sites) - 1]


class Factored:
    """∇h of every query and output of a function, with the weights of linear maps as factors."""

    def __init__(self, function: Function, layout: Layout, parameters: Mapping[str, Tensor], query: Any) -> None:
        """parameters and query (one, without its batch dimension) serve to find the linear calls."""
        self._layout = layout
        with torch.no_grad(), _Taps(parameters) as taps:
            function(parameters, query)
        self.sites, self._rest = tuple(taps.sites), frozenset(taps.rest)

    @property
    def size(self) -> int:
        """Numbers that one measure's gradient takes at one node, as factors, with their inputs."""
        rest = sum(size for name, size in zip(self._layout.names, self._layout.sizes, strict=True) if name in self._rest)
        return rest + sum(site.shape.numel() + site.positions * self._fan_in(site) for site in self.sites)

    def _fan_in(self, site: Site) -> int:
        """Numbers of x at one position."""
        shape = self._layout.shapes[self._layout.names.index(site.weight)]
        return 1 if site.lookup else prod(shape[1:])

    @property
    def widest(self) -> int:
        """Numbers of the largest weight among the sites."""
        return max(self._layout.sizes[self._layout.names.index(site.weight)] for site in self.sites)

    def add(self, into: Tensor, points: Sequence[Point], queries: Any, axes: Any) -> None:
        """into[query · output, param] += Σ weight · ∇h over the points; axes: vmap's in_dims of queries.

        Raises Rearranged, with nothing added, where the function's calls are not those that were found.
        """
        found = [self.factors(point, queries, axes) for point in points]
        for one, point in zip(found, points, strict=True):
            self._layout.add(into, {name: t.flatten(0, 1) for name, t in one.rest.items()}, point.weight)
        for i, site in enumerate(self.sites):
            # the positions of all nodes one after the other
            delta = torch.cat([point.weight * one.deltas[i] for one, point in zip(found, points, strict=True)], dim=2)
            x = torch.cat([one.inputs[i] for one in found], dim=1)
            (self._add_lookup if site.lookup else self._add_linear)(into, site, delta, x)

    def factors(self, point: Point, queries: Any, axes: Any) -> Factors:
        """∇h at a point, as factors. Raises Rearranged."""
        rest, probes, xs = vmap(partial(self._one_query, point.function), (None, axes))(self._layout.split(point.theta), queries)
        deltas = [p.movedim(-1 - site.spatial, -1).flatten(2, -2) for p, site in zip(probes, self.sites, strict=True)]
        inputs = [x.flatten(1, -1 if site.lookup else -2) for x, site in zip(xs, self.sites, strict=True)]
        return Factors(rest, deltas, inputs)

    def _one_query(
        self, function: Function, parameters: Mapping[str, Tensor], query: Any
    ) -> tuple[dict[str, Tensor], tuple[Tensor, ...], list[Tensor]]:
        """(∇h by the other parameters, δ of every site, x of every site), the first two [output, …]."""

        def tapped(rest: dict[str, Tensor], probes: tuple[Tensor, ...]) -> tuple[Tensor, list[Tensor]]:
            together = {**parameters, **rest}
            with _Taps(together, probes, self.sites) as taps:
                values = function(together, query).reshape(-1)
            if tuple(taps.sites) != self.sites or taps.rest != self._rest:
                raise Rearranged
            return values, taps.inputs

        like = next(iter(parameters.values()))
        probes = tuple(like.new_zeros(site.shape) for site in self.sites)
        others = {name: parameters[name] for name in sorted(self._rest)}
        values, pull, inputs = vjp(tapped, others, probes, has_aux=True)  # type: ignore[misc]
        if values.numel() == 1:  # no loop over one output
            by_rest, by_probes = tree_map(lambda t: t.unsqueeze(0), pull(torch.ones_like(values)))
        else:
            by_rest, by_probes = vmap(pull)(torch.eye(values.numel(), dtype=values.dtype, device=values.device))
        return by_rest, by_probes, inputs

    def _view(self, into: Tensor, name: str, queries: int) -> Tensor:
        """The columns of one layer: [query, output, out, in], or [query, output, out], as a view of into."""
        layer = self._layout.names.index(name)
        shape = self._layout.shapes[layer]
        view = into[:, self._layout.slices[layer]].unflatten(0, (queries, -1))
        return view if len(shape) < 2 else view.unflatten(-1, (shape[0], -1))

    def _add_linear(self, into: Tensor, site: Site, delta: Tensor, x: Tensor) -> None:
        weight = self._view(into, site.weight, len(delta))
        if x.shape[1] <= FEW:
            for k in range(x.shape[1]):
                weight.addcmul_(delta[:, :, k, :, None], x[:, None, k, None, :])
        else:
            for one, d, entered in zip(weight, delta, x, strict=True):  # one query: [output, out, in]
                one.baddbmm_(d.mT, entered.expand(len(d), -1, -1))
        if site.bias is not None:
            self._view(into, site.bias, len(delta)).add_(delta.sum(2))

    def _add_lookup(self, into: Tensor, site: Site, delta: Tensor, x: Tensor) -> None:
        weight = self._view(into, site.weight, len(delta))  # [query, output, row, width]
        query, output = (torch.arange(n, device=x.device) for n in delta.shape[:2])
        weight.index_put_((query[:, None, None], output[:, None], x[:, None, :]), delta, accumulate=True)
