"""Pruning by scores: exact facts about scores, components and what stays."""

import json
import shlex
from copy import deepcopy

import numpy as np
import pytest
import torch
from torch import nn

import explaind
from explaind.analysis.components import components
from explaind.analysis.pruning import (
    ablation,
    ablation_ranks,
    baseline_scores,
    credit_scores,
    mask,
    pruned,
    pruning_curve,
    scores_of,
    spearman,
)
from explaind.analysis.surgery import Bench
from explaind.cli import main
from explaind.config import Decompose, read
from explaind.errors import RequestError
from explaind.ledger.by_name import decompose_by_name
from explaind.store.manifest import Layer
from explaind.tasks import load
from explaind.tasks.modular import ModularArithmetic
from explaind.tasks.training import train
from tests.closeness import algebra, rounding, same
from tests.test_cli import SMALL, asked, refused

LAYERS = (
    Layer("linear.weight", (2, 3), 0, 6, 0),
    Layer("linear.bias", (2,), 6, 2, 0),
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
    assert components(LAYERS, "param").of.tolist() == list(range(13))
    assert components(LAYERS, "neuron").of.tolist() == [0, 0, 0, 1, 1, 1, 0, 1, 2, 2, 3, 3, 4]
    assert components(LAYERS, "module").of.tolist() == [0] * 8 + [1] * 4 + [2]
    assert components(LAYERS, "tensor").of.tolist() == [0] * 6 + [1] * 2 + [2] * 4 + [3]
    assert components(LAYERS, "neuron").names == ("linear[0]", "linear[1]", "conv[0]", "conv[1]", "scale[0]")
    assert components(LAYERS, "module").names == ("linear", "conv", "scale")
    with pytest.raises(RequestError, match="unknown level"):
        components(LAYERS, "layer")


class Attended(nn.Module):
    """An attention inside a model; from one sequence to another where these have sizes of their own."""

    def __init__(self, **options):
        super().__init__()
        self.inside = nn.MultiheadAttention(6, 3, batch_first=True, **options)
        self.sizes = self.inside.embed_dim, self.inside.kdim, self.inside.vdim

    def forward(self, tokens):
        return self.inside(*(tokens[..., :size] for size in self.sizes), average_attn_weights=False)[0]


MODELS = {
    "paper": lambda: ModularArithmetic(p=5, width=6, heads=3, mlp=4).model(),
    "nanda": lambda: ModularArithmetic(p=5, width=6, heads=3, mlp=4, network="nanda").model(),
    "packed": Attended,
    "apart": lambda: Attended(kdim=4, vdim=5),
    "with biases behind": lambda: Attended(add_bias_kv=True),
}


def without(model, head, x):
    """What the model makes of x when the contribution of one head is taken out by hand."""
    if isinstance(model, Attended):
        a = model.inside
        parts = [x[..., :size] for size in model.sizes]
        whole, weights = a(*parts, average_attn_weights=False)  # [batch, head, to, from]
        rows, columns = slice(12 + 2 * head, 14 + 2 * head), slice(2 * head, 2 * head + 2)
        matrix = a.v_proj_weight[columns] if a.in_proj_weight is None else a.in_proj_weight[rows]
        values = parts[2] @ matrix.T + a.in_proj_bias[rows]
        if a.bias_v is not None:
            values = torch.cat([values, a.bias_v[..., columns].expand(len(x), 1, 2)], 1)
        return whole - weights[:, head] @ values @ a.out_proj.weight[:, columns].T

    def silent(module, given):
        given[0][..., 2 * head : 2 * head + 2] = 0

    listed = hasattr(model, "heads")
    hook = model.heads[head].register_forward_hook(lambda m, g, out: out * 0) if listed else model.mix.register_forward_pre_hook(silent)
    found = model(x)
    hook.remove()
    return found


@pytest.mark.parametrize("name", MODELS)
def test_without_its_parameters_a_head_says_nothing(name):
    torch.manual_seed(0)
    model = MODELS[name]().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    x = torch.randn(2, 4, 6, dtype=torch.float64) if isinstance(model, Attended) else torch.randint(5, (2, 4 if name == "paper" else 3))
    theta = {n: p.detach().numpy().copy() for n, p in model.named_parameters()}
    starts = np.cumsum([0, *(values.size for values in theta.values())])
    layers = [Layer(n, v.shape, int(at), v.size, 0) for (n, v), at in zip(theta.items(), starts, strict=False)]
    dealt = components(layers, "head", model)
    assert dealt.names == tuple({"paper": "heads.{}", "nanda": "heads[{}]"}.get(name, "inside.heads[{}]").format(i) for i in range(3))
    assert len(set(np.bincount(dealt.of + 1)[1:])) == 1  # heads of one attention are of one size

    def at(stays):
        other = deepcopy(model)
        other.load_state_dict({n: torch.from_numpy(v) for n, v in pruned(theta, stays).items()}, strict=False)
        return other

    with torch.no_grad():
        for head in range(3):
            algebra(at(dealt.of != head)(x), without(model, head, x))
            assert np.abs((at(dealt.of != head)(x) - model(x)).numpy()).max() > 1e-3
        nothing = at(dealt.of < 0)
        if isinstance(model, Attended):
            same(nothing(x), model.inside.out_proj.bias.expand(2, 4, 6))
        elif name == "nanda":
            assert not nothing.mix.weight.any()
        else:
            assert not any(head(torch.randn(2, 4, 6, dtype=torch.float64)).any() for head in nothing.heads)


def test_heads_of_a_model_without_any_are_refused_in_one_line():
    with pytest.raises(
        RequestError, match=r"no attention heads .*expected a list .*; got linear, conv, scale; name other levels"
    ) as caught:
        components(LAYERS, "head", nn.Linear(3, 2))
    assert "\n" not in str(caught.value)


def test_scores_of_children_sum_to_their_parents():
    scores = np.random.default_rng(0).uniform(size=13)
    child = components(LAYERS, "param").of
    for level in ("neuron", "module", "tensor"):
        parent = components(LAYERS, level).of
        belongs = np.array([parent[np.flatnonzero(child == c)[0]] for c in range(child.max() + 1)])
        algebra(scores_of(scores_of(scores, child), belongs), scores_of(scores, parent))
        algebra(scores_of(scores, parent).sum(), scores.sum())
    neuron, module = components(LAYERS, "neuron").of, components(LAYERS, "module").of
    belongs = np.array([module[np.flatnonzero(neuron == c)[0]] for c in range(5)])
    algebra(scores_of(scores_of(scores, neuron), belongs), scores_of(scores, module))


@pytest.mark.parametrize("level", ["param", "neuron", "module", "tensor"])
def test_what_stays_is_as_much_as_was_asked_and_what_scores_most(level):
    scores, of, free = np.arange(13.0)[::-1].copy(), components(LAYERS, level).of, np.ones(13, dtype=bool)
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
    assert mask(np.zeros(13), components(LAYERS, "neuron").of, free, 0.0)[:8].all()


def test_ties_go_by_place():
    stays = mask(np.ones(13), components(LAYERS, "param").of, np.ones(13, dtype=bool), 0.6)
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


def test_of_the_level_head_only_heads_go(bench):
    theta = bench.run.theta(12)
    found = pruning_curve(bench, {"magnitude": baseline_scores(bench, theta, "magnitude")}, [0.5, 0.0], levels=["head"])
    inside = [name for name in theta if name.startswith(("query", "key", "value", "mix"))]
    none = {n: np.zeros_like(v) if n in inside else v for n, v in theta.items()}
    assert found["val_loss"][1] == bench.measured(none)["val_loss"]
    share = sum(theta[name].size for name in inside) / sum(v.size for v in theta.values())
    algebra(found["sparsity"], [share / 2, share])


def test_an_ablated_component_is_the_network_without_it(bench):
    theta = bench.run.theta(12)
    scores = {method: baseline_scores(bench, theta, method) for method in ("magnitude", "random")}
    told = []
    found = ablation(bench, scores, ("tensor", "head", "neuron"), spare=["decoder.weight"], progress=lambda *at: told.append(at))
    assert told == [(i + 1, len(found)) for i in range(len(found))]
    assert "decoder.weight" not in found["component"]
    whole = bench.measured(theta)
    half, fifth = np.arange(8) < 4, np.arange(8) != 5
    for component, stays in (
        ("linear2.weight", {"linear2.weight": 0}),
        ("heads[1]", {**{f"{name}.weight": half[:, None] for name in ("query", "key", "value")}, "mix.weight": half}),
        ("linear1[5]", {"linear1.weight": fifth[:, None], "linear1.bias": fifth}),
    ):
        (at,) = np.flatnonzero(found["component"] == component)
        made = {name: values * np.float32(stays.get(name, 1)) for name, values in theta.items()}
        measured = bench.measured(made)
        assert found["val_loss_change"][at] == measured["val_loss"] - whole["val_loss"]
        assert found["val_accuracy_change"][at] == measured["val_accuracy"] - whole["val_accuracy"]
        algebra(found["kl"][at], bench.divergence(theta, made))
        algebra(found["magnitude"][at], sum(np.abs(theta[n].astype(float) - made[n]).sum() for n in theta))
    with pytest.raises(RequestError, match="no component is left"):
        ablation(bench, scores, ["tensor"], spare=list(theta))


def test_rank_correlations_tell_how_well_scores_foretell_costs(bench):
    algebra(spearman(np.array([1.0, 2, 2, 4]), np.array([10.0, 20, 30, 40])), 4.5 / 22.5**0.5)  # ranks 1, 2.5, 2.5, 4
    algebra(spearman(np.array([1.0, 2, 3]), np.array([1.0, 0, -7])), -1.0)
    assert np.isnan(spearman(np.ones(3), np.arange(3.0)))
    theta = bench.run.theta(12)
    table = ablation(bench, {"magnitude": baseline_scores(bench, theta, "magnitude")}, ("tensor", "neuron"))
    ranks = ablation_ranks(table)
    assert list(zip(ranks["level"], ranks["method"], ranks["components"], strict=True)) == [
        (level, "magnitude", len(table.where(level=level))) for level in ("tensor", "neuron")
    ]
    mine = table.where(level="neuron")
    assert ranks["loss"][1] == spearman(mine["magnitude"], mine["val_loss_change"])
    assert ranks["accuracy"][1] == spearman(mine["magnitude"], -mine["val_accuracy_change"])


def test_prune_on_the_command_line(bench, capsys):
    run = bench.run.path
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
    options = ("--kept", "1", "--levels", "head", "--methods", "credit,random", "--ablate", "head,tensor")
    found = json.loads(asked(capsys, "prune", run, *options, "--json")[1])
    assert [row["level"] for row in found["rows"]] == ["head", "head"]
    assert {"heads[0]", "heads[1]", "mix.weight"} <= {row["component"] for row in found["ablation"]["rows"]}
    credit = credit_scores(explaind.open_ledger(run / "ledgers" / "fine"))
    algebra(sum(row["credit"] for row in found["ablation"]["rows"] if row["level"] == "tensor"), credit.sum())
    assert [(row["level"], row["method"]) for row in found["ablation_ranks"]["rows"]] == [
        (level, method) for level in ("head", "tensor") for method in ("credit", "random")
    ]
    assert all((run / "analysis" / "pruning" / f"{name}.csv").exists() for name in ("pruning", "ablation", "ablation_ranks"))
    assert "every component taken out alone" in asked(capsys, "prune", run, *options)[1]
    assert "kept whole: nothing" in asked(capsys, "prune", run, "--kept", "0.5", "--methods", "credit")[1]
    assert main(["decompose", str(run), "--keep", "query,param", "--name", "other"]) == 0
    capsys.readouterr()
    assert "several ledgers" in refused(capsys, "prune", run)
    for option, words in (
        (("--kept", "2"), "not a share"),
        (("--kept", "half"), "not a share"),
        (("--methods", "size"), "unknown way to score"),
        (("--levels", "heads"), "unknown level"),
        (("--ablate", "heads"), "unknown level"),
        (("--spare", "head"), "names what is not there"),
    ):
        assert words in refused(capsys, "prune", run, "--ledger", "fine", *option)


def test_the_command_that_makes_credit_by_parameter_works_as_it_is_printed(tmp_path, capsys):
    run = tmp_path / "a run"
    groups = ["--decompose.groups", '{ layer = "module" }']
    assert main(["record", str(SMALL), "--out", str(run), "--train.steps", "12", *groups]) == 0
    assert main(["decompose", str(run)]) == 0  # as `explaind run` has done
    capsys.readouterr()
    said = refused(capsys, "prune", run)
    assert "no ledger of this run gives credit by parameter" in said
    command = shlex.split(said[said.index("explaind decompose") : said.index(" makes one")])
    assert main(command[1:]) == 0
    assert len(explaind.open_ledger(run / "ledgers" / "by-param").coords["step"]) == 6
    assert main(["prune", str(run)]) == 0
