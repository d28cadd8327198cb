"""A batch as a whole: its gradient, and what kind of function its losses are."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import jvp

from explaind.kernel.contracting import Contraction
from explaind.kernel.gradients import CHUNK_BYTES, RowGradients, gradient, take
from explaind.kernel.layout import Layout
from explaind.kernel.points import Function
from explaind.record.per_example import checked
from explaind.replay.steps import Logged, Part


def batch_gradient(losses: Function, layout: Layout, theta: Float[Tensor, " param"], parts: tuple[Part, ...]) -> Float[Tensor, " param"]:
    """G = Σ_i w_i ∇ℓ_i(θ), one backward pass a micro-batch; or the sum of those that are stored."""
    total = torch.zeros_like(theta)
    for part in parts:
        if isinstance(part.batch, Logged):
            for some in some_at_a_time(part.batch.examples, theta, CHUNK_BYTES):
                total.addmv_(part.batch.read(some).T, part.weights[some])
            continue
        gradient(partial(weighted, losses, part), layout, theta, total)
    return total


def some_at_a_time(examples: int, theta: Float[Tensor, " param"], most: int) -> Iterator[slice]:
    """Examples, so many at once as have gradients of at most so many bytes, and at least one."""
    at_once = max(1, most // max(1, len(theta) * theta.element_size()))
    return (slice(start, min(start + at_once, examples)) for start in range(0, examples, at_once))


def of_batch(losses: Function, part: Part, parameters: Mapping[str, Tensor]) -> Tensor:
    return checked(losses(parameters, part.batch), len(part.weights))


def weighted(losses: Function, part: Part, parameters: Mapping[str, Tensor]) -> Tensor:
    return of_batch(losses, part, parameters).to(part.weights.dtype) @ part.weights


def some_of(part: Part, examples: slice) -> Part:
    return Part(take(part.batch, examples), part.ids[examples], part.weights[examples])


def derivatives(losses: Function, part: Part, layout: Layout, theta: Float[Tensor, " param"]) -> Callable[[Mapping[str, Tensor]], Tensor]:
    """tangent -> the derivative of every loss of the part along it; buffers stand still, as for the backward pass."""
    parameters = layout.split(theta)
    still = {name for name, moves in zip(layout.names, layout.moving, strict=True) if moves}

    def along(tangent: Mapping[str, Tensor]) -> Tensor:
        pushed = {name: t for name, t in tangent.items() if name not in still}
        if not pushed:
            return torch.zeros_like(part.weights)
        at = {name: parameters[name] for name in pushed}
        with torch.no_grad():
            return jvp(lambda p: of_batch(losses, part, {**parameters, **p}), (at,), (pushed,))[1]

    return along


def each_row(along: Any, tangents: Mapping[str, Tensor]) -> Tensor:
    """along(tangent) for each row of the tangents: [row, example]. One after another, so that every operation of torch will do."""
    rows = len(next(iter(tangents.values())))
    return torch.stack([along({name: t[r] for name, t in tangents.items()}) for r in range(rows)])


def both_ways_alike(losses: Function, layout: Layout, theta: Float[Tensor, " param"], part: Part) -> bool:
    """Whether the forward derivative of the losses is the one that the backward pass takes, along a tangent at random."""
    drawn = torch.randn(len(theta), generator=torch.Generator().manual_seed(0)).to(theta)
    tangent = layout.parted(drawn)[0][None]  # buffers are no parameters of the losses
    whole = torch.zeros_like(theta)
    gradient(partial(weighted, losses, part), layout, theta, whole)
    try:
        found = each_row(derivatives(losses, part, layout, theta), layout.split(tangent)).to(theta) @ part.weights
    except (RuntimeError, NotImplementedError):
        return False
    scale = (tangent[0] * whole).abs().sum()
    return bool((found - tangent @ whole).abs().max() <= (1e-9 if theta.dtype == torch.float64 else 1e-4) * scale)


@dataclass(eq=False)
class Kind:
    """What kind of function the losses are, in one mode of the model."""

    separable: bool = False
    """Whether each example's loss depends on that example alone."""
    apart: Contraction | None = None
    gradients: RowGradients | None = None
    forward: bool | None = None
    """Whether the forward derivative is the one that the training took; None: not known yet."""
