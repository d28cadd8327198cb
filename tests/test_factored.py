"""Gradients with linear maps as factors: the same numbers as differentiating directly, for every way to use a parameter."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, jacrev, vmap
from torch.nn import functional as F

from explaind.kernel.factored import Factored
from explaind.kernel.gradients import RowGradients
from explaind.kernel.layout import Layout
from explaind.kernel.points import Point
from explaind.store.manifest import Layer
from tests import closeness


class Net(nn.Module):
    """Two tokens in, three outputs; `forward` says how the parameters are used."""

    def __init__(self, forward):
        super().__init__()
        self.table = nn.Embedding(5, 4)
        self.first = nn.Linear(4, 6)
        self.second = nn.Linear(6, 3, bias=False)
        self.scale = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
        self.how = forward

    def forward(self, tokens):
        return self.how(self, tokens)


def plain(net, tokens):
    return net.second(torch.tanh(net.first(net.table(tokens))).sum(-2)) * net.scale


def twice(net, tokens):
    return net.second(torch.tanh(net.first(net.table(tokens))).prod(-2) + net.first(net.table(tokens.flip(-1)))[..., 0, :] ** 2)


def tied(net, tokens):
    hidden = net.table(tokens).sum(-2)
    return torch.cat([F.linear(hidden, net.table.weight)[..., :2], (hidden @ net.first.weight.T)[..., :1]], -1) + net.second(
        net.first(hidden)
    )


def nested(net, tokens):
    """A weight that is itself the input of a linear map."""
    return F.linear(net.first(net.table(tokens)).mean(-2), F.linear(net.second.weight, net.first.weight @ net.first.weight.T))


def padded(net, tokens):
    return plain(net, tokens) + F.embedding(tokens, net.table.weight, padding_idx=0).sum((-1, -2), keepdim=True)[..., 0]


def no_linear(net, tokens):
    return (net.scale * tokens.sum(-1, keepdim=True)).exp()


WAYS = (plain, twice, tied, nested, padded)
TOKENS = torch.tensor([[0, 1], [2, 2], [4, 0], [3, 1]])


def problem(forward):
    """(function of one row, layout, θ at two points)"""
    torch.manual_seed(0)
    net = Net(forward).double()
    offset, layers = 0, []
    for name, p in net.named_parameters():
        layers.append(Layer(name, tuple(p.shape), offset, p.numel(), 0))
        offset += p.numel()
    theta = torch.cat([p.detach().flatten() for p in net.parameters()])

    def single(parameters, tokens):
        return functional_call(net, dict(parameters), (tokens.unsqueeze(0),))[0]

    return single, Layout(layers), [Point(single, theta, 0.25), Point(single, theta + 0.1 * torch.randn_like(theta), 0.75)]


def direct(layout, points):
    total = 0
    for point in points:
        parts = vmap(jacrev(point.function), (None, 0))(layout.split(point.theta), TOKENS)
        total = total + point.weight * torch.cat([parts[name].flatten(2) for name in layout.names], 2).flatten(0, 1)
    return total


@pytest.mark.parametrize("chunk", [1, 1 << 20], ids=["row by row", "all at once"])
@pytest.mark.parametrize("few", [0, 4], ids=["matrix products", "outer products"])
@pytest.mark.parametrize("forward", WAYS)
def test_factors_give_the_gradients_of_plain_differentiation(forward, few, chunk, monkeypatch):
    monkeypatch.setattr("explaind.kernel.factored.FEW", few)
    single, layout, points = problem(forward)
    into = torch.ones(12, layout.params, dtype=torch.float64)
    Factored(single, layout, layout.split(points[0].theta), TOKENS[0]).add(into, points, TOKENS, 0)
    closeness.algebra(into - 1, direct(layout, points), scale=1.0)
    gradients = RowGradients(points[0], 3, layout, TOKENS, chunk)
    into = torch.ones(12, layout.params, dtype=torch.float64)
    gradients.add(into, points, TOKENS, 4)
    closeness.algebra(into - 1, direct(layout, points), scale=1.0)


def test_what_is_taken_apart_and_what_is_not():
    single, layout, points = problem(tied)
    found = Factored(single, layout, layout.split(points[0].theta), TOKENS[0])
    assert [site.weight for site in found.sites] == ["table.weight", "table.weight", "first.weight", "second.weight"]
    assert found._rest == {"first.weight"}
    single, layout, points = problem(no_linear)
    assert RowGradients(points[0], 3, layout, TOKENS)._factored is None


def test_a_function_that_changes_its_calls_is_differentiated_directly():
    state = {"forward": plain}
    _, layout, points = problem(lambda net, tokens: state["forward"](net, tokens))
    gradients = RowGradients(points[0], 3, layout, TOKENS)
    assert gradients._factored is not None
    for forward in (plain, twice, tied, no_linear, plain):
        state["forward"] = forward
        into = torch.zeros(12, layout.params, dtype=torch.float64)
        gradients.add(into, points, TOKENS, 4)
        closeness.algebra(into, direct(layout, points), scale=1.0)
