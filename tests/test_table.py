"""The table: every optimizer setting × four kinds of network × two precisions of training, each row checked in the same five ways."""

import inspect

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import explaind
from explaind.rules import REFUSED, RULES, rule_of
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
    "pairs of tokens": torch.arange(12).reshape(6, 2) % TOKENS,
}
NETWORKS = {
    "mlp": (cases.mlp, "numbers"),
    "cnn": (convolutional, "images"),
    "transformer": (Attention, "tokens"),
    "rnn": (Recurrent, "pairs of tokens"),
}


def made(network, dtype):
    make, kind = NETWORKS[network]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = make().to(dtype)
    inputs = INPUTS[kind]
    data = TensorDataset(inputs.to(dtype) if inputs.is_floating_point() else inputs, torch.tensor([0, 1, 1, 0, 1, 0]))
    return model, data


def trained(make, network, dtype, path=None, schedule=None):
    """The optimizer's parameters after every step, and the run. make: parameters -> optimizers"""
    model, data = made(network, dtype)
    optimizers = make(list(model.parameters()))
    scheduler = schedule(optimizers[0]) if schedule else None
    recorder = None if path is None else explaind.record(optimizers, model, path)
    states = []
    for parts in STEPS:
        model.zero_grad()
        for ids in parts:
            if recorder is not None:
                recorder.examples(list(ids))
            x, y = data[list(ids)]
            F.cross_entropy(model(x), y).backward()
        for optimizer in optimizers:
            optimizer.step()
        if scheduler is not None:
            scheduler.step()
        states.append(nn.utils.parameters_to_vector(model.parameters()).detach().clone())
    if recorder is not None:
        recorder.close()
    return states


def undisturbed(make, network, dtype, path, schedule=None):
    """The run of a training that is bitwise the one without a recorder."""
    alone = trained(make, network, dtype, None, schedule)
    watched = trained(make, network, dtype, path, schedule)
    for step, (want, got) in enumerate(zip(alone, watched, strict=True)):
        same(got, want, f"parameters after step {step}")
    return explaind.open(path)


def explained(run, network, products, rule):
    model, data = made(network, torch.float64)
    return explaind.decompose(
        run,
        model,
        data=data,
        losses=lambda m, batch: F.cross_entropy(m(batch[0]), batch[1], reduction="none"),
        queries=torch.utils.data.default_collate([data[5]]),
        measure=lambda m, batch: -m(batch[0]).diff(),  # [query, 1]: every other one costs the jvp a pass for each layer
        keep=("query", "output", "example", "layer"),
        rule=rule,
        products=products,
    )


def ledgers(run, network, dtype, rule="midpoint:1"):
    """The ledger, and the same by other products. What the path rule misses is a row of its own: one node will do for the sum."""
    ways = ("jvp", "auto") if network == "rnn" else ("materialise", "ghost", "jvp")
    return [explained(run, network, way, rule) for way in ways[: 2 if dtype == torch.float32 else 3]]  # the kernel's work is the same


def closes(one, others, arithmetic):
    """The ledger of a row of the table, its rounding in shares of the movement, and its products beside the others."""
    found = one.verify().maxima
    assert found["closure"] <= 1e-9 * found["movement"]
    assert found["arithmetic"] <= arithmetic * found["movement"], found
    for other in others:
        assert np.abs(other["data"] - one["data"]).max() <= 1e-10 * found["movement"]
    return found


every_precision = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
every_network = pytest.mark.parametrize("network", NETWORKS)


@every_precision
@every_network
@cases.every_optimizer
def test_every_optimizer_on_every_network(case, network, dtype, tmp_path):
    run = undisturbed(lambda params: [case.make(params)], network, dtype, tmp_path / "run", case.schedule)
    one, *others = ledgers(run, network, dtype)
    closes(one, others, 1e-9 if dtype == torch.float64 else 1e-4)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
@pytest.mark.parametrize(
    ("dtype", "rounds"),
    [(torch.float32, True), (torch.float64, True), (torch.float64, False)],
    ids=["float32", "float64", "float64, exact inside"],
)
@every_network
@pytest.mark.parametrize("options", [options for _, options in cases.MUONS], ids=[name for name, _ in cases.MUONS])
def test_muon_on_every_network(options, network, dtype, rounds, tmp_path, monkeypatch):
    """In torch its iterations run in bfloat16, whose rounding is arithmetic, known to the replay; without it the row is like all others."""

    def make(params):
        matrices = [p for p in params if p.ndim == 2]
        return [torch.optim.Muon(matrices, **{"lr": 0.02, **options}), torch.optim.AdamW([p for p in params if p.ndim != 2], lr=0.03)]

    if not rounds:
        monkeypatch.setattr(torch.Tensor, "bfloat16", lambda values: values.double().clone())
    run = undisturbed(make, network, dtype, tmp_path / "run")
    one, *others = ledgers(run, network, dtype, "gauss:6")  # of which verify looks at what is explained, too
    found = closes(one, others, 0.02 if rounds else 1e-9)
    assert found["replay_error"] <= (1e-9 if dtype == torch.float64 else 1e-3)  # float32 is magnified where the momentum is of low rank
    assert (found["arithmetic"] > 1e-5 * found["movement"]) == rounds
    assert one.verify().ok, one.verify().reasons


def of_torch():
    """Every optimizer class of this torch."""
    return [
        k
        for k in vars(torch.optim).values()
        if isinstance(k, type) and issubclass(k, torch.optim.Optimizer) and k is not torch.optim.Optimizer
    ]


def test_the_table_has_every_optimizer_of_torch_that_is_not_refused():
    params = [torch.zeros(shape, requires_grad=True) for shape in ((2, 2), (2,), (1,))]
    covered = {rule_of(case.make(params)).optimizer.__name__ for case in cases.OPTIMIZERS} | ({"Muon"} & RULES.keys())
    assert {kind.__name__ for kind in of_torch()} == (covered - {"Lion"}) | (REFUSED.keys() & vars(torch.optim).keys())


REFUSED_OPTIONS, ON_ACCELERATORS = {"differentiable"}, {"capturable"}
"""The latter: tests/test_rules.py."""


@pytest.mark.parametrize("kind", [kind for kind in of_torch() if kind.__name__ not in REFUSED])
def test_every_option_of_every_optimizer_is_in_the_table(kind):
    """Set to another value than torch's in some row; one that a later torch brings fails here until somebody has thought of it."""
    params = [torch.zeros(2, 2, requires_grad=True) for _ in range(4)]
    rows = (
        [kind(params, **options) for _, options in cases.MUONS] if kind.__name__ == "Muon" else [c.make(params) for c in cases.OPTIMIZERS]
    )
    groups = [group for optimizer in rows if type(optimizer) is kind for group in optimizer.param_groups]
    standard, missing = kind(params).param_groups[0], []
    for option in inspect.signature(kind).parameters.keys() - {"params"} - REFUSED_OPTIONS - ON_ACCELERATORS:
        name = option if option in standard else None
        if name is None or all(str(group[name]) == str(standard[name]) for group in groups):
            missing.append(option)
    assert missing == [], kind
