"""From a run to a ledger: check what was asked, replay, sweep block by block of queries, name the rows."""

import os
from collections.abc import Callable, Collection, Mapping
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import nn

from explaind.errors import RequestError
from explaind.kernel.choosing import path_rule
from explaind.kernel.layout import Layout
from explaind.kernel.measures import Measures
from explaind.kernel.products import ROUTES, Products
from explaind.kernel.sweep import Sweep
from explaind.ledger.assemble import assembled
from explaind.ledger.ledger import Ledger, ordered
from explaind.ledger.plan import blocks, planned, probed
from explaind.ledger.saving import save as save_ledger
from explaind.record.device import placed
from explaind.record.watched import model_name
from explaind.replay.batches import Batches, Collate, Readable, changed_examples, moved
from explaind.replay.functional import Functional, Readout, differentiable_attention, fitted
from explaind.replay.trajectory import Trajectory
from explaind.store import schema
from explaind.store.reader import Run

GIB = 1 << 30
Progress = Callable[[int, int], None]
"""(steps done, steps in all) over all blocks."""


def decompose(
    run: Run,
    model: nn.Module,
    *,
    data: Readable,
    losses: Readout,
    queries: Any,
    measure: Readout,
    keep: Collection[str] | None = None,
    rule: str = "auto",
    tol: float = 1e-3,
    dtype: torch.dtype = torch.float64,
    device: str | torch.device = "cpu",
    view: str = "seen",
    windows: int = 1,
    products: str = "auto",
    closure: str = "none",
    budget: int = 4 * GIB,
    collate: Collate | None = None,
    save: str | os.PathLike[str] | None = None,
    config: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Ledger:
    """Credit every prediction to examples, steps and layers of a recorded run.

    run       from ``explaind.open``
    model     the model class of the training; its parameter values do not matter, and it is not changed
    data      ``data[i]`` for the recorded ids; `collate` (default: torch's default_collate) makes a batch of them
    losses    (model, batch) -> Tensor[batch]: the training loss of each example, the reduction left out
    queries   a batch of inputs to explain
    measure   (model, queries) -> Tensor[query] or Tensor[query, output]; called in eval mode
    keep      axes of the result, out of query, output, example, layer or param, step; others are summed before the work
              (default: query, output where there is one, example and layer)
    rule      "auto" (on every step the cheaper of the two next ones), "secant:K" (closes exactly; K equal parts), "gauss:N", "midpoint:N"
              nodes, or "adaptive" (the fewest Gauss nodes within `tol`)
    tol       largest error of the path rule, relative to each measure's movement, where the rule chooses
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
    path_rule(rule, tol)  # refuse a rule that does not exist before any work
    target = placed(device)
    if save is not None:
        schema.check_new(Path(save))
    layout = Layout(run.manifest.layers)
    own = fitted(model, run.manifest.layers, run.constants)
    training, asking = Functional(own, losses, target, dtype), Functional(own, measure, target, dtype)
    batch = moved(queries, target, dtype)
    with differentiable_attention():
        theta = torch.from_numpy(run.states(0, 1)[0]).to(target, dtype)
        plan = planned(run, layout, probed(asking, layout, theta, batch), keep, view, windows, dtype, budget)
        doubts = tuple(run.damage() + changed_examples(run, data, run.examples))
        steps = Trajectory(run, Batches(data, run.examples, collate, target, dtype), target, dtype)
        parts = list(blocks(plan, layout, asking, batch, theta))
        tick = _ticker(progress, len(parts) * run.steps)
        accounts = []
        for part in parts:
            measures = Measures(asking, part, layout, plan.wanted.keep, theta)
            dots = Products(training, layout, plan.wanted.finest, products)
            correct = closure == "discrete-gradient"
            chosen = path_rule(rule, tol)
            sweep = Sweep(steps, measures, training, chosen, dots, plan.wanted, run.examples, correct)
            accounts.append((sweep.run(tick), sweep.values))
    settings = {
        "run": str(run.path),
        "keep": list(ordered(plan.wanted.keep)),
        "rule": chosen.name,
        "rule_note": getattr(chosen, "note", ""),
        "tol": tol,
        "dtype": str(dtype).removeprefix("torch."),
        "device": str(target),
        "view": view,
        "windows": windows,
        "products": products,
        "closure": closure,
        "steps": run.steps,
        "model": model_name(model),
        "recorded_model": run.manifest.model,
        "config": None if config is None else dict(config),
    }
    ledger = assembled(accounts, plan, layout, settings, doubts)
    if save is not None:
        save_ledger(ledger, save)
    return ledger


def _check_choices(products: str, closure: str, dtype: torch.dtype, run: Run) -> None:
    for name, got, choices in (
        ("products", products, ROUTES),
        ("closure", closure, ("none", "discrete-gradient")),
        ("dtype", dtype, (torch.float32, torch.float64)),
    ):
        if got not in choices:
            raise RequestError(
                f"unknown {name}", expected=f"one of {', '.join(map(str, choices))}", got=repr(got), do="choose one of these"
            )
    if run.steps == 0:
        raise RequestError("the run has no complete step", where=run.path, do="record a training first")


def _ticker(progress: Progress | None, total: int) -> Callable[[], None]:
    """Counts calls, and tells `progress`."""
    done = count(1)
    return (lambda: None) if progress is None else lambda: progress(next(done), total)
