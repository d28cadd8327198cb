"""The table: every optimizer setting × four kinds of network × two precisions of training, each row checked in the same five ways."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import explaind
from explaind.rules import rule_of
from tests import cases
from tests.closeness import same

STEPS = (((0, 1, 2),), ((3,), (1, 4)), ((5, 0),))
TOKENS, WIDTH = 5, 4


class Attention(nn.Module):
    """Embedding, causal attention, layer norm, GELU: [batch, time] -> [batch, 2]"""

    def __init__(self):
        super().__init__()
        self.embed, self.qkv, self.norm = nn.Embedding(TOKENS, WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.LayerNorm(WIDTH)
        self.up, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2, bias=False)

    def forward(self, tokens):
        x = self.embed(tokens)
        x = x + F.scaled_dot_product_attention(*self.qkv(x).chunk(3, -1), is_causal=True)
        return self.out(F.gelu(self.up(self.norm(x))))[:, -1]


class Recurrent(nn.Module):
    """Embedding and GRU: [batch, time] -> [batch, 2]"""

    def __init__(self):
        super().__init__()
        self.embed, self.rnn, self.out = nn.Embedding(TOKENS, 3), nn.GRU(3, 3, batch_first=True), nn.Linear(3, 2)

    def forward(self, tokens):
        return self.out(self.rnn(self.embed(tokens))[0][:, -1])


def convolutional():
    return nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(8, 2))


INPUTS = {
    "numbers": cases.normal(6, 3, seed=5),
    "images": cases.normal(6, 1, 4, 4, seed=6),
    "tokens": torch.arange(18).reshape(6, 3) % TOKENS,
}
NETWORKS = {
    "mlp": (cases.mlp, "numbers"),
    "cnn": (convolutional, "images"),
    "transformer": (Attention, "tokens"),
    "rnn": (Recurrent, "tokens"),
}


def made(network, dtype):
    make, kind = NETWORKS[network]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = make().to(dtype)
    inputs = INPUTS[kind]
    data = TensorDataset(inputs.to(dtype) if inputs.is_floating_point() else inputs, torch.tensor([0, 1, 1, 0, 1, 0]))
    return model, data


def trained(case, network, dtype, path=None):
    """The optimizer's parameters after every step, and the run."""
    model, data = made(network, dtype)
    optimizer = case.make(list(model.parameters()))
    scheduler = case.schedule(optimizer) if case.schedule else None
    recorder = None if path is None else explaind.record(optimizer, model, path)
    states = []
    for parts in STEPS:
        optimizer.zero_grad()
        for ids in parts:
            if recorder is not None:
                recorder.examples(list(ids))
            x, y = data[list(ids)]
            F.cross_entropy(model(x), y).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        states.append(nn.utils.parameters_to_vector(model.parameters()).detach().clone())
    if recorder is not None:
        recorder.close()
    return states


def explained(run, network, products):
    model, data = made(network, torch.float64)
    return explaind.decompose(
        run,
        model,
        data=data,
        losses=lambda m, batch: F.cross_entropy(m(batch[0]), batch[1], reduction="none"),
        queries=torch.utils.data.default_collate([data[5]]),
        measure=lambda m, batch: m(batch[0]),
        keep=("query", "output", "example", "layer"),
        rule="gauss:6",
        products=products,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("network", NETWORKS)
@cases.every_optimizer
def test_every_optimizer_on_every_network(case, network, dtype, tmp_path):
    alone = trained(case, network, dtype)
    watched = trained(case, network, dtype, tmp_path / "run")
    for step, (want, got) in enumerate(zip(alone, watched, strict=True)):
        same(got, want, f"parameters after step {step}")
    run = explaind.open(tmp_path / "run")
    ways = ("jvp", "auto") if network == "rnn" else ("materialise", "ghost", "jvp")
    one, *others = [explained(run, network, way) for way in ways[: 1 if dtype == torch.float32 else 3]]  # the kernel's work is the same
    found = one.verify().maxima
    assert found["closure"] <= 1e-9 * found["movement"]
    assert found["arithmetic"] <= (1e-9 if dtype == torch.float64 else 1e-4) * found["movement"], found
    for other in others:
        assert np.abs(other["data"] - one["data"]).max() <= 1e-10 * found["movement"]


def test_the_table_has_every_optimizer_of_torch_that_is_not_refused():
    params = [torch.zeros(shape, requires_grad=True) for shape in ((2, 2), (2,), (1,))]
    covered = {rule_of(case.make(params)).optimizer for case in cases.OPTIMIZERS}
    want = {kind for kind in vars(torch.optim).values() if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)}
    left = {kind.__name__ for kind in want - covered}
    assert left <= {"Optimizer", "LBFGS", "SparseAdam", "Muon"}  # Muon takes matrices alone: tests/test_loops.py
