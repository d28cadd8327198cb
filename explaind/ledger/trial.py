"""A few steps of a configuration, really recorded and clocked: what its whole recording will take."""

import resource
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from explaind.config import Config, bytes_of
from explaind.kernel.resolution import words
from explaind.store.reader import Run, open_run
from explaind.store.sizes import foretold
from explaind.tasks import load
from explaind.tasks.training import train

TRIAL = 20
"""Steps that are recorded to try a configuration: more than one block of them, so that what is written once is told from what grows."""
QUIET = 0.25
"""Quantile of their times that the thread which writes behind them does not reach."""


@dataclass(frozen=True)
class Trial:
    """The first steps of a training."""

    run: Run
    start: float
    """Seconds until the first step is made: of reading the data, of beginning the record, and of what a process does only once."""
    step: float
    """Seconds of a recorded step while nothing is written behind it."""
    write: float
    """Seconds of making chunks of all steps, behind the training and at its end."""
    memory: int
    """Bytes of the process at its largest, until then."""

    def disk(self, steps: int, block: int | None = None) -> int:
        """Bytes of a record of so many steps; block: steps between two anchors, where the trial has others."""
        return foretold(self.run, steps, self.run.manifest.block if block is None else block)

    def seconds(self, steps: int, span: int | None = None) -> float:
        """Of recording so many steps; span: steps between two commits, where the trial has others."""
        own = self.run.manifest.span
        commits = max(1.0, steps / (own if span is None else span)) / max(1.0, self.run.steps / own)  # one where there was one
        return self.start + self.step * steps + self.write * commits


def tried(settings: Config, path: Path, steps: int = TRIAL) -> Trial:
    """Record the first steps of a configuration there; raises what ``train`` does."""
    ticks = [time.perf_counter()]
    shorter = replace(settings, train=replace(settings.train, steps=min(steps, settings.train.steps)))
    train(load(settings.task.name, settings.task.options), shorter, path, progress=lambda *_: ticks.append(time.perf_counter()))
    end = time.perf_counter()
    pauses = np.diff(ticks)
    step = float(np.quantile(pauses[1:] if len(pauses) > 1 else pauses, QUIET))
    return Trial(open_run(path), max(0.0, float(pauses[0]) - step), step, max(0.0, end - ticks[1] - step * (len(pauses) - 1)), peak())


def gradient_bytes(run: Run, settings: Config) -> int:
    """What the gradients of the examples of a whole training take, from its first steps, whether these have them or not."""
    count = sum(len(row.batch) for row in run.block(0, run.steps).rows)
    itemsize = np.dtype(settings.train.gradient_dtype or run.manifest.dtype).itemsize
    return count * run.manifest.params * itemsize * settings.train.steps // max(1, run.steps)


def over_budget(run: Run, settings: Config) -> list[str]:
    """Why the gradients of a whole training cannot be stored, from its first steps; nothing where they can."""
    need, budget = gradient_bytes(run, settings), bytes_of(settings.train.gradient_budget, "train.gradient_budget")
    told = f"the gradients of all examples would take {words(need)} ({need} bytes), and train.gradient_budget is {words(budget)}"
    return [told] if need > budget else []


def peak() -> int:
    """Bytes that this process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
