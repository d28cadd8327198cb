"""What does it cost to store the gradient of every example while training, is the ledger the same, and what does it save?

python experiments/gradients/run.py [--out runs/gradients] [--rounds 3] [--small]

A training is made in turn alone, recorded, and recorded with its gradients, in two dtypes; the run is then decomposed from the store and by
computing the gradients once more. Times are those of the processor, all threads together, so that other work beside matters less.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import explaind
from explaind.config import Config, read
from explaind.ledger.by_name import decompose_by_name
from explaind.tasks import load
from explaind.tasks.training import fit, train

CONFIGS = Path(__file__).parents[2] / "configs"
HIDDEN = (64, 512)
"""Widths of configs/digits.toml."""
STEPS, SMALL = 60, 4
KINDS: dict[str, dict[str, Any]] = {
    "recorded": {},
    "stored": {"gradients": "store"},
    "float16": {"gradients": "store", "gradient_dtype": "float16"},
}


def clocked(work: Callable[[], Any]) -> tuple[Any, float]:
    """What it gives, and the seconds of the processor that it took."""
    begin = time.process_time()
    found = work()
    return found, time.process_time() - begin


def trained(config: Config, folder: Path | None) -> float:
    """Seconds of one training, recorded in a folder or not at all."""
    task = load(config.task.name, config.task.options)
    if folder is not None:
        return clocked(lambda: train(task, config, folder, overwrite=True))[1]
    torch.manual_seed(config.train.seed)
    model = task.model()
    return clocked(lambda: fit(task, config, model, None))[1]


def size(folder: Path) -> int:
    """Bytes of all files."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def study(hidden: int, folder: Path, rounds: int, steps: int) -> dict[str, Any]:
    """Figures of one training."""
    options = ["--train.steps", str(steps), "--task.hidden", str(hidden), "--decompose.queries", "val:0:16"]
    config = read(CONFIGS / "digits.toml", options)
    trained(config, None)  # to warm up
    kinds = {kind: replace(config, train=replace(config.train, **options)) for kind, options in KINDS.items()}
    alone, seconds = list[float](), {kind: list[float]() for kind in kinds}
    for _ in range(rounds):
        alone.append(trained(config, None))
        for kind, told in kinds.items():
            seconds[kind].append(trained(told, folder / kind))
    runs = {kind: explaind.open(folder / kind) for kind in kinds}
    count, params = int(runs["stored"].gradient_checksums()[0].sum()), runs["stored"].manifest.params
    asked = {
        "stored": ("stored", "stored"),
        "float16": ("float16", "stored"),
        "auto": ("recorded", "auto"),
        "made": ("stored", "materialise"),
    }
    ledgers, took = dict[str, Any](), dict[str, float]()
    for route, (kind, products) in asked.items():
        ledgers[route], took[route] = clocked(lambda k=kind, p=products: decompose_by_name(runs[k], replace(config.decompose, products=p)))
    want = np.asarray(ledgers["made"]["data"])
    return {
        "steps": steps,
        "params": params,
        "examples a step": count / steps,
        "record": {kind: statistics.median(t / a for t, a in zip(times, alone, strict=True)) for kind, times in seconds.items()},
        "bytes a number": {kind: size(folder / kind / "gradient") / (count * params) for kind in ("stored", "float16")},
        "dtype": runs["stored"].manifest.gradients,
        "larger": {kind: size(folder / kind) / size(folder / "recorded") for kind in ("stored", "float16")},
        "decompose": {route: took[route] / took["auto"] for route in took},
        "difference": {r: float(np.abs(np.asarray(ledgers[r]["data"]) - want).max() / np.abs(want).max()) for r in ("stored", "float16")},
        "ok": {route: ledger.verify().ok for route, ledger in ledgers.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/gradients"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--small", action="store_true")
    given = parser.parse_args()
    for hidden in HIDDEN:
        print(hidden, json.dumps(study(hidden, given.out / str(hidden), given.rounds, SMALL if given.small else STEPS), indent=1))


if __name__ == "__main__":
    main()
