"""The report of a run: figures and a ledger.json for each of its ledgers."""

import io
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from explaind.analysis.credit import balance, layer_shares
from explaind.analysis.curves import Curves, training_curves
from explaind.analysis.phases import phases
from explaind.analysis.table import Table
from explaind.config import Report
from explaind.errors import StoreError
from explaind.ledger.ledger import Ledger
from explaind.report import figures, tables
from explaind.report.figures import UNIT
from explaind.report.summary import Labels, by_axes, ledger_facts, predictions, strongest
from explaind.store import mirror, schema
from explaind.store.damage import of_constants
from explaind.store.location import Location, Where, location_of
from explaind.store.reader import Run
from explaind.tasks import Task


@dataclass(frozen=True)
class Written:
    """What a report wrote, and in words what it could not draw."""

    files: tuple[Location, ...]
    left_out: tuple[str, ...]
    summary: dict[str, Any]


def report(
    run: Run, ledger: Ledger, task: Task | None, settings: Report, folder: Where, analysed: Mapping[str, Table] | None = None
) -> Written:
    """Draw a ledger of a run into a folder, and sum it up in ledger.json.

    analysed  tables of this ledger's analyses, by name, such as those of credit by parameter
    Without a task there are no training curves, and queries and examples are called by number.
    Raises StoreError when the folder cannot be written.
    """
    out = location_of(folder)
    labels = Labels.of(ledger, task)
    whole_run = ledger.sum("step") if "step" in ledger.axes else ledger
    told = predictions(whole_run, labels, settings.examples)
    curves = None if task is None else training_curves(run, task)
    summary = {
        "run": run_facts(run),
        "training": None if curves is None else curve_facts(curves),
        "ledger": ledger_facts(ledger),
        "predictions": told,
    }
    drawn = {"training": figures.training(curves)} if curves is not None else {}
    left_out = [] if curves is not None else ["training curves: the run names no task"]
    known = dict(analysed or {})
    if {"layer", "step"} <= set(ledger.axes):
        drawn["layers_over_steps"] = _heat_map(ledger, labels, len(told))
        known |= {"layer_shares": (shares := layer_shares(ledger)), "balance": balance(ledger), "phases": phases(shares)}
    else:
        left_out.append("layer × step heat map: keep both axes (keep=…,layer,step)")
    drawn |= tables.drawn(known, labels.measure)
    drawn["rest_rows"] = figures.rest_rows(
        ledger.checks.by_step, "What could not be credited, beside the movement that it belongs to", labels.measure
    )
    if "example" not in ledger.axes:
        left_out.append("strongest examples: keep the axis (keep=…,example)")
    for name, figure in _of_predictions(whole_run, labels, told[: settings.predictions], settings.examples):
        drawn[name] = figure
    files = _written(out, drawn, settings.dpi)
    schema.replace_file(out / "ledger.json", json.dumps(summary, indent=1, default=_plain))
    return Written((*files, out / "ledger.json"), tuple(left_out), summary)


def report_tables(analysed: Mapping[str, Table], measure: str, settings: Report, folder: Where) -> tuple[Location, ...]:
    """Draw the tables of a run, or of a ledger that is not there any more, into a folder; measure: what credit is for, in titles.

    Raises StoreError when the folder cannot be written.
    """
    return _written(location_of(folder), tables.drawn(analysed, measure), settings.dpi)


def run_facts(run: Run) -> dict[str, Any]:
    """What a run says of itself."""
    m = run.manifest
    logged, log_damage = run.log_facts()
    return {
        "path": str(run.path),
        "steps": run.steps,
        "complete": run.complete,
        "logged": logged,
        "log_damage": log_damage,
        "constants_damage": of_constants(run),
        "changed": sorted(mirror.changed(run.path)),
        "model": m.model,
        "optimizer": m.optimizer,
        "parameters": m.params,
        "layers": {layer.name: list(layer.shape) for layer in m.layers},
        "examples": len(run.examples),
        "reduction": m.reduction,
        "seed": m.seed,
        "threads": m.threads,
        "device": m.device,
        "thin": m.block if m.thin is not None else None,
        "gradients": gradient_facts(run),
        "versions": dict(m.versions),
        "config": m.config,
    }


def gradient_facts(run: Run) -> dict[str, Any] | None:
    """Of the stored gradients of examples; None where there are none."""
    if run.manifest.gradients is None:
        return None
    count = int(run.gradient_checksums()[0].sum())
    return {
        "dtype": run.manifest.gradients,
        "count": count,
        "bytes": count * run.manifest.params * np.dtype(run.manifest.gradients).itemsize,
    }


def curve_facts(curves: Curves) -> dict[str, Any]:
    """When the training knew its data, when it generalised, and where it ended."""
    return {
        "train_0.99_at": curves.reached("train", 0.99),
        "val_0.95_at": curves.reached("val", 0.95),
        "final_accuracy": {split: float(values[-1]) for split, values in curves.accuracy.items()},
        "final_loss": {split: float(values[-1]) for split, values in curves.loss.items()},
    }


def _heat_map(ledger: Ledger, labels: Labels, count: int) -> Figure:
    credit = by_axes(ledger, "data", ("layer", "step")) / max(1, count)
    title = f"Data credit for {labels.measure}, mean of {count} predictions" if count > 1 else f"Data credit for {labels.measure}"
    return figures.heat_map(credit, ledger.coords["layer"].tolist(), ledger.coords["step"], title, "mean credit per entry")


def _of_predictions(ledger: Ledger, labels: Labels, told: list[dict[str, Any]], examples: int) -> Iterator[tuple[str, Figure]]:
    """A waterfall and the strongest examples of each of these predictions."""
    for place, entry in zip(np.ndindex(*ledger.final.values.shape), told, strict=False):
        name = "_".join(re.sub(r"\W+", "", f"{axis}{at}") for axis, at in zip(ledger.final.dims, place, strict=True)) or "all"
        names, values = _terms(ledger, place)
        yield f"waterfall_{name}", figures.waterfall(names, values, f"{labels.measure} of {entry['measure']}", labels.measure)
        if "example" in ledger.axes:
            credit = by_axes(ledger, "data", (*ledger.final.dims, "example"))[place]
            chosen = strongest(credit, examples)
            words = [labels.example(ledger.coords["example"][i].item()) for i in chosen]
            yield (
                f"examples_{name}",
                figures.strongest(words, credit[chosen].tolist(), f"Examples for and against {entry['measure']}", UNIT),
            )


def _terms(ledger: Ledger, place: tuple[int, ...]) -> tuple[list[str], list[float]]:
    """The rows of one prediction, the data row layer by layer where layers are kept."""
    names: list[str] = []
    values: list[float] = []
    for row in ledger.rows:
        if row == "data" and "layer" in ledger.axes:
            credit = by_axes(ledger, "data", (*ledger.final.dims, "layer"))[place]
            names += [f"data through {layer}" for layer in ledger.coords["layer"]]
            values += credit.tolist()
        else:
            names.append(row)
            values.append(float(ledger.total(row)[place]))
    return names, values


def _written(out: Location, drawn: dict[str, Figure], dpi: int) -> tuple[Location, ...]:
    files = []
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, figure in drawn.items():
            files.append(out / f"{name}.png")
            drawing = io.BytesIO()
            figure.savefig(drawing, dpi=dpi, format="png")
            files[-1].write_bytes(drawing.getvalue())
    except OSError as error:
        raise schema.unwritable(out, error) from error
    return tuple(files)


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    raise StoreError("a summary holds something that JSON cannot", got=type(value).__name__)
