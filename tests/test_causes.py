"""Planted traps: what differs from the training is found, and named."""

import random
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import explaind
from explaind.ledger.verify_run import verify_run
from tests import cases


@pytest.fixture(autouse=True)
def short_blocks(monkeypatch):
    cases.shorten_blocks(monkeypatch)


def eval_inside(model, batch):
    model.eval()
    return cases.losses(model, batch)


def of_one_class(model, batch):
    """Class weights that the training had not."""
    return cases.losses(model, batch) * torch.tensor([1.0, 0.1], dtype=batch[0].dtype)[batch[1]]


def half(model, batch):
    return cases.losses(model, batch) / 2


def coarse(model, batch):
    """Inputs rounded to a fifth."""
    return cases.losses(model, ((5 * batch[0]).round() / 5, batch[1]))


class Augmented:
    """Noise on every reading."""

    def __len__(self):
        return len(cases.DATA)

    def __getitem__(self, i):
        x, y = cases.DATA[i]
        return x + 0.3 * torch.randn(x.shape, dtype=x.dtype), y


TRAPS = {
    "a mean taken for a sum": (cases.PLAIN, {"reduction": "sum"}, {}, "averaged, not summed as recorded"),
    "eval mode in losses": (cases.WHOLE[0], {}, {"losses": eval_inside}, "losses changes the mode of the model"),
    "class weights": (cases.PLAIN, {}, {"losses": of_one_class}, "differ in direction.*class weights"),
    "another weight": (cases.PLAIN, {}, {"losses": half}, "2 times the replayed ones: another weight on the loss"),
    "augmentation": (cases.PLAIN, {}, {"data": Augmented()}, "another one each time.*augmentation"),
    "lower precision": (cases.PLAIN, {}, {"losses": coarse}, "nearly one direction.*lower precision"),
}


@pytest.mark.parametrize("optimizer", ["sgd momentum l2", "adamw"])
@pytest.mark.parametrize("trap", TRAPS)
def test_a_trap_is_found_and_named(trap, optimizer, tmp_path):
    problem, recorded, asked, words = TRAPS[trap]
    case, model = cases.optimizer_named(optimizer), problem.model()
    made = case.make(cases.trainable(model))
    with explaind.record(made, model, tmp_path / "run", **{"reduction": "mean", **recorded}) as recorder:
        cases.train(problem, model, made, case, recorder)
    run = explaind.open(tmp_path / "run")
    verdict = cases.decomposed(run, problem, **asked).verify()
    assert not verdict.ok
    reasons = " | ".join(verdict.reasons)
    assert re.search(words, reasons), reasons
    given = {"data": cases.DATA, "losses": cases.losses, **asked}
    found = verify_run(run, problem.model(), given["data"], given["losses"])
    assert re.search(words, " | ".join(found.reasons)), found.reasons


def test_a_sum_taken_for_a_mean_is_named(tmp_path):
    model = cases.PLAIN.model()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    with explaind.record(optimizer, model, tmp_path / "run") as recorder:
        for ids in ([0, 1, 2], [3, 4, 5, 6]):
            recorder.examples(ids)
            optimizer.zero_grad()
            x, y = cases.DATA[torch.tensor(ids)]
            cases.losses(model, (x, y)).sum().backward()
            optimizer.step()
    reasons = cases.decomposed(explaind.open(tmp_path / "run")).verify().reasons
    assert any("as a step has examples: summed, not averaged" in words for words in reasons), reasons


def by_chance(model, batch):
    return cases.losses(model, batch) * (1.0 + random.random())


def test_random_numbers_that_nobody_follows_are_named(tmp_path):
    """Of any mode: that the model is in another one would be a wrong cause."""
    random.seed(0)
    run = cases.recorded(tmp_path / "run", cases.WHOLE[0])
    reasons = verify_run(run, cases.WHOLE[0].model(), cases.DATA, by_chance).reasons
    assert any("losses gives another gradient each time" in words for words in reasons), reasons
    assert not any("mode the model" in words for words in reasons)


def forget(optimizer):
    optimizer.state.clear()


def halve(optimizer):
    for state in optimizer.state.values():
        state.get("exp_avg", state.get("momentum_buffer")).mul_(-0.5)


@pytest.mark.parametrize("optimizer", ["sgd momentum", "adamw"])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (forget, r"the optimizer had forgotten its state before step 4 \(0.weight\)"),
        (halve, r"model and losses give the gradients of steps 0, 3, 6, and not .* momentum that was changed by hand"),
    ],
)
def test_an_optimizer_whose_state_was_changed_by_hand_is_named(change, words, optimizer, tmp_path):
    case = cases.optimizer_named(optimizer)

    def at_four(optimizer):
        done = iter(range(1, 9))
        return SimpleNamespace(step=lambda: change(optimizer) if next(done) == 4 else None)

    run = cases.recorded(tmp_path / "run", case=replace(case, schedule=at_four))
    for reasons in (cases.decomposed(run).verify().reasons, verify_run(run, cases.blank(cases.PLAIN), cases.DATA, cases.losses).reasons):
        assert re.search(words, " | ".join(reasons)), reasons


def standardised(examples):
    """A collate function that does more than stack."""
    x, y = torch.utils.data.default_collate(examples)
    return (x - x.mean(0)) / 2, y


@pytest.mark.parametrize(
    ("trained", "given", "words"),
    [
        (None, standardised, "with torch's default_collate the model gives the recorded gradient: collate= makes other batches"),
        (standardised, None, "examples are those of the training .*made a batch by torch's default_collate: give the training's collate="),
        (standardised, standardised, None),
    ],
    ids=["another one", "forgotten", "the training's"],
)
def test_another_collate_function_is_named(trained, given, words, tmp_path):
    model = cases.PLAIN.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.03)
    with explaind.record(optimizer, model, tmp_path / "run", data=cases.DATA) as recorder:
        for ids in ([0, 1, 2], [3, 4, 5, 6], [7, 0, 2]):
            recorder.examples(ids)
            optimizer.zero_grad()
            batch = (trained or torch.utils.data.default_collate)([cases.DATA[i] for i in ids])
            cases.losses(model, batch).mean().backward()
            optimizer.step()
    run = explaind.open(tmp_path / "run")
    asked = {"data": cases.DATA, "losses": cases.losses, "collate": given}
    found = explaind.doctor(run, model, queries=cases.QUERIES, measure=cases.measure, **asked).refused
    for reasons in (found, cases.decomposed(run, collate=given).verify().reasons, verify_run(run, model, **asked).reasons):
        if words is None:
            assert not reasons
        else:
            assert re.search(words, " | ".join(reasons)), reasons


def test_a_sound_run_has_no_cause_to_name(tmp_path):
    for i, problem in enumerate((*cases.PROBLEMS, *cases.WHOLE)):
        run = cases.recorded(tmp_path / str(i), problem, cases.optimizer_named("adamw"))
        verdict = verify_run(run, cases.blank(problem), cases.DATA, cases.losses)
        assert verdict.ok, (problem, verdict.reasons)
        assert np.nanmax(verdict.replay_error) < 1e-6


def test_a_model_in_another_mode_than_recorded_is_named(tmp_path):
    """The mode is switched between the forward pass and the step, so that the record has the wrong one."""
    problem = cases.Problem("late", lambda: nn.Sequential(nn.Linear(3, 4), Doubled(), nn.Linear(4, 2)))
    model = problem.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with explaind.record(optimizer, model, tmp_path / "run") as recorder:
        for step in range(2):
            cases.gradient(problem, model, step, recorder)
            model.eval()
            optimizer.step()
    reasons = cases.decomposed(explaind.open(tmp_path / "run"), problem).verify().reasons
    assert any("in train mode the model gives the recorded gradient" in words for words in reasons), reasons


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x.tanh() if self.training else x.tanh()
