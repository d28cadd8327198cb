"""Where stored bytes are not what was recorded: every checksum of a run, made anew."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from explaind.store.checksums import constants_checksum, step_checksum, theta_checksum
from explaind.store.gradients import first_damaged

if TYPE_CHECKING:
    from explaind.store.reader import Run


def damage(run: "Run", gradients: bool = True) -> list[str]:
    """In words; empty when every checksum holds. Of a thin run the parameters that are stored; gradients: whether to read them."""
    checksums = run.checksums(0, run.steps + 1)
    found = [*_of_constants(run), *_of_states(run, checksums), *_of_steps(run, checksums)]
    return [*found, *_of_gradients(run)] if gradients else found


def _of_gradients(run: "Run") -> Iterator[str]:
    step = first_damaged(run)
    if step is not None:
        yield f"the gradients of the examples of step {step} are not what was recorded"


def _of_constants(run: "Run") -> Iterator[str]:
    if run.sums and run.sums["constants"] != constants_checksum(run.constants, run.fingerprint):
        yield "frozen parameters, buffers or fingerprints are not what was recorded"


def _of_states(run: "Run", wanted: np.ndarray) -> Iterator[str]:
    block, layers = run.manifest.block, run.manifest.layers
    for start in range(0, run.steps + 1, block):
        stop = min(start + block, run.steps + 1)
        for i, theta in zip(run.stored(start, stop), run.stored_states(start, stop), strict=True):
            crc = theta_checksum(theta, layers, wanted[i - 1] if i else np.zeros_like(wanted[0]))
            wrong = [a.name for a, c, w in zip(layers, crc, wanted[i], strict=True) if c != w]
            if wrong:
                yield _theta_words(i, wrong, len(crc))


def _of_steps(run: "Run", of_theta: np.ndarray) -> Iterator[str]:
    wanted, thin, previous = run.step_checksums(0, run.steps), run.manifest.thin is not None, 0
    kinds = "batch, weights, hyper-parameters or " + ("the optimizer's state" if thin else "preconditioner")
    for start in range(0, run.steps, run.manifest.block):
        block = run.block(start, min(start + run.manifest.block, run.steps))
        for i, (row, mode) in enumerate(zip(block.rows, block.modes, strict=True), start):
            if step_checksum(row, mode, previous, of_theta[i] if thin else None) != wanted[i]:
                yield f"the record of step {i} is not what was recorded ({kinds}), or a step before it was removed"
            previous = int(wanted[i])


def _theta_words(state: int, wrong: list[str], layers: int) -> str:
    if len(wrong) == layers and layers > 1:
        return f"a step was removed, inserted or exchanged before state {state}: no tensor of theta continues the record there"
    return f"theta before step {state} is not what was recorded: {', '.join(wrong)} changed on disk"
