"""Trainings whose examples depend on each other: a contrastive loss, where credit belongs to a pair."""

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import explaind
from explaind.kernel.layout import Layout
from explaind.kernel.products import Products
from explaind.kernel.whole import batch_gradient
from explaind.replay.functional import Functional
from explaind.replay.steps import Part
from explaind.store.manifest import Layer
from tests import cases, reference
from tests.closeness import algebra
from tests.test_ledger import check_against_reference

CONCEPTS, PIXELS, WORDS = 12, 16, 10


class Encoders(nn.Module):
    """Images [batch, pixel] and captions [batch, word] into one space, with a learned temperature: CLIP in small."""

    def __init__(self):
        super().__init__()
        self.image = nn.Sequential(nn.Linear(PIXELS, 24), nn.GELU(), nn.Linear(24, 8, bias=False))
        self.text = nn.Sequential(nn.Linear(WORDS, 24), nn.GELU(), nn.Linear(24, 8, bias=False))
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, images, captions):
        one, two = F.normalize(self.image(images), dim=-1), F.normalize(self.text(captions), dim=-1)
        return self.scale.exp() * one @ two.T  # [image, caption]


def losses(model, batch):
    """Both directions: each pair against all others of the batch."""
    logits, own = model(batch[0], batch[1]), torch.arange(len(batch[0]))
    return (F.cross_entropy(logits, own, reduction="none") + F.cross_entropy(logits.T, own, reduction="none")) / 2


def pairs(count, seed, swapped=0.0):
    """Noisy images and captions of concepts; a share of the pairs has passed its captions round. (data, who has another concept's now)"""
    g = torch.Generator().manual_seed(seed)
    looks, says = (torch.randn(CONCEPTS, n, generator=torch.Generator().manual_seed(7 + n), dtype=cases.DTYPE) for n in (PIXELS, WORDS))
    concept = torch.randint(CONCEPTS, (count,), generator=g)

    def noisy(x):
        return x + 0.3 * torch.randn(x.shape, generator=g, dtype=x.dtype)

    images, captions = noisy(looks[concept]), noisy(says[concept])
    some = torch.randperm(count, generator=g)[: round(swapped * count)]
    said = concept.index_copy(0, some, concept[some.roll(1)])
    return TensorDataset(images, captions.index_copy(0, some, captions[some.roll(1)])), (said != concept).numpy()


def network():
    torch.manual_seed(0)
    return Encoders().to(cases.DTYPE)


def train(path, data, steps, size=32):
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    order = torch.Generator().manual_seed(1)
    with explaind.record(optimizer, model, path, data=data) as recorder:
        for _ in range(steps):
            ids = torch.randperm(len(data), generator=order)[:size]
            recorder.examples(ids)
            optimizer.zero_grad()
            losses(model, data[ids]).mean().backward()
            optimizer.step()
    return explaind.open(path)


@pytest.mark.parametrize("route", ["auto", "jvp"])
def test_credits_of_pairs_sum_to_the_credit_of_the_batch(route):
    model, (data, _) = network(), pairs(20, 0)
    layers, offset = [], 0
    for name, p in model.named_parameters():
        layers.append(Layer(name, tuple(p.shape), offset, p.numel()))
        offset += p.numel()
    layout = Layout(layers)
    theta = torch.cat([p.detach().flatten() for p in model.parameters()])
    function = Functional(model, losses, torch.device("cpu"), cases.DTYPE)
    part = Part(data[:], np.arange(20), torch.full((20,), 1 / 20, dtype=cases.DTYPE))
    a = cases.normal(3, offset, seed=3)
    whole = batch_gradient(function, layout, theta, (part,))
    total = torch.zeros_like(theta)
    products = Products(function, layout, "layer", route)
    summed = sum((dots * part.weights[span]).sum(-1) for span, dots in products(theta, part, a, total))
    algebra(summed, layout.dots(a, whole), "credit of the batch")
    algebra(total, whole, "gradient on the way")


def test_swapped_captions_are_found_by_their_credit(tmp_path):
    """A pair whose credit raises the loss of held-out pairs is a suspect."""
    data, wrong = pairs(160, 0, swapped=0.05)
    held_out, _ = pairs(64, 99)
    ledger = explaind.decompose(
        train(tmp_path / "run", data, 120),
        network(),
        data=data,
        losses=losses,
        queries=held_out[:],
        measure=losses,
        keep=("example",),
        rule="secant",
    )
    verdict = ledger.verify()
    assert verdict.ok, verdict.reasons
    assert verdict.maxima["path_share"] <= 1e-10
    score = ledger["data"]
    auc = (score[wrong][:, None] > score[~wrong]).mean()
    assert wrong.sum() >= 5
    assert auc > 0.8, auc


class Table(nn.Module):
    """Tokens, some of which an example has twice, through a table whose gradient is divided by how often the batch has a row."""

    def __init__(self, kind, measured):
        super().__init__()
        self.table, self.out, self.measured = kind(5, 4, scale_grad_by_freq=True), nn.Linear(4, 2), measured

    def forward(self, x):
        self.table.scale_grad_by_freq = self.measured or self.training
        found = self.table((3 + x.detach()).long().clamp(0, 4))
        return self.out((found if found.ndim == 2 else found.sum(1)).tanh())


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # torch's, of a bag under vmap
@pytest.mark.parametrize("kind", [nn.Embedding, partial(nn.EmbeddingBag, mode="sum")], ids=["embedding", "bag"])
def test_a_table_that_counts_its_batch_couples_the_examples_of_a_training_alone(kind, tmp_path):
    """The slow account has gradients of whole batches, and measures a model whose table does not count."""
    aside, always = (cases.Problem("counting", partial(Table, kind, counts), cases.MICRO_BATCHES) for counts in (False, True))
    case = cases.optimizer_named("adamw")
    want = reference.Slow(aside, case).solve()
    for i, one in enumerate((aside, always)):
        run = cases.recorded(tmp_path / str(i), one, case)
        check_against_reference(cases.decomposed(run, one), want)
