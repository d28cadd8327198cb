"""The whole run in one sweep backwards in time.

With a costate μ per measure (theory.md section 4; it starts at 0), for s = N−1 … 0:

    p = Pᵀ ḡ_s
    μ ← μ + C p
    a = N μ + E p                                  what one unit of gradient at step s did to the measure, now and later
    data[i]    = −sign · w_i <a, ∇ℓ_i(θ_s)>
    decay      = −<a, κ θ_s> − <ḡ_s, R θ_s>
    buffers    = <ḡ_s, Δ> of what no optimizer moves
    gap        = <ḡ_s, Δ> of a stretch of the training that was not recorded
    arithmetic = <ḡ_s, Δ recorded − Δ rebuilt> of all else
    μ ← M μ
    after the sweep:  momentum0 = −<μ, z_0>

Behind a gradient filter (rules/gradient_filter.py) ∇ℓ_i(θ_s) reaches a through the filter, whose memory q has a costate ν of its own:

    r, ν ← passage.pull(ν, sign · a),     data[i] = −w_i <r, ∇ℓ_i(θ_s)>,      after the sweep: momentum0 −= <ν, q_0>

Δ is rebuilt from replayed gradients and the momentum, which is recorded once a segment (an anchor). Where one segment's rebuilt
momentum ẑ meets the next one's anchor z, the difference is rounding of the recorded training; it is booked as
arithmetic, −<μ, z − ẑ>, so that the sum closes exactly and an error stays at the step at which it arose; q likewise. Behind a gap nothing
is left of the momentum before it (its filter is 0), and all that it was found with is the gap's: that −<μ, z> is booked there.

A sweep that was stopped between two segments goes on from a Snapshot, and books bitwise what it would have booked.

In the applied view every window of steps has a costate of its own, fed only by its own ḡ; it lives until its memory has faded.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from explaind.kernel.accounts import Accounts, empty
from explaind.kernel.costate import Costate
from explaind.kernel.groups import Grouping
from explaind.kernel.measures import Measures
from explaind.kernel.path import PathRule, Segment, average, discrete_gradient
from explaind.kernel.products import Products
from explaind.kernel.rebuild import Losses, Rebuilt, as_trained, rebuild, replayed
from explaind.kernel.resolution import Resolution
from explaind.replay.steps import Carried, Part, Step, Steps, with_examples
from explaind.replay.steps import Segment as Stretch
from explaind.rules.filter import Coefficient, Filter
from explaind.rules.gradient_filter import Passage

NOISE = 16
"""Roundings of a measure, that no path rule is asked to follow."""


@dataclass(frozen=True)
class Snapshot:
    """A sweep between two segments: all that it carries from one to the next. It shares the sweep's memory."""

    done: int
    """This step and all after it are booked."""
    accounts: Accounts
    costates: tuple[Costate, ...]
    rule: list[int]


def _add(into: Tensor, coefficient: Coefficient, rows: Tensor) -> Tensor:
    """into += coefficient · rows, without a number on its way to the device."""
    if isinstance(coefficient, float) and coefficient == 0.0:
        return into
    return into.addcmul_(coefficient, rows) if isinstance(coefficient, Tensor) else into.add_(rows, alpha=coefficient)


class Sweep:
    """Decomposes the measures of one block of queries over a run."""

    def __init__(
        self,
        steps: Steps,
        measures: Measures,
        losses: Losses,
        rule: PathRule,
        products: Products,
        resolution: Resolution,
        examples: np.ndarray,
        correct: bool = False,
        groups: Grouping | None = None,
    ) -> None:
        """
        examples  ids that were trained on, ascending [example]
        correct   fold the path row into the others
        groups    of examples; by default every example is one of its own
        """
        self.steps, self.layout, self.measures, self.losses, self.correct = steps, measures.layout, measures, losses, correct
        self.rule, self.products, self.resolution, self.examples, self.groups = rule, products, resolution, examples, groups
        self.values = self._values()
        self.change = self.values[1:] - self.values[:-1]
        self.scale = self.change.abs().mean(0)
        self.noise = NOISE * torch.finfo(self.values.dtype).eps * torch.maximum(self.values[1:].abs(), self.values[:-1].abs())
        entries = (len(examples) if groups is None else len(groups.names)) if "example" in resolution.keep else 1
        self.accounts: Accounts = empty(resolution, self.layout, measures.count, entries, self.values)
        self.costates: list[Costate] = []
        self._done = steps.steps
        first = steps.segment(0).carried.filtered
        self._slots = None if first is None else len(first)
        self._mean = self.values.new_zeros(measures.count, self.layout.params)  # ḡ of the step at hand
        self._pull = torch.empty_like(self._mean)  # a of the step at hand

    def _values(self) -> Tensor:
        """h_q before every step and at the end: [state, measure]."""
        return torch.stack([self.measures.values(theta) for some in self.steps.states() for theta in some])

    def run(self, progress: Callable[[], None] = lambda: None, between: Callable[[], None] = lambda: None) -> Accounts:
        """Sweep all segments, last first; `progress` is called after every step, `between` after every segment but the last."""
        following = self._anchor(self._done)
        starts = [start for start in reversed(self.steps.starts) if start < self._done]
        for start, recorded in zip(starts, self.steps.segments(starts), strict=True):
            stretch, errors = as_trained(recorded, self.layout, self.losses)
            (self._gradients_on_the_way if self._has_room(stretch) else self._gradients_first)(stretch, following, progress)
            if errors is not None:
                self.accounts.replay_error[start : start + len(errors)] = errors
            following, self._done = stretch.carried, start
            if start:
                between()
        for costate in self.costates:
            for rows, vector in costate.beside(following):
                self.accounts.momentum0 -= self._fine(rows, vector)
        self.accounts.notes = [self.rule.note] if self.rule.note else []
        return self.accounts

    def snapshot(self) -> Snapshot:
        """The sweep as it stands; to be taken between two segments."""
        return Snapshot(self._done, self.accounts, tuple(self.costates), self.rule.state())

    def restore(self, at: Snapshot) -> None:
        """Go on where a sweep with the same arguments stood."""
        self._done, self.accounts, self.costates = at.done, at.accounts, list(at.costates)
        self.rule.restore(at.rule)
        if "example" in self.resolution.keep:
            last = with_examples(self.steps.segments(self.steps.starts[::-1]), backwards=True)
            self.losses.set_mode(last.mode)
            self.products.prepare(last.theta, last.parts[0], last.mode)  # at the same step as in the sweep that was stopped

    def _anchor(self, start: int) -> Carried:
        """What the segment from here on began with; nothing where none begins."""
        return self.steps.segment(start).carried if start < self.steps.steps else Carried()

    def _gradients_first(self, stretch: Stretch, following: Carried, progress: Callable[[], None]) -> None:
        """Replay a segment forwards, then credit its steps backwards."""
        rebuilt, carried = rebuild(stretch, replayed(stretch, self.layout, self.losses, exact=True), self.layout)
        self._book_jump(self.costates, following, carried, stretch)
        for item in reversed(rebuilt):
            self._book_error(item, *self._step(item.step, item.gradient))
            progress()

    def _gradients_on_the_way(self, stretch: Stretch, following: Carried, progress: Callable[[], None]) -> None:
        """The same with one pass through the batches: the products yield the gradients, and the errors are booked when all are known."""
        at_end = [replace(costate, mu=costate.mu.clone()) for costate in self.costates]
        gradients, means = [], []
        for step in reversed(stretch.steps):
            gradients.append(torch.zeros_like(step.theta))
            means.append(self._step(step, gradients[-1], known=False)[0].clone())
            progress()
        rebuilt, carried = rebuild(stretch, gradients[::-1], self.layout)
        self._book_jump(at_end, following, carried, stretch)
        for item, mean in zip(reversed(rebuilt), means, strict=True):
            self._book_error(item, mean, mean)

    def _has_room(self, stretch: Stretch) -> bool:
        """Whether ḡ of all steps of a segment can be kept, so that no gradient need be known beforehand."""
        size = len(stretch.steps) * self._mean.numel() * self._mean.element_size()
        changed = any(step.consumed is not None or step.passage is not None for step in stretch.steps)  # how, its gradient will tell
        return "example" in self.resolution.keep and not self.correct and not changed and size <= self.products.chunk

    def _step(self, step: Step, gradient: Tensor, known: bool = True) -> tuple[Tensor, Tensor]:
        """Credit a step; ḡ before and after the closure correction. Its batch gradient is given, or else added to zeros on the way."""
        s, f = step.index, step.filter
        segment, mean = Segment(step.theta, step.after, self.change[s], self.scale, s, self.noise[s]), self._mean
        path, recipe = average(self.rule, self.measures, segment, mean)
        self.accounts.recipes[s] = str(recipe)
        self._book_rest(s, 0, self.change[s])
        self._book_rest(s, 1, path)
        before = mean
        if self.correct:
            mean = discrete_gradient(mean, path, step.delta)
            path = segment.change - mean @ step.delta
        entry = self.resolution.entry(s)
        self.accounts.path[entry] += path
        self.accounts.decay[entry] -= self._fine(mean, f.R * step.theta)
        source = self._source(entry)
        push = f.mixed(mean, transposed=True)
        _add(source.mu, f.C, push)
        self._book_sources(step, source, push, gradient, known)
        for costate in self.costates:
            costate.mu *= f.M
        if self.resolution.view == "applied":
            self._let_go(f, source)
        return before, mean

    def _source(self, entry: int) -> Costate:
        """The costate that the step's ḡ feeds."""
        own = entry if self.resolution.view == "applied" else None
        if not self.costates or self.costates[-1].entry != own:
            nu = None if self._slots is None else self._mean.new_zeros(self._slots, *self._mean.shape)
            self.costates.append(Costate(torch.zeros_like(self._mean), own, nu=nu))
        return self.costates[-1]

    def _let_go(self, f: Filter, source: Costate) -> None:
        """Costates of windows whose momentum has faded."""
        fed = torch.stack([source.mu[:, cut].abs().amax() for cut in self.layout.slices])
        source.memory = (fed > 0).double().cpu().numpy()
        decay = [f.M] if isinstance(f.M, float) else torch.stack([f.M[cut].abs().amax() for cut in self.layout.slices]).tolist()
        for costate in self.costates:
            costate.memory = costate.memory * np.abs(decay)
        self.costates = [c for c in self.costates if c is source or c.alive]

    def _pulls(self, f: Filter, source: Costate, push: Tensor) -> tuple[Tensor, float]:
        """a of all living costates, one below the other, and a factor on them: where a is a multiple of μ nothing is copied."""
        if self.costates == [source]:
            if isinstance(f.N, float) and isinstance(f.E, float) and f.E == 0.0:
                return source.mu, f.N
            return _add(torch.mul(source.mu, f.N, out=self._pull), f.E, push), 1.0
        pulls = [_add(f.N * c.mu, f.E, push) if c is source else f.N * c.mu for c in self.costates]
        return torch.cat(pulls), 1.0

    def _book_sources(self, step: Step, source: Costate, push: Tensor, gradient: Tensor, known: bool) -> None:
        """Credit the step's gradients and coupled decay through every living costate."""
        f, count = step.filter, self.measures.count
        here = self.resolution.entry(step.index)
        entries = [here if c.entry is None else c.entry for c in self.costates]
        a, factor = self._pulls(f, source, push)
        if not isinstance(f.kappa, float) or f.kappa != 0.0:
            pull = factor * f.kappa * step.theta
            for row, entry in enumerate(entries):
                self.accounts.decay[entry] -= self._fine(a[row * count : (row + 1) * count], pull)
        signed = a if isinstance(f.sign, float) and f.sign == 1.0 else f.sign * a
        if step.passage is not None:
            signed, factor = self._through(step.passage, factor * signed), 1.0
        if "example" not in self.resolution.keep:
            for row, entry in enumerate(entries):
                self.accounts.data[entry, :, :, 0] -= self._fine(signed[row * count : (row + 1) * count], factor * gradient)
            return
        self.losses.set_mode(step.mode)
        for part in step.parts:
            for places, credit in self.products.credits(
                step.theta, part, signed, self._entries(part), None if known else gradient, step.mode
            ):
                for own, entry in zip(credit.split(count, dim=1), entries, strict=True):
                    for into, values in zip(self.accounts.data[entry], own, strict=True):  # which a cache holds in float64
                        if isinstance(places, slice):
                            into[:, places].add_(values, alpha=-factor)
                        else:
                            into.index_add_(1, places, values, alpha=-factor)

    def _through(self, passage: Passage, rows: Tensor) -> Tensor:
        """What one unit of the raw gradient did, from what one of the filtered did: of all living costates, one below the other."""
        each = zip(self.costates, rows.split(self.measures.count), strict=True)
        return torch.cat([costate.through(passage, own) for costate, own in each])

    def _entries(self, part: Part) -> np.ndarray:
        """Where on the example axis each example of a micro-batch is booked."""
        places = np.searchsorted(self.examples, part.ids)
        return places if self.groups is None else self.groups.of[places]

    def _book_error(self, item: Rebuilt, before: Tensor, mean: Tensor) -> None:
        """What the recorded update was more than the rebuilt one; its size by ḡ before any correction."""
        entry = self.resolution.entry(item.step.index)
        if item.step.gap:
            self.accounts.gap[entry] += self._fine(mean, item.error)
            return
        error, buffers = self.layout.parted(item.error)
        sizes = self.layout.dots(before, error)
        same = mean is before and self.resolution.finest == "layer"
        self.accounts.arithmetic[entry] += self.layout.grouped(sizes) if same else self._fine(mean, error)
        if any(self.layout.moving):
            self.accounts.buffers[entry] += self._fine(mean, buffers)
        self._book_rest(item.step.index, 2, sizes)
        self.accounts.replay_error[item.step.index] = item.relative_error(self.layout)

    def _book_rest(self, step: int, column: int, values: Tensor) -> None:
        """Sizes of movement, path and arithmetic, over absolute values: [measure] or [layer, measure]."""
        size = values.abs() if values.ndim == 1 else values.abs().sum(0)
        accounts = self.accounts
        total = (accounts.movement, accounts.path_absolute, accounts.arithmetic_absolute)[column]
        total += size
        accounts.by_step[step, column] += size.sum()

    def _book_jump(self, costates: Sequence[Costate], following: Carried, carried: Carried, stretch: Stretch) -> None:
        """The rounding between what a segment was rebuilt to hand on and what the next began with."""
        last = stretch.steps[-1]
        jump = following.less(carried)
        for costate in costates:
            entry = self.resolution.entry(last.index) if costate.entry is None else costate.entry
            for rows, vector in costate.beside(jump):
                if last.gap:
                    self.accounts.gap[entry] -= self._fine(rows, vector)
                    continue
                self.accounts.arithmetic[entry] -= self._fine(rows, vector)
                self._book_rest(last.index, 2, self.layout.dots(rows, vector))

    def _fine(self, rows: Tensor, vector: Tensor) -> Tensor:
        """<rows, vector> at the finest parameter axis that is kept: [row, param], [param] -> [fine, row]."""
        if self.resolution.finest == "param":
            return (rows * vector).T
        if self.resolution.finest == "layer":
            return self.layout.grouped(self.layout.dots(rows, vector))
        return (rows @ vector)[None]
