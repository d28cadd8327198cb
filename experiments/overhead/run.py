"""What does recording cost a training: time, memory and disk?

python experiments/overhead/run.py [--small] [--pairs 5] [--only NAME] [--out runs/overhead] [--memory | --heap]

Every training is made with and without a recorder, in turn, each in a process of its own. Time is the loop's, the recorder's closing
included, behind a few steps to warm up; memory is the most that the process ever held. --memory looks at that alone, in large models;
--heap at what was allocated at most, byte by byte, in small ones, whose processes differ by more than that (python -m pip install memray).
"""

import argparse
import gc
import importlib.util
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from explaind.config import read
from explaind.record.recorder import record
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
STACKS, WIDE = (1, 5, 10), 2048
"""Layers of the stacks whose memory is looked at, and how wide they are."""


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


def stacked(layers: int, path: Path | None, steps: int = 6) -> dict[str, float]:
    """Bytes that a few AdamW steps of linear layers held at most."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(WIDE, WIDE) for _ in range(layers)), nn.Linear(WIDE, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    x, y = torch.randn(8, WIDE), torch.arange(8)
    with nullcontext() if path is None else record(optimizer, model, path) as recorder:
        for _ in range(steps):
            if recorder is not None:
                recorder.examples(range(8))
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"peak": peak, "params": sum(p.numel() for p in model.parameters())}


def memory(out: Path) -> None:
    """What recording adds to the memory of stacks of linear layers."""

    def made(layers: int, path: Path | None) -> dict[str, float]:
        words = [sys.executable, __file__, "--stack", str(layers), *([] if path is None else ["--out", str(path)])]
        found: dict[str, float] = json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
        return found

    print("| parameters | a copy of them | memory of the training | more when recorded | in copies |\n|---|---|---|---|---|")
    for layers in STACKS:
        path = out / f"stack{layers}"
        plain, recorded = made(layers, None), made(layers, path)
        shutil.rmtree(path)
        copy, more = 4 * plain["params"], recorded["peak"] - plain["peak"]
        print(
            f"| {plain['params']:,} | {copy / 1e6:.0f} MB | {plain['peak'] / 1e6:.0f} MB | {more / 1e6:.0f} MB | {more / copy:.2f} |",
            flush=True,
        )


def allocated(config: str, overrides: list[str], path: Path | None, file: Path) -> dict[str, float]:
    """Bytes that one training had allocated at most, its model left out; file: where memray writes them down.

    A short one is recorded before: the modules and caches that a first recording loads are not counted, in neither of a pair.
    """
    import memray

    settings = read(CONFIGS / f"{config}.toml", overrides)
    task = load(settings.task.name, settings.task.options)
    torch.manual_seed(settings.train.seed)
    fit(task, replace(settings, train=replace(settings.train, steps=WARM)), task.model(), file.with_suffix(".warm"))
    shutil.rmtree(file.with_suffix(".warm"))
    model = task.model()
    gc.collect()
    with memray.Tracker(file):
        fit(task, settings, model, path)
    with memray.FileReader(file) as found:
        peak = found.metadata.peak_memory
    file.unlink()
    return {"peak": peak, "params": sum(p.numel() for p in model.parameters())}


def heap(out: Path, pairs: int, name: str) -> None:
    """What recording adds to what a training has allocated at most."""
    if importlib.util.find_spec("memray") is None:
        sys.exit("--heap needs memray, which counts allocations: python -m pip install memray")

    def made(path: Path, recorded: bool) -> dict[str, float]:
        words = [sys.executable, __file__, "--heap", "--child", name, "--out", str(path), *(["--recorded"] if recorded else [])]
        # Small objects too are then asked of the system one by one, and not by the megabyte.
        run = subprocess.run(words, check=True, capture_output=True, text=True, env={**os.environ, "PYTHONMALLOC": "malloc"})
        found: dict[str, float] = json.loads(run.stdout)
        return found

    out.mkdir(parents=True)
    found = list[tuple[dict[str, float], dict[str, float]]]()
    for k in range(pairs):
        found.append((made(out / f"plain{k}", False), made(out / f"run{k}", True)))
        shutil.rmtree(out / f"run{k}")
    copy, more = 4 * found[0][0]["params"], [recorded["peak"] - plain["peak"] for plain, recorded in found]
    plain = [plain["peak"] for plain, _ in found]
    print("| training | a copy of its parameters | allocated at most | more when recorded | in copies |\n|---|---|---|---|---|")
    print(
        f"| {name} | {copy / 1e3:.0f} kB | {statistics.median(plain) / 1e3:.0f} kB ({min(plain) / 1e3:.0f} … {max(plain) / 1e3:.0f}) "
        f"| {statistics.median(more) / 1e3:.0f} kB ({min(more) / 1e3:.0f} … {max(more) / 1e3:.0f}) "
        f"| {statistics.median(more) / copy:.2f} ({min(more) / copy:.2f} … {max(more) / copy:.2f}) |"
    )


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
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--heap", action="store_true")
    parser.add_argument("--recorded", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--stack", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        config, overrides = (SMALL if given.small else TRAININGS)[given.child]
        if given.heap:
            path = given.out if given.recorded else None
            print(json.dumps(allocated(config, overrides, path, given.out.with_suffix(".memray"))))
            return
        print(json.dumps(trained(config, overrides, given.out)))
        return
    if given.stack:
        print(json.dumps(stacked(given.stack, given.out)))
        return
    out = given.out or Path("runs/overhead")
    shutil.rmtree(out, ignore_errors=True)
    if given.memory:
        memory(out)
        return
    if given.heap:
        heap(out, given.pairs, given.only or "MOD-113")
        return
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
