"""Asking by name: a run that was recorded from a configuration knows its own task, so that queries and measures are words."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import default_collate

from explaind.config import Config, Decompose, bytes_of, nearest, resolved
from explaind.errors import RequestError
from explaind.kernel.choosing import path_rule
from explaind.kernel.groups import Asked, check_groups
from explaind.kernel.resolution import resolution
from explaind.ledger.decompose import Progress, decompose
from explaind.ledger.doctor import Diagnosis, doctor
from explaind.ledger.ledger import Ledger
from explaind.ledger.sources import STORED
from explaind.record.device import placed
from explaind.store.location import Location, Where
from explaind.store.reader import Run
from explaind.tasks import Task, load
from explaind.tasks.task import Grouped, Measure

WORDS = {"example": ("target",), "query": ("target",), "layer": ("module", "task")}
"""What groups of an axis may be called for short."""
DTYPES = {"float64": torch.float64, "float32": torch.float32}


def config_of(run: Run) -> Config:
    """The configuration that a run was recorded with; RequestError where its training loop was the user's own."""
    if run.manifest.config is None:
        raise RequestError(
            "the run names no task, since its training loop was your own",
            where=run.path,
            do="use explaind.decompose from Python, with your model, data, losses and measure",
        )
    return resolved(run.manifest.config, str(run.path))


def task_of(run: Run) -> Task:
    """The task that a run was recorded from."""
    named = config_of(run).task
    if _lies_in(named.name, run.path):
        raise RequestError(
            "the run names a task of its own folder, which would be executed",
            where=run.path,
            got=named.name,
            do="look at it, and put it elsewhere if you trust it",
        )
    return load(named.name, named.options)


def _lies_in(name: str, folder: Location) -> bool:
    """Whether Python would look for the module of package.module:Name in a folder, at whatever place of its path."""
    if not isinstance(folder, Path):
        return False
    own = folder.resolve()
    for entry in sys.path:
        place = Path(entry or ".").resolve()
        for part in name.partition(":")[0].split(".") if ":" in name else ():
            there = place.joinpath(part).exists() or any(place.glob(f"{part}.*"))
            place = place / part
            if there and place.resolve().is_relative_to(own):
                return True
    return False


@dataclass(frozen=True)
class Selection:
    """Examples of a split, as a batch of queries."""

    split: str
    indices: range

    def batch(self, task: Task) -> Any:
        """What ``default_collate`` makes of them."""
        data = task.data(self.split)
        return default_collate([data[i] for i in self.indices])


def selection(task: Task, text: str) -> Selection:
    """SPLIT, SPLIT:INDEX or SPLIT:START:STOP; RequestError when it is out of range."""
    split, *numbers = text.split(":")
    count = len(task.data(split))
    form = "SPLIT, SPLIT:INDEX or SPLIT:START:STOP"
    if len(numbers) > 2 or not all(n.isdigit() for n in numbers):
        raise RequestError("queries cannot be read", expected=form, got=repr(text), do="give for instance val:0:16")
    bounds = [int(n) for n in numbers]
    start, stop = bounds if len(bounds) == 2 else (bounds[0], bounds[0] + 1) if bounds else (0, count)
    if not start < stop <= count:
        raise RequestError(
            "the query slice is out of range",
            expected=f"0 <= START < STOP <= {count}, the examples of {split}",
            got=repr(text),
            do="ask for examples that are there",
        )
    return Selection(split, range(start, stop))


def measure_named(task: Task, name: str) -> tuple[str, Measure]:
    """One of the task's measures and its name; "" stands for the first."""
    measures = task.measures()
    chosen = name or next(iter(measures))
    if chosen not in measures:
        raise RequestError(
            "the task has no such measure", expected=nearest(chosen, measures), got=repr(chosen), do="name one of the task's measures"
        )
    return chosen, measures[chosen]


def check_asked(config: Config) -> None:
    """Refuse a decomposition that cannot be, before the training rather than after it; what depends on sizes is checked later."""
    task, asked = load(config.task.name, config.task.options), config.decompose
    selection(task, asked.queries)
    measure_named(task, asked.measure)
    if asked.products == STORED and config.train.gradients != "store":
        raise RequestError("no gradients of examples will be stored", got=f"products = {STORED!r}", do='set train.gradients = "store"')
    path_rule(asked.rule, float(asked.tol))
    wanted = resolution(asked.keep, config.train.steps, asked.view, asked.windows)
    check_words(asked.groups)
    check_groups(asked.groups, wanted.keep)
    placed(asked.device)
    memory_of(asked)


def ledger_name(task: Task, asked: Decompose) -> str:
    """What a ledger is called in the run's folder when nobody says: queries and measure."""
    return f"{asked.queries.replace(':', '-')}.{measure_named(task, asked.measure)[0]}"


def words_of_groups(text: str) -> dict[str, str]:
    """AXIS=WORD,… as a command line gives it."""
    parts = [part.strip().partition("=") for part in text.split(",") if part.strip()]
    pairs = {axis: word for axis, _, word in parts}
    if not all(pairs) or not all(pairs.values()):
        raise RequestError(
            "groups cannot be read",
            expected="AXIS=WORD, such as example=target,layer=module",
            got=repr(text),
            do="groups of your own stand in the configuration",
        )
    return pairs


def groups_named(asked: Mapping[str, Any], run: Run, task: Task, chosen: Selection) -> dict[str, Asked]:
    """The groups that words stand for; those that are written out stay as they are."""
    check_words(asked)
    found: dict[str, Asked] = {}
    for axis, groups in asked.items():
        if isinstance(groups, str):
            if axis == "layer":
                groups = _of_task(task) if groups == "task" else _modules([layer.name for layer in run.manifest.layers])
            else:
                split, ids = ("train", run.examples.tolist()) if axis == "example" else (chosen.split, list(chosen.indices))
                groups = _classes(task, split, ids, ids if axis == "example" else list(range(len(ids))))
        found[axis] = groups
    return found


def check_words(asked: Mapping[str, Any]) -> None:
    """RequestError for a word that stands for no groups of its axis."""
    for axis, groups in asked.items():
        if isinstance(groups, str) and groups not in WORDS.get(axis, ()):
            raise RequestError(
                "unknown groups",
                where=f"groups of {axis}",
                expected=", ".join((*map(repr, WORDS.get(axis, ())), "or a table of names and members")),
                got=repr(groups),
                do="choose one of these",
            )


def _classes(task: Task, split: str, ids: Sequence[int], members: Sequence[int]) -> Asked:
    """Members by the class of the examples that they are."""
    data = task.data(split)
    targets = task.target(default_collate([data[i] for i in ids])).tolist()
    names = task.outputs()
    return {names[c]: [member for member, target in zip(members, targets, strict=True) if target == c] for c in sorted(set(targets))}


def _of_task(task: Task) -> Asked:
    if not isinstance(task, Grouped):
        raise RequestError(
            "the task names no groups of layers",
            expected="a method layer_groups",
            got=type(task).__name__,
            do="add it, or group by module or by patterns of your own",
        )
    return task.layer_groups()


def _modules(layers: Sequence[str]) -> Asked:
    """Tensors of one module together; a bare parameter is a group of its own."""
    found: dict[str, list[str]] = {}
    for name in layers:
        found.setdefault(name.rpartition(".")[0] or name, []).append(name)
    return found


def memory_of(asked: Decompose) -> int | None:
    """Bytes to work in; None where that is left open."""
    return None if asked.memory == "" else bytes_of(asked.memory, "decompose.memory")


def arguments(run: Run, asked: Decompose) -> dict[str, Any]:
    """Model, and arguments of ``explaind.decompose``, by name: everything is taken from the run's own task."""
    task = task_of(run)
    name, measure = measure_named(task, asked.measure)
    chosen = selection(task, asked.queries)
    return {
        "model": task.model(),
        "data": task.data("train"),
        "losses": task.losses,
        "queries": chosen.batch(task),
        "measure": measure,
        "keep": asked.keep,
        "groups": groups_named(asked.groups, run, task, chosen),
        "rule": asked.rule,
        "tol": float(asked.tol),
        "dtype": DTYPES[asked.dtype],
        "device": asked.device,
        "tf32": asked.tf32,
        "view": asked.view,
        "windows": asked.windows,
        "products": asked.products,
        "closure": asked.closure,
        "budget": int(asked.budget * (1 << 30)),
        "memory": memory_of(asked),
        "config": {**asdict(asked), "measure": name, "keep": list(asked.keep)},
    }


def decompose_by_name(
    run: Run,
    asked: Decompose,
    progress: Progress | None = None,
    *,
    save: Where | None = None,
    overwrite: bool = False,
    shard: str | None = None,
) -> Ledger:
    """``explaind.decompose`` of a run that was recorded from a configuration."""
    return decompose(run, save=save, overwrite=overwrite, shard=shard, progress=progress, **arguments(run, asked))


def diagnosed(run: Run, asked: Decompose, steps: int | None = None) -> Diagnosis:
    """``explaind.doctor`` for what a configuration asks of a run; steps: of the whole training."""
    given = arguments(run, asked)
    return doctor(run, given.pop("model"), steps=steps, **given)
