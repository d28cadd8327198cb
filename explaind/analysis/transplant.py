"""Representations moved from one step of a training into another, evaluated or trained on: does what was learned carry over?

A transplant keeps some layers of a donor and draws the others anew. Beside it stand its controls:

random    the kept layers are drawn anew too: a training from scratch
shuffled  the donor's tensors with their entries permuted: the same values and norms, and nothing that was learned
whole     all layers are the donor's: what a fresh optimizer alone changes

memorised  one donor from the memorisation phase, such as ``memorising`` finds; all others are compared with it
frozen  as transplant, but the kept layers stay as they are, so that only the others learn

A self-transplant changes nothing, which ``surgery.identities`` says of every donor.
"""

import copy
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from explaind.analysis.surgery import Bench, Theta, divergence, drawn, grafted, shuffled
from explaind.analysis.table import Table, tabulated
from explaind.config import Config
from explaind.errors import RequestError
from explaind.ledger.by_name import config_of
from explaind.store import schema
from explaind.store.location import Location
from explaind.store.reader import Run
from explaind.tasks.training import fit

KINDS = ("transplant", "random", "shuffled", "whole")
"""For every donor step. "memorised" and "frozen" are asked for by name."""
ALL_KINDS = (*KINDS, "memorised", "frozen")
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

    kl, kl_train              KL(host ‖ swapped) of the predictions, in nats, mean over the validation or the training split
    kl_donor, kl_donor_train  KL(donor ‖ swapped), likewise
    """
    rows, of_host = [], {split: bench.log_probabilities(host, split) for split in ("val", "train")}
    for step in donors:
        donor = bench.run.theta(step)
        theta, row = grafted(host, donor, layers), dict[str, float]()
        for split, end in (("val", ""), ("train", "_train")):
            made = bench.log_probabilities(theta, split)
            row |= {f"kl{end}": divergence(of_host[split], made)}
            row |= {f"kl_donor{end}": divergence(bench.log_probabilities(donor, split), made)}
        rows.append({"donor": step, **bench.measured(theta), **row})
    return tabulated(
        "swap",
        PAPER,
        f"loss and accuracy of the host with {', '.join(layers)} of each donor step; kl = mean KL(host ‖ swapped) on validation, nats; "
        "kl_donor = mean KL(donor ‖ swapped); …_train: on the training split",
        rows,
    )


def confused(bench: Bench, host: Theta, donors: Sequence[int], layers: Sequence[str], split: str = "val") -> Table:
    """How often each true class is taken for each class by the host with layers of each donor step; pairs that never occur are left out."""
    rows = []
    for step in donors:
        counts = bench.confusion(grafted(host, bench.run.theta(step), layers), split)
        rows += [{"donor": step, "true": t, "predicted": p, "count": counts[t, p]} for t, p in np.argwhere(counts).tolist()]
    return tabulated("confusion", PAPER, f"number of examples of {split}, by true and predicted class (places on the output axis)", rows)


def memorising(bench: Bench, training: Training, fitted: float = 0.99) -> int:
    """A step of the memorisation phase: the first one looked at whose training accuracy is at least `fitted`.

    RequestError where there is none, or where validation has reached the aim of `training` by then.
    """
    for step in range(0, bench.run.steps + 1, training.every):
        found = bench.measured(bench.run.theta(step))
        if found["train_accuracy"] >= fitted:
            if found["val_accuracy"] < training.stop:
                return step
            break
    raise RequestError(
        "the run has no memorisation phase",
        where=bench.run.path,
        expected=f"training accuracy of {fitted} before validation accuracy of {training.stop}",
        do="leave this control out, or name a donor step",
    )


def configured(run: Run, training: Training, seed: int) -> Config:
    """The run's own configuration with other steps, a seed for its batches, and no gradients of examples stored."""
    config = config_of(run)
    return replace(config, train=replace(config.train, steps=training.steps, seed=seed, gradients="recompute"))


def trained_on(
    bench: Bench,
    theta: Theta,
    training: Training,
    seed: int,
    path: Location | None = None,
    progress: Callable[[int, int], None] | None = None,
    frozen: Sequence[str] = (),
) -> Outcome:
    """Train on from these parameters as the run was trained, with a fresh optimizer; recorded at `path` where one is given.

    What generalises from the beginning reached the aim after 0 steps, and takes none, unless it is recorded: then it goes on to the first
    look, so that there is a recording. Layers that are `frozen` keep their parameters: they get no gradient, so that the optimizer, decay
    included, leaves them alone. RequestError where nothing is left to train.
    """
    model = copy.deepcopy(bench.put(theta)).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and name not in frozen)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise RequestError("nothing is left to train", got=f"{len(frozen)} frozen layers", do="freeze fewer")
    first = last = bench.of(model)
    if first["val_accuracy"] >= training.stop and path is None:
        return _outcome(first, first, 0, training)

    def look(taken: int, model: nn.Module) -> bool:
        nonlocal last
        if taken % training.every and taken != training.steps:
            return False
        last = bench.of(model)
        return last["val_accuracy"] >= training.stop

    taken = fit(bench.task, configured(bench.run, training, seed), model, path, overwrite=True, progress=progress, stop=look)
    return _outcome(first, last, taken, training)


def recorded(bench: Bench, run: Run, training: Training) -> Outcome:
    """What became of a training that ``trained_on`` recorded."""
    first, last = (bench.measured(run.theta(step)) for step in (0, run.steps))
    return _outcome(first, last, run.steps, training)


def _outcome(first: dict[str, float], last: dict[str, float], taken: int, training: Training) -> Outcome:
    """Of a training with these measures before its first step and after its last one."""
    arrived = (steps for steps, found in ((0, first), (taken, last)) if found["val_accuracy"] >= training.stop)
    return Outcome(next(arrived, None), taken, **last)


@dataclass(frozen=True)
class Patient:
    """One operation: layers of a donor step kept, the others drawn anew in the way `fresh` (``surgery.drawn``) says.

    RequestError for a kind that is not one of ``ALL_KINDS``.
    """

    kind: str
    donor: int
    layers: tuple[str, ...]
    seed: int
    fresh: str = "init"

    def __post_init__(self) -> None:
        if self.kind not in ALL_KINDS:
            raise RequestError("unknown kind of patient", expected=", ".join(ALL_KINDS), got=repr(self.kind), do="name one of these")

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
    config = configured(bench.run, training, patient.seed).of_training()
    told = asdict(patient)
    if patient.kind in ("random", "whole"):  # one training serves all for which it is the same
        told |= {"layers": None, "donor": patient.donor if patient.kind == "whole" else None}
    told |= {"kind": "transplant"} if patient.kind == "memorised" else {}
    told |= {"training": asdict(training), "config": config, "run": bench.run.identity}
    path = folder / f"{hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:24]}.json"
    try:
        return Outcome(**json.loads(path.read_text())["outcome"])
    except (OSError, ValueError, TypeError, KeyError):
        frozen = patient.layers if patient.kind == "frozen" else ()
        found = trained_on(bench, patient.theta(bench), training, patient.seed, frozen=frozen)
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
    return tabulated(
        "transplants",
        PAPER,
        f"steps until validation accuracy ≥ {training.stop} (looked at every {training.every}, at most {training.steps}); still: of the "
        "run itself from that donor",
        rows,
    )


def patients(
    donors: Sequence[int], layers: Sequence[str], seeds: Sequence[int], fresh: str = "init", kinds: Sequence[str] = KINDS
) -> list[Patient]:
    """One of every kind for every donor step and seed."""
    return [Patient(kind, donor, tuple(layers), seed, fresh) for kind in kinds for donor in donors for seed in seeds]


def _reached(bench: Bench, training: Training) -> int | None:
    """The first step of the run, among those that are looked at, with that validation accuracy."""
    for step in range(0, bench.run.steps + 1, training.every):
        if bench.measured(bench.run.theta(step))["val_accuracy"] >= training.stop:
            return step
    return None
