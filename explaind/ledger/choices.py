"""How thickly a training may be recorded, in which codec, and what recording and decomposing it will then take."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from explaind.config import Config
from explaind.errors import ExplaindError
from explaind.ledger.by_name import diagnosed
from explaind.ledger.doctor import Diagnosis
from explaind.ledger.trial import TRIAL, Trial, over_budget, tried
from explaind.record.thinning import spacing
from explaind.replay.thin import ROOM
from explaind.store.schema import CHOICES

APART = 4
"""Spacings that are shown are so many times narrower and wider than the root of the steps."""


@dataclass(frozen=True)
class Choice:
    """One way to record a training, and what it takes. Nothing is known of one that is refused."""

    thin: int
    """Steps between two stored states; 0: every state is stored."""
    codec: str
    """Of parameters and second moments; "any" where there is no difference."""
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


def choices(settings: Config) -> tuple[Diagnosis, list[Choice]]:
    """Estimates from a few steps that are recorded in each way; and what the doctor says of the full record.

    Raises what ``train`` does, such as ConfigError for settings that make no sense.
    """
    steps = settings.train.steps
    with TemporaryDirectory() as folder:
        full = {codec: tried(_recorded(settings, 0, codec), Path(folder) / codec) for codec in CHOICES}
        thin, refused = None, ""
        try:
            thin = tried(_recorded(settings, max(1, TRIAL // 2), CHOICES[0]), Path(folder) / "thin")
        except ExplaindError as error:
            refused = str(error)
        trials = [*full.values(), *([] if thin is None else [thin])]
        memory = max(trial.memory for trial in trials)
        found = diagnosed(full[CHOICES[0]].run, settings.decompose, steps)
        found.refused.extend(over_budget(full[CHOICES[0]].run, settings))
        asked = _spacing(settings)
        out = []
        for codec, trial in full.items():
            told = Choice(0, codec, (asked, settings.train.codec) == (0, codec), disk=trial.disk(steps), ledger=found.ledger)
            told = replace(told, record_seconds=trial.seconds(steps), record_memory=memory)
            out.append(replace(told, decompose_seconds=found.seconds, decompose_memory=found.memory))
        for every in spacings(steps, asked):
            one = Choice(every, "any", asked == every, refused)
            out.append(one if thin is None else _thin(one, thin, full[CHOICES[0]], found, steps, memory))
        return found, out


def spacings(steps: int, asked: int) -> Sequence[int]:
    """Of thin records, around the root of the steps, and the one that was asked for."""
    root = spacing(f"sqrt:{steps}")
    return sorted({max(1, root // APART), root, min(steps, APART * root), asked or root})


def _thin(one: Choice, trial: Trial, full: Trial, found: Diagnosis, steps: int, memory: int) -> Choice:
    """A thin record is decomposed as the full one is, once its steps are lived: twice a sweep, where they cannot all be kept."""
    seconds, space = found.seconds, found.memory
    if seconds is not None and space is not None:
        lived = 2 * full.run.manifest.params * full.run.states(0, 1).itemsize
        fits = lived * steps <= ROOM
        seconds += steps * trial.step * (1 if fits else 2 * found.blocks)
        space += min(lived * steps, ROOM + lived * one.thin)
    return replace(
        one,
        disk=trial.disk(steps, one.thin),
        record_seconds=trial.seconds(steps, one.thin),
        record_memory=memory,
        ledger=found.ledger,
        decompose_seconds=seconds,
        decompose_memory=space,
    )


def _spacing(settings: Config) -> int:
    thin = settings.train.thin
    return spacing(f"sqrt:{settings.train.steps}") if thin == "sqrt" else int(thin)


def _recorded(settings: Config, thin: int, codec: str) -> Config:
    told: dict[str, Any] = {"thin": thin, "codec": codec}
    return replace(settings, train=replace(settings.train, **told))
