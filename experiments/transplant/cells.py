"""The tables of the README, as Markdown: a row a donor step, a cell a kind of patient."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from explaind.analysis.table import Table, markdown

KNOWING = 0.5
"""Training accuracy from which a donor counts in the sums over donors: before, there is nothing in it to transplant."""


def steps(values: np.ndarray) -> str:
    """Median [least, most] of steps; what did not arrive (NaN) counts as more than all, and is a dash."""
    found = np.nan_to_num(values, nan=np.inf)
    return f"{_number(np.median(found), 0)} [{_number(found.min(), 0)}, {_number(found.max(), 0)}]"


def factor(row: Mapping[str, float]) -> str:
    """A median factor, or the bounds within which it lies, and its interval."""
    median, most = row["median"], row["median_most"]
    if median == 0 and math.isinf(most):  # neither arrived
        return "–"
    told = f"{median:.2f}" if median == most else f"≥ {median:.1f}" if math.isinf(most) else f"{median:.2f} to {most:.2f}"
    high = "∞" if math.isinf(row["high"]) else f"{row['high']:.1f}"
    return f"{told} ({row['low']:.1f} … {high})"


def donors(side: str, table: Table, factors: Table, accuracies: Mapping[int, tuple[float, float]]) -> str:
    """Steps to the aim of every kind at every donor, and how many times sooner than its controls the kept side is."""
    kinds = [kind for kind in dict.fromkeys(table["kind"].tolist()) if kind not in ("transplant", "random", "memorised")]
    against = [other for other in ("random", "shuffled", "whole", "memorised") if len(factors.where(against=other))]
    rows = []
    for donor, (train, val) in accuracies.items():
        told = [_or_nothing(table.where(kind=kind, donor=donor)["steps"]) for kind in ("transplant", *kinds)]
        speeds = [_rows(factors.where(donor=donor, against=other)) for other in against]
        rows.append([donor, f"{train:.2f} / {val:.2f}", *told, *(factor(mine[0]) if mine else "" for mine in speeds)])
    named = {"transplant": f"{side} kept"}
    head = ["donor step", "donor's accuracy, training / validation", *(named.get(kind, kind) for kind in ("transplant", *kinds))]
    return markdown([*head, *(f"× {other}" for other in against)], rows)


def apart(side: str, table: Table) -> str:
    """Steps to the aim of what has one donor, or none: a row a kind."""
    found = []
    for kind in ("random", "memorised"):
        mine = table.where(kind=kind)
        if len(mine):
            one = mine.where(donor=mine["donor"][0])
            found.append([kind, one["donor"][0] if kind == "memorised" else "", steps(one["steps"]), _ends(one)])
    return markdown([f"control, {side} kept", "of step", "steps to the aim", "validation accuracy at the end, by seed"], found)


def together(side: str, table: Table, accuracies: Mapping[int, tuple[float, float]]) -> str:
    """In how many trainings the kept side arrived sooner than each control with the same seed, over the donors that know something."""
    late = [donor for donor, (train, _) in accuracies.items() if train >= KNOWING]
    rows = []
    for against in ("random", "shuffled", "whole", "memorised"):
        pairs = [pair for donor in late for pair in _pairs(table, donor, against)]
        if pairs:
            mine, other = np.nan_to_num(np.array(pairs).T, nan=np.inf)
            rows.append([against, f"{int((mine < other).sum())} of {len(pairs)}", f"{int((other < mine).sum())} of {len(pairs)}"])
    if not rows:
        return "No donor knew half of its training examples."
    told = [*map(str, late)] if len(late) <= 5 else [str(late[0]), str(late[1]), "…", str(late[-1])]
    return markdown([f"{side} kept, donors of step {', '.join(told)}; against", "sooner in", "later in"], rows)


def _pairs(table: Table, donor: int, against: str) -> list[tuple[float, float]]:
    """Steps of a transplant and of its control, for every seed that both have; a memorised donor is its own."""
    where = {} if against == "memorised" else {"donor": donor}
    mine, other = table.where(kind="transplant", donor=donor), table.where(kind=against, **where)
    both = dict(zip(other["seed"].tolist(), other["steps"].tolist(), strict=True)) if len(other) else {}
    return [(own, both[seed]) for seed, own in zip(mine["seed"].tolist(), mine["steps"].tolist(), strict=True) if seed in both]


def _or_nothing(values: np.ndarray) -> str:
    return steps(values) if len(values) else ""


def _ends(table: Table) -> str:
    return ", ".join(f"{value:.2f}" for value in table["val_accuracy"])


def _rows(table: Table) -> Sequence[Mapping[str, float]]:
    return [{name: float(table[name][i]) for name in ("median", "median_most", "low", "high")} for i in range(len(table))]


def _number(value: float, digits: int) -> str:
    return "–" if math.isinf(value) else f"{value:.{digits}f}"
