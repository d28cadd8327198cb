"""What was done to a gradient between the backward pass and the optimizer, done once more: one tensor, from two recorded sizes.

A gradient that is as large as the consumed one is left as it is. One that was scaled as a whole (clipped by norm) keeps its ratio of norm
to largest number; the factor is rounded to the gradient's dtype, in which clipping multiplies. One that was cut off (clipped by value)
has a largest number that is the bound, which is taken where both fit. What was clipped in both ways, in either order, is the gradient
scaled, and cut off at what its largest number became. What is none of these is left, and the parameters' checksum will tell.
"""

import torch
from torch import Tensor

from explaind.rules.clipping import scale

ALIKE = 1e-5
"""Relative difference of two sizes that are one but for rounding."""
TINY = torch.finfo(torch.float64).tiny


def treated(gradient: Tensor, norm: float, most: float) -> Tensor:
    """The gradient with this norm and largest absolute value."""
    own, largest = (float(torch.linalg.vector_norm(gradient, ord, dtype=torch.float64)) for ord in (2, torch.inf))
    if own == 0.0 or (_alike(own, norm) and _alike(largest, most)):
        return gradient
    cut = gradient.clamp(-most, most)
    of_cut = abs(float(torch.linalg.vector_norm(cut, dtype=torch.float64)) - norm)
    factor = norm / own
    of_scaled = abs(factor * largest - most)
    if min(of_cut / max(norm, TINY), of_scaled / max(most, TINY)) <= ALIKE:
        return cut if of_cut <= of_scaled else _times(gradient, factor)
    sizes = torch.tensor([norm, most], dtype=torch.float64, device=gradient.device)
    both = _times(gradient, float(scale(gradient.double(), *sizes))).clamp(-most, most)
    return both if _alike(float(torch.linalg.vector_norm(both, dtype=torch.float64)), norm) else gradient


def _times(gradient: Tensor, factor: float) -> Tensor:
    return gradient * torch.tensor(factor, dtype=gradient.dtype, device=gradient.device)


def _alike(one: float, other: float) -> bool:
    return abs(one - other) <= ALIKE * max(abs(one), abs(other))
