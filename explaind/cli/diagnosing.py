"""Verbs that say what will happen before hours are spent: doctor, plan."""

import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from explaind.cli.terminal import FAILED, FINE, Json, Overrides, app, printed
from explaind.config import Config, Decompose, read
from explaind.errors import ExplaindError, RequestError
from explaind.ledger.by_name import check_asked, config_of, diagnosed, measure_named
from explaind.ledger.choices import choices
from explaind.ledger.doctor import Diagnosis
from explaind.ledger.trial import over_budget, tried
from explaind.report.lines import doctor_lines, plan_lines
from explaind.store.location import location_of, size_of
from explaind.store.reader import Run, open_run
from explaind.tasks import load


@app.command(name="doctor")
def diagnose(path: str, /, *overrides: Overrides, json: Json = False) -> int:
    """Say what a CONFIG or a RUN will need and how it will be explained, from a few steps: doctor CONFIG [--table.key value …].

    Optimizer and rule, how each layer is covered, coupled and random examples, a replay, what would be refused and why; disk, memory and
    time; and the settings that it recommends, which `explaind run --auto` follows. Exit status 1 where something would be refused.
    """
    place = location_of(path)
    if not (place.is_file() and place.suffix != ".zip" if isinstance(place, Path) else place.name.endswith(".toml")):
        if overrides:
            raise RequestError("a run was recorded with its configuration", got=" ".join(overrides), do="give no settings with a RUN")
        recorded = open_run(place)
        settings = config_of(recorded)
        disk = size_of(place) - size_of(place / "ledgers")
        facts = {"of": str(place), **_facts(diagnosed(recorded, settings.decompose)), "disk": disk}
    else:
        begin = time.perf_counter()
        settings = read(place, overrides)
        check_asked(settings)
        facts = {"of": str(place), **_tried(settings, time.perf_counter() - begin)}
    task = load(settings.task.name, settings.task.options)
    facts |= {"measures": list(task.measures()), "measure": measure_named(task, settings.decompose.measure)[0]}
    printed(facts, json, doctor_lines)
    return FINE if facts["ok"] else FAILED


@app.command
def plan(config: str, /, *overrides: Overrides, json: Json = False) -> int:
    """Say what each way to record a CONFIG will take, from a few steps that are recorded: plan CONFIG [--table.key value …].

    Disk, memory and time of recording, and of the decomposition that it asks for, with every state stored in either codec, thin with a
    state every so many steps, and with the gradients of all examples stored; where these are more than train.gradient_budget it says
    how many. Exit status 1 where the training or the decomposition would be refused.
    """
    begin = time.perf_counter()
    settings = read(location_of(config), overrides)
    check_asked(settings)
    found, ways = choices(settings, time.perf_counter() - begin)
    facts = {"of": config, "ok": found.ok, "steps": settings.train.steps, "refused": found.refused}
    printed({**facts, "choices": [asdict(way) for way in ways]}, json, plan_lines)
    return FINE if found.ok else FAILED


def recommended(run: Run, asked: Decompose) -> Decompose:
    """What was asked, with the settings that the doctor recommends."""
    found = diagnosed(run, asked)
    if not found.ok:
        raise RequestError("the doctor refuses the run", where=run.path, got="; ".join(found.refused), do="explaind doctor says more")
    return replace(asked, **found.recommended)


def _tried(settings: Config, before: float) -> dict[str, Any]:
    """Record a few steps of a configuration, and diagnose them; before: seconds that went into reading the data already."""
    steps = settings.train.steps
    with tempfile.TemporaryDirectory() as folder:
        try:
            trial = tried(settings, Path(folder) / "run")
        except ExplaindError as error:
            return _facts(Diagnosis([str(error)], steps=steps))
        trial = replace(trial, start=before + trial.start)
        found = diagnosed(trial.run, settings.decompose, steps)
        if found.seconds is not None:  # by a process that reads the data, too
            found = replace(found, seconds=trial.start + found.seconds)
        found.refused.extend(over_budget(trial.run, settings) if settings.train.gradients == "store" else [])
        return {**_facts(found), "disk": trial.disk(steps), "record_seconds": trial.seconds(steps)}


def _facts(found: Diagnosis) -> dict[str, Any]:
    return {"ok": found.ok, **asdict(found)}
