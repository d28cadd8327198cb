"""What of a log goes on from what a run has committed: steps of another run, or of another past of this one, are never taken up."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from explaind.errors import StoreError
from explaind.store.checksums import text_checksum
from explaind.store.spool import log_of, logged, named
from explaind.store.tail import NAMES, Record

if TYPE_CHECKING:
    from explaind.store.reader import Run


def behind(run: "Run", steps: int) -> tuple[list[Record], StoreError | None]:
    """The records that go on from so many steps; and what is wrong, where the log holds others as well."""
    log = logged(run.path, run.attributes)
    if not log:
        return [], None
    if not run.ends_sound(steps):  # what goes on from there cannot be told: it is up to whoever looks at what is sound
        return following(log, steps)[0], None
    own, others = following(log, steps, run.chain(steps).link, text_checksum(named(run.attributes)))
    if not others:
        return own, None
    return own, StoreError(
        "the log holds steps of another run",
        where=log_of(run.path, run.attributes),
        expected="each to go on from the one before it",
        got="a step that does not",
        do=f"put the run's own zarr.json, {' and '.join(NAMES)} back, or remove the one that is not: what is committed stays",
    )


def following(found: Sequence[Record], step: int, link: int | None = None, run: int | None = None) -> tuple[list[Record], bool]:
    """The records of step `step` and those right after it, without a gap, up to the last whose parameters are known.

    Each goes on from the one before it, and the first from this link. And whether there are others: of another run than this, or one
    behind them that does not go on.
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
    return out, others or step in known
