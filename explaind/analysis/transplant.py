"""Representations moved from one step of a training into another, evaluated or trained on: does what was learned carry over?

A transplant keeps some layers of a donor and draws the others anew. Beside it stand its controls:

random    the kept layers are drawn anew too: a training from scratch
shuffled  the donor's tensors with their entries permuted: the same values and norms, and nothing that was learned
whole     all layers are the donor's: what a fresh optimizer alone changes

A donor from the memorisation phase is a donor like any other: name an early step.
"""

import copy
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from explaind.analysis.surgery import Bench, Theta, drawn, grafted, shuffled
from explaind.analysis.table import Table
from explaind.config import Config
from explaind.ledger.by_name import config_of
from explaind.store import schema
from explaind.store.reader import Run
from explaind.tasks.training import fit

KINDS = ("transplant", "random", "shuffled", "whole")
PAPER = "Ranjan et al., ExPLAIND (arXiv 2505.20076): swapped and re-learned layers; controls and statistics: explaind"


@dataclass(frozen=True)
class Training:
    """How a patient is trained on: at most so many steps, until validation accuracy is `stop`, looked at every `every` steps."""

    steps: int
    stop: float = 0.95
    every: int = 10


@dataclass(frozen=True)
class Outcome:
    """What became of one patient. steps: None where validation accuracy never reached its aim."""

    steps: int | None
    taken: int
    train_loss: float
    train_accuracy: float
    val_loss: float
    val_accuracy: float


def swapped(bench: Bench, host: Theta, donors: Sequence[int], layers: Sequence[str]) -> Table:
    """The host with some layers of each donor step: one row a donor; nothing is trained.

    kl   KL(host ‖ swapped) of the validation predictions, in nats
    """
    rows = []
    for step in donors:
        theta = grafted(host, bench.run.theta(step), layers)
        rows.append({"donor": step, **bench.measured(theta), "kl": bench.divergence(host, theta)})
    return Table(
        "swap",
        f"loss and accuracy of the host with {', '.join(layers)} of each donor step; kl = mean KL(host ‖ swapped) on validation, nats",
        PAPER,
        {name: np.array([row[name] for row in rows]) for name in rows[0]},
    )


def configured(run: Run, training: Training, seed: int) -> Config:
    """The run's own configuration with other steps, and a seed for its batches."""
    config = config_of(run)
    return replace(config, train=replace(config.train, steps=training.steps, seed=seed))


def trained_on(
    bench: Bench, theta: Theta, training: Training, seed: int, path: Path | None = None, progress: Callable[[int, int], None] | None = None
) -> Outcome:
    """Train on from these parameters as the run was trained, with a fresh optimizer; recorded at `path` where one is given.

    What generalises from the beginning takes no step, unless it is recorded.
    """
    model = copy.deepcopy(bench.put(theta)).train()
    last = bench.of(model)
    if last["val_accuracy"] >= training.stop and path is None:
        return Outcome(0, 0, **last)

    def look(taken: int, model: nn.Module) -> bool:
        nonlocal last
        if taken % training.every and taken != training.steps:
            return False
        last = bench.of(model)
        return last["val_accuracy"] >= training.stop

    taken = fit(bench.task, configured(bench.run, training, seed), model, path, overwrite=True, progress=progress, stop=look)
    return Outcome(taken if last["val_accuracy"] >= training.stop else None, taken, **last)


@dataclass(frozen=True)
class Patient:
    """One operation: layers of a donor step kept, the others drawn anew in the way `fresh` (``surgery.drawn``) says."""

    kind: str
    donor: int
    layers: tuple[str, ...]
    seed: int
    fresh: str = "init"

    def theta(self, bench: Bench) -> dict[str, np.ndarray]:
        """The parameters that it begins with."""
        donor, fresh = bench.run.theta(self.donor), drawn(bench.run, bench.task, self.fresh, self.seed)
        if self.kind == "whole":
            return grafted(fresh, donor, tuple(fresh))
        if self.kind == "random":
            return fresh
        return grafted(fresh, shuffled(donor, self.seed) if self.kind == "shuffled" else donor, self.layers)


def outcome(bench: Bench, patient: Patient, training: Training, folder: Path) -> Outcome:
    """Train a patient, or read what became of it from `folder`: one small file each, written when it is done."""
    config = configured(bench.run, training, patient.seed).to_json()
    told = asdict(patient)
    if patient.kind in ("random", "whole"):  # one training serves all for which it is the same
        told |= {"layers": None, "donor": patient.donor if patient.kind == "whole" else None}
    told |= {"training": asdict(training), "config": config, "run": bench.run.identity}
    path = folder / f"{hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:24]}.json"
    try:
        return Outcome(**json.loads(path.read_text())["outcome"])
    except (OSError, ValueError, TypeError, KeyError):
        found = trained_on(bench, patient.theta(bench), training, patient.seed)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        schema.replace_file(path, json.dumps({"outcome": asdict(found), **told}, indent=1))
    except OSError as error:
        raise schema.unwritable(path, error) from error
    return found


def transplants(
    bench: Bench, patients: Sequence[Patient], training: Training, folder: Path, progress: Any = lambda done, of: None
) -> Table:
    """What became of each patient: one row each. What was interrupted goes on; nothing is trained twice.

    steps   until validation accuracy reached its aim; NaN where it did not
    still   steps that the run itself still took from the donor's step to the same aim (0 where it had reached it; NaN where it never did)
    """
    reached = _reached(bench, training)
    rows: list[dict[str, Any]] = []
    for done, patient in enumerate(patients, 1):
        found = asdict(outcome(bench, patient, training, folder))
        still = np.nan if reached is None else max(0, reached - patient.donor)
        steps = np.nan if found["steps"] is None else found["steps"]
        rows.append({"kind": patient.kind, "donor": patient.donor, "seed": patient.seed, **found, "steps": float(steps), "still": still})
        progress(done, len(patients))
    return Table(
        "transplants",
        f"steps until validation accuracy ≥ {training.stop} (looked at every {training.every}, at most {training.steps}); still: of the "
        "run itself from that donor",
        PAPER,
        {name: np.array([row[name] for row in rows]) for name in rows[0]},
    )


def patients(
    donors: Sequence[int], layers: Sequence[str], seeds: Sequence[int], fresh: str = "init", kinds: Sequence[str] = KINDS
) -> list[Patient]:
    """One of every kind for every donor step and seed."""
    return [Patient(kind, donor, tuple(layers), seed, fresh) for kind in kinds for donor in donors for seed in seeds]


def compared(table: Table, most: int) -> Table:
    """Medians over seeds, and how many times faster a transplant is than its controls: one row a kind and donor.

    reached       share of seeds that reached the aim
    median, least, most_steps  of steps; a seed that did not reach it counts as more than `most`, so that a median may be infinite
    faster_than_run      still / median
    faster_than_random   median of random / median, for the same seeds
    """
    rows = list(_compared(table, most))
    return Table(
        "compared",
        "median, least and most over seeds of steps to the aim (∞ where it was not reached); with n seeds the range holds the true median "
        "with probability 1 − 2^(1−n); faster: ratio of medians",
        "explaind: order statistics",
        {name: np.array([row[name] for row in rows]) for name in rows[0]},
    )


def _compared(table: Table, most: int) -> Iterator[dict[str, Any]]:
    for kind in dict.fromkeys(table["kind"].tolist()):
        for donor in dict.fromkeys(table["donor"].tolist()):
            mine = table.where(kind=kind, donor=donor)
            if not len(mine):
                continue
            steps, chance = (np.nan_to_num(t["steps"], nan=np.inf) for t in (mine, table.where(kind="random", donor=donor)))
            median = float(np.median(steps))
            scratch = float(np.median(chance)) if len(chance) else np.nan
            yield {
                "kind": kind,
                "donor": donor,
                "seeds": len(mine),
                "reached": float((steps <= most).mean()),
                "median": median,
                "least": float(steps.min()),
                "most": float(steps.max()),
                "faster_than_run": _ratio(float(mine["still"][0]), median),
                "faster_than_random": _ratio(scratch, median),
            }


def _ratio(one: float, two: float) -> float:
    if two == 0 or np.isinf(one):
        return float("nan") if one == two else np.inf
    return one / two


def _reached(bench: Bench, training: Training) -> int | None:
    """The first step of the run, among those that are looked at, with that validation accuracy."""
    for step in range(0, bench.run.steps + 1, training.every):
        if bench.measured(bench.run.theta(step))["val_accuracy"] >= training.stop:
            return step
    return None
