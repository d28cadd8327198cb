"""The applied view of a few examples, forwards: a momentum for each of them, as the paper writes its sum.

With z_i the momentum of example i (it starts at 0), for s = 0 … N−1:

    z_i ← M z_i + N w_i ∇ℓ_i(θ_s)
    data[q, i]   −= <C ḡ_q, z_i> + <E ḡ_q, w_i ∇ℓ_i>
    data[q, all] += <ḡ_q, Δ + R θ>                    what the recorded update did beside its decay
    decay[q]     −= <ḡ_q, R θ>

The sweep of kernel/sweep.py says the same of all examples, and replays the training on the way. Where only a sample of the examples is
wanted one by one this is less work: no gradient of a whole batch is taken, and no window of steps needs a costate of its own. What the
sample is not stands in one entry, the rounding of the recorded training with it, since nothing is replayed.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from explaind.analysis.applied import pushed
from explaind.axes import ROWS
from explaind.errors import RequestError
from explaind.kernel.choosing import path_rule
from explaind.kernel.gradients import CHUNK_BYTES, RowGradients, one, separable, take
from explaind.kernel.groups import REST, Asked, grouping
from explaind.kernel.layout import Layout
from explaind.kernel.measures import Measures
from explaind.kernel.path import Segment, average
from explaind.kernel.points import Point
from explaind.kernel.sweep import NOISE
from explaind.ledger.ledger import Checks, Ledger, Row
from explaind.record.device import placed
from explaind.record.watched import model_name
from explaind.replay.batches import Collate, Readable, moved
from explaind.replay.functional import Functional, Readout, Training, fitted
from explaind.replay.steps import Drawn, Part, Step
from explaind.replay.surroundings import differentiable
from explaind.replay.thin import trajectory
from explaind.store.reader import Run

DIMS = {"data": ("query", "example", "layer", "step"), "decay": ("query", "layer", "step"), "path": ("query", "step")}
UNSEEN = "the training was not replayed: rounding, and whatever else moved the parameters, stands in the data of the rest"


def sampled_ledger(
    run: Run,
    model: nn.Module,
    examples: Sequence[int],
    *,
    data: Readable,
    losses: Readout,
    queries: Any,
    measure: Readout,
    groups: Asked | None = None,
    windows: int = 1,
    rule: str = "auto",
    tol: float = 1e-3,
    dtype: torch.dtype = torch.float64,
    device: str | torch.device = "cpu",
    collate: Collate | None = None,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Ledger:
    """The ledger of query, example, layer and step in the applied view, of some examples and of the rest in one entry called "rest".

    examples  ids of examples to be told one by one
    groups    of layers, as in ``explaind.decompose``, of which all other arguments are; the measure gives one number per query

    Its rows are initial, data, decay and path; ``verify`` says that nothing was replayed. RequestError for what makes an update something
    else than a diagonal filter of the examples' own gradients: coupled decay, clipping, a gradient filter, Muon, losses that depend on each
    other or draw random numbers, gaps, momentum from before the recording.
    """
    layout, target = Layout(run.manifest.layers, _layers(run, groups)), placed(device)
    own, moving = fitted(model, run.manifest.layers, run.constants), any(layout.moving)
    training, asking = Training(own, losses, target, dtype, moving), Functional(own, measure, target, dtype, moving)
    with differentiable():
        steps = trajectory(run, model, losses, data, collate, target, dtype)
        theta = steps.tensor(run.states(0, 1)[0])
        measures = Measures(asking, moved(queries, target, dtype), layout, frozenset({"query", "layer", "step"}), theta)
        values = torch.stack([measures.values(theta) for some in steps.states() for theta in some])
        memories = _Memories(training, layout, np.unique(np.asarray(examples)), theta)
        booked = _Booked(measures.count, len(memories.ids), layout, -(-run.steps // windows), run.steps, theta)
        chosen, mean = path_rule(rule, tol), theta.new_zeros(measures.count, layout.params)
        change = values[1:] - values[:-1]
        scale, noise = change.abs().mean(0), NOISE * torch.finfo(dtype).eps * torch.maximum(values[1:].abs(), values[:-1].abs())
        for start in steps.starts:
            stretch = steps.segment(start)
            if start == 0 and stretch.carried.momentum is not None and bool(stretch.carried.momentum.any()):
                raise _refused("momentum from before the recording", 0)
            for step in stretch.steps:
                s = step.index
                segment = Segment(step.theta, step.after, change[s], scale, s, noise[s])
                path, recipe = average(chosen, measures, segment, mean)
                booked.book(step, s // windows, mean, change[s], path, str(recipe), memories.moved(step, mean))
                progress(s + 1, run.steps)
    settings = {"run": str(run.path), "keep": list(DIMS["data"]), "view": "applied", "windows": windows, "rule": chosen.name, "tol": tol}
    settings |= {
        "dtype": str(dtype).removeprefix("torch."),
        "device": str(target),
        "steps": run.steps,
        "rounding": run.rounding,
        "sample": memories.ids.tolist(),
    }
    settings |= {"model": model_name(model), "recorded_model": run.manifest.model}
    return booked.ledger(values, memories.ids, windows, settings)


def _layers(run: Run, groups: Asked | None) -> Any:
    return None if groups is None else grouping("layer", groups, [layer.name for layer in run.manifest.layers])


def _refused(what: str, step: int) -> RequestError:
    return RequestError(
        "the credit of a sample is not taken forwards in this run", where=f"step {step}", got=what, do="use decompose with view='applied'"
    )


class _Memories:
    """z of every example of the sample: [example, param]."""

    def __init__(self, losses: Functional, layout: Layout, ids: np.ndarray, like: Tensor) -> None:
        self.losses, self.layout, self.ids = losses, layout, ids
        self._z, self._gradients = like.new_zeros(len(ids), layout.params), like.new_zeros(len(ids), layout.params)
        self._rows: dict[tuple[bool, ...], RowGradients] = {}

    def moved(self, step: Step, mean: Tensor) -> Tensor:
        """What the momenta and gradients of a step did through its update: [group of layers, query, example]."""
        f = step.filter
        if step.gap or step.consumed is not None or step.passage is not None or f.P:
            raise _refused("a gap, clipping, a gradient filter or Muon", step.index)
        gradients = self._gradients.zero_()
        self.losses.set_mode(step.mode)
        for part in step.parts:
            self._add(gradients, step, part)
        if not (isinstance(f.sign, float) and f.sign == 1.0):
            gradients *= f.sign
        self._z *= f.M
        if isinstance(f.N, float):
            self._z.add_(gradients, alpha=f.N)
        else:
            self._z += f.N * gradients
        found = mean.new_zeros(len(self.layout.groups), len(mean), len(self.ids))
        for coefficient, rows in ((f.C, self._z), (f.E, gradients)):
            if isinstance(coefficient, float) and coefficient == 0.0:
                continue
            pulled = mean * coefficient
            for group, cut in zip(self.layout.group, self.layout.slices, strict=True):
                found[group].addmm_(pulled[:, cut], rows[:, cut].T, alpha=-1.0)
        return found

    def _add(self, into: Tensor, step: Step, part: Part) -> None:
        """into += w_i ∇ℓ_i of the sample's examples in a micro-batch."""
        chosen = np.flatnonzero(np.isin(part.ids, self.ids))
        chosen = chosen[np.argsort(part.ids[chosen], kind="stable")]
        if not len(chosen):
            return
        if isinstance(part.batch, Drawn):
            raise _refused("losses that draw random numbers", step.index)
        places = torch.from_numpy(chosen).to(into.device)
        some, point = take(part.batch, places), Point(one(self.losses), step.theta)
        if step.mode not in self._rows:
            if not separable(self.losses, self.layout.split(step.theta), part.batch):
                raise _refused("losses that depend on each other", step.index)
            self._rows[step.mode] = RowGradients(point, None, self.layout, some, CHUNK_BYTES)
        rows = np.searchsorted(self.ids, part.ids[chosen])
        if len(step.parts) == 1 and np.array_equal(rows, np.arange(len(self.ids))):  # each once, in their order
            self._rows[step.mode].add(into, [point], some, len(chosen))
            into *= part.weights[places][:, None]
            return
        found = into.new_zeros(len(chosen), self.layout.params)
        self._rows[step.mode].add(found, [point], some, len(chosen))
        into.index_add_(0, torch.from_numpy(rows).to(into.device), found * part.weights[places][:, None])


class _Booked:
    """What was found so far, by group of layers: data [query, example, group, window], the last entry being all examples."""

    def __init__(self, queries: int, examples: int, layout: Layout, entries: int, steps: int, like: Tensor) -> None:
        groups = len(layout.groups)
        self.layout = layout
        self.data = like.new_zeros(queries, examples + 1, groups, entries)
        self.decay, self.path = like.new_zeros(queries, groups, entries), like.new_zeros(queries, entries)
        self.sizes, self.by_step = like.new_zeros(2, queries), like.new_zeros(steps, 3)
        self.recipes: list[str] = []

    def book(self, step: Step, entry: int, mean: Tensor, change: Tensor, path: Tensor, recipe: str, credit: Tensor) -> None:
        update, still = self.layout.parted(pushed(step))
        if bool(still.any()):
            raise _refused("buffers that moved", step.index)
        self.data[:, :-1, :, entry] += credit.permute(1, 2, 0)
        self.data[:, -1, :, entry] += self.layout.grouped(self.layout.dots(mean, update)).T
        decay = step.filter.R * step.theta
        self.decay[..., entry] -= self.layout.grouped(self.layout.dots(mean, decay)).T
        self.path[:, entry] += path
        size = torch.stack([change.abs(), path.abs()])
        self.sizes += size
        self.by_step[step.index, :2] = size.sum(1)
        self.recipes.append(recipe)

    def ledger(self, values: Tensor, ids: np.ndarray, windows: int, settings: dict[str, Any]) -> Ledger:
        self.data[:, -1] -= self.data[:, :-1].sum(1)
        found = {"initial": values[0].double(), "data": self.data, "decay": self.decay, "path": self.path}
        rows = {name: Row(DIMS.get(name, ("query",)), found[name].cpu().numpy()) for name in ROWS if name in found}
        names, entries = self.layout.groups, self.data.shape[-1]
        coords = {
            "query": np.arange(len(self.data)),
            "example": np.array([*map(str, ids.tolist()), REST]),
            "layer": np.array(names),
            "step": np.arange(entries) * windows,
        }
        movement, missed = self.sizes.cpu().numpy()
        replay = np.zeros((len(self.recipes), len(self.layout.names)))
        by_step, recipes = self.by_step.cpu().numpy(), np.array(self.recipes)[:, None]
        checks = Checks(movement, missed, np.zeros_like(movement), ("query",), by_step, replay, recipes, self.layout.names, (UNSEEN,))
        return Ledger(rows, coords, Row(("query",), values[-1].double().cpu().numpy()), settings, checks)
