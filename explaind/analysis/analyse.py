"""What can be asked of a run and its ledgers: every analysis that fits, written as tables."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from explaind.analysis.clock import clock_or_pizza
from explaind.analysis.credit import balance, example_scores, layer_shares, step_scores
from explaind.analysis.curves import training_curves
from explaind.analysis.phases import phases
from explaind.analysis.progress import SIGN, key_frequencies, progress
from explaind.analysis.similarity import similarity
from explaind.analysis.table import Table
from explaind.ledger.ledger import Ledger
from explaind.store import schema
from explaind.store.location import Location, remove_tree
from explaind.store.reader import Run
from explaind.tasks import Task
from explaind.tasks.modular import ModularArithmetic

ROWS = 200_000
"""Of a table, at most: what has more is thinned out along its steps."""


@dataclass(frozen=True)
class Analysed:
    """The tables of one ledger, or of the run itself, and in words what did not fit."""

    tables: tuple[Table, ...]
    left_out: tuple[str, ...]

    def write(self, folder: Location) -> list[Location]:
        """Each table as CSV, and analysis.json with their formulas; what stood there before is replaced."""
        try:
            remove_tree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            files = [table.write(folder) for table in self.tables]
            about = {"tables": {table.name: table.about() for table in self.tables}, "left_out": list(self.left_out)}
            schema.replace_file(folder / "analysis.json", json.dumps(about, indent=1))
        except OSError as error:
            raise schema.unwritable(folder, error) from error
        return files


def of_run(run: Run, task: Task | None) -> Analysed:
    """What needs the run alone."""
    if task is None:
        return Analysed((), ("training curves: the run names no task",))
    found, left_out = [curve_table(run, task)], []
    if isinstance(task, ModularArithmetic) and task.operation in SIGN and task.p % 2:
        found += [key_frequencies(run, task), progress(run, task), clock_or_pizza(run, task)]
    else:
        left_out.append(
            "progress measures, key frequencies, clock or pizza: have a meaning for addition and subtraction of an odd modulus alone"
        )
    return Analysed(tuple(found), tuple(left_out))


def of_ledger(run: Run, ledger: Ledger) -> Analysed:
    """What the axes of a ledger allow."""
    found: list[Table] = []
    left_out: list[str] = []
    fits: Sequence[tuple[Callable[[Ledger], Table], tuple[str, ...]]] = (
        (layer_shares, ("layer", "step")),
        (balance, ("layer", "step")),
        (step_scores, ("step",)),
        (example_scores, ("example",)),
    )
    for analysis, axes in fits:
        if set(axes) <= set(ledger.axes):
            found.append(analysis(ledger))
        else:
            left_out.append(f"{analysis.__name__}: keep {' and '.join(axes)}")
    found += [phases(table) for table in found if table.name == "layer_shares"]
    if {"query", "param"} <= set(ledger.axes):
        found.append(_similarity(run, ledger))
    else:
        left_out.append("similarity: keep query and param")
    return Analysed(tuple(found), tuple(left_out))


def curve_table(run: Run, task: Task) -> Table:
    """Mean loss (nats, or the unit of the task's losses) and accuracy of each split along the run."""
    curves = training_curves(run, task)
    columns = {"step": curves.steps}
    for split in curves.loss:
        columns |= {f"{split}_loss": curves.loss[split], f"{split}_accuracy": curves.accuracy[split]}
    return Table("training", "mean loss and accuracy of each split, in eval mode, at recorded parameters", "explaind", columns)


def _similarity(run: Run, ledger: Ledger) -> Table:
    """Of evenly spaced windows, as many as a table holds."""
    size = len(ledger.coords["query"]) ** 2 * (len(run.manifest.layers) + 1)
    steps: np.ndarray = ledger.coords["step"] if "step" in ledger.axes else np.zeros(1, dtype=np.int64)
    places = np.unique(np.linspace(0, len(steps) - 1, max(1, min(len(steps), ROWS // size))).round().astype(int))
    return similarity(ledger, run.manifest.layers, steps=steps[places].tolist())


def facts_of(analysed: Mapping[str, Analysed], folder: Location) -> dict[str, Any]:
    """For JSON and for people: where each table is, and what did not fit."""
    return {
        name: {"files": [str(folder / name / f"{t.name}.csv") for t in one.tables], "left_out": list(one.left_out)}
        for name, one in analysed.items()
    }
