"""Putting a run right that was killed or damaged: what was logged is taken up, what is not sound is cut off."""

import os
from dataclasses import dataclass

from explaind.errors import StoreError
from explaind.store.damage import damage
from explaind.store.location import Location, Where
from explaind.store.reader import Run, open_run
from explaind.store.thin import going_on


@dataclass(frozen=True)
class Repair:
    """What was done."""

    before: int
    """Steps that could be read."""
    after: int
    regained: int
    """Steps that were taken from the log."""
    lost: int
    """Steps that were cut off, from the first fault on, or behind a commit marker that is an older one."""


def repair(where: Where, spool: str | os.PathLike[str] | None = None) -> Repair:
    """Truncate a run to its last sound step, and take up the steps of its log; a sound run is left alone.

    StoreError where nothing can be read, where not even the first state is sound, or where another process is writing the run.
    """
    run = open_run(where, spool)
    path = run.path
    if path.is_file():
        raise StoreError("a run in a zip is only read", where=path, do="explaind import it first")
    before, sound = run.steps, run.sound()
    behind = run.forgotten()
    if sound == 0 and damage(run.first(0)):
        raise StoreError("not even the first state of the run is sound", where=path, do="restore the run from a copy")
    logged = run.logged_behind(sound)
    if sound == before and not logged and not behind:
        return Repair(before, before, 0, 0)
    writer = going_on(path, run.manifest, run.first(sound).begun(sound), logged)
    writer.close(complete=False)
    return Repair(before, sound + len(logged), len(logged), max(0, before - sound - len(logged)) + behind)


def recovered(path: Location) -> Run:
    """A run with its log taken up; damage is left where it is."""
    run = open_run(path)
    if logged := run.logged_behind(run.steps):
        going_on(path, run.manifest, run.begun(run.steps), logged).close(complete=False)
        run = open_run(path)
    return run
