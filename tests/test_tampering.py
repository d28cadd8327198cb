"""A run, data, model or loss that is not what was trained with: verify says so in words."""

import json
import re

import numpy as np
import pytest
import torch
import zarr
from torch import nn
from torch.utils.data import TensorDataset

import explaind
from explaind.errors import ReplayError
from explaind.ledger.verify_run import verify_run
from tests import cases


def change(path, name, function):
    """Replace an array on disk by function(array), as a program without our checksums would."""
    array = zarr.open_group(path, mode="r+")[name]
    values = function(array[...])
    array.resize(values.shape)
    array[...] = values


def nudge(values, *index):
    values[index] = np.nextafter(values[index], np.inf)
    return values


def without_step(path, step):
    """Cut a step out of every array and out of the commit marker."""
    columns = ("theta", "checksum_theta", "batch", "part", "weight", "hyper", "age", "mode", "checksum_step", "preconditioner")
    for name in (name for name in columns if (path / name).exists()):
        change(path, name, lambda values: np.delete(values, step, axis=0))
    commit = json.loads((path / "commit.json").read_text())
    (path / "commit.json").write_text(json.dumps({**commit, "steps": commit["steps"] - 1}))
    cases.resealed(path)


TAMPERS = (
    ("one float of theta", "theta", lambda v: nudge(v, 3, 25), ["theta before step 3 .* 2.bias changed on disk"]),
    ("a learning rate", "hyper", lambda v: nudge(v, 2, 0, 0), ["the record of step 2 .*hyper-parameters"]),
    ("example ids", "batch", lambda v: np.where(v == 6, 5, v), ["the record of step 1 ", "the record of step 4 ", "the record of step 6 "]),
    ("a weight", "weight", lambda v: nudge(v, 0, 1), ["the record of step 0 .*weights"]),
    ("a second moment", "preconditioner", lambda v: nudge(v, 6, 0), ["the record of step 6 .*preconditioner"]),
    ("a momentum anchor", "momentum", lambda v: nudge(v, 0, 5), ["the record of step 0 "]),
    ("a train mode", "mode", lambda v: v + 1, [f"the record of step {s} " for s in range(7)]),
)


@pytest.mark.parametrize(("name", "function", "words"), [row[1:] for row in TAMPERS], ids=[row[0] for row in TAMPERS])
def test_damage_names_in_words_what_was_changed(name, function, words, tmp_path):
    run = cases.recorded(tmp_path / "run", case=cases.optimizer_named("adamw"))
    assert run.damage() == []
    change(run.path, name, function)
    check_words(explaind.open(run.path).damage(), words)


def test_damage_names_the_place_where_a_step_was_removed(tmp_path):
    run = cases.recorded(tmp_path / "run", case=cases.optimizer_named("adamw"))
    without_step(run.path, 4)
    check_words(explaind.open(run.path).damage(), ["removed.* before state 4", "the record of step 4 .*removed"])


def check_words(found, words):
    assert len(found) == len(words), found
    for sentence, pattern in zip(found, words, strict=True):
        assert re.search(pattern, sentence), sentence


LABELS = cases.DATA.tensors[1].clone()
LABELS[5] = 1
MISLABELLED = TensorDataset(cases.DATA.tensors[0], LABELS)
LINES = {
    "other": "the replayed gradients do not give the recorded updates: another model, loss, reduction, precision or data",
    "some": "some of their examples are not the ones that were trained on",
    "once": "an update does not follow from the state before it",
}


def verdicts(run, problem=cases.PLAIN, data=cases.DATA, losses=cases.losses):
    """From the ledger and from the run alone."""
    yield cases.decomposed(run, problem, data=data, losses=losses, keep=("query",), rule="auto").verify()
    yield verify_run(run, cases.blank(problem), data, losses)


@pytest.mark.parametrize("name", ["sgd momentum", "adamw"])
@cases.every_problem
def test_a_good_run_is_ok(problem, name, tmp_path):
    run = cases.recorded(tmp_path / "run", problem, cases.optimizer_named(name), data=cases.DATA)
    for verdict in verdicts(run, problem):
        assert (verdict.ok, verdict.reasons) == (True, ())
        assert verdict.replay_error.max() <= 1e-10


def refused(run, *words, **options):
    for verdict in verdicts(run, **options):
        assert not verdict.ok
        for word in words:
            assert any(word in reason for reason in verdict.reasons), verdict.reasons
        assert not any("\n" in reason for reason in verdict.reasons)


def test_a_changed_label_is_found_by_its_fingerprint(tmp_path):
    run = cases.recorded(tmp_path / "run", case=cases.OPTIMIZERS[0], data=cases.DATA)
    refused(run, "1 of 8 examples differ (input or label): 5", LINES["some"], data=MISLABELLED)


def test_a_changed_label_is_found_by_the_replay_where_there_is_no_fingerprint(tmp_path):
    # Example 5 was seen three times; without momentum no other step is touched.
    refused(cases.recorded(tmp_path / "run", case=cases.OPTIMIZERS[0]), "3 of 7 steps", LINES["some"], data=MISLABELLED)


def test_a_changed_float_of_theta_is_found_by_checksum_and_by_replay(tmp_path):
    run = cases.recorded(tmp_path / "run")
    change(run.path, "theta", lambda v: v + 1e-3 * np.outer(np.arange(8) == 3, np.arange(26) == 25))
    refused(explaind.open(run.path), "theta before step 3 is not what was recorded: 2.bias changed on disk", "replay differs")


def test_a_removed_step_is_found(tmp_path):
    run = cases.recorded(tmp_path / "run", case=cases.OPTIMIZERS[0])
    without_step(run.path, 3)
    refused(explaind.open(run.path), "a step was removed", "1 of 6 steps (worst: step 2,", LINES["once"])


def test_another_loss_is_found(tmp_path):
    refused(cases.recorded(tmp_path / "run"), LINES["other"], losses=lambda model, batch: cases.losses(model, batch) ** 2)


def test_another_reduction_is_found(tmp_path):
    model = cases.PLAIN.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with explaind.record(optimizer, model, tmp_path / "run", reduction="sum") as recorder:
        cases.train(cases.PLAIN, model, optimizer, cases.OPTIMIZERS[0], recorder)  # which takes the mean
    refused(explaind.open(tmp_path / "run"), LINES["other"])


def noise(model):
    for p in model.parameters():
        p.grad += 0.1 * torch.randn_like(p)


def half_of_them(model):
    for p in model.parameters():
        p.grad[::2] = 0


def twice(model):
    for p in model.parameters():
        p.grad *= 2


@pytest.mark.parametrize("touch", [noise, half_of_them, twice], ids=lambda touch: touch.__name__)
def test_what_was_done_to_gradients_that_is_no_clipping_is_found(touch, tmp_path):
    model = cases.PLAIN.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with explaind.record(optimizer, model, tmp_path / "run") as recorder:
        for step in range(7):
            cases.gradient(cases.PLAIN, model, step, recorder)
            touch(model)
            optimizer.step()
    refused(explaind.open(tmp_path / "run"), LINES["other"])


def test_a_gradient_that_is_only_rounding_is_no_fault(tmp_path):
    """A bias that softmax takes out again: its gradient is rounding, which Adam blows up to a full step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Softmax(-1))
    shift = nn.Parameter(torch.zeros(1))
    model.register_parameter("shift", shift)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)

    def losses(m, batch):
        logits = m[2](m[1](m[0](batch[0])))
        return nn.functional.cross_entropy(logits + m.shift, batch[1], reduction="none")

    data = TensorDataset(torch.randn(8, 3), torch.arange(8) % 4)
    with explaind.record(optimizer, model, tmp_path / "run", data=data) as recorder:
        for _ in range(6):
            recorder.examples(range(8))
            optimizer.zero_grad()
            losses(model, data[:]).mean().backward()
            optimizer.step()
    run = explaind.open(tmp_path / "run")
    assert np.abs(run.theta(6)["shift"]).max() > 1e-4  # it moved
    verdict = verify_run(run, model, data, losses)
    assert verdict.ok, verdict.reasons


class Sines(nn.Sequential):
    """The parameters of ``mlp``, another function."""

    def __init__(self):
        super().__init__(*cases.mlp())

    def forward(self, x):
        return self[2](self[0](x).sin())


def test_another_model_with_the_same_parameters_is_found_and_named(tmp_path):
    refused(
        cases.recorded(tmp_path / "run"),
        "Sines, the run is of a torch.nn.modules.container.Sequential",
        problem=cases.Problem("sines", Sines),
    )


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (lambda: nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)), r"0.weight.*expected shape \(4, 3\); got \(5, 3\)"),
        (lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh()), "2.weight.*nothing of that name"),
        (lambda: nn.Sequential(*cases.mlp(), nn.Linear(2, 2)), "3.weight.*no such parameter"),
    ],
    ids=["another width", "a layer less", "a layer more"],
)
def test_another_architecture_is_refused(network, message, tmp_path):
    run = cases.recorded(tmp_path / "run")
    with pytest.raises(ReplayError, match=message):
        cases.decomposed(run, cases.Problem("other", network))


@pytest.mark.parametrize("data", [None, cases.DATA], ids=["without fingerprints", "with fingerprints"])
def test_data_that_lacks_an_example_is_refused(data, tmp_path):
    run = cases.recorded(tmp_path / "run", data=data)
    with pytest.raises(ReplayError, match=r"the data lacks an example of the run.*ids up to 7"):
        cases.decomposed(run, data=TensorDataset(*cases.DATA[:6]))


def test_an_array_of_a_ledger_that_was_changed_on_disk_is_found(tmp_path):
    cases.decomposed(cases.recorded(tmp_path / "run"), save=tmp_path / "ledger")
    change(tmp_path / "ledger", "data", lambda v: v + 1e-3)
    verdict = explaind.open_ledger(tmp_path / "ledger").verify()
    assert not verdict.ok
    assert "the rows do not sum to the final value" in verdict.reasons[0]


def test_a_coarse_path_rule_is_not_hidden_by_the_discrete_gradient(tmp_path):
    run = cases.recorded(tmp_path / "run", cases.Problem("sum", reduction="sum"), cases.Case("fast", lambda p: torch.optim.SGD(p, lr=1.5)))
    for closure in ("none", "discrete-gradient"):
        verdict = cases.decomposed(run, rule="gauss:1", closure=closure).verify()
        assert not verdict.ok
        assert re.search(r"explained is .* lower tol", verdict.reasons[0]), verdict.reasons
    assert cases.decomposed(run, rule="auto", tol=1e-4).verify().ok
