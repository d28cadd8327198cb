"""Do the gradients of a step's examples sum to the gradient that the optimizer consumed? Σ_i w_i ∇ℓ_i = G, layer by layer.

Where something changed the gradient after the backward pass, G may be a multiple c ≤ 1 of the sum (clipping by norm, of all of a model or
of parts), or the sum cut off at ±v (clipping by value): what the replay of a run finds as well (kernel/realised.py). A GradScaler's scale,
which makes all layers too large by one power of two, is taken out.
"""

from dataclasses import dataclass
from math import log2

import torch
from torch import Tensor

from explaind.errors import RecordError
from explaind.record.watched import Watched

ROOM = {torch.float64: 1e-10, torch.float32: 1e-4}
"""Rounding of a sum over examples and positions, of the size of what is summed …"""
COARSE = 8.0
"""… or so many ε of a coarser dtype."""
ALIKE = 10.0
"""Times that room for two ways to compute one gradient."""
WHOLE = 1e-2
"""That share of the whole gradient counts as a layer's size: a gradient may be nothing but rounding (the bias of attention's keys)."""
EXACT = 1e-4
"""How close a factor must be to a power of two to be a GradScaler's: clipping rarely comes so close, and is then told as one."""


def scale_of(watched: Watched, optimizer: int, total: Tensor, untouched: bool) -> float:
    """What takes a GradScaler's scale out of the gradients that an optimizer consumes; total: the weighted sum of all [param].

    untouched: whether torch knows of nothing that changed them.
    """
    fused = watched.scale(optimizer)
    if fused != 1.0:  # a fused optimizer undoes it itself
        return 1.0 / fused
    own = torch.cat([total[a.offset : a.offset + a.size] * (a.optimizer == optimizer) for a in watched.layers]).double()
    size = float(own.square().sum())
    factor = float(own @ watched.gradient(optimizer).double()) / size if size else 1.0
    if not 0.0 < factor < 1.0 - EXACT:
        return 1.0
    if untouched:  # as far as torch tells: it does not tell of a GradScaler
        return factor
    nearest = 2.0 ** round(log2(factor))
    return nearest if abs(factor / nearest - 1.0) <= EXACT and nearest < 1.0 else 1.0


@dataclass(frozen=True)
class Rounding:
    """ε of the dtype that gradients are stored in, and of that which the training computed in."""

    stored: float
    computed: float

    def room(self, dtype: torch.dtype) -> float:
        """Relative size of a difference that is rounding, of gradients that were added up in this dtype."""
        coarse = [COARSE * eps for eps in (self.stored, self.computed) if eps > torch.finfo(torch.float32).eps]
        fine = self.stored > torch.finfo(dtype).eps or self.computed > torch.finfo(dtype).eps
        return max(ROOM[torch.float32 if fine else dtype], *coarse, 0.0)


def check_sum(watched: Watched, optimizer: int, gradients: Tensor, weights: Tensor, rounding: Rounding, untouched: bool, step: int) -> None:
    """RecordError where the sum of what an optimizer consumes is another one, at the first layer.

    gradients: as they are stored [slot, param], of which those of other optimizers are not looked at.
    """
    consumed = watched.gradient(optimizer)
    pairs = [(p, layer) for p, layer in zip(watched.params, watched.layers, strict=True) if layer.optimizer == optimizer]
    cuts = [slice(layer.offset, layer.offset + layer.size) for _, layer in pairs]
    sums = [weights @ gradients[:, own] for own in cuts]
    sizes = [weights.abs() @ gradients[:, own].abs() for own in cuts]
    size = torch.cat(sizes)
    if not torch.isfinite(size).all():
        raise RecordError("an example's gradient does not fit its dtype", where=f"step {step}", do="take a larger gradient_dtype")
    room = rounding.room(gradients.dtype)
    floor = WHOLE * _norm(size)
    for (p, layer), own, total, much in zip(pairs, cuts, sums, sizes, strict=True):
        if p.grad is None:
            continue
        allowed = room * (_norm(much) + floor)
        got, want = total.double(), consumed[own].double()
        if float((got - want).norm()) <= allowed or (not untouched and _changed(got, want, allowed)):
            continue
        raise RecordError(
            "the gradients of the examples do not sum to the gradient that the optimizer consumed",
            where=f"step {step}: {layer.name}",
            expected=f"a norm of {float(want.norm()):.6g}, or a part of it by clipping",
            got=f"a sum of norm {float(got.norm()):.6g}, off by {float((got - want).norm()):.3g} where {allowed:.3g} would be rounding",
            do="all of the loss must be a weighted sum over the announced examples, and the layer be used through its module alone; "
            "give losses= and data=, or record with gradients='recompute'",
        )


def same_gradients(watched: Watched, seen: Tensor, wanted: Tensor, rounding: Rounding, untouched: bool) -> bool:
    """Whether gradients of examples [example, param] are the same but for rounding, and, unless untouched, for one factor."""
    size = float(wanted.double().square().sum())
    factor = 1.0 if untouched or not size else float((seen.double() * wanted).sum()) / size
    room, want = ALIKE * rounding.room(seen.dtype), factor * wanted
    floor = WHOLE * _norm(want)
    cuts = (slice(layer.offset, layer.offset + layer.size) for layer in watched.layers)
    return factor > 0.0 and all(_norm((seen - want)[:, own]) <= room * (_norm(want[:, own]) + floor) for own in cuts)


def _norm(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values, dtype=torch.float64))


def _changed(total: Tensor, consumed: Tensor, allowed: float) -> bool:
    """Whether clipping explains the difference."""
    size = float(total.square().sum())
    factor = float(total @ consumed) / size if size else 1.0
    if 0.0 <= factor <= 1.0 and float((factor * total - consumed).norm()) <= factor * allowed:
        return True
    most = float(consumed.abs().max()) if len(consumed) else 0.0
    return float((total.clamp(-most, most) - consumed).norm()) <= allowed
