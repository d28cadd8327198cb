"""Where stored bytes are not what was recorded: every checksum of a run, made anew."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from explaind.errors import StoreError
from explaind.store.checksums import constants_checksum, step_checksum, theta_checksum
from explaind.store.gradients import first_damaged
from explaind.store.opening import passing

if TYPE_CHECKING:
    from explaind.store.reader import Run


def damage(run: "Run") -> list[str]:
    """In words; empty when every checksum holds. Of a thin run the parameters that are stored."""
    return [*_of_constants(run), *of_steps(run, 0), *_of_gradients(run)]


def sound_steps(run: "Run") -> int:
    """Steps up to the first fault."""
    found, block = 0, run.manifest.block
    wrong = first_damaged(run)
    if wrong is not None:
        return sound_steps(run.first(wrong))
    while found < run.steps and _holds(run, found, end := min(found + block - found % block, run.steps)):
        found = end
    while run.manifest.thin is None and found < run.steps and _holds(run, found, found + 1):
        found += 1
    return found


def ends_sound(run: "Run", steps: int) -> bool:
    """Whether the last of so many steps is what was recorded, and the parameters behind it."""
    last = max(0, steps - 1)
    return _holds(run, last if run.manifest.thin is None else last - last % run.manifest.block, steps)


def _holds(run: "Run", start: int, stop: int) -> bool:
    """Whether steps [start, stop), with the states before and after each, are sound."""
    try:
        return not any(of_steps(run.first(stop), start))
    except StoreError as error:
        if passing(error):
            raise
        return False


def of_constants(run: "Run") -> str | None:
    """What is wrong with frozen parameters, buffers and fingerprints, which are in no step; None where they are sound."""
    try:
        return next(_of_constants(run), None)
    except StoreError as error:
        if passing(error):
            raise
        return str(error)


def of_steps(run: "Run", start: int) -> Iterator[str]:
    """Of the steps from there on and the parameters before and after each, without gradients of examples.

    start: a step, one of a thin run before which something is stored; what is before it is known to be sound
    """
    yield from _of_states(run, start)
    yield from _of_rows(run, start)


def _of_gradients(run: "Run") -> Iterator[str]:
    step = first_damaged(run)
    if step is not None:
        yield f"the gradients of the examples of step {step} are not what was recorded"


def _of_constants(run: "Run") -> Iterator[str]:
    if run.sums["constants"] != constants_checksum(run.constants, run.fingerprint):
        yield "frozen parameters, buffers or fingerprints are not what was recorded"


def _of_states(run: "Run", first: int) -> Iterator[str]:
    block, layers = run.manifest.block, run.manifest.layers
    base = max(0, first - 1)
    wanted = run.checksums(base, run.steps + 1)
    for start in range(first, run.steps + 1, block):
        stop = min(start + block, run.steps + 1)
        for i, theta in zip(run.stored(start, stop), run.stored_states(start, stop), strict=True):
            crc = theta_checksum(theta, layers, wanted[i - 1 - base] if i else np.zeros_like(wanted[0]))
            wrong = [a.name for a, c, w in zip(layers, crc, wanted[i - base], strict=True) if c != w]
            if wrong:
                yield _theta_words(i, wrong, len(crc))


def _of_rows(run: "Run", first: int) -> Iterator[str]:
    thin, block = run.manifest.thin is not None, run.manifest.block
    previous = int(run.step_checksums(first - 1, first)[0]) if first else 0
    wanted, of_theta = run.step_checksums(first, run.steps), run.checksums(first, run.steps)
    kinds = "batch, weights, hyper-parameters or " + ("the optimizer's state" if thin else "preconditioner")
    for start in range(first, run.steps, block):
        some = run.block(start, min(start + block, run.steps))
        for i, (row, mode) in enumerate(zip(some.rows, some.modes, strict=True), start):
            known = mode in range(len(run.modes))
            if not known or step_checksum(row, mode, previous, of_theta[i - first] if thin else None) != wanted[i - first]:
                yield f"the record of step {i} is not what was recorded ({kinds}), or a step before it was removed"
            previous = int(wanted[i - first])


def _theta_words(state: int, wrong: list[str], layers: int) -> str:
    if len(wrong) == layers and layers > 1:
        return f"a step was removed, inserted or exchanged before state {state}: no tensor of theta continues the record there"
    return f"theta before step {state} is not what was recorded: {', '.join(wrong)} changed on disk"
