"""The tables of the README, as Markdown: median [least, most] over seeds where a row is of several."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from explaind.analysis.table import Table, markdown
from explaind.kernel.groups import REST


def middle(values: Sequence[float], digits: int) -> str:
    """Median [least, most]."""
    return f"{np.median(values):.{digits}f} [{min(values):.{digits}f}, {max(values):.{digits}f}]"


def kept(folder: Path, name: str, text: str) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.md").write_text(text + "\n")
    return text


def training(rows: Sequence[Mapping[str, Any]], controls: Sequence[Mapping[str, Any]]) -> str:
    """When each seed knew what, and the most that it validated without decay: one row a seed."""
    names = ("train_1_at", "val_0.95_at", "val_1_at")
    head = ["seed", "training accuracy 1", "validation 0.95", "validation 1", "the same without decay: validation never above"]
    both = zip(rows, controls, strict=True)
    return markdown(head, [[r["seed"], *("–" if r[n] is None else r[n] for n in names), f"{c['val_accuracy_most']:.3f}"] for r, c in both])


def progress(rows: Sequence[Mapping[str, Any]], keys: Mapping[int, Table]) -> str:
    """Losses while validation guessed, and the key frequencies at the end: one row a seed."""
    found = []
    for row in rows:
        table = keys[row["seed"]].where(key=True)
        told = ", ".join(f"{k} ({share:.2f})" for k, share in zip(table["frequency"], table["neurons"], strict=True))
        spans = [f"{row[n][0]:.2f} → {row[n][1]:.2f}" for n in ("val_loss", "excluded", "excluded_difference", "restricted")]
        found.append([row["seed"], f"{row['from']} → {row['until']}", told or "none", *spans])
    head = ["seed", "steps", "key frequencies (share of neurons)", "validation loss", "excluded", "control", "restricted"]
    return markdown(head, found)


def credit(shares: Mapping[int, Table], balances: Mapping[int, Table], begins: Mapping[int, Sequence[int]]) -> str:
    """Shares of each layer in each phase, and what data and decay did through it in all: one row a layer."""
    layers = [layer for layer in dict.fromkeys(next(iter(shares.values()))["layer"].tolist()) if layer != REST]
    phases = 1 + len(next(iter(begins.values())))
    rows = []
    for layer in layers:
        row = [layer]
        for phase in range(phases):
            found = []
            for seed, table in shares.items():
                cuts = [0, *begins[seed], np.inf]
                inside = (table["step"] >= cuts[phase]) & (table["step"] < cuts[phase + 1])
                found.append(table["absolute"][inside & (table["layer"] == layer)].sum() / table["absolute"][inside].sum())
            row.append(middle(found, 2))
        row += [middle([float(table.where(layer=layer)[name].sum()) for table in balances.values()], 1) for name in ("data", "decay")]
        rows.append(row)
    sums = [middle([float(table[name].sum()) for table in balances.values()], 1) for name in ("data", "decay")]
    head = ["layer", *(f"share, phase {phase + 1}" for phase in range(phases)), "Σ data, nats", "Σ decay, nats"]
    return markdown(head, [*rows, ["all", *([""] * phases), *sums]])


def phases(rows: Sequence[Mapping[str, Any]], arrived: Sequence[int | None]) -> str:
    """Where phases begin, also as parts of the steps to a validation accuracy of 0.95, if it came: one row a seed."""
    return markdown(
        ["seed", "validation 0.95 at", "phases begin at", "as part of that", "number of phases by BIC"],
        [
            [
                row["seed"],
                "–" if length is None else length,
                ", ".join(map(str, row["begin"])),
                "–" if length is None else ", ".join(f"{at / length:.2f}" for at in row["begin"]),
                len(row["preferred"]) + 1,
            ]
            for row, length in zip(rows, arrived, strict=True)
        ],
    )


def similarity(rows: Sequence[Mapping[str, Any]]) -> str:
    """Excess at the key frequencies in standard deviations of the shuffled labels, and p-values; a cell has all seeds."""
    steps, layers = (list(dict.fromkeys(row[axis] for row in rows)) for axis in ("step", "layer"))
    cells = {(row["layer"], row["step"], row["seed"]): row for row in rows if "p_value" in row}
    seeds = list(dict.fromkeys(row["seed"] for row in rows))

    def cell(layer: str, step: int) -> str:
        found = [cells.get((layer, step, seed)) for seed in seeds]
        z = ", ".join("–" if row is None else f"{row['excess'] / row['null_sd']:.1f}" for row in found)
        p = ", ".join("–" if row is None else f"{row['p_value']:.3f}" for row in found)
        return f"{z} (p {p})"

    return markdown(["layer", *(f"step {step}" for step in steps)], [[layer, *(cell(layer, step) for step in steps)] for layer in layers])


def components(variances: Mapping[tuple[str, int], Sequence[float]]) -> str:
    """How much of the cosines lies in the plane of their first two principal components; variances by layer and step, of each seed."""
    layers, steps = (list(dict.fromkeys(key[axis] for key in variances)) for axis in (0, 1))
    head = ["layer", *(f"step {step}" for step in steps)]
    return markdown(head, [[layer, *(middle(variances[layer, step], 2) for step in steps)] for layer in layers])


def clock(rows: Sequence[Mapping[str, Any]]) -> str:
    """How the network adds, at the end of its training: one row a seed."""
    names = ("gradient_symmetricity", "distance_irrelevance")
    return markdown(
        ["seed", *(name.replace("_", " ") for name in names)], [[row["seed"], *(f"{row[n]:.3f}" for n in names)] for row in rows]
    )
