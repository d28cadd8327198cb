"""Verbs that make a ledger and vouch for it: run, record, decompose, verify, info."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from explaind.cli.diagnosing import recommended
from explaind.cli.studies import analysed, reported, tables_reported
from explaind.cli.terminal import FAILED, FINE, Auto, Json, Overrides, Overwrite, Spool, app, ledgers_of, printed, progress, task_or_none
from explaind.config import Config, Decompose, checked, read
from explaind.errors import StoreError
from explaind.ledger.by_name import check_asked, config_of, decompose_by_name, ledger_name, task_of, words_of_groups
from explaind.ledger.parts import is_begun, shards_left
from explaind.ledger.plan import shard_named
from explaind.ledger.saving import open_ledger
from explaind.ledger.verify_run import RunVerdict, verify_run
from explaind.report.lines import info_lines, ledger_lines, repair_lines, run_lines, shard_lines, upgrade_lines, verify_lines
from explaind.report.report import run_facts
from explaind.report.summary import ledger_facts
from explaind.store import schema
from explaind.store.location import Location, inside, location_of
from explaind.store.reader import Run, open_run
from explaind.store.repair import repair
from explaind.store.upgrading import upgrade
from explaind.tasks import load
from explaind.tasks.training import train


@app.command
def run(
    config: str,
    /,
    *overrides: Overrides,
    out: str | None = None,
    auto: Auto = False,
    overwrite: Overwrite = False,
    spool: Spool = None,
    json: Json = False,
) -> int:
    """Record, decompose, verify, analyse and report: CONFIG [--out RUN] [--auto] [--table.key value …]."""
    settings = read(location_of(config), overrides)
    folder = location_of(out or Path("runs") / Path(config).stem, spool)
    check_asked(settings)
    _record(settings, folder, overwrite)
    recorded = open_run(folder)
    asked = recommended(recorded, settings.decompose) if auto else settings.decompose
    path = _decompose(recorded, asked, None, overwrite)
    tables = analysed(recorded, [path])
    facts = {"run": str(folder), "ledger": str(path), "analyses": tables, "tables": tables_reported(recorded), **reported(recorded, path)}
    verdict, sound = open_ledger(path).verify(), _verify_run(recorded)
    facts |= {"ok": verdict.ok and sound.ok, "reasons": [*sound.reasons, *verdict.reasons]}
    printed(facts, json, run_lines)
    return FINE if facts["ok"] else FAILED


@app.command
def record(
    config: str, /, *overrides: Overrides, out: str | None = None, overwrite: Overwrite = False, spool: Spool = None, json: Json = False
) -> int:
    """Train as CONFIG says and record every step: CONFIG --out RUN [--table.key value …]."""
    settings = read(location_of(config), overrides)
    folder = location_of(out or Path("runs") / Path(config).stem, spool)
    _record(settings, folder, overwrite)
    printed(
        {**run_facts(open_run(folder)), "path": str(folder)},
        json,
        lambda f: [f"recorded {f['steps']} steps of {f['optimizer']} in {f['path']}"],
    )
    return FINE


@app.command
def decompose(
    run: str,
    /,
    *,
    queries: str | None = None,
    measure: str | None = None,
    keep: str | None = None,
    groups: str | None = None,
    rule: str | None = None,
    tol: float | None = None,
    dtype: str | None = None,
    device: str | None = None,
    view: str | None = None,
    windows: int | None = None,
    products: str | None = None,
    closure: str | None = None,
    budget: float | None = None,
    memory: str | None = None,
    shard: str | None = None,
    name: str | None = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> int:
    """Credit predictions of a recorded RUN to examples, steps and layers. What is not given is taken from the run's configuration.

    Parameters
    ----------
    queries
        SPLIT, SPLIT:INDEX or SPLIT:START:STOP, such as val:0:16.
    measure
        One of the task's measures, such as target_log_probability, logits or margin.
    keep
        Axes of the result, separated by commas, out of query, output, example, layer or param, step.
    groups
        Of kept axes, such as example=target,layer=task: examples and queries by their class, layers by module or as the task groups
        them. Groups of your own stand in the configuration, name by name.
    rule
        auto, secant:PARTS (closes exactly), adaptive, gauss:NODES or midpoint:NODES.
    tol
        Largest miss of the path rule, relative to each measure's movement.
    dtype
        float64 or float32, of the decomposition.
    device
        Where it is computed, such as cpu or cuda.
    view
        seen: a step is the one at which an example's gradient was computed; applied: the one at which its momentum moved the parameters.
    windows
        Steps per entry of the step axis.
    products
        How example gradients meet costates: auto, materialise, ghost, jvp or stored; auto takes those that the run stores, if it does.
    closure
        none, or discrete-gradient to fold the path row into the others.
    budget
        GiB that the result may take.
    memory
        To work in, such as 512MiB, 2GiB or 1.5GB; queries are decomposed in blocks that fit. A decomposition that was stopped goes on
        when it is asked for again in the same way.
    shard
        I/N, such as 0/4: only the I-th of N parts of the queries, for N processes that share RUN; the last one assembles the ledger.
    name
        Of the ledger, in RUN/ledgers; by default the queries and the measure.
    """
    given = {
        "queries": queries,
        "measure": measure,
        "keep": keep,
        "groups": None if groups is None else words_of_groups(groups),
        "rule": rule,
        "tol": tol,
        "dtype": dtype,
        "device": device,
        "view": view,
        "windows": windows,
        "products": products,
        "closure": closure,
        "budget": budget,
        "memory": memory,
    }
    recorded = open_run(run)
    changed = checked(Decompose, {k: v for k, v in given.items() if v is not None}, "decompose")
    asked = replace(config_of(recorded).decompose, **{k: getattr(changed, k) for k, v in given.items() if v is not None})
    if windows is None and "step" not in asked.keep:
        asked = replace(asked, windows=1)  # the run's own windows group an axis that is not asked for
    path = _decompose(recorded, asked, name, overwrite, shard)
    if shard is not None and is_begun(path):
        left = shards_left(path, shard_named(shard).of)
        printed({"ledger": str(path), "shard": shard, "left": left}, json, shard_lines)
        return FINE
    facts = {"ledger": str(path), **ledger_facts(open_ledger(path))}
    printed(facts, json, ledger_lines)
    return FINE if facts["ok"] else FAILED


@app.command
def verify(path: str, /, *, json: Json = False) -> int:
    """Check a RUN (stored bytes, data, a replay of every step; its ledgers too) or a LEDGER (its sum and its rest rows)."""
    place = location_of(path)
    if schema.kind_of(place) == "ledger":
        facts: dict[str, Any] = {"ledger": str(place), **ledger_facts(open_ledger(path))}
        printed(facts, json, ledger_lines)
        return FINE if facts["ok"] else FAILED
    recorded = open_run(place)
    verdict = _verify_run(recorded)
    ledgers = [{"ledger": str(p), **ledger_facts(open_ledger(p))} for p in ledgers_of(place)]
    worst = float(verdict.replay_error.max()) if verdict.replay_error.size else None
    facts = {
        "run": str(place),
        "steps": recorded.steps,
        "complete": recorded.complete,
        "ok": verdict.ok and all(entry["ok"] for entry in ledgers),
        "reasons": list(verdict.reasons),
        "notes": list(verdict.notes),
        "replay_error": worst,
        "ledgers": ledgers,
    }
    printed(facts, json, verify_lines)
    return FINE if facts["ok"] else FAILED


@app.command
def info(path: str, /, *, spool: Spool = None, json: Json = False) -> int:
    """Say what a RUN or a LEDGER holds; of a run that was damaged, how much of it is sound."""
    place = location_of(path, spool)
    if schema.kind_of(place) == "ledger":
        printed({"ledger": str(place), **ledger_facts(open_ledger(path))}, json, ledger_lines)
    else:
        recorded = open_run(place)
        sound = recorded.first(recorded.sound())
        held = {"steps": recorded.steps, "sound": sound.steps}
        printed({**run_facts(sound), **held, "ledgers": [str(p) for p in ledgers_of(place)]}, json, info_lines)
    return FINE


@app.command(name="repair")
def repaired(run: str, /, *, spool: Spool = None, json: Json = False) -> int:
    """Put a RUN right that was killed or damaged: take up the steps of its log, and cut it off before the first fault.

    The exit status is 1 where something is still wrong.
    """
    place = location_of(run, spool)
    done = repair(place)
    printed({"run": str(place), **asdict(done)}, json, repair_lines)
    return FAILED if done.left else FINE


@app.command(name="upgrade")
def upgraded(run: str, /, *, json: Json = False) -> int:
    """Make a RUN that an older explaind recorded one that this one reads; what was recorded stays as it is."""
    place = location_of(run)
    printed({"run": str(place), **asdict(upgrade(place))}, json, upgrade_lines)
    return FINE


def _record(settings: Config, folder: Location, overwrite: bool) -> None:
    with progress("recording") as show:
        train(load(settings.task.name, settings.task.options), settings, folder, overwrite, show)


def _decompose(recorded: Run, asked: Decompose, name: str | None, overwrite: bool, shard: str | None = None) -> Location:
    """Decompose and save in the run's folder; an older ledger of that name stays until the new one is complete."""
    if recorded.path.is_file():
        raise StoreError("a run in a zip is only read", where=recorded.path, do="explaind import it first")
    path = inside(recorded.path, "ledgers") / (name or ledger_name(task_of(recorded), asked))
    with progress("decomposing") as show:
        decompose_by_name(recorded, asked, show, save=path, overwrite=overwrite, shard=shard)
    return path


def _verify_run(recorded: Run) -> RunVerdict:
    task = task_or_none(recorded)
    if task is None:
        return RunVerdict.of_bytes(recorded)
    with progress("replaying") as show:
        return verify_run(recorded, task.model(), task.data("train"), task.losses, progress=show)
