"""Processes that are stopped, and what they leave: for the tests of decompositions that go on."""

from dataclasses import fields

import pytest

from explaind.kernel.sweep import Sweep
from explaind.ledger import parts
from explaind.ledger.ledger import Checks
from tests import cases
from tests.closeness import same

ONE_QUERY = 2 * 8 * (6 * 26 + 4 * 8)
"""Bytes that the plan allows a query of ``cases.mlp``: 2 outputs, 26 parameters in 4 layers, 8 examples, float64."""


def save_at_every_segment(patch):
    """Seven steps in three segments; a sweep is saved between any two."""
    cases.shorten_blocks(patch)
    patch.setattr(parts, "SECONDS", 0.0)
    patch.setattr(parts, "PATIENCE", 0.0)


def steps_swept(patch):
    """A list that every step which is swept is put into."""
    steps, step = [], Sweep._step
    patch.setattr(Sweep, "_step", lambda self, at, *rest, **named: steps.append(at.index) or step(self, at, *rest, **named))
    return steps


def recorded(folder):
    """A run for these tests."""
    with pytest.MonkeyPatch.context() as patch:
        cases.shorten_blocks(patch)
        return cases.recorded(folder / "run", case=cases.optimizer_named("adamw"))


class Killed(Exception):
    """Stands for the end of the process."""


def kill_at(last):
    def progress(done, total):
        if done >= last:
            raise Killed

    return progress


def same_ledger(got, want):
    for row in (*want.rows, "final"):
        same(got[row], want[row], row)
    for f in fields(Checks):
        if f.name in ("dims", "layers", "doubts"):
            assert getattr(got.checks, f.name) == getattr(want.checks, f.name)
        else:
            same(getattr(got.checks, f.name), getattr(want.checks, f.name), f.name)
    for axis, values in want.coords.items():
        assert got.coords[axis].tolist() == values.tolist()


def nothing_but(path):
    """The ledger stands alone in its folder."""
    assert [p.name for p in path.parent.iterdir()] == [path.name]
