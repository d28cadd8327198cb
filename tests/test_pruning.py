"""Pruning by scores: exact facts about scores, components and what stays."""

import json

import numpy as np
import pytest

import explaind
from explaind.analysis.pruning import ablation, baseline_scores, components, credit_scores, mask, pruned, pruning_curve, scores_of
from explaind.analysis.surgery import Bench
from explaind.cli import main
from explaind.config import Decompose, read
from explaind.errors import RequestError
from explaind.ledger.by_name import decompose_by_name
from explaind.store.manifest import Layer
from explaind.tasks import load
from explaind.tasks.training import train
from tests.closeness import algebra, rounding, same
from tests.test_cli import SMALL, asked, refused

LAYERS = (
    Layer("heads.0.weight", (2, 3), 0, 6, 0),
    Layer("heads.0.bias", (2,), 6, 2, 0),
    Layer("conv.weight", (2, 1, 2), 8, 4, 0),
    Layer("scale", (), 12, 1, 0),
)


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    path = tmp_path_factory.mktemp("pruning") / "run"
    config = read(SMALL, ["--train.steps", "12"])
    train(load(config.task.name, config.task.options), config, path)
    return Bench(explaind.open(path))


def test_scores_by_credit_are_sizes_by_query_and_step(bench):
    asked = Decompose(queries="val:0:3", keep=("query", "param", "step"), windows=4, rule="secant")
    ledger = decompose_by_name(bench.run, asked)
    want = np.abs(ledger["data"]).sum((0, 2))
    algebra(credit_scores(ledger), want)
    algebra(credit_scores(ledger.sum("step")), np.abs(ledger["data"].sum(2)).sum(0))


def test_baselines(bench):
    theta = bench.run.theta(12)
    flat = np.concatenate([v.reshape(-1) for v in theta.values()])
    same(baseline_scores(bench, theta, "magnitude"), np.abs(flat.astype(np.float64)))
    same(baseline_scores(bench, theta, "random", 3), baseline_scores(bench, theta, "random", 3))
    gradient = baseline_scores(bench, theta, "gradient")
    moved = dict(theta)
    moved["linear1.bias"] = theta["linear1.bias"] * 1.01  # 1 % of each: the loss moves by 1 % of Σ θ g
    at = np.cumsum([0, *(v.size for v in theta.values())])[list(theta).index("linear1.bias")]
    there = gradient[at : at + theta["linear1.bias"].size].sum()
    change = abs(bench.measured(moved)["train_loss"] - bench.measured(theta)["train_loss"]) / 0.01
    assert change <= there * 1.1  # signs may cancel, sizes cannot be exceeded
    with pytest.raises(RequestError, match="unknown way to score"):
        baseline_scores(bench, theta, "size")


def test_components_of_every_level():
    assert components(LAYERS, "param").tolist() == list(range(13))
    assert components(LAYERS, "neuron").tolist() == [0, 0, 0, 1, 1, 1, 0, 1, 2, 2, 3, 3, 4]
    assert components(LAYERS, "module").tolist() == [0] * 8 + [1] * 4 + [2]
    assert components(LAYERS, "tensor").tolist() == [0] * 6 + [1] * 2 + [2] * 4 + [3]
    with pytest.raises(RequestError, match="unknown level"):
        components(LAYERS, "heads")


def test_scores_of_children_sum_to_their_parents():
    scores = np.random.default_rng(0).uniform(size=13)
    child = components(LAYERS, "param")
    for level in ("neuron", "module", "tensor"):
        parent = components(LAYERS, level)
        belongs = np.array([parent[np.flatnonzero(child == c)[0]] for c in range(child.max() + 1)])
        algebra(scores_of(scores_of(scores, child), belongs), scores_of(scores, parent))
        algebra(scores_of(scores, parent).sum(), scores.sum())
    neuron, module = components(LAYERS, "neuron"), components(LAYERS, "module")
    belongs = np.array([module[np.flatnonzero(neuron == c)[0]] for c in range(5)])
    algebra(scores_of(scores_of(scores, neuron), belongs), scores_of(scores, module))


@pytest.mark.parametrize("level", ["param", "neuron", "module", "tensor"])
def test_what_stays_is_as_much_as_was_asked_and_what_scores_most(level):
    scores, of, free = np.arange(13.0)[::-1].copy(), components(LAYERS, level), np.ones(13, dtype=bool)
    assert mask(scores, of, free, 1.0).all()
    assert not mask(scores, of, free, 0.0).any()
    stays = mask(scores, of, free, 0.5)
    largest = np.bincount(of).max()
    assert 0.5 * 13 <= stays.sum() <= 0.5 * 13 + largest
    per = scores_of(scores, of) / np.bincount(of)
    assert min(per[of[stays]]) >= max(per[of[~stays]], default=-1)
    free[:8] = False
    stays = mask(scores, of, free, 0.0)
    assert stays[:8].all()
    assert not stays[8:].any()
    with pytest.raises(RequestError, match="not a share"):
        mask(scores, of, free, 1.5)


def test_a_component_with_a_spared_tensor_stays_whole():
    free = np.ones(13, dtype=bool)
    free[6:8] = False  # the bias
    assert mask(np.zeros(13), components(LAYERS, "neuron"), free, 0.0)[:8].all()


def test_ties_go_by_place():
    stays = mask(np.ones(13), components(LAYERS, "param"), np.ones(13, dtype=bool), 0.6)
    assert stays.tolist() == [False] * 5 + [True] * 8


def test_the_curve_is_what_the_zeroed_network_does(bench):
    theta = bench.run.theta(12)
    scores = {method: baseline_scores(bench, theta, method) for method in ("magnitude", "random")}
    found = pruning_curve(bench, scores, [1.0, 0.3, 0.0], spare=["decoder.weight"], levels=("param", "tensor"))
    assert len(found) == 2 * 2 * 3
    whole = found.where(kept=1.0)
    assert whole["kl"].tolist() == [0.0] * 4
    assert whole["sparsity"].tolist() == [0.0] * 4
    assert set(whole["val_accuracy"]) == {bench.measured(theta)["val_accuracy"]}
    nothing = bench.measured({name: v if name == "decoder.weight" else np.zeros_like(v) for name, v in theta.items()})
    assert set(found.where(kept=0.0)["val_loss"]) == {nothing["val_loss"]}
    some = found.where(kept=0.3, method="magnitude", level="param")
    assert abs(some["sparsity"][0] - 0.7) <= 1 / 200
    free = np.concatenate([np.full(v.size, name != "decoder.weight") for name, v in theta.items()])
    made = pruned(theta, mask(scores["magnitude"], np.arange(len(free)), free, 0.3))
    same(made["decoder.weight"], theta["decoder.weight"])
    rounding(some["val_loss"][0], bench.measured(made)["val_loss"])


def test_an_ablated_group_is_the_network_without_it(bench):
    theta = bench.run.theta(12)
    found = ablation(bench, {"mlp": ["linear2.weight", "linear2.bias"], "none": []})
    made = bench.measured({n: np.zeros_like(v) if n.startswith("linear2") else v for n, v in theta.items()})
    assert found["val_loss_change"][0] == made["val_loss"] - bench.measured(theta)["val_loss"]
    assert found["kl"][1] == found["val_loss_change"][1] == 0.0


def test_prune_on_the_command_line(bench, capsys):
    run = bench.run.path
    assert "no ledger of this run gives credit by parameter" in refused(capsys, "prune", run)
    assert main(["decompose", str(run), "--keep", "query,param,step", "--windows", "4", "--name", "fine"]) == 0
    capsys.readouterr()
    options = ("prune", run, "--kept", "1, 0.5", "--levels", "param,module", "--spare", "decoder", "--json")
    status, text = asked(capsys, *options)
    found = json.loads(text)
    assert status == 0
    assert found["spared"] == ["decoder.weight"]
    assert [row["kl"] for row in found["rows"] if row["kept"] == 1.0] == [0.0] * 8
    assert [row["method"] for row in found["rows"][::4]] == ["credit", "magnitude", "gradient", "random"]
    assert (run / "analysis" / "pruning" / "pruning.csv").exists()
    assert "kept whole: nothing" in asked(capsys, "prune", run, "--kept", "0.5", "--methods", "credit")[1]
    assert main(["decompose", str(run), "--keep", "query,param", "--name", "other"]) == 0
    capsys.readouterr()
    assert "several ledgers" in refused(capsys, "prune", run)
    for option, words in (
        (("--kept", "2"), "not a share"),
        (("--kept", "half"), "not a share"),
        (("--methods", "size"), "unknown way to score"),
        (("--levels", "heads"), "unknown level"),
        (("--spare", "head"), "names what is not there"),
    ):
        assert words in refused(capsys, "prune", run, "--ledger", "fine", *option)
