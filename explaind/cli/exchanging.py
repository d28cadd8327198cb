"""Verbs that take a run out of the store in one file, and back in: export, import."""

from dataclasses import asdict
from typing import Annotated

from cyclopts import Parameter

from explaind.cli.terminal import FINE, Json, Overwrite, Spool, app, printed, progress
from explaind.report.lines import export_lines, import_lines
from explaind.store.exporting import export_run, import_run
from explaind.store.location import location_of

Ledgers = Annotated[bool, Parameter(negative="--no-ledgers", help="Take the finished ledgers of the run along.")]


@app.command(name="export")
def export(
    run: str, file: str, /, *, ledgers: Ledgers = True, overwrite: Overwrite = False, spool: Spool = None, json: Json = False
) -> int:
    """Write a RUN into one FILE: OUT.h5 (HDF5; needs h5py) or OUT.zip, which zarr and explaind open as it is.

    Arrays, names of dimensions, manifest and commit marker come along, and the log of a run that was killed; analyses, reports and
    transplants stay behind.
    """
    with progress("exporting") as show:
        done = export_run(location_of(run, spool), file, ledgers, overwrite, show)
    printed({"run": str(location_of(run)), "file": file, **asdict(done)}, json, export_lines)
    return FINE


@app.command(name="import")
def import_(file: str, run: str, /, *, ledgers: Ledgers = True, overwrite: Overwrite = False, json: Json = False) -> int:
    """Make the folder of a RUN from a FILE that `explaind export` wrote, bitwise what it was; a file that is damaged is refused."""
    with progress("importing") as show:
        done = import_run(file, run, ledgers, overwrite, show)
    printed({"file": file, "run": str(location_of(run)), **asdict(done)}, json, import_lines)
    return FINE
