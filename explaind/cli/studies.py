"""Verbs that study a run: analyse, report."""

from collections.abc import Sequence
from typing import Any

from explaind.analysis.analyse import OF_LEDGERS, OF_RUN, facts_of, of_ledger, of_run
from explaind.cli.terminal import FINE, Json, app, ledgers_of, printed, task_or_none
from explaind.config import Report
from explaind.errors import StoreError
from explaind.ledger.by_name import config_of
from explaind.ledger.ledger import Ledger
from explaind.ledger.saving import open_ledger
from explaind.report import report as draw
from explaind.report.lines import analysis_lines, report_lines
from explaind.report.summary import ledger_facts
from explaind.store.location import Location
from explaind.store.reader import Run, open_run


@app.command
def analyse(run: str, /, *, json: Json = False) -> int:
    """Write every analysis that fits a RUN and its ledgers as tables into RUN/analysis."""
    recorded = open_run(run)
    facts = {"run": str(recorded.path), "analyses": analysed(recorded, ledgers_of(recorded.path))}
    printed(facts, json, lambda f: analysis_lines(f["analyses"]))
    return FINE


@app.command
def report(run: str, /, *, json: Json = False) -> int:
    """Draw the figures of a RUN and each of its ledgers into RUN/report."""
    recorded = open_run(run)
    paths = ledgers_of(recorded.path)
    if not paths:
        raise StoreError("the run has no ledger to report on", where=recorded.path, do="explaind decompose RUN makes one")
    facts = {"reports": [{"ledger": str(path), **reported(recorded, path)} for path in paths]}
    printed(facts, json, lambda f: [line for entry in f["reports"] for line in report_lines(entry)])
    return FINE


def analysed(recorded: Run, paths: Sequence[Location]) -> dict[str, Any]:
    """Write the tables of a run and of these ledgers."""
    folder = recorded.path / "analysis"
    task = task_or_none(recorded)
    found = {OF_RUN: of_run(recorded, task)}
    found |= {f"{OF_LEDGERS}/{path.name}": of_ledger(recorded, open_ledger(path), task) for path in paths}
    for name, analysed in found.items():
        analysed.write(folder / name)
    return facts_of(found, folder)


def reported(recorded: Run, path: Location) -> dict[str, Any]:
    """Draw the figures of one ledger."""
    ledger: Ledger = open_ledger(path)
    settings = config_of(recorded).report if recorded.manifest.config is not None else Report()
    written = draw(recorded, ledger, task_or_none(recorded), settings, recorded.path / "report" / path.name)
    return {
        "files": [str(f) for f in written.files],
        "left_out": list(written.left_out),
        "training": written.summary["training"],
        "facts": ledger_facts(ledger),
    }
