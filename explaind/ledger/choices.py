"""How a training may be recorded: how thickly, in which codec, with or without the gradients of its examples; and what each then takes."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from explaind.config import Config
from explaind.errors import ExplaindError
from explaind.ledger.by_name import diagnosed
from explaind.ledger.doctor import Diagnosis
from explaind.ledger.sources import STORED
from explaind.ledger.trial import TRIAL, Trial, gradient_bytes, over_budget, tried
from explaind.record.thinning import spacing
from explaind.replay.thin import ROOM
from explaind.store.schema import CHOICES

APART = 4
"""Spacings that are shown are so many times narrower and wider than the root of the steps."""
TRIAL_BYTES = 256 << 20
"""Gradients of examples that are stored to try it take no more, if two steps do not."""


@dataclass(frozen=True)
class Choice:
    """One way to record a training, and what it takes. Nothing is known of one that is refused."""

    thin: int
    """Steps between two stored states; 0: every state is stored."""
    codec: str
    """Of parameters, momenta and second moments; "any" where there is no difference."""
    gradients: str
    """The dtype in which the gradients of examples are stored; "": they are made again when they are asked for."""
    asked: bool
    """Whether the configuration says so."""
    refused: str = ""
    disk: int | None = None
    """Bytes of the record."""
    record_seconds: float | None = None
    record_memory: int | None = None
    """Bytes of the process at its largest."""
    ledger: int | None = None
    """Bytes of the ledger, uncompressed."""
    decompose_seconds: float | None = None
    decompose_memory: int | None = None


def choices(settings: Config, before: float = 0.0) -> tuple[Diagnosis, list[Choice]]:
    """Estimates from a few steps that are recorded in each way; and what the doctor says of the record that is asked for.

    before  seconds that the process has spent on reading the data already
    Raises what ``train`` does, such as ConfigError for settings that make no sense.
    """
    steps, asked, storing = settings.train.steps, _spacing(settings), settings.train.gradients == "store"
    with TemporaryDirectory() as folder:
        full = {codec: tried(_recorded(settings, 0, codec), Path(folder) / codec) for codec in CHOICES}
        first = full[CHOICES[0]]
        once = before + first.start  # what a process does once, the first of these trials has done for all
        thin, refused = None, ""
        try:
            thin = tried(_recorded(settings, max(1, TRIAL // 2), CHOICES[0]), Path(folder) / "thin")
        except ExplaindError as error:
            refused = str(error)
        memory = max(trial.memory for trial in [*full.values(), *([] if thin is None else [thin])])
        products = "auto" if settings.decompose.products == STORED else settings.decompose.products
        found = diagnosed(first.run, replace(settings.decompose, products=products), steps)
        out = []
        for codec, trial in full.items():
            one = Choice(0, codec, "", not storing and (asked, settings.train.codec) == (0, codec))
            out.append(_told(one, replace(trial, start=once, memory=memory), found, steps))
        for every in spacings(steps, asked):
            one = Choice(every, "any", "", not storing and asked == every, refused)
            out.append(one if thin is None else _thin(one, replace(thin, start=once, memory=memory), first, found, steps))
        own, told = _storing(settings, first, once, Path(folder) / "gradients")
        return own if storing else found, [*out, told]


def spacings(steps: int, asked: int) -> Sequence[int]:
    """Of thin records, around the root of the steps, and the one that was asked for."""
    root = spacing(f"sqrt:{steps}")
    return sorted({max(1, root // APART), root, min(steps, APART * root), asked or root})


def _told(one: Choice, trial: Trial, found: Diagnosis, steps: int) -> Choice:
    """What a record takes that is like its trial; a process that decomposes it reads the data, too."""
    return replace(
        one,
        disk=trial.disk(steps, one.thin or None),
        record_seconds=trial.seconds(steps, one.thin or None),
        record_memory=trial.memory,
        ledger=found.ledger,
        decompose_seconds=None if found.seconds is None else trial.start + found.seconds,
        decompose_memory=found.memory,
    )


def _thin(one: Choice, trial: Trial, full: Trial, found: Diagnosis, steps: int) -> Choice:
    """A thin record is decomposed as the full one is, once its steps are lived: twice a sweep, where they cannot all be kept."""
    told = _told(one, trial, found, steps)
    if told.decompose_seconds is None or told.decompose_memory is None:
        return told
    lived = 2 * full.run.manifest.params * full.run.states(0, 1).itemsize
    fits = lived * steps <= ROOM
    return replace(
        told,
        decompose_seconds=told.decompose_seconds + steps * trial.step * (1 if fits else 2 * found.blocks),
        decompose_memory=told.decompose_memory + min(lived * steps, ROOM + lived * one.thin),
    )


def _storing(settings: Config, full: Trial, once: float, path: Path) -> tuple[Diagnosis, Choice]:
    """A record of every step with the gradients of its examples; full: one without them, which says how many there will be;
    once: seconds of what a process does once."""
    train = settings.train
    asked = train.gradients == "store"
    one = Choice(_spacing(settings) if asked else 0, train.codec, train.gradient_dtype or full.run.manifest.dtype, asked)
    refused = over_budget(full.run, settings)
    if not refused:
        few = max(2, min(TRIAL, TRIAL_BYTES * train.steps // max(1, gradient_bytes(full.run, settings))))
        try:
            trial = tried(_recorded(settings, one.thin, train.codec, "store"), path, few)
            found = diagnosed(trial.run, settings.decompose, train.steps)
            return found, _told(one, replace(trial, start=once), found, train.steps)
        except ExplaindError as error:
            refused = [str(error)]
    return Diagnosis(refused, steps=train.steps), replace(one, refused=refused[0])


def _spacing(settings: Config) -> int:
    thin = settings.train.thin
    return spacing(f"sqrt:{settings.train.steps}") if thin == "sqrt" else int(thin)


def _recorded(settings: Config, thin: int, codec: str, gradients: str = "recompute") -> Config:
    told: dict[str, Any] = {"thin": thin, "codec": codec, "gradients": gradients}
    told |= {} if gradients == "store" else {"gradient_dtype": ""}
    return replace(settings, train=replace(settings.train, **told))
