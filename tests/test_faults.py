"""A training loop that goes wrong while it is recorded: one line is raised at once, and the steps before it stay."""

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import explaind
from explaind.errors import RecordError
from tests import cases
from tests.closeness import same
from tests.test_cli import mounts


class Counting(nn.Module):
    """A buffer of its own moves with every forward pass."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Linear(3, 2)
        self.register_buffer("seen", torch.zeros(2))

    def forward(self, x):
        if self.training:
            self.seen += 0.1
        return self.trunk(x) * (1 + self.seen)


def begin(path, problem=cases.PLAIN, optimizer=lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.8)):
    """A recorded training after two good steps."""
    model = problem.model()
    loop = SimpleNamespace(path=path, problem=problem, model=model, optimizer=optimizer(cases.trainable(model)))
    loop.recorder = explaind.record(loop.optimizer, model, path, data=cases.DATA)
    for step in range(2):
        cases.gradient(problem, model, step, loop.recorder)
        loop.optimizer.step()
    loop.good = [p.detach().clone() for p in model.parameters()]
    return loop


def backward(loop):
    cases.gradient(loop.problem, loop.model, 2, loop.recorder)


def forgets_examples(loop):
    loop.optimizer.step()


def gives_an_id_beyond_the_data(loop):
    loop.recorder.examples([3, 8])


def gives_a_negative_id(loop):
    loop.recorder.examples(torch.tensor([-1]))


def gives_inputs_for_ids(loop):
    loop.recorder.examples(cases.DATA[:3][0])


def gives_no_ids(loop):
    loop.recorder.examples([])


def gives_too_few_weights(loop):
    loop.recorder.examples([1, 2], weights=[1.0])


def gives_a_nan_weight(loop):
    loop.recorder.examples([1, 2], weights=[1.0, np.nan])


def has_a_nan_loss(loop):
    backward(loop)
    next(loop.model.parameters()).grad[0, 0] = np.nan
    loop.optimizer.step()


def has_an_infinite_gradient_in_a_closure(loop):
    loop.recorder.examples([1])

    def closure():
        (cases.losses(loop.model, cases.DATA[1:2]).mean() * np.inf).backward()

    loop.optimizer.step(closure)


def changes_the_model(loop):
    backward(loop)
    with torch.no_grad():
        loop.model[2].bias.add_(1e-6)
    loop.optimizer.step()


def calls_no_backward(loop):
    loop.model.zero_grad()
    loop.recorder.examples([1])
    loop.optimizer.step()


def adds_parameters(loop):
    loop.optimizer.add_param_group({"params": [torch.zeros(2, requires_grad=True)]})
    backward(loop)
    loop.optimizer.step()


FAULTS = (
    (forgets_examples, "nobody said on whose gradient.*step 2"),
    (gives_an_id_beyond_the_data, "out of range.*below 8.*got 8"),
    (gives_a_negative_id, "out of range.*got -1"),
    (gives_inputs_for_ids, "ids of a batch.*float64"),
    (gives_no_ids, "ids of a batch.*non-empty"),
    (gives_too_few_weights, r"weights.*\(2,\).*\(1,\)"),
    (gives_a_nan_weight, "weights must be one finite number"),
    (has_a_nan_loss, "not finite.*step 2: 0.weight.*nan"),
    (has_an_infinite_gradient_in_a_closure, "not finite.*step 2"),
    (changes_the_model, "changed between two steps.*before step 2: 2.bias"),
    (calls_no_backward, "no parameter has a gradient.*step 2"),
    (adds_parameters, r"given a parameter that is not recorded.*before step 2: \(2,\).*watch="),
)


@pytest.mark.parametrize(("fault", "message"), FAULTS, ids=[fault.__name__ for fault, _ in FAULTS])
def test_a_fault_is_one_line_and_the_steps_before_it_are_kept(fault, message, tmp_path):
    loop = begin(tmp_path / "run")
    with pytest.raises(RecordError, match=message) as caught:
        fault(loop)
    check_kept(loop, caught.value)


def check_kept(loop, error):
    assert "\n" not in str(error)
    run = explaind.open(loop.path)
    assert (run.steps, run.complete, run.damage()) == (2, False, [])
    for (name, _), good in zip(loop.model.named_parameters(), loop.good, strict=True):
        same(run.theta(2)[name], good, name)
    with pytest.raises(RecordError, match="this recording is over"):
        loop.recorder.examples([0])
    loop.recorder.close()
    assert explaind.open(loop.path).steps == 2


def test_a_moving_buffer_is_a_fault(tmp_path):
    loop = begin(tmp_path / "run", cases.Problem("buffer", Counting, trains=lambda step: False))
    loop.model.train()
    loop.model(cases.DATA[:4][0])
    loop.recorder.examples([1])
    with pytest.raises(RecordError, match=r"a buffer or frozen parameter moved.*seen.*watch=\['seen'\]") as caught:
        loop.optimizer.step()
    check_kept(loop, caught.value)


def test_a_sparse_gradient_is_a_fault(tmp_path):
    model = nn.Embedding(4, 2, sparse=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = explaind.record(optimizer, model, tmp_path / "run")
    recorder.examples([0])
    model(torch.tensor([1])).sum().backward()
    with pytest.raises(RecordError, match=r"sparse gradient.*weight"):
        optimizer.step()
    assert explaind.open(tmp_path / "run").steps == 0


def test_the_training_can_go_on_without_its_recorder(tmp_path):
    loop = begin(tmp_path / "run")
    with pytest.raises(RecordError):
        forgets_examples(loop)
    loop.optimizer.step()
    assert not torch.equal(loop.good[0], next(loop.model.parameters()))


def test_an_exception_in_the_loop_closes_the_recording(tmp_path):
    model = cases.PLAIN.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = explaind.record(optimizer, model, tmp_path / "run")

    def loop():
        with recorder:
            cases.gradient(cases.PLAIN, model, 0, recorder)
            optimizer.step()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loop()
    run = explaind.open(tmp_path / "run")
    assert (run.steps, run.complete) == (1, False)
    with pytest.raises(RecordError, match=r"is over.*KeyboardInterrupt"):
        recorder.examples([0])
    assert not optimizer._optimizer_step_pre_hooks


def test_a_closed_recorder_refuses_examples(tmp_path):
    model = cases.mlp()
    recorder = explaind.record(torch.optim.SGD(model.parameters(), lr=0.1), model, tmp_path / "run")
    recorder.close()
    with pytest.raises(RecordError, match=r"is over.*closed"):
        recorder.examples([0])
    assert explaind.open(tmp_path / "run").complete


@pytest.mark.skipif(mounts() is not None, reason=f"cannot mount a small tmpfs: {mounts()}")
def test_a_full_disk_is_told_and_what_was_committed_is_sound(tmp_path, monkeypatch):
    """On real file systems, larger by 32 pages or inodes each time; at every size: experiments/store/full.py."""
    file = Path(__file__).parents[1] / "experiments" / "store" / "full.py"
    study = importlib.util.module_from_spec(spec := importlib.util.spec_from_file_location("full", file))
    spec.loader.exec_module(study)
    monkeypatch.setattr(sys, "argv", ["full.py", "--every", "32", "--kinds", "plain", "--out", str(tmp_path / "full")])
    with pytest.raises(SystemExit) as done:
        study.main()
    rows = json.loads((tmp_path / "full" / "full.json").read_text())
    assert [row["limit"] for row in rows] == ["size", "nr_inodes"]
    for row in rows:
        assert (row["faults"], row["whole"]) == ([], True)
        assert row["refused"] > row["opened"] > 0, "some were full before the first commit, and some behind it"
        assert row["steps"][-1] > row["steps"][0] == 0
    assert not done.value.code
