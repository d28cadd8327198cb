"""Figures and summaries, from a run without a task."""

import json

import numpy as np
import pytest

import explaind
from explaind.analysis.curves import training_curves
from explaind.config import Report
from explaind.errors import StoreError
from explaind.report import figures, report
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
