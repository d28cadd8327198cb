"""Dot products of example gradients with costates: every way gives what plain autograd gives, for every kind of layer."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from explaind.kernel import contracting, products
from explaind.kernel import machine as machines
from explaind.kernel.contracting import GATHERED, Contraction
from explaind.kernel.factored import patches
from explaind.kernel.gradients import batch_axes
from explaind.kernel.layout import Layout
from explaind.kernel.machine import ORDINARY, Machine, machine, timed
from explaind.kernel.points import Point
from explaind.kernel.products import Products
from explaind.kernel.whole import batch_gradient
from explaind.replay.steps import Part
from explaind.store.manifest import Layer
from tests.cases import normal
from tests.closeness import algebra, rounding

EXAMPLES = 6


class Scaled(nn.Module):
    """Bare parameters, one without dimensions."""

    def __init__(self):
        super().__init__()
        self.by, self.shift = nn.Parameter(torch.tensor(1.5)), nn.Parameter(torch.randn(5))

    def forward(self, x):
        return x * self.by + self.shift


class Tied(nn.Module):
    """A table that is read by lookup and by matrix product."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(7, 4)

    def forward(self, tokens):
        return F.linear(torch.tanh(self.table(tokens)).sum(1), self.table.weight)


def conv(n, **options):
    return [nn.Conv1d, nn.Conv2d, nn.Conv3d][n - 1](2, 4, 2, **options)


TOKENS = torch.arange(EXAMPLES * 6).reshape(EXAMPLES, 6) ** 2 % 7
SPACE = {n: normal(EXAMPLES, 2, *(6, 5, 4)[:n], seed=n) for n in (1, 2, 3)}
# name: (model, inputs)
MODELS = {
    "linear": (lambda: nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2, bias=False)), normal(EXAMPLES, 3, seed=2)),
    "linear, few positions": (lambda: nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)), normal(EXAMPLES, 3, 3, seed=2)),
    "linear, many positions": (lambda: nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)), normal(EXAMPLES, 2, 4, 3, seed=2)),
    "embedding": (lambda: nn.Sequential(nn.Embedding(7, 3), nn.Tanh(), nn.Linear(3, 2)), TOKENS),
    "embedding with padding": (lambda: nn.Sequential(nn.Embedding(7, 3, padding_idx=1), nn.Tanh()), TOKENS),
    "tied": (Tied, TOKENS),
    "conv1d": (lambda: nn.Sequential(conv(1), nn.Tanh()), SPACE[1]),
    "conv1d strided, padded, dilated": (lambda: conv(1, stride=2, padding=1, dilation=2), SPACE[1]),
    "conv2d": (lambda: nn.Sequential(conv(2, bias=False), nn.Tanh(), nn.Conv2d(4, 2, (3, 1))), SPACE[2]),
    "conv2d strided, padded, dilated": (lambda: conv(2, stride=(2, 1), padding=(1, 0), dilation=(1, 2)), SPACE[2]),
    "conv2d in groups": (lambda: conv(2, groups=2), SPACE[2]),
    "conv2d padded by name": (lambda: nn.Conv2d(2, 4, 3, padding="same"), SPACE[2]),
    "conv2d padded by reflection": (lambda: conv(2, padding=1, padding_mode="reflect"), SPACE[2]),
    "conv3d": (lambda: nn.Sequential(conv(3, padding=1), nn.Tanh()), SPACE[3]),
    "layer norm": (lambda: nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5)), normal(EXAMPLES, 4, 3, seed=2)),
    "group norm": (lambda: nn.Sequential(conv(2), nn.GroupNorm(2, 4)), SPACE[2]),
    "RMS norm": (lambda: nn.Sequential(nn.Linear(3, 5), nn.RMSNorm(5)), normal(EXAMPLES, 3, seed=2)),
    "bare parameters": (lambda: nn.Sequential(nn.Linear(3, 5), Scaled()), normal(EXAMPLES, 3, seed=2)),
    "nothing but bare parameters": (Scaled, normal(EXAMPLES, 5, seed=2)),
}


class Asked:
    """A model's losses, where they are differentiated, and what plain autograd says."""

    def __init__(self, name):
        make, inputs = MODELS[name]
        torch.manual_seed(1)
        self.model = make().double()
        offset, layers = 0, []
        for layer, p in self.model.named_parameters():
            layers.append(Layer(layer, tuple(p.shape), offset, p.numel(), 0))
            offset += p.numel()
        self.layout = Layout(layers)
        self.theta = torch.cat([p.detach().flatten() for p in self.model.parameters()])
        self.part = Part((inputs,), np.arange(EXAMPLES), torch.ones(EXAMPLES, dtype=torch.float64))

    def losses(self, parameters, batch):
        return functional_call(self.model, dict(parameters), batch).flatten(1).square().cumsum(1).sin().sum(1)

    def slow(self, a):
        """[layer, row, example]"""
        theta = self.theta.clone().requires_grad_()
        losses = self.losses(self.layout.split(theta), self.part.batch)
        gradients = torch.stack([torch.autograd.grad(loss, theta, retain_graph=True)[0] for loss in losses])
        return torch.stack([a[:, cut] @ gradients[:, cut].T for cut in self.layout.slices])

    def products(self, finest, route, a, chunk=1 << 20, **of):
        made = Products(self.losses, self.layout, finest, route, chunk, **of)
        pieces = [(span, dots.clone()) for span, dots in made(self.theta, self.part, a)]
        assert [i for span, _ in pieces for i in range(span.start, span.stop)] == list(range(EXAMPLES))
        return torch.cat([dots for _, dots in pieces], dim=-1)


@pytest.mark.parametrize("rows", [1, 3, GATHERED + 1])
@pytest.mark.parametrize("name", MODELS)
def test_every_route_gives_the_dot_products_of_plain_autograd(name, rows):
    asked = Asked(name)
    a = normal(rows, asked.layout.params, seed=4)
    want = asked.slow(a)
    for route in ("ghost", "materialise", "jvp", "auto"):
        algebra(asked.products("layer", route, a), want, scale=1.0)
        algebra(asked.products("none", route, a, chunk=1), want.sum(0, keepdim=True), scale=1.0)


@pytest.mark.parametrize("name", ["embedding", "tied"])
def test_lookups_of_many_rows_may_be_copied_some_at_a_time(name, monkeypatch):
    monkeypatch.setattr(products, "GATHERED", GATHERED + 1)  # as on a GPU
    monkeypatch.setattr(contracting, "GATHERED_NUMBERS", 500)
    asked, a = Asked(name), normal(GATHERED + 1, Asked(name).layout.params, seed=4)
    algebra(asked.products("layer", "ghost", a), asked.slow(a), scale=1.0)


def test_what_is_taken_apart():
    def sites(name):
        asked = Asked(name)
        made = Products(asked.losses, asked.layout, "layer")
        made.prepare(asked.theta, asked.part)
        return [] if made._apart is None else [(site.weight, site.positions) for site in made._apart.sites]

    assert sites("linear, many positions") == [("0.weight", 8), ("2.weight", 8)]
    assert sites("conv2d") == [("0.weight", 20), ("2.weight", 12)]
    assert sites("conv2d padded by reflection") == [("weight", 42)]
    assert sites("tied") == [("table.weight", 6), ("table.weight", 1)]
    for name in ("conv2d in groups", "conv2d padded by name", "embedding with padding", "nothing but bare parameters"):
        assert sites(name) == []


@pytest.mark.parametrize("dilation", [(1, 1), (2, 1)])
@pytest.mark.parametrize("stride", [(1, 1), (2, 3)])
@pytest.mark.parametrize("padding", [(0, 0), (1, 2)])
def test_patches_are_those_of_torch(padding, stride, dilation):
    x = normal(2, 3, 7, 6, seed=3)
    want = F.unfold(x, (2, 3), dilation, padding, stride).mT
    assert torch.equal(patches(x, (2, 3), stride, padding, dilation).flatten(1, 2), want)


def test_the_cheaper_way_is_taken_for_every_layer():
    asked = Asked("linear")
    made = Products(asked.losses, asked.layout, "layer")
    made.prepare(asked.theta, asked.part)
    apart = made._apart
    assert isinstance(apart, Contraction)
    assert apart.cheapest(ORDINARY, 1, 1000, 8) == ("ghost", "ghost")  # one row: no gradient is worth building
    assert apart.cheapest(ORDINARY, 10_000, 1000, 8) == ("materialise", "materialise")  # what lies between two products is larger than it
    for rows in (1, 10, 10_000):
        ways = apart.cheapest(ORDINARY, rows, 1000, 8)
        for site, way in enumerate(ways):
            other = "ghost" if way == "materialise" else "materialise"
            assert apart.seconds(ORDINARY, site, way, rows, 1000, 8) <= apart.seconds(ORDINARY, site, other, rows, 1000, 8)
        assert apart.held(ways, rows) >= apart.factored.size


def test_work_counts_what_is_multiplied():
    asked = Asked("linear, many positions")
    made = Products(asked.losses, asked.layout, "layer")
    made.prepare(asked.theta, asked.part)
    factors = made._factors(made._apart, asked.theta, asked.part)
    assert [tuple(d.shape) for d in factors.deltas] == [(6, 1, 8, 5), (6, 1, 8, 2)]
    assert made._apart.work(0, "ghost", 7).flops == 2 * 8 * 7 * 15
    assert made._apart.work(0, "materialise", 7).flops == 2 * 15 * (7 + 8)
    assert batch_axes(asked.part.batch) == (0,)


def test_a_machine_is_measured_once_in_powers_of_two(monkeypatch):
    machine.cache_clear()
    first = machine(torch.device("cpu"), torch.float64)
    monkeypatch.setattr(machines, "timed", None)  # would fail if it were called again
    assert machine(torch.device("cpu"), torch.float64) is first
    for rate in (first.flops, first.traffic, first.call):
        assert np.frexp(rate)[0] == 0.5
    assert Machine(4.0, 2.0, 1.0).seconds(flops=8, traffic=8, calls=3) == 2 + 4 + 3
    assert timed(lambda: None, torch.device("cpu")) >= 0


def test_losses_that_take_another_way_for_some_examples_are_differentiated_directly():
    asked, state = Asked("linear"), {"calls": 0}
    plain = asked.losses

    def moody(parameters, batch):
        return (
            plain(parameters, batch)
            if state["calls"] == 0
            else plain(parameters, batch) + F.linear(parameters["0.weight"], parameters["0.weight"]).sum()
        )

    made = Products(moody, asked.layout, "layer", "ghost")
    made.prepare(asked.theta, asked.part)
    state["calls"] = 1
    a = normal(2, asked.layout.params, seed=4)
    gradient = torch.func.grad(lambda p: moody(p, asked.part.batch).sum())(asked.layout.split(asked.theta))
    ((_, dots),) = made(asked.theta, asked.part, a)
    algebra(dots.sum(-1), asked.layout.dots(a, torch.cat([g.flatten() for g in gradient.values()])), scale=1.0)


def test_points_of_losses_are_functions_of_one_example():
    asked = Asked("linear")
    made = Products(asked.losses, asked.layout, "none")
    one = Point(made._one, asked.theta).function(asked.layout.split(asked.theta), (asked.part.batch[0][2],))
    algebra(one, asked.losses(asked.layout.split(asked.theta), asked.part.batch)[2])


@pytest.mark.parametrize("route", ["materialise", "ghost", "jvp", "auto"])
@pytest.mark.parametrize("name", MODELS)
def test_the_gradient_of_the_batch_comes_with_its_products(name, route):
    asked = Asked(name)
    weights, total = torch.linspace(-1, 2, EXAMPLES, dtype=torch.float64), torch.ones(asked.layout.params, dtype=torch.float64)
    part = Part(asked.part.batch, asked.part.ids, weights)
    want = 1 + batch_gradient(asked.losses, asked.layout, asked.theta, (part,))
    entries = np.arange(EXAMPLES)
    made = Products(asked.losses, asked.layout, "layer", route, chunk=1000)
    list(made.credits(asked.theta, part, normal(2, asked.layout.params, seed=4), entries, total))
    algebra(total, want, scale=1.0)


@pytest.mark.parametrize("name", ["linear", "tied", "group norm"])
def test_the_gradient_of_the_batch_comes_with_those_of_its_groups(name, monkeypatch):
    monkeypatch.setattr(products, "CALLS", 0)
    asked = Asked(name)
    total, a, entries = torch.zeros(asked.layout.params, dtype=torch.float64), normal(2, asked.layout.params, seed=4), np.array([3, 1] * 3)
    made = Products(asked.losses, asked.layout, "layer", "auto", chunk=1)
    pieces = [(where, dots.clone()) for where, dots in made.credits(asked.theta, asked.part, a, entries, total)]
    algebra(total, batch_gradient(asked.losses, asked.layout, asked.theta, (asked.part,)), scale=1.0)
    assert [places.tolist() for places, _ in pieces] == [[1], [3]]
    whole = asked.slow(a) * asked.part.weights
    for places, credit in pieces:
        algebra(credit[..., 0], whole[..., torch.from_numpy(entries) == places[0]].sum(-1), scale=1.0)


@pytest.mark.parametrize("name", ["linear", "tied"])
def test_a_large_group_is_summed_first_beside_examples_of_their_own(name, monkeypatch):
    monkeypatch.setattr(products, "CALLS", 0)
    asked = Asked(name)
    total, a, entries = (
        torch.zeros(asked.layout.params, dtype=torch.float64),
        normal(2, asked.layout.params, seed=4),
        np.array([4, 7, 4, 4, 2, 4]),
    )
    made = Products(asked.losses, asked.layout, "layer", "auto")
    pieces = [(where, dots.clone()) for where, dots in made.credits(asked.theta, asked.part, a, entries, total)]
    assert [places.tolist() for places, _ in pieces] == [[4], [7, 2]]
    algebra(total, batch_gradient(asked.losses, asked.layout, asked.theta, (asked.part,)), scale=1.0)
    whole = asked.slow(a) * asked.part.weights
    for places, credit in pieces:
        for column, entry in enumerate(places):
            algebra(credit[..., column], whole[..., torch.from_numpy(entries) == entry].sum(-1), scale=1.0)


@torch.jit.script
def scripted(x: torch.Tensor, by: torch.Tensor):
    return x * by


class Invisible(nn.Module):
    """A parameter that is used where no call of torch is seen."""

    def __init__(self):
        super().__init__()
        self.into, self.by, self.out = nn.Linear(3, 5), nn.Parameter(torch.randn(5)), nn.Linear(5, 2)

    def forward(self, x):
        return self.out(scripted(torch.tanh(self.into(x)), self.by))


@pytest.mark.parametrize("scale", [1.0, 1e-6])
@pytest.mark.parametrize("silent", [0, 2])
def test_what_is_taken_apart_is_compared_on_its_own_scale_and_on_more_than_one_example(silent, scale, monkeypatch):
    monkeypatch.setitem(MODELS, "invisible", (Invisible, normal(EXAMPLES, 3, seed=2)))
    asked = Asked("invisible")
    plain = asked.losses

    def losses(p, batch):
        return scale * plain(p, batch) * (batch[0][:, 0] != first).to(torch.float64)

    first = asked.part.batch[0][silent, 0]
    made = Products(losses, asked.layout, "layer")
    a = normal(2, asked.layout.params, seed=4)
    found = torch.cat([dots for _, dots in made(asked.theta, asked.part, a)], -1)
    want = asked.slow(a) * scale
    want[..., silent] = 0.0
    algebra(found / scale, want / scale, scale=1.0)


def test_losses_in_float32_are_taken_as_they_are():
    asked = Asked("linear")
    plain, total = asked.losses, torch.zeros(asked.layout.params, dtype=torch.float64)
    made = Products(lambda p, batch: plain(p, batch).float(), asked.layout, "layer")
    a = normal(2, asked.layout.params, seed=4)
    rounding(torch.cat([dots for _, dots in made(asked.theta, asked.part, a, total)], -1), asked.slow(a), scale=1.0)
    rounding(batch_gradient(made.losses, asked.layout, asked.theta, (asked.part,)), total, scale=1.0)
