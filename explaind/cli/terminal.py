"""What all verbs share: the app, exit status, options, the progress bar, and how facts are printed."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

from cyclopts import App, Parameter
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import explaind
from explaind.ledger.by_name import task_of
from explaind.store.location import Location, names_in
from explaind.store.reader import Run
from explaind.tasks import Task

FINE, FAILED, BAD_INPUT = 0, 1, 2

app = App(
    name="explaind",
    version=explaind.__version__,
    help="The training ledger: why a model predicts what it predicts, as a sum that closes.",
    help_on_error=False,
)

Overrides = Annotated[str, Parameter(allow_leading_hyphen=True, show=False)]
Spool = Annotated[str | None, Parameter(help="Of a RUN at a URL: the folder of this machine that holds its log, if not the usual one.")]
Json = Annotated[bool, Parameter(name="--json", negative="", help="Print facts as one JSON value.")]
Auto = Annotated[bool, Parameter(negative="", help="Decompose with the settings that `explaind doctor` recommends.")]
Overwrite = Annotated[bool, Parameter(negative="", help="Replace a run, or a ledger, of the same name.")]


def task_or_none(recorded: Run) -> Task | None:
    """The task that a run was recorded from; None where its training loop was the user's own."""
    return None if recorded.manifest.config is None else task_of(recorded)


def ledgers_of(path: Location) -> list[Location]:
    """The ledgers of a run."""
    return [path / "ledgers" / name for name in names_in(path / "ledgers") if not name.startswith(".")]


@contextmanager
def progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on a terminal; nothing in a pipe."""
    console = Console(stderr=True)
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def printed(facts: dict[str, Any], as_json: bool, lines: Callable[[dict[str, Any]], list[str]]) -> None:
    """Facts as JSON, or as lines for people."""
    print(json.dumps(facts, indent=1) if as_json else "\n".join(lines(facts)))
