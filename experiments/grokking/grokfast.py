"""What Grokfast changes in the ledger: shares of the layers, balance of data and decay, phases, each beside the same seeds without it."""

from collections.abc import Mapping
from typing import Any

import numpy as np

import explaind
from explaind.analysis import phases as of_phases
from explaind.analysis.credit import balance, layer_shares
from explaind.analysis.table import Table

LAYERS = ("embedding", "attention in", "attention out", "linear1", "linear2", "decoder")


def until(table: Table, step: int) -> Table:
    """The rows whose window begins before a step."""
    kept = table["step"] < step
    return Table(table.name, table.formula, table.source, {name: values[kept] for name, values in table.columns.items()})


def of_ledger(ledger: explaind.Ledger, examples: np.ndarray | None, arrived: int, phases: int) -> dict[str, Any]:
    """Figures of one training until it generalised, and in all.

    shares   {layer: share of Σ |data| in the windows that begin before `arrived`}
    data, decay, initial, final  mean over queries, in nats, of the whole training; data_until, decay_until: before `arrived`
    begin    steps at which phases begin, of shares before twice `arrived`
    """
    shares, both = layer_shares(ledger, examples), balance(ledger)
    early = until(shares, arrived)
    size = {layer: early.where(layer=layer)["absolute"].sum() for layer in LAYERS}
    whole = sum(size.values())
    part = until(both, arrived)
    found = {"shares": {layer: float(value / whole) for layer, value in size.items()}, "arrived": arrived}
    found |= {name: float(both[name].sum()) for name in ("data", "decay")}
    found |= {f"{name}_until": float(part[name].sum()) for name in ("data", "decay")}
    found |= {"initial": float(ledger["initial"].mean()), "final": float(ledger["final"].mean())}
    looked = until(shares, 2 * arrived)
    found["begin"] = of_phases.boundaries(of_phases.phases(looked, phases)).tolist()
    found["windows"] = len(np.unique(looked["step"]))
    return found


def told(found: Mapping[tuple[str, int], dict[str, Any]]) -> list[dict[str, Any]]:
    """Median [least, most] over seeds of every figure, by filter."""
    rows = []
    for name in dict.fromkeys(filter_name for filter_name, _ in found):
        mine = [row for (other, _), row in found.items() if other == name]
        figures = {f"share of {layer}": [row["shares"][layer] for row in mine] for layer in LAYERS}
        figures |= {key: [row[key] for row in mine] for key in ("arrived", "data_until", "decay_until", "data", "decay", "final")}
        for place in range(min(len(row["begin"]) for row in mine)):
            figures[f"phase {place + 2} begins, of arrival"] = [row["begin"][place] / row["arrived"] for row in mine]
        rows.append(
            {"filter": name, "seeds": len(mine), **{key: [float(f(v)) for f in (np.median, min, max)] for key, v in figures.items()}}
        )
    return rows


def text(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table, a column a filter."""
    keys = [key for key in rows[0] if key not in ("filter", "seeds") and all(key in row for row in rows)]
    lines = ["| | " + " | ".join(row["filter"] for row in rows) + " |", "|---" * (len(rows) + 1) + "|"]
    for key in keys:
        digits = 0 if key == "arrived" else 2
        cells = [f"{row[key][0]:.{digits}f} [{row[key][1]:.{digits}f}, {row[key][2]:.{digits}f}]" for row in rows]
        lines.append(f"| {key.replace('_', ' ')} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
