"""Verbs that study a run: analyse, report."""

from collections.abc import Sequence
from typing import Any

from explaind.analysis.analyse import OF_LEDGERS, OF_RUN, facts_of, of_ledger, of_run, read_tables
from explaind.cli.terminal import FINE, Json, app, ledgers_of, printed, task_or_none
from explaind.config import Report
from explaind.errors import StoreError
from explaind.ledger.by_name import config_of
from explaind.ledger.saving import open_ledger
from explaind.report import report as draw
from explaind.report import report_tables
from explaind.report.lines import analysis_lines, report_lines
from explaind.report.summary import ledger_facts
from explaind.store.location import Location, inside, names_in
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
    """Draw the figures of a RUN, of its tables and of each of its ledgers into RUN/report."""
    recorded = open_run(run)
    paths = ledgers_of(recorded.path)
    found = tables_reported(recorded)
    if not paths and not any(entry["files"] for entry in found):
        raise StoreError(
            "the run has no tables and no ledger to report on",
            where=recorded.path,
            do="explaind analyse RUN makes tables, explaind decompose RUN a ledger",
        )
    facts = {"reports": [*found, *({"ledger": str(path), **reported(recorded, path)} for path in paths)]}
    printed(facts, json, lambda f: [line for entry in f["reports"] for line in report_lines(entry)])
    return FINE


def analysed(recorded: Run, paths: Sequence[Location]) -> dict[str, Any]:
    """Write the tables of a run and of these ledgers."""
    folder = inside(recorded.path, "analysis")
    task = task_or_none(recorded)
    found = {OF_RUN: of_run(recorded, task)}
    found |= {f"{OF_LEDGERS}/{path.name}": of_ledger(recorded, open_ledger(path), task) for path in paths}
    for name, analysed in found.items():
        analysed.write(folder / name)
    return facts_of(found, folder)


def reported(recorded: Run, path: Location) -> dict[str, Any]:
    """Draw the figures of one ledger and of its tables."""
    ledger, name = open_ledger(path), f"{OF_LEDGERS}/{path.name}"
    tables = read_tables(recorded.path / "analysis" / name)
    written = draw(recorded, ledger, task_or_none(recorded), _settings(recorded), inside(recorded.path, "report") / name, tables)
    lacking = {"query", "param"} <= set(ledger.axes) and "similarity" not in tables
    return {
        "files": [str(f) for f in written.files],
        "left_out": [*written.left_out, *(["cosines and their components: explaind analyse RUN makes the tables"] if lacking else [])],
        "training": written.summary["training"],
        "facts": ledger_facts(ledger),
    }


def tables_reported(recorded: Run) -> list[dict[str, Any]]:
    """Draw the tables of the run itself, and those of ledgers that are not there any more."""
    analyses, there = recorded.path / "analysis", {path.name for path in ledgers_of(recorded.path)}
    gone = [f"{OF_LEDGERS}/{name}" for name in names_in(analyses / OF_LEDGERS) if name not in there]
    found = []
    for name in (OF_RUN, *gone):
        files = report_tables(read_tables(analyses / name), name, _settings(recorded), inside(recorded.path, "report") / name)
        left_out = [] if files else ["figures of tables: explaind analyse RUN makes those that fit"]
        found.append({"tables": str(analyses / name), "training": None, "files": [str(f) for f in files], "left_out": left_out})
    return found


def _settings(recorded: Run) -> Report:
    return config_of(recorded).report if recorded.manifest.config is not None else Report()
