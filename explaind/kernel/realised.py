"""What happened to a gradient between the backward pass and the optimizer, found by comparing the consumed one with the replayed one.

Recorded are the norm and the largest absolute value of every consumed gradient, at steps at which something changed a gradient after the
backward pass. Four explanations are tried, the simplest that fits is taken, and becomes part of the step's filter:

nothing   a GradScaler's scale and its undoing
norm      all gradients times one c < 1
value     every number of them cut off at ±v
parts     each tensor's gradient times a c ≤ 1 of its own, as when parts of a model are clipped apart; its norm gives c, its largest number
          must agree

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
    f = step.filter
    if best > FITS:
        parts = _of_parts(step.consumed.to(gradient), gradient, layout)
        return step if parts is None else replace(step, filter=replace(f, sign=f.sign * parts))
    if nothing <= max(SIMPLER * best, NOISE):
        return step
    if c < 1.0 and scaled <= max(SIMPLER * best, NOISE):
        return replace(step, filter=replace(f, sign=f.sign * c))
    return replace(step, filter=replace(f, sign=f.sign * torch.where(gradient.abs() > most, cut / gradient, 1.0)))


def _of_parts(consumed: Tensor, gradient: Tensor, layout: Layout) -> Tensor | None:
    """The factor of every number [param] where each tensor has one; None where that does not explain what was consumed [layer, 2]."""
    pieces = [gradient[cut] for cut in layout.slices]
    counts = _counts(consumed[:, 0])
    norms = consumed[:, 0]
    factors = [float(n / g.norm()) if some and g.any() else 1.0 for g, n, some in zip(pieces, norms, counts, strict=True)]
    if max(factors) > 1.0 + FITS:
        return None
    largest = torch.stack([c * g.abs().max() if len(g) else g.new_zeros(()) for c, g in zip(factors, pieces, strict=True)])
    if float(((largest - consumed[:, 1]).abs() / consumed[:, 1].clamp_min(torch.finfo(gradient.dtype).tiny))[counts].max()) > FITS:
        return None
    return torch.cat([torch.full_like(g, c) for c, g in zip(factors, pieces, strict=True)])


def _counts(norms: Tensor) -> Tensor:
    """Which tensors count in the whole: bool [layer]."""
    return norms > 1e-3 * norms.norm()


def _norms(gradient: Tensor, layout: Layout) -> Tensor:
    return torch.stack([gradient[cut].norm() for cut in layout.slices])


def _misfit(wanted: Tensor, found: Tensor) -> float:
    """Largest difference of two lists of norms, relative to each; tensors that hardly count in the whole are not asked."""
    floor = 1e-3 * wanted.norm() + torch.finfo(wanted.dtype).tiny
    return float(((found - wanted).abs() / (wanted + floor)).max())
