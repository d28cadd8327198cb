"""The ledger against the slow reference, and against itself."""

from itertools import combinations

import numpy as np
import pytest
import torch
import zarr

import explaind
from explaind.kernel.sweep import Sweep
from explaind.ledger import plan
from explaind.store import schema
from tests import cases, reference
from tests.closeness import algebra, rounding, same

AXES = ("query", "output", "example", "layer", "step")


@pytest.fixture(autouse=True)
def short_blocks(monkeypatch):
    """Three steps a block, so that seven steps have two whole blocks, a partial one, and three momentum anchors."""
    cases.shorten_blocks(monkeypatch)


@pytest.fixture
def run(tmp_path):
    return cases.recorded(tmp_path / "run", case=cases.optimizer_named("adamw"))


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        cases.shorten_blocks(patch)
        run = cases.recorded(tmp_path_factory.mktemp("full") / "run", case=cases.optimizer_named("adamw"))
        return run, cases.decomposed(run)


def check_against_reference(ledger, want, view="seen"):
    scale = float(np.abs(want.full).sum((2, 3, 4, 5)).max())  # what a measure moved in all
    algebra(ledger["data"], want.data(view), "data", scale)
    algebra(ledger["decay"], want.decay(view), "decay", scale)
    algebra(ledger["momentum0"], want.momentum0, "momentum0", scale)
    algebra(ledger["path"], want.path, "path", scale)
    assert ("buffers" in ledger.rows) == bool(want.buffers.any())
    if "buffers" in ledger.rows:
        algebra(ledger["buffers"], want.buffers, "buffers", scale)
    algebra(ledger["arithmetic"], np.zeros(ledger["arithmetic"].shape), "arithmetic", scale)
    algebra(ledger["initial"], want.initial, "initial")
    algebra(ledger["final"], want.final, "final")
    assert ledger.verify().maxima["closure"] <= 1e-10


@cases.every_optimizer
def test_every_credit_of_every_optimizer_is_the_slow_and_obvious_one(case, tmp_path):
    want = reference.Slow(cases.PLAIN, case).solve()
    run = cases.recorded(tmp_path / "run", case=case)
    check_against_reference(cases.decomposed(run), want)
    check_against_reference(cases.decomposed(run, view="applied"), want, "applied")


@cases.every_problem
@pytest.mark.parametrize("products", ["materialise", "ghost", "jvp"])
def test_every_credit_of_every_training_is_the_slow_and_obvious_one(problem, products, tmp_path):
    case = cases.optimizer_named("sgd nesterov l2 maximize")
    want = reference.Slow(problem, case).solve()
    check_against_reference(cases.decomposed(cases.recorded(tmp_path / "run", problem, case), problem, products=products), want)


@pytest.mark.parametrize("problem", cases.WHOLE, ids=str)
@pytest.mark.parametrize("name", ["sgd nesterov l2 maximize", "adamw"])
@pytest.mark.parametrize("products", ["auto", "jvp"])
def test_every_credit_of_coupled_and_random_examples_is_the_slow_and_obvious_one(problem, name, products, tmp_path):
    case = cases.optimizer_named(name)
    want = reference.Slow(problem, case).solve()
    check_against_reference(cases.decomposed(cases.recorded(tmp_path / "run", problem, case), problem, products=products), want)


@pytest.mark.parametrize("name", ["sgd momentum", "adamw", "adam in groups"])
def test_a_recording_that_begins_with_momentum_credits_it(name, tmp_path):
    case = cases.optimizer_named(name)
    want = reference.Slow(cases.PLAIN, case, warm=True).solve()
    run = cases.recorded(tmp_path / "run", case=case, warm=True)
    assert np.abs(want.momentum0).max() > 0.01
    check_against_reference(cases.decomposed(run), want)


def test_both_views_are_equal_over_all_steps(run):
    seen, applied = cases.decomposed(run), cases.decomposed(run, view="applied")
    assert np.abs(seen["data"] - applied["data"]).max() > 0.01
    for row in ("data", "decay"):
        algebra(applied.sum("step")[row], seen.sum("step")[row], row, np.abs(seen[row]).sum(-1).max())


@pytest.mark.parametrize("keep", [axes for n in range(6) for axes in combinations(AXES, n)], ids=lambda axes: "+".join(axes) or "nothing")
def test_keeping_fewer_axes_gives_the_sums_of_the_full_ledger(keep, full):
    run, ledger = full
    fewer = cases.decomposed(run, keep=keep)
    want = ledger.sum(*(axis for axis in AXES if axis not in keep))
    assert fewer.axes == keep
    for row in (*want.rows, "final"):
        scale = np.abs(ledger["data"]).sum()
        algebra(fewer[row], want[row], row, scale)


def test_the_param_axis_sums_to_the_layer_axis(full):
    run, ledger = full
    fine = cases.decomposed(run, keep=("query", "output", "example", "param", "step"))
    ends = np.cumsum([layer.size for layer in run.manifest.layers])[:-1]
    for row in ("data", "decay", "momentum0", "arithmetic"):
        axis = fine.rows[row].dims.index("param")
        layers = [part.sum(axis) for part in np.split(fine[row], ends, axis)]
        algebra(np.stack(layers, axis), ledger[row], row, np.abs(ledger["data"]).max())


@pytest.mark.parametrize("view", ["seen", "applied"])
@pytest.mark.parametrize("name", ["sgd nesterov", "adamw"])
def test_gradients_on_the_way_are_those_that_come_first(name, view, tmp_path, monkeypatch):
    run = cases.recorded(tmp_path / "run", case=cases.optimizer_named(name))
    asked = {"view": view, "losses": lambda model, batch: 1.1 * cases.losses(model, batch)}  # so that there are errors, and jumps
    on_the_way = cases.decomposed(run, **asked)
    monkeypatch.setattr(Sweep, "_gradients_on_the_way", lambda *a: pytest.fail("gradients on the way"))
    monkeypatch.setattr(Sweep, "_has_room", lambda self, stretch: False)
    first = cases.decomposed(run, **asked)
    scale = np.abs(first["data"]).sum()
    assert np.abs(first["arithmetic"]).sum() > 1e-3 * scale
    for row in first.rows:
        algebra(on_the_way[row], first[row], row, scale)
    for check in ("movement", "path", "arithmetic", "by_step", "replay_error"):
        algebra(getattr(on_the_way.checks, check), getattr(first.checks, check), check, scale)


@pytest.mark.parametrize("windows", [2, 3, 7, 10])
@pytest.mark.parametrize("view", ["seen", "applied"])
def test_windows_are_sums_of_steps(windows, view, full):
    run, _ = full
    ledger, windowed = cases.decomposed(run, view=view), cases.decomposed(run, view=view, windows=windows)
    starts = np.arange(0, run.steps, windows)
    same(windowed.coords["step"], starts)
    for row in ("data", "decay", "arithmetic", "path"):
        algebra(windowed[row], np.add.reduceat(ledger[row], starts, axis=-1), row, np.abs(ledger["data"]).max())


def test_blocks_of_queries_give_the_same_ledger(full, monkeypatch):
    run, ledger = full
    monkeypatch.setattr(plan, "WORK_BYTES", 1)
    ticks = []
    blocked = cases.decomposed(run, progress=lambda done, total: ticks.append((done, total)))
    assert ticks[-1] == (3 * run.steps, 3 * run.steps)  # one block a query
    for row in ledger.rows:
        algebra(blocked[row], ledger[row], row, np.abs(ledger["data"]).max())


def test_a_float32_kernel_agrees_to_rounding(full):
    run, ledger = full
    single = cases.decomposed(run, dtype=torch.float32)
    for row in ledger.rows:
        rounding(single[row], ledger[row], row, np.abs(ledger["data"]).max())
    rounding(single.verify().closure, np.zeros((3, 2)), "closure", np.abs(ledger["final"]).max())
    assert single.verify().ok, single.verify().reasons


def test_a_float32_training_closes_and_its_rounding_is_booked_as_arithmetic(tmp_path, monkeypatch):
    monkeypatch.setattr(cases, "DTYPE", torch.float32)
    run = cases.recorded(tmp_path / "run", case=cases.optimizer_named("adamw"))
    ledger = cases.decomposed(run)
    assert run.manifest.dtype == "float32"
    verdict = ledger.verify()
    assert verdict.ok, verdict.reasons
    assert 0 < np.abs(ledger["arithmetic"]).max() < 1e-5
    assert verdict.maxima["closure"] <= 1e-10


def test_the_ledger_is_the_same_on_every_device(full, device):
    run, ledger = full
    there = cases.decomposed(run, device=device)
    for row in ledger.rows:
        algebra(there[row], ledger[row], row, np.abs(ledger["data"]).max())


@pytest.mark.parametrize("closure", ["none", "discrete-gradient"])
def test_the_discrete_gradient_empties_the_path_row_and_leaves_its_size_in_the_checks(closure, full):
    run, _ = full
    ledger = cases.decomposed(run, rule="gauss:1", closure=closure)
    plain = cases.decomposed(run, rule="gauss:1")
    assert np.abs(plain["path"]).max() > 1e-5
    algebra(ledger["path"], plain["path"] * (closure == "none"), "path", np.abs(plain["data"]).max())
    same(ledger.checks.path, plain.checks.path)
    assert ledger.verify().maxima["closure"] <= 1e-10


def test_a_saved_ledger_is_bitwise_the_one_in_memory_and_read_on_demand(run, tmp_path):
    ledger = cases.decomposed(run, save=tmp_path / "ledger")
    opened = explaind.open_ledger(tmp_path / "ledger")
    assert (opened.axes, opened.settings) == (AXES, ledger.settings)
    for name, row in {**opened.rows, "final": opened.final}.items():
        assert isinstance(row.array, zarr.Array), name
        same(row.values, ledger[name], name)
    for axis, values in ledger.coords.items():
        assert opened.coords[axis].tolist() == values.tolist()
    same(opened.verify().explained, ledger.verify().explained)
    same(opened.verify().closure, ledger.verify().closure)
    algebra(opened.sum("example", "step")["data"], ledger["data"].sum((2, 4)), "sum of a row on disk")


def test_texts_are_written_in_their_order_however_they_lie_in_memory(tmp_path):
    """What the path rule did is told by step and block, and made block by block."""
    words = np.array([["a", "b", "c"], ["d", "e", "f"]]).T.astype(np.dtypes.StringDType())
    group = zarr.create_group(tmp_path / "group")
    schema.write_array(group, "recipes", words, ("every_step", "every_block"))
    schema.write_array(group, "one", np.array(3), ())
    assert group["recipes"][...].tolist() == words.tolist()
    assert group["one"].shape == ()


def test_rows_and_axes_that_are_not_there_are_refused(full):
    _, ledger = full
    with pytest.raises(explaind.ExplaindError, match=r"no such row.*'effect'"):
        ledger["effect"]
    with pytest.raises(explaind.ExplaindError, match=r"no such axis to sum.*param"):
        ledger.sum("param")


def test_xarray_has_named_dims_and_coordinates_and_its_rows_sum_to_final(full):
    run, ledger = full
    dataset = ledger.to_xarray()
    assert dataset["data"].dims == AXES
    assert dataset["path"].dims == ("query", "output", "step")
    assert dataset["layer"].values.tolist() == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert dataset["example"].values.tolist() == list(range(8))
    assert dataset["step"].values.tolist() == list(range(7))
    rows = sum(dataset[row].sum([d for d in dataset[row].dims if d not in ("query", "output")]) for row in ledger.rows)
    algebra(rows, dataset["final"], "sum of all rows")
    assert dataset.attrs["run"] == str(run.path)


def test_example_ids_name_the_example_axis(tmp_path):
    problem = cases.Problem("few", steps=(((5, 2),), ((7,),)))
    ledger = cases.decomposed(cases.recorded(tmp_path / "run", problem), problem)
    assert ledger.coords["example"].tolist() == [2, 5, 7]
    assert not ledger["data"][:, :, 2, :, 0].any()  # example 7 was not seen at step 0
    assert ledger["data"][:, :, 2, :, 1].any()
