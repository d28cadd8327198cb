"""Do the gradients of a step's examples sum to the gradient that the optimizer consumed? Σ_i w_i ∇ℓ_i = G, layer by layer.

Where something changed the gradient after the backward pass, G may be what clipping by norm (of all of a model or of parts), by value or
by both makes of the sum: what the replay of a run finds as well (kernel/realised.py). The scale of a GradScaler is taken out.
"""

import sys
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.amp import GradScaler

from explaind.errors import RecordError
from explaind.record.watched import Watched
from explaind.rules.clipping import scale

ROOM = {torch.float64: 1e-10, torch.float32: 1e-4}
"""Rounding of a sum over examples and positions, of the size of what is summed …"""
COARSE = 8.0
"""… or so many ε of a coarser dtype."""
ALIKE = 10.0
"""Times that room for two ways to compute one gradient."""
WHOLE = 1e-2
"""That share of the whole gradient counts as a layer's size: a gradient may be nothing but rounding (the bias of attention's keys)."""


def scale_of(watched: Watched, optimizer: int) -> float:
    """What a GradScaler has multiplied the loss by, for an optimizer that is stepping; 1 where there is none.

    A scaler leaves no trace on gradients that it has unscaled, nor on their optimizer, and clipping behind it hides the factor. But it is
    what calls the step.
    """
    frame = sys._getframe(1)
    while frame is not None and frame.f_code is not GradScaler.step.__code__:
        frame = frame.f_back  # type: ignore[assignment]
    return watched.scale(optimizer) if frame is None else float(frame.f_locals["self"].get_scale())


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


def same_gradients(watched: Watched, seen: Tensor, wanted: Tensor, rounding: Rounding) -> bool:
    """Whether gradients of examples [example, param] are the same but for rounding, in all layers where they have not overflowed."""
    room = ALIKE * rounding.room(seen.dtype)
    floor = WHOLE * _norm(wanted)
    cuts = (slice(layer.offset, layer.offset + layer.size) for layer in watched.layers)
    finite = (own for own in cuts if torch.isfinite(seen[:, own]).all())
    return all(_norm((seen - wanted)[:, own]) <= room * (_norm(wanted[:, own]) + floor) for own in finite)


def _norm(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values, dtype=torch.float64))


def _changed(total: Tensor, consumed: Tensor, allowed: float) -> bool:
    """Whether clipping explains the difference."""
    most = consumed.abs().max() if len(consumed) else consumed.new_zeros(())
    for bound in (most.new_tensor(torch.inf), most):
        c = scale(total, torch.linalg.vector_norm(consumed), bound)
        if float(((c * total).clamp(-bound, bound) - consumed).norm()) <= c * allowed:
            return True
    return False
