"""The secant rule on recorded trainings: it closes on every step, and k parts converge to the path integral like 1/k²."""

from functools import cache

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import explaind
from tests.cases import normal

EXAMPLES, STEPS = 12, 5


class Gpt(nn.Module):
    """One block of a causal transformer with GELU and layer norm."""

    def __init__(self):
        super().__init__()
        self.table, self.places = nn.Embedding(7, 8), nn.Parameter(torch.randn(5, 8))
        self.before, self.mix, self.back = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8)
        self.middle, self.mlp = nn.LayerNorm(8), nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        self.after, self.head = nn.LayerNorm(8), nn.Linear(8, 7, bias=False)

    def forward(self, tokens):
        x = self.table(tokens) + self.places
        q, k, v = self.mix(self.before(x)).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        x = x + self.back(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return self.head(self.after(x + self.mlp(self.middle(x))))[:, -1]


class Lstm(nn.Module):
    def __init__(self):
        super().__init__()
        self.cells, self.head = nn.LSTM(3, 6, batch_first=True), nn.Linear(6, 4)

    def forward(self, x):
        return self.head(self.cells(x)[0][:, -1])


class Pair(nn.Module):
    """Two encoders into one space."""

    def __init__(self):
        super().__init__()
        self.image, self.text = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)), nn.Sequential(nn.Linear(5, 8), nn.GELU())
        self.project, self.scale = nn.Linear(8, 4), nn.Parameter(torch.tensor(1.0))

    def forward(self, both):
        image, text = self.image(both[:, :6]), self.project(self.text(both[:, 6:]))
        return F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T * self.scale.exp()


def classes(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def logits(model, batch):
    return model(batch[0])


def contrastive(model, batch):
    scores = model(batch[0])
    own = torch.arange(len(scores))
    return (F.cross_entropy(scores, own, reduction="none") + F.cross_entropy(scores.T, own, reduction="none")) / 2


def margin(model, batch):
    return logits(model, batch)[:, 0] - logits(model, batch)[:, 1:].amax(-1)


LABELS = torch.arange(EXAMPLES) % 3
IMAGES = normal(EXAMPLES, 1, 8, 8, seed=1)
# name: (model, inputs, losses, measure)
TRAININGS = {
    "ReLU MLP": (
        lambda: nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)),
        normal(EXAMPLES, 6, seed=1),
        classes,
        margin,
    ),
    "convolutions with max-pool": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 2), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)
        ),
        IMAGES,
        classes,
        logits,
    ),
    "GPT": (Gpt, torch.arange(EXAMPLES * 5).reshape(EXAMPLES, 5) * 3 % 7, classes, logits),
    "LSTM": (Lstm, normal(EXAMPLES, 4, 3, seed=1), classes, logits),
    "CLIP": (Pair, normal(EXAMPLES, 11, seed=1), contrastive, contrastive),
}


@pytest.fixture(scope="module", params=TRAININGS)
def training(request, tmp_path_factory):
    """A function of the rule that gives the ledger of a recorded training in float64."""
    make, inputs, losses, measure = TRAININGS[request.param]
    torch.manual_seed(0)
    model = make().double()
    data = [(x, y) for x, y in zip(inputs, LABELS, strict=True)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    path = tmp_path_factory.mktemp("run") / "run"
    with explaind.record(optimizer, model, path) as recorder:
        for step in range(STEPS):
            ids = (torch.arange(8) + 4 * step) % EXAMPLES
            recorder.examples(ids)
            optimizer.zero_grad()
            losses(model, (inputs[ids], LABELS[ids])).mean().backward()
            optimizer.step()

    @cache
    def decomposed(rule, **asked):
        asked = {"keep": ("query", "output", "layer", "step") if measure is logits else ("query", "layer", "step"), **asked}
        return explaind.decompose(
            explaind.open(path), model, data=data, losses=losses, queries=(inputs[:4], LABELS[:4]), measure=measure, rule=rule, **asked
        )

    return decomposed


@pytest.mark.parametrize("rule", ["secant", "secant:3"])
def test_the_secant_closes_every_step_of_a_training(training, rule):
    ledger = training(rule)
    movement = ledger.checks.by_step[:, 0]
    assert np.all(movement > 0)
    assert np.all(ledger.checks.by_step[:, 1] <= 1e-10 * movement)
    check = ledger.verify()
    assert check.ok, check.reasons
    assert set(ledger.checks.recipes[:, 0]) == {rule if ":" in rule else "secant:1"}


def by_layer(ledger):
    return ledger["data"] + ledger["decay"]


def test_parts_converge_to_the_path_integral(training):
    exact = by_layer(training("secant:32"))

    def miss(rule):
        return np.sqrt(np.mean((by_layer(training(rule)) - exact) ** 2))

    misses = [miss(f"secant:{k}") for k in (1, 2, 4, 8)]
    falls = np.array(misses[:-1]) / np.array(misses[1:])
    assert falls.mean() >= 3  # four times at each doubling, with kinks only on average
    assert misses[-1] < misses[0] / 30
    assert miss("gauss:16") < misses[0]  # kinks slow the quadrature, the limit is the same


def test_the_rule_that_chooses_meets_its_tolerance(training):
    exact = training("secant:32")
    scale = np.abs(exact["data"] + exact["decay"]).sum(exact.rows["data"].dims.index("layer")).max()
    for tol in (1e-2, 1e-4):
        ledger = training("auto", tol=tol)
        assert np.abs(by_layer(ledger) - by_layer(exact)).max() <= 3 * tol * scale
        assert np.all(ledger.checks.path <= 2 * tol * ledger.checks.movement)
        assert ledger.settings["rule_note"] == ""
