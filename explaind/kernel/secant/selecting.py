"""The largest of several values, which may be another one at b than at a.

Let i win at a and j at b. On the straight way between the ends i leads for the share λ = gap_a / (gap_a + gap_b) of it, with
gap_a = x_a[i] − x_a[j] and gap_b = x_b[j] − x_b[i]; then δ max = λ δx[i] + (1 − λ) δx[j], exactly max(b) − max(a).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from explaind.kernel.secant.pair import Pair, at
from explaind.kernel.secant.rules import rule
from explaind.kernel.secant.slopes import difference, quotient, ramp

Picked = Callable[[Tensor, Tensor], Tensor]
"""(values, index) -> the values at the index."""


def _winner(x: Pair, i: Tensor, j: Tensor, picked: Picked) -> Pair:
    """max(x), where index i wins at a and index j at b."""
    gap_a = difference(picked(x.a, j), picked(x.a, i))
    gap_b = difference(picked(x.b, i), picked(x.b, j))
    share = quotient(gap_a, gap_a + gap_b, torch.full_like(gap_a, 0.5))
    return Pair(picked(x.a, i), picked(x.b, j), share * picked(x.d, i) + (1.0 - share) * picked(x.d, j))


def _largest(x: Pair, dims: Any, keepdim: bool) -> Pair:
    """max over one or several dimensions."""
    ndim = x.a.ndim
    gone = sorted(d % ndim for d in ([dims] if isinstance(dims, int) else dims)) or list(range(ndim))
    kept = [d for d in range(ndim) if d not in gone]
    flat = x.linear(lambda t: t.permute(*kept, *gone).reshape(*[t.shape[d] for d in kept], -1))
    i, j = flat.a.argmax(-1, keepdim=True), flat.b.argmax(-1, keepdim=True)
    shape = [1 if d in gone else x.a.shape[d] for d in range(ndim)] if keepdim else [x.a.shape[d] for d in kept]
    return _winner(flat, i, j, lambda t, index: t.gather(-1, index)).reshape(*shape)


@rule("amax")
def amax(op: Any, x: Pair, dims: Any = (), keepdim: bool = False) -> Pair:
    return _largest(x, dims, keepdim)


@rule("amin")
def amin(op: Any, x: Pair, dims: Any = (), keepdim: bool = False) -> Pair:
    return -_largest(-x, dims, keepdim)


@rule("max")
def largest(op: Any, x: Pair, dim: int | None = None, keepdim: bool = False) -> Any:
    return _largest(x, (), False) if dim is None else (_largest(x, dim, keepdim), None)


@rule("min")
def smallest(op: Any, x: Pair, dim: int | None = None, keepdim: bool = False) -> Any:
    return -_largest(-x, (), False) if dim is None else (-_largest(-x, dim, keepdim), None)


@rule("maximum")
def maximum(op: Any, x: Any, y: Any) -> Pair:
    """max(x, y) = y + max(x − y, 0)."""
    if not isinstance(x, Pair):
        x, y = y, x
    a, b = (torch.maximum(x_end, y_end) for x_end, y_end in ((x.a, at(y, "a")), (x.b, at(y, "b"))))
    lead = x - y
    change = ramp(lead.a, lead.b) * lead.d
    return Pair(a, b, change + y.d if isinstance(y, Pair) else change)


@rule("minimum")
def minimum(op: Any, x: Any, y: Any) -> Pair:
    return -maximum(op, -x, -y)


def _pooled(op: Any, dims: int, x: Pair, *geometry: Any) -> Any:
    """A max-pool: torch gives the winners' places within each plane."""
    i, j = op(x.a, *geometry)[1], op(x.b, *geometry)[1]

    def picked(t: Tensor, index: Tensor) -> Tensor:
        return t.flatten(-dims).gather(-1, index.flatten(-dims)).reshape(index.shape)

    return _winner(x, i, j, picked), None


@rule("max_pool2d_with_indices adaptive_max_pool2d")
def max_pool2d(op: Any, x: Pair, *geometry: Any) -> Any:
    return _pooled(op, 2, x, *geometry)


@rule("max_pool3d_with_indices adaptive_max_pool3d")
def max_pool3d(op: Any, x: Pair, *geometry: Any) -> Any:
    return _pooled(op, 3, x, *geometry)
