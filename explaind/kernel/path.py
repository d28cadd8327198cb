"""Path rules: the gradient of every measure, averaged over the straight segment of a step.

    <ḡ_q, Δ> ≈ δ_q = h_q(θ + Δ) − h_q(θ),        path_q = δ_q − <ḡ_q, Δ>

δ is known exactly from forward passes, so that a rule's miss is known on every step and for every measure.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from explaind.errors import RequestError
from explaind.kernel.measures import Measures

LADDER = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Numbers of Gauss nodes that the adaptive rule tries."""


@dataclass(frozen=True)
class Segment:
    """One step of the parameters, with what every measure did on it."""

    theta: Float[Tensor, " param"]
    delta: Float[Tensor, " param"]
    change: Float[Tensor, " measure"]
    """δ, exactly."""
    scale: Float[Tensor, " measure"]
    """Mean |δ| of each measure over the steps of the run: below it a relative error means nothing."""


class PathRule(Protocol):
    """Chooses the nodes t in [0, 1] and their weights for a segment."""

    @property
    def name(self) -> str:
        """The rule's own name, with its numbers."""
        ...

    def nodes(self, measures: Measures, segment: Segment) -> tuple[np.ndarray, np.ndarray]:
        """(nodes, weights), each [node]."""
        ...

    def state(self) -> list[int]:
        """What the rule carries from step to step: ``restore`` takes it in a rule of the same name."""
        ...

    def restore(self, state: list[int]) -> None:
        """Go on as the rule did whose state this was."""
        ...


def gauss(n: int) -> tuple[np.ndarray, np.ndarray]:
    """n Gauss–Legendre nodes and weights on [0, 1]."""
    x, w = np.polynomial.legendre.leggauss(n)
    return (x + 1) / 2, w / 2


def midpoint(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Midpoints of n equal parts (the paper's rule, with n = 100)."""
    return (np.arange(n) + 0.5) / n, np.full(n, 1.0 / n)


@dataclass(frozen=True)
class Quadrature:
    """The same nodes on every step."""

    name: str
    points: np.ndarray
    weights: np.ndarray

    def nodes(self, measures: Measures, segment: Segment) -> tuple[np.ndarray, np.ndarray]:
        return self.points, self.weights

    def state(self) -> list[int]:
        return []

    def restore(self, state: list[int]) -> None:
        pass


class Adaptive:
    """The fewest Gauss nodes whose miss is at most tol · max(|δ|, scale) for every measure, found before any gradient is taken.

    The directional derivative of all measures together is one forward-mode pass, where ḡ costs a backward pass per measure.
    The search starts where the last step's ended, since neighbouring steps are alike; it never returns a rule that it has not
    checked, unless even the longest misses, which the path row then shows.
    """

    def __init__(self, tol: float) -> None:
        if not tol > 0:
            raise RequestError("the tolerance must be positive", expected="tol > 0", got=tol, do="give for instance 1e-3")
        self.name, self._tol, self._rung = f"adaptive:{tol:g}", tol, 1

    def _miss(self, measures: Measures, s: Segment, rung: int) -> float:
        points, weights = gauss(LADDER[rung])
        total = torch.zeros_like(s.change)
        for t, w in zip(points, weights, strict=True):
            total += w * measures.slopes(s.theta + float(t) * s.delta, s.delta)
        allowed = self._tol * torch.maximum(s.change.abs(), s.scale)
        return float(((s.change - total).abs() / allowed.clamp_min(torch.finfo(allowed.dtype).tiny)).max())

    def nodes(self, measures: Measures, segment: Segment) -> tuple[np.ndarray, np.ndarray]:
        rung = self._rung
        miss = self._miss(measures, segment, rung)
        if miss <= 1:
            # A Gauss rule gains orders of magnitude a rung: only when there is room is the rung below worth a look.
            while rung and miss < 0.1 and (miss := self._miss(measures, segment, rung - 1)) <= 1:
                rung -= 1
        else:
            while miss > 1 and rung + 1 < len(LADDER):
                rung += 1
                miss = self._miss(measures, segment, rung)
        self._rung = rung
        return gauss(LADDER[rung])

    def state(self) -> list[int]:
        return [self._rung]

    def restore(self, state: list[int]) -> None:
        (self._rung,) = state


def average(
    rule: PathRule, measures: Measures, segment: Segment, mean: Float[Tensor, "measure param"]
) -> tuple[Float[Tensor, " measure"], int]:
    """Puts ḡ of a segment into `mean`; (path, number of nodes)."""
    points, weights = rule.nodes(measures, segment)
    mean.zero_()
    at = [(segment.theta + float(t) * segment.delta, float(w)) for t, w in zip(points, weights, strict=True)]
    measures.add_gradients(mean, at)
    return segment.change - mean @ segment.delta, len(points)


def discrete_gradient(mean: Float[Tensor, "measure param"], path: Float[Tensor, " measure"], delta: Float[Tensor, " param"]) -> Tensor:
    """ḡ + path · Δ / ‖Δ‖², whose product with Δ is δ exactly (Gonzalez 1996)."""
    square = delta @ delta
    return mean if square == 0 else mean + torch.outer(path / square, delta)


def path_rule(spec: str, tol: float) -> PathRule:
    """The rule that a name such as "auto", "adaptive", "gauss:4" or "midpoint:100" stands for."""
    if spec in ("auto", "adaptive"):
        return Adaptive(tol)
    kind, _, number = spec.partition(":")
    make = {"gauss": gauss, "midpoint": midpoint}.get(kind)
    if make is None or not number.isdigit() or int(number) < 1:
        raise RequestError("unknown path rule", expected="auto, adaptive, gauss:N or midpoint:N", got=repr(spec), do="choose one of these")
    return Quadrature(spec, *make(int(number)))
