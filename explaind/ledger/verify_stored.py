"""Are the gradients that a run stores those of the losses? Asked for some examples of a few steps, which are computed once more."""

from functools import partial

import numpy as np
import torch
from torch import Tensor

from explaind.kernel.gradients import combinations
from explaind.kernel.layout import Layout
from explaind.kernel.rebuild import replay_errors
from explaind.kernel.stored import NoLosses
from explaind.kernel.whole import of_batch
from explaind.ledger.sources import COARSE, rounding_of
from explaind.ledger.verify import replay_words
from explaind.replay.functional import Functional
from explaind.replay.stored import StoredTrajectory
from explaind.replay.trajectory import Trajectory
from explaind.store.reader import Run

ASKED = 3
"""Segments whose first step is looked at."""
EXAMPLES = 4
"""Of its first micro-batch."""
SAME = 1e-3
"""Relative difference of two gradients that is rounding of a float32 training."""


def of_updates(run: Run) -> tuple[np.ndarray, list[str]]:
    """Whether the stored gradients give the recorded updates: relative errors [step, layer], and what they say."""
    layout = Layout(run.manifest.layers)
    steps = StoredTrajectory(run, torch.device("cpu"), torch.float64)
    errors: np.ndarray = replay_errors(steps, layout, NoLosses()).cpu().numpy()
    return errors, replay_words(errors, layout.names, rounding_of(run, True))


def of_losses(run: Run, steps: Trajectory, layout: Layout, training: Functional) -> list[str]:
    """Where the stored gradients are not those of the losses, in words; nothing where the run stores none."""
    if run.manifest.gradients is None:
        return []
    eps = torch.finfo(getattr(torch, run.manifest.gradients)).eps
    room = max(SAME, COARSE * eps, *run.rounding)
    some = [steps.starts[i] for i in np.unique(np.linspace(0, len(steps.starts) - 1, ASKED).round().astype(int))]
    for stretch in steps.segments(some):
        step = next((step for step in stretch.steps if step.parts), None)
        if step is None:
            continue
        part = step.parts[0]
        rows = min(EXAMPLES, len(part.ids))
        training.set_mode(step.mode, step.precision)
        want = step.theta.new_zeros(rows, layout.params)
        alone = torch.eye(len(part.ids), dtype=want.dtype, device=want.device)[:rows]
        combinations(partial(of_batch, training, part), layout, step.theta, alone, want)
        got = steps.tensor(run.gradients(step.index, 0, rows)) * (part.weights[:rows] != 0)[:, None]
        wrong = _wrong(got, want * (part.weights[:rows] != 0)[:, None], layout, room)
        if wrong is not None:
            return [
                f"the stored gradients of examples of step {step.index} are not those of the losses and data given ({wrong}): "
                "another model, loss or data, or examples that depend on each other, and were recorded without losses="
            ]
    return []


def _wrong(got: Tensor, want: Tensor, layout: Layout, room: float) -> str | None:
    """The first layer where gradients [example, param] differ by more than one factor for all (a loss that was scaled)."""
    size = float(want.square().sum())
    factor = float((got * want).sum()) / size if size else 1.0
    whole = float((factor * want).norm())
    for name, cut in zip(layout.names, layout.slices, strict=True):
        off, own = float((got - factor * want)[:, cut].norm()), float((factor * want)[:, cut].norm())
        if not off <= room * (own + 0.01 * whole):
            return name
    return None if factor > 0 else layout.names[0]
