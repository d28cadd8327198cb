"""From a run to a ledger: check what was asked, replay, sweep block by block of queries, name the rows."""

import os
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from explaind.errors import ReplayError, RequestError
from explaind.kernel.accounts import Accounts
from explaind.kernel.layout import Layout
from explaind.kernel.measures import Measures, take
from explaind.kernel.path import path_rule
from explaind.kernel.products import ROUTES, Products
from explaind.kernel.resolution import Resolution, check_budget, resolution
from explaind.kernel.sweep import Sweep
from explaind.ledger.ledger import Checks, Ledger, Row, ordered
from explaind.ledger.saving import save as save_ledger
from explaind.record.device import placed
from explaind.record.examples import fingerprint
from explaind.record.watched import model_name
from explaind.replay.batches import Batches, Collate, Readable, count, moved
from explaind.replay.functional import Functional, Readout, differentiable_attention, fitted
from explaind.replay.steps import Step
from explaind.replay.trajectory import Trajectory
from explaind.store import schema
from explaind.store.reader import Run

GIB = 1 << 30
KEEP = ("query", "output", "example", "layer")
WORK_BYTES = 2 * GIB
"""Memory for costates and gradients of one block of queries; more queries are swept block by block."""
Progress = Callable[[int, int], None]
"""(steps done, steps in all) over all blocks."""


def decompose(
    run: Run, model: nn.Module, *, data: Readable, losses: Readout, queries: Any, measure: Readout, keep: Collection[str] | None = None,
    rule: str = "auto", tol: float = 1e-3, dtype: torch.dtype = torch.float64, device: str | torch.device = "cpu",
    view: str = "seen", windows: int = 1, products: str = "auto", closure: str = "none", budget: int = 4 * GIB, collate: Collate | None = None,
    save: str | os.PathLike[str] | None = None, config: Mapping[str, Any] | None = None, progress: Progress | None = None,
) -> Ledger:  # fmt: skip
    """Credit every prediction to examples, steps and layers of a recorded run.

    run       from ``explaind.open``
    model     the model class of the training; its parameter values do not matter, and it is not changed
    data      ``data[i]`` for the recorded ids; `collate` (default: torch's default_collate) makes a batch of them
    losses    (model, batch) -> Tensor[batch]: the training loss of each example, the reduction left out
    queries   a batch of inputs to explain
    measure   (model, queries) -> Tensor[query] or Tensor[query, output]; called in eval mode
    keep      axes of the result, out of query, output, example, layer or param, step; others are summed before the work
              (default: query, output where there is one, example and layer)
    rule      "auto" or "adaptive" (fewest Gauss nodes within `tol`), "gauss:N", "midpoint:N"
    tol       largest miss of the path rule, relative to each measure's movement
    view      "seen": the step axis says when an example's gradient was computed; "applied": when its momentum moved θ
    windows   steps per entry of the step axis
    products  "auto", "materialise" or "jvp"
    closure   "discrete-gradient" folds the path row into the data and decay rows; its size is reported all the same
    budget    bytes that the result may take
    save      a new folder for the ledger
    config    optional: a JSON-able mapping that is kept in ``ledger.settings``

    Raises RequestError for what cannot be asked, ReplayError for a model or data that do not fit, StoreError for the disk.
    """
    _check_choices(products, closure, dtype, run)
    target = placed(device)
    if save is not None:
        schema.check_new(Path(save))
    path_rule(rule, tol)  # refuse a rule that does not exist before any work
    layout = Layout(run.manifest.layers)
    own = fitted(model, run.manifest.layers, run.constants)
    training, asking = Functional(own, losses, target, dtype), Functional(own, measure, target, dtype)
    batch = moved(queries, target, dtype)
    with differentiable_attention():
        theta = torch.from_numpy(run.states(0, 1)[0]).to(target, dtype)
        shape = tuple(_probe(asking, layout, theta, batch).shape)
        axes = ("query", "output")[: len(shape)] + ("example", "layer") if keep is None else keep
        wanted = resolution(axes, run.steps, view, windows)
        plan = _plan(wanted, layout, shape, run.examples, dtype)
        check_budget(ordered(wanted.keep), plan.sizes, plan.itemsize, budget)
        doubts = tuple(run.damage() + changed_examples(run, data, run.examples))
        steps = Trajectory(run, Batches(data, run.examples, collate, target, dtype), target, dtype)
        blocks = list(_blocks(wanted, layout, asking, batch, plan, theta))
        accounts = []
        for i, block in enumerate(blocks):
            measures = Measures(asking, block, layout, wanted.keep, theta)
            sweep = Sweep(
                steps, layout, measures, training, training.set_mode, path_rule(rule, tol), Products(training, layout, wanted.finest, products),
                wanted, lambda step: _positions(step, run.examples, target), plan.sizes["example"] if "example" in wanted.keep else 1,
                closure == "discrete-gradient", _ticker(progress, i * run.steps, len(blocks) * run.steps),
            )  # fmt: skip
            accounts.append((sweep.run(), sweep.values))
    settings = {
        "run": str(run.path), "keep": list(ordered(wanted.keep)), "rule": path_rule(rule, tol).name, "tol": tol, "dtype": str(dtype).removeprefix("torch."),
        "device": str(target), "view": view, "windows": windows, "products": products, "closure": closure, "steps": run.steps,
        "model": model_name(model), "recorded_model": run.manifest.model, "config": None if config is None else dict(config),
    }  # fmt: skip
    ledger = _ledger(accounts, wanted, plan, layout, settings, doubts)
    if save is not None:
        save_ledger(ledger, save)
    return ledger


@dataclass(frozen=True)
class Plan:
    """Sizes of the axes, known before any work."""

    sizes: dict[str, int]
    coords: dict[str, np.ndarray]
    measure_axes: tuple[str, ...]
    itemsize: int


def _plan(wanted: Resolution, layout: Layout, shape: tuple[int, ...], examples: np.ndarray, dtype: torch.dtype) -> Plan:
    if len(shape) < 2 and "output" in wanted.keep:
        raise RequestError("keep holds 'output', but the measure gives one number per query", expected="Tensor[query, output]",
                           got=f"shape {shape}", do="drop 'output' from keep")  # fmt: skip
    coords = {
        "query": np.arange(shape[0]), "output": np.arange(shape[1]) if len(shape) == 2 else np.arange(1), "example": examples,
        "layer": np.array(layout.names), "param": np.arange(layout.params), "step": np.arange(0, max(1, wanted.steps), wanted.windows),
    }  # fmt: skip
    sizes = {axis: len(values) for axis, values in coords.items()}
    measure_axes = tuple(axis for axis in ("query", "output")[: len(shape)] if axis in wanted.keep)
    return Plan(sizes, {a: coords[a] for a in ordered(wanted.keep)}, measure_axes, dtype.itemsize)


def _check_choices(products: str, closure: str, dtype: torch.dtype, run: Run) -> None:
    for name, got, choices in (("products", products, ROUTES), ("closure", closure, ("none", "discrete-gradient")),
                               ("dtype", dtype, (torch.float32, torch.float64))):  # fmt: skip
        if got not in choices:
            raise RequestError(f"unknown {name}", expected=f"one of {', '.join(map(str, choices))}", got=repr(got), do="choose one of these")
    if run.steps == 0:
        raise RequestError("the run has no complete step", where=run.path, do="record a training first")


def _probe(asking: Functional, layout: Layout, theta: Tensor, batch: Any) -> Tensor:
    count(batch)
    with torch.no_grad():
        values = asking(layout.split(theta), batch)
    if not isinstance(values, Tensor) or values.ndim not in (1, 2):
        got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise RequestError("a measure must give one number per query, or per query and output", expected="Tensor[query] or Tensor[query, output]",
                           got=got, do="change the measure")  # fmt: skip
    return values


def _blocks(wanted: Resolution, layout: Layout, asking: Functional, batch: Any, plan: Plan, theta: Tensor) -> Iterator[Any]:
    """The queries in blocks whose costates fit in WORK_BYTES; one block where queries are summed or depend on each other."""
    if "query" not in wanted.keep or not Measures(asking, batch, layout, wanted.keep, theta).by_query:
        yield batch
        return
    per_query = plan.sizes["output"] if "output" in wanted.keep else 1
    fine = {"none": 1, "layer": len(layout.names), "param": 1}[wanted.finest]
    working = per_query * plan.itemsize * (6 * layout.params + (fine * plan.sizes["example"] if "example" in wanted.keep else 0))
    rows = max(1, WORK_BYTES // working)
    blocks = -(-plan.sizes["query"] // rows)
    rows = -(-plan.sizes["query"] // blocks)  # blocks of even size
    for start in range(0, plan.sizes["query"], rows):
        yield take(batch, slice(start, min(start + rows, plan.sizes["query"])))


def _positions(step: Step, examples: np.ndarray, device: torch.device) -> list[Tensor]:
    """Where the examples of each part of a step stand on the example axis."""
    return [torch.from_numpy(np.searchsorted(examples, part.ids)).to(device) for part in step.parts]


def _ticker(progress: Progress | None, done: int, total: int) -> Callable[[], None]:
    state = [done]

    def tick() -> None:
        state[0] += 1
        if progress is not None:
            progress(state[0], total)

    return tick


def changed_examples(run: Run, data: Readable, ids: np.ndarray) -> list[str]:
    """Which examples are not the ones that were trained on, in words; empty where the run has no fingerprints to compare."""
    if run.fingerprint is None:
        return []
    try:
        wrong = [int(i) for i in ids if fingerprint(data[int(i)]) != run.fingerprint[i]]
    except (IndexError, KeyError) as error:
        raise ReplayError("the data lacks an example of the run", expected=f"ids up to {ids.max()}", got=repr(error), do="give the data of the training") from error
    if not wrong:
        return []
    some = ", ".join(map(str, wrong[:5])) + (" …" if len(wrong) > 5 else "")
    return [f"the data is not the data of the training: {len(wrong)} of {len(ids)} examples differ (input or label): {some}"]


def _ledger(accounts: list[tuple[Accounts, Tensor]], wanted: Resolution, plan: Plan, layout: Layout, settings: dict[str, Any], doubts: tuple[str, ...]) -> Ledger:
    """Join the blocks along the measures and give every array its named axes."""
    fine = "param" if wanted.finest == "param" else "layer"
    measure_shape = tuple(plan.sizes[axis] for axis in plan.measure_axes)

    def joined(pick: Callable[[Accounts], Tensor], dims: tuple[str, ...]) -> Row:
        whole = np.concatenate([pick(a).cpu().numpy() for a, _ in accounts], axis=dims.index("measure"))
        return named(whole, dims)

    def named(whole: np.ndarray, dims: tuple[str, ...]) -> Row:
        d = dims.index("measure")
        whole = whole.reshape((*whole.shape[:d], *measure_shape, *whole.shape[d + 1 :]))
        dims = dims[:d] + plan.measure_axes + dims[d + 1 :]
        summed = tuple(i for i, axis in enumerate(dims) if axis not in wanted.keep)
        whole = whole.reshape([n for i, n in enumerate(whole.shape) if i not in summed])
        dims = tuple(axis for axis in dims if axis in wanted.keep)
        order = ordered(dims)
        return Row(order, np.asarray(whole.transpose([dims.index(axis) for axis in order]), order="C"))

    ends = np.concatenate([values[[0, -1]].double().cpu().numpy() for _, values in accounts], axis=1)
    rows = {
        "initial": named(ends[0], ("measure",)),
        "data": joined(lambda a: a.data, ("step", fine, "measure", "example")),
        "decay": joined(lambda a: a.decay, ("step", fine, "measure")),
        "momentum0": joined(lambda a: a.momentum0, (fine, "measure")),
        "arithmetic": joined(lambda a: a.arithmetic, ("step", fine, "measure")),
        "path": joined(lambda a: a.path, ("step", "measure")),
    }
    first = accounts[0][0]
    movement, path, arithmetic = (joined(pick, ("measure",)) for pick in (lambda a: a.movement, lambda a: a.path_absolute, lambda a: a.arithmetic_absolute))
    checks = Checks(
        movement.array, path.array, arithmetic.array, movement.dims, np.sum([a.by_step.cpu().numpy() for a, _ in accounts], axis=0), first.replay_error.cpu().numpy(),
        np.max([a.nodes for a, _ in accounts], axis=0), layout.names, doubts,
    )  # fmt: skip
    return Ledger(rows, plan.coords, named(ends[1], ("measure",)), settings, checks)
