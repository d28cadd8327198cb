"""Prunings side by side: tables over seeds, as text, and the figure."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from explaind.analysis.pruning import METHODS
from explaind.analysis.table import Table

LEVELS = ("param", "neuron", "tensor")
ABLATED = ("neuron", "tensor")
"""Single parameters would be a hundred thousand networks."""
LOOKS = (0.1, 0.02)
"""The kept shares that the tables tell of: 90 % and 98 % sparsity."""
LOSS = 0.01
"""Of accuracy, that is still nothing: one image in a hundred."""


def at(table: Table, kept: float) -> list[dict[str, Any]]:
    """One row a level and method, over seeds."""
    columns = ("sparsity", "val_accuracy", "val_loss", "kl")
    return [
        {"level": level, "method": method, **{c: middle(table.where(level=level, method=method, kept=kept)[c]) for c in columns}}
        for level in LEVELS
        for method in METHODS
    ]


def margins(table: Table, kept: float) -> list[dict[str, Any]]:
    """One row a level and baseline: differences between two prunings of the same network."""
    rows = []
    for level in LEVELS:
        mine = table.where(level=level, kept=kept, method="credit")
        for method in METHODS[1:]:
            other = table.where(level=level, kept=kept, method=method)
            more, less = mine["val_accuracy"] - other["val_accuracy"], mine["kl"] - other["kl"]
            ahead = {"more_accurate_in": f"{(more > 0).sum()} of {len(more)}", "lower_kl_in": f"{(less < 0).sum()} of {len(less)}"}
            rows.append({"level": level, "against": method, "accuracy": middle(more), "kl": middle(less), **ahead})
    return rows


def reach(table: Table) -> list[dict[str, Any]]:
    """One row a level: for every method how sparse the network may get, among the shares that were looked at."""
    rows = []
    for level in LEVELS:
        row: dict[str, Any] = {"level": level}
        for method in METHODS:
            found = []
            for seed in dict.fromkeys(table["seed"].tolist()):
                curve = table.where(level=level, method=method, seed=seed)
                fine = curve["val_accuracy"] >= curve["val_accuracy"][0] - LOSS
                found.append(curve["sparsity"][: len(fine) if fine.all() else int(np.argmin(fine))].max())
            row[method] = middle(np.array(found))
        rows.append(row)
    return rows


def overlaps(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same over seeds."""
    return [
        {"level": level, **{m: middle(np.array([row[m] for row in rows if row["level"] == level])) for m in METHODS[1:]}}
        for level in LEVELS
    ]


def foretold(ranks: Table) -> list[dict[str, Any]]:
    """Rank correlations of scores with what a removal costs, over seeds: one row a level and method."""
    rows = []
    for level in ABLATED:
        for method in METHODS:
            mine = ranks.where(level=level, method=method)
            costs = {name: middle(mine[name]) for name in ("loss", "accuracy", "kl")}
            rows.append({"level": level, "method": method, "components": int(mine["components"][0]), **costs})
    return rows


def middle(values: np.ndarray) -> list[float]:
    """Median, least, most."""
    return [float(np.median(values)), float(values.min()), float(values.max())]


def markdown(rows: list[dict[str, Any]]) -> str:
    """Rows with the same keys; three numbers are a median with a range."""

    def cell(value: Any) -> str:
        if isinstance(value, list):
            return f"{cell(value[0])} [{cell(value[1])}, {cell(value[2])}]"
        return (f"{value:.3f}" if abs(value) >= 0.001 or value == 0 else f"{value:.1e}") if isinstance(value, float) else str(value)

    lines = [list(rows[0]), ["---"] * len(rows[0]), *([cell(v) for v in row.values()] for row in rows)]
    return "\n".join(f"| {' | '.join(name.replace('_', ' ') for name in line)} |" for line in lines)


def figure(table: Table) -> Figure:
    """Accuracy and KL against what is left, at every level: median and range over seeds."""
    made = Figure(figsize=(4 * len(LEVELS), 6.5), layout="constrained")
    grid = made.subplots(2, len(LEVELS), sharex=True, sharey="row")
    for place, level in enumerate(LEVELS):
        for row, column in enumerate(("val_accuracy", "kl")):
            axes = grid[row, place]
            for i, method in enumerate(METHODS):
                mine = table.where(level=level, method=method)
                values, sparsity = (mine.grid("seed", "kept", name)[2] for name in (column, "sparsity"))
                left = 1 - np.median(sparsity, 0)
                axes.plot(left, np.median(values, 0), "o-", color=f"C{i}", label=method, ms=3)
                axes.fill_between(left, values.min(0), values.max(0), color=f"C{i}", alpha=0.15)
            axes.set(xscale="log", title=level if row == 0 else "", xlabel="" if row == 0 else "share of parameters left")
        grid[1, place].set_yscale("symlog", linthresh=1e-3)
    grid[0, 0].set_ylabel("validation accuracy")
    grid[1, 0].set_ylabel("KL(whole ‖ pruned), nats")
    grid[0, 0].invert_xaxis()
    grid[0, 0].legend(frameon=False, fontsize=8)
    return made
