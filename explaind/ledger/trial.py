"""A few steps of a configuration, really recorded and clocked: what its whole recording will take."""

import resource
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from explaind.config import Config, bytes_of
from explaind.store.reader import Run, open_run
from explaind.store.sizes import foretold
from explaind.tasks import load
from explaind.tasks.training import train

TRIAL = 20
"""Steps that are recorded to try a configuration: more than one block of them, so that what is written once is told from what grows."""


@dataclass(frozen=True)
class Trial:
    """The first steps of a training."""

    run: Run
    start: float
    """Seconds until the first step is made: of reading the data, and of beginning the record."""
    step: float
    """Seconds of a recorded step, the median."""
    close: float
    """Seconds from the last step to the end: of writing chunks of all columns."""
    memory: int
    """Bytes of the process at its largest, until then."""

    def disk(self, steps: int, block: int | None = None) -> int:
        """Bytes of a record of so many steps; block: steps between two anchors, where the trial has others."""
        return foretold(self.run, steps, self.run.manifest.block if block is None else block)

    def seconds(self, steps: int, span: int | None = None) -> float:
        """Of recording so many steps; span: steps between two commits, where the trial has others."""
        return self.start + self.step * steps + self.close * -(-steps // (self.run.manifest.span if span is None else span))


def tried(settings: Config, path: Path) -> Trial:
    """Record the first steps of a configuration there; raises what ``train`` does."""
    ticks = [time.perf_counter()]
    shorter = replace(settings, train=replace(settings.train, steps=min(TRIAL, settings.train.steps)))
    train(load(settings.task.name, settings.task.options), shorter, path, progress=lambda *_: ticks.append(time.perf_counter()))
    end = time.perf_counter()
    pauses = np.diff(ticks)
    step = float(np.median(pauses[1:] if len(pauses) > 1 else pauses))
    return Trial(open_run(path), max(0.0, float(pauses[0]) - step), step, end - ticks[-1], peak())


def over_budget(run: Run, settings: Config) -> list[str]:
    """Why the gradients of a whole training cannot be stored, from the steps that were; nothing where they can."""
    if run.manifest.gradients is None:
        return []
    count, itemsize = int(run.gradient_checksums()[0].sum()), np.dtype(run.manifest.gradients).itemsize
    need = count * run.manifest.params * itemsize * settings.train.steps // max(1, run.steps)
    budget = bytes_of(settings.train.gradient_budget, "train.gradient_budget")
    return [f"the gradients of all examples would take {need} bytes, and train.gradient_budget is {budget}"] if need > budget else []


def peak() -> int:
    """Bytes that this process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
