"""The applied view of a sample of examples, taken forwards, against the sweep."""

import numpy as np
import pytest
import torch

import explaind
from explaind.analysis.credit import layer_shares
from explaind.analysis.forward import sampled_ledger
from explaind.errors import RequestError
from explaind.ledger.saving import save
from tests import cases
from tests.closeness import algebra, same

GROUPS = {"first": ["0.*"], "last": ["2.*"]}
ASKED = {"data": cases.DATA, "losses": cases.losses, "queries": cases.QUERIES, "measure": cases.measure, "rule": "gauss:4"}


@pytest.mark.parametrize("name", ["adamw", "adamw amsgrad", "adamw maximize", "sgd", "sgd momentum dampening", "sgd nesterov"])
@pytest.mark.parametrize("problem", ["mean loss", "micro-batches", "frozen parameter"])
def test_forwards_and_backwards_agree(name, problem, tmp_path):
    problem = cases.problem_named(problem)
    run = cases.recorded(tmp_path / "run", problem, cases.optimizer_named(name))
    found = sampled_ledger(run, cases.blank(problem), [1, 2, 6], groups=GROUPS, windows=2, **ASKED)
    whole = cases.decomposed(run, problem, keep=("query", "example", "layer", "step"), view="applied", windows=2, groups={"layer": GROUPS})
    ids, scale = whole.coords["example"].tolist(), np.abs(whole["data"]).sum()
    algebra(found["data"][:, :3], whole["data"][:, [ids.index(i) for i in (1, 2, 6)]], scale=scale)
    algebra(found["data"].sum(1), whole["data"].sum(1) + whole["arithmetic"], scale=scale)
    for row in ("initial", "decay", "path"):
        algebra(found[row], whole[row], scale=scale)
    same(found["final"], whole["final"])
    assert found.coords["example"].tolist() == ["1", "2", "6", "rest"]
    for axis in ("layer", "step", "query"):
        same(found.coords[axis], whole.coords[axis])
    algebra(found.checks.by_step[:, :2], whole.checks.by_step[:, :2], scale=scale)


def test_a_sample_that_is_all_of_a_full_batch(tmp_path):
    problem = cases.Problem("full batch", steps=(((3, 0, 1),), ((1, 3, 0),)))
    run = cases.recorded(tmp_path / "run", problem, cases.optimizer_named("adamw"))
    found = sampled_ledger(run, cases.mlp(), [0, 1, 3], **ASKED)
    whole = cases.decomposed(run, problem, keep=("query", "example", "layer", "step"), view="applied")
    algebra(found["data"][:, :3], whole["data"])
    algebra(found["data"][:, 3], whole["arithmetic"], scale=1.0)


def test_it_closes_is_kept_and_says_that_nothing_was_replayed(tmp_path):
    run = cases.recorded(tmp_path / "run", case=cases.optimizer_named("adamw"))
    told = []
    ledger = sampled_ledger(run, cases.mlp(), [0, 3], progress=lambda *at: told.append(at), **ASKED)
    save(ledger, tmp_path / "ledger")
    again = explaind.open_ledger(tmp_path / "ledger")
    same(again["data"], ledger["data"])
    verdict = again.verify()
    assert verdict.maxima["closure"] <= 1e-12
    assert [reason.split(":")[0] for reason in verdict.reasons] == ["the training was not replayed"]
    assert told == [(s + 1, 7) for s in range(7)]
    shares = layer_shares(again, np.arange(2)).grid("step", "layer", "share")[2]
    algebra(shares.sum(1)[[0, 5]], np.ones(2))  # steps with an example of the sample


@pytest.mark.parametrize(
    ("name", "problem", "what"),
    [
        ("adam l2", "mean loss", "decay of this run went through the gradient"),
        ("adamw", "clipped by norm", "clipping"),
        ("adamw", "dropout", "draw random numbers"),
    ],
)
def test_what_it_cannot_do_is_refused(name, problem, what, tmp_path):
    problem = cases.problem_named(problem)
    run = cases.recorded(tmp_path / "run", problem, cases.optimizer_named(name))
    with pytest.raises(RequestError, match=what):
        sampled_ledger(run, cases.blank(problem), [0, 1], **ASKED)


def test_momentum_from_before_and_coupled_losses_are_refused(tmp_path):
    run = cases.recorded(tmp_path / "warm", case=cases.optimizer_named("adamw"), warm=True)
    with pytest.raises(RequestError, match="momentum from before the recording"):
        sampled_ledger(run, cases.mlp(), [0], **ASKED)
    run = cases.recorded(tmp_path / "run", case=cases.optimizer_named("adamw"))

    def coupled(model, batch):
        values = cases.losses(model, batch)
        return values + 0.1 * (values - values.mean()) ** 2

    with pytest.raises(RequestError, match="depend on each other"):
        sampled_ledger(run, cases.mlp(), [0], **{**ASKED, "losses": coupled})
    assert torch.get_default_dtype() == torch.float32
