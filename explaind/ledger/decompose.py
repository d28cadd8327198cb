"""From a run to a ledger: check what was asked, replay, sweep block by block of queries, name the rows."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from explaind.errors import RequestError
from explaind.kernel.choosing import path_rule
from explaind.kernel.groups import Asked, plain
from explaind.kernel.layout import Layout
from explaind.kernel.machine import Machine, machine
from explaind.ledger.ledger import Ledger, ordered
from explaind.ledger.parts import Parts, check_free
from explaind.ledger.plan import Shard, blocks, chunk_bytes, planned, probed, shard_named, work_bytes
from explaind.ledger.prepared import Prepared
from explaind.ledger.sources import CHOICES, is_stored, needed, rounding_of
from explaind.ledger.sweeping import Swept, read, swept
from explaind.record.device import placed
from explaind.record.watched import model_name
from explaind.replay.batches import Collate, Readable, changed_examples, moved
from explaind.replay.functional import Functional, Readout, Training, fitted
from explaind.replay.stored import StoredTrajectory
from explaind.replay.surroundings import differentiable
from explaind.replay.thin import trajectory
from explaind.store.location import Where, location_of
from explaind.store.reader import Run

GIB = 1 << 30
Progress = Callable[[int, int], None]
"""(steps done, steps in all) over all blocks."""


def decompose(
    run: Run,
    model: nn.Module,
    *,
    data: Readable | None = None,
    losses: Readout | None = None,
    queries: Any,
    measure: Readout,
    keep: Collection[str] | None = None,
    groups: Mapping[str, Asked] = MappingProxyType({}),
    rule: str = "auto",
    tol: float = 1e-3,
    dtype: torch.dtype = torch.float64,
    device: str | torch.device = "cpu",
    tf32: bool = False,
    view: str = "seen",
    windows: int = 1,
    products: str = "auto",
    closure: str = "none",
    budget: int = 4 * GIB,
    memory: int | None = None,
    collate: Collate | None = None,
    save: Where | None = None,
    overwrite: bool = False,
    shard: str | None = None,
    config: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Ledger:
    """Credit every prediction to examples, steps and layers of a recorded run.

    run       from ``explaind.open``
    model     the model class of the training; its parameter values do not matter, and it is not changed
    data      ``data[i]`` for the recorded ids; `collate` (default: torch's default_collate) makes a batch of them
    losses    (model, batch) -> Tensor[batch]: the training loss of each example, the reduction left out.
              Neither data nor losses are needed where the run stores the gradients of its examples
    queries   a batch of inputs to explain
    measure   (model, queries) -> Tensor[query] or Tensor[query, output]; called in eval mode
    keep      axes of the result, out of query, output, example, layer or param, step; others are summed before the work
              (default: query, output where there is one, example and layer)
    groups    members of kept axes to be told together: {"layer": {"attention": ["heads.*"], …}, "example": {"spam": ids, …}, …}, by name or
              pattern of layers, id of examples, place of queries and outputs; what is in no group is in one called "rest"
    rule      "auto" (on every step the cheaper of the two next ones), "secant:K" (closes exactly; K equal parts), "gauss:N", "midpoint:N"
              nodes, or "adaptive" (the fewest Gauss nodes within `tol`)
    tol       largest error of the path rule, relative to each measure's movement, where the rule chooses
    tf32      let products of float32 take TF32 on a GPU that has it: ten bits of each factor, and faster; nothing else switches it on
    view      "seen": the step axis says when an example's gradient was computed; "applied": when its momentum moved θ
    windows   steps per entry of the step axis
    products  "auto" (those that are "stored", or else the cheapest, by layer), "materialise", "ghost" or "jvp"
    closure   "discrete-gradient" folds the path row into the data and decay rows; its size is reported all the same
    budget    bytes that the result may take
    memory    bytes to work in: queries are swept in blocks that fit (default: 2 GiB, or what a single query takes)
    save      a new folder or URL for the ledger; a decomposition that was stopped goes on when it is asked again in the same way
    overwrite replace a ledger in that folder, once the new one is complete, and what was begun there with other arguments
    shard     "I/N": only the I-th of N parts of the queries, for N processes with the same `save`; what is returned is the ledger of
              these queries, and whoever finishes last saves the whole one (``explaind.shards_left`` says who has not finished)
    config    optional: a JSON-able mapping that is kept in ``ledger.settings``

    Raises RequestError for what cannot be asked, ReplayError for a model or data that do not fit, StoreError for the disk.
    """
    _check_choices(products, closure, dtype, run)
    share = _share(shard, save)
    path_rule(rule, tol)  # refuse a rule that does not exist before any work
    target = placed(device)
    if save is not None:
        check_free(location_of(save), overwrite)
    layout = Layout(run.manifest.layers)
    own = fitted(model, run.manifest.layers, run.constants)
    moving = any(layout.moving)
    stored = is_stored(run, products)
    given = None if stored else needed(run, data, losses)
    asking = Functional(own, measure, target, dtype, moving)
    training = None if given is None else Training(own, given[1], target, dtype, moving)
    batch = moved(queries, target, dtype)
    with differentiable(tf32):
        theta = torch.from_numpy(run.states(0, 1)[0]).to(target, dtype)
        plan = planned(run, layout, probed(asking, layout, theta, batch), keep, groups, view, windows, dtype, budget)
        layout = Layout(run.manifest.layers, plan.groups.get("layer"))
        doubts = tuple(run.damage() + ([] if data is None else changed_examples(run, data, run.examples)))
        steps = StoredTrajectory(run, target, dtype) if given is None else trajectory(run, model, *given[::-1], collate, target, dtype)
        settings = {
            "run": str(run.path),
            "keep": list(ordered(plan.wanted.keep)),
            "groups": {axis: plain(asked) for axis, asked in groups.items()},
            "rule": path_rule(rule, tol).name,
            "tol": tol,
            "dtype": str(dtype).removeprefix("torch."),
            "device": str(target),
            "tf32": tf32,
            "view": view,
            "windows": windows,
            "products": products,
            "closure": closure,
            "memory": work_bytes(memory),
            "steps": run.steps,
            "model": model_name(model),
            "recorded_model": run.manifest.model,
            "rounding": rounding_of(run, stored),
            "config": None if config is None else dict(config),
        }
        bounds = blocks(plan, layout, asking, batch, theta, memory, share)
        chunk, make = chunk_bytes(memory), partial(path_rule, rule, tol)
        ready = Prepared(
            steps, data, training, asking, layout, make, theta, batch, plan, bounds, chunk, machine(target, dtype), settings, doubts
        )
        parts = None if save is None else Parts(location_of(save), ready.key(), len(bounds), overwrite)
        if parts is not None:
            ready = replace(ready, machine=Machine(**parts.key["machine"]))
        mine = [i for i in range(len(bounds)) if share.owns(i)]
        tick = _Ticker(progress, run.steps * len(mine))
        done = {i: swept(partial(ready.sweep, i), run.steps, tick, parts, i, target) for i in mine}
    if parts is None or shard is None:
        ledger = ready.ledger(list(done.values()))
        if parts is not None:
            parts.finish(ledger)
        return ledger
    _finish(ready, parts, done, target)
    return ready.ledger_of(done, shard)


def _finish(ready: Prepared, parts: Parts, done: Mapping[int, Swept], device: torch.device) -> None:
    """Put the whole ledger in its place if all other shards are done too."""
    if parts.missing():
        return
    blocks = [done.get(i) or read(parts, i, device) for i in range(parts.blocks)]
    found = [block for block in blocks if block is not None]
    if len(found) == parts.blocks:  # else a part was damaged, which is missing now, or another shard has just finished
        parts.finish(ready.ledger(found))


def _check_choices(products: str, closure: str, dtype: torch.dtype, run: Run) -> None:
    for name, got, choices in (
        ("products", products, CHOICES),
        ("closure", closure, ("none", "discrete-gradient")),
        ("dtype", dtype, (torch.float32, torch.float64)),
    ):
        if got not in choices:
            raise RequestError(
                f"unknown {name}", expected=f"one of {', '.join(map(str, choices))}", got=repr(got), do="choose one of these"
            )
    if run.steps == 0:
        raise RequestError("the run has no complete step", where=run.path, do="record a training first")


def _share(shard: str | None, save: Where | None) -> Shard:
    if shard is not None and save is None:
        raise RequestError("a shard needs a place where the others find it", expected="save=", got=f"shard {shard}", do="name the ledger")
    return shard_named(shard)


class _Ticker:
    """Counts steps, and tells `progress`."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0

    def __call__(self, steps: int = 1) -> None:
        self._done += steps
        if self._progress is not None:
            self._progress(self._done, self._total)
