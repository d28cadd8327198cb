"""Figures and summaries, from a run without a task."""

import json

import numpy as np
import pytest

import explaind
from explaind.analysis.curves import training_curves
from explaind.analysis.table import Table
from explaind.config import Report
from explaind.errors import StoreError
from explaind.report import figures, report, tables
from explaind.report.summary import Labels, by_axes, strongest
from explaind.tasks import ModularArithmetic
from tests import cases


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return cases.recorded(tmp_path_factory.mktemp("report") / "run")


@pytest.fixture(scope="module")
def ledger(run):
    return cases.decomposed(run, keep=("query", "output", "example", "layer", "step"))


def test_a_run_without_a_task_is_reported_by_numbers(run, ledger, tmp_path):
    written = report(run, ledger, None, Report(predictions=1, examples=2, dpi=30), tmp_path / "out")
    assert [p.stem for p in written.files] == [
        "layers_over_steps",
        "layer_shares",
        "balance",
        "rest_rows",
        "waterfall_query0_output0",
        "examples_query0_output0",
        "ledger",
    ]
    assert written.left_out == ("training curves: the run names no task",)
    summary = json.loads((tmp_path / "out" / "ledger.json").read_text())
    first = summary["predictions"][0]
    assert first["measure"] == "query 0, output 0"
    assert sum(first["rows"].values()) == pytest.approx(float(ledger["final"][0, 0]), abs=1e-12)
    assert all(entry["label"] == f"example {entry['example']}" for entry in first["strongest"])


@pytest.mark.parametrize(
    ("keep", "missing"),
    [(("query", "layer"), ["layer × step", "strongest examples"]), (("example",), ["layer × step"]), ((), ["layer × step", "strongest"])],
)
def test_what_cannot_be_drawn_is_said(run, ledger, keep, missing, tmp_path):
    smaller = ledger.sum(*(axis for axis in ledger.axes if axis not in keep))
    left_out = report(run, smaller, None, Report(dpi=30), tmp_path / "out").left_out
    assert all(any(word in line for line in left_out) for word in missing)


def test_a_folder_that_cannot_be_written_is_one_line(run, ledger, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot write"):
        report(run, ledger, None, Report(dpi=30), tmp_path / "file" / "out")


def test_strongest_are_the_largest_for_and_against_without_doubles():
    credit = np.array([0.0, 3.0, -1.0, 2.0, -5.0, 0.5])
    assert strongest(credit, 2) == [1, 3, 2, 4]
    assert strongest(credit, 9) == [1, 3, 5, 2, 4]
    assert strongest(np.zeros(3), 2) == []


def test_rows_are_summed_to_the_axes_asked_for(ledger):
    whole = by_axes(ledger, "data", ("layer", "query"))
    order = [ledger.axes.index(axis) for axis in ("layer", "query")]
    rest = tuple(i for i in range(len(ledger.axes)) if i not in order)
    np.testing.assert_allclose(whole, ledger["data"].sum(axis=rest).T, rtol=1e-12, atol=1e-14)


def test_a_waterfall_ends_where_the_sum_does():
    axes = figures.waterfall(["initial", "data", "decay"], [1.0, 2.0, -0.5], "title", "nats").axes[0]
    last = axes.patches[-1]
    assert (last.get_x(), last.get_width()) == (0.0, 2.5)
    assert [p.get_x() for p in axes.patches[:3]] == [0.0, 1.0, 3.0]


def tables_of(**columns):
    return {name: Table(name, "", "", {c: np.array(v) for c, v in given.items()}) for name, given in columns.items()}


def test_phases_begin_at_dotted_lines_of_the_shares():
    shares = {"step": [0, 1, 2] * 2, "layer": ["a"] * 3 + ["b"] * 3, "share": [0.8, 0.2, 0.2, 0.2, 0.8, 0.8]}
    given = tables_of(layer_shares=shares, phases={"start": [0, 0, 1, 1]})
    axes = tables.drawn(given, "m")["layer_shares"].axes[0]
    assert [line.get_xdata()[0] for line in axes.lines if line.get_linestyle() == ":"] == [1]
    without = tables.drawn({"layer_shares": given["layer_shares"]}, "m")["layer_shares"].axes[0]
    assert not [line for line in without.lines if line.get_linestyle() == ":"]


def test_cosines_are_ordered_and_components_coloured_by_class():
    matrix = np.array([[1.0, 0.1, 0.9], [0.1, 1.0, 0.2], [0.9, 0.2, 1.0]])
    steps = np.repeat([0, 5], 9)
    pairs = {"query": np.tile(np.repeat([3, 4, 5], 3), 2), "other": np.tile([3, 4, 5], 6)}
    similarity = {"step": steps, "layer": ["all"] * 18, **pairs, "cosine": np.tile(matrix.reshape(-1), 2)}
    pca = {"step": [0] * 6, "component": [0, 0, 0, 1, 1, 1], "sample": [3, 4, 5] * 2, "coordinate": np.arange(6.0)}
    given = tables_of(similarity=similarity, kernel_pca=pca, classes={"query": [3, 4, 5], "class": [1, 2, 0]})
    drawn = tables.drawn(given, "m")
    panels = [axes for axes in drawn["similarity"].axes if axes.images]
    assert [axes.get_title() for axes in panels] == ["from step 0", "from step 5"]
    order = [2, 0, 1]
    np.testing.assert_array_equal(panels[0].images[0].get_array(), matrix[np.ix_(order, order)])
    points = drawn["kernel_pca"].axes[0].collections[0]
    assert points.get_array().tolist() == [1, 2, 0]
    np.testing.assert_array_equal(points.get_offsets(), [[0, 3], [1, 4], [2, 5]])
    plain = tables.drawn({name: table for name, table in given.items() if name != "classes"}, "m")
    np.testing.assert_array_equal(plain["similarity"].axes[0].images[0].get_array(), matrix)


def test_progress_frequencies_and_clock_are_drawn_from_their_tables():
    losses = ("train_loss", "val_loss", "restricted", "excluded", "restricted_difference", "excluded_difference")
    progress = {"step": [0, 9], **{name: [1.0, 0.1] for name in (*losses, "squared_weights", "gini_embedding", "gini_decoder")}}
    keys = {"frequency": [1, 2], "neurons": [0.0, 0.9], "embedding": [0.1, 0.9], "decoder": [0.1, 0.9], "key": [False, True]}
    clock = {"step": [0, 9], "distance_irrelevance": [0.9, 0.1], "gradient_symmetricity": [0.2, 0.9]}
    drawn = tables.drawn(tables_of(progress=progress, key_frequencies=keys, clock_or_pizza=clock, unknown={"x": [1]}), "m")
    assert set(drawn) == {"progress", "key_frequencies", "clock_or_pizza"}
    upper, sparse, norm = drawn["progress"].axes
    assert [line.get_label() for line in upper.lines] == [name.replace("_", " ") for name in losses]
    assert [line.get_linestyle() for line in upper.lines] == ["-"] * 4 + ["--"] * 2  # the control
    assert (upper.get_yscale(), sparse.get_yscale(), norm.get_yscale()) == ("log", "linear", "log")
    assert len(drawn["key_frequencies"].axes[0].patches) == 6 + 1  # bars, and the shade of the key frequency
    assert [line.get_ydata().tolist() for line in drawn["clock_or_pizza"].axes[0].lines] == [[0.9, 0.1], [0.2, 0.9]]
    assert tables.drawn(tables_of(progress={name: [] for name in progress}), "m") == {}


def test_labels_come_from_the_task_that_the_ledger_was_asked_with(ledger):
    task = ModularArithmetic(p=7, train_fraction=0.8)
    assert Labels(task, "val", 2, "logits").query(1) == f"val 3: {task.describe('val', 3)}"
    assert Labels.of(ledger, task).task is None  # asked from Python, with queries of the user's own


def test_curves_are_those_of_the_recorded_states(tmp_path):
    from explaind.config import read
    from explaind.tasks import load
    from explaind.tasks.training import train
    from tests.test_cli import SMALL

    config = read(SMALL)
    task = load(config.task.name, config.task.options)
    model = train(task, config, tmp_path / "run")
    curves = training_curves(explaind.open(tmp_path / "run"), task)
    batch = task.data("val").tensors
    assert curves.steps[-1] == 20
    assert curves.loss["val"][-1] == pytest.approx(float(task.losses(model, batch).detach().mean()), rel=1e-6)
    assert curves.accuracy["val"][-1] == float((task.predict(model, batch) == batch[1]).double().mean())
