"""Neurons that no measure of a query goes through are left out of its products, which changes none of them."""

import pytest
import torch

from explaind.kernel import contracting
from explaind.kernel.idle import used
from tests.cases import normal
from tests.closeness import algebra
from tests.test_products import Asked

ROWS = 96
TAKEN_APART = ["linear", "linear, many positions", "conv1d strided, padded, dilated", "conv2d", "conv3d", "embedding", "bare parameters"]


def with_idle_neurons(layout):
    """Rows of a in three runs, each of which leaves out other rows and columns of every matrix; the last leaves out everything."""
    a = normal(ROWS, layout.params, seed=3)
    for shape, columns in zip(layout.shapes, layout.split(a).values(), strict=True):
        if len(shape) < 2:
            continue
        matrix = columns.view(ROWS, shape[0], -1)
        matrix[:40, 0], matrix[40:72, 1:] = 0, 0
        matrix[:40, :, ::2] = 0
        matrix[72:] = 0
    return a


@pytest.mark.parametrize("finest", ["layer", "none"])
@pytest.mark.parametrize("route", ["ghost", "materialise"])
@pytest.mark.parametrize("name", TAKEN_APART)
def test_products_are_those_of_the_whole_matrices(name, route, finest):
    asked = Asked(name)
    a = with_idle_neurons(asked.layout)
    want = asked.slow(a)
    algebra(asked.products(finest, route, a), want if finest == "layer" else want.sum(0, keepdim=True))


@pytest.mark.parametrize("idle", [True, False])
@pytest.mark.parametrize("name", TAKEN_APART)
def test_blocks_of_gradients_add_up(name, idle, monkeypatch):
    """Of a few rows of a gradient, and of a few examples, at once."""
    for limit, value in {"BLOCK": 30, "DEEP": 2, "LINE": 2}.items():
        monkeypatch.setattr(contracting, limit, value)
    asked = Asked(name)
    a = with_idle_neurons(asked.layout) if idle else normal(ROWS, asked.layout.params, seed=4)
    algebra(asked.products("layer", "materialise", a), asked.slow(a))


def test_rows_of_results_begin_at_whole_lines():
    made = contracting.in_lines(torch.ones(1), 3, 5, 37)
    assert made.shape == (3, 5, 37)
    assert made.stride() == (5 * 48, 48, 1)
    assert not made.any()
    assert contracting.in_lines(torch.ones(1), 3, 5, 7).is_contiguous()  # little would take much


def parts(found):
    return [((u.rows.start, u.rows.stop), u.outs.tolist(), u.ins.tolist()) for u in found]


def test_runs_of_rows_are_told_apart():
    a = torch.zeros(80, 5, 4)
    a[:40, 1:3, ::2] = 1
    a[40:, 4, 3] = 1e-45  # the smallest number there is counts
    assert parts(used(a)) == [((0, 40), [1, 2], [0, 2]), ((40, 80), [4], [3])]


def test_runs_that_differ_little_are_multiplied_together():
    a = torch.zeros(80, 50, 4)
    a[:40, :20], a[40:, :21] = 1, 1
    assert parts(used(a)) == [((0, 80), list(range(21)), [0, 1, 2, 3])]


def test_rows_that_all_differ_are_taken_together():
    a = torch.zeros(80, 100, 2)
    a[torch.arange(80), torch.arange(80)] = 1
    assert parts(used(a)) == [((0, 80), list(range(80)), [0, 1])]


def test_what_is_full_is_multiplied_whole():
    a = normal(80, 50, 3, seed=1)
    a[:, :4] = 0
    assert used(a) == []
    a[:, :10] = 0
    assert parts(used(a)) == [((0, 80), list(range(10, 50)), [0, 1, 2])]


def test_no_rows_use_nothing():
    assert used(torch.zeros(0, 5, 4)) == []


def test_a_number_that_is_not_one_is_used():
    a = torch.zeros(80, 5, 4)
    a[:, 2, 1] = torch.nan
    assert parts(used(a)) == [((0, 80), [2], [1])]
