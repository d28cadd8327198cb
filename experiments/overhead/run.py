"""What does recording cost a training: time, memory and disk?

python experiments/overhead/run.py [--small] [--pairs 5] [--only NAME] [--out runs/overhead]

Every training is made with and without a recorder, in turn, each in a process of its own. Time is the loop's, the recorder's closing
included, behind a few steps to warm up; memory is the most that the process ever held.
"""

import argparse
import json
import resource
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from explaind.config import read
from explaind.store.reader import open_run
from explaind.tasks import load
from explaind.tasks.training import fit

CONFIGS = Path(__file__).parents[2] / "configs"
TRAININGS = {
    "digits, 12 wide": ("digits", ["--train.steps", "2000", "--task.hidden", "12"]),
    "digits": ("digits", ["--train.steps", "2000"]),
    "digits, 2048 wide": ("digits", ["--train.steps", "64", "--task.hidden", "2048"]),
    "MOD-113": ("mod113", ["--train.steps", "200"]),
}
SMALL = {"digits": ("digits", ["--train.steps", "200"])}
WARM = 5


def trained(config: str, overrides: list[str], path: Path | None) -> dict[str, float]:
    """Seconds, and bytes at most, of one training."""
    settings = read(CONFIGS / f"{config}.toml", overrides)
    task = load(settings.task.name, settings.task.options)
    torch.manual_seed(settings.train.seed)
    fit(task, replace(settings, train=replace(settings.train, steps=WARM)), task.model(), None)
    model = task.model()
    begun = time.perf_counter()
    fit(task, settings, model, path)
    seconds = time.perf_counter() - begun
    params = sum(p.numel() for p in model.parameters())
    return {
        "seconds": seconds,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "params": params,
        "steps": settings.train.steps,
    }


def study(name: str, out: Path, pairs: int, small: bool) -> dict[str, Any]:
    """Pairs of one training without and with a recorder."""

    def made(path: Path | None) -> dict[str, float]:
        words = [
            sys.executable,
            __file__,
            "--child",
            name,
            *(["--small"] if small else []),
            *([] if path is None else ["--out", str(path)]),
        ]
        found: dict[str, float] = json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
        return found

    found = list[tuple[dict[str, float], dict[str, float]]]()
    for k in range(pairs):
        path = out / f"run{k}"
        found.append((made(None), made(path)))
        if k < pairs - 1:
            shutil.rmtree(path)
    run = open_run(path)
    steps, params = run.steps, run.manifest.params
    return {
        "params": params,
        "steps": steps,
        "step_ms": 1e3 * statistics.median(plain["seconds"] for plain, _ in found) / steps,
        "recorded_ms": 1e3 * statistics.median(recorded["seconds"] for _, recorded in found) / steps,
        "overhead": statistics.median(recorded["seconds"] / plain["seconds"] for plain, recorded in found) - 1,
        "least": min(recorded["seconds"] / plain["seconds"] for plain, recorded in found) - 1,
        "most": max(recorded["seconds"] / plain["seconds"] for plain, recorded in found) - 1,
        "copies": statistics.median(recorded["peak"] - plain["peak"] for plain, recorded in found) / (4 * params),
        "memory": statistics.median(recorded["peak"] - plain["peak"] for plain, recorded in found),
        "damage": len(run.damage()),
        **{f"bytes of {array}": size(run.path / array) / params / steps for array in ("theta", "preconditioner")},
        "bytes": size(run.path) / params / steps,
    }


def size(folder: Path) -> int:
    """Bytes of all its files."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def line(name: str, found: dict[str, Any]) -> str:
    """A row of the table in the README."""
    return (
        f"| {name} | {found['params']:,} | {found['step_ms']:.2f} | {found['recorded_ms']:.2f} "
        f"| {found['overhead']:+.0%} ({found['least']:+.0%} … {found['most']:+.0%}) | {found['memory'] / 1e6:.0f} MB "
        f"= {found['copies']:.1f} "
        f"| {found['bytes of theta']:.2f} | {found['bytes of preconditioner']:.2f} | {found['bytes']:.2f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--only")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        config, overrides = (SMALL if given.small else TRAININGS)[given.child]
        print(json.dumps(trained(config, overrides, given.out)))
        return
    out = given.out or Path("runs/overhead")
    shutil.rmtree(out, ignore_errors=True)
    print("| training | parameters | ms a step | recorded | more time | more memory, in copies of theta | theta | preconditioner | all |")
    print("|---|---|---|---|---|---|---|---|---|")
    found = {}
    for name in SMALL if given.small else TRAININGS:
        if given.only in (None, name):
            found[name] = study(name, out / name, given.pairs, given.small)
            print(line(name, found[name]), flush=True)
    (out / "overhead.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
