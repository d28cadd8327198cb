"""Members of an axis told together: the sums of the whole ledger, and less work."""

import numpy as np
import pytest
import torch
from torch import nn

import explaind
from explaind.errors import RequestError
from explaind.kernel import products
from explaind.kernel.groups import grouping
from tests import cases
from tests.closeness import algebra, same

KEEP = ("query", "output", "example", "layer", "step")
OF = {
    "query": {"even": [0, 2], "odd": [1]},
    "output": {"both": [0, 1]},
    "example": {"low": [0, 1, 2, 3], "five": torch.tensor([5])},
    "layer": {"first": ["0.*"], "out": ["2.weight", "2.bias"]},
}
NAMES = {"query": ["even", "odd"], "output": ["both"], "example": ["low", "five", "rest"], "layer": ["first", "out"]}
PLACES = {"query": [0, 1, 0], "output": [0, 0], "example": [0, 0, 0, 0, 2, 1, 2, 2], "layer": [0, 0, 1, 1]}


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        cases.shorten_blocks(patch)
        run = cases.recorded(tmp_path_factory.mktemp("full") / "run", case=cases.optimizer_named("adamw"))
        return run, cases.decomposed(run, rule="secant"), cases.decomposed(run, rule="secant", view="applied", windows=2)


def summed(row, axes):
    """A row of the whole ledger with its members summed by group."""
    values = row.values
    for axis in axes:
        if axis in row.dims:
            d = row.dims.index(axis)
            members = [np.flatnonzero(np.array(PLACES[axis]) == group) for group in range(len(NAMES[axis]))]
            values = np.stack([values.take(places, d).sum(d) for places in members], d)
    return values


def check(found, whole, axes):
    scale = np.abs(whole["data"]).sum()
    for axis in KEEP:
        assert found.coords[axis].tolist() == (NAMES[axis] if axis in axes else whole.coords[axis].tolist())
    for name in (*whole.rows, "final"):
        want = summed(whole.final if name == "final" else whole.rows[name], axes)
        algebra(found[name], want, name, scale)
    assert found.verify().maxima["closure"] <= 1e-10


@pytest.mark.parametrize("axes", [*((axis,) for axis in OF), tuple(OF)], ids="+".join)
def test_groups_are_sums_of_the_whole_ledger(axes, full):
    run, whole, applied = full
    groups = {axis: OF[axis] for axis in axes}
    check(cases.decomposed(run, rule="secant", groups=groups), whole, axes)
    check(cases.decomposed(run, rule="secant", groups=groups, view="applied", windows=2), applied, axes)


@pytest.mark.parametrize("route", ["auto", "materialise", "ghost", "jvp"])
@pytest.mark.parametrize("axes", [("example",), ("layer",), ("example", "layer")], ids="+".join)
def test_every_route_books_groups(axes, route, full):
    run, whole, _ = full
    check(cases.decomposed(run, rule="secant", groups={axis: OF[axis] for axis in axes}, products=route), whole, axes)


def coupled(model, batch):
    """Each loss depends on the other examples of its batch."""
    values = cases.losses(model, batch)
    return values + 0.1 * (values - values.mean()) ** 2


@pytest.mark.parametrize("losses", [cases.losses, coupled])
@pytest.mark.parametrize("fine", ["layer", "param"])
def test_gradients_of_a_group_are_summed_first_where_that_is_less_work(losses, fine, tmp_path, monkeypatch):
    run = cases.recorded(tmp_path / "run", cases.Problem("pairs", steps=(((0, 1, 2, 3),), ((4, 5), (6, 1, 1)), ((7, 0, 5),))))
    keep, groups = ("query", "example", fine), {"example": {"all": range(8)}}
    alone = products.Products.__call__
    monkeypatch.setattr(products.Products, "__call__", lambda *a: pytest.fail("products of single examples"))
    monkeypatch.setattr(products, "CALLS", 0)  # so that small models count as large ones
    first = cases.decomposed(run, rule="secant", keep=keep, groups=groups, losses=losses)
    monkeypatch.setattr(products.Products, "__call__", alone)
    monkeypatch.setattr(products.Products, "_crowded", lambda self, part, a, groups, members: groups[:0])
    keep = ("query", "example", "layer")  # coupled examples have no products with single parameters
    later = cases.decomposed(run, rule="secant", keep=keep, losses=losses)
    data = first["data"]
    if fine == "param":
        data = np.stack([part.sum(-1) for part in np.split(data, np.cumsum([x.size for x in run.manifest.layers])[:-1], -1)], -1)
    algebra(data[:, 0], later["data"].sum(1), "data", np.abs(later["data"]).sum())


def test_few_examples_a_group_are_multiplied_one_by_one(full, monkeypatch):
    run, whole, _ = full
    monkeypatch.setattr(products.Products, "_of_groups", lambda *a: pytest.fail("gradients of groups"))
    check(cases.decomposed(run, rule="secant", groups={"example": OF["example"]}), whole, ("example",))


def test_a_grouped_ledger_is_saved_with_its_groups_and_goes_on_only_with_the_same(full, tmp_path):
    run, whole, _ = full
    groups = {"example": OF["example"], "layer": OF["layer"]}
    ledger = cases.decomposed(run, rule="secant", groups=groups, save=tmp_path / "ledger")
    again = explaind.open_ledger(tmp_path / "ledger")
    check(again, whole, ("example", "layer"))
    assert again.settings["groups"] == {"example": {"low": [0, 1, 2, 3], "five": [5]}, "layer": OF["layer"]}
    same(again["data"], ledger["data"])
    assert again.sum("example").axes == ("query", "output", "layer", "step")


@pytest.mark.parametrize(
    ("groups", "keep", "message"),
    [
        ({"steps": {"a": [0]}}, KEEP, "cannot be grouped; expected query, output, example, layer; got 'steps'"),
        ({"step": {"a": [0]}}, KEEP, "give windows for steps"),
        ({"layer": {"a": ["0.*"]}}, ("query", "example"), "not kept; got 'layer'; add 'layer' to keep"),
        ({"layer": {}}, KEEP, "groups are named"),
        (
            {"layer": {"a": ["0.*"], "b": ["*.bias"]}},
            KEEP,
            "a member is in two groups (groups of layer); expected each in one group; got '0.bias'",
        ),
        ({"layer": {"a": ["0.wait"]}}, KEEP, "names what is not there (groups of layer: 'a'); expected 0.weight; got '0.wait'"),
        ({"example": {"a": [99]}}, KEEP, "names what is not there (groups of example: 'a')"),
        ({"example": {"a": []}}, KEEP, "a group has no members"),
        ({"example": {"a": 3}}, KEEP, "a group has no members"),
    ],
)
def test_groups_that_cannot_be_are_refused_before_any_work(groups, keep, message, full, tmp_path):
    with pytest.raises(RequestError) as refused:
        cases.decomposed(full[0], keep=keep, groups=groups, save=tmp_path / "ledger")
    assert message in str(refused.value)
    assert not list(tmp_path.iterdir())


def test_what_is_in_no_group_is_the_rest():
    found = grouping("example", {"rest": [3], "other": [4]}, [3, 4, 5])
    assert found.names == ("rest", "other")
    assert found.of.tolist() == [0, 1, 0]
    assert grouping("layer", {"all": "*"}, ["a", "b"]).names == ("all",)
    same(grouping("query", {"x": [1]}, [0, 1, 2]).sums(torch.zeros(1)), torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0]]))


def test_groups_of_more_modules_than_one_level():
    names = [name for name, _ in nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2))).named_parameters()]
    assert grouping("layer", {"deep": ["1.*"], "first": ["0.*"]}, names).of.tolist() == [1, 1, 0, 0]
