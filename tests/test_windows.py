"""Recording only windows of steps: what happens between them is one row, and the rest is as it would have been."""

import copy

import numpy as np
import pytest
import torch

import explaind
from explaind.errors import RecordError
from explaind.ledger.verify_run import verify_run
from tests import cases
from tests.closeness import algebra, same

STEPS = 14
WINDOWS = [(0, 2), (5, 9), (10, 12)]
KEEP = ("query", "output", "example", "layer", "step")


@pytest.fixture(autouse=True)
def short_blocks(monkeypatch):
    cases.shorten_blocks(monkeypatch)


def trained(path, windows, name="adamw", steps=STEPS, **options):
    model = cases.PLAIN.model()
    optimizer = cases.optimizer_named(name).make(list(model.parameters()))
    with explaind.record(optimizer, model, path, steps=windows, **options) as recorder:
        for step in range(steps):
            loop_step(model, optimizer, recorder, step)
    return explaind.open(path), model


def loop_step(model, optimizer, recorder, step):
    torch.manual_seed(step)
    ids = torch.arange(step, step + 3) % 8
    recorder.examples(ids)
    optimizer.zero_grad()
    x, y = cases.DATA[ids]
    cases.losses(model, (x, y)).mean().backward()
    optimizer.step()


@pytest.mark.parametrize("name", ["sgd", "sgd nesterov l2 maximize", "adamw"])
@pytest.mark.parametrize("windows", [WINDOWS, [(3, 7)], [(0, 3), (3, 6), (9, 12)], [(2, 3), (6, 7)]], ids=str)
def test_windows_hold_what_the_whole_recording_holds_and_the_ledger_closes(windows, name, tmp_path):
    run, model = trained(tmp_path / "run", windows, name)
    whole, other = trained(tmp_path / "whole", None, name)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        same(a.detach().numpy(), b.detach().numpy())
    numbers = [n for start, stop in windows for n in range(start, stop)]
    of_steps = run.gaps == 0
    same(run.numbers[:-1][of_steps], numbers)
    same(run.states(0, run.steps)[of_steps], whole.states(0, STEPS)[numbers])
    ledger = cases.decomposed(run)
    same(ledger.coords["step"], run.numbers[:-1])
    verdict = ledger.verify()
    assert verdict.ok, verdict.reasons
    assert verdict.maxima["closure"] <= 1e-10
    assert verdict.maxima["arithmetic"] <= 1e-10 * verdict.maxima["movement"]
    gaps = ledger["gap"]
    algebra(gaps[..., of_steps], np.zeros_like(gaps[..., of_steps]), "gap at steps")
    assert np.abs(gaps[..., ~of_steps]).max() > 0
    assert verify_run(run, cases.blank(cases.PLAIN), cases.DATA, cases.losses).ok
    # The last window knows its own future: nothing of it depends on what was not recorded.
    last = run.numbers[:-1] >= windows[-1][0]
    until_there = cases.decomposed(whole.first(windows[-1][1]))
    seen = np.isin(until_there.coords["example"], ledger.coords["example"])
    algebra(ledger["data"][..., last & of_steps], until_there["data"][:, :, seen, :, windows[-1][0] :], "last window")


@pytest.mark.parametrize("view", ["seen", "applied"])
def test_momentum_behind_a_gap_is_the_gaps(view, tmp_path):
    """Of SGD with momentum: the gap's row is its own movement and what its momentum still moves, which a longer recording tells apart."""
    run, _ = trained(tmp_path / "run", [(0, 4), (6, STEPS)], "sgd momentum")
    whole, _ = trained(tmp_path / "whole", None, "sgd momentum")
    ledger, want = cases.decomposed(run, view=view, rule="gauss:4"), cases.decomposed(whole, view=view, rule="gauss:4")
    behind, gap = run.numbers[:-1] > 4, int(np.flatnonzero(run.gaps)[0])
    if view == "seen":  # what was seen behind the gap is the same
        algebra(ledger["data"][..., behind], want["data"][..., 6:], "behind")
    total = ledger["gap"].sum(-1) + sum(ledger[row].sum(-1) for row in ("data",)).sum(2)
    alone = want["data"].sum((2, -1))
    # Only the path of the gap itself is not resolved: it is taken in one piece there.
    assert np.abs(total - alone).max() <= 0.2 * np.abs(alone).max()
    assert gap == 4


@pytest.mark.parametrize("at", [1, 2, 5, 7, 9, 11])
def test_a_recording_of_windows_goes_on_from_a_recorded_state(at, tmp_path):
    whole, _ = trained(tmp_path / "whole", WINDOWS)
    checkpoint, at_run = {}, tmp_path / "run"
    for begin in (0, at):
        model = cases.PLAIN.model()
        optimizer = cases.optimizer_named("adamw").make(list(model.parameters()))
        if begin:
            model.load_state_dict(checkpoint["model"])
            optimizer.load_state_dict(checkpoint["optimizer"])
        with explaind.record(optimizer, model, at_run, steps=WINDOWS, resume=bool(begin)) as recorder:
            for step in range(begin, STEPS):
                if step == at and not begin:
                    checkpoint = copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
                    if at > 6:
                        break
                loop_step(model, optimizer, recorder, step)
    run = explaind.open(at_run)
    same(run.numbers, whole.numbers)
    same(run.states(0, run.steps + 1), whole.states(0, run.steps + 1))
    same(cases.decomposed(run)["data"], cases.decomposed(whole)["data"])


def test_windows_that_make_no_sense_are_refused(tmp_path):
    for windows in ([], [(3, 3)], [(5, 2)], [(4, 6), (5, 8)], [(-1, 2)]):
        with pytest.raises(RecordError, match="no windows of steps"):
            trained(tmp_path / "run", windows, steps=1)
    with pytest.raises(RecordError, match="behind a gradient filter"):
        trained(tmp_path / "run", [(0, 2)], gradient_filter=explaind.GrokfastEMA())


def test_several_optimizers_count_a_step_together(tmp_path):
    model = cases.PLAIN.model()
    pair = [torch.optim.SGD(model[0].parameters(), lr=0.1, momentum=0.9), torch.optim.AdamW(model[2].parameters(), lr=0.03)]
    with explaind.record(pair, model, tmp_path / "run", steps=[(2, 4), (6, 8)]) as recorder:
        for step in range(9):
            torch.manual_seed(step)
            ids = torch.arange(step, step + 3) % 8
            recorder.examples(ids)
            model.zero_grad()
            x, y = cases.DATA[ids]
            cases.losses(model, (x, y)).mean().backward()
            for optimizer in pair if step != 5 else pair[:1]:
                optimizer.step()
    run = explaind.open(tmp_path / "run")
    same(run.numbers[:-1], [0, 2, 3, 4, 6, 7])
    verdict = cases.decomposed(run).verify()
    assert verdict.ok, verdict.reasons
    assert verdict.maxima["arithmetic"] <= 1e-10 * verdict.maxima["movement"]
