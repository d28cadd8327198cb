"""Statistics of trainings from transplants and their controls."""

import numpy as np
import pytest

from explaind.analysis import speedup as of_speedup
from explaind.analysis.speedup import compared, speedup
from explaind.analysis.table import Table
from explaind.errors import RequestError


def test_medians_count_those_that_never_arrived():
    kinds = ["transplant"] * 3 + ["random"] * 3
    steps = np.array([10.0, 20.0, 60.0, 100.0, np.nan, 80.0])
    table = Table("t", "", "", {"kind": np.array(kinds), "donor": np.full(6, 500), "steps": steps, "still": np.full(6, 300.0)})
    found = compared(table, 200)
    assert found["median"].tolist() == [20.0, 100.0]
    assert found["most"].tolist() == [60.0, np.inf]
    assert found["reached"].tolist() == [1.0, 2 / 3]
    assert found["faster_than_run"].tolist() == [15.0, 3.0]
    assert found["faster_than_random"].tolist() == [5.0, 1.0]
    assert of_speedup._ratio(np.inf, 5.0) == np.inf
    assert np.isnan(of_speedup._ratio(0.0, 0.0))
    assert of_speedup._ratio(5.0, np.inf) == 0.0


def outcomes(**kinds):
    """A table of trainings of donor 500: {kind: steps by seed}, NaN where one did not arrive in 200."""
    rows = [(kind, seed, steps) for kind, found in kinds.items() for seed, steps in enumerate(found)]
    names, seeds, steps = (np.array(column) for column in zip(*rows, strict=True))
    taken = np.nan_to_num(steps, nan=200.0)
    donor, still = np.full(len(rows), 500), np.full(len(rows), 300.0)
    return Table("t", "", "", {"kind": names, "donor": donor, "seed": seeds, "steps": steps, "taken": taken, "still": still})


def test_factors_are_taken_seed_by_seed_and_have_an_interval():
    table = outcomes(transplant=[10.0, 20.0, 40.0, 50.0, 100.0], random=[100.0, np.nan, 80.0, 100.0, 50.0])
    found = speedup(table)
    rows = {against: {name: found[name][i] for name in found.columns} for i, against in enumerate(found["against"].tolist())}
    assert rows["run"]["median"] == rows["run"]["median_most"] == 300 / 40
    assert (rows["run"]["low"], rows["run"]["high"]) == (3.0, 30.0)
    # 10, at least 10, 2, 2, 0.5
    assert (rows["random"]["median"], rows["random"]["median_most"]) == (2.0, 2.0)
    assert (rows["random"]["low"], rows["random"]["high"]) == (0.5, np.inf)
    assert found["confidence"].tolist() == [1 - 2 / 32] * 2


def test_a_memorised_donor_is_one_and_compared_by_seed_with_all():
    table = outcomes(transplant=[20.0, 40.0], random=[60.0, 80.0], memorised=[40.0, 20.0])
    apart = Table("t", "", "", {**table.columns, "donor": np.where(table["kind"] == "memorised", 300, 500)})
    row = speedup(apart)["against"].tolist().index("memorised")
    assert [speedup(apart)[name][row] for name in ("low", "high")] == [0.5, 2.0]
    assert compared(apart, 200).where(kind="memorised")["faster_than_random"].tolist() == [70 / 30]
    several = Table("t", "", "", {**apart.columns, "donor": apart["donor"] + np.array([0, 0, 0, 0, 0, 1])})
    with pytest.raises(RequestError, match=r"several donors.*got \[300, 301\]"):
        speedup(several)


def test_more_seeds_make_a_narrower_interval():
    found = speedup(outcomes(transplant=[float(n) for n in range(1, 11)], random=[60.0] * 10))
    row = found["against"].tolist().index("random")
    assert found["confidence"][row] == pytest.approx(0.978515625)  # the second and the ninth of ten: 1 − 2 (1 + 10) / 1024
    assert (found["low"][row], found["high"][row]) == (60 / 9, 60 / 2)
    assert found["median"][row] == np.median(60 / np.arange(1, 11))
