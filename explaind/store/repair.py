"""Putting a run right that was killed or damaged: what was logged is taken up, what is not sound is cut off."""

import os
from dataclasses import dataclass

from explaind.errors import StoreError
from explaind.store import logs, mirror
from explaind.store.damage import of_constants, of_steps
from explaind.store.location import Location, Where, location_of
from explaind.store.opening import passing
from explaind.store.reader import Run, open_run
from explaind.store.schema import unwritable
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
    restored: tuple[str, ...] = ()
    """Files of metadata that were made again what they had been."""


def repair(where: Where, spool: str | os.PathLike[str] | None = None) -> Repair:
    """Truncate a run to its last sound step, and take up the steps of its log; a sound run is left alone.

    Before that, metadata of a run that was finished are made again what they were (``mirror``). StoreError where nothing can be read, where
    not even the first state is sound, or where another process is writing the run.
    """
    path = location_of(where, spool)
    if path.is_file():
        raise StoreError("a run in a zip is only read", where=path, do="explaind import it first")
    restored = _put_back(path)
    run = open_run(path)
    before, sound = run.steps, run.sound()
    behind, left = run.forgotten(), of_constants(run)
    if sound == 0 and any(of_steps(run.first(0), 0)):
        raise StoreError("not even the first state of the run is sound", where=path, do="restore the run from a copy")
    logged, _, lost = run.logged_behind(sound)
    if sound == before and not logged and not lost and not behind:
        return Repair(before, before, 0, 0, left, restored)
    writer = going_on(path, run.manifest, run.first(sound).begun(sound), logged)
    writer.close(complete=False)
    after = sound + len(logged)
    return Repair(before, after, len(logged), max(0, before - after, lost) + behind, left, restored)


def _put_back(path: Location) -> tuple[str, ...]:
    """Only of a run that is damaged: whoever added words of his own to the metadata of a sound one keeps them."""
    changed = mirror.changed(path)
    if not changed or _is_sound(path):
        return ()
    try:
        return mirror.put_back(path, changed)
    except OSError as error:
        raise unwritable(path, error) from error


def _is_sound(path: Location) -> bool:
    try:
        return not open_run(path).damage()
    except StoreError as error:
        if passing(error):
            raise
        return False


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
