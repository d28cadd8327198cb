"""How much smaller is a thin record, is its ledger the same, and what does living the steps again cost?

python experiments/thin/run.py [--out runs/thin] [--small]

Each configuration is trained twice from the same seed, once recorded in full and once with a state every √steps steps; both runs are
decomposed as their configuration asks and compared row by row.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

import explaind
from explaind.config import Config, read
from explaind.ledger.by_name import decompose_by_name
from explaind.ledger.verify_run import verify_run
from explaind.tasks import load
from explaind.tasks.training import train

T = TypeVar("T")
CONFIGS = Path(__file__).parents[2] / "configs"
STEPS, SMALL = 1000, 36
ASKED = {"digits": ["--decompose.queries", "val:0:32"], "quickstart": ["--decompose.queries", "val:0:16"]}
"""By configuration, what is changed of it."""


def clocked(work: Callable[[], T]) -> tuple[T, float]:
    """What it gives, and the seconds that it took."""
    begin = time.perf_counter()
    found = work()
    return found, time.perf_counter() - begin


def size(folder: Path) -> int:
    """Bytes of all files."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def difference(ledger: explaind.Ledger, other: explaind.Ledger) -> float:
    """Largest difference of a row, relative to the largest number of that row in the other ledger; rest rows to that of `data`."""
    whole = float(np.abs(np.asarray(other["data"])).max())
    found = []
    for name in other.rows:
        mine, theirs = (np.asarray(of[name], dtype=np.float64) for of in (ledger, other))
        scale = max(float(np.abs(theirs).max(initial=0.0)), whole if name in ("arithmetic", "path", "momentum0") else 0.0)
        found.append(float(np.abs(mine - theirs).max(initial=0.0)) / scale if scale else 0.0)
    return max(found)


def recorded(config: Config, folder: Path) -> dict[str, Any]:
    """Train, record and decompose; the run, the ledger and what they took."""
    task = load(config.task.name, config.task.options)
    seconds = clocked(lambda: train(task, config, folder, overwrite=True))[1]
    run = explaind.open(folder)
    disk = size(folder)
    ledger, took = clocked(lambda: decompose_by_name(run, config.decompose))
    return {"run": run, "ledger": ledger, "disk": disk, "record": seconds, "decompose": took, "task": task}


def study(name: str, folder: Path, steps: int) -> dict[str, Any]:
    """Figures of one configuration."""
    config = read(CONFIGS / f"{name}.toml", ["--train.steps", str(steps), *ASKED[name]])
    full = recorded(config, folder / "full")
    thin = recorded(replace(config, train=replace(config.train, thin="sqrt")), folder / "thin")
    verdict, seconds = clocked(lambda: verify_run(thin["run"], thin["task"].model(), thin["task"].data("train"), thin["task"].losses))
    return {
        "steps": steps,
        "every": thin["run"].manifest.block,
        "params": thin["run"].manifest.params,
        "smaller": full["disk"] / thin["disk"],
        "slower": thin["decompose"] / full["decompose"],
        "difference": difference(thin["ledger"], full["ledger"]),
        "note": thin["ledger"].settings["relived"],
        "ok": [full["ledger"].verify().ok, thin["ledger"].verify().ok, verdict.ok],
        "verify_seconds": seconds,
        **{f"{key}_{kind}": entry[key] for kind, entry in (("full", full), ("thin", thin)) for key in ("disk", "record", "decompose")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/thin"))
    parser.add_argument("--small", action="store_true", help=f"{SMALL} steps")
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    found = {}
    for name in ASKED:
        f = found[name] = study(name, asked.out / name, SMALL if asked.small else STEPS)
        (asked.out / "thin.json").write_text(json.dumps(found, indent=1))
        print(f"{name}: {f['steps']} steps of {f['params']} parameters, a state every {f['every']}; all verified: {all(f['ok'])}")
        print(f"  disk        {f['disk_full'] / 1e6:.2f} MB -> {f['disk_thin'] / 1e6:.2f} MB, {f['smaller']:.1f} times smaller")
        print(f"  recording   {f['record_full']:.1f} s -> {f['record_thin']:.1f} s")
        print(f"  decompose   {f['decompose_full']:.1f} s -> {f['decompose_thin']:.1f} s, {f['slower']:.2f} times as long")
        print(f"  difference  {f['difference']:.2g} of the largest number of a row; {f['note']}")


if __name__ == "__main__":
    main()
