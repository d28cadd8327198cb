"""Putting a run right that was killed or damaged: what was logged is taken up, what is not sound is cut off."""

import os
from dataclasses import dataclass

from explaind.errors import StoreError
from explaind.store import logs
from explaind.store.damage import of_steps
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
    """Steps that were cut off, committed or logged, from the first fault on, or behind a commit marker that is an older one."""
    left: str | None = None
    """What is still wrong, in words: frozen parameters, buffers or fingerprints, which are in no step that could be cut off."""


def repair(where: Where, spool: str | os.PathLike[str] | None = None) -> Repair:
    """Truncate a run to its last sound step, and take up the steps of its log; a sound run is left alone.

    StoreError where nothing can be read, where not even the first state is sound, or where another process is writing the run.
    """
    run = open_run(where, spool)
    path = run.path
    if path.is_file():
        raise StoreError("a run in a zip is only read", where=path, do="explaind import it first")
    before, sound = run.steps, run.sound()
    behind, left = run.forgotten(), run.constants_damage()
    if sound == 0 and any(of_steps(run.first(0), 0)):
        raise StoreError("not even the first state of the run is sound", where=path, do="restore the run from a copy")
    logged, _, lost = run.logged_behind(sound)
    if sound == before and not logged and not lost and not behind:
        return Repair(before, before, 0, 0, left)
    writer = going_on(path, run.manifest, run.first(sound).begun(sound), logged)
    writer.close(complete=False)
    after = sound + len(logged)
    return Repair(before, after, len(logged), max(0, before - after, lost) + behind, left)


def recovered(path: Location) -> Run:
    """A run with its log taken up; damage is left where it is. StoreError where the log has lost steps that were behind those."""
    run = open_run(path)
    logged, _, lost = run.logged_behind(run.steps)
    if lost and (damaged := logs.gap(run)) is not None:
        raise damaged
    if logged:
        going_on(path, run.manifest, run.begun(run.steps), logged).close(complete=False)
        run = open_run(path)
    return run
