"""Training curves, read off the recorded parameters: nothing needs to be logged while training."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.utils.data import default_collate

from explaind.replay.functional import fitted
from explaind.store.reader import Run
from explaind.tasks import Task

STATES = 160
"""About how many states of a run are looked at."""
EXAMPLES = 4096
"""At most this many examples of a split are, evenly spaced."""


@dataclass(frozen=True)
class Curves:
    """Mean loss and accuracy of each split at some states of the training."""

    steps: np.ndarray  # [state]
    loss: dict[str, np.ndarray]
    accuracy: dict[str, np.ndarray]

    def reached(self, split: str, accuracy: float) -> int | None:
        """The first step looked at from which the accuracy is at least this, if any."""
        hits = np.flatnonzero(self.accuracy[split] >= accuracy)
        return int(self.steps[hits[0]]) if len(hits) else None


def training_curves(run: Run, task: Task, splits: tuple[str, ...] = ("train", "val")) -> Curves:
    """Evaluate the task's loss and accuracy along the run, in eval mode."""
    steps = np.array(run.some_states(STATES))
    model = fitted(task.model(), run.manifest.layers, run.constants).eval()
    parameters = dict(model.named_parameters())
    data = {split: task.data(split) for split in splits}
    batches = {
        s: default_collate([d[int(i)] for i in np.unique(np.linspace(0, len(d) - 1, EXAMPLES).astype(int))]) for s, d in data.items()
    }
    loss, accuracy = ({split: np.zeros(len(steps)) for split in splits} for _ in range(2))
    for i, step in enumerate(steps.tolist()):
        with torch.no_grad():
            for name, values in run.theta(step).items():
                parameters[name].copy_(torch.from_numpy(values))
            for split, batch in batches.items():
                loss[split][i], accuracy[split][i] = evaluated(task, model, batch)
    return Curves(steps, loss, accuracy)


def evaluated(task: Task, model: nn.Module, batch: object) -> tuple[float, float]:
    """Mean loss and accuracy of a model, in the mode that it is in."""
    return float(task.losses(model, batch).mean()), float((task.predict(model, batch) == task.target(batch)).double().mean())
