"""What will happen, said before hours are spent: a few steps of the run are replayed and decomposed, timed, and counted up."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod, sqrt
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from explaind.errors import ExplaindError
from explaind.kernel.gradients import take
from explaind.kernel.layout import Layout
from explaind.kernel.machine import machine
from explaind.kernel.products import Products
from explaind.kernel.secant import NoSecant, Secant
from explaind.ledger.decompose import decompose
from explaind.ledger.ledger import Ledger
from explaind.ledger.plan import chunk_bytes
from explaind.ledger.sources import STORED, is_stored, needed
from explaind.ledger.trial import peak
from explaind.ledger.verify import Verdict
from explaind.ledger.verify_run import replay
from explaind.ledger.verify_stored import of_updates
from explaind.record.device import placed
from explaind.replay.batches import Readable, changed_examples, count, moved
from explaind.replay.functional import Functional, Readout, Training, fitted
from explaind.replay.steps import Drawn, Step
from explaind.replay.surroundings import differentiable
from explaind.replay.thin import trajectory
from explaind.store.reader import Run

TRIAL = 4
"""Steps that are tried."""
SAME = 1e-9
"""Losses that do not depend on the rest of their batch differ by no more, relatively."""


@dataclass(frozen=True)
class Diagnosis:
    """What was found of a run, or of a few steps of one that is yet to be recorded."""

    refused: list[str] = field(default_factory=list)
    """Why it cannot be explained; nothing else is known then but what was found before."""
    warnings: list[str] = field(default_factory=list)
    optimizers: list[str] = field(default_factory=list)
    layers: dict[str, str] = field(default_factory=dict)
    """How each layer's example gradients meet costates."""
    buffers: list[str] = field(default_factory=list)
    """Running statistics that move, and get a row of their own."""
    coupled: bool = False
    """Whether an example's loss depends on the others of its batch."""
    random: bool = False
    """Whether forward passes drew random numbers, which are replayed."""
    replay_error: float | None = None
    """Largest relative error of a rebuilt update."""
    explained: float | None = None
    """Of the trial, the worst measure."""
    steps: int = 0
    seconds: float | None = None
    """Estimated, of the whole decomposition."""
    memory: int | None = None
    """Estimated, bytes of the process at its largest."""
    ledger: int | None = None
    """Bytes of the result, uncompressed."""
    blocks: int = 1
    """Of queries, that are decomposed one after another."""
    recommended: dict[str, Any] = field(default_factory=dict)
    """Settings of a decomposition."""

    @property
    def ok(self) -> bool:
        """Whether it can be explained."""
        return not self.refused


def doctor(
    run: Run,
    model: nn.Module,
    *,
    data: Readable | None = None,
    losses: Readout | None = None,
    queries: Any,
    measure: Readout,
    steps: int | None = None,
    **asked: Any,
) -> Diagnosis:
    """Try a few steps and say what a whole decomposition will be like; nothing is raised for what cannot be explained.

    run, model, data, losses, queries, measure, asked  as for ``explaind.decompose``, which needs neither data nor losses where the run
                                                       stores the gradients of its examples
    steps                                              of the whole training, where the run holds only its beginning
    """
    whole = run.steps if steps is None else steps
    trial = run.first(TRIAL)
    found: dict[str, Any] = {"optimizers": [f"{o.kind} (rule {o.rule})" for o in run.manifest.optimizers], "steps": whole}
    found["buffers"] = [layer.name for layer in run.manifest.layers if layer.optimizer < 0]
    refused, warnings = list[str](), list[str]()
    device, dtype = placed(asked.get("device", "cpu")), asked.get("dtype", torch.float64)
    try:
        needs = None if is_stored(run, asked.get("products", "auto")) else needed(run, data, losses)
        lived = _replaying(trial, model, needs or (data, losses), device, asked)
        refused += [] if data is None else changed_examples(trial, data, trial.examples)
        errors, words = lived()
        refused += words
        found["replay_error"] = float(np.nanmax(errors, initial=0.0))
        with differentiable():
            known, doubts = _known(trial, model, data, losses, device, dtype, asked)
        found |= known
        warnings += doubts
        if not refused:
            given = {"data": data, "losses": losses, "queries": queries, "measure": measure, **asked}
            known, verdict = _tried(trial, model, whole, lived, given)
            found |= known
            advice = _recommended(trial, model, queries, measure, device, dtype, found)
            words, doubts = _judged(trial, model, verdict, {**given, "rule": advice["rule"]})
            refused += words
            warnings += doubts
            found["recommended"] = {} if refused else advice
    except ExplaindError as error:
        refused.append(str(error))
    return Diagnosis(refused, warnings, **found)


def _replaying(
    run: Run, model: nn.Module, given: tuple[Readable | None, Readout | None], device: torch.device, asked: Mapping[str, Any]
) -> Callable[[], tuple[np.ndarray, list[str]]]:
    """Living the trial again: from data and losses, or without them from the gradients that are stored."""
    data, losses = given
    if data is None or losses is None:
        return lambda: of_updates(run)
    return lambda: replay(run, model, data, losses, device, None, asked.get("collate"))[:2]


def _known(
    run: Run,
    model: nn.Module,
    data: Readable | None,
    losses: Readout | None,
    device: torch.device,
    dtype: torch.dtype,
    asked: Mapping[str, Any],
) -> tuple[dict[str, Any], list[str]]:
    """How every layer is covered, and whether examples are coupled or random; with what is worth a warning."""
    layout, doubts = Layout(run.manifest.layers), list[str]()
    covered, coupled, drawn = (
        dict.fromkeys(layout.names, STORED),
        False,
        any(row.random is not None for row in run.block(0, run.steps).rows),
    )
    if data is None or losses is None:
        doubts.append("without data and losses it is not known whether examples of a batch depend on each other")
    else:
        training = Training(fitted(model, run.manifest.layers, run.constants), losses, device, dtype, any(layout.moving))
        steps = trajectory(run, model, losses, data, asked.get("collate"), device, dtype)
        step = max(steps.segment(0).steps, key=lambda s: max(len(part.ids) for part in s.parts))
        part = max(step.parts, key=lambda p: len(p.ids))
        training.set_mode(step.mode)
        route = asked.get("products", "auto")
        if not is_stored(run, route):
            covered = Products(training, layout, "layer", route, machine=machine(device, dtype)).covered(step.theta, part, 1, step.mode)
        coupled = _coupled(training, layout, step)
    if coupled:
        doubts.append(
            "examples of a batch depend on each other (BatchNorm in train mode, a contrastive loss): each is credited within its batch"
        )
    if drawn and device.type != run.manifest.device.split(":")[0]:
        doubts.append(f"random numbers were drawn on {run.manifest.device}: replay them there, other devices draw others")
    if run.fingerprint is None:
        doubts.append("the recorder was not given the data, so that changed examples cannot be found: explaind.record(…, data=…)")
    return {"layers": covered, "random": drawn, "coupled": coupled}, doubts


def _coupled(training: Functional, layout: Layout, step: Step) -> bool:
    """Whether half a batch has other losses than the same examples within all of it."""
    part = max(step.parts, key=lambda p: len(p.ids))
    if isinstance(part.batch, Drawn) or len(part.ids) < 4:
        return False
    with torch.no_grad():
        parameters, half = layout.split(step.theta), len(part.ids) // 2
        whole, some = (training(parameters, batch) for batch in (part.batch, take(part.batch, slice(0, half))))
    return bool((whole[:half] - some).abs().max() > max(SAME, 64 * torch.finfo(whole.dtype).eps) * (1 + whole.abs().max()))


def _tried(run: Run, model: nn.Module, steps: int, lived: Callable[[], object], asked: dict[str, Any]) -> tuple[dict[str, Any], Verdict]:
    """Decompose the trial as asked, timed: what the whole will take, and whether the trial holds. lived: lives its steps again."""
    ticks = [(0, time.perf_counter())]
    ledger = decompose(run, model, progress=lambda done, total: ticks.append((done, time.perf_counter())), **asked)
    blocks = max(1, ticks[-1][0] // run.steps)
    pauses = np.diff([at for _, at in ticks])
    per_step = _pace(pauses, np.resize(ledger.checks.recipes[::-1].T.ravel(), len(pauses)))
    passes = _passes(ledger, run, asked)  # of all steps of a segment, before the first one is credited
    beforehand = passes * _seconds(lived) / max(1, run.steps) if passes else 0.0
    start = max(0.0, float(pauses[0]) - per_step - run.steps * beforehand)
    verdict = ledger.verify()
    tried, whole = (_size(ledger, run, n, asked) for n in (run.steps, steps))
    facts = {
        "explained": 1 - verdict.maxima["unexplained"],
        "seconds": blocks * (start + steps * (per_step + beforehand)),
        "memory": peak() + whole - tried + _held(ledger, run, steps, blocks, asked),
        "ledger": whole,
        "blocks": blocks,
    }
    return facts, verdict


def _pace(pauses: np.ndarray, recipes: np.ndarray) -> float:
    """Seconds of a step, from those between the steps of a trial, last first; recipes: how the gradient of each was averaged.

    Where the rule took dear and cheap ones nobody knows how many of each are to come: what lies between them is the least wrong.
    """
    if len(pauses) == 1:
        return float(pauses[0])
    later, kinds = pauses[1:], recipes[1:]
    each = [float(np.median(later[kinds == kind])) for kind in np.unique(kinds)]
    return sqrt(min(each) * max(each))


def _judged(run: Run, model: nn.Module, verdict: Verdict, advised: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """(why the trial's ledger would not hold, what is worth a warning), in verify's words.

    Where it does not hold as it was asked for, it is asked for again with the rule that is recommended.
    """
    early = [f"of {run.steps} steps alone: {words}" for words in verdict.early]
    if not verdict.lasting:
        return [], early
    again = decompose(run, model, **advised).verify()
    if again.lasting:
        return list(again.lasting), []
    return [], [f"with another rule than {advised['rule']!r}: {words}" for words in verdict.lasting]


def _seconds(lived: Callable[[], object]) -> float:
    begin = time.perf_counter()
    lived()
    return time.perf_counter() - begin


def _passes(ledger: Ledger, run: Run, asked: Mapping[str, Any]) -> int:
    """How often a step is lived again before it is credited: not at all where gradients come on the way (``Sweep``)."""
    rows = run.block(0, run.steps).rows
    rounded = any(row.precision for row in rows)
    changed = any(row.consumed is not None for row in rows) and not rounded  # what was done to a rounded gradient is known by then
    first = changed or run.manifest.gradient_filter is not None or "example" not in ledger.axes
    return int(rounded) + int(first or asked.get("closure") == "discrete-gradient")


def _held(ledger: Ledger, run: Run, steps: int, blocks: int, asked: Mapping[str, Any]) -> int:
    """How many bytes more the mean gradients of a whole segment take, where all are kept till its end (``Sweep``)."""
    measures = -(-np.asarray(ledger["initial"]).size // blocks)
    step = measures * run.manifest.params * (4 if asked.get("dtype") == torch.float32 else 8)
    segment = min(run.manifest.block, steps)
    fits = segment * step <= chunk_bytes(asked.get("memory"))
    return (segment - run.steps) * step if fits and "example" in ledger.axes else 0


def _size(ledger: Ledger, run: Run, steps: int, asked: Mapping[str, Any]) -> int:
    """Bytes of the ledger of so many steps: one with this one's axes, where they do not grow with the steps."""
    longer = {"step": -(-steps // int(asked.get("windows", 1)))}
    if "example" not in (asked.get("groups") or {}):
        seen = -(-len(run.examples) * steps // run.steps)  # of a training that went on to see others
        longer["example"] = seen if run.manifest.examples is None else min(seen, run.manifest.examples)
    rows = (*ledger.rows.values(), ledger.final)
    sizes = [row.values.itemsize * prod(longer.get(axis, n) for axis, n in zip(row.dims, row.values.shape, strict=True)) for row in rows]
    return sum(sizes) + (ledger.checks.by_step.nbytes + ledger.checks.replay_error.nbytes) * steps // run.steps


def _recommended(
    run: Run, model: nn.Module, queries: Any, measure: Readout, device: torch.device, dtype: torch.dtype, found: Mapping[str, Any]
) -> dict[str, Any]:
    """Settings: the rule that closes exactly where the measure's operations have one; float32 where the whole takes long."""
    rule = "secant" if _has_secant(run, model, queries, measure, device, dtype) else "adaptive"
    slow = found["seconds"] > 600 and dtype == torch.float64
    settings: dict[str, Any] = {"rule": rule, "products": "auto"}
    return {**settings, "dtype": "float32"} if slow else settings


def _has_secant(run: Run, model: nn.Module, queries: Any, measure: Readout, device: torch.device, dtype: torch.dtype) -> bool:
    layout = Layout(run.manifest.layers)
    asking = Functional(fitted(model, run.manifest.layers, run.constants), measure, device, dtype, any(layout.moving))
    batch = take(moved(queries, device, dtype), slice(0, 1)) if count(queries) else queries
    states = torch.from_numpy(run.states(0, 1)).to(device, dtype)
    try:
        with differentiable():
            Secant(asking, layout.split(states[0]), batch)
    except NoSecant:
        return False
    return bool(tree_leaves(batch))
