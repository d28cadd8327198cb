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

    def query(self, name: int | str) -> str:
        """Of a query by its place, or of a group of queries by its name."""
        if isinstance(name, str):
            return f"{self.split}, {name}"
        return (
            f"query {name}"
            if self.task is None
            else f"{self.split} {self.first + name}: {self.task.describe(self.split, self.first + name)}"
        )

    def output(self, name: int | str) -> str:
        """Of an output by its place, or of a group of outputs by its name."""
        return str(name) if self.task is None or isinstance(name, str) else self.task.outputs()[name]

    def example(self, name: int | str) -> str:
        """Of an example by its id, or of a group of examples by its name."""
        if isinstance(name, str):
            return name
        return f"example {name}" if self.task is None else f"{self.task.describe('train', name)}  ({name})"

    def of_measure(self, ledger: Ledger, place: tuple[int, ...]) -> str:
        """A measure in words: its query, and its output where there is one."""
        axes = [axis for axis in MEASURE_AXES if axis in ledger.final.dims]
        at = {axis: ledger.coords[axis][i].item() for axis, i in zip(axes, place, strict=True)}
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
                    "example": ledger.coords["example"][i].item(),
                    "label": labels.example(ledger.coords["example"][i].item()),
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
