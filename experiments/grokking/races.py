"""How many steps do trainings take until they generalise? Trained until validation accuracy is 0.95, and not recorded."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import default_collate

from explaind.analysis.curves import evaluated
from explaind.analysis.table import markdown
from explaind.config import Config, read
from explaind.store import schema
from explaind.tasks import Task, load
from explaind.tasks.training import fit

CONFIGS = Path(__file__).parents[2] / "configs"
AIM = 0.95
EVERY = 10
"""Steps between two looks."""
OPERATIONS = ("mod53", "mod53-subtract", "mod53-multiply", "mod53-square-sum")
"""Configurations whose networks differ in what they compute."""
FILTERS: dict[str, tuple[str, ...]] = {
    "none": (),
    "EMA": ("--gradient_filter.name", "GrokfastEMA", "--gradient_filter.alpha", "0.98", "--gradient_filter.lamb", "2.0"),
    "MA": ("--gradient_filter.name", "GrokfastMA", "--gradient_filter.window_size", "100", "--gradient_filter.lamb", "5.0"),
}
"""Grokfast as its paper's experiments on modular multiplication have it (arXiv 2405.20233)."""
SMALL = ("--task.p", "13", "--task.width", "16", "--task.mlp", "32", "--train.steps", "40")


@dataclass(frozen=True)
class Race:
    """What became of one training; None for what it never reached, among the steps that are looked at."""

    train_1_at: int | None
    val_at: int | None
    taken: int
    train_accuracy: float
    val_accuracy: float
    val_best: float


def raced(config: Config, folder: Path) -> Race:
    """Train as a configuration says, or read what became of it: one small file each, written when it is done."""
    told = {"config": config.of_training(), "aim": AIM, "every": EVERY, "torch": torch.__version__}
    path = folder / f"{hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:24]}.json"
    if path.exists():
        return Race(**json.loads(path.read_text())["race"])
    torch.manual_seed(config.train.seed)
    task = load(config.task.name, config.task.options)
    batches = {split: default_collate([task.data(split)[i] for i in range(len(task.data(split)))]) for split in ("train", "val")}
    model, looks = task.model(), list[tuple[int, float, float]]()

    def look(taken: int, model: nn.Module) -> bool:
        if taken % EVERY and taken != config.train.steps:
            return False
        looks.append((taken, *_accuracies(task, model, batches)))
        return looks[-1][2] >= AIM

    taken = fit(task, config, model, None, stop=look)
    steps, train, val = (np.array(column) for column in zip(*looks, strict=True))
    whole, there = steps[train >= 1.0], steps[val >= AIM]
    first = [int(found[0]) if len(found) else None for found in (whole, there)]
    race = Race(first[0], first[1], taken, float(train[-1]), float(val[-1]), float(val.max()))
    folder.mkdir(parents=True, exist_ok=True)
    schema.replace_file(path, json.dumps({"race": vars(race), **told}, indent=1))
    return race


def _accuracies(task: Task, model: nn.Module, batches: Mapping[str, Any]) -> tuple[float, float]:
    model.eval()
    with torch.no_grad():
        train, val = (evaluated(task, model, batches[split])[1] for split in ("train", "val"))
    model.train()
    return train, val


def races(name: str, seeds: Sequence[int], folder: Path, overrides: Sequence[str] = (), small: bool = False) -> list[Race]:
    """The configuration of that name with every seed."""
    options = (*overrides, *(SMALL if small else ()))
    return [raced(read(CONFIGS / f"{name}.toml", ["--train.seed", str(seed), *options]), folder) for seed in seeds]


def table(found: Mapping[str, Sequence[Race]]) -> str:
    """Over seeds, as Markdown: median [least, most] of the steps, where what did not arrive counts as more than all; one row a kind."""
    rows = []
    for name, mine in found.items():
        spans = []
        for ats in ([race.train_1_at for race in mine], [race.val_at for race in mine]):
            steps = np.array([np.inf if at is None else at for at in ats])
            spans.append(" ".join(f"{np.median(steps):.0f} [{steps.min():.0f}, {steps.max():.0f}]".replace("inf", "–").split()))
        arrived, best = sum(race.val_at is not None for race in mine), [race.val_best for race in mine]
        rows.append([name, *spans, f"{arrived} of {len(mine)}", max(race.taken for race in mine), f"{min(best):.3f} … {max(best):.3f}"])
    head = ["", "training accuracy 1 at", f"validation {AIM} at", "reached by", "longest training", "best validation accuracy"]
    return markdown(head, rows)
