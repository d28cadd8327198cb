"""How much faster than its controls is what trains on from a transplant? Statistics of a table of ``transplant.transplants``."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from explaind.analysis.table import Table, tabulated
from explaind.errors import RequestError

FOR_EVERY_DONOR = ("random", "memorised")
"""Controls that do not depend on the donor which they are compared with."""
CONFIDENCE = 0.95


def compared(table: Table, most: int) -> Table:
    """Medians over seeds, and how many times faster a transplant is than its controls: one row a kind and donor.

    reached       share of seeds that reached the aim
    median, least, most  of steps; a seed that did not reach it counts as more than `most`, so that a median may be infinite
    faster_than_run      still / median
    faster_than_random   median of random / median; random is the same for every donor
    """
    return tabulated(
        "compared",
        "explaind: order statistics",
        "median, least and most over seeds of steps to the aim (∞ where it was not reached); with n seeds the range holds the true median "
        "with probability 1 − 2^(1−n); faster: ratio of medians",
        list(_compared(table, most)),
    )


def _compared(table: Table, most: int) -> Iterator[dict[str, Any]]:
    scratch = table.where(kind="random")
    scratch = scratch.where(donor=scratch["donor"][0]) if len(scratch) else scratch
    for kind in dict.fromkeys(table["kind"].tolist()):
        for donor in dict.fromkeys(table["donor"].tolist()):
            mine = table.where(kind=kind, donor=donor)
            if not len(mine):
                continue
            steps, chance = (np.nan_to_num(t["steps"], nan=np.inf) for t in (mine, scratch))
            median = float(np.median(steps))
            yield {
                "kind": kind,
                "donor": donor,
                "seeds": len(mine),
                "reached": float((steps <= most).mean()),
                "median": median,
                "least": float(steps.min()),
                "most": float(steps.max()),
                "faster_than_run": _ratio(float(mine["still"][0]), median),
                "faster_than_random": _ratio(float(np.median(chance)) if len(chance) else np.nan, median),
            }


def _ratio(one: float, two: float) -> float:
    if np.isnan(one) or (one == two and (two == 0 or np.isinf(two))):
        return np.nan
    return np.inf if two == 0 else one / two


def speedup(table: Table, kind: str = "transplant") -> Table:
    """How many times faster patients of one kind are than the run itself and than each control: one row a donor and control.

    Factors are taken seed by seed, so that both draw the same new layers. A training that never reached the aim took more steps than it
    was given; 0 steps against 0 steps says nothing. So each factor lies between two bounds, and so does their median.

    median, median_most  bounds of the median factor; the same number where every training arrived
    low, high            interval for the true median; `confidence` is the least probability with which it holds it

    RequestError for memorised patients of several donors: all are compared with one.
    """
    memorised = np.unique(table.where(kind="memorised")["donor"]).tolist()
    if len(memorised) > 1:
        raise RequestError(
            "memorised patients of several donors", where=table.name, expected="one donor", got=memorised, do="keep that of memorising()"
        )
    rows = []
    for donor in dict.fromkeys(table.where(kind=kind)["donor"].tolist()):
        for against in ("run", *(other for other in dict.fromkeys(table["kind"].tolist()) if other != kind)):
            factors = _factors(table, kind, donor, against)
            if not len(factors):
                continue
            rank, confidence = _order_interval(len(factors))
            least, most = np.sort(factors, axis=0).T
            row = {"median": np.median(least), "median_most": np.median(most), "low": least[rank], "high": most[-1 - rank]}
            rows.append({"donor": donor, "against": against, "seeds": len(factors), **row, "confidence": confidence})
    return tabulated(
        "speedup",
        "David and Nagaraja, Order Statistics, 3rd edition, section 7.1",
        f"steps of the run itself, or of a control, / steps of {kind}, for the same seed; low … high: order statistics X(k) … X(n+1−k), "
        f"which hold the median with probability 1 − 2 P(Binomial(n, ½) < k); k = the largest for {CONFIDENCE:.0%}, or 1",
        rows,
    )


def _factors(table: Table, kind: str, donor: int, against: str) -> np.ndarray:
    """Bounds of the factor for every seed that both have: [seed, 2]."""
    mine, found = table.where(kind=kind, donor=donor), []
    for row, seed in enumerate(mine["seed"].tolist()):
        if against == "run":
            still = float(mine["still"][row])
            other = (0.0, np.inf) if np.isnan(still) else (still, still)
        else:
            where: dict[str, Any] = {} if against in FOR_EVERY_DONOR else {"donor": donor}
            controls = table.where(kind=against, seed=seed, **where)
            if not len(controls):
                continue
            other = _bounds(controls, 0)
        own = _bounds(mine, row)
        least = 0.0 if other[0] == 0 or own[1] == np.inf else _ratio(other[0], own[1])
        most = np.inf if own[0] == 0 or other[1] == np.inf else _ratio(other[1], own[0])
        found.append((least, most))
    return np.array(found).reshape(-1, 2)


def _bounds(table: Table, row: int) -> tuple[float, float]:
    """The steps that a training needs: more than it took where it did not arrive."""
    steps = float(table["steps"][row])
    return (float(table["taken"][row]), np.inf) if np.isnan(steps) else (steps, steps)


def _order_interval(count: int) -> tuple[int, float]:
    """(k − 1, confidence) of the narrowest pair of order statistics around the median with the confidence wanted, or of the widest."""
    below = [sum(math.comb(count, i) for i in range(k)) / 2**count for k in range(1, count // 2 + 1)] or [0.5]
    enough = [place for place, tail in enumerate(below) if 1 - 2 * tail >= CONFIDENCE] or [0]
    return enough[-1], 1 - 2 * below[enough[-1]]
