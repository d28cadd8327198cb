"""A ledger in a few plain numbers and words, for ledger.json, tables and figures."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from explaind.axes import MEASURE_AXES
from explaind.errors import ExplaindError
from explaind.ledger.ledger import Ledger
from explaind.tasks import Task


@dataclass(frozen=True)
class Labels:
    """What queries, outputs and examples of a ledger are called; plain numbers where the run names no task."""

    task: Task | None
    split: str
    first: int
    measure: str

    @staticmethod
    def of(ledger: Ledger, task: Task | None) -> "Labels":
        """Read off the configuration that a ledger was asked with."""
        asked = ledger.settings.get("config") or {}
        split, *numbers = str(asked.get("queries", "query")).split(":")
        return Labels(task if asked else None, split, int(numbers[0]) if numbers else 0, str(asked.get("measure", "measure")))

    def query(self, place: int) -> str:
        return (
            f"query {place}"
            if self.task is None
            else f"{self.split} {self.first + place}: {self.task.describe(self.split, self.first + place)}"
        )

    def output(self, place: int) -> str:
        return str(place) if self.task is None else self.task.outputs()[place]

    def example(self, index: int) -> str:
        return f"example {index}" if self.task is None else f"{self.task.describe('train', index)}  ({index})"

    def of_measure(self, ledger: Ledger, place: tuple[int, ...]) -> str:
        """A measure in words: its query, and its output where there is one."""
        at = dict(zip((axis for axis in MEASURE_AXES if axis in ledger.final.dims), place, strict=True))
        words = [self.query(at["query"])] if "query" in at else []
        words += [f"output {self.output(at['output'])}"] if "output" in at else []
        return ", ".join(words) or f"all of {self.split}"


def by_axes(ledger: Ledger, row: str, axes: tuple[str, ...]) -> np.ndarray:
    """A row summed to these axes, in this order; axes that the row lacks make an error."""
    term = ledger.rows[row]
    for axis in term.dims:
        if axis not in axes:
            term = term.sum(axis)
    return np.asarray(term.values, dtype=np.float64).transpose([term.dims.index(axis) for axis in axes])


def strongest(credit: np.ndarray, count: int) -> list[int]:
    """Places of the largest `count` positive and the `count` most negative entries, from most positive to most negative."""
    order = np.argsort(-credit, kind="stable")
    up = [int(i) for i in order[:count] if credit[i] > 0]
    down = [int(i) for i in order[::-1][:count] if credit[i] < 0]
    return up + [i for i in down[::-1] if i not in up]


def predictions(ledger: Ledger, labels: Labels, examples: int) -> list[dict[str, Any]]:
    """For every measure: its rows, the size of its rest rows, and its strongest examples."""
    verdict = ledger.verify()
    axes = ledger.final.dims
    totals = {name: ledger.total(name) for name in ledger.rows}
    credit = by_axes(ledger, "data", (*axes, "example")) if "example" in ledger.axes else None
    whole = verdict.movement.shape == ledger.final.values.shape  # no measure axis was summed after the decomposition
    found = []
    for place in np.ndindex(*ledger.final.values.shape):
        entry: dict[str, Any] = {"measure": labels.of_measure(ledger, place), **dict(zip(axes, place, strict=True))}
        entry["rows"] = {name: float(total[place]) for name, total in totals.items()}
        entry["final"] = float(ledger.final.values[place])
        entry["closure"] = float(verdict.closure[place])
        if whole:
            entry |= {name: float(getattr(verdict, name)[place]) for name in ("movement", "path", "arithmetic", "explained")}
        if credit is not None:
            entry["strongest"] = [
                {
                    "example": int(ledger.coords["example"][i]),
                    "label": labels.example(int(ledger.coords["example"][i])),
                    "credit": float(credit[place][i]),
                }
                for i in strongest(credit[place], examples)
            ]
        found.append(entry)
    return found


def ledger_facts(ledger: Ledger) -> dict[str, Any]:
    """Sizes, settings and checks of a ledger."""
    verdict = ledger.verify()
    return {
        "axes": {axis: len(ledger.coords[axis]) for axis in ledger.axes},
        "settings": dict(ledger.settings),
        "ok": verdict.ok,
        "reasons": list(verdict.reasons),
        "maxima": dict(verdict.maxima),
        "explained_min": float(np.min(verdict.explained, initial=1.0)),
        "recipes": dict(Counter(ledger.checks.recipes.reshape(-1).tolist()).most_common()),
    }


def task_or_none(load: Any) -> Task | None:
    """The task, or None where the run names none."""
    try:
        return load()
    except ExplaindError:
        return None
