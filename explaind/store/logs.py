"""What of a log goes on from what a run has committed: steps of another run, or of another past of this one, are never taken up."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from explaind.errors import StoreError
from explaind.store.checksums import text_checksum
from explaind.store.damage import ends_sound
from explaind.store.gradients import having_gradients
from explaind.store.spool import check_idle, log_of, logged, named
from explaind.store.tail import NAMES, Record

if TYPE_CHECKING:
    from explaind.store.reader import Run


class Logged(NamedTuple):
    """What a log holds behind a number of steps."""

    steps: list[Record]
    """Those that go on from them, without a gap."""
    others: bool = False
    """Whether there are steps of another run than this, or one that does not go on."""
    lost: int = 0
    """Steps of this run behind those, of which the first is damaged."""


def behind(run: "Run", steps: int) -> Logged:
    """The records that go on from so many steps, as far as what else they recorded is there, too."""
    log = logged(run.path, run.attributes)
    if not log:
        return Logged([])
    if not ends_sound(run, steps):  # what goes on from there cannot be told: it is up to whoever looks at what is sound
        found = following(log, steps)._replace(others=False)
    else:
        found = following(log, steps, run.chain(steps).link, text_checksum(named(run.attributes)))
    whole = having_gradients(run, found.steps)
    return Logged(whole, found.others, found.lost + len(found.steps) - len(whole))


def foreign(run: "Run") -> StoreError:
    """Where its log holds others."""
    return StoreError(
        "the log holds steps of another run",
        where=log_of(run.path, run.attributes),
        expected="each to go on from the one before it",
        got="a step that does not",
        do=f"put the run's own zarr.json, {' and '.join(NAMES)} back, or remove the one that is not: what is committed stays",
    )


def gap(run: "Run") -> StoreError | None:
    """Where its log has lost steps; None while somebody is writing it, for then it may have gone on since the marker was read."""
    if not run.path.is_file():
        try:
            check_idle(run.path)
        except StoreError:
            return None
    found = behind(run, run.steps)
    if not found.lost or not run.is_current():
        return None
    return StoreError(
        f"step {run.steps + len(found.steps)} is damaged in the log",
        where=log_of(run.path, run.attributes),
        expected="all that was logged",
        got=f"{len(found.steps)} steps and, behind them, {found.lost} that cannot be taken up",
        do="put the log back from a copy, or let explaind repair cut them off",
    )


def following(found: Sequence[Record], step: int, link: int | None = None, run: int | None = None) -> Logged:
    """The records of step `step` and those right after it, without a gap, up to the last whose parameters are known.

    Each goes on from the one before it, and the first from this link.
    """
    known, others = dict[int, list[Record]](), False
    for record in found:
        if run is None or record.links is None or record.links.run == run:
            known.setdefault(record.step, []).append(record)
        else:
            others = True
    out = list[Record]()
    while fitting := [r for r in known.get(step, ()) if link is None or r.links is None or r.links.before == link]:
        out.append(max(fitting, key=lambda record: record.theta.size))
        link = None if out[-1].links is None else out[-1].links.behind
        step += 1
    while out and not out[-1].theta.size:
        out.pop()
    return Logged(out, others or step in known, max(0, max(known, default=0) + 1 - step))
