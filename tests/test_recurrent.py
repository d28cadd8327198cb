"""Recurrent layers under transforms: the numbers and gradients of torch's own."""

import pytest
import torch
from torch import nn
from torch.func import vmap

from explaind.kernel.gradients import RowGradients, one, separable
from explaind.kernel.layout import Layout
from explaind.kernel.points import Point
from explaind.replay.functional import Functional
from explaind.store.manifest import Layer
from tests import cases
from tests.cases import normal
from tests.closeness import algebra

KINDS = {
    "rnn": lambda: nn.RNN(3, 4, batch_first=True),
    "relu": lambda: nn.RNN(3, 4, nonlinearity="relu", batch_first=True),
    "lstm": lambda: nn.LSTM(3, 4, batch_first=True),
    "lstm, both ways, two layers, projected": lambda: nn.LSTM(3, 4, 2, bidirectional=True, proj_size=2, batch_first=True),
    "gru, both ways, two layers, no bias": lambda: nn.GRU(3, 4, 2, bias=False, bidirectional=True, batch_first=True),
    "time first": lambda: nn.GRU(3, 4),
    "dropout": lambda: nn.LSTM(3, 4, 2, dropout=0.5, batch_first=True),
}
X = normal(5, 6, 3, seed=1)


class Model(nn.Module):
    """All that a layer gives: outputs and last states."""

    def __init__(self, kind):
        super().__init__()
        self.layer, self.begin = KINDS[kind](), nn.Linear(3, 1)

    def forward(self, x):
        x = x * self.begin(x).tanh()
        out, ends = self.layer(x if self.layer.batch_first else x.transpose(0, 1))
        out = out if self.layer.batch_first else out.transpose(0, 1)
        return torch.cat([out.mean(1), *(t.square().sum(0) for t in (ends if isinstance(ends, tuple) else (ends,)))], -1)


def called(kind, train=False):
    torch.manual_seed(0)
    model = Model(kind)
    function = Functional(model, lambda m, x: m(x), torch.device("cpu"), torch.float64)
    function.set_mode([train] * len(list(model.modules())))
    parameters = {name: p.detach().double() for name, p in model.named_parameters()}
    offset, layers = 0, []
    for name, p in parameters.items():
        layers.append(Layer(name, tuple(p.shape), offset, p.numel(), 0))
        offset += p.numel()
    return function, parameters, Layout(layers)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_those_of_the_whole_batch(kind):
    function, parameters, layout = called(kind)
    algebra(vmap(one(function), (None, 0))(parameters, X), function(parameters, X), scale=1.0)
    assert separable(function, parameters, X)
    theta = torch.cat([p.flatten() for p in parameters.values()])
    outputs = function(parameters, X).shape[1]
    point = Point(one(function), theta)
    found = torch.zeros(5 * outputs, layout.params, dtype=torch.float64)
    RowGradients(point, outputs, layout, X).add(found, [point], X, 5)
    leaves = {name: p.clone().requires_grad_() for name, p in parameters.items()}
    for row, value in zip(found, function(leaves, X).flatten(), strict=True):
        grads = torch.autograd.grad(value, list(leaves.values()), retain_graph=True, allow_unused=True)
        want = torch.cat([torch.zeros(n) if g is None else g.flatten() for g, n in zip(grads, layout.sizes, strict=True)])
        algebra(row, want, scale=1.0)


def test_dropout_between_layers_is_left_to_torch():
    function, parameters, _ = called("dropout", train=True)
    with pytest.raises(RuntimeError):
        vmap(one(function), (None, 0), randomness="different")(parameters, X)


@pytest.mark.parametrize("products", ["materialise", "ghost"])
def test_a_recurrent_network_is_decomposed_query_by_query_and_example_by_example(products, tmp_path):
    """In shards too."""

    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell, self.out = nn.GRU(1, 3, batch_first=True), nn.Linear(3, 2)

        def forward(self, x):
            return self.out(self.cell(x[..., None])[0][:, -1])

    problem = cases.Problem("gru", Small)
    run = cases.recorded(tmp_path / "run", problem)
    want = cases.decomposed(run, problem, products="jvp")
    got = cases.decomposed(run, problem, products=products)
    for name, row in want.rows.items():
        algebra(torch.as_tensor(got.rows[name].values), torch.as_tensor(row.values), scale=1.0)
    parts = [cases.decomposed(run, problem, products=products, shard=f"{i}/2", save=tmp_path / "ledger") for i in range(2)]
    assert sum(len(part.coords["query"]) for part in parts) == len(want.coords["query"])
