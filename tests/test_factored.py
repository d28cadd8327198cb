"""Gradients with linear maps as factors: the same numbers as differentiating directly, for every way to use a parameter."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, jacrev, vmap
from torch.nn import functional as F

from explaind.kernel import gradients as gradients_of
from explaind.kernel.factored import Factored
from explaind.kernel.gradients import RowGradients, one
from explaind.kernel.gradients import direct as plain_direct
from explaind.kernel.layout import Layout
from explaind.kernel.measures import Measures
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


def kinked(net, tokens):
    return net.second(F.prelu(net.first(net.table(tokens)).sum(-2), net.scale[:1] / 9))


def far(net, tokens):
    return torch.cdist(net.table(tokens).sum(-2)[:, None], net.first.weight[:3].expand(len(tokens), 3, 4))[:, 0]


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


@pytest.mark.parametrize("rows", [3, 4])
@pytest.mark.parametrize("forward", [kinked, far])
def test_a_transform_that_torch_has_wrong_is_not_taken(forward, rows):
    """The second of two nested vmaps (prelu, cdist), which raises or, with as many rows as outputs, may give other numbers."""
    single, layout, points = problem(forward)
    gradients = RowGradients(points[0], 3, layout, TOKENS[:rows])
    into = torch.zeros(3 * rows, layout.params, dtype=torch.float64)
    gradients.add(into, points, TOKENS[:rows], rows)
    want = torch.zeros_like(into)
    for point in points:
        leaves = {name: t.detach().requires_grad_() for name, t in layout.split(point.theta).items()}
        values = torch.cat([single(leaves, tokens) for tokens in TOKENS[:rows]])
        for row, value in zip(want, values, strict=True):
            found = torch.autograd.grad(value, list(leaves.values()), retain_graph=True, allow_unused=True)
            row += point.weight * torch.cat(
                [torch.zeros(size) if g is None else g.flatten() for size, g in zip(layout.sizes, found, strict=True)]
            )
    closeness.algebra(into, want, scale=1.0)


def test_rows_are_taken_as_many_at_a_time_as_their_activations_have_room(monkeypatch):
    """Of which a small convolution on a large image has many more than parameters."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)).double()
    offsets = torch.tensor([0, *(p.numel() for p in net.parameters())]).cumsum(0).tolist()
    layout = Layout([Layer(n, tuple(p.shape), at, p.numel(), 0) for (n, p), at in zip(net.named_parameters(), offsets[:-1], strict=True)])
    theta, images = torch.cat([p.detach().flatten() for p in net.parameters()]), torch.randn(6, 1, 40, 40, dtype=torch.float64)

    def function(parameters, batch):
        return functional_call(net, dict(parameters), (batch,))

    activations = 4 * 40 * 40  # of the convolution, and as many of its tanh
    alone = 2 * (layout.params + 3 * activations) + 2 * activations + 40 * 40
    seen, found = [], []
    monkeypatch.setattr(gradients_of, "direct", lambda into, *rest: (seen.append(len(rest[-1])), plain_direct(into, *rest)))
    for chunk in (1 << 30, 3 * 8 * alone, 1):
        made = RowGradients(Point(one(function), theta), 2, layout, images, chunk)
        made._factored = None
        made._way, seen[:] = gradients_of.direct, []
        into = torch.zeros(12, layout.params, dtype=torch.float64)
        made.add(into, [Point(one(function), theta)], images, 6)
        found.append((into, list(seen)))
    assert [counts for _, counts in found[::2]] == [[6], [1] * 6]
    assert 2 <= found[1][1][0] <= 3, "what three rows take is not far from what they are said to"
    for into, _ in found[1:]:
        closeness.algebra(into, found[0][0], scale=1.0)
    measures = [
        Measures(function, images, layout, frozenset({"query", "output"}), theta, chunk) for chunk in (1 << 30, 3 * 8 * activations, 1)
    ]
    calls = [[len(some) for some in made._some(1)] for made in measures]
    assert calls[0] == [6]
    assert calls[2] == [1] * 6
    step = 0.1 * torch.randn(3, layout.params, dtype=torch.float64)
    for made in measures[1:]:
        for way in (
            lambda m: m.values(theta),
            lambda m: m.slopes(theta, step[0]),
            lambda m: m.secants(theta, theta + step[0], step),
            lambda m: m.secants(theta, theta + step[0], step, 2),
        ):
            closeness.algebra(way(made), way(measures[0]), scale=1.0)


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
