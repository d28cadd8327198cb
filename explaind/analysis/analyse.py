"""What can be asked of a run and its ledgers: every analysis that fits, written as tables.

RUN/analysis/run has the tables that need no ledger, RUN/analysis/ledgers/NAME those of a ledger; what else stands in RUN/analysis, such as
the tables of ``explaind prune``, is left alone. How far several runs agree on their phases is for a study to ask (``phases.agreement``).
"""

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np

from explaind.analysis.clock import clock_or_pizza
from explaind.analysis.credit import balance, example_scores, layer_shares, step_scores
from explaind.analysis.curves import training_curves
from explaind.analysis.phases import phases
from explaind.analysis.progress import SIGN, key_frequencies, progress
from explaind.analysis.similarity import ALL, agreement, kernel_pca, similarity, spectrum
from explaind.analysis.table import Table, stacked
from explaind.errors import StoreError
from explaind.ledger.by_name import selection
from explaind.ledger.ledger import Ledger
from explaind.store import schema
from explaind.store.location import Location, names_in, remove_tree
from explaind.store.reader import Run
from explaind.tasks import Task
from explaind.tasks.modular import ModularArithmetic

ROWS = 200_000
"""Of a table, at most: what has more is thinned out along its steps."""
TESTS = 20
"""Windows whose cosines are tested for the network's frequencies, at most."""
OF_RUN, OF_LEDGERS = "run", "ledgers"
"""The folders of the tables of a run, and of each of its ledgers by name."""
Found = tuple[list[Table], list[str]]
"""Tables, and in words what did not fit."""


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
    if is_circular(task):
        found += [key_frequencies(run, task), progress(run, task), clock_or_pizza(run, task)]
    else:
        left_out.append(
            "progress measures, key frequencies, clock or pizza: have a meaning for addition and subtraction of an odd modulus alone"
        )
    return Analysed(tuple(found), tuple(left_out))


def is_circular(task: Task | None) -> TypeGuard[ModularArithmetic]:
    """Whether a network can solve the task by turning on circles: sums and differences modulo an odd number."""
    return isinstance(task, ModularArithmetic) and task.operation in SIGN and task.p % 2 == 1


def of_ledger(run: Run, ledger: Ledger, task: Task | None) -> Analysed:
    """What the axes of a ledger allow, and the task where the queries have classes."""
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
        similar, lacking = _of_parameters(run, ledger, task)
        found, left_out = [*found, *similar], [*left_out, *lacking]
    else:
        left_out.append("similarity, kernel_pca, frequency_agreement: keep query and param")
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
    return similarity(ledger, run.manifest.layers, steps=_evenly(steps.tolist(), ROWS // size))


def _evenly(steps: Sequence[int], count: int) -> list[int]:
    """At most so many of them, but at least one: evenly spaced, the first and the last among them."""
    places = np.linspace(0, len(steps) - 1, max(1, min(len(steps), count))).round().astype(int)
    return [steps[place] for place in np.unique(places)]


def _of_parameters(run: Run, ledger: Ledger, task: Task | None) -> Found:
    """Cosines of credit by parameter; of those of all parameters, principal components and whether they go with the queries' classes."""
    table = _similarity(run, ledger)
    whole, names = table.where(layer=ALL), ledger.coords["query"]
    matrices = {step: whole.where(step=step).grid("query", "other", "cosine")[2] for step in np.unique(whole["step"]).tolist()}
    found = [table, stacked([kernel_pca(matrix, names) for matrix in matrices.values()], step=list(matrices))]
    classes = classes_of(ledger, task)
    if task is None or classes is None:
        return found, ["classes, frequency_agreement: queries of a task, asked by name and not in groups, have classes"]
    found.append(Table("classes", "true class of each query, as the task numbers it", "explaind", {"query": names, "class": classes}))
    tested, lacking = _of_frequencies(run, task, {step: matrices[step] for step in _evenly(list(matrices), TESTS)}, classes)
    return [*found, *tested], lacking


def classes_of(ledger: Ledger, task: Task | None) -> np.ndarray | None:
    """Class of every query: [query]; None where they are not examples of the task."""
    asked, names = ledger.settings.get("config") or {}, ledger.coords["query"]
    if task is None or "queries" not in asked or names.dtype.kind not in "iu":
        return None
    return task.target(selection(task, asked["queries"]).batch(task)).numpy()[names]


def _of_frequencies(run: Run, task: Task, matrices: Mapping[int, np.ndarray], classes: np.ndarray) -> Found:
    """Whether cosines {step: [query, query]} are periodic in the classes, and at the frequencies that the network has in the end."""
    if not is_circular(task) or len(classes) < 2:
        return [], ["frequency_agreement: is for two or more sums or differences modulo an odd number"]
    table = key_frequencies(run, task)
    keys, count = table["frequency"][table["key"]].tolist(), len(table)
    powers = np.concatenate([spectrum(matrix, classes, task.p) for matrix in matrices.values()])
    spectra = Table(
        "spectrum",
        "power[step, frequency] = S_k, the coefficient of cos(2π k (c − c′) / p) in the cosines of all parameters; key: of the network",
        "explaind: Fourier transform over differences of classes",
        {
            "step": np.repeat(list(matrices), count),
            "frequency": np.tile(table["frequency"], len(matrices)),
            "power": powers,
            "key": np.tile(table["key"], len(matrices)),
        },
    )
    if not 0 < len(keys) < count:
        return [spectra], [
            f"frequency_agreement: {len(keys)} of {count} frequencies are key frequencies, so that there is nothing to compare"
        ]
    return [spectra, stacked([agreement(matrix, classes, task.p, keys) for matrix in matrices.values()], step=list(matrices))], []


def read_tables(folder: Location) -> dict[str, Table]:
    """The tables that ``Analysed.write`` left in a folder, by name; none where there are none. StoreError for one that cannot be read."""
    there = names_in(folder)
    if "analysis.json" not in there:
        return {}
    try:
        about = json.loads((folder / "analysis.json").read_text())["tables"]
        if not all(f"{name}.csv" in there for name in about):  # others are no files of this folder
            raise KeyError("tables")
        return {name: _table(name, told, (folder / f"{name}.csv").read_text()) for name, told in about.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(
            "these tables cannot be read", where=folder, got=type(error).__name__, do="explaind analyse RUN writes them anew"
        ) from error


def _table(name: str, about: Mapping[str, Any], text: str) -> Table:
    head, *rows = csv.reader(io.StringIO(text, newline=""))
    columns = zip(*rows, strict=True) if rows else ((),) * len(head)
    return Table(name, about["formula"], about["source"], {key: _typed(values) for key, values in zip(head, columns, strict=True)})


def _typed(values: Sequence[str]) -> np.ndarray:
    """As numbers or truth values where all are."""
    if set(values) <= {"True", "False"}:
        return np.array([value == "True" for value in values], dtype=bool)
    for kind in (int, float):
        with suppress(ValueError):
            return np.array([kind(value) for value in values])
    return np.array(values)


def facts_of(analysed: Mapping[str, Analysed], folder: Location) -> dict[str, Any]:
    """For JSON and for people: where each table is, and what did not fit."""
    return {
        name: {"files": [str(folder / name / f"{t.name}.csv") for t in one.tables], "left_out": list(one.left_out)}
        for name, one in analysed.items()
    }
