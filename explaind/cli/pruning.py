"""The verb prune: how much of a network can go, by credit and by three baselines, and what each part is for."""

import math
import shlex
from typing import Any

import numpy as np

from explaind.analysis.pruning import METHODS, SOURCE, ablation, ablation_ranks, baseline_scores, credit_scores, pruning_curve
from explaind.analysis.surgery import Bench, layers_named
from explaind.analysis.table import Table
from explaind.cli.terminal import FINE, Json, app, ledgers_of, printed, progress
from explaind.errors import RequestError, StoreError
from explaind.ledger.by_name import config_of, task_of
from explaind.ledger.saving import open_ledger
from explaind.report.lines import pruning_lines
from explaind.store.location import inside
from explaind.store.reader import Run, open_run

FRACTIONS = "1,0.7,0.5,0.3,0.2,0.1,0.05,0.02,0.01"


@app.command
def prune(
    run: str,
    /,
    *,
    ledger: str | None = None,
    kept: str = FRACTIONS,
    levels: str = "param",
    spare: str = "",
    ablate: str = "",
    methods: str = ",".join(METHODS),
    seed: int = 0,
    json: Json = False,
) -> int:
    """Set the parts of RUN's network of least score to zero, and say what is left of it; nothing is retrained.

    Parameters
    ----------
    ledger
        One of RUN/ledgers with the axes query and param (and step): its credit gives the scores. By default the only one that has them.
    kept
        Shares of the prunable parameters that stay, separated by commas.
    levels
        What goes at once: param, neuron, head (of an attention, whether heads are modules or share their projections), module, tensor.
        Of the level head, --kept is a share of the heads' parameters.
    spare
        Layers that stay whole: names, patterns or groups of the task, such as decoder.
    ablate
        Levels of which every component is also taken out alone, such as neuron,head: what that costs, and how well each score foretells it.
    methods
        Out of credit, magnitude, gradient, random.
    seed
        Of the random scores.
    """
    recorded = open_run(run)
    bench = Bench(recorded, task_of(recorded))
    theta, chosen = recorded.theta(recorded.steps), _parts(methods)
    unknown = [method for method in chosen if method not in METHODS]
    if unknown or not chosen:
        raise RequestError("unknown way to score parameters", expected=", ".join(METHODS), got=repr(methods), do="name some of these")
    scores = {m: _credit(recorded, ledger) if m == "credit" else baseline_scores(bench, theta, m, seed) for m in chosen}
    spared = layers_named(recorded, bench.task, _parts(spare)) if spare else ()
    table = pruning_curve(bench, scores, [_share(text) for text in _parts(kept)], spared, _parts(levels))
    tables = {"pruning": table, **(_ablated(bench, scores, _parts(ablate), spared) if ablate else {})}
    paths = {name: str(found.write(inside(recorded.path, "analysis") / "pruning")) for name, found in tables.items()}
    facts: dict[str, Any] = {"run": str(recorded.path), "table": paths["pruning"], "spared": list(spared), "source": SOURCE}
    facts |= {"rows": _rows(table), **{name: {"table": paths[name], "rows": _rows(tables[name])} for name in list(tables)[1:]}}
    printed(facts, json, pruning_lines)
    return FINE


def _ablated(bench: Bench, scores: dict[str, np.ndarray], levels: list[str], spared: tuple[str, ...]) -> dict[str, Table]:
    with progress("ablating") as told:
        table = ablation(bench, scores, levels, spared, progress=told)
    return {found.name: found for found in (table, ablation_ranks(table))}


def _rows(table: Table) -> list[dict[str, Any]]:
    """As JSON has them: None where there is no number."""
    rows = [{name: values[i].item() for name, values in table.columns.items()} for i in range(len(table))]
    return [{name: None if isinstance(v, float) and math.isnan(v) else v for name, v in row.items()} for row in rows]


def _credit(recorded: Run, name: str | None) -> np.ndarray:
    if name is not None:
        return credit_scores(open_ledger(recorded.path / "ledgers" / name))
    fit = [path for path in ledgers_of(recorded.path) if {"query", "param"} <= set(open_ledger(path).axes)]
    if len(fit) != 1:
        raise StoreError(
            "no ledger of this run gives credit by parameter" if not fit else "several ledgers give credit by parameter",
            where=recorded.path / "ledgers",
            expected="one with the axes query and param",
            got=", ".join(path.name for path in fit) or "none",
            do=f"{_decomposing(recorded)} makes one" if not fit else "name one with --ledger",
        )
    return credit_scores(open_ledger(fit[0]))


def _decomposing(recorded: Run) -> str:
    """The command that makes such a ledger, beside the one that the configuration makes, in ten windows of steps."""
    groups = " --groups ''" if config_of(recorded).decompose.groups else ""  # of axes that it does not keep
    windows = max(1, -(-recorded.steps // 10))
    return f"explaind decompose {shlex.quote(str(recorded.path))} --keep query,param,step --windows {windows}{groups} --name by-param"


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _share(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise RequestError("not a share", expected="numbers in [0, 1] such as 0.5,0.1", got=repr(text), do="correct --kept") from error
