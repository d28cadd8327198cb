"""Buffers that a forward pass moves: recorded, replayed from where they stood, and a row of their own, however they are moved."""

import numpy as np
import pytest
import torch
from torch import nn

import explaind
from explaind.errors import RecordError
from tests import cases
from tests.closeness import same


class Average(nn.Module):
    """A running mean of its hidden layer, which it subtracts."""

    def __init__(self):
        super().__init__()
        self.a, self.o = nn.Linear(3, 4), nn.Linear(4, 2)
        self.register_buffer("mean", torch.zeros(4))

    def move(self, hidden):
        with torch.no_grad():
            self.mean.mul_(0.9).add_(0.1 * hidden.mean(0))

    def forward(self, x):
        hidden = self.a(x).tanh()
        if self.training:
            self.move(hidden)
        return self.o(hidden - self.mean)


class Always(Average):
    """In eval mode too, and after the mean was used: in train mode in a way that a gradient to it could not go back through."""

    def forward(self, x):
        hidden = self.a(x).tanh()
        out = self.o(hidden - (self.mean.pow(2) if self.training else self.mean))
        self.move(hidden.detach())
        return out


class Assigned(Average):
    """Another tensor every time."""

    def move(self, hidden):
        self.mean = 0.9 * self.mean + 0.1 * hidden.detach().mean(0)


class Counted(nn.Module):
    """Counts its forward passes, and learns less and less."""

    def __init__(self, kind=torch.int64):
        super().__init__()
        self.a = nn.Linear(3, 2)
        self.register_buffer("calls", torch.zeros((), dtype=kind))

    def forward(self, x):
        if self.training:
            self.calls += 1
        return self.a(x) / (1 + 0.1 * self.calls)


def spectral(norm):
    """Its vectors warmed up, since from random ones a straight line may cross a singular value of 0."""
    model = nn.Sequential(norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2)).double()
    for _ in range(20):
        model(cases.QUERIES)
    return model


NETWORKS = {
    "a running mean": lambda: Average().double(),
    "in eval mode too": lambda: Always().double(),
    "assigned": lambda: Assigned().double(),
    "a counter": lambda: Counted(torch.float64).double(),
    "spectral_norm": lambda: spectral(nn.utils.parametrizations.spectral_norm),
    "spectral_norm by a hook": lambda: spectral(nn.utils.spectral_norm),
}


def made(name):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return NETWORKS[name]()


def recorded(path, model, trains=lambda step: True, watch=("*",)):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with explaind.record(optimizer, model, path, watch=watch) as recorder:
        for step in range(5):
            model.train(trains(step))
            ids = torch.arange(4) + step % 4
            recorder.examples(ids)
            optimizer.zero_grad()
            cases.losses(model, cases.DATA[ids]).mean().backward()
            optimizer.step()
    return explaind.open(path)


@pytest.mark.parametrize("name", NETWORKS)
def test_their_row_closes_the_sum(name, tmp_path):
    model = made(name)
    run = recorded(tmp_path / "run", model, trains=lambda step: step != 2)
    asked = {"data": cases.DATA, "losses": cases.losses, "queries": cases.QUERIES, "measure": cases.measure}
    ledger = explaind.decompose(run, model, keep=("query", "output", "example", "layer", "step"), **asked)  # the trained model itself
    verdict = ledger.verify()
    assert verdict.ok, verdict.reasons
    assert verdict.maxima["arithmetic_share"] <= 1e-10
    layers = [str(layer) for layer in ledger.coords["layer"]]
    moved = {layers[i] for i in np.flatnonzero(np.abs(ledger["buffers"]).sum(axis=(0, 1, 3)))}
    assert moved == {layer.name for layer in run.manifest.layers if layer.optimizer < 0}
    assert explaind.doctor(run, made(name), keep=("query", "example"), **asked).ok


def test_a_buffer_that_is_assigned_is_recorded_as_one_that_is_moved(tmp_path):
    runs = [recorded(tmp_path / name, made(name)) for name in ("a running mean", "assigned")]
    assert np.abs(runs[0].theta(5)["mean"]).max() > 0
    same(runs[0].theta(5)["mean"], runs[1].theta(5)["mean"])
    with pytest.raises(RecordError, match=r"moved.*before step 0: mean.*watch=\['mean'\]"):
        recorded(tmp_path / "unwatched", made("assigned"), watch=())


def test_a_counter_of_integers_is_refused_with_a_way_out(tmp_path):
    for watch in ((), ("calls",)):
        with pytest.raises(RecordError, match=r"moved.*calls.*torch.int64 cannot be recorded.*floating point") as caught:
            recorded(tmp_path / f"{len(watch)}", Counted().double(), watch=watch)
        assert "\n" not in str(caught.value)
