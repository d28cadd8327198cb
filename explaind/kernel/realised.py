"""What happened to a gradient between the backward pass and the optimizer, found by comparing the consumed one with the replayed one.

Recorded are the norm n and the largest absolute value m of every tensor's consumed gradient, at steps at which something changed a
gradient after the backward pass. Clipping by norm (no number reaches m), by value (c = 1), by both in either order, and setting to zero
(c = 0) all make of a gradient G

    clamp(c G, ±m),    0 <= c <= 1.

Tried are nothing (a GradScaler's scale and its undoing), a c, an m, and both: for all of the model one c and one m, and then for each
tensor its own, as where parts are clipped apart. c is what makes the norm right, the other sizes must agree. The simplest that fits becomes
part of the step's filter: a factor on every number of the gradient, and so on what each example has of it.

What none explains is left alone, and stands in the ledger's arithmetic.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import isnan

import torch
from torch import Tensor

from explaind.kernel.layout import Layout
from explaind.replay.steps import Step
from explaind.rules.clipping import scale

FITS = 0.05
"""Largest relative misfit of sizes, tensor by tensor, of an explanation; lower precision in training costs up to some hundredths."""
SIMPLER = 3.0
"""An explanation is taken over a simpler one if its misfit is this many times smaller."""
LARGEST = 0.25
"""What a misfit of a largest number counts beside one of a norm, in which rounding averages out."""
NOISE = 1e-5
"""Misfits below this are rounding."""
Explanation = tuple[float, Tensor]
"""Misfit, and the factor on every number of a gradient: [param], or one for all."""


def realised(step: Step, gradient: Tensor, layout: Layout) -> Step:
    """The step with a filter that knows what was done to its gradient; gradient: replayed, [param]."""
    if step.consumed is None:
        return step
    misfit, factor = _simplest(_explanations(gradient, step.consumed.to(gradient), layout.slices))
    if misfit > FITS or (factor.ndim == 0 and factor == 1.0):
        return step
    sign = step.filter.sign
    return replace(step, filter=replace(step.filter, sign=sign * (factor if factor.ndim else float(factor))))


def _simplest(found: Iterator[Explanation]) -> Explanation:
    """Of explanations that come the simplest first: the first that is not much worse than the best; none is asked for behind a sure one."""
    tried = list[Explanation]()
    for one in found:
        tried.append(one)
        if one[0] <= NOISE:
            break
    best = min(misfit for misfit, _ in tried)
    return next(one for one in tried if one[0] <= max(SIMPLER * best, NOISE))


def _explanations(gradient: Tensor, consumed: Tensor, cuts: Sequence[slice]) -> Iterator[Explanation]:
    """Of all tensors together, and then of each apart; consumed: [layer, 2]."""
    floors = 1e-3 * torch.stack([consumed[:, 0].norm(), consumed[:, 1].max()])  # tensors that hardly count in the whole are not asked
    yield from _alike(gradient, consumed, cuts, floors)
    parts = [gradient[cut] for cut in cuts]
    apart = [_simplest(_alike(g, own, [slice(None)], floors)) for g, own in zip(parts, consumed[:, None], strict=True)]
    yield max(misfit for misfit, _ in apart), torch.cat([factor.expand_as(g) for (_, factor), g in zip(apart, parts, strict=True)])


def _alike(gradient: Tensor, consumed: Tensor, cuts: Sequence[slice], floors: Tensor) -> Iterator[Explanation]:
    """Nothing, one c, one m, both: for tensors that are at these cuts."""
    one, norm = gradient.new_ones(()), consumed[:, 0].norm()
    for most in (torch.inf * one, consumed[:, 1].max()):
        for c in (one, scale(gradient, norm, most)):
            scaled = c * gradient
            cut, over = scaled.clamp(-most, most), scaled.abs() > most
            yield _misfit(cut, consumed, cuts, floors), torch.where(over, cut / gradient, c) if over.any() else c


def _misfit(found: Tensor, consumed: Tensor, cuts: Sequence[slice], floors: Tensor) -> float:
    """Largest difference of the norms and (for its share) largest numbers of tensors, relative to each."""
    parts = [found[cut] for cut in cuts]
    sizes = torch.stack([torch.stack([g.norm(), g.abs().max() if len(g) else g.new_zeros(())]) for g in parts])
    off = (sizes - consumed).abs() / (consumed + floors + torch.finfo(consumed.dtype).tiny)
    worst = float((off * off.new_tensor([1.0, LARGEST])).max())
    return torch.inf if isnan(worst) else worst
