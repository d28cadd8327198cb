"""What happens around a recording: steps that fail, gradients that are taken away, models that are copied and saved meanwhile."""

import copy
import itertools
import pickle

import pytest
import torch
from torch import nn

import explaind
from tests import cases
from tests.closeness import same
from tests.test_loops import BATCHES, backward, closes


@pytest.fixture(autouse=True)
def short_blocks(monkeypatch):
    cases.shorten_blocks(monkeypatch)


def test_a_step_that_failed_is_made_again_or_left_out(tmp_path):
    """The optimizer raised before it touched anything: its batch is trained on again, or thrown away."""

    def trained(path, again, **options):
        model, fails = cases.Problem("loop", cases.mlp).model(), []

        def failing(optimizer, args, kwargs):
            if fails:
                raise RuntimeError(fails.pop())

        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        with explaind.record(optimizer, model, path, **options) as recorder:
            optimizer.register_step_pre_hook(failing)
            for i, ids in enumerate(BATCHES):
                optimizer.zero_grad()
                backward(model, recorder, ids)
                fails += ["out of memory"] * (i == 1)
                if not fails:
                    optimizer.step()
                    continue
                with pytest.raises(RuntimeError, match="out of memory"):
                    optimizer.step()
                if again:
                    optimizer.step()
        return explaind.open(path)

    for again, options in itertools.product((True, False), ({}, {"gradients": "store"})):
        run = trained(tmp_path / f"{again}{len(options)}", again, **options)
        assert [row.batch.tolist() for row in run.block(0, run.steps).rows] == [b for i, b in enumerate(BATCHES) if again or i != 1]
        closes(cases.decomposed(run))


def test_a_gradient_that_is_taken_away_before_the_step(tmp_path):
    """As a head is kept still in the first epochs."""
    model = cases.Problem("loop", cases.mlp).model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.03)
    with explaind.record(optimizer, model, tmp_path / "run") as recorder:
        for i, ids in enumerate(BATCHES):
            optimizer.zero_grad()
            backward(model, recorder, ids)
            if i < 2:
                model[2].weight.grad = None
            optimizer.step()
    run = explaind.open(tmp_path / "run")
    assert [row.batch.tolist() for row in run.block(0, run.steps).rows] == list(BATCHES)
    closes(cases.decomposed(run))


@pytest.mark.parametrize("options", [{}, {"gradients": "store"}], ids=["recompute", "store"])
def test_a_model_that_is_recorded_can_be_copied_and_saved(options, tmp_path):
    model = cases.Problem("loop", cases.mlp).model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with explaind.record(optimizer, model, tmp_path / "run", **options) as recorder:
        backward(model, recorder, BATCHES[0])
        optimizer.step()
        text, copied = pickle.dumps(model), copy.deepcopy(model)
        averaged = torch.optim.swa_utils.AveragedModel(model)
        for other in (copied, averaged.module, pickle.loads(text)):  # which are not the recorder's business
            cases.losses(other, cases.DATA[torch.tensor(BATCHES[1])]).mean().backward()
            same(*(nn.utils.parameters_to_vector(net.parameters()).detach() for net in (other, model)))
        optimizer.zero_grad()
        backward(model, recorder, BATCHES[1])
        optimizer.step()
    assert b"explaind" not in text, "what is saved is read where explaind is not installed"
    run = explaind.open(tmp_path / "run")
    assert [row.batch.tolist() for row in run.block(0, run.steps).rows] == list(BATCHES[:2])
    closes(cases.decomposed(run))


def test_who_goes_on_without_the_recorder_is_told(tmp_path):
    model = cases.Problem("loop", cases.mlp).model()
    first, other = (torch.optim.SGD(model.parameters(), lr=0.1) for _ in range(2))
    recorder = explaind.record(first, model, tmp_path / "run")
    backward(model, recorder, BATCHES[0])
    first.step()
    other.step()
    with pytest.warns(UserWarning, match="the run ends at step 1, and its last parameters are not the model's: .*changed"):
        recorder.close()
    assert explaind.open(tmp_path / "run").complete
