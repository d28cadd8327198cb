"""Gradients of single examples that the training itself has stored: they are those that are computed afterwards, and so is the ledger."""

import pytest

from tests import cases
from tests.closeness import algebra

ALL = ("query", "output", "example", "layer", "step")
ADAMW = cases.optimizer_named("adamw")


def stored(path, problem=cases.PLAIN, case=ADAMW, **options):
    return cases.recorded(path, problem, case, gradients="store", **options)


def from_store(run, problem=cases.PLAIN, **options):
    """A ledger without data and losses."""
    return cases.decomposed(run, problem, data=None, losses=None, **options)


def alike(got, want, how=algebra):
    scale = max(float(abs(want["data"]).max()), float(abs(want["initial"]).max()))
    for row in want.rows:
        how(got[row], want[row], row, scale)


@cases.every_problem
def test_the_ledger_from_the_store_is_the_one_that_is_recomputed(problem, tmp_path):
    run = stored(tmp_path / "run", problem)
    got, want = from_store(run, problem), cases.decomposed(run, problem, products="materialise")
    alike(got, want)
    assert got.verify().ok
    assert run.damage() == []


@pytest.mark.parametrize("problem", cases.WHOLE, ids=str)
def test_examples_that_only_their_batch_has_a_gradient_of(problem, tmp_path):
    options = {} if problem.network is cases.dropping else {"losses": cases.losses, "data": cases.DATA}
    run = stored(tmp_path / "run", problem, **options)
    alike(from_store(run, problem), cases.decomposed(run, problem))
