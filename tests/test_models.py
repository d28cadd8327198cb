"""Models and loops of many kinds, each a row: the ledger closes, and the credit of examples sums to that of their batches."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.data import TensorDataset

import explaind
from tests import cases
from tests.closeness import algebra, same

WORDS, WIDTH = 6, 4
TOKENS = torch.randint(0, WORDS, (10, 3), generator=torch.Generator().manual_seed(2))
DATA = TensorDataset(TOKENS, torch.tensor([0, 1, 1, 0, 1, 0, 0, 1, 1, 0]))


class Head(nn.Module):
    """Tokens [batch, time] through a table and `inside` -> [batch, 2]."""

    def __init__(self, inside: Callable[[], nn.Module] | None = None) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, 2)
        self.inside = nn.Identity() if inside is None else inside()

    def forward(self, tokens):
        found = self.inside(self.table(tokens))
        return self.out((found[0] if isinstance(found, tuple) else found).mean(1))


class Bag(nn.Module):
    def __init__(self, mode):
        super().__init__()
        self.bag, self.out = nn.EmbeddingBag(WORDS, WIDTH, mode=mode), nn.Linear(WIDTH, 2)

    def forward(self, tokens):
        return self.out(self.bag(tokens).tanh())


class Tied(Head):
    """The table is the decoder too, as in language models."""

    def forward(self, tokens):
        return F.linear(self.table(tokens).mean(1).tanh(), self.table.weight)[:, :2] + self.out.bias


class Functionally(nn.Module):
    """Parameters that no module uses: products, indices, and one twice."""

    def __init__(self):
        super().__init__()
        self.table, self.mix = nn.Parameter(torch.randn(WORDS, WIDTH)), nn.Parameter(torch.randn(WIDTH, WIDTH))
        self.scale = nn.ParameterList([nn.Parameter(torch.ones(WIDTH)), nn.Parameter(torch.zeros(2))])

    def forward(self, tokens):
        x = self.table[tokens].sum(1)
        x = torch.einsum("bi,ij->bj", x.tanh() * self.scale[0], self.mix)
        return (x @ self.mix.T)[:, :2] + self.scale[1]


class Attending(nn.Module):
    """MultiheadAttention from the tokens to themselves, where padding is not looked at."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, x):
        later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        return self.attention(x, x, x, attn_mask=later, need_weights=False)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "bag of means": lambda: Bag("mean"),
    "bag of sums": lambda: Bag("sum"),
    "tied weights": Tied,
    "functional parameters": Functionally,
    "weight norm": lambda: Head(lambda: parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH))),
    "multi-head attention": lambda: Head(Attending),
    "encoder layer": lambda: Head(lambda: nn.TransformerEncoderLayer(WIDTH, 2, 6, dropout=0.0, batch_first=True)),
    "encoder layer with dropout": lambda: Head(
        lambda: nn.TransformerEncoderLayer(WIDTH, 2, 6, dropout=0.2, norm_first=True, batch_first=True)
    ),
    "rnn": lambda: Head(lambda: nn.RNN(WIDTH, WIDTH, batch_first=True)),
    "lstm of two layers": lambda: Head(lambda: nn.LSTM(WIDTH, WIDTH, num_layers=2, batch_first=True)),
    "gru both ways": lambda: Head(lambda: nn.GRU(WIDTH, WIDTH // 2, bidirectional=True, batch_first=True)),
    "batch norm": lambda: Head(lambda: nn.BatchNorm1d(3)),
}


@dataclass(frozen=True)
class Loop:
    """How the batches of a training come: steps of micro-batches."""

    steps: tuple[tuple[tuple[int, ...], ...], ...] = (((0, 1, 2),), ((3, 4, 5, 6),), ((7, 8),), ((9, 0, 4),))
    weight: Callable[[torch.Tensor], torch.Tensor] | None = None
    frozen: tuple[int, ...] = ()
    """Steps at which the first parameter is frozen."""


LOOPS = {
    "plain": Loop(),
    "micro-batches of unequal sizes": Loop(steps=(((0, 1, 2), (3, 4)), ((5, 6), (7, 8, 9, 1)), ((2, 3, 4),))),
    "an example twice in a batch": Loop(steps=(((0, 1, 1),), ((2, 2, 3), (2, 5)), ((1, 4, 4, 4),))),
    "weights of its own": Loop(weight=lambda ids: 0.1 + ids.double() / 20),
    "frozen and given back": Loop(frozen=(1, 2)),
}


def losses(model: nn.Module, batch: Any) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def trained(network: str, loop: Loop, path: Any = None) -> list[torch.Tensor]:
    """The parameters after every step."""
    torch.manual_seed(3)
    model = NETWORKS[network]().double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.1)
    recorder = None if path is None else explaind.record(optimizer, model, path, data=DATA)
    states = []
    for step, parts in enumerate(loop.steps):
        next(model.parameters()).requires_grad_(step not in loop.frozen)
        optimizer.zero_grad()
        for ids in map(torch.tensor, parts):
            weights = torch.full((len(ids),), 1 / len(ids), dtype=torch.float64) if loop.weight is None else loop.weight(ids)
            if recorder is not None:
                recorder.examples(ids, None if loop.weight is None else weights)
            (losses(model, DATA[ids]) @ weights).backward()
        optimizer.step()
        states.append(nn.utils.parameters_to_vector(model.parameters()).detach().clone())
    if recorder is not None:
        recorder.close()
    return states


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # vmap takes some operations row by row
@pytest.mark.parametrize(
    ("network", "loop"),
    [(network, "plain") for network in NETWORKS]
    + [(network, loop) for loop in LOOPS if loop != "plain" for network in ("tied weights", "encoder layer with dropout", "gru both ways")],
)
def test_the_ledger_closes_and_examples_sum_to_their_batches(network, loop, tmp_path, monkeypatch):
    cases.shorten_blocks(monkeypatch)
    for got, want in zip(trained(network, LOOPS[loop], tmp_path / "run"), trained(network, LOOPS[loop]), strict=True):
        same(got, want, "parameters beside the training without a recorder")
    asked = {"data": DATA, "losses": losses, "queries": TOKENS[:2], "measure": lambda model, tokens: model(tokens), "rule": "gauss:6"}
    run = explaind.open(tmp_path / "run")
    each, whole = (
        explaind.decompose(run, NETWORKS[network]().double(), keep=("query", "output", *keep, "layer", "step"), **asked)
        for keep in (("example",), ())
    )
    found = each.verify().maxima
    assert found["closure"] <= 1e-9 * found["movement"]
    assert found["arithmetic"] <= 1e-9 * found["movement"]
    algebra(each.sum("example")["data"], whole["data"], "credit of the batches", float(np.abs(each["data"]).sum()))
    seen = {i for parts in LOOPS[loop].steps for ids in parts for i in ids}
    assert each.coords["example"].tolist() == sorted(seen)
    assert (np.abs(each["data"]).sum(axis=(0, 1, 3, 4)) > 0).all()
