"""What does recording cost a training: time, memory and disk?

python experiments/overhead/run.py [--small] [--pairs 5] [--only NAME] [--device cpu] [--out runs/overhead] [--memory | --heap]

Every training is made with and without a recorder, in turn, each in a process of its own. Time is the loop's, the recorder's closing
included, behind a few steps to warm up; memory is the most that the process ever held. --memory looks at that alone, in large models;
--heap at small ones, whose processes differ by more than a copy of their parameters where nothing is done about it: at what was allocated
at most, byte by byte (python -m pip install memray), and at what a process held at most whose allocator gives back what was freed (Linux).
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

from explaind.config import Config, read
from explaind.record.recorder import record
from explaind.store.reader import open_run
from explaind.tasks import Task, load
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
GIVES_BACK = {"PYTHONMALLOC": "malloc", "MALLOC_MMAP_THRESHOLD_": "32768", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_TOP_PAD_": "0"}
"""Has glibc keep no room for later, and Python ask it for small objects too."""
STACKS, WIDE = (1, 5, 10), 2048
"""Layers of the stacks whose memory is looked at, and how wide they are."""


def child(words: list[str], more: dict[str, str] | None = None) -> dict[str, float]:
    """What this file prints in a process of its own; more: of its environment."""
    run = subprocess.run([sys.executable, __file__, *words], check=True, capture_output=True, text=True, env={**os.environ, **(more or {})})
    found: dict[str, float] = json.loads(run.stdout)
    return found


def prepared(config: str, overrides: list[str]) -> tuple[Config, Task, nn.Module]:
    """A training, behind a few steps of another one that nobody records."""
    settings = read(CONFIGS / f"{config}.toml", overrides)
    task = load(settings.task.name, settings.task.options)
    torch.manual_seed(settings.train.seed)
    fit(task, replace(settings, train=replace(settings.train, steps=WARM)), task.model(), None)
    return settings, task, task.model()


def count(model: nn.Module) -> int:
    """Its parameters."""
    return sum(p.numel() for p in model.parameters())


def trained(config: str, overrides: list[str], path: Path | None) -> dict[str, float]:
    """Seconds, and bytes at most, of one training."""
    settings, task, model = prepared(config, overrides)
    begun = time.perf_counter()
    fit(task, settings, model, path)
    if settings.train.device != "cpu":
        torch.cuda.synchronize()  # which a training without a recorder need not have waited for
    seconds = time.perf_counter() - begun
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": seconds, "peak": peak, "own": peak - mapped(), "params": count(model), "steps": settings.train.steps}


def mapped() -> int:
    """Bytes of files that stand in the process's memory, such as the code of its libraries; 0 where the system does not say."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith(("RssFile:", "RssShmem:")))


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
    return {"peak": peak, "params": count(model)}


def memory(out: Path) -> None:
    """What recording adds to the memory of stacks of linear layers."""
    print("| parameters | a copy of them | memory of the training | more when recorded | in copies |\n|---|---|---|---|---|")
    for layers in STACKS:
        path = out / f"stack{layers}"
        plain, recorded = (child(["--stack", str(layers), *more]) for more in ([], ["--out", str(path)]))
        shutil.rmtree(path)
        copy, more = 4 * plain["params"], recorded["peak"] - plain["peak"]
        print(
            f"| {plain['params']:,} | {copy / 1e6:.0f} MB | {plain['peak'] / 1e6:.0f} MB | {more / 1e6:.0f} MB | {more / copy:.2f} |",
            flush=True,
        )


def allocated(config: str, overrides: list[str], path: Path | None, file: Path) -> dict[str, float]:
    """Bytes that one training had allocated at most, its model left out; file: where memray writes them down."""
    import memray

    settings, task, model = prepared(config, overrides)
    gc.collect()
    with memray.Tracker(file):
        fit(task, settings, model, path)
    with memray.FileReader(file) as found:
        peak = found.metadata.peak_memory
    file.unlink()
    return {"peak": peak, "params": count(model)}


def paired(words: list[str], out: Path, number: int, more: dict[str, str] | None = None) -> list[tuple[dict[str, float], dict[str, float]]]:
    """One training without and with a recorder, in turn, so many times; the last run is left at out."""
    found = list[tuple[dict[str, float], dict[str, float]]]()
    for _ in range(number):
        shutil.rmtree(out, ignore_errors=True)
        found.append((child(words, more), child([*words, "--out", str(out)], more)))
    return found


def heap(out: Path, pairs: int, name: str) -> None:
    """What recording adds to what a training has allocated at most, and to what its process held, in its first recording."""
    if importlib.util.find_spec("memray") is None:
        sys.exit("--heap needs memray, which counts allocations: python -m pip install memray")
    out.mkdir(parents=True)
    print("| training | a copy of its parameters | bytes | of a training at most | more when recorded | in copies |")
    print("|---|---|---|---|---|---|")
    for told, which, words in (
        ("allocated", "peak", ["--child", name, "--memray", str(out / "memray")]),
        ("held by the process, files left out", "own", ["--child", name]),
    ):
        found = paired(words, out / "run", pairs, GIVES_BACK)
        copy, plain = 4 * found[0][0]["params"], [plain[which] / 1e3 for plain, _ in found]
        more = [(recorded[which] - plain[which]) / 1e3 for plain, recorded in found]
        row = [name, f"{copy / 1e3:.0f} kB", told, f"{spread(plain, 0)} kB", f"{spread(more, 0)} kB"]
        print("|", " | ".join([*row, spread([1e3 * n / copy for n in more], 2)]), "|", flush=True)


def spread(numbers: list[float], digits: int) -> str:
    """Their median, and the smallest and the largest."""
    middle, least, most = (f"{number:.{digits}f}" for number in (statistics.median(numbers), min(numbers), max(numbers)))
    return f"{middle} ({least} … {most})"


def study(name: str, out: Path, pairs: int, small: bool, device: str) -> dict[str, Any]:
    """Pairs of one training without and with a recorder."""
    found = paired(["--child", name, "--device", device, *(["--small"] if small else [])], out, pairs)
    run = open_run(out)
    steps, params = run.steps, run.manifest.params
    ratios = [recorded["seconds"] / plain["seconds"] - 1 for plain, recorded in found]
    more = statistics.median(recorded["peak"] - plain["peak"] for plain, recorded in found)
    return {
        "params": params,
        "steps": steps,
        "step_ms": 1e3 * statistics.median(plain["seconds"] for plain, _ in found) / steps,
        "recorded_ms": 1e3 * statistics.median(recorded["seconds"] for _, recorded in found) / steps,
        "overhead": statistics.median(ratios),
        "least": min(ratios),
        "most": max(ratios),
        "copies": more / (4 * params),
        "memory": more,
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
    parser.add_argument("--device", default="cpu", help="that is trained on, where times are looked at")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--heap", action="store_true")
    parser.add_argument("--memray", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--stack", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        config, overrides = (SMALL if given.small else TRAININGS)[given.child]
        overrides = [*overrides, "--train.device", given.device]
        found = allocated(config, overrides, given.out, given.memray) if given.memray else trained(config, overrides, given.out)
        print(json.dumps(found))
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
    table = {}
    for name in SMALL if given.small else TRAININGS:
        if given.only in (None, name):
            table[name] = study(name, out / name, given.pairs, given.small, given.device)
            print(line(name, table[name]), flush=True)
    (out / "overhead.json").write_text(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()
