"""Models and functions that are awkward to differentiate: the ledger is right all the same, or says in words why it cannot be."""

import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import explaind
from explaind.errors import ExplaindError, ReplayError
from explaind.kernel.gradients import rows_of
from explaind.kernel.secant import NoSecant
from explaind.kernel.sweep import Sweep
from tests.closeness import algebra

TOKENS = torch.tensor([[1, 0, 0], [2, 3, 0], [4, 0, 0], [3, 3, 1], [2, 0, 0], [1, 4, 2]])
LABELS = torch.tensor([0, 1, 1, 0, 1, 0])


class Padded(nn.Module):
    """A table whose first row has no gradient in training, and decays."""

    def __init__(self):
        super().__init__()
        self.table, self.out = nn.Embedding(5, 3, padding_idx=0), nn.Linear(3, 2)
        with torch.no_grad():
            self.table.weight[0] = 1.0

    def forward(self, tokens):
        return self.out(torch.tanh(self.table(tokens)).sum(1))


class Recurrent(Padded):
    """… and an operation that vmap lacks."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(3, 3, batch_first=True)

    def forward(self, tokens):
        return self.out(self.lstm(self.table(tokens))[0][:, -1])


class Bagged(nn.Module):
    """An operation without a forward mode."""

    def __init__(self):
        super().__init__()
        self.table, self.out = nn.EmbeddingBag(5, 3, mode="mean"), nn.Linear(3, 2)

    def forward(self, tokens):
        return self.out(torch.tanh(self.table(tokens)))


def losses(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def recorded(path, network, of=losses, batches=((0, 1, 2), (3, 4, 5), (0, 5, 2, 3), (1,)), lr=0.1, **options):
    torch.manual_seed(0)
    model = network().double()
    data = torch.utils.data.TensorDataset(TOKENS, LABELS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.5)
    with explaind.record(optimizer, model, path, data=data, **options) as recorder:
        for ids in batches:
            recorder.examples(torch.tensor(ids))
            optimizer.zero_grad()
            of(model, data[list(ids)]).mean().backward()
            optimizer.step()
    return explaind.open(path), data


def decomposed(run, data, network, of=losses, measure=lambda model, tokens: model(tokens), **asked):
    return explaind.decompose(
        run, network().double(), data=data, losses=of, queries=asked.pop("queries", TOKENS[:3]), measure=measure, **asked
    )


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # vmap takes some operations row by row
@pytest.mark.parametrize("rule", ["auto", "adaptive", "secant", "gauss:6"])
@pytest.mark.parametrize("network", [Padded, Recurrent, Bagged])
def test_padding_rows_and_operations_without_a_forward_mode(network, rule, tmp_path):
    run, data = recorded(tmp_path / "run", network)
    ledger = decomposed(run, data, network, rule=rule, tol=1e-3)
    maxima = ledger.verify().maxima
    assert maxima["closure"] <= 1e-10
    assert maxima["arithmetic_share"] <= 1e-9
    if rule == "secant" or network is Bagged:  # a quadrature of gradients that leave the padding row out cannot see it decay
        assert maxima["path_share"] <= (1e-10 if rule == "secant" else 1e-3)


def test_credit_of_examples_is_that_of_the_backward_pass(tmp_path):
    run, data = recorded(tmp_path / "run", Recurrent)
    together = decomposed(run, data, Recurrent, rule="secant")
    one = decomposed(run, data, Recurrent, rule="secant", keep=("query", "output", "layer"))
    algebra(together["data"].sum(2), one["data"], scale=np.abs(together["data"]).sum())


def contrastive(model, batch):
    """The examples of a batch are each other's negatives; one alone has none."""
    z = F.normalize(model(batch[0]), dim=1)
    return F.cross_entropy(3 * z @ z.T.roll(1, 0), torch.arange(rows_of(batch)), reduction="none")


@pytest.mark.parametrize("batches", [((0, 1, 2), (3, 4, 5), (1,)), ((1,), (0, 1, 2), (3, 4, 5))])
def test_a_last_batch_of_one_does_not_make_a_coupled_loss_look_separable(batches, tmp_path):
    run, data = recorded(tmp_path / "run", Padded, contrastive, batches)
    maxima = decomposed(run, data, Padded, contrastive, rule="secant").verify().maxima
    assert maxima["arithmetic_share"] <= 1e-9


@pytest.mark.parametrize("rule", ["auto", "secant"])
def test_the_norm_of_a_zero_vector_is_not_nan(rule, tmp_path):
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.into = nn.Linear(3, 2, bias=False)

        def forward(self, tokens):
            return self.into(tokens.double())

    run, data = recorded(tmp_path / "run", Bare)
    queries = torch.cat([torch.zeros(1, 3, dtype=torch.long), TOKENS[:2]])
    ledger = decomposed(run, data, Bare, measure=lambda m, q: F.normalize(m(q), dim=1), queries=queries, rule=rule)
    assert np.isfinite(ledger["data"]).all()
    assert (ledger["data"][0] == 0).all()
    assert ledger.verify().maxima["closure"] <= 1e-10


def test_a_rule_that_did_not_foresee_its_arguments_stops_the_secant_alone(tmp_path):
    class Powered(Padded):
        def forward(self, tokens):
            values = super().forward(tokens).tanh()
            return values + torch.div(values + 2, 1000, rounding_mode="floor")

    run, data = recorded(tmp_path / "run", Powered, lr=0.01)
    with pytest.raises(NoSecant):
        decomposed(run, data, Powered, rule="secant")
    assert decomposed(run, data, Powered).settings["rule_note"]


def test_a_function_that_changes_its_batch_is_refused_and_the_callers_stays(tmp_path):
    run, data = recorded(tmp_path / "run", Padded)
    queries = {"tokens": TOKENS[:3].clone(), "scale": torch.ones(3, dtype=torch.float64)}

    def popping(model, batch):
        return model(batch.pop("tokens")) * batch["scale"][:, None]

    assert decomposed(run, data, Padded, measure=popping, queries=queries).axes == ("query", "output", "example", "layer")
    assert set(queries) == {"tokens", "scale"}
    with pytest.raises(ReplayError, match="change the batch"):
        decomposed(run, data, Padded, measure=lambda m, b: m(b["tokens"]) * b["scale"].mul_(2)[:, None], queries=queries)
    assert (queries["scale"] == 1).all()


def test_a_measure_of_another_model_is_told(tmp_path):
    run, data = recorded(tmp_path / "run", Padded)
    other = Padded().double().requires_grad_(False)
    verdict = decomposed(run, data, Padded, measure=lambda model, tokens: other(tokens) + 0.0 * model(tokens)).verify()
    assert "no measure moved at any step" in verdict.reasons[0]


def test_small_steps_do_not_send_the_adaptive_rule_after_rounding(tmp_path):
    run, data = recorded(tmp_path / "run", Padded, lr=1e-6)
    ledger = decomposed(run, data, Padded, rule="adaptive", dtype=torch.float32, measure=lambda model, q: model(q) + 100.0)
    assert {int(str(recipe).split(":")[1]) for recipe in ledger.checks.recipes[:, 0]} <= {1, 2}


def test_costates_of_layers_that_never_learn_are_let_go(tmp_path, monkeypatch):
    class Idle(Padded):
        def __init__(self):
            super().__init__()
            self.unused = nn.Parameter(torch.ones(2))

    run, data = recorded(tmp_path / "run", Idle, batches=((0, 1, 2),) * 60)
    living, step = [], Sweep._step
    monkeypatch.setattr(Sweep, "_step", lambda self, *of, **named: (step(self, *of, **named), living.append(len(self.costates)))[0])
    monkeypatch.setattr("explaind.kernel.costate.FADED", {torch.float64: 1e-2})
    decomposed(run, data, Idle, view="applied", keep=("query", "example", "step"), rule="gauss:1")
    assert max(living) < 50  # 0.9 ** 44 is a hundredth


class Packed(Padded):
    """A packed sequence, through which torch.func has no way."""

    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(3, 3, batch_first=True)

    def forward(self, tokens):
        lengths = (tokens > 0).sum(1)
        packed = nn.utils.rnn.pack_padded_sequence(self.table(tokens), lengths, batch_first=True, enforce_sorted=False)
        return self.out(nn.utils.rnn.pad_packed_sequence(self.gru(packed)[0], batch_first=True, total_length=3)[0].sum(1))


class Cut(torch.autograd.Function):
    """Written before there was a setup_context."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.clamp(min=-0.5)

    @staticmethod
    def backward(ctx, gradient):
        return gradient * (ctx.saved_tensors[0] > -0.5)


class OldFunction(Padded):
    def forward(self, tokens):
        return self.out(Cut.apply(self.table(tokens)).sum(1))


class Numpy(Padded):
    def forward(self, tokens):
        inside = torch.from_numpy(np.tanh(tokens.numpy() > 1))
        return self.out(torch.tanh(self.table(tokens)).sum(1) * inside.any(1, keepdim=True))


class Hooked(Padded):
    """A weight that a hook computes: a model that has been used cannot simply be copied."""

    def __init__(self):
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecated, and in use
            self.out = nn.utils.weight_norm(self.out)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("network", [Packed, OldFunction, Numpy, Hooked])
def test_what_torch_func_has_no_way_through_is_differentiated_by_the_backward_pass(network, tmp_path):
    run, data = recorded(tmp_path / "run", network, lr=0.01)
    used = network().double()
    used(TOKENS)
    keep = ("query", "output", "example", "layer")
    ledger = decomposed(run, data, lambda: used, rule="gauss:6", keep=keep)
    verdict = ledger.verify()
    assert verdict.maxima["closure"] <= 1e-10
    assert verdict.maxima["arithmetic_share"] <= 1e-9
    some = decomposed(run, data, network, rule="gauss:6", measure=lambda model, tokens: model(tokens).sum(0), keep=("query", "example"))
    algebra(ledger["data"].sum((0, 3)), some["data"], scale=np.abs(ledger["data"]).sum())  # as one vector for all queries
    if network is not Hooked:
        with pytest.raises(ExplaindError, match="products='auto'"):
            decomposed(run, data, network, products="jvp")
