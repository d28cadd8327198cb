"""A recorder watches: the training is bitwise the one without it, and what cannot be replayed is refused at once."""

import copy
from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import explaind
from explaind.errors import ExplaindError, RecordError, RuleError, StoreError
from tests import cases
from tests.closeness import same


def trained(case, problem, path=None):
    """(model, optimizer) after all steps, with a recorder where there is a path."""
    model = problem.model()
    optimizer = case.make(cases.trainable(model))
    if path is None:
        cases.train(problem, model, optimizer, case)
    else:
        with explaind.record(optimizer, model, path, reduction=problem.reduction) as recorder:
            cases.train(problem, model, optimizer, case, recorder)
    return model, optimizer


def check_same_states(one, other):
    left, right = (torch.utils._pytree.tree_leaves_with_path(module.state_dict()) for module in (one, other))
    for (place, a), (place_b, b) in zip(left, right, strict=True):
        assert place == place_b
        same(a, b, str(place))


@cases.every_optimizer
def test_training_with_a_recorder_is_bitwise_the_training_without(case, tmp_path):
    for watched, alone in zip(trained(case, cases.PLAIN, tmp_path / "run"), trained(case, cases.PLAIN), strict=True):
        check_same_states(watched, alone)


@cases.every_problem
def test_every_state_and_batch_of_a_training_is_recorded(problem, tmp_path):
    case = cases.optimizer_named("adamw")
    model, _ = trained(case, problem, tmp_path / "run")
    run = explaind.open(tmp_path / "run")
    assert (run.steps, run.complete, run.damage()) == (len(problem.steps), True, [])
    for name, p in model.named_parameters():
        if p.requires_grad:
            same(run.theta(run.steps)[name], p.detach(), name)
    for parts, row in zip(problem.steps, run.block(0, run.steps).rows, strict=True):
        same(row.batch, np.concatenate(parts))
        same(row.part, np.repeat(np.arange(len(parts), dtype=np.int32), [len(p) for p in parts]))
        same(row.weight, np.concatenate([problem.weights(torch.tensor(p)) for p in parts]))


def test_the_recorder_leaves_the_optimizer_as_it_was(tmp_path):
    model = cases.mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = copy.copy(vars(optimizer))
    with explaind.record(optimizer, model, tmp_path / "run"):
        assert type(optimizer) is torch.optim.SGD
        assert optimizer.step.__func__ is torch.optim.SGD.step
    assert vars(optimizer) == before
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_a_schedulers_learning_rates_are_recorded(tmp_path):
    run = cases.recorded(tmp_path / "run", case=cases.optimizer_named("sgd scheduled"))
    rates = [row.hyper[0, run.manifest.optimizers[0].options.index("lr")] for row in run.block(0, run.steps).rows]
    np.testing.assert_allclose(rates, 0.2 * 0.7 ** np.arange(run.steps), rtol=1e-14)


def test_frozen_parameters_and_buffers_are_kept_as_constants(tmp_path):
    problem = cases.Problem("frozen", cases.frozen)
    run = cases.recorded(tmp_path / "run", problem)
    assert [layer.name for layer in run.manifest.layers] == ["0.weight", "2.weight", "2.bias"]
    same(run.constants["0.bias"], problem.model()[0].bias.detach())
    buffered = cases.recorded(tmp_path / "buffered", cases.Problem("buffer", cases.Sometimes))
    same(buffered.constants["scale"], np.array([0.5, 2.0, 1.0]))


def odd_names():
    torch.manual_seed(0)
    model = nn.Sequential(OrderedDict({"in/0": nn.Linear(3, 4), "in": nn.Tanh(), "out": nn.Linear(4, 2)}))
    model.get_parameter("in/0.bias").requires_grad_(False)
    for name in ("a", "a/b", "a\\b", "50%", "50%25", "c:d"):
        model.register_buffer(name, torch.tensor([float(len(name))], dtype=torch.float64))
    return model


@pytest.mark.parametrize("url", [False, True], ids=["folder", "url"])
def test_what_stays_may_have_any_name_that_torch_allows(url, tmp_path):
    model = odd_names().double()
    want = {name: buffer.numpy() for name, buffer in model.named_buffers()} | {"in/0.bias": model.get_parameter("in/0.bias").numpy()}
    run = cases.recorded("memory://odd/names" if url else tmp_path / "run", cases.Problem("odd names", odd_names))
    assert run.constants.keys() == want.keys()
    for name, values in want.items():
        same(run.constants[name], values, name)
    assert run.damage() == []


def test_tied_weights_are_one_layer(tmp_path):
    run = cases.recorded(tmp_path / "run", cases.Problem("tied", cases.tied))
    assert [layer.name for layer in run.manifest.layers] == ["0.weight", "0.bias", "2.bias"]


def test_a_parameter_without_a_gradient_is_recorded_as_idle(tmp_path):
    run = cases.recorded(tmp_path / "run", cases.problem_named("branch unused in some steps"))
    names = [layer.name for layer in run.manifest.layers]
    branch = [row.age[names.index("branch.weight")] for row in run.block(0, run.steps).rows]
    assert branch == [0, -1, -1, 1, 1, -1, 1]  # SGD's age: 0 until there is a momentum buffer, then 1
    same(run.theta(3)["branch.weight"], run.theta(1)["branch.weight"])


def test_a_step_with_a_closure_is_recorded(tmp_path):
    model = cases.PLAIN.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with explaind.record(optimizer, model, tmp_path / "run") as recorder:
        recorder.examples([0, 1])

        def closure():
            loss = cases.losses(model, cases.DATA[:2]).mean()
            loss.backward()
            return loss

        optimizer.step(closure)
    run = explaind.open(tmp_path / "run")
    same(run.theta(1)["0.weight"], model[0].weight.detach())
    assert run.steps == 1


def test_indexed_data_yields_ids_that_name_the_examples(tmp_path):
    loader = DataLoader(explaind.indexed(cases.DATA), batch_size=3, shuffle=True, generator=torch.Generator().manual_seed(0))
    seen = []
    for ids, x, y in loader:
        seen += ids.tolist()
        same(x, cases.DATA[ids][0])
        same(y, cases.DATA[ids][1])
    assert sorted(seen) == list(range(8))
    assert seen != sorted(seen)


def test_indexed_data_takes_items_of_any_form_but_not_iterables():
    assert explaind.indexed([10, 20])[1] == (1, 20)
    assert explaind.indexed([(1, 2)])[0] == (0, 1, 2)
    assert len(explaind.indexed(cases.DATA)) == 8
    with pytest.raises(RecordError, match=r"map-style.*generator"):
        explaind.indexed(x for x in "ab")


def test_a_path_in_use_is_refused_and_overwrite_replaces_a_run_only(tmp_path):
    first = cases.recorded(tmp_path / "run")
    model = cases.PLAIN.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(StoreError, match="something here already"):
        explaind.record(optimizer, model, tmp_path / "run")
    assert explaind.open(tmp_path / "run").steps == first.steps
    explaind.record(optimizer, model, tmp_path / "run", overwrite=True).close()
    assert explaind.open(tmp_path / "run").steps == 0
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("…")
    with pytest.raises(StoreError, match="not a run"):
        explaind.record(optimizer, model, tmp_path / "precious", overwrite=True)
    assert (tmp_path / "precious" / "thesis.txt").exists()


ASKED_FOR_NOTHING = [
    {"gradients": "stroe"},
    {"gradients": "store:"},
    {"gradients": "store", "gradient_dtype": "int8"},
    {"gradients": "store", "thin": 2},
    {"thin": "x"},
]


@pytest.mark.parametrize("options", ASKED_FOR_NOTHING, ids=str)
def test_overwrite_removes_nothing_where_the_recording_is_refused(options, tmp_path):
    first = cases.recorded(tmp_path / "run")
    model = cases.PLAIN.model()
    with pytest.raises(ExplaindError):
        explaind.record(torch.optim.SGD(model.parameters(), lr=0.1), model, tmp_path / "run", overwrite=True, **options)
    assert (explaind.open(tmp_path / "run").identity, explaind.open(tmp_path / "run").damage()) == (first.identity, [])


def test_a_refused_optimizer_leaves_no_folder(tmp_path):
    model = cases.mlp()
    with pytest.raises(RuleError, match="LBFGS"):
        explaind.record(torch.optim.LBFGS(model.parameters()), model, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("model", "other", "options", "message"),
    [
        (cases.mlp, nn.Linear, {}, "a parameter that the model does not have"),
        (cases.mlp, None, {"reduction": "median"}, "unknown reduction.*'median'"),
    ],
    ids=["another model's parameters", "unknown reduction"],
)
def test_what_cannot_be_recorded_is_refused_at_the_start(model, other, options, message, tmp_path):
    trained_one = model()
    optimizer = torch.optim.SGD((other(2, 2) if other else trained_one).parameters(), lr=0.1)
    with pytest.raises(RecordError, match=message):
        explaind.record(optimizer, trained_one, tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()
