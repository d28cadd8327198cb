"""What happened to a gradient between the backward pass and the optimizer, found by comparing the consumed one with the replayed one.

Recorded are the norm and the largest absolute value of every consumed gradient, at steps at which something changed a gradient after the
backward pass. Three explanations are tried, the simplest that fits is taken, and becomes part of the step's filter:

nothing   a GradScaler's scale and its undoing
norm      all gradients times one c < 1
value     every number of them cut off at ±v

What none explains is left alone, and stands in the ledger's arithmetic.
"""

from dataclasses import replace

import torch
from torch import Tensor

from explaind.kernel.layout import Layout
from explaind.replay.steps import Step

FITS = 0.05
"""Largest relative misfit of norms, layer by layer, of an explanation; lower precision in training costs up to some hundredths."""
SIMPLER = 3.0
"""An explanation is taken over a simpler one if its misfit is this many times smaller."""
NOISE = 1e-5
"""Misfits below this are rounding."""


def realised(step: Step, gradient: Tensor, layout: Layout) -> Step:
    """The step with a filter that knows what was done to its gradient; gradient: replayed, [param]."""
    if step.consumed is None:
        return step
    norms, most = step.consumed[:, 0].to(gradient), float(step.consumed[:, 1].max())
    replayed = _norms(gradient, layout)
    c = float((norms * replayed).sum() / replayed.square().sum()) if replayed.any() else 1.0
    cut = gradient.clamp(-most, most)
    nothing, scaled, clamped = (_misfit(norms, found) for found in (replayed, c * replayed, _norms(cut, layout)))
    best = min(nothing, scaled if c < 1.0 else torch.inf, clamped)
    if best > FITS or nothing <= max(SIMPLER * best, NOISE):
        return step
    f = step.filter
    if c < 1.0 and scaled <= max(SIMPLER * best, NOISE):
        return replace(step, filter=replace(f, sign=f.sign * c))
    return replace(step, filter=replace(f, sign=f.sign * torch.where(gradient.abs() > most, cut / gradient, 1.0)))


def _norms(gradient: Tensor, layout: Layout) -> Tensor:
    return torch.stack([gradient[cut].norm() for cut in layout.slices])


def _misfit(wanted: Tensor, found: Tensor) -> float:
    """Largest difference of two lists of norms, relative to each; tensors that hardly count in the whole are not asked."""
    floor = 1e-3 * wanted.norm() + torch.finfo(wanted.dtype).tiny
    return float(((found - wanted).abs() / (wanted + floor)).max())
