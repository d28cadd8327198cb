"""Gradient filters before the optimizer: followed while recording, and credited through to the last number."""

from collections import deque

import pytest
import torch

import explaind
from explaind.config import named, resolved
from explaind.errors import ConfigError, RecordError, RuleError
from explaind.ledger.verify_run import verify_run
from explaind.rules.gradient_filter import gradient_filter
from explaind.tasks import load
from explaind.tasks.training import make_gradient_filter, train
from tests import cases, reference
from tests.closeness import algebra, rounding, same
from tests.test_ledger import check_against_reference


@pytest.fixture(autouse=True)
def short_blocks(monkeypatch):
    cases.shorten_blocks(monkeypatch)


def mean_of_past(model, alpha=0.7, lamb=2.0):
    """As a training loop has it: its memory lies with the model here, so that every training begins anew."""
    grads = getattr(model, "grads", None)
    found = {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}
    if grads is None:
        grads = {name: g.clone() for name, g in found.items()}
    for name, g in found.items():
        grads[name] = grads[name] * alpha + g * (1 - alpha) if name in grads else g.clone()
    for name, p in model.named_parameters():
        if name in found:
            p.grad.data = p.grad.data + grads[name] * lamb
    model.grads = grads


def mean_of_window(model, size=3, lamb=1.5, kind="mean", warmup=True):
    if not hasattr(model, "grads"):
        model.grads = {name: deque(maxlen=size) for name, _ in model.named_parameters()}
    for name, p in model.named_parameters():
        if p.grad is None:
            continue
        model.grads[name].append(p.grad.data.detach().clone())
        if len(model.grads[name]) == size or not warmup:
            total = sum(model.grads[name])
            p.grad.data = p.grad.data + (total / len(model.grads[name]) if kind == "mean" else total) * lamb


def of_mean(alpha=0.7, lamb=2.0):
    return lambda s, t: (s == t) + lamb * (1.0 if s == 0 else 1 - alpha) * alpha ** (t - s)


def of_window(size=3, lamb=1.5, kind="mean", warmup=True):
    def response(s, t):
        held = min(t + 1, size)
        on = t - s < size and (held == size or not warmup)
        return (s == t) + on * (lamb / held if kind == "mean" else lamb)

    return response


FILTERS = {
    "ema": (explaind.GrokfastEMA(0.7, 2.0), mean_of_past, of_mean()),
    "ma": (explaind.GrokfastMA(3, 1.5), mean_of_window, of_window()),
    "ma sum at once": (
        explaind.GrokfastMA(4, 0.5, filter_type="sum", warmup=False),
        lambda m: mean_of_window(m, 4, 0.5, "sum", False),
        of_window(4, 0.5, "sum", False),
    ),
    "ma mean at once": (
        explaind.GrokfastMA(3, 1.5, warmup=False),
        lambda m: mean_of_window(m, warmup=False),
        of_window(warmup=False),
    ),
    "ma of one": (explaind.GrokfastMA(1, 0.5), lambda m: mean_of_window(m, 1, 0.5), of_window(1, 0.5)),
}
each = pytest.mark.parametrize("name", FILTERS)


def filtered_problem(name):
    return cases.Problem(name, touch=FILTERS[name][1], response=FILTERS[name][2])


@each
@pytest.mark.parametrize("optimizer", ["sgd nesterov l2 maximize", "adamw", "sgd in groups"])
def test_every_credit_behind_a_filter_is_the_slow_and_obvious_one(name, optimizer, tmp_path):
    problem, case = filtered_problem(name), cases.optimizer_named(optimizer)
    want = reference.Slow(problem, case).solve()
    run = cases.recorded(tmp_path / "run", problem, case, gradient_filter=FILTERS[name][0])
    for view in ("seen", "applied"):
        check_against_reference(cases.decomposed(run, problem, view=view), want, view)


@each
def test_the_training_is_the_one_without_a_recorder(name, tmp_path):
    problem, case, found = filtered_problem(name), cases.optimizer_named("adamw"), []
    for options in (None, {"gradient_filter": FILTERS[name][0]}):
        model = problem.model()
        optimizer = case.make(list(model.parameters()))
        if options is None:
            cases.train(problem, model, optimizer, case)
        else:
            with explaind.record(optimizer, model, tmp_path / "run", **options) as recorder:
                cases.train(problem, model, optimizer, case, recorder)
        found.append(reference.flat(model.parameters()).numpy())
    same(*found)


@each
def test_summed_axes_and_closure_behind_a_filter(name, tmp_path):
    run = cases.recorded(tmp_path / "run", filtered_problem(name), gradient_filter=FILTERS[name][0])
    full = cases.decomposed(run)
    for keep in (("query", "output", "layer"), ("query", "output", "param", "step"), ("query", "output", "example")):
        coarse = cases.decomposed(run, keep=keep)
        algebra(coarse["data"].sum(axis=tuple(range(2, coarse["data"].ndim))), full["data"].sum(axis=(2, 3, 4)), str(keep))
    exact = cases.decomposed(run, rule="midpoint:1", closure="discrete-gradient")
    assert exact.verify().maxima["closure"] <= 1e-10


@each
def test_a_warm_filter_is_credited_as_momentum_from_before(name, tmp_path):
    problem, case = filtered_problem(name), cases.optimizer_named("sgd momentum")
    model = problem.model()
    optimizer = case.make(list(model.parameters()))
    cases.train(problem, model, optimizer, case)
    warm = explaind.record(optimizer, model, tmp_path / "run", gradient_filter=FILTERS[name][0], filtered=model.grads)
    with warm as recorder:
        cases.train(problem, model, optimizer, case, recorder)
    verdict = cases.decomposed(explaind.open(tmp_path / "run"), problem).verify()
    assert verdict.ok, verdict.reasons
    assert verdict.maxima["arithmetic"] <= 1e-10 * verdict.maxima["movement"]


def test_parameters_without_a_gradient_keep_what_the_filter_remembers_of_them(tmp_path):
    model = cases.Problem("frozen at times").model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.03)
    with explaind.record(optimizer, model, tmp_path / "run", gradient_filter=explaind.GrokfastEMA(0.7, 2.0)) as recorder:
        for step in range(8):
            model[0].weight.requires_grad_(step % 3 != 1)
            optimizer.zero_grad()
            recorder.examples([step % 8, 1])
            x, y = cases.DATA[torch.tensor([step % 8, 1])]
            cases.losses(model, (x, y)).mean().backward()
            mean_of_past(model)
            optimizer.step()
    verdict = cases.decomposed(explaind.open(tmp_path / "run")).verify()
    assert verdict.ok, verdict.reasons
    assert verdict.maxima["arithmetic"] <= 1e-10 * verdict.maxima["movement"]


def test_a_filter_that_was_not_named_is_found_and_one_that_was_is_verified(tmp_path):
    problem = filtered_problem("ema")
    named = cases.recorded(tmp_path / "named", problem, gradient_filter=FILTERS["ema"][0])
    assert verify_run(named, cases.blank(problem), cases.DATA, cases.losses).ok
    verdict = verify_run(cases.recorded(tmp_path / "not", problem), cases.blank(problem), cases.DATA, cases.losses)
    assert not verdict.ok
    assert any("gradient filter (Grokfast)" in reason for reason in verdict.reasons)


def test_a_recording_behind_a_filter_goes_on(tmp_path):
    """From a checkpoint in the middle of a block, with what the loop's own filter remembers."""

    def loop(recorder, steps):
        for step in steps:
            torch.manual_seed(step)
            optimizer.zero_grad()
            recorder.examples([step % 8, 1])
            x, y = cases.DATA[torch.tensor([step % 8, 1])]
            cases.losses(model, (x, y)).mean().backward()
            mean_of_past(model)
            optimizer.step()

    told = {"gradient_filter": explaind.GrokfastEMA(0.7, 2.0)}
    for path, cuts in ((tmp_path / "whole", [range(9)]), (tmp_path / "parts", [range(4), range(4, 9)])):
        model = cases.PLAIN.model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.03)
        for i, cut in enumerate(cuts):
            more = {"resume": True, "filtered": model.grads} if i else {}
            with explaind.record(optimizer, model, path, **told, **more) as recorder:
                loop(recorder, cut)
    whole, parts = explaind.open(tmp_path / "whole"), explaind.open(tmp_path / "parts")
    same(whole.states(0, 10), parts.states(0, 10))
    rounding(cases.decomposed(parts)["data"], cases.decomposed(whole)["data"], "data")
    with pytest.raises(RecordError, match="what that remembers is not known"):
        explaind.record(optimizer, model, tmp_path / "parts", **told, resume=True)


@pytest.mark.parametrize("remembered", [{"0.weight": torch.zeros(2)}, {"0.weight": [torch.zeros(4, 3)] * 2}], ids=["shape", "count"])
def test_what_a_filter_cannot_remember_is_refused(remembered, tmp_path):
    model = cases.PLAIN.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(RecordError, match="not what the gradient filter remembers"):
        explaind.record(optimizer, model, tmp_path / "run", gradient_filter=explaind.GrokfastEMA(), filtered=remembered)


@pytest.mark.parametrize("name", ["ema", "ma"])
def test_a_configuration_may_name_one(name, tmp_path):
    """The training is the one with the loop's own function, and its ledger closes."""
    table = FILTERS[name][0].to_json()
    told = {"name": table["name"], **table["options"]}
    config = resolved(
        {
            "task": {"name": "modular", "p": 7, "width": 8, "mlp": 8, "heads": 2},
            "train": {"steps": 6},
            "optimizer": {"name": "SGD", "lr": 0.1},
            "gradient_filter": told,
        },
        "test",
    )
    assert resolved(config.to_json(), "again") == config
    task = load(config.task.name, config.task.options)
    trained = train(task, config, tmp_path / "run")
    torch.manual_seed(config.train.seed)
    model = task.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = task.data("train")
    for _ in range(6):
        optimizer.zero_grad()
        task.losses(model, torch.utils.data.default_collate([data[i] for i in range(len(data))])).mean().backward()
        FILTERS[name][1](model)
        optimizer.step()
    for a, b in zip(trained.parameters(), model.parameters(), strict=True):
        rounding(a.detach().numpy(), b.detach().numpy())
    run = explaind.open(tmp_path / "run")
    assert verify_run(run, task.model(), data, task.losses).ok


@pytest.mark.parametrize(
    ("told", "words"), [({"name": "Grokfast"}, "unknown gradient filter"), ({"name": "GrokfastEMA", "beta": 1}, "beta")]
)
def test_a_configuration_with_an_unknown_one_is_refused(told, words):
    with pytest.raises(ConfigError, match=words):
        make_gradient_filter(named(told, "test"))


def test_unknown_filters_and_options_are_refused():
    with pytest.raises(RuleError, match="unknown gradient filter"):
        gradient_filter({"name": "Nothing", "options": {}})
    with pytest.raises(RuleError, match="no such options"):
        explaind.GrokfastMA(filter_type="median")


@pytest.mark.parametrize("case", {case.name.split()[0]: case for case in cases.OPTIMIZERS}.values(), ids=str)
def test_a_filter_goes_in_front_of_any_rule(case, tmp_path):
    problem = filtered_problem("ema")
    run = cases.recorded(tmp_path / "run", problem, case, gradient_filter=FILTERS["ema"][0])
    verdict = cases.decomposed(run, problem).verify()
    assert verdict.ok, verdict.reasons
    assert verdict.maxima["closure"] <= 1e-9 * max(1.0, verdict.maxima["movement"])
    assert verdict.maxima["arithmetic"] <= 1e-9 * verdict.maxima["movement"]
