"""Why a replay differs from the record: the gradient that a recorded update implies, beside the replayed one and a few suspicions.

A filter can be run backwards. With z known (it is recorded at the beginning of every segment), Δ tells the gradient that was consumed:

    g = −(P⁻¹(Δ + R θ) + C M z) / (C N + E),    G = (g − kappa θ) / sign

where an element of the parameters has a rate C N + E and a sign that are not 0; parameters that P mixes are left out.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from explaind.kernel.layout import Layout
from explaind.kernel.realised import realised
from explaind.kernel.whole import batch_gradient
from explaind.ledger.verify import STANDS_OUT
from explaind.record.examples import fingerprint
from explaind.replay.batches import Readable, moved
from explaind.replay.functional import Functional
from explaind.replay.steps import Drawn, Segment, Step
from explaind.replay.trajectory import Trajectory

PARALLEL = 0.999
"""Cosine of two gradients that differ by a factor alone."""
NEARLY = 0.98
"""Cosine that rounding in a lower precision leaves."""
FACTOR = 0.01
"""Smallest difference of a factor from 1 that counts."""
ASKED = 4
"""Segments that are asked, beside that of the worst step."""
TIMES = 3
"""How often losses are called to see whether they come out the same …"""
REPEATED = 1e-4
"""… but for the order of sums on an accelerator."""


@dataclass(frozen=True)
class Comparison:
    """A gradient beside the one that the record implies."""

    cosine: float
    factor: float
    """The implied gradient is best told as so many times the other."""

    @property
    def same(self) -> bool:
        """Whether they are one gradient."""
        return self.cosine >= PARALLEL and abs(self.factor - 1.0) <= FACTOR


def implied(step: Step, momentum: Tensor | None, layout: Layout) -> tuple[Tensor, Tensor]:
    """(the gradient that the recorded update implies, where it is known): both [param]."""
    f, theta = step.filter, step.theta
    zero = torch.zeros_like(theta)
    rate = zero + (f.C * f.N + f.E)
    for mix in f.P:
        rate[mix.start : mix.start + mix.size] = 0.0
    pushed = step.delta + f.R * theta + f.C * (f.M * (zero if momentum is None else momentum))
    g = torch.where(rate != 0, -pushed / rate, 0.0)
    known = (rate != 0) & (zero + f.sign != 0) & torch.isfinite(g)
    return torch.where(known, (g - f.kappa * theta) / f.sign, 0.0), known


def compared(wanted: Tensor, known: Tensor, found: Tensor) -> Comparison:
    """The implied gradient beside one that was computed."""
    x = torch.where(known, found, 0.0)
    dot, size = float(wanted @ x), float(x @ x)
    norms = float(wanted.norm()) * size**0.5
    return Comparison(dot / norms if norms else 0.0, dot / size if size else 0.0)


def causes(steps: Trajectory, errors: np.ndarray, layout: Layout, losses: Functional, data: Readable) -> list[str]:
    """The likely causes of a replay that differs, in words; errors: of the rebuilt updates, [step, layer].

    Asked are the first steps of a few segments, the one with the worst error among them.
    """
    worst = int(np.argmax(np.nan_to_num(errors, nan=np.inf).max(axis=1)))
    of_worst = max(start for start in steps.starts if start <= worst)
    some = [steps.starts[i] for i in np.unique(np.linspace(0, len(steps.starts) - 1, ASKED).round().astype(int))]
    forgotten = _of_ages(steps, of_worst, layout)
    if forgotten:
        return forgotten
    plain = list[tuple[Step, Comparison]]()
    for stretch in steps.segments(sorted({of_worst, *some})):
        if stretch.steps[0].gap:
            continue
        step, wanted, known, found = _compared(stretch, layout, losses)
        if not found.same:
            words = [
                *_of_data(step, data),
                *(_of_chance(step, layout, losses) or _of_modes(step, layout, losses, wanted, known)),
                *(() if steps.batches.plain else _of_collate(step, data, layout, losses, wanted, known)),
            ]
            if words:
                return words
        plain.append((step, found))
    if all(found.same for _, found in plain):
        return _of_others(errors, worst, [step.index for step, _ in plain])
    return _of_direction(plain, _batched(steps, data, plain))


def _compared(stretch: Segment, layout: Layout, losses: Functional) -> tuple[Step, Tensor, Tensor, Comparison]:
    """The first step, the gradient that its record implies, where that is known, and how the replayed one compares."""
    recorded = stretch.steps[0]
    losses.set_mode(recorded.mode, recorded.precision)
    replayed = batch_gradient(losses, layout, recorded.theta, recorded.parts)
    step = realised(recorded, replayed, layout)
    wanted, known = implied(step, stretch.carried.momentum, layout)
    if step.passage is not None and stretch.carried.filtered is not None:
        wanted = torch.where(known, step.passage.undo(stretch.carried.filtered, wanted), 0.0)
    return step, wanted, known, compared(wanted, known, replayed)


def _batched(steps: Trajectory, data: Readable, plain: Sequence[tuple[Step, Comparison]]) -> str:
    """What is known of the examples and of what made batches of them; empty where there are no fingerprints that say so."""
    prints = steps.run.fingerprint
    ids = {int(i) for step, _ in plain for part in step.parts for i in part.ids[:ASKED]}
    if prints is None or any(fingerprint(data[i]) != prints[i] for i in ids):
        return ""
    how = "torch's default_collate: give the training's collate=, if it had its own" if steps.batches.plain else "the collate= given"
    return f"the examples are those of the training (their fingerprints), and were made a batch by {how}; or it is "


def _of_direction(plain: Sequence[tuple[Step, Comparison]], batched: str) -> list[str]:
    least = min(found.cosine for _, found in plain)
    words = _of_size(plain) if least >= PARALLEL else None
    if words is not None:
        return [words]
    if least >= NEARLY:
        alike = f"the gradients have nearly one direction (cosine {least:.4f})"
        return [f"{alike}: lower precision in training (autocast), or slightly another loss or other data"]
    others = "" if batched else "another collate function, other data than in training, "
    return [
        f"the gradients differ in direction (cosine {least:.3f}): {batched}another loss (label smoothing, class weights, a penalty), "
        f"{others}or a gradient filter (Grokfast) that the recorder was not told of"
    ]


def _of_data(step: Step, data: Readable) -> Iterator[str]:
    ids = [int(i) for part in step.parts for i in part.ids[:3]][:8]
    if any(fingerprint(data[i]) != fingerprint(data[i]) for i in ids):
        yield "data[i] is another one each time that it is read: random augmentation must be fixed, or drawn before the data is given"


def _of_chance(step: Step, layout: Layout, losses: Functional) -> list[str]:
    """Do the losses come out the same each time, with torch's random numbers as they were recorded?"""
    first, *others = [batch_gradient(losses, layout, step.theta, step.parts) for _ in range(TIMES)]
    if all(float((other - first).norm()) <= REPEATED * float(first.norm()) for other in others):
        return []
    return [
        "losses gives another gradient each time that it is called: random numbers that are not of torch's own generator (Python's random, "
        "numpy), or something that it remembers; draw them with torch, or give them with the examples"
    ]


def _of_ages(steps: Trajectory, start: int, layout: Layout) -> list[str]:
    """Did an optimizer count fewer updates of a parameter than it had made in this segment?"""
    stop = next((s for s in steps.starts if s > start), steps.steps)
    ages = np.stack([row.age for row in steps.run.block(start, stop).rows])
    lost = np.argwhere((ages[1:] >= 0) & (ages[1:] < np.maximum.accumulate(ages)[:-1]))
    if not len(lost):
        return []
    i, layer = lost[0].tolist()
    return [
        f"the optimizer had forgotten its state before step {start + i + 1} ({layout.names[layer]}): state that is cleared, or loaded from "
        "another time, is no step of the optimizer; begin another recording behind it"
    ]


def _of_others(errors: np.ndarray, worst: int, asked: Sequence[int]) -> list[str]:
    """What is left where the gradients that were asked for are the recorded ones, to the last numbers."""
    sizes = np.nan_to_num(errors, nan=np.inf).max(axis=1)
    if not asked or sizes[list(asked)].max() * STANDS_OUT > sizes[worst]:
        return []
    return [
        f"model and losses give the gradients of steps {', '.join(map(str, asked))}, and not the updates of others: other examples or "
        "labels there, momentum that was changed by hand between two steps, or a record that was changed afterwards"
    ]


def _of_modes(step: Step, layout: Layout, losses: Functional, wanted: Tensor, known: Tensor) -> Iterator[str]:
    """Would another mode explain the record? And does the loss function change the mode by itself?"""
    for training in (True, False):
        if all(mode == training for mode in step.mode):
            continue
        losses.set_mode([training] * len(step.mode), step.precision)
        try:
            other = compared(wanted, known, batch_gradient(losses, layout, step.theta, step.parts))
        except (RuntimeError, ValueError):
            continue
        if other.same:
            said = "train" if training else "eval"
            yield f"in {said} mode the model gives the recorded gradient: losses was computed in {said} mode, the record says otherwise"
    losses.set_mode(step.mode, step.precision)
    batch = step.parts[0].batch
    with torch.no_grad():
        losses(layout.split(step.theta), batch.batch if isinstance(batch, Drawn) else batch)
    if _modes(losses.model) != step.mode:
        yield "losses changes the mode of the model (model.train() or model.eval() in it): leave that to the record"


def _of_collate(step: Step, data: Readable, layout: Layout, losses: Functional, wanted: Tensor, known: Tensor) -> Iterator[str]:
    """Would the batches that torch makes explain the record?"""

    def made(ids: np.ndarray, batch: Any) -> Any:
        plain = moved(default_collate([data[int(i)] for i in ids]), step.theta.device, step.theta.dtype)
        return Drawn(plain, batch.states) if isinstance(batch, Drawn) else plain

    try:
        parts = tuple(replace(part, batch=made(part.ids, part.batch)) for part in step.parts)
        other = compared(wanted, known, batch_gradient(losses, layout, step.theta, parts))
    except (RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError):
        return  # examples that torch makes no batch of, or that the losses cannot take
    if other.same:
        yield "with torch's default_collate the model gives the recorded gradient: collate= makes other batches than the training's"


def _of_size(plain: Sequence[tuple[Step, Comparison]]) -> str | None:
    """What gradients that differ by a factor alone say, where one reason fits all of them."""
    factors = np.array([found.factor for _, found in plain])
    counts = {what: np.array([count(step) for step, _ in plain]) for what, count in (("examples", _examples), ("micro-batches", _parts))}
    for what, count in counts.items():
        if np.all(abs(factors / count - 1) <= FACTOR):
            return f"recorded gradients are so many times the replayed ones as a step has {what}: summed, not averaged as recorded"
        if np.all(abs(factors * count - 1) <= FACTOR):
            return f"replayed gradients are so many times the recorded ones as a step has {what}: averaged, not summed as recorded"
    if np.ptp(factors) <= FACTOR * abs(factors[0]):
        return f"recorded gradients are {factors[0]:.3g} times the replayed ones: another weight on the loss, or scaled before the step"
    return None


def _examples(step: Step) -> int:
    return sum(len(part.ids) for part in step.parts)


def _parts(step: Step) -> int:
    return len(step.parts)


def _modes(model: nn.Module) -> tuple[bool, ...]:
    return tuple(module.training for module in model.modules())


def words_of(found: Sequence[str]) -> list[str]:
    """As reasons of a verdict."""
    return [f"likely cause: {words}" for words in found]
