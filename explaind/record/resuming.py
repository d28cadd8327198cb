"""Going on with a recording that was interrupted, at the recorded state that the model is in."""

import numpy as np

from explaind.errors import RecordError
from explaind.record.watched import Watched
from explaind.store.checksums import theta_checksum
from explaind.store.location import Location
from explaind.store.manifest import Manifest
from explaind.store.reader import Run, open_run
from explaind.store.repair import recovered
from explaind.store.thin import going_on
from explaind.store.writer import RunWriter

ALIKE = (
    "optimizers",
    "layers",
    "dtype",
    "reduction",
    "model",
    "modules",
    "random_bytes",
    "examples",
    "gradient_filter",
    "thin",
    "gradients",
)
"""What a run and its continuation must agree on."""


def resumed(
    path: Location, manifest: Manifest, watched: Watched, theta: np.ndarray, fingerprint: np.ndarray | None
) -> tuple[RunWriter, int]:
    """A writer that goes on where the model is, and the number of the training's next step; theta: its parameters [param].

    Steps that were recorded after that state are forgotten: the training is about to make them again. RecordError where the run is
    damaged or another one, the model is in none of its states, or the optimizer has not made as many steps.
    """
    run = recovered(path)
    for name in ALIKE:
        want, got = (_plain(getattr(m, name)) for m in (run.manifest, manifest))
        if want != got:
            raise RecordError(
                "the run is of another training", where=f"{path}: {name}", expected=want, got=got, do="record to another path"
            )
    found = run.fingerprint
    if fingerprint is not None and (found is None or not np.array_equal(found, fingerprint)):
        raise RecordError("the data is not the data of the run", where=path, do="give the data of the training")
    damage = run.damage()
    if damage:
        raise RecordError("the run is damaged", where=path, got=damage[0], do="restore it from a copy, or record to another path")
    at = _state(run, theta)
    _check_ages(run, watched, at)
    return going_on(path, run.manifest, run.begun(at, theta)), int(run.numbers[at])


def stored_examples(path: Location) -> int:
    """How many examples have their gradients in a run that goes on."""
    return int(open_run(path).gradient_checksums()[0].sum())


def _state(run: Run, theta: np.ndarray) -> int:
    """The last state with these parameters."""
    if run.manifest.thin is not None:
        return _state_by_checksum(run, theta)
    block = run.manifest.block
    for start in range((run.steps // block) * block, -1, -block):
        states = run.states(start, min(start + block, run.steps + 1))
        same = [i for i, row in enumerate(states) if np.array_equal(row, theta, equal_nan=True)]
        if same:
            return start + same[-1]
    raise _in_none(run)


def _state_by_checksum(run: Run, theta: np.ndarray) -> int:
    crcs = run.checksums(0, run.steps + 1)
    for state in range(run.steps, -1, -1):
        previous = crcs[state - 1] if state else np.zeros_like(crcs[0])
        if np.array_equal(theta_checksum(theta, run.manifest.layers, previous), crcs[state]):
            return state
    raise _in_none(run)


def _in_none(run: Run) -> RecordError:
    return RecordError(
        "the model is in none of the run's states",
        where=run.path,
        expected=f"the parameters after one of its {run.steps} steps",
        got="others",
        do="load the training's checkpoint into the model and its optimizer first",
    )


def _check_ages(run: Run, watched: Watched, at: int) -> None:
    """The optimizer must have made the updates that the run has of it."""
    if at == 0:
        return
    last = run.block(at - 1, at).rows[0].age
    for layer, before, now in zip(watched.layers, last.tolist(), watched.ages(), strict=True):
        # Some rules count updates; others only know whether there was one (0, 1), or keep nothing.
        if (before > 0 and now == 0) or (before > 1 and now != before + 1):
            raise RecordError(
                "the optimizer has not made the steps of the run",
                where=f"{run.path}, after step {at - 1}: {layer.name}",
                expected=f"{before + 1} updates",
                got=now,
                do="load the optimizer's checkpoint (load_state_dict) too",
            )


def _plain(value: object) -> object:
    return repr(value) if isinstance(value, tuple) else value
