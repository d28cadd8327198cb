"""Where the log and the lock of a recording stand: beside the run in a folder; of a run at a URL in a folder of this machine, its spool.

An object store can neither append a step nor lock a file. So the spool keeps the steps behind the committed ones, and one recorder at a
time holds it: a recording that is killed is found again on this machine, and a second recorder of the same URL is refused here. Who reads
elsewhere sees what was committed. Nothing keeps a recorder of another machine away; but who writes reads the marker again before replacing
it, and stops where somebody else has (``commit``).

Every run has a name in its attributes, which no other run has. The steps of its log bear it (logs.py), and its spool: those of another
run are neither taken up nor overwritten.
"""

import secrets
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from explaind.errors import StoreError
from explaind.store import described, schema, tail
from explaind.store.checksums import text_checksum
from explaind.store.durable import write_new
from explaind.store.location import MARKER, Location, is_free, replace_file
from explaind.store.remote import Remote
from explaind.store.tail import NAMES, Record, Tail

NAME = "recording"
UNBEGUN = (NAMES[0], f"{described.FILE}.partial")
"""Files of a folder in which a recording was killed before it said what it is."""


def begin(place: Location, attributes: Mapping[str, Any]) -> tuple[str, Tail]:
    """Name and log of a new run; StoreError where something is there already, or somebody is recording."""
    schema.check_new(place)
    name = secrets.token_hex(16)
    if isinstance(place, Path):
        return name, _begun(place, {**attributes, NAME: name})
    log = _held(place, name)
    try:
        schema.create_group(place, "run", {**attributes, NAME: name})
    except BaseException:
        let_go(place, log, remove=True)
        raise
    return name, log


def _begun(place: Path, attributes: Mapping[str, Any]) -> Tail:
    """In a folder. Of two who begin at once, whoever holds the log does; the other one has written nothing."""
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise schema.unwritable(place, error) from error
    log = _beside(place)
    own = is_free(place, but=NAMES[:1])  # else somebody has begun since the place was looked at, and may be through
    try:
        schema.check_new(place, but=NAMES[:1])
        try:
            write_new(place / described.FILE, described.group(schema.marked("run", attributes)))
        except FileExistsError:  # somebody who holds no lock, where there are none
            schema.check_new(place)
            raise
    except BaseException as error:
        log.close(remove=own)
        if isinstance(error, OSError):
            raise schema.unwritable(place, error) from error
        raise
    return log


def go_on(place: Location) -> tuple[str, Tail]:
    """Name and log of a run that is gone on with; StoreError where somebody is recording it."""
    name = named(schema.open_group(place, "run").attrs)
    return name, _beside(place) if isinstance(place, Path) else _held(place, name)


def named(attributes: Mapping[str, Any]) -> str:
    """The name of a run; where an older explaind gave it none, what its manifest says must do."""
    return str(attributes.get(NAME) or text_checksum(attributes.get("manifest")))


def let_go(place: Location, log: Tail, remove: bool) -> None:
    """Close the log; remove: a run that is whole needs neither it nor a spool."""
    if remove and isinstance(place, Remote):
        (place.spool / NAME).unlink(missing_ok=True)  # while nobody else can hold it
    log.close(remove)
    if remove and isinstance(place, Remote):
        with suppress(OSError):  # it holds something else
            place.spool.rmdir()


def log_of(place: Location, attributes: Mapping[str, Any]) -> Path | None:
    """Where the log of this run stands; None where this machine has none."""
    if isinstance(place, Path):
        return place
    return place.spool if _told(place.spool) == named(attributes) else None


def logged(place: Location, attributes: Mapping[str, Any]) -> list[Record]:
    """The sound records of a run's log, in order."""
    log = log_of(place, attributes)
    return [] if log is None else tail.records(log)


def check_own(place: Location, before: str | None) -> None:
    """StoreError where the marker of a run at a URL is not what this writer put there last, if it has."""
    if isinstance(place, Remote) and before is not None:
        try:
            same = (place / MARKER).read_bytes() == before.encode()
        except FileNotFoundError:
            same = False
        if not same:
            raise StoreError("somebody else is writing this run", where=place, do="let one of you record to another URL")


def commit(place: Location, marker: str, before: str | None) -> None:
    """Replace the marker of a run; StoreError where it is not this writer's own."""
    check_own(place, before)
    schema.replace_file(place / MARKER, marker)


def check_idle(place: Location) -> None:
    """StoreError where somebody is writing the run: on this machine, where it is at a URL."""
    tail.check_idle(place if isinstance(place, Path) else place.spool, place)


def forget(place: Location, attributes: Mapping[str, Any]) -> None:
    """Remove the log of a run that is removed."""
    log = log_of(place, attributes)
    if log is not None:
        for name in NAMES:
            (log / name).unlink(missing_ok=True)


def _beside(place: Path) -> Tail:
    try:
        return Tail(place)
    except OSError as error:
        raise schema.unwritable(place, error) from error


def _held(place: Remote, recording: str) -> Tail:
    """The lock on the spool, which is this recording's from now on."""
    spool = place.spool
    try:
        spool.mkdir(parents=True, exist_ok=True, mode=0o700)
        log = Tail(spool, place)
        try:
            if _told(spool) != recording:
                _check_empty(place)
                replace_file(spool / NAME, recording)
        except BaseException:
            log.close(remove=False)
            raise
        return log
    except OSError as error:
        raise schema.unwritable(spool, error) from error


def _check_empty(place: Remote) -> None:
    found = tail.records(place.spool)
    if found:
        raise StoreError(
            f"steps of another recording to {place} are still logged here",
            where=place.spool,
            got=f"{len(found)} up to step {found[-1].step}",
            do="remove this folder if they are not wanted, or name another spool",
        )


def _told(spool: Path) -> str | None:
    try:
        return (spool / NAME).read_text()
    except (OSError, UnicodeDecodeError):
        return None
