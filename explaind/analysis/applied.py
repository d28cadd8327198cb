"""What single windows of steps did to predictions, parameter by parameter, without a sweep over the whole run.

In the applied view a step's credit of data, summed over examples, is what its update did beside its decay:

    score[window, q, param] = Σ_step ḡ_q ∘ (Δ + R θ)

That is the ledger's data row plus its arithmetic row, and needs the path rule at these steps and nothing of any other. It wants decay that
is decoupled from the gradient (κ = 0, as in AdamW), since the momentum mixes the other kind with the data.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from explaind.errors import RequestError
from explaind.kernel.choosing import path_rule
from explaind.kernel.layout import Layout
from explaind.kernel.measures import Measures
from explaind.kernel.path import Segment, average
from explaind.kernel.sweep import NOISE
from explaind.record.device import placed
from explaind.replay.batches import Collate, Readable, moved
from explaind.replay.functional import Functional, Readout, fitted
from explaind.replay.steps import Step
from explaind.replay.surroundings import differentiable
from explaind.replay.thin import trajectory
from explaind.replay.trajectory import Trajectory
from explaind.store.reader import Run


@dataclass(frozen=True, eq=False)
class WindowScores:
    """starts [window]; scores [window, query, param], in the measure's unit; missed: Σ |path| / Σ |δ| over all steps and queries."""

    starts: np.ndarray
    scores: np.ndarray
    missed: float


def window_scores(
    run: Run,
    model: nn.Module,
    windows: Sequence[tuple[int, int]],
    *,
    data: Readable,
    losses: Readout,
    queries: Any,
    measure: Readout,
    rule: str = "auto",
    tol: float = 1e-3,
    dtype: torch.dtype = torch.float64,
    device: str | torch.device = "cpu",
    collate: Collate | None = None,
) -> WindowScores:
    """Credit of the data in the applied view in windows (first step, step after the last) of a run; all else as in ``explaind.decompose``.

    The measure gives one number per query. RequestError for a window outside of the run, and for coupled weight decay.
    """
    for start, stop in windows:
        if not 0 <= start < stop <= run.steps:
            raise RequestError(
                "no such window", expected=f"0 <= first < end <= {run.steps}", got=(start, stop), do="ask for recorded steps"
            )
    layout, target = Layout(run.manifest.layers), placed(device)
    own = fitted(model, run.manifest.layers, run.constants)
    asking = Functional(own, measure, target, dtype, any(layout.moving))
    still = torch.cat([torch.full((size,), 1.0 - moving) for size, moving in zip(layout.sizes, layout.moving, strict=True)]).to(
        target, dtype
    )
    with differentiable():
        steps = trajectory(run, model, losses, data, collate, target, dtype)
        theta = steps.tensor(run.states(0, 1)[0])
        measures = Measures(asking, moved(queries, target, dtype), layout, frozenset({"query", "param", "step"}), theta)
        chosen, mean = path_rule(rule, tol), torch.zeros(measures.count, layout.params, dtype=dtype, device=target)
        scores, sizes = [], torch.zeros(2, dtype=dtype, device=target)
        for window in windows:
            total = torch.zeros_like(mean)
            for step, segment in _segments(steps, measures, window):
                path, _ = average(chosen, measures, segment, mean)
                total += mean * (pushed(step) * still)
                sizes += torch.stack([path.abs().sum(), segment.change.abs().sum()])
            scores.append(total.cpu().numpy())
    missed = float(sizes[0] / sizes[1]) if sizes[1] else 0.0
    return WindowScores(np.array([start for start, _ in windows]), np.stack(scores), missed)


def _segments(steps: Trajectory, measures: Measures, window: tuple[int, int]) -> Iterator[tuple[Step, Segment]]:
    """The steps of a window with what every measure did on them; the scale of a tolerance is that of the window."""
    first, last = (bisect_right(steps.starts, step) - 1 for step in (window[0], window[1] - 1))
    found = [step for part in steps.segments(steps.starts[first : last + 1]) for step in part.steps if window[0] <= step.index < window[1]]
    values = torch.stack([measures.values(theta) for theta in (*(step.theta for step in found), found[-1].after)])
    change = values[1:] - values[:-1]
    noise = NOISE * torch.finfo(values.dtype).eps * torch.maximum(values[1:].abs(), values[:-1].abs())
    for at, step in enumerate(found):
        yield step, Segment(step.theta, step.after, change[at], change.abs().mean(0), step.index, noise[at])


def pushed(step: Step) -> Tensor:
    """A step's update without its decay: [param]. RequestError where the decay went through the gradient."""
    kappa = step.filter.kappa
    if bool(torch.as_tensor(kappa).any()):
        raise RequestError(
            "the weight decay of this run went through the gradient, where momentum mixes it with the data",
            where=f"step {step.index}",
            expected="decoupled decay, as in AdamW",
            do="decompose with keep=query,param,step and view='applied'",
        )
    return step.delta + step.filter.R * step.theta
