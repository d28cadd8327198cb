"""Linear and logistic regression, where every credit can be written down: ∇h(x_q) = x_q wherever the weights are.

∇ℓ_i(w) = (p(w·x_i) − y_i) x_i,    with p the identity for ℓ = (w·x − y)² / 2 and the sigmoid for the logistic loss
"""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import explaind
from tests.cases import normal
from tests.closeness import algebra

X, LABELS, QUERIES = normal(6, 3, seed=20), (normal(6, seed=21) > 0).double(), normal(4, 3, seed=22)
BATCHES = np.array([[0, 1, 2], [3, 4, 5], [1, 5, 3], [2, 0, 4], [5, 4, 0]])
x, y, x_q, STEPS = X.numpy(), LABELS.numpy(), QUERIES.numpy(), len(BATCHES)
LR, MU, BETAS, EPS, DECAY = 0.1, 0.8, (0.9, 0.98), 1e-8, 0.5

REGRESSIONS = {
    "linear": (lambda u: u, lambda u, y: (u - y) ** 2 / 2),
    "logistic": (lambda u: 1 / (1 + np.exp(-u)), lambda u, y: F.binary_cross_entropy_with_logits(u, y, reduction="none")),
}
regressions = pytest.mark.parametrize(("p", "loss"), REGRESSIONS.values(), ids=REGRESSIONS)


def regression():
    model = nn.Linear(3, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(normal(1, 3, seed=23))
    return model


def explained(path, loss, optimizer, view):
    """(w_s [state, 3], ledger) of a training with the mean of the losses."""
    model = regression()
    optimizer = optimizer(model.parameters())

    def losses(model, batch):
        return loss(model(batch[0])[:, 0], batch[1])

    with explaind.record(optimizer, model, path) as recorder:
        for ids in BATCHES:
            recorder.examples(ids)
            optimizer.zero_grad()
            losses(model, (X[ids], LABELS[ids])).mean().backward()
            optimizer.step()
    run = explaind.open(path)
    ledger = explaind.decompose(
        run, regression(), data=TensorDataset(X, LABELS), losses=losses, queries=QUERIES, measure=lambda model, x: model(x)[:, 0],
        keep=("query", "example", "step"), view=view,
    )  # fmt: skip
    return run.states(0, STEPS + 1), ledger


def gradients(w, p):
    """Each example's share of the batch gradient at each step: [step, example, 3]"""
    shares = np.zeros((STEPS, len(x), 3))
    for s, ids in enumerate(BATCHES):
        shares[s, ids] = (p(x[ids] @ w[s]) - y[ids])[:, None] * x[ids] / len(ids)
    return shares


def check(ledger, moved, decayed):
    """moved [step, example, 3] and decayed [step, 3]: what each example and the decay did to w."""
    algebra(ledger["data"], np.einsum("qd,sed->qes", x_q, moved))
    algebra(ledger["decay"], np.einsum("qd,sd->qs", x_q, decayed))
    for row in ("path", "momentum0", "arithmetic"):
        algebra(ledger[row], np.zeros(ledger[row].shape), row, np.abs(ledger["data"]).max())
    algebra(ledger["final"], ledger["initial"] + x_q @ (moved.sum((0, 1)) + decayed.sum(0)))
    assert ledger.verify().ok


@regressions
@pytest.mark.parametrize("view", ["seen", "applied"])
def test_with_sgd_a_credit_is_minus_lr_times_residual_times_inner_product(p, loss, view, tmp_path):
    w, ledger = explained(tmp_path / "run", loss, lambda params: torch.optim.SGD(params, LR), view)
    credit = np.zeros((4, 6, STEPS))
    for s, ids in enumerate(BATCHES):
        for i in ids:
            credit[:, i, s] = -LR / 3 * (p(w[s] @ x[i]) - y[i]) * (x_q @ x[i])
    algebra(ledger["data"], credit)
    check(ledger, -LR * gradients(w, p), np.zeros((STEPS, 3)))


@regressions
def test_with_momentum_a_gradient_acts_as_a_geometric_series(p, loss, tmp_path):
    w, ledger = explained(tmp_path / "run", loss, lambda params: torch.optim.SGD(params, LR, momentum=MU), "seen")
    acted = (1 - MU ** np.arange(STEPS, 0, -1)) / (1 - MU)  # 1 + μ + μ² + …, once for each step from its own to the last
    check(ledger, -LR * acted[:, None, None] * gradients(w, p), np.zeros((STEPS, 3)))


@regressions
def test_with_momentum_the_applied_view_is_each_examples_own_momentum(p, loss, tmp_path):
    w, ledger = explained(tmp_path / "run", loss, lambda params: torch.optim.SGD(params, LR, momentum=MU), "applied")
    z, moved = np.zeros((6, 3)), []
    for share in gradients(w, p):
        z = MU * z + share
        moved.append(-LR * z)
    check(ledger, np.array(moved), np.zeros((STEPS, 3)))


@regressions
def test_with_adamw_each_example_has_its_own_first_moment_and_all_share_the_second(p, loss, tmp_path):
    def optimizer(params):
        return torch.optim.AdamW(params, LR, BETAS, EPS, DECAY)

    w, ledger = explained(tmp_path / "run", loss, optimizer, "applied")
    m, v, moved = np.zeros((6, 3)), np.zeros(3), []
    for t, share in enumerate(gradients(w, p), start=1):
        m = BETAS[0] * m + (1 - BETAS[0]) * share
        v = BETAS[1] * v + (1 - BETAS[1]) * share.sum(0) ** 2
        moved.append(-LR * m / (1 - BETAS[0] ** t) / (np.sqrt(v / (1 - BETAS[1] ** t)) + EPS))
    check(ledger, np.array(moved), -LR * DECAY * w[:-1])


@regressions
def test_with_coupled_decay_the_pull_of_the_weights_is_the_decay_row(p, loss, tmp_path):
    w, ledger = explained(tmp_path / "run", loss, lambda params: torch.optim.SGD(params, LR, weight_decay=DECAY), "seen")
    check(ledger, -LR * gradients(w, p), -LR * DECAY * w[:-1])
