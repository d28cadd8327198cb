"""Is a recording that is killed ever corrupt, and what is lost?

python experiments/store/run.py [--kills 50] [--out runs/store]

A training is recorded in a process of its own and killed with SIGKILL at a random moment. Its record is checked, resumed from
the training's own checkpoint, run to the end, and compared bitwise with one that was not interrupted.
"""

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import explaind
from explaind.record import recorder as recording

STEPS = 400


def data():
    g = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(64, 20, generator=g), torch.randint(4, (64,), generator=g))


class Loop:
    """A small training whose batches depend on the step alone, with a checkpoint every seven steps."""

    def __init__(self, path: Path) -> None:
        torch.manual_seed(0)
        self.path, self.file, self.data = path, path.with_suffix(".pt"), data()
        self.model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 4))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)

    def load(self) -> None:
        if self.file.exists():
            model, optimizer = torch.load(self.file)
            self.model.load_state_dict(model)
            self.optimizer.load_state_dict(optimizer)

    def run(self, tell: bool = False) -> None:
        with explaind.record(self.optimizer, self.model, self.path, data=self.data, resume=True) as recorder:
            while recorder.steps < STEPS:
                ids = (torch.arange(16) + 5 * recorder.steps) % len(self.data)
                recorder.examples(ids)
                self.optimizer.zero_grad()
                x, y = self.data[ids]
                F.cross_entropy(self.model(x), y).backward()
                self.optimizer.step()
                if tell:
                    print(recorder.steps, flush=True)
                if recorder.steps % 7 == 0:
                    torch.save((self.model.state_dict(), self.optimizer.state_dict()), self.file.with_suffix(".new"))
                    self.file.with_suffix(".new").replace(self.file)


def kill_one(path: Path, rng: random.Random) -> int:
    """Steps that the child had told of when it was killed."""
    told = path.with_suffix(".told")
    with told.open("w") as out:
        child = subprocess.Popen([sys.executable, __file__, "--child", str(path)], stdout=out)
        while not told.stat().st_size and child.poll() is None:
            time.sleep(0.001)
        time.sleep(rng.uniform(0.0, 1.5))
        child.send_signal(signal.SIGKILL)
        child.wait()
    lines = told.read_text().splitlines()
    return int(lines[-1]) if lines else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--out", type=Path, default=Path("runs/store"))
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    recording.TOGETHER = 1  # a commit every sixteen steps, of which there are many while a child lives
    if given.child:
        return Loop(given.child).run(tell=True)
    shutil.rmtree(given.out, ignore_errors=True)
    given.out.mkdir(parents=True)
    Loop(given.out / "whole").run()
    want, rng = explaind.open(given.out / "whole").states(0, STEPS + 1), random.Random(0)
    found = {"kills": given.kills, "corrupt": 0, "phantom": 0, "lost": [], "at": [], "resumed_bitwise": 0}
    for index in range(given.kills):
        path = given.out / f"run-{index}"
        told = kill_one(path, rng)
        run = explaind.open(path)
        held = run.steps + run.logged
        found["at"].append(told)
        found["corrupt"] += bool(run.damage()) or not np.array_equal(run.states(0, run.steps + 1), want[: run.steps + 1])
        found["phantom"] += held > told + 1  # a step may be written before it is told of
        found["lost"].append(max(0, told - held))
        loop = Loop(path)
        loop.load()
        loop.run()
        run = explaind.open(path)
        found["resumed_bitwise"] += run.steps == STEPS and not run.damage() and np.array_equal(run.states(0, STEPS + 1), want)
        shutil.rmtree(path)
    (given.out / "results.json").write_text(json.dumps(found, indent=1))
    at = f"{min(found['at'])} … {max(found['at'])}"
    print(f"{given.kills} kills at steps {at}: {found['corrupt']} corrupt, {found['phantom']} with phantom steps,")
    print(f"at most {max(found['lost'])} told steps lost, {found['resumed_bitwise']} resumed to a bitwise equal end")


if __name__ == "__main__":
    main()
