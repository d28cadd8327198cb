"""The verb transplant: layers of one step put into another, evaluated or trained on."""

import json as encoder
from dataclasses import asdict
from typing import Annotated, Any

from cyclopts import Parameter

from explaind.analysis.surgery import Bench, grafted, layers_named, parameters_at, stated
from explaind.analysis.transplant import Training, recorded, trained_on
from explaind.cli.terminal import FINE, Json, app, printed, progress
from explaind.errors import RequestError
from explaind.ledger.by_name import task_of
from explaind.report.lines import transplant_lines
from explaind.store import schema
from explaind.store.location import MARKER, Location, inside
from explaind.store.reader import Run, open_run


@app.command
def transplant(
    run: str,
    /,
    *,
    layers: str,
    from_: Annotated[str, Parameter(name="--from")],
    into: str = "last",
    train: int = 0,
    seeds: int = 1,
    stop: float = 0.95,
    name: str | None = None,
    json: Json = False,
) -> int:
    """Put layers of one step of RUN into other parameters, and evaluate them or train them on.

    Parameters
    ----------
    layers
        What is transplanted: names or patterns of parameter tensors such as heads.*, or groups that the task names, separated by commas.
    from_
        The donor: a STEP, last, or another RUN or RUN@STEP.
    into
        The host: a STEP, last, another RUN or RUN@STEP, init (drawn anew as the model draws itself) or normal:SCALE.
    train
        At most so many steps are trained from there, with a fresh optimizer; every training is recorded in RUN/transplants, so that it can
        be decomposed too.
    seeds
        So many trainings, with seeds 0, 1, … for what is drawn.
    stop
        Validation accuracy at which a training ends.
    name
        Of the folder of the trainings.
    """
    source = open_run(run)
    bench = Bench(source, task_of(source))
    chosen = layers_named(source, bench.task, [part.strip() for part in layers.split(",") if part.strip()])
    if train < 0 or seeds < 1:
        raise RequestError("nothing to train", expected="--train of at least 0 and --seeds of at least 1", got=f"{train}, {seeds}")
    if not train and (seeds > 1 or name):
        got = f"--seeds {seeds}" if seeds > 1 else f"--name {name}"
        raise RequestError("an option of a training, and nothing is trained", got=got, do="give --train, or leave it out")
    facts: dict[str, Any] = {"layers": list(chosen), "from": from_, "into": into}
    if train:
        folder = inside(source.path, "transplants") / (name or f"{from_}-into-{into}".replace("/", "_"))
        given = {**facts, "train": train, "stop": stop}
        places = {"from": stated(source, from_), "into": stated(source, into)}
        _claim(folder, {"identity": source.identity, **given, **places}, given)
        facts["trained"] = [_trained(bench, chosen, from_, into, Training(train, stop), seed, folder) for seed in range(seeds)]
    else:
        host, donor = (parameters_at(source, bench.task, where, 0) for where in (into, from_))
        made = grafted(host, donor, chosen)
        facts["evaluated"] = {
            name: {**bench.measured(theta), "kl_from_host": bench.divergence(host, theta)}
            for name, theta in (("host", host), ("donor", donor), ("transplant", made))
        }
    printed({"run": str(source.path), **facts}, json, transplant_lines)
    return FINE


def _trained(
    bench: Bench, layers: tuple[str, ...], donor: str, host: str, training: Training, seed: int, folder: Location
) -> dict[str, Any]:
    path = folder / f"seed-{seed}"
    around, inside = (parameters_at(bench.run, bench.task, where, seed) for where in (host, donor))
    theta = grafted(around, inside, layers)
    done = _finished(path)
    if done is None:
        with progress(f"training seed {seed}") as show:
            found = trained_on(bench, theta, training, seed, path, show)
    else:
        found = recorded(bench, done, training)
    return {"seed": seed, "recorded": str(path), "stop": training.stop, **asdict(found)}


def _claim(folder: Location, facts: dict[str, Any], older: dict[str, Any]) -> None:
    """Say what the trainings of a folder are; RequestError where they are of another transplant.

    Runs are claimed by their identity, since a path is spelled in many ways and may change. Older claims have the words that were given,
    and the path of the run, which is not asked for: the folder is inside it.
    """
    file = folder / "transplant.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            schema.replace_file(file, encoder.dumps(facts, indent=1))
        found = _read(file)
    except OSError as error:
        raise schema.unwritable(file, error) from error
    for key, value in (older if "run" in found else facts).items():
        if found.get(key) != value:
            raise RequestError(
                "another transplant has that name", where=folder, expected=f"{key} {found.get(key)}", got=value, do="choose another --name"
            )


def _read(file: Location) -> dict[str, Any]:
    try:
        return dict(encoder.loads(file.read_text()))
    except (ValueError, TypeError):  # damaged: it claims nothing
        return {}


def _finished(path: Location) -> Run | None:
    """A training that is there whole, and need not be done again."""
    run = open_run(path) if (path / MARKER).exists() else None
    return run if run is not None and run.complete else None
