"""Analyses of ledgers, against sums by hand and closed forms."""

import csv

import numpy as np
import pytest

import explaind
from explaind.analysis import phases as of_phases
from explaind.analysis import similarity as of_similarity
from explaind.analysis.applied import window_scores
from explaind.analysis.credit import absolute, balance, example_scores, layer_shares, net, sampling_error, step_scores
from explaind.analysis.table import Table, stacked
from explaind.errors import RequestError
from tests import cases
from tests.closeness import algebra, same

KEEP = ("query", "output", "example", "layer", "step")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return cases.recorded(tmp_path_factory.mktemp("analysis") / "run", case=cases.optimizer_named("adamw"))


@pytest.fixture(scope="module", params=["in memory", "on disk"])
def ledger(run, tmp_path_factory, request):
    path = tmp_path_factory.mktemp("ledger") / "ledger"
    made = cases.decomposed(run, view="applied", windows=2, save=path)
    return made if request.param == "in memory" else explaind.open_ledger(path)


def table(**columns):
    return Table("t", "", "", {name: np.array(values) for name, values in columns.items()})


@pytest.mark.parametrize("axes", [(), ("layer",), ("step", "example"), KEEP])
def test_sums_over_axes_with_and_without_signs(axes, ledger, monkeypatch):
    monkeypatch.setattr("explaind.analysis.credit.READ_BYTES", 1000)
    gone = tuple(d for d, axis in enumerate(KEEP) if axis not in axes)
    algebra(net(ledger.rows["data"], axes), ledger["data"].sum(gone))
    algebra(absolute(ledger.rows["data"], axes), np.abs(ledger["data"]).sum(gone))
    algebra(absolute(ledger.rows["initial"], ("output",)), np.abs(ledger["initial"]).sum(0))


def test_layer_shares_are_those_of_the_sizes_of_credit_and_sum_to_one(ledger):
    found = layer_shares(ledger)
    steps, layers, shares = found.grid("step", "layer", "share")
    assert steps.tolist() == [0, 2, 4, 6]
    assert layers.tolist() == ledger.coords["layer"].tolist()
    size = np.abs(ledger["data"]).sum((0, 1, 2)).T
    algebra(shares, size / size.sum(1, keepdims=True))
    algebra(shares.sum(1), np.ones(4))
    algebra(found.grid("step", "layer", "net")[2], ledger["data"].sum((0, 1, 2)).T)
    assert "summed before" not in found.formula
    assert layer_shares(ledger.sum("example")).formula.endswith("summed before sizes were taken: example")


@pytest.mark.parametrize("view", ["seen", "applied"])
def test_tables_over_steps_name_the_view_that_they_are_of(run, view):
    ledger = cases.decomposed(run, view=view, windows=4)
    assert all(f"view {view}" in analysis(ledger).formula for analysis in (layer_shares, balance, step_scores))
    assert "view" not in example_scores(ledger).formula


def test_shares_of_a_sample_are_of_its_examples_alone_and_its_halves_tell_how_far_off(ledger):
    places = np.array([1, 4, 5, 7])
    shares = layer_shares(ledger, places).grid("step", "layer", "share")[2]
    size = np.abs(ledger["data"])[:, :, places].sum((0, 1))  # [example, layer, step]
    algebra(shares, (size.sum(0) / size.sum((0, 1))).T)
    same(layer_shares(ledger, places)["net"], layer_shares(ledger)["net"])
    errors = sampling_error(ledger, places, splits=400).grid("step", "layer", "error")[2]
    halves = [(one, [p for p in range(4) if p not in one]) for one in ([0, 1], [0, 2], [0, 3])]
    of = [[size[h].sum(0) / size[h].sum((0, 1)) for h in pair] for pair in halves]
    want = np.sqrt(np.mean([np.square((one - other) / 2) for one, other in of], axis=0)).T
    assert np.abs(errors / want - 1).max() < 0.3  # 400 of the splits, of which there are three kinds
    with pytest.raises(RequestError, match="keep=…,example"):
        layer_shares(ledger.sum("example"), places)


def test_shares_of_a_window_in_which_nothing_moved_are_zero(ledger):
    still = ledger.rows["data"].values.copy()
    still[..., 1] = 0.0
    rows = {**ledger.rows, "data": explaind.ledger.ledger.Row(KEEP, still)}
    shares = layer_shares(explaind.Ledger(rows, ledger.coords, ledger.final, ledger.settings, ledger.checks))
    assert shares.where(step=2)["share"].tolist() == [0.0] * 4


def test_the_balance_is_data_less_decay_per_measure(ledger):
    found = balance(ledger)
    want = (ledger["data"].sum(2) - ledger["decay"]).mean((0, 1))
    algebra(found.grid("layer", "step", "balance")[2], want, scale=1.0)
    assert np.abs(found["decay"]).max() > 1e-4


@pytest.mark.parametrize(("scores", "axis"), [(step_scores, "step"), (example_scores, "example")])
def test_scores_keep_their_signs(scores, axis, ledger):
    found = scores(ledger)
    data = np.moveaxis(ledger["data"], KEEP.index(axis), -1).reshape(-1, len(ledger.coords[axis])) / 6  # measures
    same(found[axis], ledger.coords[axis])
    algebra(found["net"], data.sum(0))
    algebra(found["absolute"], np.abs(data).sum(0))
    algebra(found["raised"], np.maximum(data, 0).sum(0))
    algebra(found["lowered"], np.minimum(data, 0).sum(0))


def test_an_analysis_names_the_axis_that_it_lacks(ledger):
    with pytest.raises(RequestError, match=r"lacks an axis.*keep=…,layer"):
        layer_shares(ledger.sum("layer"))
    with pytest.raises(RequestError, match="keep=query,param,step"):
        of_similarity.score_vectors(ledger)


def test_similarity_is_the_cosine_of_credit_by_parameter(run):
    layers = run.manifest.layers
    ledger = cases.decomposed(run, keep=("query", "param", "step"), windows=4)
    found = of_similarity.similarity(ledger, layers, {"first": ["0.weight", "0.bias"]}, steps=[4])
    assert set(found["layer"]) == {"first", "all"}
    assert set(found["step"]) == {4}
    scores = ledger["data"][:, :16, 1]
    want = scores @ scores.T / np.outer(*[np.linalg.norm(scores, axis=1)] * 2)
    algebra(found.where(layer="first").grid("query", "other", "cosine")[2], want)
    assert set(of_similarity.similarity(ledger.sum("step"), layers)["layer"]) == {*(x.name for x in layers), "all"}
    with pytest.raises(RequestError, match="no window begins"):
        of_similarity.similarity(ledger, layers, steps=[3])
    same(of_similarity.cosines(np.array([[1.0, 0.0], [0.0, 0.0], [-2.0, 0.0]])), np.array([[1.0, 0, -1], [0, 0, 0], [-1, 0, 1]]))


def test_scores_of_single_windows_are_those_of_the_applied_ledger(run):
    ledger = cases.decomposed(run, keep=("query", "param", "step"), view="applied", windows=2)
    found = window_scores(
        run,
        cases.mlp(),
        [(2, 4), (6, 7)],
        data=cases.DATA,
        losses=cases.losses,
        queries=cases.QUERIES,
        measure=cases.measure,
        rule="gauss:4",
    )
    want = (ledger["data"] + ledger["arithmetic"])[..., [1, 3]]
    assert found.starts.tolist() == [2, 6]
    algebra(found.scores, np.moveaxis(want, -1, 0))
    missed = ledger.checks.by_step[[2, 3, 6]].sum(0)
    algebra(found.missed, missed[1] / missed[0], scale=1.0)
    table = of_similarity.similarity_of(found.starts, found.scores, ledger.coords["query"], run.manifest.layers)
    algebra(table.where(step=6, layer="all")["cosine"], of_similarity.cosines(want[..., 1]).reshape(-1))


def test_scores_of_windows_refuse_coupled_decay_and_steps_that_are_not_there(tmp_path):
    run = cases.recorded(tmp_path / "run", case=cases.optimizer_named("adam l2"))
    asked = {"data": cases.DATA, "losses": cases.losses, "queries": cases.QUERIES, "measure": cases.measure}
    with pytest.raises(RequestError, match=r"no such window.*<= 7; got \(6, 8\)"):
        window_scores(run, cases.mlp(), [(6, 8)], **asked)
    with pytest.raises(RequestError, match="decay of this run went through the gradient"):
        window_scores(run, cases.mlp(), [(0, 1)], **asked)


def waves(classes, p, *frequencies):
    angle = 2 * np.pi * (classes[:, None] - classes[None, :]) / p
    return sum(np.cos(k * angle) for k in frequencies)


def test_the_spectrum_of_a_wave_is_its_frequency():
    p = 11
    classes = np.arange(2 * p) % p  # two samples of each class, so that only pairs of one sample with itself are missing
    power = of_similarity.spectrum(0.5 * waves(classes, p, 3), classes, p)
    assert power.argmax() == 2
    assert abs(power[2] - 0.5) < 0.05
    assert np.abs(np.delete(power, 2)).max() < 0.05


def test_frequencies_agree_where_they_are_and_not_elsewhere():
    p, generator = 13, np.random.default_rng(0)
    classes = generator.integers(0, p, 40)
    matrix = waves(classes, p, 2, 5) + generator.normal(size=(40, 40))
    right, wrong = (of_similarity.agreement(matrix, classes, p, keys, shuffles=199) for keys in ((2, 5), (1, 4)))
    assert right["p_value"][0] == 1 / 200
    assert wrong["p_value"][0] > 0.2
    assert right["excess"][0] > 0.5 > 0 > wrong["excess"][0]
    for keys in ((), (0,), (7,), (1, 2, 3, 4, 5, 6)):
        with pytest.raises(RequestError, match="no frequencies to compare"):
            of_similarity.agreement(matrix, classes, p, keys)


def test_kernel_pca_of_a_linear_kernel_is_pca():
    points = np.random.default_rng(1).normal(size=(9, 3)) * [3.0, 2.0, 0.5]
    found = of_similarity.kernel_pca(points @ points.T, np.arange(9), components=3)
    centred = points - points.mean(0)
    _, singular, axes = np.linalg.svd(centred)
    _, _, coordinates = found.grid("component", "sample", "coordinate")
    algebra(np.abs(coordinates), np.abs(axes @ centred.T))
    algebra(found.grid("component", "sample", "variance")[2][:, 0], singular**2 / (singular**2).sum())


def steps_of(*means):
    return np.concatenate([np.full((length, 2), [mean, 1 - mean]) for length, mean in means])


def shares_of(signal, width=50):
    steps, layers = np.arange(len(signal)) * width, ("one", "two")
    return table(step=np.tile(steps, 2), layer=np.repeat(layers, len(steps)), share=signal.T.reshape(-1))


def test_change_points_are_where_the_mean_jumps():
    noise = np.random.default_rng(2).normal(size=(40, 2)) * 0.02
    signal = steps_of((10, 0.8), (18, 0.4), (12, 0.6)) + noise
    assert of_phases.change_points(signal) == [10, 28]
    assert of_phases.change_points(signal, phases=2) == [10]
    assert of_phases.change_points(noise) == []
    assert of_phases.change_points(steps_of((10, 0.8))) == []
    assert of_phases.change_points(signal[:3]) == []


@pytest.mark.parametrize("offset", [0.0, 1e3])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_change_points_of_steps_without_noise_are_the_steps(scale, offset):
    for means in ((0.8, 0.4, 0.6), (0.1, 0.7, 0.3)):
        signal = scale * (offset + steps_of(*((8, mean) for mean in means)))
        assert of_phases.change_points(signal) == [8, 16]


def test_phases_hold_the_means_of_the_shares():
    found = of_phases.phases(shares_of(steps_of((4, 0.75), (6, 0.25))), 2)
    assert found["start"].tolist() == [0, 0, 200, 200]
    assert found["stop"].tolist() == [200, 200, 450, 450]
    algebra(found["mean"], np.array([0.75, 0.25, 0.25, 0.75]))
    assert of_phases.boundaries(found).tolist() == [200]


def test_trainings_agree_on_phases_that_begin_at_one_share_of_them():
    alike = [of_phases.phases(shares_of(steps_of((4 * n, 0.8), (6 * n, 0.3), (5 * n, 0.6))), 3) for n in (1, 2, 3)]
    lengths = [750, 1500, 2250]
    found = of_phases.agreement(alike, lengths)
    algebra(found["mean"], np.array([200 / 750, 500 / 750]))
    assert found["sd"].max() < 1e-12
    assert found["p_value"][0] == 1 / 1000
    apart = [of_phases.phases(shares_of(steps_of((a, 0.8), (15 - a, 0.3))), 2) for a in (2, 8, 13)]
    assert of_phases.agreement(apart, [750] * 3)["p_value"][0] > 0.2
    with pytest.raises(RequestError, match="equally many phases"):
        of_phases.agreement([alike[0], apart[0]], [750, 750])


def test_tables_are_written_with_all_their_digits(tmp_path):
    made = stacked([table(x=[1 / 3], y=["a"]), table(x=[1e-300, -0.0], y=["b", "c, d"])], seed=(0, 7))
    path = made.write(tmp_path / "new")
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["seed"] for row in rows] == ["0", "7", "7"]
    same(np.array([float(row["x"]) for row in rows]), made["x"])
    assert [row["y"] for row in rows] == ["a", "b", "c, d"]
    assert made.where(seed=7, y="b")["x"].tolist() == [1e-300]
    assert made.about()["columns"] == ["seed", "x", "y"]


def test_tables_refuse_what_they_cannot_be():
    with pytest.raises(RequestError, match="differ in length"):
        table(x=[1], y=[1, 2])
    with pytest.raises(RequestError, match="no such column"):
        table(x=[1])["y"]
    with pytest.raises(RequestError, match="do not make a grid"):
        table(x=[1, 1], y=[2, 2], z=[0, 0]).grid("x", "y", "z")
