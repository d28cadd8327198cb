"""The verb that says what will happen before hours are spent: doctor."""

import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from explaind.cli.terminal import FAILED, FINE, Json, Overrides, app, printed
from explaind.config import Config, Decompose, bytes_of, read
from explaind.errors import ExplaindError, RequestError
from explaind.ledger.by_name import arguments, check_asked, config_of, measure_named, task_of
from explaind.ledger.doctor import Diagnosis, doctor
from explaind.report.lines import doctor_lines
from explaind.report.report import gradient_facts
from explaind.store.location import location_of, size_of
from explaind.store.reader import Run, open_run
from explaind.tasks import load
from explaind.tasks.training import train

TRIAL = 20
"""Steps that are recorded to try a configuration: more than one block of them, so that what is written once is told from what grows."""


@app.command(name="doctor")
def diagnose(path: str, /, *overrides: Overrides, json: Json = False) -> int:
    """Say what a CONFIG or a RUN will need and how it will be explained, from a few steps: doctor CONFIG [--table.key value …].

    Optimizer and rule, how each layer is covered, coupled and random examples, a replay, what would be refused and why; disk, memory and
    time; and the settings that it recommends, which `explaind run --auto` follows. Exit status 1 where something would be refused.
    """
    place = location_of(path)
    if not isinstance(place, Path) or place.is_dir() or place.suffix == ".zip" or not place.exists():
        if overrides:
            raise RequestError("a run was recorded with its configuration", got=" ".join(overrides), do="give no settings with a RUN")
        recorded = open_run(place)
        settings = config_of(recorded)
        facts = {"of": str(place), **_facts(diagnosed(recorded, settings.decompose)), **_sizes(recorded, recorded.steps)}
    else:
        settings = read(place, overrides)
        check_asked(settings)
        facts = {"of": str(place), **_tried(settings)}
    task = load(settings.task.name, settings.task.options)
    facts |= {"measures": list(task.measures()), "measure": measure_named(task, settings.decompose.measure)[0]}
    printed(facts, json, doctor_lines)
    return FINE if facts["ok"] else FAILED


def diagnosed(run: Run, asked: Decompose, steps: int | None = None) -> Diagnosis:
    """The doctor's findings, for what a configuration asks of a run."""
    given = arguments(run, asked)
    return doctor(run, given.pop("model"), steps=steps, **given)


def recommended(run: Run, asked: Decompose) -> Decompose:
    """What was asked, with the settings that the doctor recommends."""
    found = diagnosed(run, asked)
    if not found.ok:
        raise RequestError("the doctor refuses the run", where=run.path, got="; ".join(found.refused), do="explaind doctor says more")
    return replace(asked, **found.recommended)


def _tried(settings: Config) -> dict[str, Any]:
    """Record a few steps of a configuration, and diagnose them."""
    steps = settings.train.steps
    ticks = [time.perf_counter()]
    shorter = replace(settings, train=replace(settings.train, steps=min(TRIAL, steps)))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run"
        try:
            train(load(settings.task.name, settings.task.options), shorter, path, progress=lambda *_: ticks.append(time.perf_counter()))
        except ExplaindError as error:
            return _facts(Diagnosis([str(error)], steps=steps))
        run = open_run(path)
        task_of(run)
        pauses = np.diff(ticks)[1:]
        record = float(np.mean(pauses)) * steps if len(pauses) else None
        found = diagnosed(run, settings.decompose, steps)
        found.refused.extend(_over_budget(run, settings, steps))
        return {**_facts(found), **_sizes(run, steps), "record_seconds": record}


def _over_budget(run: Run, settings: Config, steps: int) -> list[str]:
    """Why the gradients of so many steps cannot be stored, from those that were."""
    stored = gradient_facts(run)
    need = 0 if stored is None else stored["bytes"] * steps // run.steps
    budget = bytes_of(settings.train.gradient_budget, "train.gradient_budget")
    return [f"the gradients of all examples would take {need} bytes, and train.gradient_budget is {budget}"] if need > budget else []


def _facts(found: Diagnosis) -> dict[str, Any]:
    return {"ok": found.ok, **asdict(found)}


def _sizes(run: Run, steps: int) -> Mapping[str, int]:
    """Bytes on disk, of what is recorded and of so many steps."""
    columns = ("theta", "momentum", "filtered", "preconditioner", "scalar", "batch", "part", "weight", "hyper", "age", "mode", "gap")
    others = ("precision", "consumed", "random", "state", "groups", "gradient", "checksum_gradient", "checksum_theta", "checksum_step")
    have = {name: size_of(run.path / name) for name in (*columns, *others)}
    rest = size_of(run.path) - sum(have.values()) - size_of(run.path / "ledgers")
    return {"disk": int(rest + sum(have.values()) * steps / max(1, run.steps))}
