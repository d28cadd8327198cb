"""What becomes of a recording on a full disk? In real file systems of every size from a page to enough, and of every number of files.

python experiments/store/full.py [--every 1] [--kinds plain thin gradients] [--out runs/full]

A small training is recorded in a tmpfs of its own (`unshare`, which needs no root where user namespaces are allowed), which is larger by
a page from one recording to the next; and then by one inode. The last page takes a part of what is written: a short write, then none.
What was recorded is opened, checked against its checksums and an undisturbed record, repaired once there is room, and compared again.
"""

import argparse
import errno
import itertools
import json
import mmap
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import explaind
from explaind.errors import StoreError
from explaind.record import recorder as recording
from explaind.store.repair import repair

STEPS, BLOCK = 10, 4
PARAMS = 20 * 32 + 32 + 32 * 4 + 4
KINDS: dict[str, dict[str, Any]] = {"plain": {}, "thin": {"thin": BLOCK}, "gradients": {"gradients": "store"}}
ROOM = {"size": "1g", "nr_inodes": "100k"}
"""Of a file system that is large enough."""


def recorded(path: Path, options: dict[str, Any], told: list[int]) -> None:
    """The training; told: steps that it has made."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    draw = torch.Generator().manual_seed(1)
    data = TensorDataset(torch.randn(16, 20, generator=draw), torch.randint(4, (16,), generator=draw))
    with explaind.record(optimizer, model, path, data=data, **options) as recorder:
        for step in range(STEPS):
            ids = (torch.arange(8) + 5 * step) % len(data)
            recorder.examples(ids)
            optimizer.zero_grad()
            x, y = data[ids]
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            told.append(step)


def limited(folder: Path, **limits: str) -> None:
    """Give the file system that is mounted there other limits."""
    asked = ",".join(f"{name}={value}" for name, value in {**ROOM, **limits}.items())
    subprocess.run(["mount", "-o", f"remount,{asked}", str(folder)], check=True)


def alike(run: explaind.Run, whole: explaind.Run) -> bool:
    """Whether the run's steps are the whole one's, bitwise; a thin one that was cut off has a state of its own behind its last step."""
    stop = run.steps + 1
    mine, theirs = (
        {i: state.tobytes() for i, state in zip(r.stored(0, stop), r.stored_states(0, stop), strict=True)} for r in (run, whole)
    )
    same = theirs.keys() <= mine.keys() and all(mine[i] == state for i, state in theirs.items())
    crcs = run.checksums(0, stop).tobytes() == whole.checksums(0, stop).tobytes()
    return same and crcs and run.step_checksums(0, run.steps).tobytes() == whole.step_checksums(0, run.steps).tobytes()


def judged(path: Path, told: int, whole: explaind.Run, folder: Path) -> list[str]:
    """What is wrong with what stands there after a recording that was refused; the file system gets room."""
    if not (path / "commit.json").exists():
        limited(folder)
        try:
            explaind.open(path)
        except StoreError as error:
            return [] if told == 0 and "\n" not in str(error) else [f"{told} steps are lost"]
        return ["a run without a marker opens"]
    run = explaind.open(path)
    faults = run.damage()
    have = run.steps + run.logged
    faults += [f"{told} steps were made, {have} are there"] if have < told else []
    faults += ["it is said to be complete"] if run.complete else []
    faults += ["other states"] if not alike(run, whole) else []
    limited(folder)
    repair(path)
    run = explaind.open(path)
    faults += [f"after the repair: {fault}" for fault in run.damage()]
    faults += [f"{run.steps} steps after the repair, not {have}"] if run.steps != have else []
    return [*faults, *(["other states after the repair"] if not alike(run, whole) else [])]


def study(kind: str, limit: str, every: int, folder: Path, whole: explaind.Run) -> dict[str, Any]:
    """Recordings in file systems of every size, until one is large enough."""
    found: dict[str, Any] = {"kind": kind, "limit": limit, "refused": 0, "opened": 0, "steps": set[int](), "faults": []}
    for number in itertools.count(1, every):
        limited(folder, **{limit: str(number * mmap.PAGESIZE if limit == "size" else number + 1)})  # the root is an inode, too
        told, path = list[int](), folder / "run"
        try:
            recorded(path, KINDS[kind], told)
        except StoreError as error:
            words = str(error)
            faults = judged(path, len(told), whole, folder)
            if not words.startswith(f"cannot write: {os.strerror(errno.ENOSPC)} ({path}") or "\n" in words:
                faults.append(f"the training is told: {words}")
            found["faults"] += [f"{number}: {fault}" for fault in faults]
            found["refused"] += 1
            found["opened"] += (path / "commit.json").exists()
            found["steps"].add(len(told))
        else:
            same = alike(explaind.open(path), whole)
            return {**found, "enough": number, "steps": sorted(found["steps"]), "whole": same}
        finally:
            limited(folder)
            shutil.rmtree(path, ignore_errors=True)
    raise AssertionError


def inside(kinds: list[str], every: int, folder: Path) -> None:
    """In a name space of mounts that is this process's own."""
    place = folder / "mount"
    place.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(place)], check=True)
    for kind in kinds:
        recorded(folder / kind, KINDS[kind], [])
        for limit in ROOM:
            print(json.dumps(study(kind, limit, every, place, explaind.open(folder / kind))), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=1, help="pages, or inodes, from one recording to the next")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--out", type=Path, default=Path("runs/full"))
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.inside:
        recording.BLOCK_BYTES, recording.TOGETHER = BLOCK * 2 * PARAMS * 4, 1
        return inside(given.kinds, given.every, given.out)
    shutil.rmtree(given.out, ignore_errors=True)
    command = ["unshare", "-rm", sys.executable, __file__, "--inside", *sys.argv[1:]]
    rows = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        for line in child.stdout:
            row = json.loads(line)
            rows.append(row)
            steps = f"after {row['steps'][0]} … {row['steps'][-1]} steps" if row["steps"] else ""
            print(
                f"{row['kind']}, {row['limit']} up to {row['enough']}: {row['refused']} refused {steps}, of which {row['opened']} open;",
                end=" ",
            )
            print(
                f"{len(row['faults'])} faults; the last is {'' if row['whole'] else 'NOT '}whole",
                *row["faults"][:5],
                sep="\n  ",
                flush=True,
            )
    (given.out / "full.json").write_text(json.dumps(rows, indent=1))
    raise SystemExit(child.returncode or any(row["faults"] or not row["whole"] for row in rows))


if __name__ == "__main__":
    main()
